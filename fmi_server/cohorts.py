"""Cohorts and their rules: specs checked, compiled, and changed safely.

A `CohortSpec` is what people write. `CohortRules` is the same with every default filled in, in the
types that the pipeline works with.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final, Literal

import numpy as np
from google.protobuf.duration_pb2 import Duration
from numpy.typing import NDArray

from fmi.v1 import cohort_pb2
from fmi_server.access import AccessRules
from fmi_server.aggregation import SignalInUse, SignalRule, TransformName
from fmi_server.config import AggregationConfig
from fmi_server.contracts import FMIContractRegistry
from fmi_server.errors import (
    CohortUnknownError,
    Reason,
    SettingUnsupportedError,
    SpecChangeUnsafeError,
    SpecInvalidError,
    Violation,
)
from fmi_server.privacy.accounting import zcdp_epsilon
from fmi_server.privacy.budget import BudgetPlan, plan_budget
from fmi_server.privacy.noisy_means import PRIVATE_ESTIMATORS
from fmi_server.private_specs import PRIVATE_INTERVAL_S, privacy_settings
from fmi_server.spec_checks import spec_violations

__all__ = [
    "UNKEPT",
    "CohortRegistry",
    "CohortRules",
    "IngestRules",
    "compile_spec",
    "unkept_access",
    "unsafe_change",
]

_log = logging.getLogger(__name__)

DAY_S: Final = 86_400.0

UNKEPT: Final = (
    "cannot be kept: this server authenticates nobody, so it could not tell who calls; set tls_client_ca or "
    "tokens, or remove the access rules"
)
"""Why access rules are refused where callers are not authenticated."""

MAX_OPENABLE: Final = 256
"""Rules kept of cohorts that were asked for and not opened; names are free, so it must be bounded."""


@dataclass(frozen=True, slots=True)
class IngestRules:
    """Which packets a cohort takes. Times in seconds, sizes in bytes; see `IngestSpec`."""

    max_packet_bytes: int = 256 * 1024
    max_age_s: float = 7 * DAY_S
    max_clock_skew_s: float = 300.0
    max_norm: float = math.inf
    min_trust: float = 0.0
    dp_required: bool = False
    refuse_schema_mismatch: bool = False


@dataclass(frozen=True, slots=True)
class CohortRules:
    """The compiled rules of one cohort; see `CohortSpec` for the meaning of each.

    Attributes:
        privacy: The budget of a private cohort, whatever `aggregation` says of privacy; None where it is
            not private.
        first_release_at: Unix seconds before which a private cohort releases nothing.
    """

    name: str
    declared: bool
    schema_hash: str
    spec: cohort_pb2.CohortSpec
    signals: Mapping[str, SignalRule]
    guardrails: frozenset[str]
    free_signals: bool
    aggregation: AggregationConfig
    ingest: IngestRules
    min_interval_s: float
    max_interval_s: float
    quantum: Mapping[str, float]
    policy_window_s: float
    site_ttl_s: float
    updates_kept: int
    packets_kept_s: float
    access: AccessRules
    privacy: BudgetPlan | None = None
    first_release_at: float = 0.0


def compile_spec(
    spec: cohort_pb2.CohortSpec,
    registry: FMIContractRegistry,
    *,
    defaults: AggregationConfig,
    declared: bool = True,
) -> CohortRules:
    """Check a cohort spec and compile it.

    Args:
        spec: The spec as written; unset fields get their defaults.
        registry: Checks the contract's rules.
        defaults: Aggregation settings for the fields that the spec leaves unset.
        declared: Whether somebody wrote the spec; False for a cohort opened on demand.

    Raises:
        SpecInvalidError: The spec breaks rules; all of them are told.
    """
    spec = _with_default_privacy(spec, defaults)
    if broken := spec_violations(spec, registry):
        raise SpecInvalidError(broken)
    filled = _fill(spec, defaults)
    aggregation = filled.aggregation
    asked = privacy_settings(filled.privacy)
    return CohortRules(
        name=filled.name,
        declared=declared,
        schema_hash=_schema_hash(filled),
        spec=filled,
        signals=MappingProxyType({signal.name: _signal_rule(signal) for signal in filled.signals}),
        guardrails=frozenset(signal.name for signal in filled.signals if signal.guardrail),
        free_signals=filled.free_signals,
        aggregation=replace(
            defaults,
            metrics_trim_alpha=aggregation.metrics_trim_alpha,
            vote_min_sites=aggregation.vote_min_sites,
            metrics_aggregation=aggregation.metrics_aggregation,
            max_byzantine=(
                aggregation.max_byzantine if aggregation.HasField("max_byzantine") else None
            ),
            weight_cap=aggregation.weight_cap,
        ),
        ingest=IngestRules(
            max_packet_bytes=filled.ingest.max_packet_bytes,
            max_age_s=_seconds(filled.ingest.max_age),
            max_clock_skew_s=_seconds(filled.ingest.max_clock_skew),
            max_norm=filled.ingest.max_norm if filled.ingest.HasField("max_norm") else math.inf,
            min_trust=filled.ingest.min_trust,
            dp_required=filled.ingest.dp_required,
            refuse_schema_mismatch=(
                filled.ingest.schema_mismatch == cohort_pb2.SCHEMA_MISMATCH_REFUSE
            ),
        ),
        min_interval_s=_seconds(filled.release.min_interval),
        max_interval_s=_seconds(filled.release.max_interval),
        quantum=MappingProxyType(dict(filled.policy.quantum)),
        policy_window_s=_seconds(filled.policy.window),
        site_ttl_s=_seconds(filled.retention.site_ttl),
        updates_kept=filled.retention.updates,
        packets_kept_s=_seconds(filled.retention.packets),
        access=AccessRules.of_spec(filled.access),
        privacy=plan_budget(asked, len(filled.signals)) if asked.private else None,
        first_release_at=filled.privacy.first_release_at.ToNanoseconds() / 1e9,
    )


def _with_default_privacy(
    spec: cohort_pb2.CohortSpec, defaults: AggregationConfig
) -> cohort_pb2.CohortSpec:
    """Return a spec with the server's own privacy where it says nothing of its own."""
    if not defaults.privacy.private or privacy_settings(spec.privacy).stated:
        return spec
    private = cohort_pb2.CohortSpec()
    private.CopyFrom(spec)
    for name in ("dp_epsilon", "dp_delta", "dp_noise_sigma", "dp_epochs"):
        setattr(private.privacy, name, getattr(defaults.privacy, name))
    for name in ("dp_sensitivity", "dp_clip_norm"):
        if (given := getattr(defaults.privacy, name)) is not None:
            setattr(private.privacy, name, given)
    return private


def unkept_access(spec: cohort_pb2.CohortSpec) -> list[str]:
    """Name the fields of a spec that say who may do what, which nobody can keep who authenticates nobody.

    Lists without a name are `access` itself: nobody but operators may do anything then.
    """
    named = [f"access.{name}" for name in AccessRules.of_spec(spec.access).names]
    return named or (["access"] if spec.HasField("access") else [])


def _check_known(spec: cohort_pb2.CohortSpec) -> None:
    """Check that a spec says nothing that this version does not know of, and so would not keep.

    Raises:
        SettingUnsupportedError: It does.
    """
    known = cohort_pb2.CohortSpec()
    known.CopyFrom(spec)
    known.DiscardUnknownFields()
    if known.ByteSize() != spec.ByteSize():
        raise SettingUnsupportedError(
            "spec",
            f"of cohort {spec.name!r} has fields that this version does not know, so that it could not keep "
            "what they say; a newer version wrote it",
        )


def unsafe_change(changes: Iterable[Violation]) -> SpecChangeUnsafeError:
    """Return the refusal of a change that is unsafe, and says how it is made all the same."""
    hint = "say force to do it all the same"
    return SpecChangeUnsafeError(
        [replace(change, description=f"{change.description}; {hint}") for change in changes]
    )


class CohortRegistry:
    """The cohorts of a server, by name.

    Args:
        registry: Checks the contract's rules.
        open_cohorts: Whether an undeclared cohort comes into being with its first packet.
        defaults: Aggregation settings where a spec leaves them unset.
        max_cohorts: Cohorts at most; none is opened on demand past it.
        authenticated: Whether callers are authenticated. Where they are not, a spec with access rules is
            refused: nothing would keep them.

    Attributes:
        signals_in_use: Of a cohort, the signals that its sites send. An open cohort has no other vocabulary
            that a first spec could break.
        forgotten_before: By cohort the emission time, Unix seconds, before which packets may have been
            forgotten: a repeat of one could not be told from a new packet.
    """

    def __init__(
        self,
        registry: FMIContractRegistry,
        *,
        open_cohorts: bool = True,
        defaults: AggregationConfig | None = None,
        max_cohorts: int = 10_000,
        authenticated: bool = False,
    ) -> None:
        self._registry = registry
        self._open_cohorts = open_cohorts
        self._defaults = defaults or AggregationConfig()
        self._max_cohorts = max_cohorts
        self.authenticated = authenticated
        self.signals_in_use: Callable[[str], Mapping[str, SignalInUse]] = lambda _: {}
        self._rules: dict[str, CohortRules] = {}
        self._private: set[str] = set()
        self.forgotten_before: dict[str, float] = {}
        # Of cohorts that may be opened: a batch asks for the same one many times before it is.
        self._openable: dict[str, CohortRules] = {}
        if open_cohorts and self._defaults.privacy.private:
            raise SettingUnsupportedError(
                "open_cohorts",
                "cannot go with privacy as the default of every cohort: it needs declared signals with "
                "bounds, which a cohort that is opened on demand does not have; set open_cohorts=False",
            )
        template = cohort_pb2.CohortSpec(name="template")
        self._template = compile_spec(
            template,
            registry,
            defaults=AggregationConfig() if not open_cohorts else self._defaults,
            declared=False,
        )
        self._largest_packet_bytes = self._template.ingest.max_packet_bytes

    def __contains__(self, name: str) -> bool:
        return name in self._rules

    def __len__(self) -> int:
        return len(self._rules)

    def __iter__(self) -> Iterator[CohortRules]:
        return iter([self._rules[name] for name in sorted(self._rules)])

    @property
    def largest_packet_bytes(self) -> int:
        """Bytes of the largest packet that any cohort takes."""
        return self._largest_packet_bytes

    @property
    def any_private(self) -> bool:
        """Whether a cohort is private; then nothing that counts packets may be told."""
        return bool(self._private)

    def compile(self, spec: cohort_pb2.CohortSpec, *, declared: bool = True) -> CohortRules:
        """Check and compile a spec with this server's defaults, without declaring it.

        Raises:
            SpecInvalidError: The spec breaks rules.
            SettingUnsupportedError: It asks for what this version does not have.
        """
        _check_known(spec)
        rules = compile_spec(spec, self._registry, defaults=self._defaults, declared=declared)
        if not self.authenticated:
            for name in unkept_access(spec):
                raise SettingUnsupportedError(name, f"of cohort {rules.name!r} {UNKEPT}")
        return rules

    def access(self, name: str) -> AccessRules | None:
        """Return who may do what in a cohort; None where there is none of that name yet."""
        known = self._rules.get(name)
        return None if known is None else known.access

    def rules(self, name: str) -> CohortRules:
        """Return the rules of a cohort; of one that could be opened on demand, the defaults.

        Raises:
            CohortUnknownError: There is no such cohort and none can be opened.
        """
        known = self._rules.get(name)
        if known is not None:
            return known
        if not self._open_cohorts or len(self._rules) >= self._max_cohorts:
            raise CohortUnknownError(name)
        rules = self._openable.get(name)
        if rules is None:
            if self._registry.message_violations(cohort_pb2.CohortSpec(name=name)):
                raise CohortUnknownError(name)  # no cohort can have this name
            if len(self._openable) >= MAX_OPENABLE:
                self._openable.clear()  # also while another thread asks
            rules = self._openable[name] = self._opened(name)
        return rules

    def open(self, name: str) -> CohortRules:
        """Return the rules of a cohort and keep it as open from now on.

        Raises:
            CohortUnknownError: There is no such cohort and none can be opened.
        """
        rules = self.rules(name)
        self._rules.setdefault(name, rules)
        return rules

    def declare(
        self, spec: cohort_pb2.CohortSpec, *, force: bool = False
    ) -> tuple[CohortRules, bool]:
        """Check a spec against the one in force, and put it in force.

        Args:
            spec: The new spec.
            force: Whether a change that would break sites is made all the same.

        Returns:
            The rules in force, and whether anything changed.

        Raises:
            SpecInvalidError: The spec breaks rules.
            SpecChangeUnsafeError: The change would break sites, and `force` was not said.
            SettingUnsupportedError: It asks for what this version does not have.
        """
        rules, changed = self.check(spec, force=force)
        if changed:
            self.put_in_force(rules)
        return rules, changed

    def put_in_force(self, rules: CohortRules) -> None:
        """Put rules in force that `check` made of a spec; say which changes would break sites."""
        forced = self.unsafe_changes(rules)
        self._rules[rules.name] = rules
        (self._private.discard if rules.privacy is None else self._private.add)(rules.name)
        self._measure_packets()
        for change in forced:
            _log.warning("cohort %s was changed by force: %s", rules.name, change)

    def check(
        self, spec: cohort_pb2.CohortSpec, *, force: bool = False
    ) -> tuple[CohortRules, bool]:
        """Do all that `declare` does, but do not put the spec in force."""
        rules = self.compile(spec)
        present = self._rules.get(rules.name)
        if present is None:
            return rules, True
        unsafe = self.unsafe_changes(rules)
        if unsafe and not force:
            raise unsafe_change(unsafe)
        same = (present.schema_hash, present.access) == (rules.schema_hash, rules.access)
        return rules, not same or not present.declared

    def unsafe_changes(self, rules: CohortRules) -> list[Violation]:
        """List what rules would change that breaks sites which are built against those in force."""
        present = self._rules.get(rules.name)
        if present is None:
            return []
        if not present.declared:
            shut_out = _signals_shut_out(self.signals_in_use(rules.name), rules)
            return [*shut_out, *_older_packets(present, rules)]
        return list(_unsafe_changes(present, rules))

    def _measure_packets(self) -> None:
        taken = [rules.ingest.max_packet_bytes for rules in self._rules.values()]
        self._largest_packet_bytes = max(self._template.ingest.max_packet_bytes, *taken)

    def _opened(self, name: str) -> CohortRules:
        spec = cohort_pb2.CohortSpec()
        spec.CopyFrom(self._template.spec)
        spec.name = name
        return replace(self._template, name=name, spec=spec, schema_hash=_schema_hash(spec))


_SECTIONS: Final = {
    cohort_pb2.SIGNAL_SECTION_METRICS: "metrics",
    cohort_pb2.SIGNAL_SECTION_CONTROLLER: "controller",
    cohort_pb2.SIGNAL_SECTION_EVALUATOR: "evaluator",
    cohort_pb2.SIGNAL_SECTION_OPERATORS: "operators",
}
_TRANSFORMS: Final[Mapping[int, TransformName]] = {
    cohort_pb2.SIGNAL_TRANSFORM_LINEAR: "linear",
    cohort_pb2.SIGNAL_TRANSFORM_LOG: "log",
    cohort_pb2.SIGNAL_TRANSFORM_LOGIT: "logit",
}
_DIRECTIONS: Final[Mapping[int, Literal[1, -1] | None]] = {
    cohort_pb2.SIGNAL_DIRECTION_UNSPECIFIED: None,
    cohort_pb2.SIGNAL_DIRECTION_HIGHER_IS_BETTER: 1,
    cohort_pb2.SIGNAL_DIRECTION_LOWER_IS_BETTER: -1,
}


def _signal_rule(signal: cohort_pb2.SignalSpec) -> SignalRule:
    return SignalRule(
        name=signal.name,
        section=_SECTIONS[signal.section],
        lower=signal.lower if signal.HasField("lower") else None,
        upper=signal.upper if signal.HasField("upper") else None,
        transform=_TRANSFORMS[signal.transform],
        direction=_DIRECTIONS[signal.direction],
        scale=signal.scale if signal.HasField("scale") else None,
        unit=signal.unit,
    )


def _schema_hash(filled: cohort_pb2.CohortSpec) -> str:
    """Hash what sites are built against; who may do what is no part of it."""
    schema = cohort_pb2.CohortSpec()
    schema.CopyFrom(filled)
    schema.ClearField("access")
    return hashlib.sha256(schema.SerializeToString(deterministic=True)).hexdigest()


def _fill(spec: cohort_pb2.CohortSpec, defaults: AggregationConfig) -> cohort_pb2.CohortSpec:
    """Return a copy with every default written out, so that equal meaning gives an equal hash."""
    filled = cohort_pb2.CohortSpec()
    filled.CopyFrom(spec)
    if not filled.HasField("free_signals"):
        filled.free_signals = not filled.signals
    for signal in filled.signals:
        signal.transform = signal.transform or cohort_pb2.SIGNAL_TRANSFORM_LINEAR
    if privacy_settings(filled.privacy).private:
        _fill_private(filled, defaults)
    aggregation = filled.aggregation
    for name in ("metrics_trim_alpha", "vote_min_sites", "weight_cap"):
        if not aggregation.HasField(name):
            setattr(aggregation, name, getattr(defaults, name))
    aggregation.metrics_aggregation = (
        aggregation.metrics_aggregation or defaults.metrics_aggregation
    )
    if not aggregation.HasField("max_byzantine") and defaults.max_byzantine is not None:
        aggregation.max_byzantine = defaults.max_byzantine
    _default_duration(filled.release, "min_interval", 1.0)
    _default_duration(filled.release, "max_interval", 60.0)
    ingest = IngestRules()
    if not filled.ingest.HasField("max_packet_bytes"):
        filled.ingest.max_packet_bytes = ingest.max_packet_bytes
    _default_duration(filled.ingest, "max_age", ingest.max_age_s)
    _default_duration(filled.ingest, "max_clock_skew", ingest.max_clock_skew_s)
    if not filled.ingest.HasField("min_trust"):
        filled.ingest.min_trust = ingest.min_trust
    filled.ingest.schema_mismatch = filled.ingest.schema_mismatch or cohort_pb2.SCHEMA_MISMATCH_WARN
    _default_duration(filled.policy, "window", 30 * DAY_S)
    _default_duration(filled.retention, "site_ttl", 30 * DAY_S)
    if not filled.retention.HasField("updates"):
        filled.retention.updates = 1000
    _default_duration(filled.retention, "packets", 7 * DAY_S)
    if not filled.privacy.ByteSize():
        filled.ClearField("privacy")
    if not filled.access.ByteSize():
        filled.ClearField("access")
    return filled


def _fill_private(filled: cohort_pb2.CohortSpec, defaults: AggregationConfig) -> None:
    """Write out the defaults of a private cohort, in which nothing looks at what sites sent."""
    aggregation, release = filled.aggregation, filled.release
    aggregation.metrics_trim_alpha = 0.0
    aggregation.weight_cap = 1.0
    aggregation.max_byzantine = 0
    usual = defaults.metrics_aggregation
    aggregation.metrics_aggregation = aggregation.metrics_aggregation or (
        usual if usual in PRIVATE_ESTIMATORS else PRIVATE_ESTIMATORS[0]
    )
    _default_duration(release, "max_interval", PRIVATE_INTERVAL_S)
    release.min_interval.CopyFrom(release.max_interval)


def _default_duration(
    message: (
        cohort_pb2.ReleaseSpec
        | cohort_pb2.IngestSpec
        | cohort_pb2.PolicySpec
        | cohort_pb2.RetentionSpec
    ),
    field: Any,  # the stubs type HasField by a literal per message
    seconds: float,
) -> None:
    if not message.HasField(field):
        getattr(message, field).FromNanoseconds(int(seconds * 1e9))


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _signals_shut_out(in_use: Mapping[str, SignalInUse], new: CohortRules) -> Iterator[Violation]:
    """Tell what a first spec would do to the signals that the sites of an open cohort send."""
    for name, used in sorted(in_use.items()):
        declared = new.signals.get(name)
        field = f'signals["{name}"]'
        if declared is None and not new.free_signals:
            yield _unsafe(
                field, "signal_removed", "is not among the signals, so sites that send it break"
            )
        elif declared is not None and declared.section != used.section:
            yield _unsafe(
                field,
                "section_changed",
                f"is declared in {declared.section}, but sites send it in {used.section}",
            )
        elif declared is not None and (outside := _outside(declared, used.values)):
            lower, upper = _bounds(declared)
            yield _unsafe(
                field,
                "bounds_narrowed",
                f"is declared in [{lower:g}, {upper:g}], but {outside} of the {used.values.size} "
                "sites that send it have values outside",
            )


def _outside(signal: SignalRule, values: NDArray[np.float64]) -> int:
    """Count the values that a signal's rule would refuse. Without a rule they stand as they were sent."""
    lower, upper = _bounds(signal)
    return int(np.count_nonzero((values < lower) | (values > upper)))


def _unsafe_changes(present: CohortRules, new: CohortRules) -> Iterator[Violation]:
    for name, old in present.signals.items():
        changed = new.signals.get(name)
        if changed is not None:
            yield from _unsafe_signal_changes(old, changed)
        elif not new.free_signals:
            field = f'signals["{name}"]'
            yield _unsafe(field, "signal_removed", "is removed, so sites that send it break")
        elif old.transform != "linear":
            # Undeclared, it would be taken, and averaged on another scale.
            yield _transform_change(old, "linear")
    if present.free_signals:
        for name, added in new.signals.items():
            if name not in present.signals:
                yield from _unsafe_bounds(SignalRule(name, added.section), added)
        if not new.free_signals:
            yield _unsafe(
                "free_signals",
                "vocabulary_closed",
                "is closed, so undeclared signals are refused",
            )
    yield from _weaker_privacy(present, new)
    yield from _older_packets(present, new)


def _weaker_privacy(present: CohortRules, new: CohortRules) -> Iterator[Violation]:
    """Tell where a change lets more out than sites were promised when they sent what is held."""
    old, plan = present.privacy, new.privacy
    if old is None:
        return
    if plan is None:
        yield _unsafe(
            "privacy",
            "privacy_weakened",
            "is taken away, so that what sites sent under it is released without noise",
        )
    elif plan.delta > old.delta or zcdp_epsilon(plan.rho, old.delta) > old.epsilon * (1 + 1e-6):
        yield _unsafe(
            "privacy",
            "privacy_weakened",
            f"grows from epsilon {old.epsilon:g} at delta {old.delta:g} to epsilon {plan.epsilon:g} at delta "
            f"{plan.delta:g}, more than sites were promised when they sent what is held",
        )


def _older_packets(present: CohortRules, new: CohortRules) -> Iterator[Violation]:
    """Tell where a private cohort would take packets of a time of which it has forgotten some.

    Whether it has is known from what is refused then, and depends on who sent them.
    """
    if present.privacy is None and new.privacy is None:
        return
    for name in ("max_age", "max_clock_skew"):
        if getattr(new.ingest, f"{name}_s") > getattr(present.ingest, f"{name}_s"):
            yield _unsafe(
                f"ingest.{name}",
                "older_packets",
                "is raised in a private cohort, where it would show which packets were forgotten",
            )


def _unsafe_signal_changes(old: SignalRule, new: SignalRule) -> Iterator[Violation]:
    if new.section != old.section:
        yield _unsafe(
            f'signals["{old.name}"].section',
            "section_changed",
            f"changes from {old.section} to {new.section}",
        )
    if new.transform != old.transform:
        yield _transform_change(old, new.transform)
    yield from _unsafe_bounds(old, new)


def _transform_change(old: SignalRule, transform: str) -> Violation:
    return _unsafe(
        f'signals["{old.name}"].transform',
        "transform_changed",
        f"changes from {old.transform} to {transform}",
    )


def _unsafe_bounds(old: SignalRule, new: SignalRule) -> Iterator[Violation]:
    (old_lower, old_upper), (lower, upper) = _bounds(old), _bounds(new)
    for name, narrowed in (("lower", lower > old_lower), ("upper", upper < old_upper)):
        if narrowed:
            yield _unsafe(
                f'signals["{old.name}"].{name}',
                "bounds_narrowed",
                f"is narrowed from [{old_lower:g}, {old_upper:g}] to [{lower:g}, {upper:g}]",
            )


def _bounds(signal: SignalRule) -> tuple[float, float]:
    return (
        -math.inf if signal.lower is None else signal.lower,
        math.inf if signal.upper is None else signal.upper,
    )


def _unsafe(field: str, rule: str, description: str) -> Violation:
    return Violation(field, f"fmi.cohort_change.{rule}", description, Reason.SPEC_CHANGE_UNSAFE)
