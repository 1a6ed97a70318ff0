"""Packets, clocks and small parts for the tests of the pipeline."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from fmi.v1 import packet_pb2

NOW = 1_750_000_000.0
"""Where the tests' clocks stand: June 2025."""

_numbers = itertools.count(1)


class Clock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def packet_id(number: int | None = None) -> str:
    chosen = next(_numbers) if number is None else number
    return f"{chosen:08x}-0000-7000-8000-{chosen:012x}"


def packet(
    site: str = "site-1", *, at: float = NOW, cohort: str = "care", **header: Any
) -> packet_pb2.Packet:
    """Make a packet without a body."""
    found = packet_pb2.Packet()
    found.header.packet_id = header.pop("packet_id", None) or packet_id()
    found.header.domain_id = site
    found.header.cohort = cohort
    found.header.rev = header.pop("rev", 1)
    found.header.emitted_at.FromMicroseconds(round(at * 1e6))
    found.header.provenance.regime_tag = header.pop("regime", "")
    for name, value in header.items():
        setattr(found.header, name, value)
    return found


def msp(
    site: str = "site-1",
    *,
    metrics: Mapping[str, float] | None = None,
    controller: Mapping[str, float] | None = None,
    evaluator: Mapping[str, float] | None = None,
    confidence: float | None = None,
    **header: Any,
) -> packet_pb2.Packet:
    found = packet(site, **header)
    found.msp.SetInParent()
    found.msp.metrics.update(metrics or {})
    found.msp.controller.update(controller or {})
    found.msp.evaluator.update(evaluator or {})
    if confidence is not None:
        found.msp.evidence.confidence = confidence
    return found


def pop(
    site: str = "site-1",
    *,
    bundle: Mapping[str, float | str | bool] | None = None,
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
    **header: Any,
) -> packet_pb2.Packet:
    found = packet(site, **header)
    for name, value in ({"tau": 0.5} if bundle is None else bundle).items():
        kind = {bool: "flag", str: "text"}.get(type(value), "number")
        setattr(found.pop.bundle[name], kind, value)
    found.pop.before.update({"loss": 1.0} if before is None else before)
    found.pop.after.update({"loss": 0.5} if after is None else after)
    found.pop.windows = 1
    return found


def ccs(
    site: str = "site-1",
    *,
    pairs: tuple[tuple[str, str, float], ...] = (),
    concepts: Mapping[str, float] | None = None,
    tested: tuple[str, ...] = (),
    trust: float | None = None,
    **header: Any,
) -> packet_pb2.Packet:
    found = packet(site, **header)
    found.ccs.SetInParent()
    for source, target, weight in pairs:
        found.ccs.causal_pairs.add(source=source, target=target, weight=weight)
    for name, score in (concepts or {}).items():
        found.ccs.concepts.add(id=name, score=score)
    found.ccs.tested_nodes.extend(tested)
    if trust is not None:
        found.ccs.trust = trust
    return found
