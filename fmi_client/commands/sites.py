"""`fmi sites`: who sends what, and what is held back."""

from __future__ import annotations

import time

import click
from rich.console import RenderableType
from rich.text import Text

from fmi.v1 import admin_service_pb2
from fmi_client.commands.exits import ExitCode
from fmi_client.commands.options import Argument, DefaultGroup, Settings, shared_options
from fmi_client.commands.output import (
    age,
    message_data,
    print_json,
    print_text,
    safe,
    share,
    table,
    text,
)
from fmi_client.commands.session import open_client

__all__ = ["command"]


class _SitesGroup(DefaultGroup):
    default_command = "show"


@click.group(name="sites", cls=_SitesGroup, subcommand_metavar="[COHORT | quarantine] ...")
@shared_options
def command(_settings: Settings) -> None:
    """List the sites of a COHORT, or of all: packets, when last heard, reputation.

    \b
      fmi sites
      fmi sites healthcare
      fmi sites quarantine healthcare
      fmi sites quarantine --release site_007 0199f2c4-7c1e-7d3a-9a52-3f0c5d1e8b11
    """  # noqa: D301 - click wants the character


@command.command("show")
@click.argument("cohort", cls=Argument, required=False, help="The cohort. [default: all]")
@shared_options
def _show(settings: Settings, cohort: str | None) -> int:
    """List the sites of a COHORT, or of all (the word `show` may be left out)."""
    with open_client(settings) as client:
        sites = client.admin.list_sites(cohort or "")
    if settings.json:
        print_json({"sites": [message_data(site) for site in sites]})
    elif sites:
        print_text(_sites_view(sites, with_cohort=cohort is None))
    else:
        print_text("no sites yet")
    return ExitCode.OK


@command.command("quarantine")
@click.argument("cohort", cls=Argument, required=False, help="The cohort. [default: all]")
@click.option(
    "--release",
    nargs=2,
    metavar="DOMAIN PACKET_ID",
    help="Take a packet out of quarantine, so that it counts from the next release on.",
)
@click.option("--hold", nargs=2, metavar="DOMAIN PACKET_ID", help="Put a packet into quarantine.")
@click.option("--reason", default="", metavar="TEXT", help="Why; kept with the packet.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=1000, show_default=True, help="The most shown."
)
@shared_options
def _quarantine(
    settings: Settings,
    cohort: str | None,
    release: tuple[str, str] | None,
    hold: tuple[str, str] | None,
    reason: str,
    limit: int,
) -> int:
    """List the packets in quarantine of a COHORT, or of all; take one out or put one in."""
    if sum(given is not None for given in (cohort, release, hold)) > 1:
        raise click.UsageError("Give one of COHORT, --release and --hold.")
    moved = release or hold
    with open_client(settings) as client:
        if moved is not None:
            domain_id, packet_id = moved
            changed = client.admin.set_quarantine(
                domain_id, packet_id, quarantined=hold is not None, reason=reason
            )
            if settings.json:
                print_json({"changed": changed})
            else:
                where = "in quarantine" if hold else "out of quarantine"
                state = "is now" if changed else "was already"
                print_text(text(f"packet {packet_id} of {domain_id} {state} {where}"))
            return ExitCode.OK
        packets = client.admin.list_quarantine(cohort or "", limit=limit)
    if settings.json:
        print_json({"packets": [message_data(packet) for packet in packets]})
    elif packets:
        print_text(*(_held_view(packet) for packet in packets))
    else:
        print_text("nothing is in quarantine")
    return ExitCode.OK


def _sites_view(sites: list[admin_service_pb2.SiteStatus], *, with_cohort: bool) -> RenderableType:
    kinds = ("msp", "pop", "ccs")
    columns = ("site", *(("cohort",) if with_cohort else ()), *kinds)
    listed = table(
        *columns, "last heard", "reputation", "quar.", right=(*kinds, "reputation", "quar.")
    )
    now = time.time()
    for site in sites:
        name = text(site.domain_id)
        if site.profile_class not in ("", "default"):
            name.append(f" ({safe(site.profile_class)})", style="dim")
        listed.add_row(
            name,
            *((text(site.cohort, "cyan"),) if with_cohort else ()),
            *(str(site.packets[kind]) if kind in site.packets else "" for kind in kinds),
            age(site.last_seen, now),
            share(site.reputation),
            str(site.quarantined) if site.quarantined else "",
        )
    return listed


def _held_view(held: admin_service_pb2.QuarantinedPacket) -> Text:
    header = held.packet.header
    block = text(header.domain_id, "bold")
    block.append(f"  {safe(header.packet_id)}\n", style="default")
    kind = held.packet.WhichOneof("body") or "empty"
    block.append(
        f"  {kind} for {safe(header.cohort)}, {age(held.received_at, time.time())}\n",
        style="dim",
    )
    block.append(f"  {safe(held.reason)}", style="yellow")
    return block
