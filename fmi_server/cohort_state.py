"""CohortState: what is resident of one cohort, from packets to statistics.

A packet touches one column of the matrix of its cohort, and the record of its site.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

from fmi.plain import DEFAULT_PROFILE_CLASS
from fmi.rules import SECTIONS
from fmi.v1 import packet_pb2
from fmi_server.aggregation import (
    CausalConsensus,
    CausalSettings,
    CohortMatrix,
    ContextReport,
    EstimatorName,
    EstimatorSettings,
    IgnoredReason,
    PolicyDecision,
    PolicySettings,
    PriorRelease,
    ReputationBook,
    SignalInUse,
    SiteContext,
    SiteGroups,
    UnitCells,
    WarmStart,
    WarmStartRequest,
    decide_policy,
    describe_contexts,
    pool_causes,
    warm_start,
)
from fmi_server.cohorts import CohortRules
from fmi_server.site_records import SaidAgain, SiteRecord, emitted_at, outcome_of, summary_of

__all__ = ["CohortState", "ReleasedStatistics"]

MAX_CLASSES_TOLD: Final = 256
"""Profile classes that get a warm start, those of most sites first."""

MAX_SIGNALS: Final = 4096
"""Signals that an open vocabulary may grow to."""


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
        reputations: Of all sites, as they were used in the weights.
        relative_sizes: Of the sites that counted for less than 1, as they were used in the weights.
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
    relative_sizes: dict[str, float]
    packets: Counter[str]
    outcome_sites: int


class CohortState:
    """The resident state of one cohort.

    Not thread-safe: one owner at a time.

    Args:
        rules: The cohort's rules.
        reputations: Of sites, from an earlier life of the server.
        packets: Packets counted by type, from an earlier life of the server.

    Attributes:
        packets: Packets counted, by type.
        ignored: Values of accepted packets that could not be counted, by reason.
    """

    def __init__(
        self,
        rules: CohortRules,
        *,
        reputations: dict[str, float] | None = None,
        packets: Mapping[str, int] | None = None,
    ) -> None:
        self.packets: Counter[str] = Counter(packets)
        self.ignored: Counter[IgnoredReason] = Counter()
        self._sites: dict[str, SiteRecord] = {}
        self._grouped: SiteGroups | None = None
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

    def judged_elsewhere(self) -> None:
        """Note that another server judged the sites by what is counted here."""
        self._touched.clear()

    def take_reputations(self, reputations: dict[str, float]) -> None:
        """Take the reputations that another server came to, in the place of those held here."""
        self._trust = ReputationBook(reputation=reputations)

    def signals_in_use(self) -> dict[str, SignalInUse]:
        """Return the signals that sites have values of."""
        return self._matrix.in_use()

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
        """Count a packet that was validated and stored.

        The order of packets does not matter, but for values, class, regime and concepts that one site sent
        twice with one time of emission: of these the ones counted last stay. A server counts in the order of
        its store, in each of its lives.
        """
        self.packets[packet.WhichOneof("body") or "unknown"] += 1
        self._take(packet)

    def _take(self, packet: packet_pb2.Packet) -> None:
        site = self._hear(packet)
        header = packet.header
        at = emitted_at(packet)
        kind = packet.WhichOneof("body")
        if kind == "msp":
            self._count_signals(header.domain_id, packet.msp, at)
        elif kind == "pop":
            outcome = outcome_of(header.domain_id, packet.pop)
            site.keep_outcome((at, header.packet_id, outcome))
        elif kind == "ccs":
            self._count_causes(site, packet, at)

    def count_all(self, packets: Sequence[packet_pb2.Packet]) -> None:
        """Count many packets at once.

        The result is that of `count` for each. MSPs whose every signal is overtaken by a newer MSP of the
        same site among `packets` are not written to the matrix, which is what a packet costs.
        """
        self.packets.update(packet.WhichOneof("body") or "unknown" for packet in packets)
        self._take_all(packets)

    def _take_all(self, packets: Sequence[packet_pb2.Packet]) -> None:
        # Of packets of one time the later in the list wins, as it does one by one.
        newest_first = sorted(
            (packet for packet in reversed(packets) if packet.HasField("msp")),
            key=emitted_at,
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
            else:
                self._take(packet)

    def replay(self, packets: Sequence[packet_pb2.Packet]) -> None:
        """Count packets that were counted before: in an earlier life, or under other rules.

        They are no news of a site, so they do not move the reputation it has, and `packets` has them
        already.
        """
        news = set(self._touched)
        self._take_all(packets)
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
            if site.drop_context_before(from_s):
                self._grouped, changed = None, True
            if site.heard_at < from_s and not site.outcomes:
                del self._sites[domain_id]
                self._grouped = None
                self._matrix.drop(domain_id)
                self._trust.forget(domain_id)
                changed = True
        return changed

    def overtaken(self, packets: Sequence[packet_pb2.Packet], now: float) -> list[bool]:
        """Say of packets whether they cannot count any more under the rules in force, counted or not.

        That is so where a state made without a packet is the same, now and after whatever comes: it is past
        its time, or all that it says was said anew by its site. Equality holds while the bounds on the
        names of an open vocabulary do not bind; where they do, who is first decides which names get in.

        Args:
            packets: Packets that were validated and stored, in the order in which they would be replayed:
                of one site's packets of one time the later in it wins.
            now: Unix seconds.
        """
        said: defaultdict[tuple[str, float], SaidAgain] = defaultdict(SaidAgain)
        found = []
        for packet in reversed(packets):
            at = emitted_at(packet)
            again = said[packet.header.domain_id, at]
            found.append(self._overtaken(packet, at, again, now))
            again.note(packet)
            if packet.HasField("msp"):
                again.signals |= self._matrix.stored(_sections(packet.msp))
        return found[::-1]

    def _overtaken(
        self, packet: packet_pb2.Packet, at: float, again: SaidAgain, now: float
    ) -> bool:
        from_s = now - self._rules.site_ttl_s
        outcomes_from = now - self._rules.policy_window_s
        if at < min(from_s, outcomes_from):
            return True
        domain_id, packet_id = packet.header.domain_id, packet.header.packet_id
        site = self._sites.get(domain_id)
        if site is None or site.is_told_by(packet, at, again):
            return False
        match packet.WhichOneof("body"):
            case "msp":
                said = _sections(packet.msp)
                return at < from_s or self._matrix.overtakes(domain_id, said, at, again.signals)
            case "pop":
                return at < outcomes_from or site.outlives_outcome(at, packet_id)
            case "ccs":
                silent = not (packet.ccs.causal_pairs or packet.ccs.tested_nodes)
                return silent or at < from_s or site.outlives_summary(at, packet_id)
        return True

    def release(self, now: float) -> ReleasedStatistics:
        """Compute the statistics of everything counted.

        Args:
            now: Unix seconds.
        """
        self.expire(now)
        self._judge()
        reputations = self._trust.counted(self._sites)
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
                # Sorted, because of summaries of one time the later in the list corrects the others.
                (e[2] for site in self._sites.values() for e in sorted(site.summaries)),
                CausalSettings(estimator=self._estimator),
                reputations,
            ),
            reputations=reputations,
            relative_sizes=self._matrix.relative_sizes(),
            packets=Counter(self.packets),
            outcome_sites=len({outcome.site_id for outcome in outcomes}),
        )

    def unit_cells(self) -> UnitCells:
        """Return what is held of a cohort in which every signal is declared with bounds."""
        return self._matrix.unit_cells()

    def warm_start(self, request: WarmStartRequest) -> WarmStart:
        """Find the warm start for a site."""
        return warm_start(
            self._matrix,
            self._groups(),
            request,
            self._estimator,
            reputation=self._trust.counted(self._sites),
        )

    def signals_held(self) -> tuple[int, tuple[float | None, float | None]]:
        """Return how many sites hold a value, and the oldest and newest time of these."""
        return len(self._matrix.sites), self._matrix.window

    def _hear(self, packet: packet_pb2.Packet) -> SiteRecord:
        """Note what the header says of a site."""
        header = packet.header
        site = self._sites.get(header.domain_id)
        if site is None:
            site = self._sites[header.domain_id] = SiteRecord()
            self._grouped = None
        at = emitted_at(packet)
        before = site.profile_class, site.regime_tag
        if at >= site.heard_at:
            site.heard_at = at
            site.profile_class = header.profile_class or DEFAULT_PROFILE_CLASS
        if header.provenance.regime_tag and at >= site.regime_at:
            site.regime_at = at
            site.regime_tag = header.provenance.regime_tag
        if (site.profile_class, site.regime_tag) != before:
            self._grouped = None
        return site

    def _count_signals(self, domain_id: str, msp: packet_pb2.MetaSignalPack, at: float) -> None:
        evidence = msp.evidence
        report = self._matrix.put(
            domain_id,
            _sections(msp),
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
            self._grouped = None
        if ccs.causal_pairs or ccs.tested_nodes:
            header = packet.header
            summary = summary_of(header.domain_id, ccs, at)
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
        if self._grouped is None:
            self._grouped = SiteGroups(
                SiteContext(domain_id, site.profile_class, site.regime_tag, site.concepts)
                for domain_id, site in self._sites.items()
            )
        return self._grouped


def _sections(msp: packet_pb2.MetaSignalPack) -> dict[str, Mapping[str, float]]:
    # In order of the names: that of a protobuf map is another in each process, and of an open vocabulary
    # that is nearly full it would decide which names get in.
    return {section: dict(sorted(getattr(msp, section).items())) for section in SECTIONS}


def _signals(msp: packet_pb2.MetaSignalPack) -> Iterator[tuple[str, str]]:
    for section in SECTIONS:
        for name in getattr(msp, section):
            yield section, name
