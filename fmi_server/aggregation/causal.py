"""Causal consensus: which edges the sites agree on, how strongly, and where they contradict."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fmi_server.aggregation.estimates import Estimate
from fmi_server.aggregation.estimators import EstimatorSettings, estimate, trim_count
from fmi_server.aggregation.graph import strong_components
from fmi_server.aggregation.pooling import pool_random_effects
from fmi_server.aggregation.quantiles import t_quantile, wilson_lower_bound
from fmi_server.aggregation.weights import site_reputations

__all__ = [
    "CausalConsensus",
    "CausalCycle",
    "CausalPair",
    "CausalSettings",
    "CausalSummary",
    "ConsensusEdge",
    "EdgeKey",
    "UnpooledEdge",
    "pool_causes",
]

_MEDIAN_INFLATION = math.sqrt(math.pi / 2.0)
# Standard error of a median beside that of a mean, for normal errors.

EdgeKey = tuple[str, str, str]
"""Source, target, type."""


@dataclass(frozen=True, slots=True)
class CausalPair:
    """Describe one edge that a site found."""

    source: str
    target: str
    weight: float
    type: str = ""
    stderr: float | None = None


@dataclass(frozen=True, slots=True)
class CausalSummary:
    """Describe what one site found.

    Attributes:
        site_id: authenticated site.
        pairs: edges it found.
        tested_nodes: nodes among which it looked; empty means the nodes of its pairs.
        trust: declared trust, 0..1.
        at: time in seconds; a later summary of a site corrects an earlier one.
    """

    site_id: str
    pairs: tuple[CausalPair, ...]
    tested_nodes: frozenset[str] = frozenset()
    trust: float = 1.0
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class CausalSettings:
    """Hold the rules of a consensus.

    Attributes:
        estimator: quorum (`min_sites`), trimming and interval level.
        support_level: one-sided confidence of the support.
        sign_agreement: below this share of one sign, the edge is in sign conflict.
        max_edges: edges that are pooled, and edges left out that are named; those that most sites
            report go first.
    """

    estimator: EstimatorSettings = field(default_factory=EstimatorSettings)
    support_level: float = 0.95
    sign_agreement: float = 2.0 / 3.0
    max_edges: int = 4096


@dataclass(frozen=True, slots=True)
class ConsensusEdge:
    """Hold one pooled edge.

    Attributes:
        source: cause.
        target: effect.
        type: kind of edge.
        weight: pooled weight.
        stderr: its standard error, or None.
        lower: lower end of the interval, or None.
        upper: upper end of the interval, or None.
        sites: sites that reported the edge.
        testable: sites that could have tested the pair.
        support: Wilson lower bound of sites / testable.
        positive: sites with a positive weight.
        negative: sites with a negative weight.
        method: `dersimonian_laird_hksj`, `trimmed_mean`, `median`, ... as really applied.
        pooled_sites: sites that went into the weight; fewer than `sites` when some of them gave
            no standard error and the others sufficed.
        i_squared: heterogeneity 0..1, or None where it cannot be known.
        tau_squared: variance between sites, or None.
        sign_conflict: the sites do not agree on the sign.
        direction_conflict: the reverse edge of the same type is in the consensus too.
        in_cycle: the edge lies on a directed cycle.
    """

    source: str
    target: str
    type: str
    weight: float
    stderr: float | None
    lower: float | None
    upper: float | None
    sites: int
    testable: int
    support: float
    positive: int
    negative: int
    method: str
    pooled_sites: int
    i_squared: float | None
    tau_squared: float | None
    sign_conflict: bool
    direction_conflict: bool = False
    in_cycle: bool = False

    @property
    def key(self) -> EdgeKey:
        """Return what identifies the edge."""
        return (self.source, self.target, self.type)


@dataclass(frozen=True, slots=True)
class UnpooledEdge:
    """Name an edge that is not in the consensus: `below_quorum`, `self_loop` or `over_limit`.

    It may come from a single site; whoever publishes it decides whether that may be said.
    """

    key: EdgeKey
    sites: int
    testable: int
    reason: str


@dataclass(frozen=True, slots=True)
class CausalCycle:
    """Name a strongly connected component and its weakest edge.

    The weakest edge has the least support, then the smallest absolute weight. The cycle is
    flagged, not broken.
    """

    nodes: tuple[str, ...]
    edges: tuple[EdgeKey, ...]
    weakest: EdgeKey


@dataclass(frozen=True, slots=True)
class CausalConsensus:
    """Hold the consensus.

    Attributes:
        edges: pooled edges.
        unpooled: edges left out, with their reason; at most `max_edges`, those of most sites.
        cycles: cycles among the pooled edges.
        sites: sites with a summary.
        left_out: how many edges were left out, by reason: all, also those not named.
    """

    edges: tuple[ConsensusEdge, ...]
    unpooled: tuple[UnpooledEdge, ...]
    cycles: tuple[CausalCycle, ...]
    sites: int
    left_out: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _SiteView:
    tested: Collection[str]
    pairs: dict[EdgeKey, CausalPair]
    trust: float


@dataclass(frozen=True, slots=True)
class _Reported:
    """An edge, and of each site that reports it the number, and the pair."""

    key: EdgeKey
    sites: list[int]
    pairs: list[CausalPair]


def pool_causes(
    summaries: Iterable[CausalSummary],
    settings: CausalSettings | None = None,
    reputation: Mapping[str, float] | None = None,
) -> CausalConsensus:
    """Pool the sites' edges per (source, target, type).

    A site has one vote per edge, its newest. A later summary that tested both nodes and does not
    report an edge any more takes it back. Edges reported by `min_sites` sites are pooled:
    with standard errors from `min_sites` sites that are at least half of the reporters by
    `pool_random_effects`, else by `settings.estimator` with weights
    `min(trust, median trust) * reputation`. Where too few survive the trimming for random effects,
    the standard error is at least that of a median of effects with the declared errors. No more
    than `max_edges` are pooled, those of most sites first; the rest are counted.

    Raises:
        ValueError: a weight is not finite, a standard error is not positive, or a trust lies
            outside 0..1.
    """
    settings = settings or CausalSettings()
    views = _site_views(summaries)
    names = sorted(views)
    reported: dict[EdgeKey, _Reported] = {}
    for number, site in enumerate(names):
        for key, pair in views[site].pairs.items():
            edge = reported.get(key)
            if edge is None:
                reported[key] = _Reported(key, [number], [pair])
            else:
                edge.sites.append(number)
                edge.pairs.append(pair)
    pooled: list[_Reported] = []
    others: list[tuple[_Reported, str]] = []
    left_out: Counter[str] = Counter()
    for edge in sorted(reported.values(), key=lambda edge: (-len(edge.sites), edge.key)):
        reason = _why_not(edge, len(pooled), settings)
        if reason is None:
            pooled.append(edge)
            continue
        left_out[reason] += 1
        if len(others) < settings.max_edges:
            others.append((edge, reason))
    testers = _Testers(views, names, [*pooled, *(edge for edge, _ in others)])
    unpooled = [
        UnpooledEdge(edge.key, len(edge.sites), testers.both(edge.key), reason)
        for edge, reason in others
    ]
    trust = np.array([views[site].trust for site in names], dtype=np.float64)
    if not ((trust >= 0.0) & (trust <= 1.0)).all():
        raise ValueError("declared trust must lie in 0..1")
    edges, cycles = _flagged(
        _pooled(pooled, testers, trust, site_reputations(names, reputation), settings)
    )
    return CausalConsensus(
        edges=tuple(edges),
        unpooled=tuple(sorted(unpooled, key=lambda edge: edge.key)),
        cycles=cycles,
        sites=len(views),
        left_out=left_out,
    )


def _why_not(edge: _Reported, pooled: int, settings: CausalSettings) -> str | None:
    if edge.key[0] == edge.key[1]:
        return "self_loop"
    if len(edge.sites) < settings.estimator.min_sites:
        return "below_quorum"
    return "over_limit" if pooled >= settings.max_edges else None


def _site_views(summaries: Iterable[CausalSummary]) -> dict[str, _SiteView]:
    """Return per site what stands after all its summaries, in time linear in what they hold."""
    by_site: dict[str, list[CausalSummary]] = defaultdict(list)
    for summary in sorted(summaries, key=lambda s: s.at):
        by_site[summary.site_id].append(summary)
    views = {}
    for site, held in by_site.items():
        pairs: dict[EdgeKey, CausalPair] = {}
        # Per node one bit for each newer summary that tested it.
        tested_in: dict[str, int] = defaultdict(int)
        for bit, summary in enumerate(reversed(held)):
            tested, found = set(summary.tested_nodes), {}
            for pair in summary.pairs:
                _check(site, pair)
                # Who reports a pair has tested it, whatever the list says.
                tested |= {pair.source, pair.target}
                if not tested_in.get(pair.source, 0) & tested_in.get(pair.target, 0):
                    found[pair.source, pair.target, pair.type] = pair
            pairs.update(found)
            for node in tested:
                tested_in[node] |= 1 << bit
        views[site] = _SiteView(tested_in.keys(), pairs, held[-1].trust)
    return views


def _check(site: str, pair: CausalPair) -> None:
    if not math.isfinite(pair.weight):
        raise ValueError(f"site {site!r}: edge weight must be finite")
    if pair.stderr is not None and not (math.isfinite(pair.stderr) and pair.stderr > 0):
        raise ValueError(f"site {site!r}: stderr must be positive")


class _Testers:
    """Count the sites that tested both ends of an edge, by one bit per node and site."""

    def __init__(
        self, views: Mapping[str, _SiteView], names: Sequence[str], edges: Iterable[_Reported]
    ) -> None:
        width = len(names) // 8 + 1
        bits = {node: bytearray(width) for edge in edges for node in edge.key[:2]}
        for number, site in enumerate(names):
            for node in views[site].tested:
                if node in bits:
                    bits[node][number >> 3] |= 1 << (number & 7)
        self._sites = {node: int.from_bytes(found) for node, found in bits.items()}

    def both(self, key: EdgeKey) -> int:
        return (self._sites[key[0]] & self._sites[key[1]]).bit_count()


def _pooled(
    reported: Sequence[_Reported],
    testers: _Testers,
    trust: NDArray[np.float64],
    reputation: NDArray[np.float64],
    settings: CausalSettings,
) -> list[ConsensusEdge]:
    edges: list[ConsensusEdge] = []
    # By number of sites, so that those without standard errors are estimated all at once.
    unmeasured: dict[int, list[tuple[_Reported, ConsensusEdge]]] = defaultdict(list)
    for found in reported:
        edge = _counted(found, testers.both(found.key), settings)
        measured = _measured(found, edge, settings)
        if measured is None:
            unmeasured[edge.sites].append((found, edge))
        else:
            edges.append(measured)
    for group in unmeasured.values():
        numbers = np.array([found.sites for found, _ in group], dtype=np.int64)
        values = np.array([[pair.weight for pair in found.pairs] for found, _ in group])
        stated = trust[numbers]
        capped = np.minimum(stated, np.median(stated, axis=1, keepdims=True))
        table = estimate(values, capped * reputation[numbers], settings.estimator)
        edges.extend(
            _estimated(found, edge, table.row(row), settings.estimator)
            for row, (found, edge) in enumerate(group)
        )
    return sorted(edges, key=lambda edge: edge.key)


def _estimated(
    found: _Reported, edge: ConsensusEdge, own: Estimate, rules: EstimatorSettings
) -> ConsensusEdge:
    """Fill in an estimate that does not use the declared standard errors, but is not surer than they."""
    weight = float(own.value or 0.0)
    stderr, lower, upper = own.stderr, own.lower, own.upper
    declared = [pair.stderr for pair in found.pairs if pair.stderr is not None]
    if len(declared) >= rules.min_sites and 2 * len(declared) >= edge.sites > 1:
        least = _MEDIAN_INFLATION * float(np.median(declared)) / math.sqrt(edge.sites)
        if stderr is None or stderr < least:
            margin = t_quantile(edge.sites - 1, rules.interval_level) * least
            stderr, lower, upper = least, weight - margin, weight + margin
    return replace(
        edge, weight=weight, stderr=stderr, lower=lower, upper=upper, method=str(own.used)
    )


def _counted(found: _Reported, testable: int, settings: CausalSettings) -> ConsensusEdge:
    sites = len(found.sites)
    positive = sum(1 for pair in found.pairs if pair.weight > 0.0)
    negative = sum(1 for pair in found.pairs if pair.weight < 0.0)
    minority_limit = (1.0 - settings.sign_agreement) * sites + 1e-9
    return ConsensusEdge(
        source=found.key[0],
        target=found.key[1],
        type=found.key[2],
        weight=0.0,
        stderr=None,
        lower=None,
        upper=None,
        sites=sites,
        testable=testable,
        support=wilson_lower_bound(sites, testable, settings.support_level),
        positive=positive,
        negative=negative,
        method="",
        pooled_sites=sites,
        i_squared=None,
        tau_squared=None,
        sign_conflict=min(positive, negative) > minority_limit,
    )


def _measured(
    found: _Reported, edge: ConsensusEdge, settings: CausalSettings
) -> ConsensusEdge | None:
    """Pool by the standard errors, or return None where too few sites gave one."""
    rules = settings.estimator
    measured = [(pair.weight, pair.stderr) for pair in found.pairs if pair.stderr is not None]
    if len(measured) < rules.min_sites or 2 * len(measured) < edge.sites:
        return None
    # As many liars as may be among all sites may be among those that gave an error.
    cut = int(trim_count(np.array([edge.sites]), rules)[0])
    if len(measured) - 2 * cut < 2:
        return None
    effects, stderrs = np.array(measured, dtype=np.float64).T
    pooled = pool_random_effects(effects, stderrs, cut, rules.interval_level)
    return replace(
        edge,
        weight=pooled.value,
        stderr=pooled.stderr,
        lower=pooled.lower,
        upper=pooled.upper,
        method="dersimonian_laird_hksj",
        pooled_sites=len(measured),
        i_squared=pooled.i_squared,
        tau_squared=pooled.tau_squared,
    )


def _flagged(
    edges: Sequence[ConsensusEdge],
) -> tuple[list[ConsensusEdge], tuple[CausalCycle, ...]]:
    keys = {edge.key for edge in edges}
    successors: dict[str, list[str]] = defaultdict(list)
    for edge in edges:
        successors[edge.source].append(edge.target)
    component: dict[str, int] = {}
    components = [nodes for nodes in strong_components(successors) if len(nodes) > 1]
    for number, nodes in enumerate(components):
        component.update(dict.fromkeys(nodes, number))
    inside: dict[int, list[ConsensusEdge]] = defaultdict(list)
    for edge in edges:
        number = component.get(edge.source, -1)
        if number >= 0 and number == component.get(edge.target):
            inside[number].append(edge)
    cycles = []
    cyclic: set[EdgeKey] = set()
    for number, nodes in enumerate(components):
        weakest = min(inside[number], key=lambda e: (e.support, abs(e.weight), e.key))
        found = tuple(edge.key for edge in inside[number])
        cyclic.update(found)
        cycles.append(CausalCycle(nodes, found, weakest.key))
    flagged = [
        replace(
            edge,
            direction_conflict=(edge.target, edge.source, edge.type) in keys,
            in_cycle=edge.key in cyclic,
        )
        for edge in edges
    ]
    return flagged, tuple(sorted(cycles, key=lambda cycle: cycle.nodes))
