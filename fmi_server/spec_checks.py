"""What is wrong with a cohort spec, all of it at once."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from itertools import chain
from typing import Final

from fmi.v1 import cohort_pb2
from fmi_server.contracts import FMIContractRegistry
from fmi_server.errors import Reason, Violation

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
            go with their neighbours, is not told a second time.

    Returns:
        The broken rules, and with the reason SETTING_UNSUPPORTED the settings that this version does not
        have.
    """
    found = [v for v in registry.message_violations(spec) if not _inside(v.field, unreadable)]
    doubtful = {_parent(path) for path in chain(unreadable, (v.field for v in found))}
    found += [
        v
        for v in _cross_field_violations(spec)
        if _parent(v.field) not in doubtful and not _inside(v.field, unreadable)
    ]
    found += _unsupported(spec)
    return found


_LAST_STEP: Final = re.compile(r"(\.?[^.\[]*|\[[^\]]*\])$")


def _parent(path: str) -> str:
    return _LAST_STEP.sub("", path)


def _inside(path: str, roots: Collection[str]) -> bool:
    return any(path == root or path.startswith((f"{root}.", f"{root}[")) for root in roots)


def _cross_field_violations(spec: cohort_pb2.CohortSpec) -> Iterator[Violation]:
    seen: set[str] = set()
    for index, signal in enumerate(spec.signals):
        where = f"signals[{index}]"
        if signal.name in seen:
            yield _invalid(f"{where}.name", "signal_once", f"{signal.name!r} is declared twice")
        seen.add(signal.name)
        has_lower, has_upper = signal.HasField("lower"), signal.HasField("upper")
        if signal.transform == cohort_pb2.SIGNAL_TRANSFORM_LOG and not (
            has_lower and signal.lower > 0
        ):
            yield _invalid(
                f"{where}.lower", "log_bounds", "transform log needs a lower bound above 0"
            )
        if signal.transform == cohort_pb2.SIGNAL_TRANSFORM_LOGIT and not (
            has_lower and has_upper and signal.lower > 0 and signal.upper < 1
        ):
            yield _invalid(
                f"{where}.lower", "logit_bounds", "transform logit needs bounds inside 0 and 1"
            )
        if signal.guardrail and not signal.direction:
            yield _invalid(
                f"{where}.guardrail", "guardrail_direction", "a guardrail needs a direction"
            )
        scored = signal.direction or signal.guardrail
        if scored and signal.section != cohort_pb2.SIGNAL_SECTION_METRICS:
            yield _invalid(
                f"{where}.direction", "metric_direction", "only metrics have a direction"
            )
    release = spec.release
    given = release.HasField
    shortest = release.min_interval.ToNanoseconds() / 1e9 if given("min_interval") else 1.0
    longest = release.max_interval.ToNanoseconds() / 1e9 if given("max_interval") else 60.0
    if longest < shortest:
        yield _invalid(
            "release.max_interval",
            "interval_order",
            f"is {longest:g} s, but must be at least min_interval, {shortest:g} s",
        )


def _invalid(field: str, rule: str, description: str) -> Violation:
    return Violation(field, f"fmi.cohort_spec.{rule}", description, Reason.SPEC_INVALID)


def _unsupported(spec: cohort_pb2.CohortSpec) -> Iterator[Violation]:
    privacy = spec.privacy
    for name in ("dp_epsilon", "dp_delta", "dp_noise_sigma", "dp_epochs"):
        if getattr(privacy, name):
            yield _lacking(
                f"privacy.{name}",
                "this version has no differential privacy; remove it and do not rely on noise, or use "
                "a version that has it",
            )
    if privacy.HasField("dp_sensitivity"):
        yield _lacking(
            "privacy.dp_sensitivity", "this version has no differential privacy; remove it"
        )
    for name in ("emit", "subscribe", "admin"):
        if getattr(spec.access, name):
            yield _lacking(
                f"access.{name}",
                "this version does not authenticate principals, so it cannot hold access rules; remove "
                "them and keep the server on a network that only its sites reach",
            )


def _lacking(field: str, description: str) -> Violation:
    return Violation(field, "fmi.cohort_spec.unsupported", description, Reason.SETTING_UNSUPPORTED)
