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
import uuid
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from fmi.plain import CURRENT_REVISION
from fmi.rules import SECTIONS
from fmi.v1 import packet_pb2, update_pb2
from fmi_server.telemetry import FMITelemetry
from fmi_server.version import VERSION

__all__ = ["ParentRefusedError", "ParentUnavailableError", "Uplink", "summary_packet"]

REFRESH_S: Final = 86_400.0
"""Seconds after which a prior that did not change is sent again, so that it stays live at the parent."""

LOOK_S: Final = 3600.0
"""Seconds between two looks for priors that are due again."""

FIRST_DELAY_S: Final = 0.5
MAX_DELAY_S: Final = 60.0

MAX_SIGNALS_PER_SECTION: Final = 1024
"""As many as a packet takes; of more, those of most sites go up."""

_NAMESPACE: Final = uuid.UUID("6f9a1d0e-4b57-5f0c-9a3e-7d2c1b8e4f60")

_log = logging.getLogger(__name__)


class ParentUnavailableError(Exception):
    """The parent cannot take the packet now.

    Attributes:
        retry_after_s: Seconds that it asks to wait; None where it does not say.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ParentRefusedError(Exception):
    """The parent refuses the packet; the same packet would be refused again."""


class Uplink:
    """Sends the newest prior of each cohort to the parent, for as long as `run` runs.

    A prior that could not be delivered is tried again, with growing pauses, until it is taken, refused or
    overtaken. The packet of a revision always has the same id and the same content, so that it counts
    once at the parent however often this server is started.

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
        newest: Callable[[str], update_pb2.Update | None],
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
        self._settled: dict[str, str] = {}  # by cohort, the packet that was taken or refused last
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
            update = self._newest(cohort)
            packet = update and summary_packet(update, self._domain_id, now=self._clock())
            if not packet or self._settled.get(cohort) == packet.header.packet_id:
                continue
            try:
                await self._send(packet)
            except ParentUnavailableError as error:
                self._waiting[cohort] = None
                self._telemetry.uplink("unavailable")
                await asyncio.sleep(self._delay_s(error))
                continue
            except ParentRefusedError as error:
                self._telemetry.uplink("refused")
                _log.warning("the parent refuses the prior of cohort %s: %s", cohort, error)
            except Exception:
                # One packet's fault must not keep the others from going up.
                self._telemetry.uplink("failed")
                _log.exception("the prior of cohort %s could not be sent to the parent", cohort)
            else:
                self._telemetry.uplink("sent")
                if self._failures:
                    _log.info("the parent takes priors again")
            self._failures = 0
            self._settled[cohort] = packet.header.packet_id

    def _delay_s(self, error: ParentUnavailableError) -> float:
        if not self._failures:
            _log.warning("the parent cannot be reached, trying again: %s", error)
        self._failures += 1
        if error.retry_after_s is not None:
            return error.retry_after_s + random.uniform(0.0, FIRST_DELAY_S)  # noqa: S311 - jitter
        ceiling = min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self._failures, 16))
        return random.uniform(ceiling / 2.0, ceiling)  # noqa: S311 - jitter


def summary_packet(
    update: update_pb2.Update, domain_id: str, *, now: float
) -> packet_pb2.Packet | None:
    """Return a cohort's prior as the packet of a site, or None where it has no value at all.

    Values, standard errors and confidences are those of the estimates; `evidence.sites` is the mean of the
    effective sites over them. The packet is dated to the release, or a whole number of `REFRESH_S` later.

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
        evidence = msp.evidence.signals[name]
        evidence.confidence = found.confidence
        if found.HasField("stderr"):
            evidence.stderr = found.stderr
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
    released_ns = update.released_at.ToNanoseconds()
    age = max(0.0, now - released_ns / 1e9)
    header.emitted_at.FromNanoseconds(released_ns + int(age // REFRESH_S * REFRESH_S) * 10**9)
    told_apart = (domain_id, update.history_epoch, update.cohort, update.revision)
    header.packet_id = str(
        uuid.uuid5(_NAMESPACE, repr((*told_apart, header.emitted_at.ToNanoseconds())))
    )
    return packet
