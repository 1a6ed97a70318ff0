"""`fmi validate`: check packets and send nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import IO, Any

import click

from fmi.plain import DEFAULT_COHORT
from fmi.v1 import packet_pb2
from fmi_client import FMIClient
from fmi_client._contract import packet_violations
from fmi_client.commands.exits import ExitCode
from fmi_client.commands.options import FMICommand, Settings, shared_options
from fmi_client.commands.output import (
    error_data,
    print_json,
    print_text,
    safe,
    show_note,
    text,
    violations_table,
)
from fmi_client.commands.packets import read_packets, standard_input
from fmi_client.commands.session import open_client
from fmi_client.emitter import HeaderDefaults
from fmi_client.errors import ContractError, error_from_violations
from fmi_client.receipts import ValidationReport

__all__ = ["command"]


@click.command(name="validate", cls=FMICommand)
@click.argument("file", required=False, type=click.File(encoding="utf-8-sig", lazy=False))
@click.option(
    "--offline", is_flag=True, help="Only the contract's rules, here; no server is asked."
)
@click.option(
    "--domain",
    "domain_id",
    envvar="FMI_DOMAIN_ID",
    metavar="ID",
    help="The site, where a packet names none. [env: FMI_DOMAIN_ID]",
)
@click.option("--cohort", metavar="COHORT", help="The cohort, where a packet names none.")
@shared_options
def command(
    settings: Settings,
    file: IO[str] | None,
    offline: bool,
    domain_id: str | None,
    cohort: str | None,
) -> int:
    """Check the packets of a FILE or of standard input (-), and send nothing.

    The server checks them as if they were sent: the contract's rules, the cohort's, the policy's. With
    --offline only the contract's rules are checked, by this machine. What a packet may leave out is
    filled in, as by `fmi emit`.

    Exit codes: 0 all would count, 1 one would be refused or quarantined. With --json, one line per
    packet.
    """
    stream = file or standard_input("Say what to check: a FILE, or - for standard input.")
    defaults = HeaderDefaults(domain_id=domain_id, cohort=cohort or DEFAULT_COHORT)
    packets = read_packets(stream, getattr(stream, "name", "-"), defaults)
    checked = valid = 0
    with nullcontext() if offline else open_client(settings) as client:
        for packet_id, report in _reports(packets, client):
            checked += 1
            valid += report.valid
            _tell(settings, packet_id, report)
    if not settings.json and checked > 1:
        show_note(f"{valid} of {checked} packets are valid")
    return ExitCode.OK if valid == checked else ExitCode.REFUSED


def _reports(
    packets: Iterable[packet_pb2.Packet | ContractError], client: FMIClient | None
) -> Iterator[tuple[str, ValidationReport]]:
    for packet in packets:
        if isinstance(packet, ContractError):
            yield "", ValidationReport(valid=False, error=packet)
        elif client is not None:
            yield packet.header.packet_id, client.validate(packet)
        else:
            broken = packet_violations(packet)
            error = error_from_violations(broken, "packet") if broken else None
            yield packet.header.packet_id, ValidationReport(valid=not broken, error=error)


def _tell(settings: Settings, packet_id: str, report: ValidationReport) -> None:
    if settings.json:
        print_json(_data(packet_id, report), line=True)
        return
    verdict, style = "invalid", "bold red"
    if report.quarantined:
        verdict, style = "quarantine", "yellow"
    elif report.valid:
        verdict, style = "valid", "green"
    line = text(f"{verdict:<10}", style)
    line.append(f" {safe(packet_id)}", style="default")
    print_text(line)
    if report.violations:
        print_text(violations_table(report.violations), indent=2)
    elif report.error is not None:
        print_text(text(f"  {report.error.message}"))
    for note in getattr(report.error, "__notes__", ()):
        print_text(text(f"  {note}", "dim"))
    for warning in report.warnings:
        print_text(text(f"  warning: {warning}", "yellow"))


def _data(packet_id: str, report: ValidationReport) -> dict[str, Any]:
    return {
        "packet_id": packet_id,
        "valid": report.valid,
        "quarantined": report.quarantined,
        "warnings": list(report.warnings),
        "error": error_data(report.error) if report.error else None,
    }
