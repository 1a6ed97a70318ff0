"""One site: a process of its own that tunes, tries policies, looks for causes, and tells its cohorts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

from fmi_client import FMIClient
from fmi_demo.causes import experiment, find_causes
from fmi_demo.data import SitePart, handwriting, split_digits
from fmi_demo.events import Emitted, SiteFinished, SitePlan, Tuned
from fmi_demo.learner import Measurement, Trial, best_of, from_unit, measure, tune
from fmi_demo.liar import falsify
from fmi_demo.packets import POLICIES, Body, ccs_body, msp_body, pop_body
from fmi_demo.scenario import (
    CHECK_SPLITS,
    COHORTS,
    LIBRARY_DEFAULTS,
    PROFILE_CLASS,
    REGIME,
    TUNING_SPLITS,
    Settings,
)

__all__ = ["run_site"]

_CHECK_REPEATS: Final = 4

Send: TypeAlias = Callable[[Tuned | Emitted | SiteFinished], None]


def run_site(plan: SitePlan, send: Send) -> None:
    """Be one site, from its own images to its last packet.

    Args:
        plan: What to do.
        send: Told of every step; the last event is a `SiteFinished`.

    Raises:
        FMIError: The server refused a packet or could not be reached.
    """
    parts, _ = split_digits(plan.sites, seed=plan.seed)
    part = parts[plan.site]
    provenance = {
        "software": "fmi-demo",
        "regime_tag": REGIME,
        "n_samples": len(part.labels),
    }
    with FMIClient(
        plan.target,
        domain_id=part.site_id,
        profile_class=PROFILE_CLASS,
        provenance=provenance,
    ) as client:
        send(_Site(plan, part, client, send).work())


class _Site:
    """A site at work: what it has, and what it has told."""

    def __init__(self, plan: SitePlan, part: SitePart, client: FMIClient, send: Send) -> None:
        self._plan = plan
        self._part = part
        self._client = client
        self._send = send
        self._seed = plan.seed * 1000 + plan.site
        self._packets = 0
        self._claimed: Settings = {}

    def work(self) -> SiteFinished:
        default = self._measure(LIBRARY_DEFAULTS)
        best = self._tune(default)
        settings = from_unit(best.unit)
        gains = self._try_policies(settings)
        self._look_for_causes()
        return SiteFinished(
            site_id=self._part.site_id,
            form=self._part.form,
            lies=self._plan.lies,
            images=len(self._part.labels),
            settings=settings,
            accuracy=best.accuracy,
            default_accuracy=default.accuracy,
            claimed=self._claimed,
            packets=self._packets,
            gains=gains,
        )

    def _tune(self, default: Measurement) -> Trial:
        """Tune from a random start; report half way and at the end."""
        trials: list[Trial] = []
        budget = self._plan.budget

        def accuracy(settings: Settings) -> float:
            return self._measure(settings).accuracy

        for trial in tune(accuracy, seed=self._seed, budget=budget):
            trials.append(trial)
            best = best_of(trials)
            self._send(Tuned(self._part.site_id, len(trials), best.accuracy))
            if len(trials) in (budget // 2, budget):
                measured = self._measure(from_unit(best.unit))
                body = msp_body(trials, measured, default, images=len(self._part.labels))
                self._emit(body, f"accuracy {best.accuracy:.3f} by {len(trials)} evaluations")
        return best_of(trials)

    def _try_policies(self, settings: Settings) -> dict[str, float]:
        """Measure each policy on splits that the tuning has not seen."""
        gains = {}
        before = measure(self._part, settings, split_seed=CHECK_SPLITS, repeats=_CHECK_REPEATS)
        for bundle, policy in POLICIES:
            after = measure(
                self._part,
                settings,
                split_seed=CHECK_SPLITS,
                repeats=_CHECK_REPEATS,
                policy=policy,
            )
            name = ", ".join(f"{key}={value}" for key, value in bundle.items())
            gains[name] = after.accuracy - before.accuracy
            self._emit(pop_body(bundle, before, after), f"{name}: accuracy {gains[name]:+.3f}")
        return gains

    def _look_for_causes(self) -> None:
        table = experiment(
            self._part,
            rows=self._plan.experiments,
            seed=self._seed,
            split_seed=TUNING_SPLITS,
        )
        causes = find_causes(table, seed=self._seed)
        text = ", ".join(f"{c.source}->{c.target} {c.weight:+.1f}" for c in causes.found)
        self._emit(ccs_body(causes, handwriting(self._part.images)), text or "no causes found")

    def _measure(self, settings: Settings) -> Measurement:
        return measure(self._part, settings, split_seed=TUNING_SPLITS)

    def _emit(self, body: Body, text: str) -> None:
        said = falsify(body) if self._plan.lies else body
        if "msp" in said:
            self._claimed = said["msp"]["controller"]
        for cohort in COHORTS:
            self._client.emit({"cohort": cohort, **said})
            self._packets += 1
        self._send(Emitted(self._part.site_id, next(iter(said)).upper(), text))
