"""Uplink: this server as a site of a parent server.

A region's server sends the prior of each of its cohorts to the cohort of the same name at its parent, as
an MSP with the effective number of sites behind it. Of a cohort only the newest prior matters, so what
waits while the parent is away is the name of a cohort, and not a queue of packets.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import re
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from fmi.plain import CURRENT_REVISION
from fmi.rules import SECTIONS
from fmi.v1 import packet_pb2, update_pb2
from fmi_server.telemetry import FMITelemetry
from fmi_server.update_log import PublishedUpdate
from fmi_server.version import VERSION

__all__ = ["ParentRefusedError", "ParentUnavailableError", "Uplink", "summary_packet"]

REFRESH_S: Final = 86_400.0
"""Seconds after which a prior that did not change is sent again, so that it stays live at the parent."""

LOOK_S: Final = 3600.0
"""Seconds between two looks for priors that are due again, those that the parent refused among them."""

FIRST_DELAY_S: Final = 0.5
MAX_DELAY_S: Final = 60.0

MAX_SIGNALS_PER_SECTION: Final = 1024
"""As many as a packet takes; of more, those of most sites go up."""

MAX_REDUCTIONS: Final = 16
"""Times that a packet is sent again without the signals that the parent names as wrong."""

_SIGNAL_PATH: Final = re.compile(rf'msp\.(?P<section>{"|".join(SECTIONS)})\["(?P<name>[^"]+)"\]')

_NAMESPACE: Final = uuid.UUID("6f9a1d0e-4b57-5f0c-9a3e-7d2c1b8e4f60")

_log = logging.getLogger(__name__)


class ParentUnavailableError(Exception):
    """The parent takes nothing now, whatever the packet.

    Attributes:
        retry_after_s: Seconds that it asks to wait; None where it does not say.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ParentRefusedError(Exception):
    """The parent does not take this packet.

    Attributes:
        fields: What it finds wrong, by path, for example `msp.controller["tau"]`.
    """

    def __init__(self, message: str, fields: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.fields = tuple(fields)


@dataclass(frozen=True, slots=True)
class _Settled:
    """What became of the last prior of a cohort: nothing to do for this revision before `due_at`."""

    revision: int
    due_at: float
    content: bytes = b""


class Uplink:
    """Sends the newest prior of each cohort to the parent, for as long as `run` runs.

    A prior that could not be delivered is tried again, with growing pauses, until it is taken or
    overtaken; one that the parent refuses is tried again after an hour, without the signals that the
    parent does not know at once. The same prior always makes the same packet, so that it counts once at
    the parent however often this server is started. A prior with the values of the last one is not
    sent, so that servers that are each other's parents come to rest.

    Args:
        domain_id: The name of this server as a site of the parent.
        cohorts: The names of the cohorts.
        newest: The newest prior of a cohort, or None.
        send: Gives a packet to the parent; returns when it is durable there.
        telemetry: Counts.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        domain_id: str,
        *,
        cohorts: Callable[[], Iterable[str]],
        newest: Callable[[str], PublishedUpdate | None],
        send: Callable[[packet_pb2.Packet], Awaitable[None]],
        telemetry: FMITelemetry,
        clock: Callable[[], float],
    ) -> None:
        self._domain_id = domain_id
        self._cohorts = cohorts
        self._newest = newest
        self._send = send
        self._telemetry = telemetry
        self._clock = clock
        self._waiting: dict[str, None] = {}
        self._settled: dict[str, _Settled] = {}
        self._failures = 0
        self._wake = asyncio.Event()

    def notice(self, update: update_pb2.Update) -> None:
        """Note that an update was published; a prior goes up soon."""
        if update.kind == update_pb2.UPDATE_KIND_PRIOR:
            self._waiting[update.cohort] = None
            self._wake.set()

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            self._waiting.update(dict.fromkeys(self._cohorts()))
            try:
                async with asyncio.timeout(LOOK_S):
                    while True:
                        await self._send_waiting()
                        self._wake.clear()
                        await self._wake.wait()
            except TimeoutError:
                continue

    async def _send_waiting(self) -> None:
        while self._waiting:
            cohort = next(iter(self._waiting))
            del self._waiting[cohort]
            await asyncio.sleep(0)  # there may be many, and the loop is not ours alone
            try:
                await self._send_newest(cohort)
            except ParentUnavailableError as error:
                self._waiting[cohort] = None
                self._telemetry.uplink("unavailable")
                await asyncio.sleep(self._delay_s(error))
            except Exception:
                # One cohort's fault must not keep the others from going up.
                self._telemetry.uplink("failed")
                _log.exception("the prior of cohort %s could not be sent to the parent", cohort)

    async def _send_newest(self, cohort: str) -> None:
        published, settled = self._newest(cohort), self._settled.get(cohort)
        now = self._clock()
        if published is None:
            return
        if settled and settled.revision == published.revision and now < settled.due_at:
            return
        update = update_pb2.Update.FromString(published.payload)
        packet = summary_packet(update, self._domain_id, now=now)
        if packet is None:
            return
        content = packet.msp.SerializeToString(deterministic=True)
        refresh_at = packet.header.emitted_at.ToNanoseconds() / 1e9 + REFRESH_S
        if settled and settled.content == content and now < settled.due_at:
            self._settled[cohort] = _Settled(published.revision, settled.due_at, content)
            return
        try:
            await self._send_what_is_taken(packet)
        except ParentRefusedError as error:
            self._telemetry.uplink("refused")
            _log.warning("the parent refuses the prior of cohort %s: %s", cohort, error)
            self._settled[cohort] = _Settled(published.revision, now + LOOK_S)
        else:
            self._telemetry.uplink("sent")
            self._settled[cohort] = _Settled(published.revision, refresh_at, content)
        if self._failures:
            _log.info("the parent takes priors again")
        self._failures = 0

    async def _send_what_is_taken(self, packet: packet_pb2.Packet) -> None:
        """Send a packet, without the signals that the parent finds wrong in it."""
        left_out: list[str] = []
        for _ in range(MAX_REDUCTIONS):
            try:
                await self._send(packet)
            except ParentRefusedError as error:
                wrong = _without(packet, error.fields)
                if not wrong:
                    raise
                left_out += wrong
                _identify(packet)
            else:
                break
        else:
            raise ParentRefusedError(f"too many signals are wrong, first {left_out[0]}")
        if left_out:
            _log.warning(
                "the parent does not take %d signals of cohort %s, first %s; the others went up",
                len(left_out),
                packet.header.cohort,
                left_out[0],
            )

    def _delay_s(self, error: ParentUnavailableError) -> float:
        if not self._failures:
            _log.warning("the parent takes nothing now, trying again: %s", error)
        self._failures += 1
        ceiling = min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self._failures, 16))
        pause_s = random.uniform(ceiling / 2.0, ceiling)  # noqa: S311 - jitter
        return min(MAX_DELAY_S, max(pause_s, error.retry_after_s or 0.0))


def summary_packet(
    update: update_pb2.Update, domain_id: str, *, now: float
) -> packet_pb2.Packet | None:
    """Return a cohort's prior as the packet of a site, or None where it has no value at all.

    Values, standard errors and confidences are those of the estimates; `evidence.sites` is the mean of the
    effective sites over them. A value whose confidence is not known counts at the parent as the median
    of the regions does. Of a private cohort the packet declares the privacy that was spent. The packet is
    dated to the release, or a whole number of `REFRESH_S` later, and its id is made from its content.

    Args:
        update: A published prior.
        domain_id: The site that it comes from.
        now: Unix seconds.
    """
    estimates = update.prior_update.estimates
    msp = packet_pb2.MetaSignalPack()
    told: list[update_pb2.SignalEstimate] = []
    for name in sorted(estimates, key=lambda name: (-estimates[name].sites, name)):
        found = estimates[name]
        section = getattr(msp, found.section) if found.section in SECTIONS else None
        if section is None or not found.HasField("value"):
            continue
        if len(section) >= MAX_SIGNALS_PER_SECTION:
            continue
        section[name] = found.value
        if found.confidence > 0.0:
            msp.evidence.signals[name].confidence = found.confidence
        if found.HasField("stderr"):
            msp.evidence.signals[name].stderr = found.stderr
        told.append(found)
    if not told:
        return None
    msp.evidence.sites = math.fsum(found.effective_sites for found in told) / len(told)
    packet = packet_pb2.Packet(msp=msp)
    header = packet.header
    header.domain_id = domain_id
    header.cohort = update.cohort
    header.rev = CURRENT_REVISION
    header.provenance.software = f"fmi-server/{VERSION}"
    lineage = update.prior_update.lineage
    if lineage.epsilon_spent:
        applied = header.provenance.applied_privacy
        applied.mechanism, applied.delta = "discrete_gaussian", lineage.delta
        applied.epsilon = lineage.epsilon_spent
    released_ns = update.released_at.ToNanoseconds()
    age = max(0.0, now - released_ns / 1e9)
    header.emitted_at.FromNanoseconds(released_ns + int(age // REFRESH_S * REFRESH_S) * 10**9)
    # Two histories may say the same at the same time.
    header.provenance.data_fingerprint = f"{update.history_epoch}/{update.revision}"
    _identify(packet)
    return packet


def _identify(packet: packet_pb2.Packet) -> None:
    packet.header.packet_id = ""
    content = packet.SerializeToString(deterministic=True)
    packet.header.packet_id = str(uuid.uuid5(_NAMESPACE, content.hex()))


def _without(packet: packet_pb2.Packet, fields: Iterable[str]) -> list[str]:
    """Take the named signals out of a packet; return them, or nothing where that does not help."""
    taken: list[str] = []
    for path in fields:
        match = _SIGNAL_PATH.fullmatch(path)
        section = getattr(packet.msp, match["section"]) if match else {}
        if match is None or match["name"] not in section:
            continue
        del section[match["name"]]
        packet.msp.evidence.signals.pop(match["name"], None)
        taken.append(path)
    return taken if any(getattr(packet.msp, section) for section in SECTIONS) else []
