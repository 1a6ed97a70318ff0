"""CohortState: what is resident of one cohort, from packets to statistics.

A packet touches one column of the matrix of its cohort, and the records of its site. Everything that is
kept per site is bounded.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, cast

from fmi.plain import DEFAULT_PROFILE_CLASS
from fmi.rules import SECTIONS
from fmi.v1 import packet_pb2
from fmi_server.aggregation import (
    CausalConsensus,
    CausalPair,
    CausalSettings,
    CausalSummary,
    CohortMatrix,
    ContextReport,
    EstimatorName,
    EstimatorSettings,
    ParamValue,
    PolicyDecision,
    PolicyOutcome,
    PolicySettings,
    PriorRelease,
    ReputationBook,
    SiteContext,
    SiteGroups,
    WarmStart,
    WarmStartRequest,
    decide_policy,
    describe_contexts,
    pool_causes,
    warm_start,
)
from fmi_server.cohorts import CohortRules

__all__ = ["CohortState", "ReleasedStatistics", "SiteRecord"]

MAX_OUTCOMES_PER_SITE: Final = 256
"""Policy outcomes kept of one site; past it the oldest goes."""

MAX_SUMMARIES_PER_SITE: Final = 64
"""Causal summaries kept of one site; past it the oldest goes."""

MAX_CAUSAL_ITEMS_PER_SITE: Final = 5120
"""Causal pairs and tested nodes kept of one site, as many as the largest summary has; past it the oldest
summary goes."""

MAX_CLASSES_TOLD: Final = 256
"""Profile classes that get a warm start, those of most sites first."""

MAX_SIGNALS: Final = 4096
"""Signals that an open vocabulary may grow to."""


@dataclass(slots=True)
class SiteRecord:
    """What is kept of one site, besides its column.

    Attributes:
        profile_class: Of its newest packet.
        regime_tag: Of its newest packet that names one.
        concepts: Scores of its newest summary that has some.
        heard_at: Emission time of its newest packet, Unix seconds.
        outcomes: Its policy outcomes as a heap, oldest first.
        summaries: Its causal summaries as a heap, oldest first.
        causal_items: Pairs and tested nodes in them.
        causes_after: Emission time and packet of the newest summary that had to go; what is not newer
            stays out, so that the order of packets does not matter.
    """

    profile_class: str = DEFAULT_PROFILE_CLASS
    regime_tag: str = ""
    concepts: dict[str, float] = field(default_factory=dict)
    heard_at: float = float("-inf")
    regime_at: float = float("-inf")
    concepts_at: float = float("-inf")
    outcomes: list[tuple[float, str, PolicyOutcome]] = field(default_factory=list)
    summaries: list[tuple[float, str, CausalSummary]] = field(default_factory=list)
    causal_items: int = 0
    causes_after: tuple[float, str] = (float("-inf"), "")

    def keep_outcome(self, entry: tuple[float, str, PolicyOutcome]) -> None:
        """Keep an outcome, and let the oldest go where there are too many. An outcome counts once."""
        if any(held[:2] == entry[:2] for held in self.outcomes):
            return
        if len(self.outcomes) < MAX_OUTCOMES_PER_SITE:
            heapq.heappush(self.outcomes, entry)
        else:
            heapq.heappushpop(self.outcomes, entry)

    def keep_summary(self, entry: tuple[float, str, CausalSummary]) -> None:
        """Keep a summary, and let the oldest go where they hold too much. A summary counts once."""
        if entry[:2] <= self.causes_after or any(held[:2] == entry[:2] for held in self.summaries):
            return
        heapq.heappush(self.summaries, entry)
        self.causal_items += _causal_items(entry[2])
        while (
            len(self.summaries) > MAX_SUMMARIES_PER_SITE
            or self.causal_items > MAX_CAUSAL_ITEMS_PER_SITE
        ):
            gone = heapq.heappop(self.summaries)
            self.causal_items -= _causal_items(gone[2])
            self.causes_after = gone[:2]

    def drop_before(self, outcomes_from: float, summaries_from: float) -> bool:
        """Drop what is older; return whether anything was."""
        before = len(self.outcomes) + len(self.summaries)
        while self.outcomes and self.outcomes[0][0] < outcomes_from:
            heapq.heappop(self.outcomes)
        while self.summaries and self.summaries[0][0] < summaries_from:
            self.causal_items -= _causal_items(heapq.heappop(self.summaries)[2])
        return len(self.outcomes) + len(self.summaries) < before


@dataclass(frozen=True, slots=True)
class ReleasedStatistics:
    """The statistics of one release.

    Attributes:
        prior: Estimates of all signals.
        contexts: The regimes.
        warm_starts: By profile class; always with the class of sites that named none.
        class_sites: Sites by profile class.
        main_class: The profile class of most sites, among those with a warm start.
        policy: The hint, or why there is none.
        causes: The consensus.
        reputations: As they were used in the weights.
        packets: Packets counted, by type.
        outcome_sites: Sites with a policy outcome in the window.
    """

    prior: PriorRelease
    contexts: ContextReport
    warm_starts: dict[str, WarmStart]
    class_sites: Mapping[str, int]
    main_class: str
    policy: PolicyDecision
    causes: CausalConsensus
    reputations: dict[str, float]
    packets: Counter[str]
    outcome_sites: int


class CohortState:
    """The resident state of one cohort.

    Not thread-safe: one owner at a time.

    Args:
        rules: The cohort's rules.
        reputations: Of sites, from an earlier life of the server.

    Attributes:
        packets: Packets counted, by type.
        ignored: Values of accepted packets that could not be counted, by reason.
    """

    def __init__(self, rules: CohortRules, *, reputations: dict[str, float] | None = None) -> None:
        self.packets: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()
        self._sites: dict[str, SiteRecord] = {}
        self._touched: set[str] = set()
        self._trust = ReputationBook(reputation=reputations)
        self._matrix = CohortMatrix()
        self._rules = rules
        self.apply_rules(rules)

    @property
    def rules(self) -> CohortRules:
        """The rules in force."""
        return self._rules

    @property
    def quorum(self) -> bool:
        """Whether there are enough sites for anything to have a value."""
        return len(self._sites) >= self.min_sites

    @property
    def min_sites(self) -> int:
        """Sites needed before anything has a value.

        Where a cohort says how many liars it must withstand, that is at least twice as many and one: with
        fewer, the liars could be half of the sites, and no estimator could keep ROBUST.
        """
        return self._estimator.min_sites

    @property
    def sites(self) -> int:
        """Sites that are known."""
        return len(self._sites)

    def site(self, domain_id: str) -> SiteRecord | None:
        """Return what is kept of a site."""
        return self._sites.get(domain_id)

    def reputation(self, domain_id: str) -> float:
        """Return the reputation of a site, in 0..1."""
        return self._trust.of(domain_id)

    def reputations(self) -> dict[str, float]:
        """Return the reputations of all sites that were judged."""
        return self._trust.snapshot()

    def signals_in_use(self) -> dict[str, str]:
        """Return the section of each signal that a site has a value of."""
        return self._matrix.sections()

    def section_of(self, signal: str) -> str | None:
        """Return the section in which a signal stands in this cohort."""
        return self._matrix.section_of(signal)

    def apply_rules(self, rules: CohortRules) -> None:
        """Start with new rules. The matrix begins empty: its rows depend on the rules."""
        settings = rules.aggregation
        self._rules = rules
        self._estimator = EstimatorSettings(
            # AggregationConfig took only names that are known.
            name=cast("EstimatorName", settings.metrics_aggregation),
            trim_alpha=settings.metrics_trim_alpha,
            min_sites=max(settings.vote_min_sites, 2 * (settings.max_byzantine or 0) + 1),
            max_byzantine=settings.max_byzantine,
            weight_cap=settings.weight_cap,
        )
        self._matrix = CohortMatrix(
            rules.signals.values(), open_vocabulary=rules.free_signals, max_signals=MAX_SIGNALS
        )

    def count(self, packet: packet_pb2.Packet) -> None:
        """Count a packet that was validated and stored. The order of packets does not matter."""
        site = self._hear(packet)
        header = packet.header
        at = _emitted_at(packet)
        kind = packet.WhichOneof("body")
        if kind == "msp":
            self._count_signals(header.domain_id, packet.msp, at)
        elif kind == "pop":
            outcome = _outcome(header.domain_id, packet.pop)
            site.keep_outcome((at, header.packet_id, outcome))
        elif kind == "ccs":
            self._count_causes(site, packet, at)
        self.packets[kind or "unknown"] += 1

    def count_all(self, packets: Sequence[packet_pb2.Packet]) -> None:
        """Count many packets at once.

        The result is that of `count` for each. MSPs whose every signal is overtaken by a newer MSP of the
        same site among `packets` are not written to the matrix, which is what a packet costs.
        """
        # Of packets of one time the later in the list wins, as it does one by one.
        newest_first = sorted(
            (packet for packet in reversed(packets) if packet.HasField("msp")),
            key=_emitted_at,
            reverse=True,
        )
        written: dict[str, set[tuple[str, str]]] = {}
        overtaken: set[int] = set()
        for packet in newest_first:
            signals = set(_signals(packet.msp))
            seen = written.setdefault(packet.header.domain_id, set())
            if signals <= seen:
                overtaken.add(id(packet))
            else:
                seen |= signals
        for packet in packets:
            # A signal that is new may need a row now, whether the value is overtaken or not.
            if id(packet) in overtaken and all(
                self._matrix.holds(section, name) for section, name in _signals(packet.msp)
            ):
                self._hear(packet)
                self.packets["msp"] += 1
            else:
                self.count(packet)

    def replay(self, packets: Sequence[packet_pb2.Packet]) -> None:
        """Count packets that were counted before: in an earlier life, or under other rules.

        They are no news of a site, so they do not move the reputation it has.
        """
        news = set(self._touched)
        self.count_all(packets)
        self._touched = news | (self._touched - self._trust.snapshot().keys())

    def expire(self, now: float) -> bool:
        """Forget what is past its time; return whether anything was.

        Args:
            now: Unix seconds.
        """
        changed = bool(self._matrix.expire(now, self._rules.site_ttl_s))
        outcomes_from = now - self._rules.policy_window_s
        from_s = now - self._rules.site_ttl_s
        for domain_id in list(self._sites):
            site = self._sites[domain_id]
            changed |= site.drop_before(outcomes_from, from_s)
            if site.heard_at < from_s and not site.outcomes:
                del self._sites[domain_id]
                self._matrix.drop(domain_id)
                self._trust.forget(domain_id)
                changed = True
        return changed

    def release(self, now: float) -> ReleasedStatistics:
        """Compute the statistics of everything counted.

        Args:
            now: Unix seconds.
        """
        self.expire(now)
        self._judge()
        reputations = self._trust.snapshot()
        prior = self._matrix.release(self._estimator, reputations, now)
        groups = self._groups()
        classes = Counter({name: len(sites) for name, sites in groups.by_class.items()})
        quorum = self.min_sites
        # A class below the quorum gets no profile: it could say nothing of its own, and its name may be
        # the doing of a single site.
        large = (name for name, sites in classes.items() if sites >= quorum)
        largest = heapq.nsmallest(MAX_CLASSES_TOLD, large, key=lambda name: (-classes[name], name))
        told = {DEFAULT_PROFILE_CLASS, *largest}
        outcomes = [entry[2] for site in self._sites.values() for entry in site.outcomes]
        return ReleasedStatistics(
            prior=prior,
            contexts=describe_contexts(self._matrix, groups, self._estimator),
            warm_starts={
                name: warm_start(
                    self._matrix,
                    groups,
                    WarmStartRequest(profile_class=name),
                    self._estimator,
                    reputation=reputations,
                )
                for name in sorted(told)
            },
            class_sites=classes,
            main_class=max(sorted(told), key=lambda name: classes[name]),
            policy=decide_policy(
                outcomes,
                self._rules.signals.values(),
                PolicySettings(
                    estimator=self._estimator,
                    # A step without end puts every number into one class: as good as no step.
                    steps={
                        name: step
                        for name, step in self._rules.quantum.items()
                        if math.isfinite(step)
                    },
                    guardrails=self._rules.guardrails,
                ),
                cohort=self._rules.name,
                reputation=reputations,
            ),
            causes=pool_causes(
                (entry[2] for site in self._sites.values() for entry in site.summaries),
                CausalSettings(estimator=self._estimator),
                reputations,
            ),
            reputations={name: self._trust.of(name) for name in self._sites},
            packets=Counter(self.packets),
            outcome_sites=len({outcome.site_id for outcome in outcomes}),
        )

    def warm_start(self, request: WarmStartRequest) -> WarmStart:
        """Find the warm start for a site."""
        return warm_start(
            self._matrix,
            self._groups(),
            request,
            self._estimator,
            reputation=self._trust.snapshot(),
        )

    def signals_held(self) -> tuple[int, tuple[float | None, float | None]]:
        """Return how many sites hold a value, and the oldest and newest time of these."""
        return len(self._matrix.sites), self._matrix.window

    def _hear(self, packet: packet_pb2.Packet) -> SiteRecord:
        """Note what the header says of a site."""
        header = packet.header
        site = self._sites.setdefault(header.domain_id, SiteRecord())
        at = _emitted_at(packet)
        if at >= site.heard_at:
            site.heard_at = at
            site.profile_class = header.profile_class or DEFAULT_PROFILE_CLASS
        if header.provenance.regime_tag and at >= site.regime_at:
            site.regime_at = at
            site.regime_tag = header.provenance.regime_tag
        return site

    def _count_signals(self, domain_id: str, msp: packet_pb2.MetaSignalPack, at: float) -> None:
        evidence = msp.evidence
        report = self._matrix.put(
            domain_id,
            # In order of the names: that of a protobuf map is another in each process, and of an open
            # vocabulary that is nearly full it would decide which names get in.
            {section: dict(sorted(getattr(msp, section).items())) for section in SECTIONS},
            now=at,
            confidence=evidence.confidence if evidence.HasField("confidence") else 1.0,
            signal_confidence={
                name: own.confidence
                for name, own in evidence.signals.items()
                if own.HasField("confidence")
            },
            size=evidence.sites if evidence.HasField("sites") else 1.0,
        )
        self._touched.add(domain_id)
        for value in report.ignored:
            self.ignored[value.reason] += 1

    def _count_causes(self, site: SiteRecord, packet: packet_pb2.Packet, at: float) -> None:
        ccs = packet.ccs
        if ccs.concepts and at >= site.concepts_at:
            site.concepts_at = at
            site.concepts = {concept.id: concept.score for concept in ccs.concepts}
        if ccs.causal_pairs or ccs.tested_nodes:
            header = packet.header
            summary = _summary(header.domain_id, ccs, at)
            site.keep_summary((at, header.packet_id, summary))

    def _judge(self) -> None:
        """Move the reputation of the sites that sent something new, one step each."""
        if not self._touched:
            return
        scores = self._matrix.score_sites(self._touched)
        self._trust.update(scores)
        # Who could not be judged among too few sites is judged when there are enough.
        self._touched = {name for name, score in scores.items() if math.isnan(score)}

    def _groups(self) -> SiteGroups:
        return SiteGroups(
            SiteContext(domain_id, site.profile_class, site.regime_tag, site.concepts)
            for domain_id, site in self._sites.items()
        )


def _emitted_at(packet: packet_pb2.Packet) -> float:
    emitted_at = packet.header.emitted_at
    return emitted_at.seconds + emitted_at.nanos / 1e9


def _signals(msp: packet_pb2.MetaSignalPack) -> Iterator[tuple[str, str]]:
    for section in SECTIONS:
        for name in getattr(msp, section):
            yield section, name


def _causal_items(summary: CausalSummary) -> int:
    return len(summary.pairs) + len(summary.tested_nodes)


def _outcome(domain_id: str, pop: packet_pb2.PolicyOutcomePack) -> PolicyOutcome:
    return PolicyOutcome(
        site_id=domain_id,
        bundle={name: _param(value) for name, value in pop.bundle.items()},
        before=dict(pop.before),
        after=dict(pop.after),
        confidence=pop.confidence if pop.HasField("confidence") else 1.0,
        control_delta=dict(pop.control_delta),
    )


def _param(value: packet_pb2.ParamValue) -> ParamValue:
    match value.WhichOneof("kind"):
        case "text":
            return value.text
        case "flag":
            return value.flag
        case _:
            return value.number


def _summary(domain_id: str, ccs: packet_pb2.ConceptCausalSummary, at: float) -> CausalSummary:
    return CausalSummary(
        site_id=domain_id,
        pairs=tuple(
            CausalPair(
                pair.source,
                pair.target,
                pair.weight,
                pair.type or "direct",
                pair.stderr if pair.HasField("stderr") else None,
            )
            for pair in ccs.causal_pairs
        ),
        tested_nodes=frozenset(ccs.tested_nodes),
        trust=ccs.trust if ccs.HasField("trust") else 1.0,
        at=at,
    )
