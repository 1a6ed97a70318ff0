"""Honest sites, attackers with credentials of their own, and a reader, around a real server.

`Arena` is the server with authentication and a store on disk; each caller has a token. Honest sites send the
same to two cohorts, and the attackers to one of them, so that a test can hold what a reader gets against what
he gets without the attack. What a prior should be is computed here, from the values alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from identity_harness import OPERATOR, Caller, calling
from server_harness import (
    CAUSES,
    DEADLINE_S,
    HINT,
    PRIOR,
    WARM_START,
    ccs,
    changed,
    msp,
    pop,
    spec,
)

from fmi.v1 import admin_service_pb2 as admin_pb2
from fmi.v1 import cohort_pb2, packet_pb2, update_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server.app import RunningServer
from fmi_server.errors import reason_name
from fmi_server.testing import running_server
from fmi_server.tokens import changed_tokens, issue_token

__all__ = [
    "CALM",
    "EMIT",
    "EVIL",
    "EVIL_TOO",
    "GAIN",
    "HIT",
    "HONEST",
    "ICU",
    "LOAD",
    "NODES",
    "RATE",
    "SCALES",
    "SHARE",
    "STREAM",
    "TAU",
    "VALIDATE",
    "WARD",
    "Arena",
    "Told",
    "arena",
    "at",
    "closed_spec",
    "harmless",
    "honest_reputations",
    "of_class",
    "one_vote_each",
    "open_spec",
    "outcome",
    "reasons_of",
    "settled",
    "signals",
    "summary",
    "within",
]

EMIT = "fmi.v1.InterchangeService/Emit"
STREAM = "fmi.v1.InterchangeService/EmitStream"
SUBSCRIBE = "fmi.v1.InterchangeService/Subscribe"
WARM = "fmi.v1.InterchangeService/GetWarmStart"
VALIDATE = "fmi.v1.RegistryService/ValidatePacket"
RELEASE = "fmi.v1.AdminService/ReleaseNow"
SITES = "fmi.v1.AdminService/ListSites"
COHORTS = "fmi.v1.AdminService/ListCohorts"

HONEST = tuple(f"h{number}" for number in range(9))
EVIL, EVIL_TOO = "evil", "evil-too"
READER = "reader"

HIT, CALM = "hit", "calm"
"""The cohort that is attacked, and its twin that is not."""

BATCH = 2000


@dataclass(frozen=True)
class Scale:
    """A scale of averaging, with bounds, and its own arithmetic."""

    transform: int
    lower: float
    upper: float
    forth: Callable[[float], float]
    back: Callable[[float], float]


SCALES: Mapping[str, Scale] = {
    "tau": Scale(cohort_pb2.SIGNAL_TRANSFORM_LINEAR, 0.0, 1.0, lambda x: x, lambda x: x),
    "rate": Scale(cohort_pb2.SIGNAL_TRANSFORM_LOG, 1e-9, 1.0, math.log, math.exp),
    "share": Scale(
        cohort_pb2.SIGNAL_TRANSFORM_LOGIT,
        0.0,
        1.0,
        lambda x: math.log(x / (1.0 - x)),
        lambda y: 1.0 / (1.0 + math.exp(-y)),
    ),
}
"""One signal on each scale, all of them of the controller."""


def closed_spec(name: str, **fields: Any) -> cohort_pb2.CohortSpec:
    """A cohort that declares its signals: one on each scale, a metric to score and one to guard."""
    made = _for_all(name, **fields)
    for signal, scale in SCALES.items():
        made.signals.add(
            name=signal,
            section=cohort_pb2.SIGNAL_SECTION_CONTROLLER,
            lower=scale.lower,
            upper=scale.upper,
            transform=scale.transform,
        )
    metric = {
        "section": cohort_pb2.SIGNAL_SECTION_METRICS,
        "direction": cohort_pb2.SIGNAL_DIRECTION_HIGHER_IS_BETTER,
    }
    made.signals.add(name="gain", **metric)
    made.signals.add(name="safety", guardrail=True, **metric)
    made.policy.quantum["lr"] = 0.01
    return made


def open_spec(name: str, **fields: Any) -> cohort_pb2.CohortSpec:
    """A cohort that takes any signal."""
    return _for_all(name, **fields)


def _for_all(name: str, **fields: Any) -> cohort_pb2.CohortSpec:
    access = cohort_pb2.AccessSpec(emit=[*HONEST, EVIL, EVIL_TOO], subscribe=[READER])
    return spec(name, access=access, **fields)


@dataclass(frozen=True)
class Told:
    """What a reader is told of a cohort."""

    prior: update_pb2.MetaPriorUpdate
    starts: Mapping[str, update_pb2.WarmStartProfile]
    hint: update_pb2.MetaPolicyHint
    causes: update_pb2.CausalConsensus

    def edges(self) -> dict[tuple[str, str, str], update_pb2.ConsensusEdge]:
        """The edges of the consensus, each by what names it."""
        return {(edge.source, edge.target, edge.type): edge for edge in self.causes.edges}

    def values(self) -> dict[str, dict[str, float]]:
        """Every value that a reader could apply, by where it stands."""
        return {
            "prior": dict(self.prior.prior),
            **{f"start of {name}": dict(p.init) for name, p in self.starts.items()},
            **{f"regime {c.regime}": dict(c.settings) for c in self.prior.contexts},
            **{f"concepts of {c.regime}": dict(c.concepts) for c in self.prior.contexts},
            "causes": {" ".join(key): edge.weight for key, edge in self.edges().items()},
        }


@dataclass
class Arena:
    """A server, and who calls it."""

    server: RunningServer
    data_dir: Path
    callers: Mapping[str, Caller] = field(default_factory=dict)

    async def emit(self, who: str, *packets: packet_pb2.Packet) -> Counter[str]:
        """Send packets on a stream; count what became of them, refusals by their reason."""
        found: Counter[str] = Counter()
        for start in range(0, len(packets), BATCH):
            batch = packet_pb2.PacketBatch(packets=packets[start : start + BATCH])
            request = wire_pb2.EmitStreamRequest(packets=batch)
            found.update(reasons_of(await self.callers[who](STREAM, request)))
        return found

    async def both(self, made: Mapping[str, packet_pb2.Packet]) -> None:
        """Let honest sites send the same to both cohorts, and see it taken."""
        for site, packet in made.items():
            twins = [changed(packet, _to(cohort)) for cohort in (CALM, HIT)]
            assert await self.emit(site, *twins) == {"accepted": 2}

    async def release(self, cohort: str = HIT) -> None:
        request = admin_pb2.ReleaseNowRequest(cohort=cohort)
        await self.callers[OPERATOR](RELEASE, request)

    async def told(self, cohort: str = HIT) -> Told:
        """Release a cohort, and read what a subscriber is told of it."""
        await self.release(cohort)
        call = self.callers[READER].open(SUBSCRIBE, wire_pb2.SubscribeRequest(cohorts=[cohort]))
        newest: dict[int, update_pb2.Update] = {}
        try:
            async with asyncio.timeout(DEADLINE_S):
                while (event := await call.read()).WhichOneof("event") != "snapshot_end":
                    newest[event.update.kind] = event.update
        finally:
            call.cancel()
        prior, starts, hint, causes = (
            newest.get(kind, update_pb2.Update()) for kind in (PRIOR, WARM_START, HINT, CAUSES)
        )
        return Told(
            prior.prior_update,
            {found.profile_class: found for found in starts.warm_start.profiles},
            hint.policy_hint,
            causes.causal_consensus,
        )

    async def warm_start(self, cohort: str = HIT, **asked: Any) -> update_pb2.WarmStartProfile:
        request = wire_pb2.GetWarmStartRequest(cohort=cohort, **asked)
        return (await self.callers[READER](WARM, request)).profile

    async def sites(self, cohort: str = HIT) -> dict[str, Any]:
        """What the server keeps of the sites of a cohort."""
        request = admin_pb2.ListSitesRequest(cohort=cohort)
        return {
            site.domain_id: site for site in (await self.callers[OPERATOR](SITES, request)).sites
        }

    async def cohorts(self) -> set[str]:
        answer = await self.callers[OPERATOR](COHORTS, admin_pb2.ListCohortsRequest())
        return {found.cohort for found in answer.cohorts}

    async def stored(self) -> int:
        """How many packets were ever stored."""
        return await self.server.service.store.last_sequence()


@contextlib.asynccontextmanager
async def arena(
    folder: Path,
    make_spec: Callable[..., cohort_pb2.CohortSpec] = closed_spec,
    **fields: Any,
) -> AsyncIterator[Arena]:
    """Run a server with two cohorts of one spec, with a caller for every site, a reader and an operator.

    Quotas are off: what holds here holds without them.
    """
    tokens, data_dir = folder / "tokens.json", folder / "data"
    names = (*HONEST, EVIL, EVIL_TOO, READER, OPERATOR)
    now = datetime.now(UTC).timestamp()
    issued = {name: issue_token(name, now=now, lifetime_s=3600.0) for name in names}
    with changed_tokens(tokens) as records:
        records.update({one.record.token_id: one.record for one in issued.values()})
    free = dict.fromkeys(("quota_calls_per_s", "quota_packets_per_s", "quota_bytes_per_s"), 0)
    async with (
        running_server(data_dir, tokens=tokens, operators=(OPERATOR,), **free) as server,
        contextlib.AsyncExitStack() as stack,
    ):
        for cohort in (CALM, HIT):
            await server.service.put_cohort_spec(make_spec(cohort, **fields))
        callers = {
            name: await stack.enter_async_context(calling(server.target, token=one.text))
            for name, one in issued.items()
        }
        yield Arena(server, data_dir, callers)


def _to(cohort: str) -> Callable[[packet_pb2.Packet], None]:
    def change(packet: packet_pb2.Packet) -> None:
        packet.header.cohort = cohort
        # Its own id in each: to the server they are two packets of one site.
        packet.header.packet_id = packet.header.packet_id[:-1] + str(int(cohort == HIT))

    return change


def reasons_of(response: Any) -> Counter[str]:
    """Count what became of the packets of a request: `accepted`, or another status, or a reason."""
    if hasattr(response, "exceptions"):
        assert not response.HasField("refusal"), response
        results, found = response.exceptions, Counter(accepted=response.accepted)
    else:
        results, found = response.results, Counter()
    for result in results:
        refused = result.status == wire_pb2.EMIT_STATUS_REFUSED
        status = wire_pb2.EmitStatus.Name(result.status).removeprefix("EMIT_STATUS_").lower()
        found[reason_name(result.refusal.reason) if refused else status] += 1
    return +found


# What a prior should be


def one_vote_each(
    values: Mapping[str, float] | Iterable[float], *, signal: str = "tau", liars: int = 1
) -> float:
    """The trimmed mean of values that count alike, each site's once, on the scale of a signal.

    `liars` and a tenth of the sites are left out at each end, by count; what is left is averaged.
    """
    scale = SCALES[signal]
    given = values.values() if isinstance(values, Mapping) else values
    ordered = sorted(map(scale.forth, given))
    cut = max(math.ceil(len(ordered) / 10), liars)
    kept = ordered[cut : len(ordered) - cut] or _middle(ordered)
    return scale.back(math.fsum(kept) / len(kept))


def _middle(ordered: Sequence[float]) -> Sequence[float]:
    half = len(ordered) // 2
    return ordered[half : half + 1] if len(ordered) % 2 else ordered[half - 1 : half + 1]


def within(value: float, honest: Iterable[float]) -> bool:
    """Say whether a value lies in the range of the honest ones, but for the rounding of a logarithm."""
    values = list(honest)
    slack = 1e-12 * max(map(abs, values))
    return min(values) - slack <= value <= max(values) + slack


# What honest sites say

TAU = {site: 0.50 + 0.01 * i for i, site in enumerate(HONEST)}
RATE = {site: 1e-4 * (1.0 + 0.1 * i) for i, site in enumerate(HONEST)}
SHARE = {site: 0.80 + 0.01 * i for i, site in enumerate(HONEST)}
GAIN = {site: 1.0 + 0.1 * i for i, site in enumerate(HONEST)}
LR = {site: 0.100 + 0.0005 * i for i, site in enumerate(HONEST)}
LOAD = {site: 0.50 + 0.01 * i for i, site in enumerate(HONEST)}
HEAT = {site: -0.30 - 0.01 * i for i, site in enumerate(HONEST)}
DRIFT = {site: 0.30 + 0.01 * i for i, site in enumerate(HONEST)}

HONEST_VALUES = {
    "tau": TAU,
    "rate": RATE,
    "share": SHARE,
    "load latency direct": LOAD,
    "heat load direct": HEAT,
    "drift": DRIFT,
}
"""What honest sites say, by the name under which a reader is told of it."""

ICU, WARD = HONEST[:5], HONEST[5:]
NODES = ("load", "latency", "heat")


def signals(site: str, cohort: str = HIT, **settings: float) -> packet_pb2.Packet:
    """A signal pack with one signal on each scale, of a site of a class and a regime."""
    said = {"tau": TAU, "rate": RATE, "share": SHARE}
    values = settings or {name: held.get(site, 1.0) for name, held in said.items()}
    return placed(msp(site, cohort, controller=values))


def of_class(made: packet_pb2.Packet, profile_class: str, regime: str) -> packet_pb2.Packet:
    made.header.profile_class = profile_class
    made.header.provenance.regime_tag = regime
    return made


def outcome(site: str, cohort: str = HIT, **fields) -> packet_pb2.Packet:
    if site in TAU:
        fields = {
            "bundle": {"lr": LR[site], "mode": "fast"},
            "before": {"gain": 1.0, "safety": 1.0},
            "after": {"gain": 1.0 + GAIN[site], "safety": 1.0 + GAIN[site] / 2},
            **fields,
        }
    return placed(pop(site, cohort, **fields))


def summary(site: str, cohort: str = HIT, *, concepts=(), **fields) -> packet_pb2.Packet:
    if site in TAU:
        fields = {"tested_nodes": list(NODES), **fields}
        concepts = [("drift", DRIFT[site])]
    made = ccs(site, cohort, **{"causal_pairs": [], **fields})
    for name, score in concepts:
        made.ccs.concepts.add(id=name, score=score)
    if site in TAU:
        for source, target, held in (("load", "latency", LOAD), ("heat", "load", HEAT)):
            made.ccs.causal_pairs.add(source=source, target=target, weight=held[site], stderr=0.1)
    return placed(made)


def placed(made: packet_pb2.Packet) -> packet_pb2.Packet:
    """Give a packet of an honest site its class and regime."""
    site = made.header.domain_id
    if site in TAU:
        of_class(made, *(("icu", "winter") if site in ICU else ("ward", "summer")))
    return made


async def settled(field, *kinds) -> None:
    """Let every honest site say what it has to say, in both cohorts, and have it released."""
    for make in kinds or (signals, outcome, summary):
        await field.both({site: make(site) for site in HONEST})
    await field.release()
    calm = await field.told(CALM)
    assert calm.prior.prior
    assert kinds or (calm.hint.hint_id and calm.causes.edges and calm.prior.contexts)


def at(made: packet_pb2.Packet, seconds: float) -> packet_pb2.Packet:
    made.header.emitted_at.FromNanoseconds(int(seconds * 1e9))
    return made


def harmless(hit, calm) -> None:
    """What a reader could apply has the same names as without the attack, and honest values."""
    assert {where: held.keys() for where, held in hit.values().items()} == {
        where: held.keys() for where, held in calm.values().items()
    }
    for where, held in hit.values().items():
        for name, value in held.items():
            said = HONEST_VALUES[name].values()
            assert within(value, said), f"{where}: {name} is {value}, honest sites say {said}"
    assert bool(hit.hint.hint_id) == bool(calm.hint.hint_id)
    if hit.hint.hint_id:
        assert within(hit.hint.bundle["lr"].number, LR.values())
        assert hit.hint.bundle["mode"].text == "fast"
        # A site's score is the mean of its gains; the mean is moved toward 0, as if two more saw nothing.
        least = len(HONEST) / (len(HONEST) + 2)
        assert 0.75 * least * min(GAIN.values()) <= hit.hint.effect <= 0.75 * max(GAIN.values())


def honest_reputations(told) -> dict[str, float]:
    return {site: told.prior.lineage.reputations[site] for site in HONEST}
