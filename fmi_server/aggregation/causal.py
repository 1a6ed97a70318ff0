"""Causal consensus: which edges the sites agree on, how strongly, and where they contradict."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fmi_server.aggregation.estimators import EstimatorSettings, estimate, trim_count
from fmi_server.aggregation.graph import strong_components
from fmi_server.aggregation.pooling import pool_random_effects
from fmi_server.aggregation.quantiles import wilson_lower_bound
from fmi_server.aggregation.weights import site_weights

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
    """

    estimator: EstimatorSettings = field(default_factory=EstimatorSettings)
    support_level: float = 0.95
    sign_agreement: float = 2.0 / 3.0


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
    """Name an edge that is not in the consensus: `below_quorum` or `self_loop`.

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
    """Hold the consensus: pooled edges, edges left out with their reason, and cycles."""

    edges: tuple[ConsensusEdge, ...]
    unpooled: tuple[UnpooledEdge, ...]
    cycles: tuple[CausalCycle, ...]
    sites: int


@dataclass(slots=True)
class _SiteView:
    tested: set[str]
    pairs: dict[EdgeKey, CausalPair]
    trust: float


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
    `min(trust, median trust) * reputation`.

    Raises:
        ValueError: a weight is not finite, a standard error is not positive, or a trust lies
            outside 0..1.
    """
    settings = settings or CausalSettings()
    views = _site_views(summaries)
    reporters: dict[EdgeKey, list[str]] = defaultdict(list)
    for site in sorted(views):
        for key in views[site].pairs:
            reporters[key].append(site)
    edges: list[ConsensusEdge] = []
    unpooled: list[UnpooledEdge] = []
    for key in sorted(reporters):
        found = reporters[key]
        ends = {key[0], key[1]}
        testable = sum(1 for view in views.values() if ends <= view.tested)
        if key[0] == key[1]:
            unpooled.append(UnpooledEdge(key, len(found), testable, "self_loop"))
        elif len(found) < settings.estimator.min_sites:
            unpooled.append(UnpooledEdge(key, len(found), testable, "below_quorum"))
        else:
            edges.append(_pooled(key, found, testable, views, settings, reputation))
    edges, cycles = _flagged(edges)
    return CausalConsensus(tuple(edges), tuple(unpooled), cycles, len(views))


def _site_views(summaries: Iterable[CausalSummary]) -> dict[str, _SiteView]:
    views: dict[str, _SiteView] = {}
    for summary in sorted(summaries, key=lambda s: s.at):
        tested = set(summary.tested_nodes)
        for pair in summary.pairs:
            if not math.isfinite(pair.weight):
                raise ValueError(f"site {summary.site_id!r}: edge weight must be finite")
            if pair.stderr is not None and not (math.isfinite(pair.stderr) and pair.stderr > 0):
                raise ValueError(f"site {summary.site_id!r}: stderr must be positive")
            # Who reports a pair has tested it, whatever the list says.
            tested |= {pair.source, pair.target}
        view = views.setdefault(summary.site_id, _SiteView(set(), {}, summary.trust))
        for key in [k for k in view.pairs if {k[0], k[1]} <= tested]:
            del view.pairs[key]
        view.pairs.update({(p.source, p.target, p.type): p for p in summary.pairs})
        view.tested |= tested
        view.trust = summary.trust
    return views


def _pooled(
    key: EdgeKey,
    found: Sequence[str],
    testable: int,
    views: Mapping[str, _SiteView],
    settings: CausalSettings,
    reputation: Mapping[str, float] | None,
) -> ConsensusEdge:
    rules = settings.estimator
    pairs = [views[site].pairs[key] for site in found]
    weights = np.array([pair.weight for pair in pairs])
    positive, negative = int((weights > 0.0).sum()), int((weights < 0.0).sum())
    minority_limit = (1.0 - settings.sign_agreement) * len(found) + 1e-9
    edge = ConsensusEdge(
        source=key[0],
        target=key[1],
        type=key[2],
        weight=0.0,
        stderr=None,
        lower=None,
        upper=None,
        sites=len(found),
        testable=testable,
        support=wilson_lower_bound(len(found), testable, settings.support_level),
        positive=positive,
        negative=negative,
        method="",
        pooled_sites=len(found),
        i_squared=None,
        tau_squared=None,
        sign_conflict=min(positive, negative) > minority_limit,
    )
    measured = [(pair.weight, pair.stderr) for pair in pairs if pair.stderr is not None]
    cut = int(trim_count(np.array([len(measured)]), rules)[0])
    enough = len(measured) >= rules.min_sites and 2 * len(measured) >= len(found)
    if enough and len(measured) - 2 * cut >= 2:
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
    trust = site_weights(found, [views[site].trust for site in found], reputation)
    table = estimate(weights[None, :], trust, rules)
    row = table.row(0)
    return replace(
        edge,
        weight=float(table.value[0]),
        stderr=row.stderr,
        lower=row.lower,
        upper=row.upper,
        method=str(table.used[0]),
    )


def _flagged(
    edges: Sequence[ConsensusEdge],
) -> tuple[list[ConsensusEdge], tuple[CausalCycle, ...]]:
    keys = {edge.key for edge in edges}
    successors: dict[str, list[str]] = defaultdict(list)
    for edge in edges:
        successors[edge.source].append(edge.target)
    cycles = []
    cyclic: set[EdgeKey] = set()
    for nodes in strong_components(successors):
        if len(nodes) < 2:
            continue
        members = set(nodes)
        inside = [e for e in edges if e.source in members and e.target in members]
        weakest = min(inside, key=lambda e: (e.support, abs(e.weight), e.key))
        cyclic |= {edge.key for edge in inside}
        cycles.append(CausalCycle(nodes, tuple(e.key for e in inside), weakest.key))
    flagged = [
        replace(
            edge,
            direction_conflict=(edge.target, edge.source, edge.type) in keys,
            in_cycle=edge.key in cyclic,
        )
        for edge in edges
    ]
    return flagged, tuple(sorted(cycles, key=lambda cycle: cycle.nodes))
