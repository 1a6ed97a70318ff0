"""What the spec of a private cohort may say.

Every rule here keeps one promise: that what one site sends, and whether it is there at all, moves what is
released by no more than its own bounded vector, and moves when it is released not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from fmi.plain_values import quoted
from fmi.v1 import cohort_pb2
from fmi_server.privacy.budget import PRIVACY_SETTINGS, PrivacySettings, budget_faults
from fmi_server.privacy.noisy_means import PRIVATE_ESTIMATORS

__all__ = [
    "PRIVATE_INTERVAL_S",
    "SHORTEST_PERIOD_S",
    "Problem",
    "exposed_private",
    "privacy_settings",
    "private_spec_problems",
]

PRIVATE_INTERVAL_S: Final = 86_400.0
"""The period of a private cohort whose spec does not say: each costs a part of the budget."""

SHORTEST_PERIOD_S: Final = 0.1

_NAMED: Final = 3
"""Cohorts that a line names; of more it has the number."""


class Problem(NamedTuple):
    """A contradiction.

    Attributes:
        where: path of the message; empty for the spec itself.
        fields: the fields there that it is about; it is told of the first.
        rule: the rule's name.
        advice: what is wrong and what to do.
    """

    where: str
    fields: tuple[str, ...]
    rule: str
    advice: str


def privacy_settings(privacy: cohort_pb2.PrivacySpec) -> PrivacySettings:
    """Return what a spec asks of privacy."""
    return PrivacySettings(
        privacy.dp_epsilon,
        privacy.dp_delta,
        privacy.dp_noise_sigma,
        privacy.dp_sensitivity if privacy.HasField("dp_sensitivity") else None,
        privacy.dp_epochs,
        privacy.dp_clip_norm if privacy.HasField("dp_clip_norm") else None,
    )


def private_spec_problems(spec: cohort_pb2.CohortSpec) -> Iterator[Problem]:
    """Tell what in a spec contradicts the privacy that it asks for."""
    settings = privacy_settings(spec.privacy)
    if not settings.private:
        if spec.privacy.ByteSize():
            yield Problem(
                "privacy",
                ("dp_epsilon", "dp_noise_sigma"),
                "privacy_unasked",
                "is not set, and neither is dp_noise_sigma, so that no privacy is asked for: set one, or "
                "leave out what else stands under privacy",
            )
        return
    yield from _vocabulary_problems(spec)
    yield from _estimator_problems(spec.aggregation)
    yield from _schedule_problems(spec.release)
    for fault in budget_faults(settings, max(1, len(spec.signals))):
        yield Problem("privacy", (fault.setting, *PRIVACY_SETTINGS), "privacy_budget", fault.advice)


def exposed_private(private: Sequence[str], *, authenticated: bool) -> str | None:
    """Say which private cohorts are exposed because nobody is authenticated; None where none is.

    Args:
        private: The names of private cohorts.
        authenticated: Whether callers are.
    """
    if authenticated or not private:
        return None
    more = len(private) - _NAMED
    named = f"{', '.join(private[:_NAMED])}{f' and {more} more' if more > 0 else ''}"
    which = f"cohorts {named} are" if len(private) > 1 else f"cohort {named} is"
    return (
        f"{which} private, but callers are not authenticated: whoever reaches the server sees who sends, and "
        "can send in any site's name; set tls_client_ca or tokens"
    )


def _vocabulary_problems(spec: cohort_pb2.CohortSpec) -> Iterator[Problem]:
    if not spec.signals:
        yield Problem(
            "",
            ("signals",),
            "private_vocabulary",
            "must be declared in a private cohort: which names occur would tell who is there",
        )
    if spec.free_signals:
        yield Problem(
            "",
            ("free_signals",),
            "private_vocabulary",
            "cannot be true in a private cohort: which names occur would tell who is there",
        )
    for index, signal in enumerate(spec.signals):
        missing = [name for name in ("lower", "upper") if not signal.HasField(name)]
        if missing:
            yield Problem(
                f"signals[{index}]",
                (missing[0], *missing[1:]),
                "private_bounds",
                "must be set in a private cohort: the bounds limit what one site can do",
            )


def _estimator_problems(aggregation: cohort_pb2.AggregationSpec) -> Iterator[Problem]:
    if aggregation.metrics_aggregation not in ("", *PRIVATE_ESTIMATORS):
        named = quoted(aggregation.metrics_aggregation)[1:-1]
        yield Problem(
            "aggregation",
            ("metrics_aggregation",),
            "private_estimator",
            f"is {named}, under which one site can move a value by more than its "
            f"own; a private cohort takes {' or '.join(PRIVATE_ESTIMATORS)}",
        )
    guards = {"metrics_trim_alpha": 0.0, "weight_cap": 1.0, "max_byzantine": 0.0}
    given = {field.name: value for field, value in aggregation.ListFields()}
    for name, nothing in guards.items():
        if given.get(name, nothing) != nothing:
            yield Problem(
                "aggregation",
                (name,),
                "private_estimator",
                "cannot be set in a private cohort: it guards by looking at what sites sent, so that one "
                "site changes what others count for; leave it out",
            )


def _schedule_problems(release: cohort_pb2.ReleaseSpec) -> Iterator[Problem]:
    period_s = PRIVATE_INTERVAL_S
    if release.HasField("max_interval"):
        period_s = release.max_interval.ToNanoseconds() / 1e9
    if period_s < SHORTEST_PERIOD_S:
        yield Problem(
            "release",
            ("max_interval",),
            "private_schedule",
            f"is {period_s:g} s, but a private cohort has periods of at least {SHORTEST_PERIOD_S:g} s",
        )
    if release.HasField("min_interval") and release.min_interval.ToNanoseconds() / 1e9 != period_s:
        yield Problem(
            "release",
            ("min_interval", "max_interval"),
            "private_schedule",
            "cannot be set in a private cohort, which releases once in each max_interval whatever sites "
            "send; leave it out",
        )
