"""Requests, read from their bytes in a way that takes no more memory than they are worth.

An empty item of a list is 2 bytes on the wire and a hundred in memory, so a message of nothing else takes
fifty times its size when it is parsed, before any rule can say that it has too many. So

* packets are left as bytes (`RawEmitRequest` and its like): how large each is and how many there are is known
  before one of them is parsed, and they are parsed one by one,
* a request of any other method is no larger than what it can have to say, and where that is much, its lists
  are counted on the wire: one that is longer than the contract allows is refused there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Final, Protocol

from buf.validate import validate_pb2
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import registry_service_pb2
from fmi_server.errors import RequestInvalidError, Violation

__all__ = [
    "RawEmitRequest",
    "RawEmitStreamRequest",
    "RawValidatePacketRequest",
    "read_emit",
    "read_emit_stream",
    "read_validate_packet",
    "reader_of",
]

SMALL_BYTES: Final = 64 * 1024
"""What is parsed as it is, at 3 MiB of memory at most. No request needs more but those named here."""

LARGER: Final[Mapping[str, int | None]] = {
    "fmi.v1.InterchangeService.Subscribe": 2**20,  # 4,096 start revisions
    "fmi.v1.InterchangeService.GetWarmStart": 256 * 1024,  # 1,024 concepts
    "fmi.v1.InterchangeService.ReportApplied": 256 * 1024,  # 256 reports
    "fmi.v1.AdminService.RegisterDictionary": 2**20 + SMALL_BYTES,
    "fmi.v1.AdminService.PlanPrivacy": 2**21,  # 4,096 signals
    "fmi.v1.AdminService.PutCohortSpec": None,  # lists of principals, as long as a message may be
}
"""Bytes of the largest requests, by method; None for whatever gRPC takes."""

MAX_FIELDS: Final = 500_000
"""Fields of a request that are looked at: the lists of a cohort spec have 300,000 entries at most."""

_Reader = Callable[[bytes], Any]


class RawEmitRequest(Protocol):
    """An `EmitRequest` whose packet is not parsed. Of a field that comes twice the last one counts."""

    packet: bytes
    encoded: wire_pb2.EncodedPackets

    def HasField(self, field_name: str) -> bool:  # noqa: D102 - as messages have it
        ...


class RawEmitStreamRequest(Protocol):
    """An `EmitStreamRequest` whose packets are a serialised `PacketBatch`."""

    batch_id: int
    packets: bytes
    encoded: wire_pb2.EncodedPackets

    def HasField(self, field_name: str) -> bool:  # noqa: D102 - as messages have it
        ...


class RawValidatePacketRequest(Protocol):
    """A `ValidatePacketRequest` whose packet is not parsed."""

    packet: bytes

    def HasField(self, field_name: str) -> bool:  # noqa: D102 - as messages have it
        ...


def _unparsed(message: Descriptor, left: str) -> type[Message]:
    """Make a message that reads the same bytes, with one of its fields as bytes in place of a message."""
    file = descriptor_pb2.FileDescriptorProto(
        name=f"fmi_server/raw/{message.name}.proto",
        package="fmi_server.raw",
        syntax="proto2",  # in which bytes are there or not, as the message was
        dependency=[message.file.name],
    )
    raw = file.message_type.add()
    message.CopyToProto(raw)
    for part in (*raw.field, *raw.oneof_decl):
        part.ClearField("options")  # its rules are those of the message
    for found in raw.field:
        if found.name == left:
            found.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
            found.ClearField("type_name")
    pool = descriptor_pool.Default()  # where the messages are that are left as they are
    pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName(f"fmi_server.raw.{message.name}"))


_EMIT: Final = wire_pb2.EmitRequest.DESCRIPTOR
_EMIT_STREAM: Final = wire_pb2.EmitStreamRequest.DESCRIPTOR
_VALIDATE: Final = registry_service_pb2.ValidatePacketRequest.DESCRIPTOR

# What they return has the attributes of the protocols above; the descriptors make it so, at run time.
_emit: Any = _unparsed(_EMIT, "packet")
_emit_stream: Any = _unparsed(_EMIT_STREAM, "packets")
_validate: Any = _unparsed(_VALIDATE, "packet")


def read_emit(data: bytes) -> RawEmitRequest:
    """Read the request of Emit; `DecodeError` where it is none."""
    request: RawEmitRequest = _emit.FromString(data)
    return request


def read_emit_stream(data: bytes) -> RawEmitStreamRequest:
    """Read a request of EmitStream; `DecodeError` where it is none."""
    request: RawEmitStreamRequest = _emit_stream.FromString(data)
    return request


def read_validate_packet(data: bytes) -> RawValidatePacketRequest:
    """Read the request of ValidatePacket; `DecodeError` where it is none."""
    request: RawValidatePacketRequest = _validate.FromString(data)
    return request


_RAW: Final[Mapping[str, _Reader]] = {
    "fmi.v1.InterchangeService.Emit": read_emit,
    "fmi.v1.InterchangeService.EmitStream": read_emit_stream,
    "fmi.v1.RegistryService.ValidatePacket": read_validate_packet,
}


def reader_of(method: MethodDescriptor, *, max_bytes: int | None = None) -> _Reader:
    """Return what makes a method's request of bytes.

    It raises `RequestInvalidError` where the request is larger than any can be, or a list in it is longer
    than the contract allows, and `DecodeError` where it is not the message of the method.

    Args:
        method: The method.
        max_bytes: The largest request; where it is not given, what the method can need.
    """
    raw = _RAW.get(method.full_name)
    if raw is not None:
        return raw
    largest = LARGER.get(method.full_name, SMALL_BYTES) if max_bytes is None else max_bytes
    parse: _Reader = GetMessageClass(method.input_type).FromString
    wanted = method.input_type

    def read(data: bytes) -> Any:
        if largest is not None and len(data) > largest:
            told = f"has {len(data)} bytes, and no request of this method needs more than {largest}"
            raise RequestInvalidError([Violation("request", "fmi.request.too_large", told)])
        if len(data) > SMALL_BYTES:
            _Count(data).message(wanted, 0, len(data))
        return parse(data)

    return read


class _Count:
    """Counts what is in a message on the wire, and refuses it where that is too much.

    Args:
        data: The message.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._fields = 0
        self._items: Counter[str] = Counter()

    def message(self, kind: Descriptor, place: int, end: int, path: str = "") -> None:
        """Count the items of the lists in a message, and in the messages within it.

        Raises:
            RequestInvalidError: A list is longer than the contract allows, or there are too many fields.
            DecodeError: It is no message.
        """
        known = _known(kind)
        for number, start, stop in _fields(self._data, place, end):
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise _too_many("request", f"has more than {MAX_FIELDS} fields")
            field = known.get(number)
            if field is None:
                continue
            where = f"{path}.{field.name}" if path else field.name
            if field.most is not None:
                self._items[where] += 1
                if self._items[where] > field.most:
                    raise _too_many(where, f"has more than {field.most} items")
            if field.inside is not None:
                # A message that comes twice is one, with the items of both; an item is one of its own.
                inside = where if field.most is None else f"{where}[{self._items[where] - 1}]"
                self.message(field.inside, start, stop, inside)


class _Field:
    """A field that is a message or a list.

    Attributes:
        name: Its name.
        most: The items that the contract allows; None for any number.
        inside: What its messages are; None where it has none, or none with anything to count.
    """

    __slots__ = ("inside", "most", "name")

    def __init__(self, found: FieldDescriptor) -> None:
        rules = found.GetOptions().Extensions[validate_pb2.field]
        self.name = found.name
        self.most: int | None = None
        if rules.repeated.HasField("max_items"):
            self.most = rules.repeated.max_items
        elif rules.map.HasField("max_pairs"):
            self.most = rules.map.max_pairs
        kind = found.message_type
        self.inside = kind if kind is not None and _known(kind) else None


@cache
def _known(kind: Descriptor) -> Mapping[int, _Field]:
    """Return the fields of a message that have something to count, by number."""
    made = {found.number: _Field(found) for found in kind.fields}
    return {
        number: field for number, field in made.items() if field.most is not None or field.inside
    }


def _fields(data: bytes, place: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Give the number of each field of a message, and where its value begins and ends.

    Raises:
        DecodeError: It is no message, or one with groups, which the contract does not have.
    """
    while place < end:
        tag, place = _varint(data, place, end)
        start = place
        match tag & 7:
            case 0:
                _, place = _varint(data, place, end)
            case 1:
                place += 8
            case 2:
                size, start = _varint(data, place, end)
                place = start + size
            case 5:
                place += 4
            case _:
                raise DecodeError
        if place > end:
            raise DecodeError
        yield tag >> 3, start, place


def _varint(data: bytes, place: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while place < end and shift < 70:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise DecodeError


def _too_many(where: str, told: str) -> RequestInvalidError:
    return RequestInvalidError([Violation(where, "fmi.request.too_many", told)])
