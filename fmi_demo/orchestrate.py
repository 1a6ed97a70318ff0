"""Run the demo: the server, the sites, the late site, and the figures."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import signal
import sys
import sysconfig
import time
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Final

from rich.console import Console

from fmi.v1 import update_pb2
from fmi_client import AsyncFMIClient
from fmi_client.kinds import KIND_NAMES
from fmi_demo.chart import draw_chart
from fmi_demo.cluster import DemoCluster
from fmi_demo.errors import DemoArgumentError, DemoError
from fmi_demo.events import Curve, HintTried, LatePlan, SiteFinished, SitePlan, WarmStarted
from fmi_demo.processes import Job, Workshop
from fmi_demo.report import print_report
from fmi_demo.result import (
    DemoResult,
    compare_arms,
    edges_of,
    prior_values,
    write_results,
)
from fmi_demo.scenario import (
    ARMS,
    COHORTS,
    FULL,
    LIARS,
    MAX_SITES,
    MIN_SITES,
    PROFILE_CLASS,
    QUICK,
    REGIME,
    Effort,
)
from fmi_demo.server import DemoServer
from fmi_demo.view import View
from fmi_server.app import STORE_FILE
from fmi_server.storage.sqlite_schema import DatabaseLock

__all__ = ["run_demo"]

_AT_ONCE: Final = 2  # processes that compute at the same time
_PLAIN_WIDTH: Final = 100
_MARK: Final = ".fmi-demo"
_NEXT_TARGET: Final = "127.0.0.1:50061"


def run_demo(
    *,
    output: Path,
    sites: int,
    seed: int,
    keep_serving: bool,
    quick: bool,
    json: bool,
    cluster: bool = False,
) -> DemoResult:
    """Run everything; see `fmi_demo.run`."""
    if not MIN_SITES <= sites <= MAX_SITES:
        raise DemoArgumentError(f"sites must be {MIN_SITES} to {MAX_SITES}, not {sites}")
    if seed < 0:
        raise DemoArgumentError(f"the seed must not be negative, not {seed}")
    _prepare(output)
    console = Console(stderr=json)
    if not console.is_terminal:
        console = Console(stderr=json, width=_PLAIN_WIDTH)
    demo = _Demo(
        output,
        sites=sites,
        seed=seed,
        effort=QUICK if quick else FULL,
        console=console,
        cluster=cluster,
    )
    result, text = asyncio.run(demo.run(keep_serving=keep_serving, json=json))
    if json and not keep_serving:
        sys.stdout.write(text)
    return result


class _Demo:
    """One run: what it is made from, and what it has heard."""

    def __init__(
        self,
        output: Path,
        *,
        sites: int,
        seed: int,
        effort: Effort,
        console: Console,
        cluster: bool,
    ) -> None:
        self._output = output
        self._sites = sites
        self._seed = seed
        self._effort = effort
        self._console = console
        self._clustered = cluster
        self._cluster: DemoCluster | None = None
        self._started = time.monotonic()
        self._finished: list[SiteFinished] = []
        self._warm: dict[str, WarmStarted] = {}
        self._hints: list[HintTried] = []
        self._curves: list[Curve] = []

    async def run(self, *, keep_serving: bool, json: bool) -> tuple[DemoResult, str]:
        """Run the demo; return its result, and the same as JSON."""
        kind = DemoCluster if self._clustered else DemoServer
        server = kind(
            data_dir=self._output / "data",
            cohorts=self._output / "cohorts",
            log=self._output / "server.log",
        )
        self._cluster = server if isinstance(server, DemoCluster) else None
        workshop = Workshop(at_once=_AT_ONCE)  # it warms up while the server starts
        async with server:
            async with AsyncFMIClient(server.target) as client:
                with self._view() as view:
                    await self._run_sites(server.target, client, workshop, view)
                    await self._run_late_site(server.target, workshop, view)
                await self._check(client)
                result = await self._result(client, server.target, serving=keep_serving)
            # Everything that draws is beside the event loop: it takes a second.
            text = await asyncio.to_thread(write_results, result, self._curves)
            await asyncio.to_thread(draw_chart, result, self._curves, result.chart)
            print_report(self._console, result)
            if keep_serving:
                if json:
                    sys.stdout.write(text)
                    sys.stdout.flush()
                await self._serve_on(server.target)
        return result, text

    def _view(self) -> View:
        return View(
            self._console,
            sites=self._sites,
            searches=self._effort.repetitions * len(ARMS),
        )

    async def _run_sites(
        self, target: str, client: AsyncFMIClient, workshop: Workshop, view: View
    ) -> None:
        view.stage(
            f"{self._sites} sites, each with the hand of one writer; the last {LIARS} of them lie"
        )

        def on_event(event: object) -> None:
            if isinstance(event, SiteFinished):
                self._finished.append(event)
                self._trouble(view)
            view.on_event(event)

        jobs = [
            Job(
                f"site {site + 1}",
                "fmi_demo.site:run_site",
                SitePlan(
                    target=target,
                    site=site,
                    sites=self._sites,
                    seed=self._seed,
                    budget=self._effort.site_budget,
                    experiments=self._effort.experiments,
                    lies=site >= self._sites - LIARS,
                ),
            )
            for site in self._order()
        ]

        def on_update(update: update_pb2.Update) -> None:
            if self._cluster is not None:
                self._cluster.note_update()
            view.on_update(update)

        async with client.subscribe(COHORTS, ["prior"], on_update=on_update):
            await workshop.run(jobs, on_event)
            for cohort in COHORTS:
                await client.admin.release_now(cohort)

    def _trouble(self, view: View) -> None:
        """Kill a broker when the first site is done, and later a server."""
        if self._cluster is None:
            return
        if len(self._finished) == 1:
            view.stage(f"{self._cluster.kill_broker()} of 3 is killed")
        elif len(self._finished) == max(2, self._sites // 2):
            view.stage(f"{self._cluster.kill_server()} of 3 is killed")

    async def _check(self, client: AsyncFMIClient) -> None:
        """See that every packet that was acknowledged is there, once.

        Raises:
            DemoError: It is not so.
        """
        acknowledged = sum(site.packets for site in self._finished)
        stored = sum(status.packets for status in await client.admin.list_cohorts())
        if stored != acknowledged:
            raise DemoError(f"{acknowledged} packets were acknowledged, and {stored} are stored")
        if self._cluster is not None:
            for line in self._cluster.story():
                self._console.print(line, highlight=False)
            self._console.print(
                f"{acknowledged} packets were acknowledged, and all are stored, once.",
                highlight=False,
            )

    def _order(self) -> list[int]:
        """Begin with the liars: what they send is there while everyone else is still at work."""
        honest = self._sites - LIARS
        return [*range(honest, self._sites), *range(honest)]

    async def _run_late_site(self, target: str, workshop: Workshop, view: View) -> None:
        view.stage("A late site, with a writer nobody has seen, asks for a warm start")

        def on_event(event: object) -> None:
            match event:
                case WarmStarted():
                    self._warm[event.cohort] = event
                case HintTried():
                    self._hints.append(event)
                case Curve():
                    self._curves.append(event)
                case _:
                    pass
            view.on_event(event)

        jobs = [
            Job(
                f"late site, half {half + 1}",
                "fmi_demo.late_site:run_late_site",
                LatePlan(
                    target=target,
                    sites=self._sites,
                    seed=self._seed,
                    budget=self._effort.late_budget,
                    repetitions=tuple(range(half, self._effort.repetitions, _AT_ONCE)),
                    tries_hint=half == _AT_ONCE - 1,
                ),
            )
            for half in range(_AT_ONCE)
        ]
        await workshop.run(jobs, on_event)

    async def _result(self, client: AsyncFMIClient, target: str, *, serving: bool) -> DemoResult:
        updates = {
            (cohort, kind): await client.get_update(cohort, kind)
            for cohort in COHORTS
            for kind in KIND_NAMES
        }
        consensus = updates[COHORTS[0], "causal_consensus"].causal_consensus
        target_accuracy, arms = compare_arms(self._curves, self._effort.late_budget)
        return DemoResult(
            seed=self._seed,
            sites=tuple(sorted(self._finished, key=lambda site: site.site_id)),
            late_budget=self._effort.late_budget,
            target_accuracy=target_accuracy,
            arms=arms,
            warm_starts=tuple(self._warm[cohort] for cohort in COHORTS),
            hints=tuple(self._hints),
            priors={
                cohort: prior_values(updates[cohort, "prior"].prior_update) for cohort in COHORTS
            },
            edges=edges_of(consensus),
            below_quorum=consensus.unpooled["below_quorum"],
            packets=sum(site.packets for site in self._finished),
            revisions={f"{c}/{kind}": update.revision for (c, kind), update in updates.items()},
            seconds=time.monotonic() - self._started,
            chart=self._output / "demo.png",
            results=self._output / "results.json",
            commands=()
            if self._clustered and not serving
            else _commands(self._output, target if serving else None),
        )

    async def _serve_on(self, target: str) -> None:
        self._console.print(f"Serving on {target} until Ctrl-C.", highlight=False)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        try:
            await stop.wait()
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


def _prepare(output: Path) -> None:
    """Empty the folder of an earlier demo, and put the cohort files into it.

    Raises:
        DemoArgumentError: There is something else in the folder, a server uses it, or it cannot be written.
    """
    try:
        _empty(output)
        (output / "cohorts").mkdir(parents=True)
        (output / _MARK).touch()
        for file in resources.files("fmi_demo").joinpath("cohorts").iterdir():
            (output / "cohorts" / file.name).write_bytes(file.read_bytes())
    except OSError as error:
        raise DemoArgumentError(f"{output} cannot be written to: {error.strerror}") from error


def _empty(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise DemoArgumentError(f"{output} is not a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / _MARK).exists():
        raise DemoArgumentError(f"{output} is not empty and not of a demo: name another folder")
    holder = DatabaseLock(output / "data" / STORE_FILE).holder()
    if holder is not None:
        raise DemoArgumentError(
            f"the server of process {holder} uses the store in {output}: stop it, or name another folder"
        )
    for folder in ("data", "cohorts"):
        if (output / folder).exists():
            shutil.rmtree(output / folder)


def _commands(output: Path, target: str | None) -> tuple[str, ...]:
    """Say what to try next, as it can be typed here.

    Args:
        output: Where the server's data is.
        target: The server that goes on serving; None where it is stopped.
    """
    at = target or _NEXT_TARGET
    serve = shlex.join(
        [
            _program("fmi-server"),
            "serve",
            *("--listen", at),
            *("--data-dir", str(output / "data")),
            *("--cohorts", str(output / "cohorts")),
        ]
    )
    fmi = shlex.quote(_program("fmi"))
    read = (
        f"{fmi} get {COHORTS[0]} --target {at}",
        f"{fmi} get {COHORTS[0]} --profile-class {PROFILE_CLASS} --regime {REGIME} --target {at}",
        f"{fmi} watch '{COHORTS[0]}*' --target {at}",
    )
    if target is None:
        return (f"{serve} &", *read)
    return (*read, f"{fmi} sites {COHORTS[0]} --target {at}")


def _program(name: str) -> str:
    """Return how a program of this installation is called from here."""
    installed = Path(sysconfig.get_path("scripts")) / name
    found = shutil.which(name)
    if found is not None and (not installed.exists() or installed.samefile(found)):
        return name
    with suppress(ValueError):
        return str(installed.relative_to(Path.cwd()))
    return str(installed)
