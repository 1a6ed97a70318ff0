"""`fmi subscribers`: who subscribes, and who applied which revision."""

from __future__ import annotations

import time

import click
from rich.console import RenderableType
from rich.text import Text

from fmi.v1 import admin_service_pb2, interchange_service_pb2
from fmi_client.commands.exits import ExitCode
from fmi_client.commands.options import Argument, FMICommand, Settings, shared_options
from fmi_client.commands.output import age, message_data, print_json, print_text, safe, table, text
from fmi_client.commands.session import open_client
from fmi_client.kinds import kind_name

__all__ = ["command"]


@click.command(name="subscribers", cls=FMICommand)
@click.argument("cohort", cls=Argument, required=False, help="The cohort. [default: all]")
@shared_options
def command(settings: Settings, cohort: str | None) -> int:
    """List who follows a COHORT, or any, and which revisions they say they applied.

    A subscriber that reports nothing shows up only while it is connected. The server keeps reports in
    memory: after a restart each subscriber is seen again with its next one.

    \b
      fmi subscribers
      fmi subscribers healthcare --json
    """  # noqa: D301 - click wants the character
    with open_client(settings) as client:
        connected = client.admin.list_subscribers(cohort or "")
        applied = client.admin.list_applied(cohort or "")
    if settings.json:
        print_json(
            {
                "subscribers": [message_data(status) for status in connected],
                "applied": [message_data(status) for status in applied],
            }
        )
        return ExitCode.OK
    print_text(_connected_view(connected) if connected else "nobody is connected")
    if applied:
        print_text("", _applied_view(applied))
        failures = [_failure_view(status) for status in applied if status.HasField("failure")]
        if failures:
            print_text("", *failures)
    else:
        print_text("nobody reported what it applied")
    return ExitCode.OK


def _connected_view(connected: list[admin_service_pb2.SubscriberStatus]) -> RenderableType:
    numbers = ("sent", "behind", "left out")
    listed = table("connected", "follows", "mode", "since", *numbers, right=numbers)
    now = time.time()
    for status in connected:
        follows = text(", ".join(status.cohorts), "cyan")
        if status.kinds:
            follows.append(f" ({', '.join(map(kind_name, status.kinds))})", style="dim")
        every = status.mode == interchange_service_pb2.DELIVERY_MODE_EVERY
        listed.add_row(
            text(status.subscriber) if status.subscriber else Text("(no name)", "dim"),
            follows,
            "every" if every else "latest",
            age(status.connected_at, now),
            str(status.sent),
            str(status.behind),
            str(status.conflated),
        )
    return listed


def _applied_view(applied: list[admin_service_pb2.AppliedStatus]) -> RenderableType:
    numbers = ("applied", "newest", "failed")
    listed = table("reported", "cohort", "kind", "applied", "when", *numbers[1:], right=numbers)
    now = time.time()
    for status in applied:
        current = status.applied_revision == status.newest_revision
        listed.add_row(
            text(status.subscriber),
            text(status.cohort, "cyan"),
            kind_name(status.kind),
            Text(str(status.applied_revision or "-"), "green" if current else "yellow"),
            age(status.applied_at, now),
            str(status.newest_revision),
            Text(str(status.failed_revision), "red") if status.failed_revision else "",
        )
    return listed


def _failure_view(status: admin_service_pb2.AppliedStatus) -> Text:
    where = f"{status.cohort} {kind_name(status.kind)} revision {status.failed_revision}"
    block = text(f"{status.subscriber} failed on {where} (code {status.failure.code})", "red")
    if status.failure.message:
        block.append(f"\n  {safe(status.failure.message)}", style="default")
    return block
