"""What the processes of the demo are told to do, and what they tell while they do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fmi_demo.scenario import Settings

__all__ = [
    "Curve",
    "Emitted",
    "HintTried",
    "LatePlan",
    "SiteFinished",
    "SitePlan",
    "Tuned",
    "WarmStarted",
    "site_name",
]


def site_name(site: int) -> str:
    """Return the `domain_id` of a site by its index, from 0."""
    return f"site-{site + 1:02d}"


@dataclass(frozen=True, slots=True)
class SitePlan:
    """What one site shall do.

    Attributes:
        target: Where the server is.
        site: Index of the site, from 0.
        sites: Sites in all.
        seed: Of the whole demo.
        budget: Evaluations of its tuner.
        experiments: Rows of its causal experiment.
        lies: Whether it sends the reverse of what it found.
    """

    target: str
    site: int
    sites: int
    seed: int
    budget: int
    experiments: int
    lies: bool


@dataclass(frozen=True, slots=True)
class Tuned:
    """A site has evaluated some candidates; the best of them had this accuracy."""

    site_id: str
    evaluations: int
    accuracy: float


@dataclass(frozen=True, slots=True)
class Emitted:
    """A packet of a site is durable in all cohorts.

    Attributes:
        site_id: The site.
        kind: `MSP`, `POP` or `CCS`.
        text: What the site found, in words; a liar has sent the reverse.
    """

    site_id: str
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class SiteFinished:
    """A site is done.

    Attributes:
        site_id: The site.
        form: Index of the writer whose form it has.
        lies: Whether it lied.
        images: Images that it has.
        settings: The best it found.
        accuracy: Of `settings`, on its own images.
        default_accuracy: Of the library's defaults.
        claimed: The settings that it sent.
        packets: Packets that it sent, over all cohorts.
        gains: What each policy did to its accuracy, by the policy, in truth.
    """

    site_id: str
    form: int
    lies: bool
    images: int
    settings: Settings
    accuracy: float
    default_accuracy: float
    claimed: Settings
    packets: int
    gains: dict[str, float]


@dataclass(frozen=True, slots=True)
class LatePlan:
    """What the late site shall do.

    Attributes:
        target: Where the server is.
        sites: Sites before it.
        seed: Of the whole demo.
        budget: Evaluations of each search.
        repetitions: Which repetitions this process runs.
        tries_hint: Whether this process tries the policy hint.
    """

    target: str
    sites: int
    seed: int
    budget: int
    repetitions: tuple[int, ...]
    tries_hint: bool


@dataclass(frozen=True, slots=True)
class WarmStarted:
    """A cohort gave the late site a warm start.

    Attributes:
        cohort: The cohort.
        init: The settings it gave.
        source: The group of sites behind it: a `WarmStartSource` of the contract, such as
            `profile_and_regime`, sites of the same profile class in the nearest regime.
        accuracy: Of `init` at the late site.
    """

    cohort: str
    init: Settings
    source: str
    accuracy: float


@dataclass(frozen=True, slots=True)
class Curve:
    """One search of the late site: the accuracy of each candidate in turn."""

    arm: str
    repetition: int
    accuracies: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class HintTried:
    """The late site followed a cohort's policy hint, or there was none.

    Attributes:
        cohort: The cohort.
        reason: What the hint says of itself.
        bundle: The policy; empty where there is no hint.
        before: Accuracy from the warm start, without the policy.
        after: Accuracy with it.
        sites: Sites that reported the policy, liars included; 0 where there is no hint.
    """

    cohort: str
    reason: str
    bundle: dict[str, Any]
    before: float
    after: float
    sites: int
