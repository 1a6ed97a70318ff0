"""Requests are read from their bytes without taking more memory than they are worth."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from parts import msp

from fmi.descriptors import CONTRACT_FILES
from fmi.rules import ContractRules
from fmi.v1 import admin_service_pb2 as admin_pb2
from fmi.v1 import cohort_pb2, packet_pb2, registry_service_pb2, update_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server.errors import RequestInvalidError
from fmi_server.transport import requests
from fmi_server.transport.requests import (
    LARGER,
    SMALL_BYTES,
    read_emit,
    read_emit_stream,
    read_validate_packet,
    reader_of,
)

METHODS = {
    method.full_name: method
    for file in CONTRACT_FILES
    for service in file.services_by_name.values()
    for method in service.methods
}
RAW = ("Emit", "EmitStream", "ValidatePacket")
PACKET = msp("site", controller={"tau": 0.5})
ENVELOPE = wire_pb2.EncodedPackets(encoding=1, uncompressed_size=3, data=b"abc")


def reader(name: str) -> Any:
    """Return the reader of a method by the end of its name."""
    (method,) = (found for full, found in METHODS.items() if full.endswith(f".{name}"))
    return reader_of(method)


def refused(name: str, data: bytes) -> list[tuple[str, str]]:
    with pytest.raises(RequestInvalidError) as caught:
        reader(name)(data)
    return [(found.field, found.rule_id) for found in caught.value.violations]


# Packets stay bytes


def test_a_raw_request_has_the_bytes_of_its_packets():
    emit = read_emit(wire_pb2.EmitRequest(packet=PACKET).SerializeToString())
    assert packet_pb2.Packet.FromString(emit.packet) == PACKET
    assert emit.HasField("packet")
    assert not emit.HasField("encoded")
    batch = packet_pb2.PacketBatch(packets=[PACKET, PACKET])
    sent = wire_pb2.EmitStreamRequest(batch_id=7, packets=batch).SerializeToString()
    stream = read_emit_stream(sent)
    assert stream.batch_id == 7
    assert packet_pb2.PacketBatch.FromString(stream.packets) == batch
    check = registry_service_pb2.ValidatePacketRequest(packet=PACKET).SerializeToString()
    assert packet_pb2.Packet.FromString(read_validate_packet(check).packet) == PACKET


@pytest.mark.parametrize(
    ("read", "kind"),
    [(read_emit, wire_pb2.EmitRequest), (read_emit_stream, wire_pb2.EmitStreamRequest)],
)
def test_a_raw_request_has_its_envelope(read, kind):
    request = read(kind(encoded=ENVELOPE).SerializeToString())
    assert request.encoded == ENVELOPE
    assert not request.HasField("packet" if kind is wire_pb2.EmitRequest else "packets")
    nothing = read(b"")
    assert not nothing.HasField("encoded")


def test_an_empty_packet_is_there_and_a_missing_one_is_not():
    empty = wire_pb2.EmitRequest(packet=packet_pb2.Packet()).SerializeToString()
    assert read_emit(empty).HasField("packet")
    assert read_emit(empty).packet == b""
    assert not read_validate_packet(b"").HasField("packet")


def test_of_a_packet_and_an_envelope_the_last_one_counts():
    packet = wire_pb2.EmitRequest(packet=PACKET).SerializeToString()
    envelope = wire_pb2.EmitRequest(encoded=ENVELOPE).SerializeToString()
    assert read_emit(packet + envelope).HasField("encoded")
    assert not read_emit(packet + envelope).HasField("packet")
    assert read_emit(envelope + packet).HasField("packet")


@pytest.mark.parametrize("name", RAW)
def test_garbage_is_no_raw_request(name):
    with pytest.raises(DecodeError):
        reader(name)(b"\x0a\xff\xff\xff\xff\x0f")


def test_raw_requests_differ_from_the_contract_in_one_field_each():
    """They are made of its descriptors, so that a field that is added is there too."""
    for read, kind, left in (
        (read_emit, wire_pb2.EmitRequest, "packet"),
        (read_emit_stream, wire_pb2.EmitStreamRequest, "packets"),
        (read_validate_packet, registry_service_pb2.ValidatePacketRequest, "packet"),
    ):
        raw: Any = read(b"")
        ours, theirs = raw.DESCRIPTOR, kind.DESCRIPTOR
        assert [f.number for f in ours.fields] == [f.number for f in theirs.fields]
        for one, other in zip(ours.fields, theirs.fields, strict=True):
            bytes_ = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
            assert one.type == (bytes_ if one.name == left else other.type)
            if one.name != left:
                assert one.message_type == other.message_type


# Sizes


def largest() -> dict[str, Any]:
    """For each method with a bound of its own a request that says as much as the contract lets it."""
    cohort = "c" * 128
    kind = update_pb2.UPDATE_KIND_WARM_START
    pattern = "a*" * 8 + "a" * 112
    signal = cohort_pb2.SignalSpec(
        name="s" * 128,
        unit="\u00fc" * 32,
        section=cohort_pb2.SIGNAL_SECTION_OPERATORS,
        transform=cohort_pb2.SIGNAL_TRANSFORM_LOG,
        direction=cohort_pb2.SIGNAL_DIRECTION_HIGHER_IS_BETTER,
        lower=-1.2345e150,
        upper=1.2345e150,
        scale=1.5,
        guardrail=True,
    )
    return {
        "Subscribe": wire_pb2.SubscribeRequest(
            cohorts=[pattern] * 64,
            kinds=[kind] * 16,
            mode=wire_pb2.DELIVERY_MODE_EVERY,
            start_revisions=[
                wire_pb2.StartRevision(
                    cohort=cohort, kind=kind, revision=2**64 - 1, history_epoch="e" * 64
                )
            ]
            * 4096,
            subscriber="s" * 128,
            instance_id="i" * 64,
        ),
        "GetWarmStart": wire_pb2.GetWarmStartRequest(
            cohort=cohort,
            profile_class="p" * 64,
            regime_tag="r" * 128,
            concepts={f"{number:0128}": 1.5 for number in range(1024)},
        ),
        "ReportApplied": wire_pb2.ReportAppliedRequest(
            subscriber="s" * 128,
            reports=[
                wire_pb2.ApplyReport(
                    cohort=cohort,
                    kind=kind,
                    revision=2**64 - 1,
                    history_epoch="e" * 64,
                    failure=wire_pb2.ApplyFailure(code=16, message="m" * 512),
                )
            ]
            * 256,
        ),
        "RegisterDictionary": admin_pb2.RegisterDictionaryRequest(data=b"d" * 2**20),
        "PlanPrivacy": admin_pb2.PlanPrivacyRequest(
            sites=2**32 - 1, signals=4096, signal_specs=[signal] * 4096
        ),
    }


@pytest.mark.parametrize("name", [name.rpartition(".")[2] for name in LARGER if LARGER[name]])
def test_what_keeps_the_rules_is_never_too_large(name):
    request = largest()[name]
    told = {(p.field, p.rule_id) for p in ContractRules().problems(request)}
    assert not {rule for _, rule in told if "max" in rule or "pattern" in rule}, told
    assert len(request.SerializeToString()) > SMALL_BYTES, "it needs a bound of its own"
    assert reader(name)(request.SerializeToString()) == request


@pytest.mark.parametrize("full_name", [name for name in METHODS if not name.endswith(RAW)])
def test_what_is_larger_is_refused_unread(full_name):
    most = LARGER.get(full_name, SMALL_BYTES)
    if most is None:
        return
    filler = b"\x7a\x80\x80\x80\x01" + bytes(2**21)
    name = full_name.rpartition(".")[2]
    assert refused(name, filler) == [("request", "fmi.request.too_large")]


def test_every_method_that_has_a_bound_is_there():
    assert set(LARGER) <= set(METHODS)
    assert {name for name in METHODS if name.endswith(tuple(f".{raw}" for raw in RAW))} == set(
        requests._RAW
    )


# Lists


def spec_with(number: int, times: int, *, item: bytes = b"") -> bytes:
    """Serialise a PutCohortSpecRequest with a field of its spec again and again."""
    field = bytes([number << 3 | 2, len(item)]) + item
    spec = field * times
    return b"\x0a" + length(spec) + spec


def length(data: bytes) -> bytes:
    size, out = len(data), bytearray()
    while size > 0x7F:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*out, size])


def test_a_list_that_is_longer_than_the_contract_allows_is_refused_before_it_is_parsed():
    # It could not be parsed either: the end of a group that never began.
    bomb = spec_with(3, 2**20) + b"\x0c"
    assert refused("PutCohortSpec", bomb) == [("spec.signals", "fmi.request.too_many")]
    # As many as there may be are taken, where the request is looked into.
    filled = cohort_pb2.CohortSpec(name="c", description="d" * SMALL_BYTES)
    filled.signals.extend([cohort_pb2.SignalSpec()] * 4096)
    good = admin_pb2.PutCohortSpecRequest(spec=filled)
    assert reader("PutCohortSpec")(good.SerializeToString()) == good


def test_a_message_that_comes_in_pieces_is_counted_as_one():
    half = spec_with(3, 2048, item=b"\x0a\x20" + b"n" * 32)
    assert len(reader("PutCohortSpec")(half + half).spec.signals) == 4096
    assert refused("PutCohortSpec", half + half + spec_with(3, 1)) == [
        ("spec.signals", "fmi.request.too_many")
    ]


def test_fields_without_end_are_not_looked_at_to_the_end():
    flags = b"\x10\x01" * (requests.MAX_FIELDS + 1)  # `force`, which takes no memory
    assert refused("PutCohortSpec", flags) == [("request", "fmi.request.too_many")]


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(b"\x0b", id="a group"),
        pytest.param(b"\x0a\xff\x01", id="a length past the end"),
        pytest.param(b"\x09\x00", id="a number that is cut off"),
        pytest.param(b"\x80" * 11, id="a tag without end"),
    ],
)
def test_what_is_no_message_is_no_request(broken):
    good = admin_pb2.PutCohortSpecRequest(
        spec=cohort_pb2.CohortSpec(name="c", description="d" * SMALL_BYTES)
    ).SerializeToString()
    with pytest.raises(DecodeError):
        reader("PutCohortSpec")(good + broken)


@given(
    st.lists(st.integers(0, 40), max_size=6),
    st.dictionaries(st.text("ab", min_size=1), st.floats(-9, 9), max_size=5),
    st.booleans(),
)
def test_what_is_counted_reads_as_what_is_not(signals, quantum, force):
    spec = cohort_pb2.CohortSpec(name="c", description="d" * SMALL_BYTES)
    spec.signals.extend(cohort_pb2.SignalSpec(name="s" * size) for size in signals)
    spec.policy.quantum.update(quantum)
    request = admin_pb2.PutCohortSpecRequest(spec=spec, force=force)
    assert reader("PutCohortSpec")(request.SerializeToString()) == request
