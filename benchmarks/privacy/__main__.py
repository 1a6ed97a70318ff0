"""Attack the private mechanism, what it publishes, and broken ones; print what each attack proves.

make bench-privacy      or: python -m benchmarks.privacy --trials 100000 --json build/privacy.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.privacy.audit import CONFIDENCE, Finding, audit, statistic
from benchmarks.privacy.mechanisms import (
    CLIP_NORM,
    DELTA,
    EPSILON,
    HEAVY,
    REPEATS,
    SIGNALS,
    NoiseForOneSignal,
    NoiselessWeights,
    UnboundedValues,
    UncutWeights,
    UnscaledVectors,
    WholeBudgetEachTime,
    moved_by,
    noisy_sums_seen,
    planned,
    published_seen,
)
from fmi_server.privacy.budget import BudgetPlan

SHARE_PUBLISHED = 20
"""Trials of the noisy sums for one of what is published, which costs so many times as much."""


@dataclass(frozen=True)
class Case:
    """A mechanism under attack.

    Attributes:
        name: as printed.
        sound: whether the claim is meant to hold.
        claim: the epsilon that it claims.
        trials: in each world.
        finding: what the attack proved.
    """

    name: str
    sound: bool
    claim: float
    trials: int
    finding: Finding


def cases(trials: int) -> Iterator[Case]:
    """Attack everything."""
    for name, sound, plan in (
        ("the mechanism, one release", True, planned()),
        (f"the mechanism, {REPEATS} releases of one budget", True, planned(REPEATS)),
        (
            f"the mechanism, vectors scaled to {CLIP_NORM:g}",
            True,
            planned(clip_norm=CLIP_NORM),
        ),
        ("planted: noise for one signal alone", False, planned(1, NoiseForOneSignal)),
        (
            f"planted: the whole budget in each of {REPEATS} releases",
            False,
            planned(REPEATS, WholeBudgetEachTime),
        ),
        (f"planted: a weight of {HEAVY:g} that is not cut", False, planned(1, UncutWeights)),
        ("planted: values beyond the bounds", False, planned(1, UnboundedValues)),
        (
            f"planted: vectors that are not scaled to {CLIP_NORM:g}",
            False,
            planned(1, UnscaledVectors, CLIP_NORM),
        ),
        ("planted: no noise on weights", False, planned(1, NoiselessWeights)),
    ):
        attack = statistic(noisy_sums_seen(plan), moved_by(plan))
        yield Case(name, sound, EPSILON, trials, audit(attack, DELTA, trials))
    yield from _published(max(1, trials // SHARE_PUBLISHED))


def _published(trials: int) -> Iterator[Case]:
    attacked: tuple[tuple[str, bool, BudgetPlan], ...] = (
        ("what is published", True, planned()),
        ("published, planted: noise for one signal", False, planned(1, NoiseForOneSignal)),
        ("published, planted: no noise on weights", False, planned(1, NoiselessWeights)),
    )
    for name, sound, plan in attacked:
        attack = statistic(*published_seen(plan))
        yield Case(name, sound, EPSILON, trials, audit(attack, DELTA, trials))


def main() -> None:
    """Attack, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.privacy", description=__doc__)
    parser.add_argument("--trials", type=int, default=100_000, help="in each world")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    started = time.perf_counter()
    print(
        f"{SIGNALS} signals; claimed: epsilon {EPSILON:g}, delta {DELTA:g}\n"
        f"each bound holds with confidence {CONFIDENCE}; trials are those in each of two worlds\n",
        flush=True,
    )
    found = []
    for case in cases(options.trials):
        found.append(case)
        bounds = case.finding
        print(
            f"{case.name:52}  {case.trials:>7,} trials  epsilon >= {bounds.assumed_nothing:6.3f}"
            f"   if Gaussian >= {bounds.assumed_gaussian:6.3f}",
            flush=True,
        )
    print(f"\n{time.perf_counter() - started:.0f} s")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(case) for case in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
