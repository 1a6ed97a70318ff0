"""`fmi emit`: send packets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, TypeVar

import click

from fmi.plain import DEFAULT_COHORT, packet_to_plain
from fmi.v1 import packet_pb2
from fmi_client import FMIClient
from fmi_client.commands.exits import ExitCode, exit_code
from fmi_client.commands.options import Argument, DefaultGroup, Settings, shared_options
from fmi_client.commands.output import (
    error_data,
    print_json,
    print_text,
    safe,
    show_error,
    show_note,
    text,
    violations_table,
)
from fmi_client.commands.packets import Entry, numbers, params, read_packets, standard_input
from fmi_client.commands.session import open_client
from fmi_client.emitter import HeaderDefaults
from fmi_client.errors import CohortUnknownError, PacketRefusedError
from fmi_client.receipts import EmitStatus, Receipt

__all__ = ["command"]

F = TypeVar("F", bound=Callable[..., Any])

_BATCH: Final = 250
_CHOICES: Final = "a FILE, - (standard input), msp, pop or ccs"
_BY_SEVERITY: Final = (
    ExitCode.OK,
    ExitCode.UNREACHABLE,
    ExitCode.SERVER,
    ExitCode.NOT_FOUND,
    ExitCode.REFUSED,
)
"""What repeating heals, what a cohort heals, and what only another packet heals: the last one counts."""

_STYLES: Final = {
    EmitStatus.ACCEPTED: "green",
    EmitStatus.DUPLICATE: "green",
    EmitStatus.QUARANTINED: "yellow",
    EmitStatus.REFUSED: "bold red",
}


class _EmitGroup(DefaultGroup):
    default_command = "file"


@click.group(name="emit", cls=_EmitGroup, subcommand_metavar="[FILE | - | msp | pop | ccs] ...")
@shared_options
def command(_settings: Settings) -> None:
    """Send packets from a FILE, from standard input (-), or made from options.

    A FILE holds one packet as JSON, an array of packets, or one packet per line, in the plain form
    {"type": "msp", "domain_id": ..., "controller": {"tau": 0.9}} or as ProtoJSON. Where a packet does
    not say them, its id, its time and the contract's revision are filled in; so a file without packet
    ids is new packets each time it is sent.

    \b
      fmi emit msp --domain site_001 --cohort healthcare \\
          --controller tau=0.9 --metric gain_p50=0.15
      fmi emit pop --domain site_001 --set tau=0.8 \\
          --before loss=0.40 --after loss=0.35 --windows 12
      fmi emit ccs --domain site_001 --pair dose,outcome,0.4

    Exit codes: 0 every packet is durable, 1 one was refused or there was none, 3 the server cannot be
    reached, 4 nothing but an unknown cohort was the reason, 5 the server cannot take them now. With
    --json, one line per packet.
    """  # noqa: D301 - click wants the character


def _header_options(function: F) -> F:
    options = (
        click.option(
            "--domain",
            "domain_id",
            envvar="FMI_DOMAIN_ID",
            metavar="ID",
            help="The site that emits. [env: FMI_DOMAIN_ID]",
        ),
        click.option("--cohort", metavar="COHORT", help="The cohort. [default: default]"),
        click.option("--profile-class", metavar="CLASS", help="The class of learner or site."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def _body_options(function: F) -> F:
    options = (
        click.option("--regime", metavar="TAG", help="The regime that the site works in."),
        click.option("--samples", type=click.IntRange(min=0), help="Rows or events behind it."),
        click.option("--software", metavar="TEXT", help="Software and version of the site."),
        click.option("--print", "print_only", is_flag=True, help="Print the packet; send nothing."),
    )
    for option in reversed(options):
        function = option(function)
    return _header_options(function)


def _numbers(*names: str, text: str) -> Callable[[F], F]:
    return click.option(*names, callback=numbers, multiple=True, metavar="NAME=NUMBER", help=text)


_confidence = click.option(
    "--confidence", type=click.FloatRange(0, 1), help="How sure the site is. [default: 1]"
)


class _PacketFile(click.File):
    """A file that is there; a word that is no file may have been meant as a type of packet."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> IO[Any]:
        if value != "-" and isinstance(value, str) and not Path(value).exists():
            raise click.UsageError(
                f"{value!r} is neither a file nor a type of packet; say what to send: {_CHOICES}.",
                ctx and ctx.parent,
            )
        return super().convert(value, param, ctx)


@command.command("file")
@click.argument(
    "file",
    cls=Argument,
    required=False,
    type=_PacketFile(encoding="utf-8-sig", lazy=False),
    help="Packets as JSON; - is standard input.",
)
@_header_options
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=_BATCH,
    show_default=True,
    help="Packets sent together. With 1, each line of a pipe goes out at once.",
)
@shared_options
def _file(settings: Settings, /, file: IO[str] | None, batch: int, **header: str | None) -> int:
    """Send packets from a FILE or from standard input (the word `file` may be left out)."""
    stream = file or standard_input(f"Say what to send: {_CHOICES}.")
    return _send(settings, read_packets(stream, _defaults(header)), batch)


@command.command("msp")
@_body_options
@_numbers("--metric", text="A performance metric; may be repeated, as the next three.")
@_numbers("--controller", text="A parameter of the controller.")
@_numbers("--evaluator", text="A parameter of the evaluator.")
@_numbers("--operator", text="A state of an operator.")
@_confidence
@click.option("--window", nargs=2, type=click.IntRange(min=0), metavar="FIRST LAST")
@shared_options
def _msp(settings: Settings, /, **options: Any) -> int:
    """Send a Meta Signal Pack: the state of a site's learner."""
    body: dict[str, Any] = {
        "metrics": options["metric"],
        "controller": options["controller"],
        "evaluator": options["evaluator"],
        "operators": options["operator"],
        "window_span": options["window"],
    }
    if options["confidence"] is not None:
        body["evidence"] = {"confidence": options["confidence"]}
    return _send_made(settings, "msp", body, options)


@command.command("pop")
@_body_options
@click.option(
    "--set",
    "bundle",
    callback=params,
    multiple=True,
    metavar="NAME=VALUE",
    help="A parameter that the policy set: a number, true, false or text; may be repeated.",
)
@_numbers("--before", text="A metric before the change.")
@_numbers("--after", text="The metric after the change.")
@_numbers("--control-delta", text="What the metric did where nothing was changed.")
@click.option(
    "--windows", type=click.IntRange(min=1), default=1, show_default=True, help="Windows observed."
)
@_confidence
@shared_options
def _pop(settings: Settings, /, **options: Any) -> int:
    """Send a Policy Outcome Pack: what a policy change did."""
    body = {
        "bundle": options["bundle"],
        "before": options["before"],
        "after": options["after"],
        "control_delta": options["control_delta"],
        "windows": options["windows"],
        "confidence": options["confidence"],
    }
    return _send_made(settings, "pop", body, options)


@command.command("ccs")
@_body_options
@click.option(
    "--pair",
    "pairs",
    multiple=True,
    metavar="SOURCE,TARGET,WEIGHT[,TYPE[,STDERR]]",
    help="A relation that was found; may be repeated.",
)
@_numbers("--concept", text="A concept at work and its score.")
@click.option("--tested", multiple=True, metavar="NAME", help="A variable that was looked at.")
@click.option("--stability-delta", type=float, help="Change of stability.")
@click.option("--trust", type=click.FloatRange(0, 1), help="The site's trust in it. [default: 1]")
@shared_options
def _ccs(settings: Settings, /, **options: Any) -> int:
    """Send a Concept Causal Summary: which causes a site found."""
    body = {
        "causal_pairs": [[part.strip() for part in pair.split(",")] for pair in options["pairs"]],
        "concepts": [{"id": name, "score": score} for name, score in options["concept"].items()],
        "tested_nodes": list(options["tested"]),
        **_without_none({"stability_delta": options["stability_delta"], "trust": options["trust"]}),
    }
    return _send_made(settings, "ccs", body, options)


def _send_made(settings: Settings, kind: str, body: dict[str, Any], options: dict[str, Any]) -> int:
    provenance = {
        "regime_tag": options["regime"],
        "n_samples": options["samples"],
        "software": options["software"],
    }
    header = {"provenance": _without_none(provenance)} if any(provenance.values()) else {}
    packet = _defaults(options).packet({"header": header, kind: body})
    if options["print_only"]:
        print_json(packet_to_plain(packet))
        return ExitCode.OK
    return _send(settings, [Entry(packet)], 1)


def _send(settings: Settings, entries: Iterable[Entry], batch: int) -> int:
    """Send packets in batches and tell of each; return the exit code."""
    tally: dict[EmitStatus, int] = {}
    worst = ExitCode.OK
    with open_client(settings) as client:
        for group in _batches(entries, batch):
            for entry, receipt in zip(group, _receipts(client, group), strict=True):
                tally[receipt.status] = tally.get(receipt.status, 0) + 1
                worst = max(worst, _tell(settings, entry, receipt), key=_BY_SEVERITY.index)
    if not settings.json and sum(tally.values()) > 1:
        show_note(", ".join(f"{count} {status}" for status, count in sorted(tally.items())))
    return worst


def _receipts(client: FMIClient, group: Sequence[Entry]) -> Iterator[Receipt]:
    """Send what are packets; return a receipt for each entry, in their order."""
    good = [entry.packet for entry in group if isinstance(entry.packet, packet_pb2.Packet)]
    if len(good) == 1:
        sent = iter([_emit_one(client.emit, good[0])])
    else:
        sent = iter(client.emit_many(good) if good else [])
    for entry in group:
        if isinstance(entry.packet, packet_pb2.Packet):
            yield next(sent)
        else:
            yield Receipt(entry.own_id, EmitStatus.REFUSED, error=entry.packet)


def _emit_one(emit: Callable[[packet_pb2.Packet], Receipt], packet: packet_pb2.Packet) -> Receipt:
    """Emit one packet; a refusal of it is a receipt, every other failure is raised."""
    try:
        return emit(packet)
    except (PacketRefusedError, CohortUnknownError) as error:
        return Receipt(packet.header.packet_id, EmitStatus.REFUSED, error=error)


def _batches(entries: Iterable[Entry], size: int) -> Iterator[list[Entry]]:
    rest = iter(entries)
    while group := list(itertools.islice(rest, size)):
        yield group


def _tell(settings: Settings, entry: Entry, receipt: Receipt) -> ExitCode:
    error = receipt.error
    code = ExitCode.OK
    if receipt.refused:
        code = exit_code(error) if error else ExitCode.REFUSED
        code = code if code in _BY_SEVERITY else ExitCode.REFUSED
    if settings.json:
        print_json(_data(entry, receipt), line=True)
    elif receipt.refused and error is not None:
        show_error(error, settings, subject=entry.subject)
    else:
        _show_receipt(entry, receipt)
    return code


def _show_receipt(entry: Entry, receipt: Receipt) -> None:
    line = text(f"{receipt.status:<11}", _STYLES[receipt.status])
    line.append(f" {safe(receipt.packet_id)}", style="default")
    if cohort := _cohort(entry):
        line.append(f"  cohort {safe(cohort)}", style="dim")
    print_text(line)
    for warning in receipt.warnings:
        print_text(text(f"  warning: {warning}", "yellow"))
    if receipt.error is not None:
        print_text(text(f"  {receipt.error.message}", "yellow"))
        if receipt.error.violations:
            print_text(violations_table(receipt.error.violations), indent=2)


def _cohort(entry: Entry) -> str:
    return entry.packet.header.cohort if isinstance(entry.packet, packet_pb2.Packet) else ""


def _data(entry: Entry, receipt: Receipt) -> dict[str, Any]:
    return {
        # An id that was made up here says nothing where nothing is stored under it.
        "packet_id": entry.own_id if receipt.refused else receipt.packet_id,
        **entry.data(),
        "cohort": _cohort(entry),
        "status": receipt.status.value,
        "warnings": list(receipt.warnings),
        "error": error_data(receipt.error) if receipt.error else None,
    }


def _defaults(options: Mapping[str, Any]) -> HeaderDefaults:
    return HeaderDefaults(
        domain_id=options["domain_id"],
        cohort=options["cohort"] or DEFAULT_COHORT,
        profile_class=options["profile_class"] or "",
    )


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
