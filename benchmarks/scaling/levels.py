"""What levels do to a trimmed mean: its error, and how many lying sites it withstands, by where they sit.

Each server of a level is a site of the one above and sends its value, with its confidence and its effective
number of sites, as `fmi_server.uplink` does; all values are made by the server's own estimator. Many cohorts
are simulated at once: they are the rows, as signals are at a server.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.scaling.effort import Effort
from fmi_server.aggregation import CohortMatrix, EstimatorSettings, estimate

__all__ = ["PLACES", "Breakdown", "Precision", "breakdowns", "precisions", "two_levels"]

FAR: Final = 1e12
"""What a liar says where nothing bounds it; honest sites vary by 1 about 0."""

BOUND: Final = 10.0
"""What a liar says at most where the cohort's spec bounds the signal by ten standard deviations."""

BROKEN: Final = 10.0
"""A value so far off is not one of the honest sites."""

RULES: Final = EstimatorSettings()
PLACES: Final = ("spread", "whole regions", "aimed")
"""Where liars sit: evenly in all regions; in as few regions as hold them, whole; or so many in each of some
regions as does most harm, of what was tried: just more than a region trims, a fifth, a third, half."""

FEW: Final = 3
"""Cohorts with liars: what lies do hardly differs from cohort to cohort."""

AIMED: Final = (0.0, 0.2, 0.35, 0.51)

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Precision:
    """How far off values are where nobody lies, as root mean squares.

    Attributes:
        sites: Sites in all.
        regions: Regions.
        sizes: `alike`, or `unlike`: log-normal, with a standard deviation of 1.
        differ: Whether regions differ as much as the sites of one do.
        flat: Error of the trimmed mean over all sites.
        two_levels: Error of the trimmed mean over regions.
        three_levels: The same with a level between; None where there are too few regions.
    """

    sites: int
    regions: int
    sizes: str
    differ: bool
    flat: float
    two_levels: float
    three_levels: float | None

    @property
    def ratio(self) -> float:
        """Error of two levels over that of one."""
        return self.two_levels / self.flat


@dataclass(frozen=True, slots=True)
class Breakdown:
    """What lying sites do to the value.

    Attributes:
        sites: Sites in all.
        regions: Regions, all of one size.
        share: Share of the sites that lie, all upwards.
        broken: Share of the cohorts whose value is none of an honest site, where nothing bounds lies; over
            all sites at once (`flat`), and over regions by where the liars sit.
        moved: How far the value is moved on average where lies are bounded, in standard deviations of the
            honest sites; the same.
    """

    sites: int
    regions: int
    share: float
    broken: dict[str, float]
    moved: dict[str, float]


def two_levels(regions: Iterable[Values]) -> Values:
    """Return the parent's values: cohorts x sites of each region in, one value for each cohort out."""
    return _above([_below(region) for region in regions])[0]


def precisions(effort: Effort) -> list[Precision]:
    """Simulate cohorts in which nobody lies."""
    found = []
    for sites, cohorts in effort.cohorts_simulated:
        regions = _regions(sites)
        for sizes in ("alike", "unlike"):
            for differ in (False, True):
                random = np.random.default_rng([sites, differ, sizes == "alike"])
                parts = _sizes(sites, regions, sizes, random)
                groups = [_honest(random, cohorts, part, differ=differ) for part in parts]
                flat = estimate(np.concatenate(groups, axis=1)).value
                below = [_below(group) for group in groups]
                found.append(
                    Precision(
                        sites,
                        regions,
                        sizes,
                        differ,
                        _rms(flat),
                        _rms(_above(below)[0]),
                        _rms(_by_three(below)) if regions >= 100 else None,
                    )
                )
    return found


def breakdowns(effort: Effort, say: Callable[[str], None]) -> list[Breakdown]:
    """Simulate cohorts with lying sites, of the largest size."""
    found = []
    sites, simulated = effort.cohorts_simulated[-1]
    regions = _regions(sites)
    members, cohorts = sites // regions, min(simulated, FEW)
    random = np.random.default_rng(sites)
    honest = [_honest(random, cohorts, members, differ=False) for _ in range(regions)]
    for share in effort.shares:
        liars = math.floor(share * sites)
        broken, moved = (_harm(honest, liars, lie) for lie in (FAR, BOUND))
        lost = {place: float(np.mean(values > BROKEN)) for place, values in broken.items()}
        by = {place: float(np.mean(values)) for place, values in moved.items()}
        found.append(Breakdown(sites, regions, share, lost, by))
        say(f"{share:.1%} of {sites:,} sites lie")
    return found


def _harm(honest: Sequence[Values], liars: int, lie: float) -> dict[str, Values]:
    """Return the values that lies lead to, over all sites and by place."""
    regions, members = len(honest), honest[0].shape[1]

    def lying(each: int) -> list[Values]:
        groups = []
        for group, part in zip(honest, _placed(liars, regions, members, each), strict=True):
            changed = group.copy()
            changed[:, :part] = lie
            groups.append(changed)
        return groups

    least = math.ceil(RULES.trim_alpha * members) + 1
    spread = lying(math.ceil(liars / regions))
    aimed = [two_levels(lying(max(least, round(part * members)))) for part in AIMED]
    return {
        "flat": estimate(np.concatenate(spread, axis=1)).value,
        "spread": two_levels(spread),
        "whole regions": two_levels(lying(members)),
        "aimed": max(aimed, key=lambda values: float(values.mean())),
    }


def _placed(liars: int, regions: int, members: int, each: int) -> list[int]:
    """Return how many liars sit in each region: so many in one after the other; what is left, anywhere."""
    placed = [max(0, min(each, members, liars - number * each)) for number in range(regions)]
    left = liars - sum(placed)
    for number in range(regions):
        more = min(members - placed[number], left)
        placed[number] += more
        left -= more
    return placed


def _regions(sites: int) -> int:
    """Return a number of regions: as many as each has sites, or ten times fewer; ten at least."""
    return max(10, int(10 ** ((len(str(sites)) - 1) // 2)))


def _sizes(sites: int, regions: int, kind: str, random: np.random.Generator) -> Sequence[int]:
    if kind == "alike":
        return [sites // regions] * regions
    shares = random.lognormal(size=regions)
    return [max(5, round(float(share))) for share in sites * shares / shares.sum()]


def _honest(random: np.random.Generator, cohorts: int, members: int, *, differ: bool) -> Values:
    values = random.normal(size=(cohorts, members))
    if differ:
        values += random.normal(size=(cohorts, 1))
    return values


@dataclass(frozen=True, slots=True)
class _Sent:
    """What a server sends up, for each cohort: value and confidence; and the effective sites of all."""

    value: Values
    confidence: Values
    size: float


def _below(group: Values) -> _Sent:
    table = estimate(group)
    return _Sent(table.value, table.confidence, float(table.effective_sites.mean()))


def _above(sent: Sequence[_Sent]) -> tuple[Values, _Sent]:
    cohorts = len(sent[0].value)
    parent = CohortMatrix(max_signals=cohorts, max_new_per_site=cohorts)
    for number, region in enumerate(sent):
        parent.put(
            f"region-{number}",
            {"metrics": _named(region.value)},
            now=0.0,
            signal_confidence=_named(region.confidence),
            size=region.size,
        )
    table = parent.release(RULES, None, 0.0).table
    effective = float(table.effective_sites.mean())
    return table.value, _Sent(table.value, table.confidence, effective)


def _by_three(below: Sequence[_Sent]) -> Values:
    """Put a level between: as many parents of regions as each has regions."""
    parents = math.isqrt(len(below))
    return _above([_above(below[number::parents])[1] for number in range(parents)])[0]


def _named(values: Values) -> dict[str, float]:
    return {f"x{number}": value for number, value in enumerate(values.tolist())}


def _rms(errors: Values) -> float:
    return float(np.sqrt(np.mean(errors**2)))
