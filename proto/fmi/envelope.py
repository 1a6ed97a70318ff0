"""Opening envelopes: bounded decoding of many packets in one message.

Every size is checked before a byte is decoded: what the envelope says, what the zstd frame says, and what
comes out must agree, and none may be larger than the limit. python-zstandard ignores `max_output_size`
where the frame declares its size, so the frame's own header is read first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import zstandard

from fmi.v1 import interchange_service_pb2 as wire_pb2

__all__ = ["EnvelopeDecodeError", "open_envelope"]


class EnvelopeDecodeError(ValueError):
    """An envelope cannot be opened.

    Attributes:
        kind: `malformed`, `too_large` or `dictionary_unknown`.
        number: The size that is too large, or the dictionary that is not known; else 0.
    """

    def __init__(
        self,
        kind: Literal["malformed", "too_large", "dictionary_unknown"],
        detail: str,
        number: int = 0,
    ) -> None:
        self.kind = kind
        self.number = number
        super().__init__(detail)


def open_envelope(
    envelope: wire_pb2.EncodedPackets,
    *,
    limit_bytes: int,
    dictionary: Callable[[int], zstandard.ZstdCompressionDict | None],
) -> bytes:
    """Return the serialised `PacketBatch` in an envelope.

    Args:
        envelope: The envelope.
        limit_bytes: The most bytes that it may decode to.
        dictionary: Looks a dictionary up by its id.

    Raises:
        EnvelopeDecodeError: It cannot be decoded, its sizes do not agree, it would decode to too much, or it
            names a dictionary that is not known.
    """
    size = envelope.uncompressed_size
    _refuse_too_large(size, limit_bytes)
    if envelope.encoding == wire_pb2.ENCODING_ZSTD:
        data = _decompressed(envelope, limit_bytes, dictionary)
    elif envelope.encoding == wire_pb2.ENCODING_IDENTITY:
        data = envelope.data
    else:
        raise EnvelopeDecodeError("malformed", "the encoding is unknown; use IDENTITY or ZSTD")
    if len(data) != size:
        detail = f"uncompressed_size says {size} bytes, there are {len(data)}"
        raise EnvelopeDecodeError("malformed", detail)
    return data


def _refuse_too_large(size: int, limit_bytes: int) -> None:
    if size > limit_bytes:
        detail = f"it has {size} bytes, at most {limit_bytes} are taken"
        raise EnvelopeDecodeError("too_large", detail, size)


def _decompressed(
    envelope: wire_pb2.EncodedPackets,
    limit_bytes: int,
    dictionary: Callable[[int], zstandard.ZstdCompressionDict | None],
) -> bytes:
    size = envelope.uncompressed_size
    try:
        frame = zstandard.get_frame_parameters(envelope.data)
    except zstandard.ZstdError:
        raise EnvelopeDecodeError("malformed", "data is no zstd frame") from None
    if frame.content_size == zstandard.CONTENTSIZE_UNKNOWN:
        raise EnvelopeDecodeError("malformed", "the zstd frame does not declare its content size")
    _refuse_too_large(frame.content_size, limit_bytes)
    if frame.content_size != size:
        detail = f"uncompressed_size says {size} bytes, the zstd frame {frame.content_size}"
        raise EnvelopeDecodeError("malformed", detail)
    if frame.dict_id != envelope.dictionary_id:
        detail = f"dictionary_id says {envelope.dictionary_id}, the zstd frame {frame.dict_id}"
        raise EnvelopeDecodeError("malformed", detail)
    found = dictionary(frame.dict_id) if frame.dict_id else None
    if frame.dict_id and found is None:
        detail = f"dictionary {frame.dict_id} is not known"
        raise EnvelopeDecodeError("dictionary_unknown", detail, frame.dict_id)
    # A decompressor for each call: they are not safe to share between threads.
    decompressor = zstandard.ZstdDecompressor(dict_data=found)
    try:
        return decompressor.decompress(envelope.data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise EnvelopeDecodeError("malformed", str(error)) from None
