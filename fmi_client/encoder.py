"""Packets in envelopes: many in one message, compressed with zstd."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import zstandard
from google.protobuf.message import DecodeError

from fmi.envelope import EnvelopeDecodeError, open_envelope
from fmi.v1 import error_pb2, interchange_service_pb2, packet_pb2
from fmi_client._arguments import check_kind, check_whole
from fmi_client._counts import counted
from fmi_client._translation import reason_name
from fmi_client.errors import (
    ConfigurationError,
    DictionaryUnknownError,
    EnvelopeError,
    FMIError,
)

__all__ = ["DECODE_LIMIT_BYTES", "LEVEL", "FMIEncoder"]

LEVEL: Final = 3
"""The zstd level: the one at which compressing a packet still costs microseconds."""

DECODE_LIMIT_BYTES: Final = 16 * 1024 * 1024
"""The largest envelope that is decoded unless another limit is asked for, in bytes decoded."""

_BATCH_PACKETS: Final = 500
_BATCH_BYTES: Final = 1024 * 1024


class FMIEncoder:
    """Packs packets into `EncodedPackets` envelopes: one zstd frame that declares its content size.

    Single small packets gain nothing without a dictionary; batches compress without one. An encoder
    may be shared by threads.

    Args:
        level: The zstd level.
        dictionary: A dictionary in zstd's format, as `train` makes it or the server gives it. The
            server must have it too.

    Raises:
        ConfigurationError: The level is none, or the dictionary is not one in zstd's format.
    """

    def __init__(self, *, level: int = LEVEL, dictionary: bytes | None = None) -> None:
        check_whole("FMIEncoder: level", level)
        if not -zstandard.MAX_COMPRESSION_LEVEL <= level <= zstandard.MAX_COMPRESSION_LEVEL:
            most = zstandard.MAX_COMPRESSION_LEVEL
            raise ConfigurationError(f"FMIEncoder: level must be between -{most} and {most}")
        check_kind("FMIEncoder: dictionary", dictionary, bytes, optional=True)
        self._lock = threading.Lock()  # a zstd context serves one thread at a time
        loaded: zstandard.ZstdCompressionDict | None = None
        if dictionary is not None:
            try:
                loaded = zstandard.ZstdCompressionDict(
                    dictionary, dict_type=zstandard.DICT_TYPE_FULLDICT
                )
                loaded.precompute_compress(level=level)
            except zstandard.ZstdError as error:
                raise ConfigurationError(f"not a zstd dictionary: {error}") from error
        self.dictionary = dictionary
        self._dictionary = loaded
        self.dictionary_id: int = loaded.dict_id() if loaded is not None else 0
        self._compressor = zstandard.ZstdCompressor(
            level=level, dict_data=loaded, write_content_size=True
        )

    def encode(
        self, packets: Iterable[packet_pb2.Packet]
    ) -> interchange_service_pb2.EncodedPackets:
        """Pack packets into one envelope, in their order.

        Raises:
            ConfigurationError: There are no packets.
        """
        return self.encode_serialized([packet.SerializeToString() for packet in packets])

    def encode_serialized(
        self, serialized: Sequence[bytes]
    ) -> interchange_service_pb2.EncodedPackets:
        """Pack packets that are serialised already, in their order.

        Raises:
            ConfigurationError: There are no packets.
        """
        if not serialized:
            raise ConfigurationError("an envelope must have at least one packet")
        data = packet_pb2.RawPacketBatch(packets=serialized).SerializeToString()
        with self._lock:
            compressed = self._compressor.compress(data)
        return interchange_service_pb2.EncodedPackets(
            encoding=interchange_service_pb2.ENCODING_ZSTD,
            dictionary_id=self.dictionary_id,
            uncompressed_size=len(data),
            data=compressed,
        )

    def encode_batches(
        self,
        packets: Iterable[packet_pb2.Packet],
        *,
        batch_packets: int = _BATCH_PACKETS,
        batch_bytes: int = _BATCH_BYTES,
    ) -> Iterator[interchange_service_pb2.EncodedPackets]:
        """Pack packets into as many envelopes as are needed, in their order.

        Args:
            packets: The packets; they are taken as the envelopes are.
            batch_packets: The most packets in an envelope.
            batch_bytes: The most bytes in an envelope before compression. A single packet that is
                larger has an envelope of its own.
        """
        serialized: list[bytes] = []
        size = 0
        for packet in packets:
            data = packet.SerializeToString()
            if serialized and (len(serialized) >= batch_packets or size + len(data) > batch_bytes):
                yield self.encode_serialized(serialized)
                serialized, size = [], 0
            serialized.append(data)
            size += len(data)
        if serialized:
            yield self.encode_serialized(serialized)

    def decode(
        self,
        encoded: interchange_service_pb2.EncodedPackets,
        *,
        limit_bytes: int = DECODE_LIMIT_BYTES,
    ) -> list[packet_pb2.Packet]:
        """Unpack an envelope. Nothing is allocated before the declared size was checked.

        Args:
            encoded: The envelope.
            limit_bytes: The most bytes that it may decode to.

        Raises:
            EnvelopeError: It is malformed, or larger than the limit.
            DictionaryUnknownError: It was packed with another dictionary than this encoder's.
        """
        try:
            data = open_envelope(
                encoded,
                limit_bytes=limit_bytes,
                dictionary=lambda found: self._dictionary if found == self.dictionary_id else None,
            )
            return list(packet_pb2.PacketBatch.FromString(data).packets)
        except EnvelopeDecodeError as problem:
            raise _envelope_error(problem) from problem
        except DecodeError as error:
            malformed = EnvelopeDecodeError("malformed", "the content is no PacketBatch")
            raise _envelope_error(malformed) from error

    @staticmethod
    def train(packets: Iterable[packet_pb2.Packet], dictionary_bytes: int = 16_384) -> bytes:
        """Train a compression dictionary for single packets of one kind of site.

        Args:
            packets: Samples of what will be sent; some hundreds, of at least about 10 times
                `dictionary_bytes` in all.
            dictionary_bytes: The size of the dictionary.

        Returns:
            The dictionary in zstd's format, for `FMIEncoder` and `admin.register_dictionary`.

        Raises:
            ConfigurationError: There are too few samples to train from.
        """
        samples: list[bytes | bytearray | memoryview] = [
            packet_pb2.PacketBatch(packets=[packet]).SerializeToString() for packet in packets
        ]
        try:
            return zstandard.train_dictionary(dictionary_bytes, samples, level=LEVEL).as_bytes()
        except (zstandard.ZstdError, ValueError) as error:
            given = f"{counted(len(samples), 'packet')} ({sum(map(len, samples))} bytes)"
            raise ConfigurationError(
                f"cannot train a dictionary of {dictionary_bytes} bytes from {given}: {error}; give more "
                "samples"
            ) from error


def _envelope_error(problem: EnvelopeDecodeError) -> FMIError:
    kind, reason = _ERRORS[problem.kind]
    return kind(f"envelope cannot be decoded: {problem}", reason=reason_name(reason))


_ERRORS: Final[dict[str, tuple[type[FMIError], error_pb2.ErrorReason.ValueType]]] = {
    "malformed": (EnvelopeError, error_pb2.ERROR_REASON_ENVELOPE_MALFORMED),
    "too_large": (EnvelopeError, error_pb2.ERROR_REASON_ENVELOPE_TOO_LARGE),
    "dictionary_unknown": (
        DictionaryUnknownError,
        error_pb2.ERROR_REASON_DICTIONARY_UNKNOWN,
    ),
}
