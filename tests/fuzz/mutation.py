"""Mutation of messages: field by field, with the values that have always hurt.

Bytes that are changed at random are hardly ever a message any more, so a fuzzer that knows only bytes
does not get past the parser.
"""

from __future__ import annotations

import random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

__all__ = ["mutated", "mutated_bytes", "mutated_message"]

NAMES = (
    "free", "clinic", "strict", "private", "default", "tau", "gain", "a/b", "site-1", "fmi-epoch:7",
    "fmi-epoch:0", "0190b2c4-7e8a-7c3d-9f10-000000000001", "f" * 64, "trimmed_mean", "weighted_mean",
)  # fmt: skip
TEXTS = (
    *NAMES, "", " ", "a b", "\n", "\r\n", "\x1b[31m", "\0", "\u2028", "\u202e", "é", "\U0001f600", "*", "**",
    "a*b*c*d*e*f*g*h*i", "?" * 128, "x" * 128, "x" * 129, "x" * 3000, "%00", '"', "\\", "-1", "9" * 18,
    "9" * 19, "NaN", "../../etc/passwd", "٣", "fmi-epoch:٣", ":1", "fmi-epoch:" + "9" * 19, "other:1",
)  # fmt: skip
NUMBERS = (
    0.0, -0.0, 1.0, -1.0, 0.5, 0.25, 5e-324, -5e-324, 2.2e-308, 1e-300, 1e-9, 1e9, 1e150, -1e150,
    1.0000001e150, 1.7976931348623157e308, float("inf"), float("-inf"), float("nan"), 0.49999999999999994,
)  # fmt: skip
WHOLE = (
    0, 1, 2, 3, 7, 100, 999_999_999, 1_000_000_000, 2**31 - 1, 2**32 - 1, 253_402_300_799,
    253_402_300_800, 315_576_000_000, 1_700_000_000, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip
BLOBS = (b"", b"\0", b"\xff" * 20, b"\x28\xb5\x2f\xfd", b"\x37\xa4\x30\xec" + b"\1" * 40)

_BITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def mutated(data: bytes, kind: type[Message], rng: random.Random, most: int) -> bytes:
    """Change a serialised message: as a message, or where that is its lot or it is none, as bytes."""
    message = kind()
    try:
        message.MergeFromString(data)
    except DecodeError:
        return mutated_bytes(data, rng, most)
    if rng.random() < 0.1:
        return mutated_bytes(data, rng, most)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        mutated_message(message, rng)
    changed = message.SerializeToString()
    return changed if len(changed) <= most else mutated_bytes(data, rng, most)


def mutated_bytes(data: bytes, rng: random.Random, most: int) -> bytes:
    """Change bytes: one of them, a run that is doubled, moved or taken out, or a new one."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(changed) + 1)
        end = min(len(changed), place + rng.choice((1, 2, 4, 16, 64)))
        match rng.randrange(6):
            case 0 if place < len(changed):
                changed[place] ^= 1 << rng.randrange(8)
            case 1 if place < len(changed):
                changed[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                del changed[place:end]
            case 3:
                changed[place:place] = changed[place:end] * rng.choice((1, 2, 20))
            case 4:
                changed[place:place] = rng.randbytes(rng.choice((1, 2, 8)))
            case _:
                del changed[place:]
    return bytes(changed[:most])


def mutated_message(message: Message, rng: random.Random) -> None:
    """Change one field somewhere in a message."""
    while True:
        field = rng.choice(message.DESCRIPTOR.fields) if message.DESCRIPTOR.fields else None
        if field is None:
            return
        if rng.random() < 0.1:
            message.ClearField(field.name)
            return
        if _is_map(field):
            _change_map(message, field, rng)
            return
        if field.is_repeated:
            _change_list(message, field, rng)
            return
        if field.message_type is None:
            setattr(message, field.name, _value(field, rng))
            return
        inside = getattr(message, field.name)
        inside.SetInParent()
        message = inside


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _change_map(message: Message, field: FieldDescriptor, rng: random.Random) -> None:
    entries = getattr(message, field.name)
    key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
    present = list(entries)
    if present and rng.random() < 0.2:
        del entries[rng.choice(present)]
        return
    many = rng.choice((1, 1, 1, 1, 1, 1, 40))
    for number in range(many):
        known = present and many == 1 and rng.random() < 0.6
        name = rng.choice(present) if known else _value(key, rng)
        if many > 1 and isinstance(name, str):
            name = f"{name}{number}"
        if value.message_type is None:
            entries[name] = _value(value, rng)
        else:
            mutated_message(entries[name], rng)


def _change_list(message: Message, field: FieldDescriptor, rng: random.Random) -> None:
    items = getattr(message, field.name)
    if len(items) and rng.random() < 0.2:
        del items[rng.randrange(len(items))]
        return
    for _ in range(rng.choice((1, 1, 1, 1, 1, 1, 40))):
        if field.message_type is None:
            items.append(_value(field, rng))
        elif len(items) and rng.random() < 0.6:
            mutated_message(items[rng.randrange(len(items))], rng)
        else:
            items.add()
            if len(items) > 1 and rng.random() < 0.5:
                items[-1].CopyFrom(items[0])
            mutated_message(items[-1], rng)


def _value(field: FieldDescriptor, rng: random.Random) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return rng.choice(NUMBERS) if rng.random() < 0.8 else rng.uniform(-10, 10)
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return rng.choice(BLOBS)
        case FieldDescriptor.CPPTYPE_STRING:
            return rng.choice(NAMES if rng.random() < 0.5 else TEXTS)
        case FieldDescriptor.CPPTYPE_ENUM:
            return rng.choice((*range(6), 99, -1, 2**31 - 1))
        case kind:
            lowest, highest = _BITS[kind]
            value = rng.choice(WHOLE) if rng.random() < 0.8 else rng.randrange(1000)
            return min(max(value if rng.random() < 0.9 else -value, lowest), highest)
