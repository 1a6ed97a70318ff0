"""The whole release of a cohort as the server computes it: prior, classes, regimes, hint and consensus.

It runs as a process of its own, because what a process holds says nothing about one of its parts:

    python -m benchmarks.aggregation.whole
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.aggregation import workload
from benchmarks.aggregation.side_by_side import Row, Section, Task, alternate
from benchmarks.memory import held_bytes
from fmi.v1 import cohort_pb2, packet_pb2
from fmi_server.cohort_state import CohortState
from fmi_server.cohorts import CohortRegistry
from fmi_server.contracts import FMIContractRegistry

SIGNALS, SITES = 100, 20_000
CLASSES, REGIMES = 4, 6
BEGAN_AT = 1_700_000_000

SETTLED_REPUTATION = 0.97
"""Where the reputation of such sites settles; on its way there it reweighs all signals of its site."""


def whole(rounds: int) -> Section:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.aggregation.whole", str(max(1, rounds // 6))]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    rows = [Row(**row) for row in found["rows"]]
    title = (
        f"Whole release of {SITES:,} sites x {SIGNALS} signals, {CLASSES} classes and {REGIMES} regimes, "
        "every site of its own weight"
    )
    return Section(
        title, rows, [f"memory: {found['site_bytes'] / 1e3:.1f} kB a site, arrays included"]
    )


class Life:
    """A cohort's resident state, and the sites that feed it."""

    def __init__(self) -> None:
        spec = cohort_pb2.CohortSpec(name="bench", free_signals=True)
        rules = CohortRegistry(FMIContractRegistry()).compile(spec)
        settled = dict.fromkeys(workload.sites_of(SITES), SETTLED_REPUTATION)
        self.state = CohortState(rules, reputations=settled)
        self._random = np.random.default_rng(workload.SEED)
        self._moment = 0

    def send(self, sites: int, signals: int) -> None:
        """Let the first sites send the first signals, one second after what was sent before."""
        self._moment += 1
        for packet in self._packets(sites, signals):
            self.state.count(packet)

    def release(self) -> None:
        """Release what is there."""
        self.state.release(BEGAN_AT + self._moment)

    def _packets(self, sites: int, signals: int) -> Iterator[packet_pb2.Packet]:
        for number, site in enumerate(workload.sites_of(sites)):
            packet = packet_pb2.Packet()
            header = packet.header
            header.packet_id, header.domain_id, header.cohort = (
                f"{self._moment}-{site}",
                site,
                "bench",
            )
            header.profile_class = f"class_{number % CLASSES}"
            header.provenance.regime_tag = f"regime_{number % REGIMES}"
            header.emitted_at.seconds = BEGAN_AT + self._moment
            values = self._random.normal(1.0, 0.1, signals).tolist()
            names = workload.names(SIGNALS)[:signals]
            packet.msp.controller.update(dict(zip(names, values, strict=True)))
            packet.msp.evidence.confidence = 0.5 + number % 50 / 100
            yield packet


def measure(rounds: int) -> dict[str, object]:
    """Fill the cohort and release it, now after much, now after little was sent."""
    life, before = Life(), held_bytes("VmRSS")
    life.send(SITES, SIGNALS)
    site_bytes = (held_bytes("VmRSS") - before) / SITES

    def after(sites: int, signals: int) -> Callable[[], None]:
        return lambda: life.send(sites, signals)

    tasks = [
        Task("every site sent every signal", life.release, after(SITES, SIGNALS)),
        Task("one site sent every signal", life.release, after(1, SIGNALS)),
        Task("one site sent one signal", life.release, after(1, 1)),
        Task("nobody sent anything", life.release),
    ]
    rows = [dataclasses.asdict(row) for row in alternate(tasks, rounds=rounds)]
    return {"rows": rows, "site_bytes": site_bytes}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
