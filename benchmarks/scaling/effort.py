"""How much is measured: enough for figures, or just enough to see that it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["FULL", "TINY", "Effort"]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: Times that a unit cost is measured; medians count.
        packets: Packets in batches in a round; a quarter of them come alone.
        cohorts: Sizes of cohorts whose release is measured, as sites and signals.
        releases: Releases of each of these.
        subscribers: Subscribers that are told.
        idle_s: Seconds for which a server is left alone.
        points: Sites and packets a second of the servers that the plan is held against.
        point_s: Seconds of each of these.
        changes: Changes whose way through three levels is timed, in peace and amid others.
        cohorts_simulated: Cohorts of each kind in the simulation of levels, by sites.
        shares: Shares of lying sites.
        sketched: Sites whose values go into sketches.
        sketch_rounds: Times that these are made.
    """

    rounds: int
    packets: int
    cohorts: tuple[tuple[int, int], ...]
    releases: int
    subscribers: int
    idle_s: float
    points: tuple[tuple[int, float], ...]
    point_s: float
    changes: int
    cohorts_simulated: tuple[tuple[int, int], ...]
    shares: tuple[float, ...]
    sketched: int
    sketch_rounds: int


FULL: Final = Effort(
    rounds=3,
    packets=8_000,
    cohorts=((500, 10), (500, 50), (4_000, 10), (4_000, 50), (8_000, 100), (16_000, 25)),
    releases=8,
    subscribers=300,
    idle_s=10.0,
    points=((1_000, 50.0), (10_000, 150.0), (30_000, 300.0)),
    point_s=20.0,
    changes=15,
    cohorts_simulated=((1_000, 400), (10_000, 200), (100_000, 60), (1_000_000, 20)),
    shares=(0.005, 0.011, 0.02, 0.05, 0.09, 0.11, 0.2, 0.4),
    sketched=1_000_000,
    sketch_rounds=20,
)

TINY: Final = Effort(
    rounds=1,
    packets=400,
    cohorts=((20, 2), (20, 10), (200, 2), (200, 10)),
    releases=2,
    subscribers=10,
    idle_s=0.5,
    points=((50, 20.0),),
    point_s=2.0,
    changes=2,
    cohorts_simulated=((1_000, 4),),
    shares=(0.011, 0.2),
    sketched=20_000,
    sketch_rounds=2,
)
