"""The late site: it has a part that no other site saw, and asks the federation where to begin.

The same tuner runs from four starts, several times each. Only its first candidate differs: all
that is random is the same, so that the repetitions are paired.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

from fmi.plain import packet_to_plain
from fmi_client import FMIClient
from fmi_demo.data import SitePart, handwriting, split_digits
from fmi_demo.events import Curve, HintTried, LatePlan, WarmStarted
from fmi_demo.learner import Measurement, Policy, from_unit, measure, to_unit, tune
from fmi_demo.scenario import (
    ARMS,
    BOX,
    CHECK_SPLITS,
    COHORTS,
    LIBRARY_DEFAULTS,
    PROFILE_CLASS,
    REGIME,
    TUNING_SPLITS,
    WARM_ARMS,
    Settings,
)

__all__ = ["run_late_site"]

_HINT_REPEATS: Final = 5

Send: TypeAlias = Callable[[WarmStarted | Curve | HintTried], None]


def run_late_site(plan: LatePlan, send: Send) -> None:
    """Ask for warm starts and measure what they are worth.

    Raises:
        FMIError: The server has nothing to start from, or could not be reached.
        KeyError: A warm start lacks a setting.
    """
    _, part = split_digits(plan.sites, seed=plan.seed)
    cache: dict[tuple[float, ...], float] = {}

    def accuracy(settings: Settings) -> float:
        # Paired searches visit many of the same points, and a measurement is the same each time.
        key = tuple(settings[name] for name in BOX)
        if key not in cache:
            cache[key] = measure(part, settings, split_seed=TUNING_SPLITS).accuracy
        return cache[key]

    starts: dict[str, Settings | None] = {"cold": None, "library": LIBRARY_DEFAULTS}
    with FMIClient(plan.target, domain_id=part.site_id, profile_class=PROFILE_CLASS) as client:
        for arm, cohort in WARM_ARMS.items():
            given = client.get_warm_start(
                cohort, regime=REGIME, concepts=handwriting(part.images)
            ).profile
            init = {name: given.init[name] for name in BOX}
            starts[arm] = init
            source = packet_to_plain(given.context_selector).get("source", "")
            send(
                WarmStarted(
                    cohort=cohort,
                    init=init,
                    source=source.removeprefix("WARM_START_SOURCE_").lower(),
                    accuracy=accuracy(from_unit(to_unit(init))),
                )
            )
        if plan.tries_hint:
            for cohort in COHORTS:
                send(_try_hint(client, cohort, part, starts["warm_trimmed_mean"] or {}))
    for repetition in plan.repetitions:
        for arm in ARMS:
            trials = tune(
                accuracy,
                seed=plan.seed * 100_000 + repetition,
                budget=plan.budget,
                start=starts[arm],
            )
            send(Curve(arm, repetition, tuple(trial.accuracy for trial in trials)))


def _try_hint(client: FMIClient, cohort: str, part: SitePart, settings: Settings) -> HintTried:
    hint = client.get_update(cohort, "policy_hint").policy_hint
    bundle: dict[str, Any] = {
        name: getattr(value, value.WhichOneof("kind") or "text")
        for name, value in hint.bundle.items()
    }

    def measured(policy: Policy) -> Measurement:
        return measure(
            part, settings, split_seed=CHECK_SPLITS, repeats=_HINT_REPEATS, policy=policy
        )

    before = measured(Policy()).accuracy
    after = measured(_policy(bundle)).accuracy if hint.hint_id else before
    return HintTried(cohort, hint.reason, bundle, before, after, hint.sites)


def _policy(bundle: dict[str, Any]) -> Policy:
    default = Policy()
    return Policy(
        labelled_thirds=round(bundle.get("labelled_thirds", default.labelled_thirds)),
        n_components=round(bundle.get("n_components", default.n_components)),
        averaging=bool(bundle.get("averaging", default.averaging)),
        augment=str(bundle.get("augment", default.augment)),
    )
