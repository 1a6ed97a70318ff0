"""What is wrong with a cohort spec, all of it at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from fmi.rules import has_too_much
from fmi.v1 import cohort_pb2
from fmi_server.contracts import FMIContractRegistry
from fmi_server.errors import LAST_MOMENT_S, Reason, Violation
from fmi_server.private_specs import privacy_settings, private_spec_problems

__all__ = ["spec_violations"]


def spec_violations(
    spec: cohort_pb2.CohortSpec,
    registry: FMIContractRegistry,
    *,
    unreadable: Collection[str] = (),
) -> list[Violation]:
    """List everything that keeps a cohort spec from being in force.

    Args:
        spec: The spec as written.
        registry: Checks the contract's rules.
        unreadable: Paths of fields that were written and could not be read. That they are unset, or do not
            go with others, is not told a second time.

    Returns:
        The broken rules.
    """
    lost = frozenset(unreadable)
    found = [v for v in registry.message_violations(spec) if not _inside(v.field, lost)]
    if has_too_much(found):
        return found  # what signals break with each other is not worth the time of so many
    told = {violation.field for violation in found}
    if times := list(_invalid_times(spec)):
        # The rules below reckon with them.
        return found + [violation for violation in times if violation.field not in told]
    found += [
        broken.violation
        for broken in _cross_field_rules(spec)
        if not any(path in told or _inside(path, lost) for path in broken.reads)
    ]
    return found


def _inside(path: str, roots: Collection[str]) -> bool:
    """Say whether a field is one of `roots`, or a part of one."""
    return path in roots or any(path[:i] in roots for i, char in enumerate(path) if char in ".[")


@dataclass(frozen=True, slots=True)
class _Broken:
    """A broken rule about several fields.

    Attributes:
        violation: What to tell.
        reads: Paths of the fields that it is about. Where one of them is told of already, or could not be
            read, this would be told of what nobody wrote.
    """

    violation: Violation
    reads: tuple[str, ...]


def _cross_field_rules(spec: cohort_pb2.CohortSpec) -> Iterator[_Broken]:
    seen: set[str] = set()
    for index, signal in enumerate(spec.signals):
        where = f"signals[{index}]"
        if signal.name in seen:
            told = f"{signal.name[:140]!r} is declared twice"
            yield _broken(where, ("name",), "signal_once", told)
        seen.add(signal.name)
        yield from _transform_rules(where, signal)
        yield from _direction_rules(where, signal)
    for problem in private_spec_problems(spec):
        yield _broken(*problem)
    if not privacy_settings(spec.privacy).private:
        yield from _release_rules(spec.release)


def _invalid_times(spec: cohort_pb2.CohortSpec) -> Iterator[Violation]:
    """Tell of durations and times that protobuf defines nothing for."""
    for section, message in spec.ListFields():
        if not isinstance(message, Message):
            continue
        for field, value in message.ListFields():
            if isinstance(value, Duration):
                valid = abs(value.seconds) <= _LONGEST_S and abs(value.nanos) < 1_000_000_000
                valid = valid and value.seconds * value.nanos >= 0
                allowed = (
                    "duration: at most 10,000 years, nanos below 1e9 and of the sign of seconds"
                )
            elif isinstance(value, Timestamp):
                valid = value.seconds <= LAST_MOMENT_S and 0 <= value.nanos < 1_000_000_000
                allowed = "timestamp: up to the year 9999, nanos from 0 to 999999999"
            else:
                continue
            if not valid:
                yield Violation(
                    f"{section.name}.{field.name}",
                    "fmi.cohort_spec.valid_time",
                    f"must be a valid {allowed}",
                    Reason.SPEC_INVALID,
                )


_LONGEST_S: Final = 315_576_000_000
"""The longest `google.protobuf.Duration` that is defined."""


def _transform_rules(where: str, signal: cohort_pb2.SignalSpec) -> Iterator[_Broken]:
    bounded = signal.HasField("lower") and signal.HasField("upper")
    above_0 = signal.HasField("lower") and signal.lower > 0
    if signal.transform == cohort_pb2.SIGNAL_TRANSFORM_LOG and not above_0:
        yield _broken(
            where, ("lower", "transform"), "log_bounds", "transform log needs a lower bound above 0"
        )
    share = bounded and signal.lower >= 0 and signal.upper <= 1
    if signal.transform == cohort_pb2.SIGNAL_TRANSFORM_LOGIT and not share:
        yield _broken(
            where,
            ("lower", "upper", "transform"),
            "logit_bounds",
            "transform logit needs bounds within 0 and 1",
        )


def _direction_rules(where: str, signal: cohort_pb2.SignalSpec) -> Iterator[_Broken]:
    if signal.guardrail and not signal.direction:
        yield _broken(
            where,
            ("guardrail", "direction"),
            "guardrail_direction",
            "a guardrail needs a direction",
        )
    scored = signal.direction or signal.guardrail
    if scored and signal.section != cohort_pb2.SIGNAL_SECTION_METRICS:
        yield _broken(
            where,
            ("direction", "guardrail", "section"),
            "metric_direction",
            "only metrics have a direction",
        )


def _release_rules(release: cohort_pb2.ReleaseSpec) -> Iterator[_Broken]:
    given = release.HasField
    shortest = release.min_interval.ToNanoseconds() / 1e9 if given("min_interval") else 1.0
    longest = release.max_interval.ToNanoseconds() / 1e9 if given("max_interval") else 60.0
    if longest < shortest:
        yield _broken(
            "release",
            ("max_interval", "min_interval"),
            "interval_order",
            f"is {longest:g} s, but must be at least min_interval, {shortest:g} s",
        )


def _broken(where: str, reads: tuple[str, ...], rule: str, description: str) -> _Broken:
    """Tell a rule of the first of the fields that it reads."""
    paths = tuple(f"{where}.{name}" if where else name for name in reads)
    violation = Violation(paths[0], f"fmi.cohort_spec.{rule}", description, Reason.SPEC_INVALID)
    return _Broken(violation, paths)
