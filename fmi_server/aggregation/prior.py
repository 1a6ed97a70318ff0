"""The resident state of one cohort: newest values, signals x sites, and the prior made of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Hashable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fmi_server.aggregation.estimates import Estimate, EstimateTable
from fmi_server.aggregation.estimators import MAX_MAGNITUDE, EstimatorSettings
from fmi_server.aggregation.group_estimates import GroupEstimates, WeighedSites
from fmi_server.aggregation.resident import ResidentMatrix
from fmi_server.aggregation.transforms import SignalRule, TransformTable
from fmi_server.aggregation.trust import in_steps, site_scores
from fmi_server.aggregation.vocabulary import IgnoredReason, Vocabulary
from fmi_server.aggregation.weights import site_reputations

__all__ = ["CohortMatrix", "IgnoredValue", "PriorRelease", "PutReport", "SignalInUse", "UnitCells"]

_EVERYONE = ""
_FEW = 8  # where fewer than one site in so many is judged, it is worth asking which rows matter


@dataclass(frozen=True, slots=True)
class IgnoredValue:
    """Name a value that `CohortMatrix.put` left out.

    Attributes:
        section: section it came in.
        name: signal.
        reason: `section_conflict` (the name is declared in another section of this cohort),
            `undeclared` (closed vocabulary), `vocabulary_full`, `too_many_new_names` (of this site) or
            `outside_domain` (a log signal that is not positive).
    """

    section: str
    name: str
    reason: IgnoredReason


@dataclass(frozen=True, slots=True)
class PutReport:
    """Say what one packet did: values applied, signals changed, values ignored."""

    applied: int
    changed: int
    ignored: tuple[IgnoredValue, ...]


@dataclass(frozen=True, slots=True)
class SignalInUse:
    """Say where a signal stands, and the value of each site that sends it, on the scale it is averaged on."""

    section: str
    values: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class UnitCells:
    """Hold the values of bounded signals, moved to -1..1 on the scale they are averaged on.

    Attributes:
        names: signals, in row order.
        sections: their sections.
        rows: where `transforms` has them.
        values: signals x sites; NaN where missing.
        confidence: declared confidences, same shape.
        transforms: lead back to the signals' own scales.
    """

    names: tuple[str, ...]
    sections: tuple[str, ...]
    rows: NDArray[np.int64]
    values: NDArray[np.float64]
    confidence: NDArray[np.float64]
    transforms: TransformTable


@dataclass(frozen=True, slots=True)
class PriorRelease:
    """Hold the prior of one cohort, on the signals' own scales.

    Attributes:
        names: signals, in row order.
        sections: their sections.
        table: one estimate per signal.
        outvoted: names in a section that are held and not told, because more sites have the name in
            another section.
        recomputed: how many rows were computed anew; the others are as they were.
        sites: sites with at least one value.
        oldest: time of the oldest value counted, or None; never later than it really is.
        newest: time of the newest value counted, or None.
        confidence_cap: median of the sites' declared confidences; no weight exceeds it.
        confidence: mean confidence of the signals with a value, 0 without any.
        at: the `now` of the release.
    """

    names: tuple[str, ...]
    sections: tuple[str, ...]
    table: EstimateTable
    outvoted: int
    recomputed: int
    sites: int
    oldest: float | None
    newest: float | None
    confidence_cap: float
    confidence: float
    at: float

    def prior(self) -> dict[str, float]:
        """Return the flat prior: signals that have a value."""
        values = zip(self.names, self.table.value.tolist(), strict=True)
        return {name: value for name, value in values if not math.isnan(value)}

    def estimates(self) -> dict[str, Estimate]:
        """Return every signal's estimate, those without a value with their reason."""
        return {name: self.table.row(row) for row, name in enumerate(self.names)}


class CohortMatrix:
    """Keep each site's newest value of each signal and release robust estimates of them.

    A packet touches one column; its cost does not depend on the number of sites. A signal that a
    newer packet does not carry keeps the newest value that the site sent for it, until `expire`.
    Values stand clipped and transformed, `+inf` where there is none.

    Which names there are, and in which section a name is told, is `Vocabulary`'s to say.

    Not thread-safe: one owner at a time.
    """

    def __init__(
        self,
        rules: Iterable[SignalRule] = (),
        *,
        open_vocabulary: bool = True,
        max_signals: int = 4096,
        max_new_per_site: int = 512,
    ) -> None:
        """Start empty.

        Args:
            rules: declared signals; they take the first rows in this order.
            open_vocabulary: whether undeclared signals are taken, with default rules.
            max_signals: bound on the signals an open vocabulary may grow to.
            max_new_per_site: bound on the names that one site may bring into it.

        Raises:
            ValueError: a signal is declared twice.
        """
        self._names = Vocabulary(
            rules,
            open_vocabulary=open_vocabulary,
            max_signals=max_signals,
            max_new_per_site=max_new_per_site,
        )
        self._transforms = TransformTable()
        self._cells = ResidentMatrix()
        self._groups = GroupEstimates(self._cells, self._transforms)
        self._released = -1
        self._add_rows()

    @property
    def sites(self) -> tuple[str, ...]:
        """Return the ids of the sites that hold a column."""
        return tuple(self._cells.column_of)

    @property
    def window(self) -> tuple[float | None, float | None]:
        """Return a lower bound on the oldest time held and the newest time; None when empty."""
        return self._cells.window()

    @property
    def nbytes(self) -> int:
        """Return the bytes of the resident arrays."""
        return self._cells.nbytes

    @property
    def signals(self) -> tuple[str, ...]:
        """Return the signal names that are told, in row order."""
        return tuple(self._told_rows())

    @property
    def dirty(self) -> frozenset[str]:
        """Return the signals whose values changed since the last release."""
        changed = np.flatnonzero(self._cells.row_changed > self._released)
        return frozenset(self._names.rules[row].name for row in changed)

    def in_use(self) -> dict[str, SignalInUse]:
        """Return the signals that are told and have a value."""
        held = self._cells.values
        used = {
            name: SignalInUse(self._names.rules[row].section, held[row][held[row] < np.inf])
            for name, row in self._told_rows().items()
        }
        return {name: signal for name, signal in used.items() if signal.values.size}

    def rule(self, name: str) -> SignalRule | None:
        """Return the rule of a signal, or None when the cohort does not know it."""
        row = self._told_rows().get(name)
        return None if row is None else self._names.rules[row]

    def section_of(self, name: str) -> str | None:
        """Return the section a signal is told in, or None when the cohort does not know it."""
        rule = self.rule(name)
        return None if rule is None else rule.section

    def holds(self, section: str, name: str) -> bool:
        """Return whether there is a row for a name in a section, told or not."""
        return self._names.holds(section, name)

    def put(
        self,
        site_id: str,
        sections: Mapping[str, Mapping[str, float]],
        *,
        now: float,
        confidence: float = 1.0,
        signal_confidence: Mapping[str, float] | None = None,
        size: float = 1.0,
    ) -> PutReport:
        """Take a site's packet: each value it carries replaces the site's older one.

        A value with an older `now` than the one held is left as it is, so that packets may be
        put in any order.

        Args:
            site_id: authenticated site.
            sections: section -> signal -> value.
            now: time of the packet in seconds.
            confidence: declared confidence, 0..1, of all values without an own one.
            signal_confidence: declared confidence per signal.
            size: effective sites that the packet stands for, where it sums up others.

        Raises:
            ValueError: a value is not finite or beyond `MAX_MAGNITUDE`, a confidence lies
                outside 0..1, `size` is not positive or `now` is not finite; nothing is changed.
        """
        if not math.isfinite(now):
            raise ValueError("now must be finite")
        if not 0.0 < size < math.inf:
            raise ValueError(f"size must be positive, got {size}")
        own = signal_confidence or {}
        for declared in (confidence, *own.values()):
            if not 0.0 <= declared <= 1.0:
                raise ValueError(f"confidence must lie in 0..1, got {declared}")
        for section, values in sections.items():
            for name, value in values.items():
                if not -MAX_MAGNITUDE <= value <= MAX_MAGNITUDE:
                    raise ValueError(f"{section}.{name}: {value} is not a usable number")
        rows, incoming, weights, ignored = self._resolve(site_id, sections, confidence, own)
        fresh = self._transforms.forward(rows, incoming)
        outside = np.isnan(fresh)
        if outside.any():
            for row in rows[outside]:
                rule = self._names.rules[row]
                ignored.append(IgnoredValue(rule.section, rule.name, "outside_domain"))
            rows, fresh, weights = rows[~outside], fresh[~outside], weights[~outside]
        if not rows.size:
            return PutReport(0, 0, tuple(ignored))
        self._names.values_came(rows.tolist())
        applied, changed = self._cells.write(site_id, rows, fresh, weights, now, size)
        return PutReport(applied, changed, tuple(ignored))

    def overtakes(
        self,
        site_id: str,
        sections: Mapping[str, Mapping[str, float]],
        at: float,
        said_again: Container[tuple[str, str]] = (),
    ) -> bool:
        """Return whether nothing of a packet can stand any more: all of it was sent anew by its site.

        Each value has a strictly newer one in its place, or is one that `put` would ignore.

        Args:
            site_id: the site.
            sections: section -> signal -> value.
            at: time of the packet in seconds.
            said_again: signals, as (section, name), that a later packet of the same time has.
        """
        seen = self._cells.seen(site_id)
        for section, values in sections.items():
            for name, value in values.items():
                row = self._names.row(section, name)
                if row is None:
                    if self._names.may_take(site_id, name):
                        return False
                    continue
                newer = seen is not None and at < seen[row] < math.inf
                if newer or (section, name) in said_again:
                    continue
                if self._transforms.takes(row, value):
                    return False
        return True

    def stored(self, sections: Mapping[str, Mapping[str, float]]) -> set[tuple[str, str]]:
        """Return the signals of a packet, as (section, name), that have a row and a usable value."""
        rows = (
            (section, name, self._names.row(section, name), value)
            for section, values in sections.items()
            for name, value in values.items()
        )
        takes = self._transforms.takes
        return {(s, n) for s, n, row, value in rows if row is not None and takes(row, value)}

    def drop(self, site_id: str) -> bool:
        """Remove a site and all its values; return whether it was there."""
        dropped = self._cells.drop(site_id)
        if dropped:
            self._names.values_went()
        return dropped

    def expire(self, now: float, ttl_s: float) -> tuple[str, ...]:
        """Remove values older than `now - ttl_s`; return the sites that lost their last one."""
        if self._cells.holds_older(now - ttl_s):
            self._names.values_went()
        return self._cells.expire(now - ttl_s)

    def release(
        self,
        settings: EstimatorSettings,
        reputation: Mapping[str, float] | None,
        now: float,
    ) -> PriorRelease:
        """Estimate every signal anew that changed, and give the others as they were.

        The weight of a value is `min(declared confidence, cohort median confidence) *
        min(size / cohort median size, 1) * reputation`. The medians are taken over the sites, one
        site one vote, so that fewer than half of them cannot raise them beyond an honest one.
        Median confidence, relative sizes and reputations count in steps of 0.01: a smaller move
        recomputes nothing, and the result depends on what is held alone, never on the way there.

        Args:
            settings: estimator rules.
            reputation: per site, 0..1; a site that is missing has the start reputation. None
                counts all sites alike.
            now: time of the release, passed on.
        """
        self._groups.start_release()
        cells = self._cells
        sites = self._weighed(*cells.sites(), reputation)
        table, recomputed = self._groups.estimate(_EVERYONE, sites, settings)
        self._released = cells.version
        told = self._told_rows()
        table = self._told_of(table)
        valued = np.isfinite(table.value)
        oldest, newest = cells.window()
        return PriorRelease(
            names=tuple(told),
            sections=tuple(self._names.rules[row].section for row in told.values()),
            table=table,
            outvoted=self._names.outvoted,
            recomputed=recomputed,
            sites=len(cells.column_of),
            oldest=oldest,
            newest=newest,
            confidence_cap=sites.cap,
            confidence=math.fsum(table.confidence[valued]) / max(1, np.count_nonzero(valued)),
            at=now,
        )

    def estimate_sites(
        self,
        site_ids: Collection[str],
        settings: EstimatorSettings,
        reputation: Mapping[str, float] | None = None,
        *,
        group: Hashable | None = None,
    ) -> EstimateTable:
        """Estimate every signal from some of the sites only.

        Args:
            site_ids: sites, each once; those that hold nothing are left out.
            settings: as in `release`.
            reputation: as in `release`.
            group: what they are called. The result is kept under that name, until a release is not followed
                by this question, and only what changed is estimated the next time.
        """
        held = self._cells.column_of
        asked = [site for site in site_ids if site in held]
        columns = np.array([held[site] for site in asked], dtype=np.int64)
        sites = self._weighed(asked, columns, reputation)
        everyone = len(asked) == len(held)
        table, _ = self._groups.estimate(_EVERYONE if everyone else group, sites, settings)
        return self._told_of(table)

    def relative_sizes(self) -> dict[str, float]:
        """Return the relative size of each site that counts for less than 1."""
        site_ids, columns = self._cells.sites()
        sizes = self._relative_size(columns)
        return {site_ids[i]: float(sizes[i]) for i in np.flatnonzero(sizes < 1.0)}

    def unit_cells(self) -> UnitCells:
        """Return what is held, each signal moved to -1..1 between its bounds, which all must have."""
        told = self._told_rows()
        rows, held = self._told_index(), self._cells
        columns = held.sites()[1]
        return UnitCells(
            names=tuple(told),
            sections=tuple(self._names.rules[row].section for row in rows),
            rows=rows,
            values=self._transforms.to_unit(rows, held.values[rows][:, columns]),
            confidence=held.confidence[rows][:, columns],
            transforms=self._transforms,
        )

    def score_sites(self, site_ids: Collection[str]) -> dict[str, float]:
        """Return how well some sites agree with all others, by `trust.site_scores`; NaN where unjudged.

        Sites that hold nothing are left out.
        """
        held = self._cells.column_of
        asked = [site for site in site_ids if site in held]
        columns = np.array([held[site] for site in asked], dtype=np.int64)
        rows = self._told_index()
        if _FEW * columns.size < len(held):
            # Of signals that none of them sends nothing need be known.
            sent = np.count_nonzero(self._cells.values[:, columns] < np.inf, axis=1)
            rows = rows[sent[rows] > 0]
        scores = site_scores(
            self._cells.values,
            rows=rows,
            columns=columns,
            difference=self._transforms.difference,
        )
        return dict(zip(asked, scores.tolist(), strict=True))

    def _told_rows(self) -> dict[str, int]:
        return self._names.told(self._cells.values)

    def _told_index(self) -> NDArray[np.int64]:
        return np.fromiter(self._told_rows().values(), dtype=np.int64)

    def _resolve(
        self,
        site_id: str,
        sections: Mapping[str, Mapping[str, float]],
        confidence: float,
        own: Mapping[str, float],
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64], list[IgnoredValue]]:
        rows: list[int] = []
        in_use: set[int] = set()
        values: list[float] = []
        weights: list[float] = []
        ignored: list[IgnoredValue] = []
        for section, signals in sections.items():
            for name, value in signals.items():
                row = self._names.find(site_id, section, name, self._cells.values, in_use)
                if isinstance(row, str):
                    ignored.append(IgnoredValue(section, name, row))
                    continue
                self._add_rows()
                in_use.add(row)
                rows.append(row)
                values.append(value)
                weights.append(own.get(name, confidence))
        return (
            np.array(rows, dtype=np.int64),
            np.array(values, dtype=np.float64),
            np.array(weights, dtype=np.float64),
            ignored,
        )

    def _weighed(
        self,
        site_ids: Collection[str],
        columns: NDArray[np.int64],
        reputation: Mapping[str, float] | None,
    ) -> WeighedSites:
        declared = self._cells.site_confidence[self._cells.occupied]
        cap = round(float(np.median(declared)), 2) if declared.size else 1.0
        trust = in_steps(site_reputations(site_ids, reputation)) * self._relative_size(columns)
        return WeighedSites(columns, trust, cap)

    def _relative_size(self, columns: NDArray[np.int64]) -> NDArray[np.float64]:
        sizes = self._cells.site_size
        counted = sizes[self._cells.occupied]
        if not counted.size or counted.min() == counted.max():
            return np.ones(columns.size)
        median = np.median(counted)
        # The smaller first: a size by a median as small as may be declared is past the largest number.
        return in_steps(np.minimum(sizes[columns], median) / median)

    def _told_of(self, table: EstimateTable) -> EstimateTable:
        told = self._told_index()
        return table if told.size == len(table) else table.selected(told)

    def _add_rows(self) -> None:
        """Add the rows that new names need. A row that is used again has the transform it needs."""
        for rule in self._names.rules[len(self._transforms) :]:
            self._transforms.append(rule)
            self._cells.add_row()
