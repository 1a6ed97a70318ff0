"""BOUNDED and EXPLAINED against peers who do not keep to the protocol: raw frames, floods, bombs, silence.

One server process meets all attacks of `benchmarks.abuse`, made small, one after the other. During each an
honest site is answered; memory stays below a bound; afterwards the server is ready. Then protections are
tried one by one; with the bound on a connection's calls switched off, a flood goes past the bound on memory.

`make bench-abuse` has the attacks at their size, with latencies.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from process import resident_bytes
from server_harness import Client, Refusal, eventually, msp, refusal_of
from server_process import LOCAL, ServerProcess, started

from benchmarks.abuse import frames
from benchmarks.abuse.attacks import ATTACKS, COHORT, MESSAGE_BYTES, Ground
from benchmarks.abuse.run import descriptors, healthy
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server import app, memory_watch
from fmi_server.memory_watch import MemoryWatch, default_limit
from fmi_server.telemetry import FMITelemetry
from fmi_server.testing import running_server
from fmi_server.transport.admission import Admission

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 2**20
SCALE = 0.1
ATTACK_S = 0.6
ANSWER_S = 30.0
"""Within which a site has its answer during an attack: its processor is also the attacker's."""

GROWTH = 80 * MIB
"""Four connections of 128 calls, at 60 kB each, are 31 MB; the rest is what the allocator keeps of bursts."""

GROWTHS = {
    "half-sent": 40 * MESSAGE_BYTES + GROWTH,
    "half-batches": 40 * MESSAGE_BYTES + GROWTH,
    # The budget of envelopes that are decoded, each also as the bytes it came from.
    "zstd-bomb": 2 * 32 * MIB + GROWTH,
}
"""What an attack may take where that is not `GROWTH`: 40 messages are sent, of the largest size there is."""


@contextlib.asynccontextmanager
async def peak_of(pid: int) -> AsyncIterator[Callable[[], int]]:
    """Watch how far a process grows over what it has now."""
    before = most = resident_bytes(pid)

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, resident_bytes(pid))
            await asyncio.sleep(0.02)

    task = asyncio.create_task(watch())
    try:
        yield lambda: max(most, resident_bytes(pid)) - before
    finally:
        task.cancel()


def ground_of(target: str, scale: float = SCALE) -> Ground:
    host, _, port = target.rpartition(":")
    return Ground(host, int(port), scale)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ServerProcess]:
    data_dir = tmp_path_factory.mktemp("abuse") / "data"
    async with started(*LOCAL, "--data-dir", str(data_dir)) as process:
        async with Client(process.target) as client:
            large = {f"c{number}": number / 7 for number in range(300)}
            await client.emit(*(msp(f"site-{n}", COHORT, controller=large) for n in range(3)))
            await eventually(lambda: released(client))
        yield process


async def released(client: Client) -> bool:
    return bool((await client.cohorts())[COHORT].revisions)


@pytest.mark.parametrize("name", ATTACKS)
async def test_an_attack_harms_nobody(server: ServerProcess, name: str):
    files, said = descriptors(server.pid), len(server.err)
    longest, answers = 0.0, 0
    async with Client(server.target) as site, peak_of(server.pid) as growth:
        await site.emit(msp("honest", "others"))
        ground = ground_of(server.target)
        async with ATTACKS[name].going_on(ground):
            ends = time.monotonic() + ATTACK_S
            while time.monotonic() < ends or not answers:
                asked = time.monotonic()
                async with asyncio.timeout(ANSWER_S):
                    await site.emit(msp("honest", "others"))
                longest, answers = max(longest, time.monotonic() - asked), answers + 1
                await asyncio.sleep(0.02)
        grown = growth()
    print(  # noqa: T201 - the figures
        f"{name}: {answers} answers, the slowest after {longest * 1e3:.0f} ms; {grown / MIB:.0f} MiB; "
        f"{dict(ground.tally)}"
    )
    assert ground.tally["connections"] > 0
    assert len(server.err) < said + 20, "nobody fills the disk with the log"
    assert grown < GROWTHS.get(name, GROWTH)
    assert server.process.returncode is None
    assert await healthy(server.target)
    await eventually(lambda: descriptors(server.pid) <= files + 2)


# What protects, and what happens without it


async def grown_by(name: str, tmp_path: Any, *flags: str, scale: float, until: int) -> int:
    """Attack a server of its own until it grew by more than so much, if it does; return by how much."""
    async with started(*LOCAL, "--data-dir", str(tmp_path / "data"), *flags) as process:
        async with Client(process.target) as client:
            await client.emit(*(msp(f"site-{n}", COHORT) for n in range(3)))
        async with (
            peak_of(process.pid) as growth,
            ATTACKS[name].going_on(ground_of(process.target, scale)),
        ):
            with contextlib.suppress(TimeoutError):
                await eventually(lambda: growth() > until)
        return growth()


async def test_the_bound_on_the_calls_of_a_connection_is_what_protects_from_floods(tmp_path: Any):
    unbounded = ("--max-connection-calls", "100000")
    grown = await grown_by("stream-flood", tmp_path, *unbounded, scale=1.0, until=GROWTH)
    print(f"without the bound: {grown / MIB:.0f} MiB")  # noqa: T201 - the figures
    assert grown > GROWTH


async def test_short_memory_ends_what_is_half_sent_and_nothing_else(tmp_path: Any):
    limit = ("--max-memory-bytes", str(250 * MIB))
    async with (
        started(*LOCAL, "--data-dir", str(tmp_path / "data"), *limit) as process,
        Client(process.target) as site,
        site.subscribed("**") as events,
        peak_of(process.pid) as growth,
    ):
        await events.snapshot()
        ground = ground_of(process.target, 1.0)
        async with ATTACKS["half-batches"].going_on(ground):
            await eventually(lambda: sum(ended(ground)) > 50, ANSWER_S)
            assert await healthy(process.target)
            # The attackers are still there; what they sent is not.
            await eventually(lambda: answered(site), ANSWER_S)
            await eventually(lambda: resident_bytes(process.pid) < 250 * MIB)
        assert ground.tally["resets"] > 0
        (update,) = await events.updates(1)
        assert update.cohort == "honest"
        # What comes until a look at memory has done its work is on top, more of it where the machine is busy.
        assert growth() < 700 * MIB, "1,200 MiB are sent"


def ended(ground: Ground) -> list[int]:
    return [sum(peer.resets.values()) for peer in ground.peers]


async def answered(site: Client) -> bool:
    """Emit, and tell whether that was taken; while memory is short it is refused."""
    try:
        await site.emit(*(msp(f"site-{number}", "honest") for number in range(3)))
    except grpc.aio.AioRpcError as error:
        refused = Refusal.read(error)
        assert (refused.reason, refused.metadata["resource"]) == ("OVERLOADED", "memory")
        assert refused.retry_s == 1.0
        return False
    return True


async def test_who_does_not_greet_in_time_is_sent_away(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app, "HANDSHAKE_MS", 700)
    async with running_server() as running, Client(running.target) as site:
        await site.emit(msp())
        ground = ground_of(running.target, 0.02)
        async with ATTACKS["slow-preface"].going_on(ground), ATTACKS["silent"].going_on(ground):
            await eventually(lambda: len(ground.peers) == 30)
            await eventually(lambda: all(peer.closed.is_set() for peer in ground.peers))
        await site.emit(msp())


@pytest.mark.parametrize(("version", "warns"), [("1.83.2", True), ("1.84.0", False)])
async def test_grpc_that_reads_without_bound_is_told_of(
    version: str, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(grpc, "__version__", version)
    for listen, told in (("0.0.0.0:0", warns), ("127.0.0.1:0", False)):
        caplog.clear()
        async with running_server(listen=listen, insecure=True):
            assert (f"grpcio {version} reads ahead" in caplog.text) == told


async def test_connections_past_the_bound_are_closed_at_once():
    async with running_server(max_connections=5) as running:
        ground = ground_of(running.target, 0.02)
        async with ATTACKS["idle"].going_on(ground):
            await eventually(lambda: len(ground.peers) == 20)
            await eventually(lambda: sum(peer.closed.is_set() for peer in ground.peers) == 15)
        assert await healthy(running.target), "who goes away makes room"


async def test_compression_by_grpc_is_refused():
    async with running_server() as running, Client(running.target) as site:
        request = wire_pb2.EmitRequest(packet=msp())
        call = site.interchange.Emit(request, timeout=ANSWER_S, compression=grpc.Compression.Gzip)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert "gzip" in (caught.value.details() or "")


# Admission


@contextlib.asynccontextmanager
async def admitting(admission: Admission) -> AsyncIterator[grpc.aio.Channel]:
    """A server with one method of each kind, that answers with what it was sent."""

    async def answer(request: bytes, _context: object) -> bytes:
        return request

    async def stream(request: bytes, _context: object) -> AsyncIterator[bytes]:
        yield request
        yield request

    async def write(request: bytes, context: Any) -> None:
        await context.write(request)

    async def converse(requests: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    methods = {
        "Answer": grpc.unary_unary_rpc_method_handler(answer),
        "Stream": grpc.unary_stream_rpc_method_handler(stream),
        "Write": grpc.unary_stream_rpc_method_handler(write),
        "Converse": grpc.stream_stream_rpc_method_handler(converse),
    }
    methods |= {"Check": methods["Answer"], "Watch": methods["Stream"]}
    server = grpc.aio.server(interceptors=[admission])
    for service in ("any.Service", "grpc.health.v1.Health"):
        handlers = grpc.method_handlers_generic_handler(service, methods)
        server.add_generic_rpc_handlers((handlers,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)


def admission_of(**options: Any) -> Admission:
    return Admission(
        **{"max_calls": 100, "pressed": lambda: False, "telemetry": FMITelemetry(), **options}
    )


def begun(channel: grpc.aio.Channel, method: str = "Answer") -> Any:
    """Begin a call and send no message."""
    return channel.stream_stream(f"/any.Service/{method}")(timeout=ANSWER_S)


async def refusal(call: Any) -> Refusal:
    return await refusal_of(call.read())


@pytest.mark.parametrize("quick", [0, 5])
async def test_calls_are_answered_either_way(quick: int):
    admission = admission_of(quick=quick)
    async with admitting(admission) as channel:
        for _ in range(3):
            assert await channel.unary_unary("/any.Service/Answer")(b"x", timeout=ANSWER_S) == b"x"
        stream = channel.unary_stream("/any.Service/Stream")(b"x", timeout=ANSWER_S)
        assert [answer async for answer in stream] == [b"x", b"x"]
        written = channel.unary_stream("/any.Service/Write")(b"x", timeout=ANSWER_S)
        assert [answer async for answer in written] == [b"x"]
        talk = begun(channel, "Converse")
        await talk.write(b"x")
        assert await talk.read() == b"x"
        await talk.done_writing()
        assert await talk.read() is grpc.aio.EOF
        missing = await refusal_of(channel.unary_unary("/any.Service/None")(b"", timeout=ANSWER_S))
        assert missing.code == grpc.StatusCode.UNIMPLEMENTED
        await eventually(lambda: admission.open == 0)


@pytest.mark.parametrize("method", ["Answer", "Stream"])
async def test_a_message_that_does_not_come_ends_its_call(method: str):
    async with admitting(admission_of(message_s=0.2, quick=0)) as channel:
        late = await refusal(begun(channel, method))
        assert (late.code, late.reason) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "CONTRACT_VIOLATION",
        )
        assert late.violations == (("request", "fmi.request.incomplete"),)
        assert late.retry_s is None, "the same again would come to the same"
        empty = begun(channel, method)
        await empty.done_writing()
        assert (await refusal(empty)).violations == (("request", "fmi.request.missing"),)


async def test_a_few_calls_are_waited_for_the_quick_way_and_the_others_are_not():
    admission = admission_of(message_s=0.2, quick=2)
    async with admitting(admission) as channel:
        calls = [begun(channel) for _ in range(5)]
        await eventually(lambda: sum(call.done() for call in calls) == 3)
        await asyncio.sleep(0.3)  # longer than the three were waited for
        assert sum(call.done() for call in calls) == 3
        for call in calls:
            call.cancel()
        await eventually(lambda: admission.open == 0)
        # Their places are free again.
        again = [begun(channel) for _ in range(2)]
        await eventually(lambda: admission.open == 2)
        for call in again:
            await call.write(b"x")
            await call.done_writing()
            assert await call.read() == b"x"


async def test_calls_past_the_bound_are_refused_before_their_message():
    admission = admission_of(max_calls=2)
    async with admitting(admission) as channel:
        held = [begun(channel, "Converse") for _ in range(2)]
        await eventually(lambda: admission.open == 2)
        refused = await refusal(begun(channel))
        assert (refused.code, refused.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "OVERLOADED",
        )
        assert refused.retry_s == 1.0
        held[0].cancel()
        await eventually(lambda: admission.open == 1)
        assert await channel.unary_unary("/any.Service/Answer")(b"x", timeout=ANSWER_S) == b"x"


async def test_while_memory_is_short_only_health_is_told():
    pressed = True
    admission = admission_of(pressed=lambda: pressed)
    async with admitting(admission) as channel:
        call = channel.unary_unary("/any.Service/Answer")
        assert (await refusal_of(call(b"x", timeout=ANSWER_S))).metadata == {"resource": "memory"}
        health = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert await health(b"x", timeout=ANSWER_S) == b"x"
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")  # it could stay for ever
        refused = await refusal_of(watch(b"x", timeout=ANSWER_S).read())
        assert refused.metadata == {"resource": "memory"}
        pressed = False
        assert await call(b"x", timeout=ANSWER_S) == b"x"


async def test_relief_ends_who_is_waited_for_and_nobody_else(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fmi_server.transport.admission.AWAITED_S", 0.0)
    admission = admission_of(quick=0)
    async with admitting(admission) as channel:
        calls = [begun(channel, method) for method in ("Answer", "Stream", "Converse")]
        await eventually(lambda: admission.open == 3)
        await eventually(lambda: admission.relieve() == 3)
        for call in calls:
            assert (await refusal(call)).metadata == {"resource": "memory"}
        await eventually(lambda: admission.open == 0)
        assert admission.relieve() == 0


# The watch


async def test_the_watch_refuses_above_its_limit_and_takes_calls_again_well_below():
    held = 0
    relieved = []
    telemetry = FMITelemetry()
    watch = MemoryWatch(telemetry=telemetry, limit_bytes=1000, read=lambda: held)
    watch.on_pressure(lambda: relieved.append(held) or 0)
    running = asyncio.create_task(watch.run())
    for held, pressed in ((1000, False), (1001, True), (960, True), (949, False), (1000, False)):
        await eventually(lambda: telemetry.snapshot()["fmi_resident_memory_bytes"] == held)  # noqa: B023
        await eventually(lambda: watch.pressed == pressed)  # noqa: B023
    assert set(relieved) == {1001, 960}
    running.cancel()
    await asyncio.wait({running})


async def test_the_watch_gives_back_what_is_free_after_a_wave(monkeypatch: pytest.MonkeyPatch):
    held, trimmed = 100 * MIB, []
    monkeypatch.setattr(memory_watch, "TRIM_S", 0.01)
    monkeypatch.setattr(memory_watch, "_trim", lambda: trimmed.append(held))
    watch = MemoryWatch(telemetry=FMITelemetry(), read=lambda: held)
    running = asyncio.create_task(watch.run())
    await asyncio.sleep(0.1)
    held += memory_watch.MUCH_BYTES
    await asyncio.sleep(0.1)
    assert trimmed == [], "that is not much"
    held += 1
    await eventually(lambda: trimmed)
    await asyncio.sleep(0.1)
    assert trimmed == [held], "what is in use is not asked for again"
    running.cancel()
    await asyncio.wait({running})


async def test_a_refused_call_keeps_nothing_of_its_message():
    """What ends a call refers to its frames, and they to it: they stay until the garbage is collected."""
    # A gRPC client in this process would keep its own.
    garbage = frames.message(b"\xff" * (MESSAGE_BYTES - 64))
    fields = frames.block("/fmi.v1.InterchangeService/Emit")
    async with running_server() as running:
        peer = await ground_of(running.target).peer()
        assert peer is not None
        gc.collect()
        gc.disable()
        try:
            before = resident_bytes(os.getpid())
            for stream in range(1, 81, 2):
                await peer.send(frames.headers(stream, fields))
                assert await peer.send_within_windows(stream, garbage)
                await peer.send(frames.data(stream, b"", end=True))
                await eventually(lambda: peer.said[frames.Kind.HEADERS] > stream // 2)  # noqa: B023
            await asyncio.to_thread(memory_watch._trim)
            assert resident_bytes(os.getpid()) - before < GROWTH, "160 MiB were sent"
        finally:
            gc.enable()
            await peer.close()


async def test_the_limit_is_a_share_of_what_the_container_has(tmp_path: Path, monkeypatch: Any):
    machine = default_limit()
    for text, limit in (("100000000\n", 80_000_000), ("max\n", machine)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr(
            "fmi_server.memory_watch._CGROUP_LIMITS", (tmp_path / "memory.max", tmp_path / "none")
        )
        assert default_limit() == limit
