"""Packets from files and from the command line."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import IO, Any, Final

import click

from fmi.plain_values import quoted
from fmi.v1 import error_pb2, packet_pb2
from fmi_client.emitter import HeaderDefaults
from fmi_client.errors import ContractError, Violation

__all__ = ["Entry", "Origin", "numbers", "params", "read_packets", "standard_input"]

_MAX_DIGITS: Final = 400
_REASON: Final = error_pb2.ErrorReason.Name(error_pb2.ERROR_REASON_CONTRACT_VIOLATION).removeprefix(
    "ERROR_REASON_"
)


def _whole_number(digits: str) -> int:
    """Read a whole number; of one that Python finds too long the beginning, too large for any field too."""
    return int(digits[:_MAX_DIGITS])


class _Repeated(dict[str, Any]):
    """An object of JSON in which a name stands twice. Python keeps the last value without a word."""

    def __init__(self, pairs: Iterable[tuple[str, Any]], name: str) -> None:
        super().__init__(pairs)
        self.name = name


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    return _Repeated(pairs, _first_repeated(name for name, _ in pairs))


def _first_repeated(names: Iterable[str]) -> str:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    raise ValueError("no name is repeated")


def _repeated_name(value: object) -> str | None:
    """Return a name that stands twice in one object somewhere in a value; None where there is none."""
    left = [value]
    while left:
        found = left.pop()
        if isinstance(found, _Repeated):
            return found.name
        if isinstance(found, dict):
            left.extend(found.values())
        elif isinstance(found, list):
            left.extend(found)
    return None


_DECODER: Final = json.JSONDecoder(parse_int=_whole_number, object_pairs_hook=_object)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a packet was read.

    Attributes:
        file: The file's name; `-` for standard input.
        line: The line on which its JSON document begins, from 1; None where that says nothing: for what
            concerns the whole file, and for the items of the list that a file begins with.
        item: Its number in a JSON list, from 1; None outside of one.
    """

    file: str
    line: int | None = None
    item: int | None = None

    def __str__(self) -> str:
        place = "standard input" if self.file == "-" else self.file
        if self.line is not None:
            place += f":{self.line}"
        return place if self.item is None else f"{place} item {self.item}"

    def data(self) -> dict[str, str | int]:
        """Return it for programs: `file`, and of `line` and `item` those that there are."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Entry:
    """A packet to send or to check, or what stands in its place.

    Attributes:
        packet: The packet; or why there is none.
        own_id: The id that it came with; empty where it had none, whatever was filled in.
        origin: Where it was read; None for a packet made from options.
    """

    packet: packet_pb2.Packet | ContractError
    own_id: str = ""
    origin: Origin | None = None

    @property
    def subject(self) -> str:
        """What to call it in an error: its place and its own id, as far as there are any."""
        place = str(self.origin) if self.origin is not None else ""
        return f"{place} (packet {self.own_id})" if place and self.own_id else place

    def data(self) -> dict[str, str | int]:
        """Return where it was read for programs; nothing for a packet made from options."""
        return self.origin.data() if self.origin is not None else {}


def read_packets(stream: IO[str], defaults: HeaderDefaults) -> Iterator[Entry]:
    """Read packets from a JSON document, a JSON array, or JSON documents one after the other.

    Lines that are whole documents are read one by one, so that a pipe can go on for ever; from a document
    on that has several lines, all is read to its end first.

    Args:
        stream: Where they come from.
        defaults: What a packet gets where it does not say it itself.

    Yields:
        Packets in order; in the place of what is no packet the error that says why. Behind a line that is
        not JSON the next one is read; a list or a document of several lines that is not JSON ends the
        reading, since nothing behind it can be trusted.

    Raises:
        ContractError: There is no packet, and nothing in the place of one.
    """
    name = getattr(stream, "name", "<stdin>")
    file = "-" if name == "<stdin>" else name
    found = False
    try:
        for origin, value in _values(stream, file):
            found = True
            yield _entry(origin, value, defaults)
    except json.JSONDecodeError as error:
        yield _not_json(file, error)
    except UnicodeDecodeError as error:
        yield _unreadable(Origin(file), "not UTF-8 text", f"byte {error.start}", error.reason)
    except RecursionError:
        yield _unreadable(Origin(file), "not packets", "packet", "is nested too deep")
    else:
        if not found:
            raise ContractError(f"no packets in {Origin(file)}")


def standard_input(otherwise: str) -> IO[str]:
    """Return standard input where something is piped into it.

    Args:
        otherwise: What to tell a person whose command line names nothing to read.

    Raises:
        click.UsageError: Standard input is a terminal.
    """
    if sys.stdin.isatty():
        raise click.UsageError(otherwise)
    return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig")


def _entry(origin: Origin, value: Any, defaults: HeaderDefaults) -> Entry:
    if isinstance(value, json.JSONDecodeError):
        return _not_json(origin.file, value)
    if not isinstance(value, Mapping):
        return _unreadable(origin, "no packet", "packet", "is not a JSON object")
    if (name := _repeated_name(value)) is not None:
        told = "stands twice in one object; leave one of them out"
        return _unreadable(origin, "no packet", quoted(name), told)
    try:
        return Entry(defaults.packet(value), _own_id(value), origin)
    except ContractError as error:
        return Entry(error, _own_id(value), origin)


def _own_id(value: Mapping[str, Any]) -> str:
    header = value.get("header")
    for fields in (value, header if isinstance(header, Mapping) else {}):
        for name in ("packet_id", "packetId"):
            if isinstance(fields.get(name), str) and fields[name]:
                return str(fields[name])
    return ""


def _values(stream: IO[str], file: str) -> Iterator[tuple[Origin, Any]]:
    """Read values with their places; in the place of a line that is not JSON stands the error."""
    line, is_first = 1, True
    for content in iter(stream.readline, ""):
        text, end = content, 0
        while (start := _end_of_space(text, end)) < len(text):
            line += text.count("\n", end, start)
            value: Any
            try:
                value, end = _DECODER.raw_decode(text, start)
            except json.JSONDecodeError:
                text += _more(text, start, stream)
                value, end = _decoded(text, start, is_first=is_first)
            if isinstance(value, json.JSONDecodeError):
                value.lineno = line + text.count("\n", start, value.pos)
                if not end:
                    raise value from None
            yield from _items(value, Origin(file, line), is_first=is_first)
            line += text.count("\n", start, end)
            is_first = False
        line += text.count("\n", end)


def _more(text: str, start: int, stream: IO[str]) -> str:
    """Read what a document needs that does not end on its line: all, or a line that shows it is cut off."""
    try:
        _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        if error.pos < len(text):
            return ""
    following = stream.readline()
    try:
        _, end = _DECODER.raw_decode(following)
    except json.JSONDecodeError:
        return following + stream.read()
    cut_off = text[start] == "{" and following.startswith("{") and not following[end:].strip()
    return following if cut_off else following + stream.read()


def _decoded(text: str, start: int, *, is_first: bool) -> tuple[Any, int]:
    """Return a value and where it ends, or the error and where to go on: nowhere is 0."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        end = text.find("\n", start) + 1 or len(text)
        is_list = text[start] == "["
        following = _end_of_space(text, end)
        own_line = error.pos < end or following == len(text)
        cut_off = text.startswith("\n{", following - 1) and not is_list
        if (is_first and is_list) or not (own_line or cut_off):
            return error, 0
        place = min(error.pos, len(text[:end].rstrip()))
        return json.JSONDecodeError(error.msg, text, place), end


def _end_of_space(content: str, start: int) -> int:
    while start < len(content) and content[start].isspace():
        start += 1
    return start


def _items(value: Any, origin: Origin, *, is_first: bool = False) -> Iterable[tuple[Origin, Any]]:
    if not isinstance(value, list):
        return ((origin, value),)
    line = None if is_first else origin.line
    return ((Origin(origin.file, line, item), found) for item, found in enumerate(value, start=1))


def _not_json(file: str, error: json.JSONDecodeError) -> Entry:
    place = f"line {error.lineno}, column {error.colno}"
    return _unreadable(Origin(file, error.lineno), "not JSON", place, error.msg)


def _unreadable(origin: Origin, message: str, field: str, description: str) -> Entry:
    violation = Violation(field, "fmi.plain.json", description)
    return Entry(ContractError(message, reason=_REASON, violations=[violation]), origin=origin)


def numbers(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> dict[str, float]:
    """Read the `NAME=NUMBER`s of an option that may be repeated; a callback for click."""
    return {name: _number(told, ctx, param) for name, told in _pairs(values, ctx, param, "tau=0.9")}


def params(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> dict[str, str | float | bool]:
    """Read the `NAME=VALUE`s of an option that may be repeated: numbers, `true`, `false`, or text."""
    return {name: _param(told) for name, told in _pairs(values, ctx, param, "kernel=rbf")}


def _pairs(
    values: tuple[str, ...], ctx: click.Context, param: click.Parameter, example: str
) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for value in values:
        name, equals, told = value.partition("=")
        if not (name and equals):
            raise click.BadParameter(f"{value!r} is not like {example}", ctx, param)
        if name in seen:
            raise click.BadParameter(f"{name!r} is given twice", ctx, param)
        seen.add(name)
        yield name, told


def _number(told: str, ctx: click.Context, param: click.Parameter) -> float:
    try:
        return float(told)
    except ValueError:
        raise click.BadParameter(f"{told!r} is not a number", ctx, param) from None


def _param(told: str) -> str | float | bool:
    if told in ("true", "false"):
        return told == "true"
    try:
        return float(told)
    except ValueError:
        return told
