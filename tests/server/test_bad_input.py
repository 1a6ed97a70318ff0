"""EXPLAINED: whatever comes in, the answer is a typed refusal, nothing is stored, and the server lives.

The matrix has a line for each way in which a packet can be wrong. Each is sent four ways: alone, alone in
an envelope, between good packets in a batch, and to the dry run. The other tests are about requests that
hold no packet at all: garbage, bombs, and what is too large.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import zstandard
from server_harness import (
    DEADLINE_S,
    Client,
    Refusal,
    ccs,
    changed,
    eventually,
    identity,
    msp,
    pop,
    refusal_of,
    rows,
    spec,
    trained_dictionary,
    zstd,
)

from fmi.v1 import (
    admin_service_pb2,
    cohort_pb2,
    error_pb2,
    packet_pb2,
    registry_service_pb2,
)
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server.app import RunningServer
from fmi_server.testing import running_server

Code = grpc.StatusCode
NAN, INF = float("nan"), float("inf")
DAY_S = 86_400
MIB = 2**20

CLINIC = spec(
    "clinic",
    signals=[
        cohort_pb2.SignalSpec(
            name="tau", section=cohort_pb2.SIGNAL_SECTION_CONTROLLER, lower=0.0, upper=1.0
        ),
        cohort_pb2.SignalSpec(name="gain", section=cohort_pb2.SIGNAL_SECTION_METRICS),
    ],
)
STRICT = spec(
    "strict",
    ingest=cohort_pb2.IngestSpec(
        max_packet_bytes=600,
        max_norm=10.0,
        dp_required=True,
        schema_mismatch=cohort_pb2.SCHEMA_MISMATCH_REFUSE,
    ),
)


# One server takes all of it: what harms it harms the tests behind.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad-input") / "data"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(data_dir: Path) -> AsyncIterator[RunningServer]:
    """A server with two declared cohorts and a free one, that opens no others."""
    async with (
        running_server(
            data_dir, open_cohorts=False, max_batch_packets=100, max_batch_bytes=MIB
        ) as running,
        Client(running.target) as client,
    ):
        for declared in (CLINIC, STRICT, spec("free")):
            await client.put_spec(declared)
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(server: RunningServer) -> AsyncIterator[Client]:
    async with Client(server.target) as connected:
        yield connected


def no_body(packet: packet_pb2.Packet) -> None:
    packet.ClearField("msp")


def header(**fields: Any) -> Callable[[packet_pb2.Packet], None]:
    def change(packet: packet_pb2.Packet) -> None:
        for name, value in fields.items():
            setattr(packet.header, name, value)

    return change


def emitted(seconds: int) -> Callable[[packet_pb2.Packet], None]:
    """Emitted so many seconds from now."""

    def change(packet: packet_pb2.Packet) -> None:
        packet.header.emitted_at.GetCurrentTime()
        packet.header.emitted_at.seconds += seconds

    return change


def at(seconds: int = 1_700_000_000, *, nanos: int = 0) -> Callable[[packet_pb2.Packet], None]:
    """Emitted at that Unix time."""

    def change(packet: packet_pb2.Packet) -> None:
        packet.header.emitted_at.seconds = seconds
        packet.header.emitted_at.nanos = nanos

    return change


def private() -> dict[str, Any]:
    return {"provenance": {"applied_privacy": {"mechanism": "gaussian", "epsilon": 1.0}}}


@dataclass(frozen=True)
class Bad:
    """A packet that is wrong, and what must be said of it: reason, code, and each (field, rule)."""

    what: str
    right: packet_pb2.Packet
    change: Callable[[packet_pb2.Packet], object]
    reason: str
    code: grpc.StatusCode
    violations: frozenset[tuple[str, str]]

    @property
    def packet(self) -> packet_pb2.Packet:
        """The packet, with a time that is counted from the test and not from the collection."""
        return changed(self.right, self.change)


def bad(
    what: str,
    packet: packet_pb2.Packet,
    *violations: tuple[str, str],
    reason: str = "CONTRACT_VIOLATION",
    code: grpc.StatusCode = Code.INVALID_ARGUMENT,
    change: Callable[[packet_pb2.Packet], object] = lambda _: None,
) -> Any:
    return pytest.param(Bad(what, packet, change, reason, code, frozenset(violations)), id=what)


NO_TIME = ("header.emitted_at", "fmi.header.emitted_at")
TAU = ('msp.controller["tau"]', "double.gte_lte")

MATRIX = [
    # The contract: the header
    bad("unknown type", msp(cohort="free"), ("body", "required"), change=no_body),
    bad("no header", packet_pb2.Packet(msp=msp().msp), ("header", "required")),
    bad("nothing at all", packet_pb2.Packet(), ("header", "required"), ("body", "required")),
    bad(
        "an empty header",
        packet_pb2.Packet(header=packet_pb2.PacketHeader(), msp=msp().msp),
        *((f"header.{f}", "required") for f in ("packet_id", "domain_id", "cohort", "rev")),
        ("header.emitted_at", "required"),
    ),
    bad("no packet id", msp(packet_id=""), ("header.packet_id", "required")),
    bad("no site", msp(""), ("header.domain_id", "required")),
    bad("no cohort", msp(cohort=""), ("header.cohort", "required")),
    bad("no revision", msp(), ("header.rev", "required"), change=header(rev=0)),
    bad(
        "no time",
        msp(),
        ("header.emitted_at", "required"),
        change=lambda p: p.header.ClearField("emitted_at"),
    ),
    bad("an id that is none", msp(packet_id="7"), ("header.packet_id", "string.pattern")),
    bad("a site with a line break", msp("a\nb"), ("header.domain_id", "string.pattern")),
    bad("a site that is too long", msp("s" * 129), ("header.domain_id", "string.pattern")),
    bad("a cohort with ..", msp(cohort="../etc"), ("header.cohort", "string.pattern")),
    bad(
        "a cohort that is too long",
        msp(cohort="c" * 129),
        ("header.cohort", "string.max_bytes"),
    ),
    bad(
        "a schema hash that is none",
        msp(schema_hash="ff"),
        ("header.schema_hash", "string.pattern"),
    ),
    bad(
        "a time before time",
        msp(cohort="free"),
        ("header.emitted_at", "timestamp.gt"),
        change=lambda p: p.header.emitted_at.FromSeconds(-1),
    ),
    bad(
        "a revision that is too new",
        msp(cohort="free"),
        ("header.rev", "fmi.header.rev"),
        reason="CONTRACT_REVISION_UNSUPPORTED",
        code=Code.FAILED_PRECONDITION,
        change=header(rev=2),
    ),
    # The contract: the bodies
    bad("NaN", msp(cohort="free", controller={"tau": NAN}), TAU),
    bad("infinity", msp(cohort="free", controller={"tau": INF}), TAU),
    bad("minus infinity", msp(cohort="free", controller={"tau": -INF}), TAU),
    bad("a number whose square is none", msp(cohort="free", controller={"tau": 1e151}), TAU),
    bad("no signal", msp(cohort="free", controller={}), ("msp", "fmi.msp.no_signal")),
    bad(
        "a signal in two sections",
        msp(cohort="free", metrics={"tau": 1.0}, controller={"tau": 1.0}),
        ('msp.controller["tau"]', "fmi.msp.signal_in_one_section"),
    ),
    bad(
        "a signal name with a space",
        msp(cohort="free", controller={"t au": 1.0}),
        ('msp.controller["t au"]', "string.pattern"),
    ),
    bad(
        "a window that ends before it starts",
        msp(cohort="free", window_span=(9, 3)),
        ("msp.window_span", "fmi.window_span.order"),
    ),
    bad(
        "confidence above 1",
        msp(cohort="free", controller={"tau": 1.0}, evidence={"confidence": 1.5}),
        ("msp.evidence.confidence", "double.gte_lte"),
    ),
    bad(
        "evidence of a signal that is not there",
        msp(cohort="free", controller={"tau": 1.0}),
        ('msp.evidence.signals["rho"]', "fmi.msp.evidence_of_a_signal"),
        change=lambda p: p.msp.evidence.signals["rho"].SetInParent(),
    ),
    bad("a POP without a bundle", pop(cohort="free", bundle={}), ("pop.bundle", "map.min_pairs")),
    bad("a POP of no windows", pop(cohort="free", windows=0), ("pop.windows", "uint32.gte")),
    bad(
        "a POP that compares nothing",
        pop(cohort="free", before={"a": 1.0}, after={"b": 1.0}),
        ("pop.after", "fmi.pop.common_metric"),
    ),
    bad(
        "a POP parameter without a value",
        pop(cohort="free"),
        ('pop.bundle["x"].kind', "required"),
        change=lambda p: p.pop.bundle["x"].SetInParent(),
    ),
    bad(
        "a cause of itself",
        ccs(cohort="free", causal_pairs=[("a", "a", 1.0, "direct")]),
        ("ccs.causal_pairs[0]", "fmi.causal_pair.self_loop"),
    ),
    bad(
        "a cause named twice",
        ccs(cohort="free", causal_pairs=[("a", "b", 1.0, "direct"), ("a", "b", 2.0, "")]),
        ("ccs.causal_pairs[1]", "fmi.ccs.pair_once"),
    ),
    bad("an empty CCS", ccs(cohort="free", causal_pairs=[]), ("ccs", "fmi.ccs.empty")),
    bad("trust above 1", ccs(cohort="free", trust=1.1), ("ccs.trust", "double.gte_lte")),
    bad(
        "everything at once",
        msp("", "Free!", metrics={"a b": 1.0, "tau": NAN}, controller={"tau": INF}),
        ("header.domain_id", "required"),
        ("header.cohort", "string.pattern"),
        ("header.packet_id", "string.pattern"),
        ('msp.metrics["a b"]', "string.pattern"),
        ('msp.metrics["tau"]', "double.gte_lte"),
        TAU,
        ('msp.controller["tau"]', "fmi.msp.signal_in_one_section"),
        change=header(packet_id="me"),
    ),
    # The cohort
    bad(
        "a cohort that nobody declared",
        msp(cohort="clinics"),
        ("header.cohort", "fmi.cohort.known"),
        reason="COHORT_UNKNOWN",
        code=Code.NOT_FOUND,
    ),
    bad(
        "the wrong section",
        msp(cohort="clinic", metrics={"tau": 0.5}),
        ('msp.metrics["tau"]', "fmi.cohort.section"),
        reason="COHORT_RULE_VIOLATION",
    ),
    bad(
        "a signal outside the vocabulary",
        msp(cohort="clinic", controller={"rho": 0.5}),
        ('msp.controller["rho"]', "fmi.cohort.vocabulary"),
        reason="COHORT_RULE_VIOLATION",
    ),
    bad(
        "a value out of bounds",
        msp(cohort="clinic", controller={"tau": 1.5}),
        ('msp.controller["tau"]', "fmi.cohort.bounds"),
        reason="COHORT_RULE_VIOLATION",
    ),
    bad(
        "a POP parameter out of bounds",
        pop(cohort="clinic", bundle={"tau": -1.0}),
        ('pop.bundle["tau"]', "fmi.cohort.bounds"),
        reason="COHORT_RULE_VIOLATION",
    ),
    bad(
        "each rule of the vocabulary",
        msp(cohort="clinic", metrics={"tau": 0.5, "x": 1.0}, controller={"gain": 2.0}),
        ('msp.metrics["tau"]', "fmi.cohort.section"),
        ('msp.metrics["x"]', "fmi.cohort.vocabulary"),
        ('msp.controller["gain"]', "fmi.cohort.section"),
        reason="COHORT_RULE_VIOLATION",
    ),
    # The policy
    bad(
        "stale",
        msp(cohort="free"),
        ("header.emitted_at", "fmi.policy.max_age"),
        reason="PACKET_STALE",
        change=emitted(-8 * DAY_S),
    ),
    bad(
        "from the future",
        msp(cohort="free"),
        ("header.emitted_at", "fmi.policy.max_clock_skew"),
        reason="PACKET_FROM_FUTURE",
        change=emitted(+600),
    ),
    bad(
        "too large for the cohort",
        msp(cohort="strict", **private(), metrics={f"m{i}": 0.0 for i in range(60)}),
        ("packet", "fmi.policy.max_packet_bytes"),
        reason="PACKET_TOO_LARGE",
        code=Code.RESOURCE_EXHAUSTED,
    ),
    bad(
        "without the privacy that is required",
        msp(cohort="strict"),
        ("header.provenance.applied_privacy", "fmi.policy.dp_required"),
        reason="PRIVACY_REQUIRED",
        code=Code.FAILED_PRECONDITION,
    ),
    bad(
        "of too large a norm",
        msp(cohort="strict", **private(), metrics={"a": 8.0, "b": 8.0}),
        ("msp", "fmi.policy.max_norm"),
        reason="NORM_EXCEEDED",
    ),
    bad(
        "built against another spec",
        msp(cohort="strict", **private(), schema_hash="0" * 64),
        ("header.schema_hash", "fmi.cohort.schema_hash"),
        reason="SCHEMA_HASH_MISMATCH",
        code=Code.FAILED_PRECONDITION,
    ),
    bad(
        "against each policy",
        msp(
            cohort="strict",
            schema_hash="0" * 64,
            metrics={f"m{i}": 100.0 for i in range(60)},
        ),
        ("packet", "fmi.policy.max_packet_bytes"),
        ("header.emitted_at", "fmi.policy.max_age"),
        ("header.provenance.applied_privacy", "fmi.policy.dp_required"),
        ("msp", "fmi.policy.max_norm"),
        ("header.schema_hash", "fmi.cohort.schema_hash"),
        reason="PACKET_TOO_LARGE",
        code=Code.RESOURCE_EXHAUSTED,
        change=emitted(-9 * DAY_S),
    ),
    # Times that are none
    bad("a time past the year 9999", msp(cohort="free"), NO_TIME, change=at(2**62)),
    bad("a time of too many nanoseconds", msp(cohort="free"), NO_TIME, change=at(nanos=2**31 - 1)),
    bad("a time of negative nanoseconds", msp(cohort="free"), NO_TIME, change=at(nanos=-1)),
]


def assert_told(refusal: Refusal, wrong: Bad) -> None:
    assert (refusal.code, refusal.reason, refusal.domain) == (wrong.code, wrong.reason, "fmi")
    assert set(refusal.violations) == wrong.violations
    assert all(refusal.descriptions)
    assert refusal.retry_s is None, "sending it again cannot help"
    assert refusal.request_id


async def alive(client: Client) -> None:
    """The server takes a good packet on the same connection, and knows it next time."""
    good = msp("good", "free")
    assert (await client.emit(good))[0].status == wire_pb2.EMIT_STATUS_ACCEPTED
    assert (await client.emit(good))[0].status == wire_pb2.EMIT_STATUS_DUPLICATE


@pytest_asyncio.fixture(loop_scope="module")
async def untouched(
    server: RunningServer, client: Client, data_dir: Path
) -> AsyncIterator[Callable[..., None]]:
    """Asserts that a test stored nothing, but for one packet of each site that it says may have one."""
    before, cohorts, sites = rows(data_dir), await client.cohorts(), await client.sites()
    allowed: list[str] = []

    def allow(*names: str) -> None:
        allowed.extend(names)

    yield allow
    after = rows(data_dir)
    count = len(before["packets"])
    assert after["packets"][:count] == before["packets"]
    assert [row[1] for row in after["packets"][count:]] == allowed
    assert {row[:2] for row in after["sites"]} == {row[:2] for row in before["sites"]} | {
        ("free", name) for name in allowed
    }
    for table in ("cohorts", "dictionaries"):
        assert after[table] == before[table]
    assert set(await client.cohorts()) == set(cohorts)
    assert set(await client.sites()) == set(sites) | {f"free:{name}" for name in allowed}
    await alive(client)
    assert server.service._inflight == 0


@pytest.mark.parametrize("wrong", MATRIX)
@pytest.mark.usefixtures("untouched")
async def test_alone_it_is_refused_and_explained(client, wrong):
    request = wire_pb2.EmitRequest(packet=wrong.packet)
    assert_told(await refusal_of(client.interchange.Emit(request, timeout=DEADLINE_S)), wrong)
    for envelope in (identity(wrong.packet), zstd(wrong.packet)):
        assert_told(await refusal_of(client.emit_encoded(envelope)), wrong)


@pytest.mark.parametrize("wrong", MATRIX)
async def test_its_neighbours_are_taken(client, untouched, wrong):
    untouched("a", "b", "c", "d", "e", "f")
    answer, enveloped = await client.batches(
        wire_pb2.EmitStreamRequest(
            packets=packet_pb2.PacketBatch(
                packets=[msp("a", "free"), wrong.packet, msp("b", "free"), pop("c", "free")]
            )
        ),
        wire_pb2.EmitStreamRequest(
            encoded=zstd(msp("d", "free"), wrong.packet, msp("e", "free"), ccs("f", "free"))
        ),
    )
    for found in (answer, enveloped):
        assert (found.packets, found.accepted) == (4, 3)
        ((result,)) = found.exceptions
        assert (result.index, result.status) == (1, wire_pb2.EMIT_STATUS_REFUSED)
        assert error_pb2.ErrorReason.Name(result.refusal.reason) == f"ERROR_REASON_{wrong.reason}"
        assert {(v.field, v.rule_id) for v in result.refusal.violations} == wrong.violations
        assert result.refusal.message
        assert not result.refusal.HasField("retry_delay")


@pytest.mark.parametrize("wrong", MATRIX)
@pytest.mark.usefixtures("untouched")
async def test_the_dry_run_says_the_same(client, wrong):
    request = registry_service_pb2.ValidatePacketRequest(packet=wrong.packet)
    response = await client.registry.ValidatePacket(request, timeout=DEADLINE_S)
    assert not response.valid
    assert not response.quarantined
    assert error_pb2.ErrorReason.Name(response.refusal.reason) == f"ERROR_REASON_{wrong.reason}"
    assert {(v.field, v.rule_id) for v in response.refusal.violations} == wrong.violations


# All violations at once, and still an answer


@pytest.mark.parametrize(
    "many",
    [
        pytest.param(
            msp(cohort="free", controller={f"s{i}": NAN for i in range(1000)}), id="values"
        ),
        pytest.param(
            msp(cohort="free", controller={"\1" * 200 + str(i): 1.0 for i in range(500)}),
            id="names",
        ),
        pytest.param(
            msp(cohort="clinic", controller={f"{'n' * 120}{i}": 1.0 for i in range(500)}),
            id="vocabulary",
        ),
        pytest.param(
            ccs(cohort="free", causal_pairs=[("a", "b", 1.0, "direct")] * 2000), id="repeats"
        ),
    ],
)
@pytest.mark.usefixtures("untouched")
async def test_a_packet_with_very_many_faults_gets_an_answer_that_fits(client, many):
    """Details travel in metadata, which a client takes only up to 8 KiB."""
    refusal = await refusal_of(client.emit(many))
    assert refusal.reason in ("CONTRACT_VIOLATION", "COHORT_RULE_VIOLATION"), refusal
    assert len(refusal.violations) >= 4
    assert refusal.metadata["violations"] == "100", "how many there were"
    request = registry_service_pb2.ValidatePacketRequest(packet=many)
    response = await client.registry.ValidatePacket(request, timeout=DEADLINE_S)
    assert len(response.refusal.violations) == 100


@pytest.mark.usefixtures("untouched")
async def test_a_batch_of_very_bad_packets_gets_an_answer_that_fits(client):
    """An answer must not be many times the size of the question."""
    awful = [
        msp(cohort="free", controller={f"s{i}": NAN for i in range(120)}).SerializeToString()
        for _ in range(100)
    ]
    response = await client.emit_encoded(zstd(*awful))
    assert len(response.results) == 100
    assert all(r.status == wire_pb2.EMIT_STATUS_REFUSED for r in response.results)
    assert all(len(r.refusal.violations) == 10 for r in response.results)
    assert all("more" in r.refusal.message for r in response.results)
    assert response.ByteSize() < 1.2 * sum(map(len, awful))


# Requests that hold no packet

METHODS = [
    f"{service}Service/{method}"
    for service, methods in {
        "Interchange": ("Emit", "GetUpdate", "GetWarmStart"),
        "Registry": ("GetCohortSpec", "ValidatePacket", "GetDictionary", "GetContract"),
        "Admin": (
            "PutCohortSpec",
            "SetQuarantine",
            "ReleaseNow",
            "RegisterDictionary",
            "ListSites",
        ),
    }.items()
    for method in methods
]

TRUNCATED = msp(cohort="free").SerializeToString()[:-3]


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"\xff" * 64, id="no tags"),
        pytest.param(b"\x0a\xff\xff\xff\xff\x0f", id="a length past the end"),
        pytest.param(b"\x0a\x05abc", id="cut off"),
        pytest.param(b"\x0b" * 200, id="groups in groups"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("untouched")
async def test_garbage_as_a_request(client, method, garbage):
    refusal = await refusal_of(client.raw(method, garbage))
    assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, "CONTRACT_VIOLATION")
    assert refusal.violations == (("request", "fmi.request.malformed"),)
    assert refusal.request_id


@pytest.mark.usefixtures("untouched")
async def test_invalid_utf8_in_a_packet(client):
    good = wire_pb2.EmitRequest(packet=msp("site-x", "free")).SerializeToString()
    refusal = await refusal_of(
        client.raw("InterchangeService/Emit", good.replace(b"site-x", b"si\xc3\x28-x"))
    )
    assert refusal.violations == (("packet", "fmi.packet.malformed"),)


@pytest.mark.parametrize(
    "item",
    [
        pytest.param(b"\xff\xff", id="garbage"),
        pytest.param(TRUNCATED, id="cut off"),
        pytest.param(
            msp("site-x", "free").SerializeToString().replace(b"site-x", b"si\xc3\x28-x"),
            id="invalid UTF-8",
        ),
    ],
)
async def test_a_garbage_item_in_an_envelope(client, untouched, item):
    untouched("a", "b")
    response = await client.emit_encoded(zstd(msp("a", "free"), item, msp("b", "free")))
    assert [r.status for r in response.results] == [
        wire_pb2.EMIT_STATUS_ACCEPTED,
        wire_pb2.EMIT_STATUS_REFUSED,
        wire_pb2.EMIT_STATUS_ACCEPTED,
    ]
    refusal = response.results[1].refusal
    assert refusal.reason == error_pb2.ERROR_REASON_CONTRACT_VIOLATION
    assert [(v.field, v.rule_id) for v in refusal.violations] == [
        ("packets[1]", "fmi.packet.malformed")
    ]


async def test_garbage_on_a_stream_ends_it_with_a_typed_refusal(client, untouched):
    untouched("a")
    call = client.channel.stream_stream("/fmi.v1.InterchangeService/EmitStream")()
    good = wire_pb2.EmitStreamRequest(packets=packet_pb2.PacketBatch(packets=[msp("a", "free")]))
    await call.write(good.SerializeToString())
    assert wire_pb2.EmitStreamResponse.FromString(await call.read()).accepted == 1
    bad = wire_pb2.EmitStreamRequest(batch_id=2).SerializeToString()
    bad += b"\x12\x22\x0a\x20" + b"\xff" * 32  # a packet that cannot be parsed
    await call.write(bad)
    answer = wire_pb2.EmitStreamResponse.FromString(await call.read())
    assert (answer.batch_id, answer.packets, answer.accepted) == (2, 1, 0)
    assert answer.exceptions[0].refusal.violations[0].rule_id == "fmi.packet.malformed"
    await call.write(b"\xff" * 30)
    refusal = await refusal_of(call.read())
    assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, "CONTRACT_VIOLATION")


@pytest.mark.usefixtures("untouched")
async def test_garbage_as_a_subscription(client):
    call = client.channel.unary_stream("/fmi.v1.InterchangeService/Subscribe")(b"\xff" * 30)
    refusal = await refusal_of(call.read())
    assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, "CONTRACT_VIOLATION")


def enveloped(**fields: Any) -> wire_pb2.EncodedPackets:
    """A good zstd envelope with some fields wrong."""
    envelope = zstd(msp(cohort="free"))
    for name, value in fields.items():
        setattr(envelope, name, value)
    return envelope


def frame(content: bytes, **fields: Any) -> wire_pb2.EncodedPackets:
    """An envelope whose frame is made by hand."""
    values = {
        "encoding": wire_pb2.ENCODING_ZSTD,
        "uncompressed_size": len(content),
        "data": zstandard.compress(content),
    }
    return wire_pb2.EncodedPackets(**{**values, **fields})


def honest_bomb() -> wire_pb2.EncodedPackets:
    """64 MiB of nothing that says so."""
    return frame(b"\0" * (64 * MIB))


def lying_bomb() -> wire_pb2.EncodedPackets:
    """The envelope says 1000 bytes, the frame 64 MiB."""
    return frame(b"\0" * (64 * MIB), uncompressed_size=1000)


def silent_bomb() -> wire_pb2.EncodedPackets:
    """The frame does not say how much comes out of it."""
    compressor = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    data = compressor.compress(b"\0" * (64 * MIB)) + compressor.flush()
    return frame(b"", uncompressed_size=1000, data=data)


def forged_bomb() -> wire_pb2.EncodedPackets:
    """The frame's header says 1000 bytes, and its blocks hold 8 MiB."""
    block = struct.pack("<I", (1 << 17) << 3 | 0b010)[:3] + b"\0"  # RLE, 128 KiB
    last = struct.pack("<I", (1 << 17) << 3 | 0b011)[:3] + b"\0"
    head = b"\x28\xb5\x2f\xfd" + b"\x60" + struct.pack("<H", 1000 - 256)
    return frame(b"", uncompressed_size=1000, data=head + block * 63 + last)


def trailing() -> wire_pb2.EncodedPackets:
    envelope = zstd(msp(cohort="free"))
    envelope.data += b"more"
    return envelope


def second_frame() -> wire_pb2.EncodedPackets:
    envelope = zstd(msp(cohort="free"))
    envelope.data += zstandard.compress(b"more")
    return envelope


def skippable() -> wire_pb2.EncodedPackets:
    return frame(
        b"", uncompressed_size=4, data=b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"abcd"
    )


MALFORMED, TOO_LARGE = "ENVELOPE_MALFORMED", "ENVELOPE_TOO_LARGE"

ENVELOPES = [
    ("garbage", enveloped(data=b"\x13\x37" * 50), MALFORMED),
    ("cut off", enveloped(data=zstd(msp(cohort="free")).data[:-5]), MALFORMED),
    (
        "a bit flipped",
        enveloped(data=zstd(msp()).data[:12] + b"\xff\xff" + zstd(msp()).data[14:]),
        MALFORMED,
    ),
    ("a size that is too small", enveloped(uncompressed_size=5), MALFORMED),
    ("a size that is too large", enveloped(uncompressed_size=999), MALFORMED),
    ("a size past the limit", enveloped(uncompressed_size=2**63), TOO_LARGE),
    ("identity of another size", enveloped(encoding=wire_pb2.ENCODING_IDENTITY), MALFORMED),
    ("an honest bomb", honest_bomb(), TOO_LARGE),
    ("a lying bomb", lying_bomb(), TOO_LARGE),
    ("a silent bomb", silent_bomb(), MALFORMED),
    ("a forged bomb", forged_bomb(), MALFORMED),
    ("trailing data", trailing(), MALFORMED),
    ("a second frame", second_frame(), MALFORMED),
    ("a skippable frame", skippable(), MALFORMED),
    ("no batch", frame(b"\xff" * 40), MALFORMED),
    ("a batch of another shape", frame(b"\x10\x01"), MALFORMED),
    ("too many packets", zstd(*[b""] * 101), TOO_LARGE),
    ("an unknown dictionary", zstd(msp(), dictionary=trained_dictionary()), "DICTIONARY_UNKNOWN"),
    ("a dictionary that is not used", enveloped(dictionary_id=7), MALFORMED),
    ("no encoding", enveloped(encoding=0), "CONTRACT_VIOLATION"),
    ("an encoding that is none", enveloped(encoding=9), "CONTRACT_VIOLATION"),
    ("no data", enveloped(data=b""), "CONTRACT_VIOLATION"),
    ("no size", enveloped(uncompressed_size=0), "CONTRACT_VIOLATION"),
]

CODES = {
    MALFORMED: Code.INVALID_ARGUMENT,
    TOO_LARGE: Code.RESOURCE_EXHAUSTED,
    "DICTIONARY_UNKNOWN": Code.FAILED_PRECONDITION,
    "CONTRACT_VIOLATION": Code.INVALID_ARGUMENT,
}


@pytest.mark.parametrize(
    ("envelope", "reason"), [pytest.param(e, r, id=what) for what, e, r in ENVELOPES]
)
async def test_an_envelope_that_cannot_be_taken(client, untouched, envelope, reason):
    refusal = await refusal_of(client.emit_encoded(envelope))
    assert (refusal.code, refusal.reason) == (CODES[reason], reason)
    assert refusal.retry_s is None
    assert refusal.message
    untouched("a")
    answer, after = await client.batches(
        wire_pb2.EmitStreamRequest(batch_id=1, encoded=envelope),
        wire_pb2.EmitStreamRequest(batch_id=2, encoded=identity(msp("a", "free"))),
    )
    assert error_pb2.ErrorReason.Name(answer.refusal.reason) == f"ERROR_REASON_{reason}"
    assert (answer.batch_id, answer.packets, answer.accepted) == (1, 0, 0)
    assert (after.batch_id, after.accepted) == (2, 1)


@pytest.mark.usefixtures("untouched")
async def test_a_plain_batch_of_too_many_packets(client):
    batch = packet_pb2.PacketBatch(packets=[msp(f"s{i}", "free") for i in range(101)])
    (answer,) = await client.batches(wire_pb2.EmitStreamRequest(packets=batch))
    assert answer.refusal.reason == error_pb2.ERROR_REASON_ENVELOPE_TOO_LARGE
    assert answer.accepted == 0


@pytest.mark.usefixtures("untouched")
async def test_nothing_at_all(client):
    refusal = await refusal_of(client.interchange.Emit(wire_pb2.EmitRequest()))
    assert refusal.violations == (("payload", "required"),)
    refusal = await refusal_of(client.raw("InterchangeService/Emit", b""))
    assert refusal.violations == (("payload", "required"),)


@pytest.mark.usefixtures("untouched")
async def test_a_message_larger_than_grpc_takes(client):
    """gRPC itself refuses it, before there is a request that could be answered in our words."""
    refusal = await refusal_of(client.raw("InterchangeService/Emit", b"\0" * (8 * MIB + 1)))
    assert refusal.code == Code.RESOURCE_EXHAUSTED
    assert "larger" in refusal.message
    assert refusal.retry_s is None


@pytest.mark.usefixtures("untouched")
async def test_a_method_that_there_is_not(client):
    refusal = await refusal_of(client.raw("InterchangeService/Steal", b""))
    assert refusal.code == Code.UNIMPLEMENTED


# Requests other than packets


@pytest.mark.parametrize(
    ("method", "request_", "expected"),
    [
        pytest.param(
            "InterchangeService/GetUpdate",
            wire_pb2.GetUpdateRequest(cohort="nowhere", kind=1),
            (Code.NOT_FOUND, "COHORT_UNKNOWN"),
            id="an unknown cohort",
        ),
        pytest.param(
            "InterchangeService/GetUpdate",
            wire_pb2.GetUpdateRequest(cohort="free", kind=1, revision=2**64 - 1),
            (Code.NOT_FOUND, "UPDATE_NOT_FOUND"),
            id="a revision that there is not",
        ),
        pytest.param(
            "InterchangeService/GetUpdate",
            wire_pb2.GetUpdateRequest(kind=99),
            (Code.INVALID_ARGUMENT, "CONTRACT_VIOLATION"),
            id="a kind that is none",
        ),
        pytest.param(
            "InterchangeService/GetWarmStart",
            wire_pb2.GetWarmStartRequest(cohort="free", concepts={"a": NAN}),
            (Code.INVALID_ARGUMENT, "CONTRACT_VIOLATION"),
            id="concepts that are NaN",
        ),
        pytest.param(
            "AdminService/ListQuarantine",
            admin_service_pb2.ListQuarantineRequest(page_token="next"),  # noqa: S106 - it is none
            (Code.INVALID_ARGUMENT, "CONTRACT_VIOLATION"),
            id="a page token that is none",
        ),
        pytest.param(
            "AdminService/SetQuarantine",
            admin_service_pb2.SetQuarantineRequest(
                domain_id="a", packet_id="00000000-0000-7000-8000-000000000001"
            ),
            (Code.NOT_FOUND, "NOT_FOUND"),
            id="an unknown packet",
        ),
        pytest.param(
            "AdminService/SetQuarantine",
            admin_service_pb2.SetQuarantineRequest(domain_id="a" * MIB, packet_id="b\n" * MIB),
            (Code.INVALID_ARGUMENT, "CONTRACT_VIOLATION"),
            id="a packet of an endless name",
        ),
        pytest.param(
            "AdminService/ReleaseNow",
            admin_service_pb2.ReleaseNowRequest(cohort="x" * MIB),
            (Code.INVALID_ARGUMENT, "CONTRACT_VIOLATION"),
            id="an endless cohort",
        ),
        pytest.param(
            "AdminService/ListSites",
            admin_service_pb2.ListSitesRequest(cohort="\n\r\0\u2028"),
            (Code.INVALID_ARGUMENT, "CONTRACT_VIOLATION"),
            id="a cohort of control characters",
        ),
        pytest.param(
            "AdminService/RegisterDictionary",
            admin_service_pb2.RegisterDictionaryRequest(data=b"no dictionary"),
            (Code.INVALID_ARGUMENT, "SPEC_INVALID"),
            id="a dictionary that is none",
        ),
        pytest.param(
            "AdminService/RegisterDictionary",
            admin_service_pb2.RegisterDictionaryRequest(data=b"\x37\xa4\x30\xec" + b"\1" * 64),
            (Code.INVALID_ARGUMENT, "SPEC_INVALID"),
            id="a dictionary of garbage",
        ),
        pytest.param(
            "AdminService/PutCohortSpec",
            admin_service_pb2.PutCohortSpecRequest(),
            (Code.INVALID_ARGUMENT, "CONTRACT_VIOLATION"),
            id="no spec",
        ),
        pytest.param(
            "AdminService/PutCohortSpec",
            admin_service_pb2.PutCohortSpecRequest(spec=cohort_pb2.CohortSpec(name="No Name")),
            (Code.INVALID_ARGUMENT, "SPEC_INVALID"),
            id="a spec of no name",
        ),
        pytest.param(
            "AdminService/PutCohortSpec",
            admin_service_pb2.PutCohortSpecRequest(
                spec=spec("private", privacy=cohort_pb2.PrivacySpec(dp_epsilon=1.0))
            ),
            (Code.INVALID_ARGUMENT, "SPEC_INVALID"),
            id="privacy without bounds or a delta",
        ),
        pytest.param(
            "AdminService/PutCohortSpec",
            admin_service_pb2.PutCohortSpecRequest(
                spec=spec("closed", access=cohort_pb2.AccessSpec(emit=["site"]))
            ),
            (Code.FAILED_PRECONDITION, "SETTING_UNSUPPORTED"),
            id="access rules that there are not",
        ),
        pytest.param(
            "AdminService/PlanPrivacy",
            admin_service_pb2.PlanPrivacyRequest(sites=10, signals=2),
            (Code.INVALID_ARGUMENT, "CONTRACT_VIOLATION"),
            id="a plan of nothing",
        ),
        pytest.param(
            "AdminService/PlanPrivacy",
            admin_service_pb2.PlanPrivacyRequest(
                sites=10, signals=2, privacy=cohort_pb2.PrivacySpec(dp_delta=1e-6)
            ),
            (Code.INVALID_ARGUMENT, "SPEC_INVALID"),
            id="a plan without a budget",
        ),
        pytest.param(
            "AdminService/PlanPrivacy",
            admin_service_pb2.PlanPrivacyRequest(
                sites=2**32 - 1,
                signals=4096,
                privacy=cohort_pb2.PrivacySpec(
                    dp_epsilon=1e300, dp_delta=1e-300, dp_epochs=2**32 - 1
                ),
            ),
            (Code.INVALID_ARGUMENT, "SPEC_INVALID"),
            id="a plan past all measure",
        ),
        pytest.param(
            "AdminService/PlanPrivacy",
            admin_service_pb2.PlanPrivacyRequest(
                sites=10,
                signals=2,
                signals_per_site=3,
                privacy=cohort_pb2.PrivacySpec(dp_epsilon=1.0, dp_delta=1e-6, dp_epochs=1),
            ),
            (Code.INVALID_ARGUMENT, "CONTRACT_VIOLATION"),
            id="a plan of more signals from a site than there are",
        ),
        pytest.param(
            "AdminService/PlanPrivacy",
            admin_service_pb2.PlanPrivacyRequest(
                sites=10,
                signals=2,
                privacy=cohort_pb2.PrivacySpec(
                    dp_epsilon=1.0, dp_delta=1e-6, dp_epochs=1, dp_clip_norm=0.001
                ),
            ),
            (Code.INVALID_ARGUMENT, "CONTRACT_VIOLATION"),
            id="a plan for vectors of no length",
        ),
        pytest.param(
            "AdminService/ListPrivacySpends",
            admin_service_pb2.ListPrivacySpendsRequest(cohort="nowhere"),
            (Code.NOT_FOUND, "COHORT_UNKNOWN"),
            id="the ledger of no cohort",
        ),
        pytest.param(
            "RegistryService/GetDictionary",
            registry_service_pb2.GetDictionaryRequest(dictionary_id=2**32 - 1),
            (Code.NOT_FOUND, "NOT_FOUND"),
            id="a dictionary that there is not",
        ),
    ],
)
@pytest.mark.usefixtures("untouched")
async def test_a_request_that_cannot_be_met(client, method, request_, expected):
    refusal = await refusal_of(client.raw(method, request_.SerializeToString()))
    assert (refusal.code, refusal.reason) == expected
    assert refusal.message


async def test_a_page_token_past_the_end_gives_an_empty_page(client):
    request = admin_service_pb2.ListQuarantineRequest(page_token="9" * 19)
    response = await client.admin.ListQuarantine(request, timeout=DEADLINE_S)
    assert not response.packets
    assert not response.next_page_token


@pytest.mark.parametrize("open_cohorts", [True, False])
async def test_a_name_that_no_cohort_can_have_is_told_as_such(tmp_path, open_cohorts):
    """A name that some cohort could have is unknown; one that none can have breaks the contract."""
    async with (
        running_server(tmp_path, open_cohorts=open_cohorts) as server,
        Client(server.target) as client,
    ):
        calls = (
            (client.registry.GetCohortSpec, registry_service_pb2.GetCohortSpecRequest),
            (client.interchange.GetWarmStart, wire_pb2.GetWarmStartRequest),
            (client.interchange.GetUpdate, partial(wire_pb2.GetUpdateRequest, kind=1)),
            (client.interchange.Subscribe, subscription_from),
            (client.admin.ReleaseNow, admin_service_pb2.ReleaseNowRequest),
            (client.admin.ListSites, admin_service_pb2.ListSitesRequest),
            (client.admin.ListQuarantine, admin_service_pb2.ListQuarantineRequest),
        )
        for method, request in calls:
            for name in ("No Cohort", "../..", "c" * 129, "care\n"):
                call = method(request(cohort=name))
                refusal = await refusal_of(call.read() if hasattr(call, "read") else call)
                assert refusal.code == Code.INVALID_ARGUMENT, (request, name)
                assert refusal.violations[0][0].rpartition(".")[2] == "cohort", (request, name)
        unknown = registry_service_pb2.GetCohortSpecRequest(cohort="nowhere")
        refusal = await refusal_of(client.registry.GetCohortSpec(unknown))
        assert (refusal.code, refusal.reason) == (Code.NOT_FOUND, "COHORT_UNKNOWN")


def subscription_from(cohort: str) -> wire_pb2.SubscribeRequest:
    start = wire_pb2.StartRevision(cohort=cohort, kind=1, revision=1)
    return wire_pb2.SubscribeRequest(cohorts=["**"], start_revisions=[start])


# Values that keep every rule and are meant to hurt


async def test_extreme_values_are_aggregated_without_harm(client):
    """The largest numbers, the smallest, zeros of both signs, and a spec at the edge of what it may say."""
    edge = spec(
        "edge",
        aggregation=cohort_pb2.AggregationSpec(
            vote_min_sites=1,
            max_byzantine=2**32 - 1,
            weight_cap=5e-324,
            metrics_trim_alpha=0.4999999999999999,
        ),
    )
    await client.put_spec(edge)
    await client.put_spec(
        spec("wide", aggregation=cohort_pb2.AggregationSpec(max_byzantine=0, weight_cap=1.0))
    )
    values = [1e150, -1e150, 5e-324, -0.0, 0.0, 1e-300]
    for cohort in ("edge", "wide", "free"):
        for i, value in enumerate(values):
            evidence = {"confidence": 0.0 if i % 2 else 1.0}
            concepts = [{"id": "load", "score": value}]
            await client.emit(
                msp(f"s{i}", cohort, controller={"tau": value}, evidence=evidence),
                pop(f"s{i}", cohort, before={"gain": value}, after={"gain": -value}),
                ccs(
                    f"s{i}",
                    cohort,
                    causal_pairs=[("a", "b", value, "direct"), ("b", "a", -value, "direct")],
                    concepts=concepts,
                    provenance={"regime_tag": f"r{i % 2}"},
                ),
            )
        await client.release(cohort)
        prior = (await client.update(cohort)).prior_update
        assert prior.estimates["tau"].sites >= len(values)
        request = wire_pb2.GetWarmStartRequest(cohort=cohort, concepts={"load": 1.7e308})
        warm = await client.interchange.GetWarmStart(request, timeout=DEADLINE_S)
        assert warm.profile.profile_class == "default"
    await alive(client)


async def test_a_flood_of_new_signals_is_bounded(client, server):
    """BOUNDED: a site may send 1024 names a packet, but not without end."""
    await client.put_spec(spec("flood", aggregation=cohort_pb2.AggregationSpec(vote_min_sites=1)))
    for round_ in range(6):
        names = {f"r{round_}_{i}": 1.0 for i in range(1024)}
        await client.emit(msp("flooder", "flood", controller=names))
    await client.release("flood")
    prior = (await client.update("flood")).prior_update
    assert len(prior.estimates) == 512, "what one site may bring in"
    ignored = [
        (name, value)
        for name, value in server.service.telemetry.snapshot().items()
        if name.startswith("fmi_ignored_values_total") and value
    ]
    assert [value for _, value in ignored] == [6 * 1024 - 512], ignored
    await eventually(lambda: not server.service.releaser.dirty("flood"))


async def test_unknown_fields_are_kept_and_do_no_harm(client, data_dir):
    """A newer site may send fields that this server does not know: they are stored as they came."""
    packet = msp("new", "free")
    unknown = packet.SerializeToString() + b"\xfa\x3e\x03new"
    (result,) = (await client.emit_encoded(identity(unknown))).results
    assert result.status == wire_pb2.EMIT_STATUS_ACCEPTED
    payload = rows(data_dir, "packets")["packets"][-1][-1]
    assert b"new" in payload
    assert packet_pb2.Packet.FromString(payload).msp == packet.msp


async def test_the_matrix_names_every_reason_that_a_packet_can_be_refused_for():
    """A new reason for refusing packets must get a line here."""
    from fmi_server.errors import _PRECEDENCE, reason_name  # noqa: PLC0415 - the list is private

    named = {line.values[0].reason for line in MATRIX}
    # Those that depend on who sends it stand in the table of test_identity.py.
    named |= {"ACCESS_DENIED", "DOMAIN_ID_MISMATCH"}
    assert named == {reason_name(reason) for reason in _PRECEDENCE}
