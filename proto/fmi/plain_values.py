"""Plain values in, typed values out: what `fmi.plain` reads packets with.

A `ValueReader` never raises over a value. It notes a `Problem` and gives a neutral value instead, so
that whoever reads a packet can go on and tell all that is wrong with it at once.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, TypeGuard

from google.protobuf import json_format, timestamp_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from fmi.v1 import packet_pb2

__all__ = [
    "MAX_ENTRIES",
    "MAX_NESTING",
    "NameTwiceError",
    "PlainDataError",
    "Problem",
    "ValueReader",
    "fields_once",
    "is_numeric",
    "is_sequence",
    "name_of",
    "quoted",
    "shown",
]

MAX_NESTING: Final = 16
"""Plain dicts nested deeper than this are refused: names joined by dots would say nothing any more."""

MAX_ENTRIES: Final = 20_000
"""Entries read of one mapping or sequence, nested ones included: what refers to itself, or to one part many
times, is endless although it is small. The contract takes 4,096 of any at most."""

MAX_FIELD: Final = 320
MAX_DESCRIPTION: Final = 640
"""Characters told of a path and of what is wrong with it, both of which may hold what somebody else wrote."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that could not be translated: where, which rule, and what to do."""

    field: str
    rule_id: str
    description: str


class PlainDataError(ValueError):
    """Plain data is not a packet.

    Attributes:
        problems: Every field that could not be translated.
        packet: What could be: fields that could not are unset or, where the name counts too, 0. None
            where something else than a packet was translated.
    """

    def __init__(
        self, problems: Sequence[Problem], packet: packet_pb2.Packet | None = None
    ) -> None:
        self.problems = tuple(problems)
        self.packet = packet
        super().__init__("; ".join(f"{p.field}: {p.description}" for p in self.problems))


class ValueReader:
    """Reads plain values and collects what is wrong with them.

    Attributes:
        problems: What is wrong so far.
    """

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def raise_problems(self) -> None:
        """Raise what was noted, if anything.

        Raises:
            PlainDataError: There are problems; it has all of them.
        """
        if self.problems:
            raise PlainDataError(self.problems)

    def problem(self, field: str, rule: str, description: str) -> None:
        """Note that a field breaks a rule, in a line that is not endless, whatever is quoted in it."""
        field = _line(field, MAX_FIELD) or quoted("")
        description = _line(description, MAX_DESCRIPTION)
        self.problems.append(Problem(field, f"fmi.plain.{rule}", description))

    def collision(self, path: str) -> None:
        """Note that two names became one."""
        self.problem(path, "name_collision", "two nested names flatten to this one")

    def leaves(
        self, values: object, path: str, *, is_leaf: Callable[[object], bool] = lambda _: False
    ) -> Iterable[tuple[str, object]]:
        """Yield what nested mappings hold, under their names joined by dots.

        Args:
            values: The mapping.
            path: What to call it in a problem.
            is_leaf: Says which mappings are values themselves.
        """
        stack = [("", self.mapping(values, path), 0)]
        left = MAX_ENTRIES
        while stack:
            prefix, mapping, depth = stack.pop()
            entries: Iterable[tuple[object, object]] = mapping.items()
            for key, value in entries:
                left -= 1
                if left < 0:
                    self._too_many(path)
                    return
                if not isinstance(key, str):
                    where = f"{path}[{quoted(prefix + shown(key))}]"
                    self.problem(where, "name", f"a name must be text, not {shown(key)}")
                    continue
                name = f"{prefix}{self.text(key, path)}"
                if not isinstance(value, Mapping) or is_leaf(value):
                    yield name, value
                elif depth + 1 >= MAX_NESTING:
                    where = f"{path}[{quoted(name)}]"
                    self.problem(where, "nesting", f"is deeper than {MAX_NESTING}")
                else:
                    stack.append((f"{name}.", value, depth + 1))

    def mapping(self, value: object, path: str) -> Mapping[str, Any]:
        """Read a mapping; empty where it is None or none."""
        if isinstance(value, Mapping):
            return value
        if value is not None:
            self.problem(path, "mapping", f"must be a mapping, not {type(value).__name__}")
        return {}

    def items(self, value: object, path: str) -> Iterable[object]:
        """Read a sequence; empty where it is None or none. A text is no sequence here."""
        if is_sequence(value):
            read = list(islice(value, MAX_ENTRIES + 1))
            if len(read) > MAX_ENTRIES:
                self._too_many(path)
            return read[:MAX_ENTRIES]
        if value is not None:
            self.problem(path, "sequence", f"must be a sequence, not {type(value).__name__}")
        return ()

    def _too_many(self, path: str) -> None:
        self.problem(path, "too_many", f"has more than {MAX_ENTRIES} entries")

    def number(self, value: Any, path: str) -> float:
        """Read a number; 0 where it is none."""
        if is_numeric(value):
            with contextlib.suppress(ValueError, OverflowError):
                return float(value)  # text as in ProtoJSON: "NaN", "Infinity", "0.9"
        self.problem(path, "number", f"must be a number, not {shown(value)}")
        return 0.0

    def integer(self, value: Any, path: str, *, limit: int) -> int:
        """Read a whole number from 0 and below a limit; 0 where it is none."""
        # Text as in ProtoJSON, where 64-bit numbers are text.
        with contextlib.suppress(ValueError, OverflowError):
            number = -1
            if isinstance(value, bool):
                pass
            elif isinstance(value, str | numbers.Integral):
                number = int(value)
            elif isinstance(value, numbers.Real) and float(value).is_integer():
                number = int(float(value))
            if 0 <= number < limit:
                return number
        self.problem(path, "integer", f"must be a whole number from 0, not {shown(value)}")
        return 0

    def text(self, value: object, path: str) -> str:
        """Read a text; empty where it is none, or is not Unicode."""
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                self.problem(path, "text", "is not valid Unicode")
                return ""
            return value
        self.problem(path, "text", f"must be text, not {shown(value)}")
        return ""

    def timestamp(self, target: timestamp_pb2.Timestamp, value: Any, path: str) -> None:
        """Read a time into `target`: a datetime, RFC 3339 text or Unix seconds."""
        try:
            if isinstance(value, timestamp_pb2.Timestamp):
                target.CopyFrom(value)
            elif isinstance(value, dt.datetime):
                target.FromDatetime(value)
            elif isinstance(value, str):
                target.FromJsonString(value)
            elif is_numeric(value):
                target.FromNanoseconds(int(float(value) * 1e9))
            else:
                self._no_timestamp(value, path)
        except (ValueError, TypeError, OverflowError):
            self._no_timestamp(value, path)

    def _no_timestamp(self, value: object, path: str) -> None:
        self.problem(
            path,
            "timestamp",
            f"must be a datetime, RFC 3339 text or Unix seconds, not {shown(value)}",
        )

    def message(self, value: object, target: Message, path: str) -> None:
        """Read a small message that has no plain form of its own as ProtoJSON, field by field."""
        if isinstance(value, Message):
            if value.DESCRIPTOR is target.DESCRIPTOR:
                target.CopyFrom(value)
            else:
                self.problem(path, "message", f"must be a {target.DESCRIPTOR.name}")
            return
        if isinstance(value, Mapping):
            target.SetInParent()  # an empty one is there too
        fields = _fields_of(target)
        read: set[str] = set()
        for key, item in self.mapping(value, path).items():
            name = name_of(key)
            field = fields.get(name)
            if field is None:
                where = f"{path}.{name}" if name.isidentifier() else f"{path}[{shown(key)}]"
                told = f"is not a field of a {target.DESCRIPTOR.name}"
                self.problem(where, "unknown_field", told)
            elif field.name in read:
                self.problem(f"{path}.{field.name}", "name_collision", "is given twice")
            elif item is not None:  # null is unset, as in ProtoJSON
                self._field(item, field, target, f"{path}.{field.name}")
            if field is not None:
                read.add(field.name)

    def _field(self, item: object, field: FieldDescriptor, target: Message, path: str) -> None:
        if field.message_type is not None:
            self.message(item, getattr(target, field.name), path)
        elif field.is_repeated:
            for index, part in enumerate(self.items(item, path)):
                self._merge([part], part, field, target, f"{path}[{index}]")
        else:
            self._merge(item, item, field, target, path)

    def _merge(
        self, plain: object, leaf: object, field: FieldDescriptor, target: Message, path: str
    ) -> None:
        # ProtoJSON would write all of a container into its error: where parts are shared, gigabytes.
        if isinstance(leaf, _CONTAINERS):
            self.problem(path, "message", f"cannot be a {shown(leaf)}")
            return
        read = type(target)()
        try:
            json_format.ParseDict({field.name: plain}, read)
        except Exception as error:  # protobuf has many ways, SystemError among them, to say no
            said = (_said(error).splitlines() or ["is wrong"])[0][:200]
            self.problem(path, "message", said)
        else:
            target.MergeFrom(read)


_CONTAINERS: Final = (Mapping, list, tuple, set, frozenset)


def _fields_of(message: Message) -> dict[str, Any]:  # the stubs have two kinds of FieldDescriptor
    """Return the fields of a message by each of the names that they may be given by.

    Not the descriptor's own maps: they fail on what is no Unicode.
    """
    fields = message.DESCRIPTOR.fields
    return {name: field for field in fields for name in (field.json_name, field.name)}


def name_of(key: object) -> str:
    """Return the name that a key of plain data stands for, whatever it is."""
    if isinstance(key, str):
        return key
    try:
        return str(key)
    except Exception:  # a whole number of thousands of digits; another's code
        return type(key).__name__


def quoted(name: str) -> str:
    """Quote a name that a site chose: bounded, and without line breaks or control characters."""
    cut = name if len(name) <= 140 else name[:137] + "..."
    return '"' + cut.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'


class NameTwiceError(ValueError):
    """A name stands twice in one object of JSON, of which Python keeps the last value without a word.

    Attributes:
        name: The name.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"{quoted(name)} stands twice in one object; leave one of them out")
        self.name = name


def fields_once(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    """Make an object of JSON of its fields; it is for `object_pairs_hook` of `json.loads`.

    Raises:
        NameTwiceError: A name stands there twice.
    """
    fields: dict[str, object] = {}
    for name, value in pairs:
        if name in fields:
            raise NameTwiceError(name)
        fields[name] = value
    return fields


def shown(value: object) -> str:
    """Say a value and its type in few characters, whatever it is; of a container only its type."""
    kind = type(value).__name__
    if isinstance(value, _CONTAINERS):
        return kind
    # What a long text is cut to is cut before it is written, with all its escapes.
    text = _said(value[:60] if isinstance(value, str | bytes | bytearray) else value, repr)
    return f"{kind} {text if len(text) <= 40 else text[:37] + '...'}" if text else kind


def _said(value: object, say: Callable[[object], str] = str) -> str:
    """Write a value; empty where it cannot be: another's code, a whole number of thousands of digits."""
    try:
        return say(value)
    except Exception:
        return ""


_CONTROL: Final = re.compile(r"[^\x20-\x7e]")


def _line(text: str, longest: int) -> str:
    """Put a text on one line of a bounded length; what would not print is escaped."""
    cut = text if len(text) <= longest else f"{text[: longest - 3]}..."
    if cut.isprintable():
        return cut
    return _CONTROL.sub(lambda c: c[0] if c[0].isprintable() else ascii(c[0])[1:-1], cut)


def is_sequence(value: object) -> TypeGuard[Iterable[object]]:
    """Say whether a value may stand for a sequence. A text is none, although Python iterates over it."""
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def is_numeric(value: object) -> bool:
    """Say whether a value may stand for a number. A flag is none, although Python counts with it."""
    return isinstance(value, numbers.Real | str) and not isinstance(value, bool)
