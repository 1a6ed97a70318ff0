"""LocalPrivacy: a site adds its own noise before anything leaves it, and says so in the packet.

    privacy = LocalPrivacy({"tau": (0.5, 1.0)}, epsilon=8.0, delta=1e-6, emissions=4)
    client = FMIClient(target, domain_id="site_001", privacy=privacy)
    client.emit_msp(controller={"tau": 0.9})  # what leaves is private, whoever reads it

The guarantee is local (epsilon, delta)-differential privacy. Its neighbouring inputs are *any two*: what a
site's packets say of its data, replaced by anything else that they could say. Whoever sees all packets that
the budget pays for, the server included, learns no more about which of the two it was than that allows.

The mechanism: each of d signals is clipped to its bounds and rounded to a grid of -B..B, which does not
depend on data. Any two such vectors are at most `2 B sqrt(d)` apart in L2, since a replacement may move
every signal from one bound to the other. Discrete Gaussian noise of standard deviation sigma on each is
then rho-zCDP with `rho = (2 B sqrt(d))^2 / (2 sigma^2)` (Canonne, Kamath and Steinke, NeurIPS 2020, Theorem 4
and its multivariate form), rho adds up over packets, and rho gives (epsilon, delta); `_zcdp` has how. What is
done with the noisy integers after that, above all moving them into the limits of the cohort, is
post-processing and free.

What stays of a packet beside its noisy signals: its id, site, cohort, class, contract revision, schema hash,
time and software. These, the section in which a signal stands, and whether and when a packet is sent at all
are not protected: a program must not choose them by its data. Evidence, the window span, the number of
samples, the data fingerprint and the regime are left out. Packets of other kinds are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self, TypeAlias

from fmi.rules import MAX_PROBLEMS, SECTIONS
from fmi.v1 import cohort_pb2, packet_pb2
from fmi_client._arguments import check_kind, check_number, check_path, check_whole
from fmi_client._contract import check_packet
from fmi_client._discrete_gaussian import discrete_gaussian
from fmi_client._privacy_account import Account, FileAccount, MemoryAccount
from fmi_client._zcdp import zcdp_epsilon, zcdp_rho
from fmi_client.errors import (
    ConfigurationError,
    PrivacyBudgetError,
    PrivacyCoverageError,
    Violation,
)

__all__ = ["MECHANISM", "BoundsLike", "LocalPrivacy", "SignalBounds", "declares_privacy"]

MECHANISM: Final = "discrete_gaussian"
"""What packets say in `applied_privacy.mechanism`."""

_HALF_WIDTH: Final = 1 << 20
"""B: grid points between the middle of the bounds and each end. Noise is far coarser than a step of it."""

_MOST_SIGMAS: Final = 1 << 40
"""The most noise, in half widths; past it a packet says nothing at all."""

_LARGEST: Final = 1e150  # of the contract's signals
_ROUNDING: Final = 1.0 + 1e-12
_LEAST_EPSILON: Final = 1e-9  # the contract wants one above 0, and delta may pay for all of it


@dataclass(frozen=True, slots=True)
class SignalBounds:
    """The bounds of one signal.

    Attributes:
        lower: The least value; a smaller one is moved here before noise. In the signal's unit.
        upper: The largest value; larger than `lower`.
        limits: The least and the largest value with noise: what the cohort takes, and no less than the
            bounds. What is beyond is moved there, which draws means to the middle; wider limits do so less,
            and cost neither privacy nor noise. None means the bounds.
        section: The section in which the signal must stand, for example ``controller``; empty means any.
        log: Whether noise is added to the logarithm, as fits a signal that the cohort averages by it;
            `lower`, and the lower limit, must be above 0.
    """

    lower: float
    upper: float
    limits: tuple[float, float] | None = None
    section: str = ""
    log: bool = False


BoundsLike: TypeAlias = SignalBounds | tuple[float, float]
"""Bounds, or just ``(lower, upper)``."""


class LocalPrivacy:
    """Makes Meta Signal Packs private before they leave the site, and keeps account of what that cost.

    Give it to a client or an emitter (``privacy=``); one may serve several, and several threads. Every
    packet that does not declare `applied_privacy` already is then made private; a repeat of a packet id
    gives the packet of the first time, so that sending again is no second draw of noise.

    The budget is for everything that is ever emitted about the same data. Without `account` it is kept in
    memory: a process that is started again has a new one. With it, all that use the file share what was
    spent; do not delete it, or bring it back from a backup.

    Args:
        bounds: By name the bounds of each signal. A packet must have exactly these; the more there are,
            the more noise each has. They must not be chosen by looking at the site's data.
        epsilon: Of all packets together; greater than 0.
        delta: Of all packets together; strictly between 0 and 1, well below one by the number of sites.
        emissions: Packets that the budget is divided over, equally; after these, packets are refused.
        regime_is_public: Whether the regime tag says nothing of the site's data, and so may stay.
        account: A file in which what was spent outlives the process; made where there is none.

    Raises:
        ConfigurationError: The settings are out of range; `violations` names every signal at fault.
        PrivacyAccountError: The file cannot be used.
    """

    def __init__(
        self,
        bounds: Mapping[str, BoundsLike],
        *,
        epsilon: float,
        delta: float,
        emissions: int = 1,
        regime_is_public: bool = False,
        account: str | Path | None = None,
    ) -> None:
        if not isinstance(bounds, Mapping):
            raise ConfigurationError("LocalPrivacy: bounds must be a mapping, bounds by signal")
        check_number("LocalPrivacy: epsilon", epsilon)
        check_number("LocalPrivacy: delta", delta)
        check_whole("LocalPrivacy: emissions", emissions)
        check_kind("LocalPrivacy: regime_is_public", regime_is_public, bool)
        check_path("LocalPrivacy: account", account, optional=True)
        self._scales = _scales(bounds)
        if not 0.0 < epsilon < math.inf:
            raise ConfigurationError(f"LocalPrivacy: epsilon must be positive, got {epsilon}")
        if not 0.0 < delta < 1.0:
            raise ConfigurationError(
                f"LocalPrivacy: delta must lie strictly between 0 and 1, got {delta}; Gaussian noise "
                "promises nothing without one: choose it far below 1 / (number of sites), like 1e-6"
            )
        if emissions < 1:
            raise ConfigurationError(f"LocalPrivacy: emissions must be at least 1, got {emissions}")
        self._epsilon = epsilon
        self._delta = delta
        self._emissions = emissions
        self._regime_is_public = regime_is_public
        self._budget = Fraction(zcdp_rho(epsilon, delta))
        sensitivity_squared = (2 * _HALF_WIDTH) ** 2 * len(self._scales)
        self._sigma = _sigma_for(sensitivity_squared, self._budget / emissions)
        self._rho = Fraction(sensitivity_squared, 2 * self._sigma**2)
        self._account: Account = MemoryAccount() if account is None else FileAccount(Path(account))

    @classmethod
    def from_spec(
        cls,
        spec: cohort_pb2.CohortSpec,
        *,
        epsilon: float,
        delta: float,
        emissions: int = 1,
        bounds: Mapping[str, tuple[float, float]] | None = None,
        signals: Iterable[str] | None = None,
        regime_is_public: bool = False,
        account: str | Path | None = None,
    ) -> Self:
        """Take the signals and their bounds from a cohort's spec, for example ``client.cohort_spec().spec``.

        Signals that the cohort averages by their logarithm have their noise there.

        Args:
            spec: The spec.
            epsilon: As `LocalPrivacy`.
            delta: As `LocalPrivacy`.
            emissions: As `LocalPrivacy`.
            bounds: By name narrower bounds, ``(lower, upper)``, which mean less noise; the spec's are then
                the limits. Needed where the spec has no bounds.
            signals: The names of those that the site emits; None means all of the spec.
            regime_is_public: As `LocalPrivacy`.
            account: As `LocalPrivacy`.

        Raises:
            ConfigurationError: As `LocalPrivacy`; or a signal has no bounds, or is not in the spec, and
                `violations` names all of these.
            PrivacyAccountError: The file cannot be used.
        """
        declared = {signal.name: signal for signal in spec.signals}
        own = dict(bounds or {})
        wanted = list(declared) if signals is None else list(signals)
        unknown = [name for name in (*wanted, *own) if name not in declared]
        unbounded = [
            name
            for name in wanted
            if name in declared
            and name not in own
            and not (declared[name].HasField("lower") and declared[name].HasField("upper"))
        ]
        _refuse(
            [
                *(
                    _at_fault(name, "is not a signal of the spec")
                    for name in dict.fromkeys(unknown)
                ),
                *(
                    _at_fault(
                        name, "has no bounds in the spec; name some of your own, or leave it out"
                    )
                    for name in unbounded
                ),
                *(
                    _at_fault(str(name), f"is {told!r}; it must be two numbers, (lower, upper)")
                    for name, told in own.items()
                    if not _is_pair(told)
                ),
            ]
        )
        return cls(
            {name: _bounds_in(declared[name], own.get(name)) for name in wanted},
            epsilon=epsilon,
            delta=delta,
            emissions=emissions,
            regime_is_public=regime_is_public,
            account=account,
        )

    @property
    def bounds(self) -> Mapping[str, SignalBounds]:
        """The bounds of each signal, by name."""
        return MappingProxyType({name: scale.bounds for name, scale in self._scales.items()})

    @property
    def epsilon(self) -> float:
        """Epsilon of all packets together."""
        return self._epsilon

    @property
    def delta(self) -> float:
        """Delta of all packets together, and of each."""
        return self._delta

    @property
    def emissions(self) -> int:
        """Packets that the budget is divided over."""
        return self._emissions

    @property
    def regime_is_public(self) -> bool:
        """Whether the regime tag says nothing of the site's data."""
        return self._regime_is_public

    @property
    def packet_epsilon(self) -> float:
        """Epsilon of one packet by itself, at `delta`; packets declare it.

        Epsilons do not add up: that of all packets is less than their sum, and is what `epsilon` bounds.
        """
        epsilon = self._epsilon_of(self._rho) * _ROUNDING
        return min(self._epsilon, max(_LEAST_EPSILON, epsilon))

    @property
    def noise_sigma(self) -> float:
        """Standard deviation of the noise of each signal, in half widths of its bounds.

        At 1, noise takes a value from the middle to a bound. A mean over n sites has it by ``sqrt(n)``.
        """
        return self._sigma / _HALF_WIDTH

    @property
    def spent(self) -> float:
        """The epsilon spent so far, at `delta`.

        Raises:
            PrivacyAccountError: The file cannot be read.
        """
        return self._epsilon_of(self._account.spent())

    @property
    def emissions_left(self) -> int:
        """Packets that the budget still pays for.

        Raises:
            PrivacyAccountError: The file cannot be read.
        """
        return max(0, math.floor((self._budget - self._account.spent()) / self._rho))

    def apply(self, packet: packet_pb2.Packet) -> packet_pb2.Packet:
        """Return a packet's private copy, and pay for it.

        Args:
            packet: A Meta Signal Pack; it is left as it is. One that declares `applied_privacy` is returned
                as it is: its site has seen to it, or it is sent again.

        Returns:
            The copy. For an id that was there before it is the same packet, and costs nothing.

        Raises:
            ContractError: The packet breaks rules of the contract.
            PrivacyCoverageError: It is another kind of packet, has a signal without bounds, or lacks one
                that has bounds; `violations` names all of them.
            PrivacyBudgetError: The budget does not pay for another packet.
            PacketIdReusedError: The id was used before for other content, or more than 256 packets ago.
            PrivacyAccountError: The file cannot be used.
            ForkedError: The budget is in memory, and of the process that forked this one.
        """
        if declares_privacy(packet):
            return packet
        check_packet(packet)
        self._check_coverage(packet)
        content = packet_pb2.Packet()
        content.CopyFrom(packet)
        content.header.ClearField("emitted_at")
        data = self._account.once(
            (packet.header.domain_id, packet.header.packet_id),
            content.SerializeToString(deterministic=True),
            self._rho,
            self._check_budget,
            lambda: self._private(packet).SerializeToString(deterministic=True),
        )
        return packet_pb2.Packet.FromString(data)

    def _check_coverage(self, packet: packet_pb2.Packet) -> None:
        found = list(self._uncovered(packet))
        if not found:
            return
        raise PrivacyCoverageError(
            f"local privacy does not cover packet {packet.header.packet_id}: "
            + "; ".join(map(str, found[:MAX_PROBLEMS])),
            violations=found[:MAX_PROBLEMS],
        )

    def _uncovered(self, packet: packet_pb2.Packet) -> Iterator[Violation]:
        kind = packet.WhichOneof("body") or ""
        if kind != "msp":
            yield Violation(
                kind,
                "fmi.local_privacy.kind",
                "is not covered: only Meta Signal Packs (msp) can be made private; emit it from a client "
                "without local privacy if it may be read as it is",
            )
            return
        missing = dict(self._scales)
        for section in SECTIONS:
            for name in sorted(getattr(packet.msp, section)):
                field = f'msp.{section}["{name}"]'
                scale = missing.pop(name, None)
                if scale is None:
                    yield Violation(
                        field,
                        "fmi.local_privacy.bounds",
                        "has no bounds; declare them, or leave the signal out",
                    )
                elif scale.bounds.section not in ("", section):
                    yield Violation(
                        field,
                        "fmi.local_privacy.section",
                        f"must stand in {scale.bounds.section}, where the cohort has it",
                    )
        for name in missing:
            yield Violation(
                f'msp["{name}"]',
                "fmi.local_privacy.complete",
                "is missing; whether a signal is there would tell of the data: send it each time, or declare "
                "no bounds for it",
            )

    def _check_budget(self, rho: Fraction) -> None:
        if rho <= self._budget:
            return
        spent = self._epsilon_of(rho - self._rho)
        raise PrivacyBudgetError(
            f"the budget of local privacy is spent: epsilon {spent:.4g} of {self._epsilon:g} at delta "
            f"{self._delta:g}, and another packet does not fit; what was sent stays private, and nothing "
            "more can be sent about the same data",
            metadata={"spent": repr(spent), "epsilon": repr(self._epsilon)},
        )

    def _epsilon_of(self, rho: Fraction) -> float:
        return zcdp_epsilon(float(rho), self._delta)

    def _private(self, packet: packet_pb2.Packet) -> packet_pb2.Packet:
        """Build the private copy from nothing, so that fields of a newer contract do not come along."""
        header = packet.header
        private = packet_pb2.Packet(
            header=packet_pb2.PacketHeader(
                packet_id=header.packet_id,
                domain_id=header.domain_id,
                cohort=header.cohort,
                profile_class=header.profile_class,
                rev=header.rev,
                schema_hash=header.schema_hash,
                emitted_at=header.emitted_at,
                provenance=packet_pb2.Provenance(
                    software=header.provenance.software,
                    regime_tag=header.provenance.regime_tag if self._regime_is_public else "",
                    applied_privacy=packet_pb2.AppliedPrivacy(
                        mechanism=MECHANISM, epsilon=self.packet_epsilon, delta=self._delta
                    ),
                ),
            ),
            msp=packet_pb2.MetaSignalPack(),
        )
        for section in SECTIONS:
            values, noisy = getattr(packet.msp, section), getattr(private.msp, section)
            for name in sorted(values):
                scale = self._scales[name]
                noisy[name] = scale.value(
                    scale.grid_point(values[name]) + discrete_gaussian(self._sigma)
                )
        return private


def declares_privacy(packet: packet_pb2.Packet) -> bool:
    """Say whether a packet declares that privacy was applied."""
    return packet.header.provenance.HasField("applied_privacy")


class _Scale:
    """The grid of one signal: its values as integers, and back."""

    def __init__(self, bounds: SignalBounds) -> None:
        self.bounds = bounds
        self._least, self._most = bounds.limits or (bounds.lower, bounds.upper)
        if bounds.log:
            self._start = Fraction(math.log(bounds.lower))
            self._width = Fraction(math.log(bounds.upper)) - self._start
        else:
            self._start = Fraction(bounds.lower)
            self._width = Fraction(bounds.upper) - self._start

    def grid_point(self, value: float) -> int:
        """Return where a value lies in -B..B, once it is clipped to the bounds."""
        clipped = min(max(value, self.bounds.lower), self.bounds.upper)
        place = Fraction(math.log(clipped) if self.bounds.log else clipped)
        steps = round((place - self._start) / self._width * 2 * _HALF_WIDTH)
        # Here, and not by what rounding may do, the sensitivity is bounded.
        return min(max(steps, 0), 2 * _HALF_WIDTH) - _HALF_WIDTH

    def value(self, point: int) -> float:
        """Return the value of a grid point, which may lie beyond the bounds, moved into the limits."""
        place = self._start + self._width * Fraction(point + _HALF_WIDTH, 2 * _HALF_WIDTH)
        if self.bounds.log:
            least, most = math.log(self._least), math.log(self._most)
            moved = math.exp(float(min(max(place, Fraction(least)), Fraction(most))))
        else:
            moved = float(min(max(place, Fraction(self._least)), Fraction(self._most)))
        return min(max(moved, self._least), self._most)


def _sigma_for(sensitivity_squared: int, rho: Fraction) -> int:
    """Return the least whole standard deviation with which noise costs at most `rho`."""
    most = _MOST_SIGMAS * _HALF_WIDTH
    variance = Fraction(sensitivity_squared, 2)
    if variance <= most * most * rho:
        return math.isqrt(math.ceil(variance / rho) - 1) + 1
    raise ConfigurationError(
        "LocalPrivacy: the budget of a packet is so small that nothing but noise would be sent; raise "
        "epsilon, or lower emissions"
    )


def _scales(given: Mapping[str, BoundsLike]) -> dict[str, _Scale]:
    _refuse(
        _at_fault(str(name), problem)
        for name, told in given.items()
        if (problem := _kind_problem(name, told))
    )
    bounds = {
        name: told if isinstance(told, SignalBounds) else SignalBounds(told[0], told[1])
        for name, told in given.items()
    }
    if not bounds:
        raise ConfigurationError("LocalPrivacy: declare the bounds of at least one signal")
    _refuse(
        _at_fault(name, problem)
        for name, told in bounds.items()
        if (problem := _bounds_problem(told))
    )
    return {name: _Scale(told) for name, told in bounds.items()}


def _kind_problem(name: object, told: object) -> str:
    """Say what is no bounds at all in what was given as such; empty for nothing."""
    if not isinstance(name, str):
        return "is not the name of a signal, which is a text"
    if not isinstance(told, SignalBounds):
        return "" if _is_pair(told) else f"is {told!r}; it must be two numbers, (lower, upper)"
    if not _is_pair((told.lower, told.upper)):
        return f"has bounds {told.lower!r} and {told.upper!r}; they must be numbers"
    if told.limits is not None and not _is_pair(told.limits):
        return f"has limits {told.limits!r}; they must be two numbers, or None"
    log: object = told.log
    if not isinstance(log, bool):
        return f"has log={log!r}; it must be True or False"
    return ""


def _is_pair(told: Any) -> bool:
    try:
        pair = tuple(told)
    except TypeError:
        return False
    return len(pair) == 2 and all(
        isinstance(value, Real) and not isinstance(value, bool) for value in pair
    )


def _bounds_problem(bounds: SignalBounds) -> str:
    """Say what is wrong with bounds; empty for nothing."""
    least, most = bounds.limits or (bounds.lower, bounds.upper)
    if not -_LARGEST <= least <= bounds.lower < bounds.upper <= most <= _LARGEST:
        return (
            f"has bounds {bounds.lower} and {bounds.upper}, limits {least} and {most}: lower must be less "
            f"than upper, the limits must hold both, and all lie within ±{_LARGEST:g}"
        )
    if bounds.section not in ("", *SECTIONS):
        return f"has section {bounds.section!r}; the sections are {', '.join(SECTIONS)}"
    if bounds.log and not (least > 0.0 and math.log(bounds.lower) < math.log(bounds.upper)):
        return (
            f"is on a logarithmic scale, so its bounds and limits must be above 0; {least} is not"
        )
    return ""


def _bounds_in(signal: cohort_pb2.SignalSpec, own: tuple[float, float] | None) -> SignalBounds:
    """Return the bounds of a signal of a spec, narrower ones of the site's own first."""
    limits = (
        signal.lower if signal.HasField("lower") else -_LARGEST,
        signal.upper if signal.HasField("upper") else _LARGEST,
    )
    section = cohort_pb2.SignalSection.Name(signal.section).removeprefix("SIGNAL_SECTION_").lower()
    log = signal.transform == cohort_pb2.SIGNAL_TRANSFORM_LOG
    lower, upper = own or limits
    return SignalBounds(lower, upper, limits=limits, section=section, log=log)


def _at_fault(name: str, problem: str) -> Violation:
    return Violation(f'bounds["{name}"]', "fmi.local_privacy.bounds", problem)


def _refuse(faults: Iterable[Violation]) -> None:
    found = list(faults)[:MAX_PROBLEMS]
    if found:
        raise ConfigurationError(
            "LocalPrivacy: " + "; ".join(f"{fault.field} {fault.description}" for fault in found),
            violations=found,
        )
