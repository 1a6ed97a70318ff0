"""FMIValidator: contract rules, then cohort rules, then policy rules, all violations at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fmi.rules import MAX_PROBLEMS, SECTIONS
from fmi.v1 import packet_pb2
from fmi_server.access import TRUSTED, Gate, Principal
from fmi_server.cohorts import CohortRegistry, CohortRules
from fmi_server.contracts import FMIContractRegistry
from fmi_server.errors import CohortUnknownError, Reason, Violation

__all__ = ["FMIValidator", "Inspection"]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is to be said of a packet before it is stored.

    Attributes:
        violations: The rules it breaks; where there are any it is refused.
        warnings: What the site should look at although the packet is taken.
        quarantine_reason: Why it is kept but not counted; empty where it counts.
    """

    violations: tuple[Violation, ...] = ()
    warnings: tuple[str, ...] = ()
    quarantine_reason: str = ""


_CLEAN: Final = Inspection()

AHEAD_S: Final = 1.0
"""Seconds that a site's clock may be ahead before it is told so."""


class FMIValidator:
    """Checks packets.

    Args:
        registry: The contract.
        cohorts: The cohorts and their rules; where it is not given, every cohort is open with the
            defaults.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        registry: FMIContractRegistry | None = None,
        *,
        cohorts: CohortRegistry | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._registry = registry or FMIContractRegistry()
        # An empty registry is false.
        self._cohorts = CohortRegistry(self._registry) if cohorts is None else cohorts
        self._gate = Gate(self._cohorts.access)
        self._clock = clock

    def validate(self, packet: packet_pb2.Packet) -> list[Violation]:
        """List every rule that a packet breaks; an empty list means that it would be taken.

        A packet that would be quarantined breaks no rule; `inspect` tells of that too.
        """
        return list(self.inspect(packet).violations)

    def inspect(
        self,
        packet: packet_pb2.Packet,
        *,
        size: int | None = None,
        caller: Principal = TRUSTED,
        at_once: bool = False,
    ) -> Inspection:
        """Check a packet against the contract, its cohort and the policy.

        Args:
            packet: The packet.
            size: Its size on the wire in bytes; measured where it is not given.
            caller: Who sends it.
            at_once: Whether nothing that takes long may be done.

        Raises:
            LongToTellError: It breaks rules of the contract, and they were to be told at once.

        Returns:
            All that is to be said of it. Rules of the cohort are checked only where the contract's hold,
            since they would speak of fields that may not be there, and where the caller may emit: they
            would tell a stranger of the cohort.
        """
        size = packet.ByteSize() if size is None else size
        found = self._refused_unread(packet, size, caller, at_once=at_once)
        if found:
            return Inspection(tuple(found))
        header = packet.header
        try:
            rules = self._cohorts.rules(header.cohort)
        except CohortUnknownError as error:
            unknown = Violation("header.cohort", "fmi.cohort.known", str(error), error.reason)
            return Inspection((unknown,))
        found = list(self._policy_violations(packet, rules, size))
        warnings = self._clock_warnings(header)
        if header.schema_hash and header.schema_hash != rules.schema_hash:
            text = (
                f"was built against cohort spec {header.schema_hash[:12]}, the one in force is "
                f"{rules.schema_hash[:12]}; fetch it with GetCohortSpec"
            )
            if rules.ingest.refuse_schema_mismatch:
                found.append(
                    Violation(
                        "header.schema_hash",
                        "fmi.cohort.schema_hash",
                        text,
                        Reason.SCHEMA_HASH_MISMATCH,
                    )
                )
            else:
                warnings = (*warnings, f"header.schema_hash: {text}")
        kind = packet.WhichOneof("body")
        if rules.privacy is not None and kind != "msp":
            warnings = (*warnings, f"{kind}: is kept, but a private cohort releases nothing of it")
        if rules.signals or not rules.free_signals:
            found.extend(_vocabulary_violations(packet, rules))
        if found:
            return Inspection(tuple(found[:MAX_PROBLEMS]), warnings)
        quarantine = ""
        if (
            packet.HasField("ccs")
            and packet.ccs.HasField("trust")
            and packet.ccs.trust < rules.ingest.min_trust
        ):
            quarantine = (
                f"trust {packet.ccs.trust:g} is below the cohort's {rules.ingest.min_trust:g}"
            )
        if not warnings and not quarantine:
            return _CLEAN
        return Inspection((), warnings, quarantine)

    def _refused_unread(
        self, packet: packet_pb2.Packet, size: int, caller: Principal, *, at_once: bool
    ) -> Sequence[Violation]:
        """List why a packet is refused before its cohort is looked at; nothing where it is not."""
        too_large = self.size_violation(size)
        if too_large is not None:
            return [too_large]  # its rules are not worth its time
        header = packet.header
        return self._registry.violations(packet, at_once=at_once) or self._gate.violations(
            caller, header.domain_id, header.cohort
        )

    def size_violation(self, size: int) -> Violation | None:
        """Tell what is wrong with a packet that is larger than every cohort takes, before it is looked into.

        Args:
            size: Its bytes on the wire.
        """
        if size <= self._cohorts.largest_packet_bytes:
            return None
        return _too_large(size, f"no cohort takes more than {self._cohorts.largest_packet_bytes}")

    def _clock_warnings(self, header: packet_pb2.PacketHeader) -> tuple[str, ...]:
        ahead_s = header.emitted_at.seconds + header.emitted_at.nanos / 1e9 - self._clock()
        if ahead_s <= AHEAD_S:
            return ()
        text = (
            f"header.emitted_at: is {ahead_s:.0f} s ahead of the server's clock, so the packet counts as of "
            "its receipt; check the site's clock"
        )
        return (text,)

    def _policy_violations(
        self, packet: packet_pb2.Packet, rules: CohortRules, size: int
    ) -> Iterator[Violation]:
        ingest = rules.ingest
        if size > ingest.max_packet_bytes:
            yield _too_large(size, f"the cohort takes at most {ingest.max_packet_bytes}")
        emitted_at = packet.header.emitted_at
        at = emitted_at.seconds + emitted_at.nanos / 1e9
        age_s = self._clock() - at
        if age_s > ingest.max_age_s:
            yield Violation(
                "header.emitted_at",
                "fmi.policy.max_age",
                f"is {age_s:.0f} s old, the cohort takes at most {ingest.max_age_s:g} s",
                Reason.PACKET_STALE,
            )
        elif at < self._cohorts.forgotten_before.get(rules.name, -math.inf):
            yield Violation(
                "header.emitted_at",
                "fmi.policy.max_age",
                f"is {age_s:.0f} s old, and packets of that time are no longer kept, so that a repeat could "
                "not be told from a new packet",
                Reason.PACKET_STALE,
            )
        elif -age_s > ingest.max_clock_skew_s:
            yield Violation(
                "header.emitted_at",
                "fmi.policy.max_clock_skew",
                f"is {-age_s:.0f} s ahead of the server's clock, at most "
                f"{ingest.max_clock_skew_s:g} s are allowed; check the site's clock",
                Reason.PACKET_FROM_FUTURE,
            )
        if ingest.dp_required and not packet.header.provenance.HasField("applied_privacy"):
            yield Violation(
                "header.provenance.applied_privacy",
                "fmi.policy.dp_required",
                "must declare the privacy that was applied; the cohort requires it",
                Reason.PRIVACY_REQUIRED,
            )
        if ingest.max_norm < math.inf and packet.HasField("msp"):
            norm = math.hypot(
                *(value for section in SECTIONS for value in getattr(packet.msp, section).values())
            )
            if norm > ingest.max_norm:
                yield Violation(
                    "msp",
                    "fmi.policy.max_norm",
                    f"has norm {norm:g}, the cohort takes at most {ingest.max_norm:g}",
                    Reason.NORM_EXCEEDED,
                )


def _too_large(size: int, taken: str) -> Violation:
    told = f"has {size} bytes, {taken}"
    return Violation("packet", "fmi.policy.max_packet_bytes", told, Reason.PACKET_TOO_LARGE)


def _vocabulary_violations(packet: packet_pb2.Packet, rules: CohortRules) -> Iterator[Violation]:
    match packet.WhichOneof("body"):
        case "msp":
            for section in SECTIONS:
                values = getattr(packet.msp, section)
                yield from _signal_violations(rules, values, section, f"msp.{section}")
        case "pop":
            for field in ("before", "after", "control_delta"):
                values = getattr(packet.pop, field)
                in_bounds = field != "control_delta"  # a difference is not a value of the metric
                yield from _signal_violations(
                    rules, values, "metrics", f"pop.{field}", in_bounds=in_bounds
                )
            numbers = {
                name: value.number
                for name, value in packet.pop.bundle.items()
                if value.WhichOneof("kind") == "number" and name in rules.signals
            }
            yield from _signal_violations(rules, numbers, None, "pop.bundle")


def _signal_violations(
    rules: CohortRules,
    values: Mapping[str, float],
    section: str | None,
    path: str,
    *,
    in_bounds: bool = True,
) -> Iterator[Violation]:
    for name, value in values.items():
        signal = rules.signals.get(name)
        field = f'{path}["{name}"]'
        if signal is None:
            if not rules.free_signals:
                yield Violation(
                    field,
                    "fmi.cohort.vocabulary",
                    "is not a signal of the cohort; its spec names those that are",
                    Reason.COHORT_RULE_VIOLATION,
                )
        elif section is not None and signal.section != section:
            yield Violation(
                field,
                "fmi.cohort.section",
                f"stands in {section}, but is a signal of {signal.section} in this cohort",
                Reason.COHORT_RULE_VIOLATION,
            )
        elif in_bounds and (
            (signal.lower is not None and value < signal.lower)
            or (signal.upper is not None and value > signal.upper)
        ):
            lower = "-inf" if signal.lower is None else f"{signal.lower:g}"
            upper = "inf" if signal.upper is None else f"{signal.upper:g}"
            yield Violation(
                field,
                "fmi.cohort.bounds",
                f"is {value:g}, outside the cohort's bounds [{lower}, {upper}]",
                Reason.COHORT_RULE_VIOLATION,
            )
