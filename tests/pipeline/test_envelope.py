"""Envelopes: every size is checked before a byte is decoded, and every fault is typed."""

from __future__ import annotations

import asyncio
import resource
import time
import tracemalloc

import pytest
import zstandard
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import msp

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import packet_pb2
from fmi_server.envelope import ByteBudget, EnvelopeDecoder, EnvelopeLimits
from fmi_server.errors import (
    DictionaryUnknownError,
    EnvelopeMalformedError,
    EnvelopeTooLargeError,
    OverloadedError,
)

LIMITS = EnvelopeLimits(max_bytes=2**20, max_packets=100)
PACKETS = [msp(f"site-{i}", controller={"tau": i / 10}) for i in range(20)]
CONTENT = packet_pb2.PacketBatch(packets=PACKETS).SerializeToString()
SAMPLES = [
    msp(f"site-{i}", controller={"tau": i / 7, f"s{i % 5}": 1.0}).SerializeToString()
    for i in range(400)
]
DICTIONARY = zstandard.train_dictionary(4096, SAMPLES)


@pytest.fixture
def decoder() -> EnvelopeDecoder:
    return EnvelopeDecoder(LIMITS, {DICTIONARY.dict_id(): DICTIONARY})


def envelope(data: bytes, size: int | None = None, *, zstd: bool = True, dictionary_id: int = 0):
    return wire_pb2.EncodedPackets(
        encoding=wire_pb2.ENCODING_ZSTD if zstd else wire_pb2.ENCODING_IDENTITY,
        data=data,
        uncompressed_size=len(CONTENT) if size is None else size,
        dictionary_id=dictionary_id,
    )


def unsized(content: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor(write_content_size=False)
    return compressor.compress(content)


# Round trips


def test_packets_come_out_as_they_went_in(decoder):
    expected = [packet.SerializeToString() for packet in PACKETS]
    assert decoder.decode(envelope(CONTENT, zstd=False)) == expected
    for level in (-5, 1, 3, 19):
        assert decoder.decode(envelope(zstandard.compress(CONTENT, level))) == expected
    compressor = zstandard.ZstdCompressor(dict_data=DICTIONARY)
    packed = envelope(compressor.compress(CONTENT), dictionary_id=DICTIONARY.dict_id())
    assert decoder.decode(packed) == expected


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=100), st.booleans())
def test_packets_are_split_and_not_parsed(items, zstd):
    content = packet_pb2.RawPacketBatch(packets=items).SerializeToString()
    data = zstandard.compress(content) if zstd else content
    assert EnvelopeDecoder(LIMITS).decode(envelope(data, len(content), zstd=zstd)) == items


def test_the_limits_themselves_are_taken(decoder):
    most = packet_pb2.RawPacketBatch(packets=[b"x"] * LIMITS.max_packets).SerializeToString()
    assert len(decoder.decode(envelope(most, len(most), zstd=False))) == LIMITS.max_packets
    room = LIMITS.max_bytes - 4  # a tag and a length of 3 bytes
    full = packet_pb2.RawPacketBatch(packets=[bytes(room)]).SerializeToString()
    assert len(full) == LIMITS.max_bytes
    assert decoder.decode(envelope(zstandard.compress(full), len(full))) == [bytes(room)]


# Faults


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no zstd frame"),
        (b"garbage", "no zstd frame"),
        (zstandard.compress(CONTENT)[:10], "cannot be decoded"),
        (zstandard.compress(CONTENT)[:-3], "cannot be decoded"),
        (zstandard.compress(CONTENT) + b"more", "extra|unused|trailing|unknown"),
        (zstandard.compress(CONTENT) * 2, "extra|unused|trailing|unknown"),
        (b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd", "cannot be decoded"),  # a skippable frame
        (unsized(CONTENT), "does not declare its content size"),
        (zstandard.compress(CONTENT + b"x"), "uncompressed_size says"),
        (zstandard.compress(CONTENT[:-1]), "uncompressed_size says"),
    ],
    ids=range(10),
)
def test_what_is_no_good_frame_is_malformed(decoder, data, said):
    with pytest.raises(EnvelopeMalformedError, match=said):
        decoder.decode(envelope(data))


def test_a_frame_whose_content_is_damaged_is_malformed(decoder):
    whole = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(CONTENT))
    whole[-1] ^= 1
    with pytest.raises(EnvelopeMalformedError):
        decoder.decode(envelope(bytes(whole)))


@pytest.mark.parametrize(
    "content",
    [
        b"\x0a",
        b"\x0a\x05abc",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x0a" + b"\x80" * 20,
        b"\x12\x00",
        b"\x0b\x0c",
        b"\x0a\x00\x08\x01",
        b"\x00",
    ],
)
def test_content_that_is_no_batch_is_malformed(decoder, content):
    with pytest.raises(EnvelopeMalformedError, match="no PacketBatch"):
        decoder.decode(envelope(content, len(content), zstd=False))


def test_an_empty_batch_is_malformed(decoder):
    for packed in (envelope(b"", 0, zstd=False), envelope(zstandard.compress(b""), 0)):
        with pytest.raises(EnvelopeMalformedError):
            decoder.decode(packed)


@pytest.mark.parametrize("size", [len(CONTENT) - 1, len(CONTENT) + 1, 0])
def test_a_size_that_does_not_agree_is_malformed(decoder, size):
    for data, zstd in ((CONTENT, False), (zstandard.compress(CONTENT), True)):
        with pytest.raises(EnvelopeMalformedError, match=f"says {size} bytes"):
            decoder.decode(envelope(data, size, zstd=zstd))


@pytest.mark.parametrize("encoding", [0, 3, 99, -1])
def test_an_unknown_encoding_is_malformed(decoder, encoding):
    packed = envelope(CONTENT)
    packed.encoding = encoding
    with pytest.raises(EnvelopeMalformedError, match="the encoding is unknown"):
        decoder.decode(packed)


def test_dictionaries_must_be_named_and_known(decoder):
    known = DICTIONARY.dict_id()
    data = zstandard.ZstdCompressor(dict_data=DICTIONARY).compress(CONTENT)
    with pytest.raises(EnvelopeMalformedError, match="dictionary_id says 0"):
        decoder.decode(envelope(data))
    with pytest.raises(EnvelopeMalformedError, match=f"dictionary_id says {known}"):
        decoder.decode(envelope(zstandard.compress(CONTENT), dictionary_id=known))
    with pytest.raises(DictionaryUnknownError) as caught:
        EnvelopeDecoder(LIMITS).decode(envelope(data, dictionary_id=known))
    assert caught.value.metadata == {"dictionary_id": str(known)}


def test_too_many_packets_are_too_large(decoder):
    content = packet_pb2.RawPacketBatch(packets=[b""] * 101).SerializeToString()
    with pytest.raises(EnvelopeTooLargeError) as caught:
        decoder.decode(envelope(content, len(content), zstd=False))
    assert caught.value.metadata == {"size": "101", "limit": "100", "unit": "packets"}


# Bombs

HUGE = 512 * 2**20


def bomb(claim: str) -> wire_pb2.EncodedPackets:
    """Make 512 MiB of zeros in a few kilobytes, with what it says of itself as asked."""
    compressor = zstandard.ZstdCompressor(level=1)
    if claim == "frame_unknown":
        compressor = zstandard.ZstdCompressor(level=1, write_content_size=False)
    packer = compressor.compressobj(size=HUGE if claim != "frame_unknown" else -1)
    piece = bytes(2**20)
    data = b"".join(packer.compress(piece) for _ in range(HUGE // len(piece))) + packer.flush()
    if claim == "frame_little":
        # Single-segment frames have the size behind the header; here it is 8 bytes behind a window.
        at = data.index(HUGE.to_bytes(4, "little"))
        data = data[:at] + (1000).to_bytes(4, "little") + data[at + 4 :]
    size = {"envelope_little": 1000, "frame_little": 1000, "frame_unknown": 1000}.get(claim, HUGE)
    return envelope(data, size)


def peak_growth(call) -> int:
    """Return by how many bytes memory that Python or C allocated grew at most."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tracemalloc.start()
    try:
        call()
        traced = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return max(traced, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


@pytest.mark.parametrize(
    ("claim", "error"),
    [
        ("all_true", EnvelopeTooLargeError),
        ("envelope_little", EnvelopeTooLargeError),
        ("frame_little", EnvelopeMalformedError),
        ("frame_unknown", EnvelopeMalformedError),
    ],
)
def test_a_bomb_allocates_nothing(decoder, claim, error):
    packed = bomb(claim)
    assert len(packed.data) < 100_000
    attempts = 20

    def decode() -> None:
        for _ in range(attempts):
            with pytest.raises(error):
                decoder.decode(packed)

    assert peak_growth(decode) < 4 * LIMITS.max_bytes


def test_a_bomb_of_empty_packets_is_not_parsed():
    decoder = EnvelopeDecoder(EnvelopeLimits(max_bytes=16 * 2**20, max_packets=10_000))
    content = b"\x0a\x00" * (8 * 2**20)
    packed = envelope(zstandard.compress(content), len(content))
    assert len(packed.data) < 4096

    def decode() -> None:
        with pytest.raises(EnvelopeTooLargeError):
            decoder.decode(packed)

    started = time.process_time()
    assert peak_growth(decode) < 2 * len(content), "the content itself, and little more"
    assert time.process_time() - started < 5.0


def test_a_dictionary_is_no_way_around_the_limits(decoder):
    known = DICTIONARY.dict_id()
    data = zstandard.ZstdCompressor(dict_data=DICTIONARY).compress(bytes(LIMITS.max_bytes + 1))
    with pytest.raises(EnvelopeTooLargeError):
        decoder.decode(envelope(data, 1000, dictionary_id=known))


# Whatever comes


@settings(max_examples=400)
@given(
    data=st.one_of(
        st.binary(max_size=60),
        st.binary(max_size=60).map(lambda tail: b"\x28\xb5\x2f\xfd" + tail),
        st.binary(max_size=60).map(zstandard.compress),
    ),
    size=st.integers(0, 2**64 - 1) | st.integers(0, 100),
    encoding=st.integers(0, 3),
    dictionary_id=st.sampled_from([0, DICTIONARY.dict_id(), 5]),
)
def test_random_bytes_give_packets_or_a_typed_error(data, size, encoding, dictionary_id):
    decoder = EnvelopeDecoder(LIMITS, {DICTIONARY.dict_id(): DICTIONARY})
    packed = wire_pb2.EncodedPackets(
        encoding=encoding, data=data, uncompressed_size=size, dictionary_id=dictionary_id
    )
    try:
        packets = decoder.decode(packed)
    except (EnvelopeMalformedError, EnvelopeTooLargeError, DictionaryUnknownError):
        pass
    else:
        assert sum(map(len, packets)) <= LIMITS.max_bytes


@settings(max_examples=300)
@given(st.binary(max_size=40))
def test_the_count_before_parsing_refuses_nothing_that_is_a_batch(content):
    try:
        expected = list(packet_pb2.RawPacketBatch.FromString(content).packets)
    except DecodeError:
        expected = []
    canonical = packet_pb2.RawPacketBatch(packets=expected).SerializeToString() == content
    try:
        found = EnvelopeDecoder(LIMITS).split(content)
    except EnvelopeMalformedError:
        assert not (expected and canonical)
    else:
        assert found == expected


# Many at the same time


async def test_what_is_decoded_at_once_is_bounded_and_served_in_order():
    budget = ByteBudget(100)
    done: list[int] = []
    inside = most = 0

    async def work(number: int, size: int) -> None:
        nonlocal inside, most
        async with budget.spending(size):
            inside += size
            most = max(most, inside)
            await asyncio.sleep(0.001)
            inside -= size
            done.append(number)

    async with asyncio.TaskGroup() as tasks:
        for number in range(20):
            tasks.create_task(work(number, 40))
    assert done == list(range(20))
    assert most == 80


async def test_work_larger_than_the_budget_is_let_in_alone():
    budget = ByteBudget(10)
    async with budget.spending(1000):
        waiting = asyncio.ensure_future(budget.spending(1).__aenter__())
        await asyncio.sleep(0)
        assert not waiting.done()
    await waiting


async def test_past_a_bound_nobody_may_wait_and_who_gives_up_leaves_no_trace():
    budget = ByteBudget(10, max_waiting=2)
    async with budget.spending(10):
        waiting = [asyncio.ensure_future(budget.spending(10).__aenter__()) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await budget.spending(1).__aenter__()
        waiting[0].cancel()
        await asyncio.wait([waiting[0]])
    await waiting[1]
    assert budget._spent == 10
