"""FMIEncoder: what goes in comes out, and nothing hostile does harm."""

from __future__ import annotations

import threading

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fmi.v1 import interchange_service_pb2, packet_pb2
from fmi_client import (
    ConfigurationError,
    DictionaryUnknownError,
    EnvelopeError,
    FMIEmitter,
    FMIEncoder,
)

IDENTITY = interchange_service_pb2.ENCODING_IDENTITY
ZSTD = interchange_service_pb2.ENCODING_ZSTD

emitter = FMIEmitter("site_001")
SAMPLES = [
    emitter.emit_msp(
        metrics={"gain_p50": i / 7, "gain_p90": i / 3},
        controller={f"p{j}": (i * j) / 11 for j in range(20)},
    )
    for i in range(400)
]
DICTIONARY = FMIEncoder.train(SAMPLES[:300], dictionary_bytes=4096)

signal_names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.]{0,12}", fullmatch=True)
packets = st.builds(
    lambda domain_id, values: packet_pb2.Packet(
        header=packet_pb2.PacketHeader(domain_id=domain_id),
        msp=packet_pb2.MetaSignalPack(controller=values),
    ),
    st.text(max_size=20),
    st.dictionaries(signal_names, st.floats(allow_nan=False), max_size=5),
)


@given(st.lists(packets, min_size=1, max_size=8), st.booleans())
def test_round_trip(batch, with_dictionary):
    encoder = FMIEncoder(dictionary=DICTIONARY if with_dictionary else None)
    encoded = encoder.encode(batch)
    assert encoder.decode(encoded) == batch
    assert encoded.encoding == ZSTD
    # The contract's form, read without this code: one frame that declares its content size.
    frame = zstandard.get_frame_parameters(encoded.data)
    assert frame.content_size == encoded.uncompressed_size
    assert frame.dict_id == encoded.dictionary_id == encoder.dictionary_id
    plain = zstandard.ZstdDecompressor(
        dict_data=zstandard.ZstdCompressionDict(DICTIONARY) if with_dictionary else None
    ).decompress(encoded.data)
    assert packet_pb2.PacketBatch.FromString(plain) == packet_pb2.PacketBatch(packets=batch)


@given(
    st.lists(packets, max_size=12),
    st.integers(1, 5),
    st.integers(1, 200),
)
def test_batches_keep_the_order_and_the_bounds(batch, batch_packets, batch_bytes):
    encoder = FMIEncoder()
    envelopes = list(
        encoder.encode_batches(batch, batch_packets=batch_packets, batch_bytes=batch_bytes)
    )
    decoded = [encoder.decode(envelope) for envelope in envelopes]
    assert [packet for part in decoded for packet in part] == batch
    for part in decoded:
        assert 1 <= len(part) <= batch_packets
        assert len(part) == 1 or sum(len(p.SerializeToString()) for p in part) <= batch_bytes


def test_a_dictionary_makes_single_packets_smaller():
    with_one = FMIEncoder(dictionary=DICTIONARY)
    without = FMIEncoder()
    fresh = SAMPLES[300:]
    assert sum(len(with_one.encode([p]).data) for p in fresh) < 0.8 * sum(
        len(without.encode([p]).data) for p in fresh
    )


def test_identity_is_decoded_too():
    data = packet_pb2.PacketBatch(packets=SAMPLES[:2]).SerializeToString()
    envelope = interchange_service_pb2.EncodedPackets(
        encoding=IDENTITY, uncompressed_size=len(data), data=data
    )
    assert FMIEncoder().decode(envelope) == SAMPLES[:2]


def envelope(data, size, *, encoding=ZSTD, dictionary_id=0):
    return interchange_service_pb2.EncodedPackets(
        encoding=encoding, uncompressed_size=size, data=data, dictionary_id=dictionary_id
    )


def test_bomb_is_refused_before_it_is_opened():
    """64 MiB of zeros in a frame of a few kB: the declared size is over the limit."""
    bomb = zstandard.compress(bytes(64 * 1024 * 1024))
    with pytest.raises(EnvelopeError, match="at most"):
        FMIEncoder().decode(envelope(bomb, 64 * 1024 * 1024))
    with pytest.raises(EnvelopeError, match="at most"):
        FMIEncoder().decode(envelope(bomb, 1000))


def test_frame_of_unknown_size_is_refused():
    data = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000))
    with pytest.raises(EnvelopeError, match="does not declare its content size"):
        FMIEncoder().decode(envelope(data, 1000))


def good():
    return FMIEncoder().encode(SAMPLES[:3])


@pytest.mark.parametrize(
    "spoilt",
    [
        envelope(b"", 10),
        envelope(b"garbage that is no frame", 10),
        envelope(good().data[:-4], good().uncompressed_size),
        envelope(good().data + b"more", good().uncompressed_size),
        envelope(good().data, good().uncompressed_size, encoding=IDENTITY),
        envelope(good().data, good().uncompressed_size, encoding=0),
        envelope(good().data, good().uncompressed_size, encoding=77),
        envelope(good().data, good().uncompressed_size, dictionary_id=5),
        envelope(zstandard.compress(b"\xff\xff"), 2),
    ],
)
def test_malformed_envelope_is_refused(spoilt):
    with pytest.raises(EnvelopeError) as caught:
        FMIEncoder().decode(spoilt)
    assert caught.value.reason == "ENVELOPE_MALFORMED"


@given(st.binary(max_size=200), st.integers(0, 1000))
def test_no_bytes_crash_the_decoder(data, size):
    for encoding in (IDENTITY, ZSTD):
        try:
            FMIEncoder().decode(envelope(data, size, encoding=encoding))
        except EnvelopeError:
            continue


def test_other_dictionary_is_told():
    encoded = FMIEncoder(dictionary=DICTIONARY).encode(SAMPLES[:1])
    with pytest.raises(DictionaryUnknownError):
        FMIEncoder().decode(encoded)


def test_what_is_no_dictionary_is_refused():
    with pytest.raises(ConfigurationError):
        FMIEncoder(dictionary=b"not a dictionary")
    with pytest.raises(ConfigurationError, match="more samples"):
        FMIEncoder.train(SAMPLES[:3])
    with pytest.raises(ConfigurationError):
        FMIEncoder().encode([])


def test_an_encoder_may_be_shared_by_threads():
    encoder = FMIEncoder(dictionary=DICTIONARY)
    failures = []

    def work(part):
        failures.extend(p for p in part if encoder.decode(encoder.encode([p])) != [p])

    threads = [threading.Thread(target=work, args=(SAMPLES[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
