"""Attack the private mechanism and three broken ones; print what each attack proves beside what is claimed.

make bench-privacy      or: python -m benchmarks.privacy --trials 100000 --json build/privacy.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.privacy.audit import CONFIDENCE, Finding, audit
from fmi_server.privacy.budget import (
    BudgetPlan,
    PrivacySettings,
    natural_sensitivity,
    plan_budget,
)
from fmi_server.privacy.discrete_gaussian import discrete_gaussian
from fmi_server.privacy.noisy_means import NoisySums

SIGNALS, SITES = 25, 50
EPSILON, DELTA = 1.0, 1e-5
REPEATS = 20
HEAVY = 25.0
PART = 4_000  # trials at a time, so that what is drawn stays small


@dataclass(frozen=True)
class Case:
    """A mechanism under attack.

    Attributes:
        name: as printed.
        claim: the epsilon that it claims.
        sound: whether the claim is meant to hold.
        finding: what the attack proved.
    """

    name: str
    claim: float
    sound: bool
    finding: Finding


def planned(epochs: int = 1) -> BudgetPlan:
    """Return the plan that all claims are taken from."""
    return plan_budget(PrivacySettings(EPSILON, DELTA, dp_epochs=epochs), SIGNALS)


def worlds(plan: BudgetPlan) -> tuple[NoisySums, NoisySums]:
    """Return the exact sums of some sites, and of them and the one that moves them most."""
    values = np.random.default_rng(3).uniform(-1.0, 1.0, (SIGNALS, SITES))
    more = np.hstack([values, np.ones((SIGNALS, 1))])
    return plan.sums.sums(values, np.ones(SITES)), plan.sums.sums(more, np.ones(SITES + 1))


def statistic(
    plan: BudgetPlan, *, releases: int = 1, noise: float = 1.0, moved: float = 1.0
) -> Callable[[bool, int], NDArray[np.float64]]:
    """Return the attacker's statistic: the projection of what it sees, averaged over releases.

    Args:
        plan: the mechanism.
        releases: with noise of their own, of the same sums.
        noise: factor on the noise; 1 is sound.
        moved: factor on what the site adds to the sums; 1 is sound.
    """
    without, with_it = worlds(plan)
    difference = np.concatenate(
        [with_it.values - without.values, with_it.weights - without.weights]
    ).astype(np.float64)
    length = float(np.linalg.norm(difference))
    direction = difference / length

    def seen(present: bool, trials: int) -> NDArray[np.float64]:
        parts = [
            sum(_projected(plan, direction, min(PART, trials - start)) for _ in range(releases))
            for start in range(0, trials, PART)
        ]
        return noise * np.concatenate(parts) / releases + (moved * length if present else 0.0)

    return seen


def _projected(
    plan: BudgetPlan, direction: NDArray[np.float64], trials: int
) -> NDArray[np.float64]:
    drawn = discrete_gaussian(trials * len(direction), plan.sums.sigma_bits)
    projected: NDArray[np.float64] = drawn.reshape(trials, -1).astype(np.float64) @ direction
    return projected


def cases(trials: int) -> list[Case]:
    """Attack everything."""
    one, many = planned(), planned(REPEATS)
    # As if a site moved one signal only, from one bound to the other, and the count were no secret.
    naive = 2.0 / natural_sensitivity(SIGNALS)
    attacks = [
        ("the mechanism, one release", True, statistic(one)),
        (f"the mechanism, {REPEATS} epochs of one budget", True, statistic(many, releases=REPEATS)),
        ("planted: sensitivity (U - L) / n, signal by signal", False, statistic(one, noise=naive)),
        (
            f"planted: fresh noise in each of {REPEATS} revisions",
            False,
            statistic(one, releases=REPEATS),
        ),
        (f"planted: a weight of {HEAVY:g} that is not cut", False, statistic(one, moved=HEAVY)),
    ]
    return [Case(name, EPSILON, sound, audit(seen, DELTA, trials)) for name, sound, seen in attacks]


def main() -> None:
    """Attack, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.privacy", description=__doc__)
    parser.add_argument("--trials", type=int, default=100_000, help="in each world")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    started = time.perf_counter()
    found = cases(options.trials)
    print(
        f"{SIGNALS} signals of {SITES} sites; claimed: epsilon {EPSILON:g}, delta {DELTA:g}\n"
        f"{options.trials:,} trials in each of two worlds; each bound holds with confidence {CONFIDENCE}\n"
    )
    width = max(len(case.name) for case in found)
    for case in found:
        bounds = case.finding
        print(
            f"{case.name:{width}}  epsilon >= {bounds.assumed_nothing:6.3f}"
            f"   if Gaussian >= {bounds.assumed_gaussian:6.3f}"
        )
    print(f"\n{time.perf_counter() - started:.0f} s")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(case) for case in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
