"""Quantile sketches in place of a value per site: their size, their error, and what they cannot do.

The sketches are those of Apache DataSketches. KLL (Karnin, Lang, Liberty 2016) and REQ (Cormode and others,
2021) keep some of the values, each for so many others; t-digest (Dunning 2019) keeps means of neighbours.
They are merged over regions, or kept by region, as a parent could do with what regions send.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import datasketches
import numpy as np
from numpy.typing import NDArray

from benchmarks.scaling.effort import Effort
from benchmarks.scaling.levels import BROKEN, FAR

__all__ = ["Accuracy", "Sketches", "Trust", "measure_sketches", "trimmed_mean_of_weighted"]

ALPHA: Final = 0.1
REGIONS: Final = 100
LIARS: Final = (0.05, 0.09, 0.099)
AGAIN: Final = 10
"""Times that sites send."""

DRIFT: Final = 0.1
"""How far the centre of honest sites moves from one time to the next, in their standard deviations."""

Values = NDArray[np.float64]
Sketch = Any  # the library has no types

KINDS: Final[dict[str, Callable[[], Sketch]]] = {
    "KLL, k = 200": lambda: datasketches.kll_doubles_sketch(200),
    "KLL, k = 800": lambda: datasketches.kll_doubles_sketch(800),
    "KLL, k = 3200": lambda: datasketches.kll_doubles_sketch(3200),
    "REQ, k = 12": lambda: datasketches.req_floats_sketch(12),
    "REQ, k = 50": lambda: datasketches.req_floats_sketch(50),
    "t-digest, k = 200": lambda: datasketches.tdigest_double(200),
}
CHOSEN: Final = "KLL, k = 800"


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A kind of sketch over all sites, merged of one for each region.

    Attributes:
        kind: Which, and its size.
        merged_bytes: Of the merged one, serialised.
        region_bytes: Of one region's.
        rank_error: What the library states for the rank of one value, with a confidence of 99 %; None where
            it states none.
        trimmed_mean_error: Distance to the exact trimmed mean, root mean square, in standard deviations of
            the sites.
        joined_error: The same where nothing is merged: what all regions' sketches keep is taken together.
            None where a sketch does not tell what it keeps.
        median_error: The same of the median.
        broken: By share of lying sites, how often the trimmed mean is none of an honest site.
        add_s: Seconds to add a value.
        merge_s: Seconds to merge a region.
    """

    kind: str
    merged_bytes: float
    region_bytes: float
    rank_error: float | None
    trimmed_mean_error: float
    joined_error: float | None
    median_error: float
    broken: dict[str, float]
    add_s: float
    merge_s: float


@dataclass(frozen=True, slots=True)
class Trust:
    """What decides where a sketch may sit, with the chosen kind. Errors are in standard deviations of sites.

    Attributes:
        exact_error: Root mean square error of the exact trimmed mean, for comparison.
        drift_inserted: Distance to the exact trimmed mean of what sites say now, where each sends ten times,
            moves a tenth of a standard deviation each time, and all of it goes into one sketch.
        drift_replaced: The same where each region makes its sketch anew of what its sites say now.
        eager_share: Sites that send twenty times as often as the others, and lie; as a share.
        eager_inserted: How often these move the value out of the honest range, in one sketch of all packets.
        eager_replaced: The same with a sketch made anew.
        claimed: How often one region of a hundred does, that lies and claims as many sites as all have.
        claimed_capped: The same where no region counts for more sites than the median one.
        aimed_share: Sites that lie in few regions, just more than these trim; as a share.
        aimed_merged: How often these do, over the sketches of all regions.
    """

    exact_error: float
    drift_inserted: float
    drift_replaced: float
    eager_share: float
    eager_inserted: float
    eager_replaced: float
    claimed: float
    claimed_capped: float
    aimed_share: float
    aimed_merged: float


@dataclass(frozen=True, slots=True)
class Sketches:
    """All that was found.

    Attributes:
        sites: Sites.
        regions: Regions.
    """

    sites: int
    regions: int
    accuracy: tuple[Accuracy, ...]
    trust: Trust


def measure_sketches(effort: Effort, say: Callable[[str], None]) -> Sketches:
    """Make sketches of the values of many sites."""
    found = []
    for name, make in KINDS.items():
        found.append(_accuracy(name, make, effort.sketched, effort.sketch_rounds))
        say(f"sketches: {name}")
    trust = _trust(effort.sketched, effort.sketch_rounds)
    return Sketches(effort.sketched, REGIONS, tuple(found), trust)


def trimmed_mean_of_weighted(values: Values, weights: Values, alpha: float = ALPHA) -> float:
    """Return the mean of what is left when a share is trimmed from either end, by weight.

    A value at an edge is left in part. With weights of 1 it is the trimmed mean that the server computes.

    Args:
        values: any order.
        weights: how many sites each stands for.
        alpha: share that is trimmed of each end; of n sites, at least the next whole number.
    """
    order = np.argsort(values, kind="stable")
    ends = np.cumsum(weights[order])
    total = float(ends[-1])
    cut = math.ceil(alpha * total - 1e-9)
    inside = np.clip(ends, cut, total - cut) - np.clip(ends - weights[order], cut, total - cut)
    kept = inside > 0.0
    return float(inside[kept] @ values[order][kept] / inside.sum())


def _trimmed_mean(sketch: Sketch) -> float:
    if not _tells_items(sketch):
        # It does not tell what it keeps: the mean of many quantiles between the ends.
        ranks = np.linspace(ALPHA, 1.0 - ALPHA, 1601)
        return float(np.mean([sketch.get_quantile(float(rank)) for rank in ranks]))
    return trimmed_mean_of_weighted(*_items(sketch))


def _tells_items(sketch: Sketch) -> bool:
    return not isinstance(sketch, datasketches.tdigest_double)


def _items(sketch: Sketch) -> tuple[Values, Values]:
    pairs = np.array(list(sketch), dtype=np.float64)
    return pairs[:, 0], pairs[:, 1]


def _exact(values: Values) -> float:
    ordered = np.sort(values)
    cut = math.ceil(ALPHA * len(values) - 1e-9)
    return float(ordered[cut : len(values) - cut].mean())


def _sketched(values: Values, make: Callable[[], Sketch]) -> Sketch:
    made = make()
    made.update(values.astype(np.float32) if "floats" in type(made).__name__ else values)
    return made


def _merged(parts: Iterable[Sketch], make: Callable[[], Sketch]) -> Sketch:
    made = make()
    for part in parts:
        made.merge(part)
    return made


def _size(sketch: Sketch) -> int:
    return len(sketch.serialize())


def _accuracy(name: str, make: Callable[[], Sketch], sites: int, rounds: int) -> Accuracy:
    random = np.random.default_rng(7)
    means, joined, medians, sizes, parts_sizes, add_s, merge_s = [], [], [], [], [], 0.0, 0.0
    broken: dict[str, list[bool]] = {f"{share:.1%}": [] for share in LIARS}
    rank_error = None
    for _ in range(rounds):
        values = random.normal(size=sites)
        begun = time.perf_counter()
        parts = [_sketched(part, make) for part in np.split(values, REGIONS)]
        add_s += time.perf_counter() - begun
        begun = time.perf_counter()
        merged = _merged(parts, make)
        merge_s += time.perf_counter() - begun
        exact = _exact(values)
        means.append(_trimmed_mean(merged) - exact)
        if _tells_items(merged):
            joined.append(_joined(parts) - exact)
        medians.append(merged.get_quantile(0.5) - float(np.median(values)))
        sizes.append(_size(merged))
        parts_sizes.append(_size(parts[0]))
        if hasattr(merged, "normalized_rank_error"):
            rank_error = float(merged.normalized_rank_error(False))
        for share in LIARS:
            lying = values.copy()
            lying[: math.floor(share * sites)] = FAR
            random.shuffle(lying)
            told = _merged((_sketched(part, make) for part in np.split(lying, REGIONS)), make)
            broken[f"{share:.1%}"].append(abs(_trimmed_mean(told)) > BROKEN)
    return Accuracy(
        kind=name,
        merged_bytes=float(np.mean(sizes)),
        region_bytes=float(np.mean(parts_sizes)),
        rank_error=rank_error,
        trimmed_mean_error=_rms(means),
        joined_error=_rms(joined) if joined else None,
        median_error=_rms(medians),
        broken={share: float(np.mean(found)) for share, found in broken.items()},
        add_s=add_s / rounds / sites,
        merge_s=merge_s / rounds / REGIONS,
    )


def _trust(sites: int, rounds: int) -> Trust:
    make = KINDS[CHOSEN]
    random = np.random.default_rng(8)
    exact, inserted, replaced = [], [], []
    for _ in range(rounds):
        now = random.normal(size=sites)
        exact.append(_exact(now))
        one = make()
        for turn in range(AGAIN):
            one.update(now - DRIFT * (AGAIN - 1 - turn))
        anew = [_sketched(part, make) for part in np.split(now, REGIONS)]
        inserted.append(_trimmed_mean(one) - exact[-1])
        replaced.append(_joined(anew) - exact[-1])
    eager_share, eager_times = 0.01, 20
    eager_one, eager_anew, claimed, capped, aimed = [], [], [], [], []
    members = sites // REGIONS
    aimed_each = math.ceil(ALPHA * members) + 1
    aimed_regions = REGIONS // 5
    for _ in range(rounds):
        values = random.normal(size=sites)
        liars = math.floor(eager_share * sites)
        lying = values.copy()
        lying[:liars] = FAR
        one = make()
        one.update(np.concatenate([lying, np.full(liars * (eager_times - 1), FAR)]))
        eager_one.append(_is_broken([one]))
        eager_anew.append(_is_broken([_sketched(part, make) for part in np.split(lying, REGIONS)]))
        regions = [_sketched(part, make) for part in np.split(values, REGIONS)]
        regions[0] = _sketched(np.full(sites, FAR), make)
        claimed.append(_is_broken(regions))
        capped.append(_is_broken(regions, capped=True))
        parts = [part.copy() for part in np.split(values, REGIONS)]
        for part in parts[:aimed_regions]:
            part[:aimed_each] = FAR
        aimed.append(_is_broken([_sketched(part, make) for part in parts]))
    return Trust(
        exact_error=_rms(exact),
        drift_inserted=_rms(inserted),
        drift_replaced=_rms(replaced),
        eager_share=eager_share,
        eager_inserted=float(np.mean(eager_one)),
        eager_replaced=float(np.mean(eager_anew)),
        claimed=float(np.mean(claimed)),
        claimed_capped=float(np.mean(capped)),
        aimed_share=aimed_each * aimed_regions / sites,
        aimed_merged=float(np.mean(aimed)),
    )


def _is_broken(regions: Sequence[Sketch], *, capped: bool = False) -> bool:
    return abs(_joined(regions, capped=capped)) > BROKEN


def _joined(regions: Sequence[Sketch], *, capped: bool = False) -> float:
    """Return the trimmed mean of what the sketches of regions keep, taken together.

    Args:
        regions: One each.
        capped: Whether none counts for more sites than the median one.
    """
    most = float(np.median([sketch.n for sketch in regions])) if capped else math.inf
    values, weights = [], []
    for sketch in regions:
        items, counts = _items(sketch)
        values.append(items)
        weights.append(counts * min(1.0, most / sketch.n))
    return trimmed_mean_of_weighted(np.concatenate(values), np.concatenate(weights))


def _rms(errors: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))
