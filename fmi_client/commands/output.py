"""How commands speak: tables and lines for people, JSON for programs.

Names come from other sites, so nothing that can move a cursor, change a colour or turn the direction of
text reaches the terminal, and nothing is read as markup.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import click
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fmi_client._causes import last_cause
from fmi_client.commands.exits import ExitCode, exit_code
from fmi_client.commands.options import Settings
from fmi_client.errors import (
    CohortUnknownError,
    ConnectionFailedError,
    FMIError,
    ServerInternalError,
    TemporaryError,
    Violation,
)

__all__ = [
    "age",
    "error_data",
    "hint",
    "interval",
    "message_data",
    "moment",
    "number",
    "plain_items",
    "print_json",
    "print_text",
    "safe",
    "share",
    "show_error",
    "show_note",
    "table",
    "text",
    "violations_table",
    "write_file",
]

_UNSAFE: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories that are not shown as they are: controls, direction marks, surrogates, unassigned."""


def safe(value: object) -> str:
    r"""Return text in which every character is a visible one; others are written as escapes, `\x1b`."""
    return "".join(
        char.encode("unicode_escape").decode("ascii")
        if unicodedata.category(char) in _UNSAFE
        else char
        for char in str(value)
    )


def text(value: object, style: str = "") -> Text:
    """Return safe text in a style."""
    return Text(safe(value), style=style, overflow="fold")


def number(value: float) -> str:
    """Write a number with 4 significant digits, 6 from 10,000 on."""
    return format(value, ".6g" if math.isfinite(value) and abs(value) >= 1e4 else ".4g")


def share(value: float) -> str:
    """Write a number in 0..1 with two decimals."""
    return format(value, ".2f")


def interval(message: Message) -> str:
    """Write the `lower` and `upper` of a message; empty where they are unset."""
    if not (message.HasField("lower") and message.HasField("upper")):
        return ""
    return f"{number(getattr(message, 'lower'))} .. {number(getattr(message, 'upper'))}"  # noqa: B009


def moment(stamp: Timestamp) -> str:
    """Write a time in UTC, to the second; `-` where it is unset."""
    if not stamp.seconds and not stamp.nanos:
        return "-"
    try:
        return stamp.ToDatetime(tzinfo=dt.UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    except (ValueError, OverflowError):
        return f"{stamp.seconds} s"


def age(stamp: Timestamp, now_s: float) -> str:
    """Write how long ago a time was, in its largest unit; `-` where it is unset."""
    if not stamp.seconds and not stamp.nanos:
        return "-"
    seconds = max(0.0, now_s - stamp.seconds - stamp.nanos / 1e9)
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{int(seconds)} s ago"


def table(*columns: str, right: Iterable[str] = ()) -> Table:
    """Make a table that fits 80 columns: the first column gives way, numbers stay whole.

    Args:
        columns: The headings; the first is the name of the thing.
        right: Headings of the columns of numbers.
    """
    numeric = frozenset(right)
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for heading in columns:
        made.add_column(
            heading,
            justify="right" if heading in numeric else "left",
            no_wrap=heading in numeric,
            overflow="fold",
        )
    return made


def print_text(*parts: RenderableType, to_stderr: bool = False, indent: int = 0) -> None:
    """Print for people. Text is taken as it is: no markup, no emoji codes, no guessed highlights.

    Beyond a terminal, lines of text are not broken and no line ends in spaces, so that other programs
    can search them; tables keep to 80 columns (or to COLUMNS).

    Args:
        parts: Lines and tables.
        to_stderr: Whether they are not the answer itself.
        indent: Columns to the left that stay free.
    """
    console = Console(markup=False, emoji=False, highlight=False, stderr=to_stderr)
    if console.is_terminal:
        for part in parts:
            console.print(Padding(part, (0, 0, 0, indent), expand=False) if indent else part)
        return
    with console.capture() as captured:
        for part in parts:
            if isinstance(part, Text | str):
                console.print(Text(" " * indent).append(part), soft_wrap=True)
            else:
                console.print(Padding(part, (0, 0, 0, indent)) if indent else part)
    lines = captured.get().splitlines()
    click.echo("".join(f"{line.rstrip()}\n" for line in lines), nl=False, err=to_stderr)


def show_note(note: str) -> None:
    """Tell a person something that is not the answer; it goes to stderr."""
    print_text(text(note, "dim"), to_stderr=True)


def print_json(data: object, *, to_stderr: bool = False, line: bool = False) -> None:
    """Print one JSON document, on one line where it is one of several."""
    click.echo(
        json.dumps(data, allow_nan=False, indent=None if line else 2),
        err=to_stderr,
    )


def write_file(file: str, data: bytes) -> None:
    """Write what a command was asked for to a file, or to standard output for `-`.

    Raises:
        click.FileError: It cannot be written.
    """
    try:
        with click.open_file(file, "wb") as opened:
            opened.write(data)
    except BrokenPipeError:  # no fault of the file: its reader went away
        raise
    except OSError as error:
        raise click.FileError(file, error.strerror) from None


def message_data(message: Message) -> dict[str, Any]:
    """Return a message of the contract as ProtoJSON, under the contract's names.

    Whole numbers are numbers, which ProtoJSON reads and programs prefer to its quoted 64-bit numbers.
    Fields that have no presence are there even where they are empty.
    """
    data = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return _unquoted(data, message.DESCRIPTOR.fields)


def error_data(error: FMIError) -> dict[str, Any]:
    """Return an error for programs."""
    return {
        "reason": error.reason,
        "message": error.message,
        "retryable": error.retryable,
        "retry_after_s": error.retry_after_s,
        "request_id": error.request_id,
        "violations": [
            {"field": v.field, "rule_id": v.rule_id, "description": v.description}
            for v in error.violations
        ],
        "untold_violations": error.untold,
    }


def show_error(error: FMIError, settings: Settings, *, subject: str = "") -> ExitCode:
    """Tell of an error on stderr; return the exit code for it.

    Args:
        error: What went wrong.
        settings: Whether to tell a program or a person.
        subject: What it went wrong with, for a person who did more than one thing.
    """
    code = exit_code(error)
    if settings.json:
        print_json({"error": {**error_data(error), "exit_code": int(code)}}, to_stderr=True)
        return code
    message = error.message
    if error.violations:
        # The list says it better than a sentence that strings the same rules together.
        start = message.find(str(error.violations[0]))
        message = message[:start].rstrip(": ") if start > 0 else message
    if isinstance(error, ConnectionFailedError):
        message = f"cannot reach {settings.target}: {last_cause(message, settings.target)}"
    told = ": ".join(part for part in ("fmi", subject, error.reason, message) if part)
    print_text(text(told, "bold red"), to_stderr=True)
    if error.violations:
        print_text(violations_table(error.violations), to_stderr=True, indent=2)
    if error.untold:
        show_note(
            f"{error.untold} more did not fit into the answer; `fmi validate` lists up to 100."
        )
    for note in (*getattr(error, "__notes__", ()), hint(error)):
        if note:
            show_note(note)
    return code


def hint(error: FMIError) -> str:
    """Say what a person at the command line can do about an error; empty where its text says it."""
    match error:
        case ConnectionFailedError():
            return "`fmi doctor` with the same options finds out why."
        case TemporaryError() if error.retry_after_s is not None:
            return f"The server asks to wait {number(error.retry_after_s)} s."
        case ServerInternalError() if error.request_id:
            return f"The server's log has more under request id {error.request_id}."
        case CohortUnknownError():
            return (
                "`fmi cohorts` lists those that you may use; an operator can give access to others."
            )
        case _:
            return ""


def violations_table(violations: Sequence[Violation]) -> RenderableType:
    """List broken rules, one block each, so that long paths and texts stay readable."""
    listed = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    listed.add_column(overflow="fold", ratio=2)
    listed.add_column(overflow="fold", ratio=3)
    for violation in violations:
        told = text(violation.description)
        told.append(f" [{safe(violation.rule_id)}]", style="dim")
        listed.add_row(text(violation.field, "bold"), told)
    return listed


def _unquoted(data: dict[str, Any], fields: Iterable[Any]) -> dict[str, Any]:
    # Any, because the descriptors of the two implementations of protobuf have no common type.
    for field in fields:
        if field.name in data:
            data[field.name] = _unquoted_field(data[field.name], field)
    return data


def _unquoted_field(value: Any, field: FieldDescriptor) -> Any:
    kind = field.message_type
    if isinstance(value, list):
        return [_unquoted_value(item, field) for item in value]
    if kind is not None and kind.GetOptions().map_entry:
        entry = kind.fields_by_name["value"]
        return {key: _unquoted_value(item, entry) for key, item in value.items()}
    return _unquoted_value(value, field)


def _unquoted_value(value: Any, field: FieldDescriptor) -> Any:
    if field.message_type is not None:
        if isinstance(value, dict):  # a well-known type is text
            return _unquoted(value, field.message_type.fields)
        return value
    if field.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64):
        return int(value)
    return value


def plain_items(items: Mapping[str, object]) -> str:
    """Write names and values on one line."""
    return ", ".join(f"{safe(name)} {safe(value)}" for name, value in sorted(items.items()))
