"""`fmi validate`: check packets and send nothing."""

from __future__ import annotations

from contextlib import nullcontext
from typing import IO, Any

import click

from fmi.plain import DEFAULT_COHORT
from fmi.v1 import packet_pb2
from fmi_client import FMIClient
from fmi_client._contract import packet_violations
from fmi_client._translation import error_from_violations
from fmi_client.commands.exits import ExitCode
from fmi_client.commands.options import Argument, FMICommand, Settings, shared_options
from fmi_client.commands.output import (
    error_data,
    hint,
    print_json,
    print_text,
    safe,
    show_note,
    text,
    violations_table,
)
from fmi_client.commands.packets import Entry, read_packets, standard_input
from fmi_client.commands.session import open_client
from fmi_client.emitter import HeaderDefaults
from fmi_client.errors import ContractError
from fmi_client.receipts import ValidationReport

__all__ = ["command"]


@click.command(name="validate", cls=FMICommand)
@click.argument(
    "file",
    cls=Argument,
    required=False,
    type=click.File(encoding="utf-8-sig", lazy=False),
    help="Packets as JSON; - is standard input.",
)
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

    Exit codes: 0 all would count, 1 one would be refused or quarantined, or there was none. With --json,
    one line per packet.
    """
    stream = file or standard_input("Say what to check: a FILE, or - for standard input.")
    defaults = HeaderDefaults(domain_id=domain_id, cohort=cohort or DEFAULT_COHORT)
    checked = valid = 0
    with nullcontext() if offline else open_client(settings) as client:
        for entry in read_packets(stream, defaults):
            report = _report(entry.packet, client)
            checked += 1
            valid += report.valid
            _tell(settings, entry, report)
    if not settings.json and checked > 1:
        show_note(f"{valid} of {checked} packets {'is' if valid == 1 else 'are'} valid")
    return ExitCode.OK if valid == checked else ExitCode.REFUSED


def _report(
    packet: packet_pb2.Packet | ContractError, client: FMIClient | None
) -> ValidationReport:
    if isinstance(packet, ContractError):
        return ValidationReport(valid=False, error=packet)
    if client is not None:
        return client.validate(packet)
    broken = packet_violations(packet)
    error = error_from_violations(broken, "packet") if broken else None
    return ValidationReport(valid=not broken, error=error)


def _tell(settings: Settings, entry: Entry, report: ValidationReport) -> None:
    if settings.json:
        print_json(_data(entry, report), line=True)
        return
    verdict, style = "invalid", "bold red"
    if report.quarantined:
        verdict, style = "quarantine", "yellow"
    elif report.valid:
        verdict, style = "valid", "green"
    line = text(f"{verdict:<10}", style)
    line.append(f" {safe(entry.subject)}", style="default")
    print_text(line)
    if report.violations:
        print_text(violations_table(report.violations), indent=2)
    elif report.error is not None:
        print_text(text(f"  {report.error.message}"))
    if report.error is not None and (advice := hint(report.error)):
        print_text(text(f"  {advice}", "dim"))
    for warning in report.warnings:
        print_text(text(f"  warning: {warning}", "yellow"))


def _data(entry: Entry, report: ValidationReport) -> dict[str, Any]:
    return {
        "packet_id": entry.own_id,
        **entry.data(),
        "valid": report.valid,
        "quarantined": report.quarantined,
        "warnings": list(report.warnings),
        "error": error_data(report.error) if report.error else None,
    }
