"""What is kept of one site besides its values: what it says of itself, its outcomes and its summaries.

Everything that is kept per site is bounded.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Final

from fmi.plain import DEFAULT_PROFILE_CLASS
from fmi.v1 import packet_pb2
from fmi_server.aggregation import CausalPair, CausalSummary, ParamValue, PolicyOutcome

__all__ = [
    "MAX_CAUSAL_ITEMS_PER_SITE",
    "MAX_OUTCOMES_PER_SITE",
    "MAX_SUMMARIES_PER_SITE",
    "SaidAgain",
    "SiteRecord",
    "causal_items_of",
    "emitted_at",
    "outcome_of",
    "summary_of",
]

MAX_OUTCOMES_PER_SITE: Final = 256
"""Policy outcomes kept of one site; past it the oldest goes."""

MAX_SUMMARIES_PER_SITE: Final = 64
"""Causal summaries kept of one site; past it the oldest goes."""

MAX_CAUSAL_ITEMS_PER_SITE: Final = 5120
"""Causal pairs and tested nodes kept of one site, as many as the largest summary has; past it the oldest
summary goes."""


@dataclass(slots=True)
class SaidAgain:
    """What later packets of the same site and time say, in the place of what was said before.

    Attributes:
        heard: Whether there is one.
        regime: Whether one names a regime.
        concepts: Whether one has concepts.
        signals: Section and name of the values that they have.
    """

    heard: bool = False
    regime: bool = False
    concepts: bool = False
    signals: set[tuple[str, str]] = field(default_factory=set)

    def note(self, packet: packet_pb2.Packet) -> None:
        """Note a packet, apart from its signals."""
        self.heard = True
        self.regime |= bool(packet.header.provenance.regime_tag)
        self.concepts |= bool(packet.ccs.concepts)


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
        self.causal_items += causal_items_of(entry[2])
        while (
            len(self.summaries) > MAX_SUMMARIES_PER_SITE
            or self.causal_items > MAX_CAUSAL_ITEMS_PER_SITE
        ):
            gone = heapq.heappop(self.summaries)
            self.causal_items -= causal_items_of(gone[2])
            self.causes_after = gone[:2]

    def is_told_by(self, packet: packet_pb2.Packet, at: float, again: SaidAgain) -> bool:
        """Say whether class, regime or concepts of the site are those of this packet, or would be."""

        def newest(than: float, *, said_again: bool) -> bool:
            return at > than or (at == than and not said_again)

        return (
            newest(self.heard_at, said_again=again.heard)
            or (
                bool(packet.header.provenance.regime_tag)
                and newest(self.regime_at, said_again=again.regime)
            )
            or (bool(packet.ccs.concepts) and newest(self.concepts_at, said_again=again.concepts))
        )

    def outlives_outcome(self, at: float, packet_id: str) -> bool:
        """Say whether an outcome was pushed out, or would be, by newer ones."""
        full = len(self.outcomes) >= MAX_OUTCOMES_PER_SITE
        return full and (at, packet_id) < self.outcomes[0][:2]

    def outlives_summary(self, at: float, packet_id: str) -> bool:
        """Say whether a summary was pushed out, or would be, by newer ones.

        The newest that was pushed out is not: it says how far back summaries stay out.
        """
        return (at, packet_id) < self.causes_after

    def drop_before(self, outcomes_from: float, said_from: float) -> bool:
        """Drop outcomes, and what else it said, that are older; return whether anything was."""
        before = len(self.outcomes) + len(self.summaries)
        while self.outcomes and self.outcomes[0][0] < outcomes_from:
            heapq.heappop(self.outcomes)
        while self.summaries and self.summaries[0][0] < said_from:
            self.causal_items -= causal_items_of(heapq.heappop(self.summaries)[2])
        return len(self.outcomes) + len(self.summaries) < before

    def drop_context_before(self, said_from: float) -> bool:
        """Drop the regime and the concepts that it named earlier than that; return whether it did."""
        dropped = False
        if self.regime_tag and self.regime_at < said_from:
            self.regime_tag, dropped = "", True
        if self.concepts and self.concepts_at < said_from:
            self.concepts, dropped = {}, True
        return dropped


def emitted_at(packet: packet_pb2.Packet) -> float:
    """Return when a packet was emitted, Unix seconds by the site's clock."""
    at = packet.header.emitted_at
    return at.seconds + at.nanos / 1e9


def causal_items_of(summary: CausalSummary) -> int:
    """Count the pairs and tested nodes of a summary."""
    return len(summary.pairs) + len(summary.tested_nodes)


def outcome_of(domain_id: str, pop: packet_pb2.PolicyOutcomePack) -> PolicyOutcome:
    """Return the policy outcome that a POP of a site tells of."""
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


def summary_of(domain_id: str, ccs: packet_pb2.ConceptCausalSummary, at: float) -> CausalSummary:
    """Return the causal part of a CCS of a site, with its emission time in Unix seconds."""
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
