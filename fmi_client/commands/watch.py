"""`fmi watch`: follow updates as they are released."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Final

import click
from rich.text import Text

from fmi.v1 import interchange_service_pb2
from fmi_client._counts import counted
from fmi_client.commands.exits import ExitCode
from fmi_client.commands.options import Argument, FMICommand, Settings, shared_options
from fmi_client.commands.output import (
    message_data,
    print_json,
    print_text,
    show_note,
    text,
)
from fmi_client.commands.session import open_client
from fmi_client.commands.updates import headline, settings_line
from fmi_client.kinds import KIND_NAMES, kind_name, update_kind
from fmi_client.outages import ConnectionState

__all__ = ["command"]

_START: Final = re.compile(r"(?:(?P<cohort>[^:=]+)(?::(?P<kind>[^:=]+))?=)?(?P<revision>[0-9]+)")


@click.command(name="watch", cls=FMICommand)
@click.argument(
    "patterns",
    cls=Argument,
    nargs=-1,
    required=True,
    metavar="PATTERN...",
    help="Names of cohorts, or patterns of names.",
)
@click.option(
    "--kind",
    "kinds",
    type=click.Choice(KIND_NAMES),
    multiple=True,
    help="Only this kind; may be repeated.",
)
@click.option(
    "--every", is_flag=True, help="Every revision, not only the newest where there is a backlog."
)
@click.option(
    "--since-revision",
    "since",
    multiple=True,
    metavar="[COHORT[:KIND]=]N",
    help="Start at revision N rather than at the newest; may be repeated.",
)
@click.option("--resume", metavar="TOKEN", help="Go on where an earlier watch ended.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N updates.")
@shared_options
def command(
    settings: Settings,
    patterns: tuple[str, ...],
    kinds: tuple[str, ...],
    every: bool,
    since: tuple[str, ...],
    resume: str | None,
    count: int | None,
) -> int:
    """Follow the updates of the cohorts that match a PATTERN.

    In a PATTERN, * stands for any characters within a segment of a name, ** for any characters, ? for
    one. Put patterns in quotes, or the shell takes them for file names. First comes the newest update of
    each cohort and kind, then every new one. A broken connection is opened again; standard error says
    when it broke and when it was back.

    \b
      fmi watch healthcare
      fmi watch 'retail/*' --kind prior --json
      fmi watch healthcare --kind prior --every --since-revision 1

    With --json, one line per event (update, snapshot_end, lagged), each with its resume_token.
    """  # noqa: D301 - click wants the character
    starts = _starts(since, patterns, kinds)
    if starts and resume:
        raise click.UsageError("--since-revision and --resume exclude each other.")
    token, seen = "", 0
    told_nothing = bool(resume)  # behind a token, nothing new is what one expects
    narrator = _Narrator()
    try:
        with (
            open_client(settings) as client,
            client.subscribe(
                list(patterns),
                kinds=kinds,
                mode="every" if every else "latest",
                start=starts or None,
                resume_token=resume or "",
                on_state=narrator.tell_state,
            ) as subscription,
        ):
            for event in subscription.events():
                _tell(settings, event, narrator)
                token = event.resume_token or token
                match event.WhichOneof("event"):
                    case "update":
                        seen += 1
                        if seen == count:
                            break
                    case "snapshot_end" if not seen and not told_nothing:
                        told_nothing = True
                        narrator.tell_when_connected(lambda: _tell_nothing(patterns))
    finally:
        if token and not settings.json:
            show_note(f"go on from here with --resume {token}")
    return ExitCode.OK


def _starts(
    since: tuple[str, ...], patterns: tuple[str, ...], kinds: tuple[str, ...]
) -> list[interchange_service_pb2.StartRevision]:
    starts: list[interchange_service_pb2.StartRevision] = []
    for told in since:
        match = _START.fullmatch(told)
        if match is None or int(match["revision"]) < 1:
            raise click.BadParameter(
                f"{told!r} is not N, COHORT=N or COHORT:KIND=N with N from 1.",
                param_hint="--since-revision",
            )
        cohorts = (match["cohort"],) if match["cohort"] else patterns
        if wild := [cohort for cohort in cohorts if "*" in cohort or "?" in cohort]:
            raise click.BadParameter(
                f"name the cohorts, for example healthcare=3: {wild[0]!r} can match many.",
                param_hint="--since-revision",
            )
        if match["kind"] is not None and match["kind"] not in KIND_NAMES:
            raise click.BadParameter(
                f"{match['kind']!r} is not a kind; the kinds are {', '.join(KIND_NAMES)}.",
                param_hint="--since-revision",
            )
        wanted = (match["kind"],) if match["kind"] else kinds or KIND_NAMES
        starts.extend(
            interchange_service_pb2.StartRevision(
                cohort=cohort, kind=update_kind(kind), revision=int(match["revision"])
            )
            for cohort in cohorts
            for kind in wanted
        )
    return starts


def _tell_nothing(patterns: tuple[str, ...]) -> None:
    show_note(
        f"-- no update matches {' '.join(patterns)} yet, waiting for the first "
        "(`fmi cohorts` lists the cohorts) --"
    )


class _Narrator:
    """Keeps apart what is told of the connection and what was told through it.

    An outage is over when a new stream has lived for a while, and its events come before that. That all
    is up to date is told after it: nobody is up to date over a connection that is lost.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # states come from the thread of the client's event loop
        self._connected = True
        self._held: dict[str, Callable[[], None]] = {}

    def tell_state(self, state: ConnectionState) -> None:
        """Tell that the connection was lost, or that it is there again; then what waited for it."""
        with self._lock:
            self._connected = state.connected
            show_note(f"-- {state} --")
            held, self._held = (self._held if state.connected else {}), {}
            for tell in held.values():
                tell()

    def tell_when_connected(self, tell: Callable[[], None], topic: str = "") -> None:
        """Tell at once, or when the outage is over: then only the newest of each topic."""
        with self._lock:
            if self._connected:
                tell()
            else:
                self._held[topic] = tell


def _tell(
    settings: Settings, event: interchange_service_pb2.SubscribeResponse, narrator: _Narrator
) -> None:
    kind = event.WhichOneof("event")
    if settings.json:
        if kind != "progress":
            print_json(message_data(event), line=True)
        return
    match kind:
        case "update":
            print_text(headline(event.update))
            print_text(*settings_line(event.update), indent=2)
        case "snapshot_end":
            history = ", of another history" if event.snapshot_end.history_changed else ""
            updates = counted(event.snapshot_end.updates, "update")
            line = Text(f"-- up to date ({updates}{history}), live now --", "dim")
            narrator.tell_when_connected(lambda: print_text(line), "up to date")
        case "lagged":
            lagged = event.lagged
            print_text(
                text(
                    f"{lagged.cohort} {kind_name(lagged.kind)}: revisions {lagged.from_revision} to "
                    f"{lagged.to_revision} were left out (--every shows each)",
                    "yellow",
                )
            )
        case _:
            pass
