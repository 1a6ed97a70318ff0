"""What one sees while the demo runs: a live table on a terminal, lines where there is none."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fmi.v1 import update_pb2
from fmi_demo.events import (
    Curve,
    Emitted,
    HintTried,
    SiteFinished,
    Tuned,
    WarmStarted,
    site_name,
)
from fmi_demo.result import PriorValue, prior_values
from fmi_demo.scenario import ARMS, BOX, COHORTS, LIARS

__all__ = ["ARM_LABELS", "View", "number", "percent", "policy_text", "prior_text", "value_text"]

ARM_LABELS: Final = dict(
    zip(
        ARMS,
        (
            "cold, random start",
            "cold, library defaults",
            "warm, trimmed mean",
            "warm, plain mean",
        ),
        strict=True,
    )
)

_LAST: Final = 5
_BAR: Final = 20
_REFRESH_HZ: Final = 8


def number(value: float) -> str:
    """Write a setting with three digits."""
    return f"{value:.3g}"


def percent(share: float) -> str:
    """Write a share as a percentage."""
    return f"{share * 100:.1f} %"


def policy_text(bundle: Mapping[str, Any]) -> str:
    """Write the parameters of a policy on one line."""
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in bundle.items()
    )


def prior_text(values: dict[str, PriorValue]) -> str:
    """Write a prior on one line, with its intervals."""
    parts = []
    for name, value in values.items():
        interval = (
            f" [{number(value.lower)}, {number(value.upper)}]"
            if value.lower is not None and value.upper is not None
            else ""
        )
        parts.append(f"{name} {number(value.value)}{interval}")
    return "  ".join(parts) or "no value yet"


def value_text(value: PriorValue) -> str:
    """Write a setting of a prior in a cell, with its interval."""
    if value.lower is None or value.upper is None:
        return f"{value.value:.2g}"
    return f"{value.value:.2g} [{value.lower:.2g}, {value.upper:.2g}]"


@dataclass(slots=True)
class _Row:
    """One site on the screen."""

    lies: bool
    images: int | None = None
    evaluations: int = 0
    accuracy: float | None = None
    packets: dict[str, int] = field(default_factory=dict)
    done: bool = False


class View:
    """Shows what happens. All of its methods are called in the event loop's thread.

    Args:
        console: Where to; without a terminal it writes a line per packet that matters.
        sites: Sites that emit.
        searches: Searches that the late site makes.
    """

    def __init__(self, console: Console, *, sites: int, searches: int) -> None:
        self._console = console
        self._rows = {site_name(i): _Row(lies=i >= sites - LIARS) for i in range(sites)}
        self._priors: dict[str, tuple[int, int, dict[str, PriorValue]]] = {}
        self._warm: dict[str, WarmStarted] = {}
        self._last: deque[Text] = deque(maxlen=_LAST)
        self._searches = searches
        self._searched = 0
        self._stage = "starting"
        self._live = Live(
            console=console,
            get_renderable=self._render,
            refresh_per_second=_REFRESH_HZ,
            transient=True,
        )

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def stage(self, text: str) -> None:
        """Say what comes now."""
        self._stage = text
        self._console.print(Text(text, "bold"))

    def on_event(self, event: object) -> None:
        """Take what a process told."""
        match event:
            case Tuned():
                row = self._rows[event.site_id]
                row.evaluations, row.accuracy = event.evaluations, event.accuracy
            case Emitted():
                row = self._rows[event.site_id]
                row.packets[event.kind] = row.packets.get(event.kind, 0) + 1
                lie = " (and sends the reverse)" if row.lies else ""
                self._say(f"{event.site_id}  {event.kind}  {event.text}{lie}")
            case SiteFinished():
                row = self._rows[event.site_id]
                row.done, row.images = True, event.images
            case WarmStarted() if event.cohort not in self._warm:  # each half of the site asks
                self._warm[event.cohort] = event
                values = "  ".join(f"{name} {number(v)}" for name, v in event.init.items())
                self._say(
                    f"late-site  warm start of {event.cohort}, from {event.source}: {values}",
                    "bold",
                )
            case Curve():
                self._searched += 1
            case HintTried() if event.bundle:
                policy = policy_text(event.bundle)
                change = f"{event.before:.3f} -> {event.after:.3f}"
                self._say(f"late-site  hint of {event.cohort}: {policy}: accuracy {change}")
            case _:
                pass

    def on_update(self, update: update_pb2.Update) -> None:
        """Take an update that the subscription gave."""
        if update.WhichOneof("body") != "prior_update":
            return
        prior = update.prior_update
        values = prior_values(prior)
        before = self._priors.get(update.cohort)
        self._priors[update.cohort] = (update.revision, prior.lineage.sites, values)
        if before is None or before[1] != prior.lineage.sites:
            sites = "site" if prior.lineage.sites == 1 else "sites"
            self._say(
                f"{update.cohort}  prior, revision {update.revision}, {prior.lineage.sites} {sites}: "
                f"{prior_text(values)}",
                "cyan",
            )

    def _say(self, text: str, style: str = "") -> None:
        line = Text(text, style, no_wrap=True, overflow="ellipsis")
        self._last.append(line)
        if not self._console.is_terminal:
            self._console.print(line, soft_wrap=True)

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [self._site_table(), Text(), self._prior_table(), Text()]
        if self._searched:
            done = self._searched * _BAR // self._searches
            bar = "#" * done + "." * (_BAR - done)
            parts += [
                Text(f"late site [{bar}] {self._searched} of {self._searches} searches"),
                Text(),
            ]
        parts.append(Group(*self._last))
        return Panel(Group(*parts), title=self._stage, title_align="left", border_style="dim")

    def _site_table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("site")
        for heading in ("evaluations", "best accuracy", "MSP", "POP", "CCS"):
            table.add_column(heading, justify="right")
        table.add_column("")
        for site_id, row in self._rows.items():
            state = "done" if row.done else "tuning" if row.evaluations else ""
            table.add_row(
                site_id,
                str(row.evaluations or ""),
                "" if row.accuracy is None else f"{row.accuracy:.3f}",
                *(str(row.packets.get(kind, "")) for kind in ("MSP", "POP", "CCS")),
                f"{state}, lies" if row.lies and state else state,
                style="red" if row.lies else "" if row.done else "dim",
            )
        return table

    def _prior_table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("cohort", style="cyan")
        for heading in ("revision", "sites"):
            table.add_column(heading, justify="right")
        for name in BOX:
            table.add_column(name, no_wrap=True)
        for cohort in COHORTS:
            revision, sites, values = self._priors.get(cohort, (0, 0, {}))
            shown = [value_text(values[name]) if name in values else "" for name in BOX]
            table.add_row(cohort, str(revision or ""), str(sites or ""), *shown)
        return table
