"""Cohort specs from plain data, as people write them in cohort files."""

from __future__ import annotations

import datetime as dt
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor

from fmi.plain import PlainDataError, Problem
from fmi.v1 import cohort_pb2

if TYPE_CHECKING:
    from google.protobuf.descriptor import EnumDescriptor
    from google.protobuf.message import Message

__all__ = ["cohort_spec_from_plain", "read_cohort_spec"]

MAX_SHOWN: Final = 60
"""Characters told of a name or a value that somebody else wrote."""


def cohort_spec_from_plain(data: Mapping[str, Any]) -> cohort_pb2.CohortSpec:
    """Translate a cohort spec from plain data: the JSON form of `CohortSpec`.

    Enum values may be written short (``section: controller``, ``direction: higher_is_better``), and
    durations as seconds (``min_interval: 1``) or as text (``"1.5s"``).

    Args:
        data: The spec.

    Returns:
        The spec; the contract's rules are not checked.

    Raises:
        PlainDataError: A field is unknown or cannot be translated; all of them are told.
    """
    spec, problems = read_cohort_spec(data)
    if problems:
        raise PlainDataError(problems)
    return spec


def read_cohort_spec(data: Mapping[str, Any]) -> tuple[cohort_pb2.CohortSpec, list[Problem]]:
    """Translate what can be translated, for those who go on to check the rest.

    Args:
        data: As for `cohort_spec_from_plain`.

    Returns:
        The spec without the fields that could not be translated, and what is wrong with each of them.
    """
    spec = cohort_pb2.CohortSpec()
    reader = _Reader()
    reader.message(data, spec, "")
    return spec, reader.problems


_EXPECTED: Final[Mapping[int | str, str]] = {
    FieldDescriptor.CPPTYPE_BOOL: "true or false",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_UINT32: "a whole number from 0 to 4294967295",
    FieldDescriptor.CPPTYPE_STRING: "text",
    "google.protobuf.Duration": 'a duration in seconds, for example 1.5 or "1.5s"',
    "google.protobuf.Timestamp": "a time as in 2030-01-31T00:00:00Z",
}
"""What a leaf takes, by the type of its field, or the name of its message where it is one."""

_CONTAINERS: Final = (Mapping, list, tuple, set, frozenset)
"""What is no leaf. ProtoJSON would write all of it into its error: with YAML's aliases, gigabytes."""


class _Reader:
    """Reads plain data field by field, so that all that is wrong with it is told at once."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def message(self, data: object, target: Message, path: str) -> None:
        if not isinstance(data, Mapping):
            self._problem(path, "mapping", f"must have fields by name, not be {_shown(data)}")
            return
        fields = _fields(target)
        read: set[str] = set()
        for key, value in data.items():
            name = _text(key)
            field = fields.get(name)
            step = _label(name) if field is None else field.name
            where = f"{path}.{step}" if path else step
            if field is None:
                self._problem(where, "unknown_field", _unknown(name, target))
            elif field.name in read:
                self._problem(where, "field_once", f"stands here twice, once as {field.json_name}")
            elif value is not None:  # null is unset, as in ProtoJSON
                self._field(value, field, target, where)
            if field is not None:
                read.add(field.name)

    def _field(self, value: object, field: FieldDescriptor, target: Message, path: str) -> None:
        if (values := _map_values(field)) is not None:
            self._map(value, field, values, target, path)
        elif field.is_repeated:
            self._list(value, field, target, path)
        elif _is_section(field):
            section = getattr(target, field.name)
            section.SetInParent()
            self.message(value, section, path)
        else:
            self._leaf(value, field, target, path)

    def _map(
        self,
        value: object,
        field: FieldDescriptor,
        values: FieldDescriptor,
        target: Message,
        path: str,
    ) -> None:
        if not isinstance(value, Mapping):
            self._problem(path, "mapping", f"must have values by name, not be {_shown(value)}")
            return
        read: set[str] = set()
        for key, item in value.items():
            name = _text(key)
            where = f'{path}["{_label(name)}"]'
            if name in read:
                self._problem(where, "field_once", "stands here twice, once not as text")
            elif isinstance(item, _CONTAINERS) or not _merged(target, field, {name: item}):
                self._wrong(item, values, where)
            read.add(name)

    def _list(self, value: object, field: FieldDescriptor, target: Message, path: str) -> None:
        if not isinstance(value, list | tuple):
            self._problem(path, "sequence", f"must be a list, not {_shown(value)}")
            return
        for index, item in enumerate(value):
            where = f"{path}[{index}]"
            if _is_section(field):
                self.message(item, getattr(target, field.name).add(), where)
            elif isinstance(item, _CONTAINERS) or not _merged(target, field, [item]):
                self._wrong(item, field, where)

    def _leaf(self, value: object, field: FieldDescriptor, target: Message, path: str) -> None:
        enum = field.enum_type
        if enum is None:
            plain = value if field.message_type is None else _moment(_duration(value))
            if isinstance(value, _CONTAINERS) or not _merged(target, field, plain):
                self._wrong(value, field, path)
        elif (number := _enum_number(value, enum)) is not None:
            setattr(target, field.name, number)
        else:
            allowed = ", ".join(_short_names(enum))
            self._problem(path, "enum", f"must be one of {allowed}, not {_shown(value)}")

    def _wrong(self, value: object, field: FieldDescriptor, path: str) -> None:
        message = field.message_type
        expected = _EXPECTED[field.cpp_type if message is None else message.full_name]
        self._problem(path, "value", f"must be {expected}, not {_shown(value)}")

    def _problem(self, path: str, rule: str, description: str) -> None:
        self.problems.append(Problem(path or "spec", f"fmi.plain.{rule}", description))


def _merged(target: Message, field: FieldDescriptor, plain: object) -> bool:
    """Read a value as ProtoJSON, in a message of its own, because that replaces lists and maps."""
    read = type(target)()
    try:
        json_format.ParseDict({field.name: plain}, read, max_recursion_depth=4)
    except Exception:  # protobuf has many ways, SystemError among them, to say no
        return False
    target.MergeFrom(read)
    return True


def _fields(target: Message) -> dict[str, Any]:  # the stubs have two kinds of FieldDescriptor
    fields = target.DESCRIPTOR.fields
    return {name: field for field in fields for name in (field.name, field.json_name)}


def _map_values(field: FieldDescriptor) -> FieldDescriptor | None:
    """Return the field of a map's values; None for a field that is no map."""
    entry = field.message_type
    if entry is None or not entry.GetOptions().map_entry:
        return None
    return entry.fields_by_name["value"]


def _is_section(field: FieldDescriptor) -> bool:
    message = field.message_type
    return message is not None and message.full_name not in _EXPECTED


def _duration(value: object) -> object:
    """Write plain seconds as the text that ProtoJSON wants."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return f"{value:.9f}s" if isinstance(value, float) else f"{_text(value)}s"


def _moment(value: object) -> object:
    """Write a time that YAML understood as the text that ProtoJSON wants; without a zone it is UTC."""
    if not isinstance(value, dt.date):
        return value
    if not isinstance(value, dt.datetime):
        value = dt.datetime.combine(value, dt.time())
    return (value if value.tzinfo else value.replace(tzinfo=dt.UTC)).isoformat()


def _prefix(enum: EnumDescriptor) -> str:
    return enum.values_by_number[0].name.removesuffix("UNSPECIFIED")


def _short_names(enum: EnumDescriptor) -> list[str]:
    """List what a file may say; that it says nothing is written by leaving the field out."""
    return [
        value.name.removeprefix(_prefix(enum)).lower() for value in enum.values if value.number != 0
    ]


def _enum_number(value: object, enum: EnumDescriptor) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value if value in enum.values_by_number else None
    if not isinstance(value, str):
        return None
    name = _prefix(enum) + value.upper() if value.islower() else value
    known = enum.values_by_name.get(name)
    return None if known is None else known.number


def _unknown(name: str, target: Message) -> str:
    names = [field.name for field in target.DESCRIPTOR.fields]
    if near := difflib.get_close_matches(name[:MAX_SHOWN].lower(), names, 3):
        return f"is no field; did you mean {' or '.join(near)}?"
    return f"is no field; the fields here are {', '.join(names)}"


def _label(name: str) -> str:
    """Write a name as a part of a path: bounded, and without line breaks or control characters."""
    shown = name if len(name) <= MAX_SHOWN else f"{name[: MAX_SHOWN - 3]}..."
    return shown.encode("unicode_escape").decode("ascii").replace('"', '\\"')


def _shown(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return f'"{_label(value)}"'
        case Mapping():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case _:
            return _label(_text(value))


def _text(value: object) -> str:
    try:
        return str(value)
    except ValueError:  # a whole number of thousands of digits
        return type(value).__name__
