"""Packets from files and from the command line."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, Final

import click

from fmi.v1 import error_pb2, packet_pb2
from fmi_client.emitter import HeaderDefaults
from fmi_client.errors import ContractError, Violation

__all__ = ["numbers", "params", "read_packets", "standard_input"]

_REASON: Final = error_pb2.ErrorReason.Name(error_pb2.ERROR_REASON_CONTRACT_VIOLATION).removeprefix(
    "ERROR_REASON_"
)
_DECODER: Final = json.JSONDecoder()


def read_packets(
    stream: IO[str], name: str, defaults: HeaderDefaults
) -> Iterator[packet_pb2.Packet | ContractError]:
    """Read packets from a JSON document, a JSON array, or JSON documents one after the other.

    Lines that are whole documents are read one by one, so that a pipe can go on for ever; anything else
    is read to its end first.

    Args:
        stream: Where they come from.
        name: What to call it in an error.
        defaults: What a packet gets where it does not say it itself.

    Yields:
        Packets in order; in the place of what is no packet the error that says why. Text that is not
        JSON ends the reading, since nothing behind it can be trusted.
    """
    try:
        for place, value in _values(stream):
            try:
                if isinstance(value, Mapping):
                    yield defaults.packet(value)
                else:
                    kind = type(value).__name__
                    yield _error(f"{name} has no packet", place, f"is a {kind}, not a JSON object")
            except ContractError as error:
                error.add_note(f"in {name}, {place}")
                yield error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        yield _error(f"{name} is not JSON", place, error.msg)
    except UnicodeDecodeError as error:
        yield _error(f"{name} is not UTF-8 text", f"byte {error.start}", error.reason)
    except RecursionError:
        yield _error(f"{name} is not packets", "packet", "is nested too deep")


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


def _values(stream: IO[str]) -> Iterator[tuple[str, Any]]:
    first = stream.readline()
    while first and not first.strip():
        first = stream.readline()
    try:
        value = json.loads(first)
    except json.JSONDecodeError:
        yield from _documents(first + stream.read())
        return
    yield from _items(value, "line 1")
    for line, content in enumerate(stream, start=2):
        if content.strip():
            try:
                value = json.loads(content)
            except json.JSONDecodeError as error:
                error.lineno += line - 1
                raise
            yield from _items(value, f"line {line}")


def _documents(content: str) -> Iterator[tuple[str, Any]]:
    start, count = 0, 0
    while True:
        start += len(content[start:]) - len(content[start:].lstrip())
        if start >= len(content):
            if count == 0:
                raise json.JSONDecodeError("there is nothing in it", content, start)
            return
        value, start = _DECODER.raw_decode(content, start)
        count += 1
        yield from _items(value, f"document {count}")


def _items(value: Any, place: str) -> Iterable[tuple[str, Any]]:
    if isinstance(value, list):
        return ((f"{place}, item {index}", item) for index, item in enumerate(value, start=1))
    return ((place, value),)


def _error(message: str, place: str, detail: str) -> ContractError:
    violation = Violation(place, "fmi.plain.json", detail)
    return ContractError(message, reason=_REASON, violations=[violation])


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
