"""Warm starts and contexts: what the sites most like the asking one have settled on.

A regime is a regime tag; a site without a tag is a regime of its own, named after the site.
Nothing is said about values of fewer than `min_sites` sites: a median of one site would be that
site's own value under another name.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from fmi_server.aggregation.estimates import EstimateTable
from fmi_server.aggregation.estimators import EstimatorSettings
from fmi_server.aggregation.prior import CohortMatrix

__all__ = [
    "INIT_SECTIONS",
    "MAX_REGIMES",
    "ContextReport",
    "InitValue",
    "RegimeContext",
    "SiteContext",
    "SiteGroups",
    "WarmStart",
    "WarmStartRequest",
    "WarmStartSource",
    "describe_contexts",
    "warm_start",
]

WarmStartSource = Literal["profile_and_regime", "regime", "profile_class", "cohort", "none"]

MAX_REGIMES = 256
"""Regimes that are described, those of most sites first."""

INIT_SECTIONS = frozenset({"controller", "evaluator", "operators"})
"""Sections whose signals are parameters; `metrics` are outcomes and start nothing."""


@dataclass(frozen=True, slots=True)
class SiteContext:
    """Describe a site: its profile class, regime tag (empty: none) and concept scores."""

    site_id: str
    profile_class: str = ""
    regime_tag: str = ""
    concepts: Mapping[str, float] = field(default_factory=dict)


class SiteGroups:
    """Sites by profile class and by regime tag, grouped once for as many warm starts as are wanted.

    Attributes:
        by_class: ids of the sites of each profile class.
        by_tag: sites of each regime.
        untagged_sites: how many stand in none, because they have no tag.
    """

    def __init__(self, contexts: Iterable[SiteContext]) -> None:
        self.by_class: dict[str, list[str]] = defaultdict(list)
        self.by_tag: dict[str, list[SiteContext]] = defaultdict(list)
        self.untagged_sites = 0
        for site in contexts:
            self.by_class[site.profile_class].append(site.site_id)
            if site.regime_tag:
                self.by_tag[site.regime_tag].append(site)
            else:
                self.untagged_sites += 1


@dataclass(frozen=True, slots=True)
class WarmStartRequest:
    """Ask for a warm start; every part may be left empty."""

    profile_class: str = ""
    regime_tag: str = ""
    concepts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RegimeContext:
    """Describe a regime.

    Attributes:
        name: regime tag.
        sites: sites in it.
        concepts: median score per concept, where at least `min_sites` sites gave one.
        settings: robust median per signal, where at least `min_sites` sites sent one.
        withheld: None, or why the regime is not described: `below_quorum` when it has too few sites,
            `over_limit` when `MAX_REGIMES` others have more.
    """

    name: str
    sites: int
    concepts: Mapping[str, float]
    settings: Mapping[str, float]
    withheld: str | None


@dataclass(frozen=True, slots=True)
class ContextReport:
    """List the tagged regimes, and how many sites without a tag stand alone and unnamed."""

    regimes: tuple[RegimeContext, ...]
    untagged_sites: int


@dataclass(frozen=True, slots=True)
class InitValue:
    """Hold one initial value, where it came from and how many sites stand behind it."""

    value: float
    lower: float | None
    upper: float | None
    sites: int
    confidence: float
    source: WarmStartSource


@dataclass(frozen=True, slots=True)
class WarmStart:
    """Hold a warm start.

    Attributes:
        profile_class: as asked.
        init: initial values by signal.
        source: the most specific source any value came from; `none` without values.
        regime: regime that was matched, or None.
        regime_distance: 0 for an equal tag, else the distance of the concept vectors; None
            without a match.
        shared_concepts: concepts the distance was taken over.
    """

    profile_class: str
    init: Mapping[str, InitValue]
    source: WarmStartSource
    regime: str | None
    regime_distance: float | None
    shared_concepts: tuple[str, ...]


def describe_contexts(
    matrix: CohortMatrix,
    groups: SiteGroups,
    settings: EstimatorSettings,
) -> ContextReport:
    """Describe each tagged regime by the medians of its concepts and settings.

    A regime of fewer than `min_sites` sites is listed by its tag with its number of sites and
    without values; its name may be the doing of a single site, and whoever publishes the report
    leaves it out. Sites without a tag are counted only; their ids are not published.
    """
    by_tag = groups.by_tag
    large = [tag for tag, members in by_tag.items() if len(members) >= settings.min_sites]
    described = set(sorted(large, key=lambda tag: (-len(by_tag[tag]), tag))[:MAX_REGIMES])
    regimes = []
    for tag in sorted(by_tag):
        members = by_tag[tag]
        if tag not in described:
            withheld = "over_limit" if len(members) >= settings.min_sites else "below_quorum"
            regimes.append(RegimeContext(tag, len(members), {}, {}, withheld))
            continue
        table = matrix.estimate_sites(
            [site.site_id for site in members],
            replace(settings, name="median"),
            group=("regime", tag),
        )
        values = {
            name: float(value)
            for name, value in zip(matrix.signals, table.value, strict=True)
            if not math.isnan(value)
        }
        concepts = _median_concepts(members, settings.min_sites)
        regimes.append(RegimeContext(tag, len(members), concepts, values, None))
    return ContextReport(tuple(regimes), groups.untagged_sites)


def warm_start(
    matrix: CohortMatrix,
    groups: SiteGroups,
    request: WarmStartRequest,
    settings: EstimatorSettings,
    *,
    reputation: Mapping[str, float] | None = None,
    sections: frozenset[str] = INIT_SECTIONS,
) -> WarmStart:
    """Give initial values for a site, each from the most specific group that can speak.

    Per signal the first of these groups with `min_sites` sites decides: sites of the asked
    profile class in the nearest regime, the nearest regime, the profile class, the cohort. Each
    value names its group; `settings` is the estimator in all of them.

    The nearest regime is the one with the asked tag, else the one with the smallest root mean
    square difference of the concept scores over the shared concepts. It must share at least half
    of the asked concepts, or a regime that shares one concept by chance would win. Distance, not
    angle: with one shared concept every angle is zero. Regimes below `min_sites` sites are not
    matched, because nothing could be said about them.
    """
    regime, distance, shared = _nearest_regime(groups.by_tag, request, settings.min_sites)
    wanted = [
        (row, name)
        for row, name in enumerate(matrix.signals)
        if matrix.section_of(name) in sections
    ]
    init: dict[str, InitValue] = {}
    source: WarmStartSource = "none"
    for label, group, members in _from_near_to_far(matrix, groups, request.profile_class, regime):
        if len(members) >= settings.min_sites:
            table = matrix.estimate_sites(members, settings, reputation, group=group)
            found = _init_values(table, [(r, n) for r, n in wanted if n not in init], label)
            init.update(found)
            if found and source == "none":
                source = label
        if len(init) == len(wanted):
            break
    return WarmStart(request.profile_class, init, source, regime, distance, shared)


def _init_values(
    table: EstimateTable, wanted: Iterable[tuple[int, str]], source: WarmStartSource
) -> dict[str, InitValue]:
    values = {}
    for row, name in wanted:
        found = table.row(row)
        if found.value is not None:
            values[name] = InitValue(
                found.value, found.lower, found.upper, found.sites, found.confidence, source
            )
    return values


def _from_near_to_far(
    matrix: CohortMatrix, groups: SiteGroups, profile_class: str, regime: str | None
) -> Iterator[tuple[WarmStartSource, tuple[str | None, ...], Sequence[str]]]:
    """Yield each group with the name under which its estimates are kept."""
    of_class = groups.by_class.get(profile_class, []) if profile_class else []
    of_regime = [] if regime is None else [site.site_id for site in groups.by_tag[regime]]
    both = list(set(of_class).intersection(of_regime))
    yield "profile_and_regime", ("both", profile_class, regime), both
    yield "regime", ("regime", regime), of_regime
    yield "profile_class", ("class", profile_class), of_class
    yield "cohort", (), matrix.sites


def _median_concepts(members: Sequence[SiteContext], min_sites: int) -> dict[str, float]:
    scores: dict[str, list[float]] = defaultdict(list)
    for site in members:
        for concept, score in site.concepts.items():
            scores[concept].append(score)
    return {
        concept: float(np.median(found))
        for concept, found in sorted(scores.items())
        if len(found) >= min_sites
    }


def _nearest_regime(
    by_tag: Mapping[str, Sequence[SiteContext]], request: WarmStartRequest, min_sites: int
) -> tuple[str | None, float | None, tuple[str, ...]]:
    if len(by_tag.get(request.regime_tag, ())) >= min_sites:
        return request.regime_tag, 0.0, ()
    if not request.concepts:
        return None, None, ()
    best: tuple[float, str, tuple[str, ...]] | None = None
    for tag, members in by_tag.items():
        if len(members) < min_sites:
            continue
        vector = _median_concepts(members, min_sites)
        shared = tuple(sorted(vector.keys() & request.concepts.keys()))
        if not shared or 2 * len(shared) < len(request.concepts):
            continue
        # hypot, because the squares of what a site may ask for can be past the largest number.
        gap = math.hypot(*(vector[concept] - request.concepts[concept] for concept in shared))
        candidate = (gap / math.sqrt(len(shared)), tag, shared)
        best = candidate if best is None else min(best, candidate)
    if best is None:
        return None, None, ()
    return best[1], best[0], best[2]
