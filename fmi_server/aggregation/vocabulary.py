"""The signal names of a cohort: which row a name has, who brought it in, and in which section it is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fmi_server.aggregation.transforms import SignalRule

__all__ = ["SECTION_ORDER", "IgnoredReason", "Vocabulary"]

SECTION_ORDER = ("controller", "evaluator", "operators", "metrics")
"""Which section is told of a name that as many sites send in several: a metric can only be watched."""


IgnoredReason = Literal[
    "section_conflict", "undeclared", "vocabulary_full", "too_many_new_names", "outside_domain"
]
"""Why a value of an accepted packet does not count; see `IgnoredValue`."""


class Vocabulary:
    """Give every (section, name) a row.

    A declared name stands in its section. Of the other names, in an open vocabulary:

    - no site can take a name from the others: a name has a row in every section in which it came, and the
      section of most sites is told; where as many stand behind two, the first in `SECTION_ORDER`;
    - a site brings in a bounded number of names;
    - a name of which no site holds a value any more is not told, and makes room where the vocabulary is full.

    Args:
        declared: Rules of the declared signals, which take the first rows; no name twice.
        open_vocabulary: Whether other names are taken.
        max_signals: Bound on the rows of an open vocabulary.
        max_new_per_site: Bound on the names that one site brings in.

    Attributes:
        rules: One per row.

    Raises:
        ValueError: A signal is declared twice.
    """

    def __init__(
        self,
        declared: Iterable[SignalRule],
        *,
        open_vocabulary: bool,
        max_signals: int,
        max_new_per_site: int,
    ) -> None:
        self.rules: list[SignalRule] = []
        self._open = open_vocabulary
        self._max_signals = max_signals
        self._max_new_per_site = max_new_per_site
        self._row_of: dict[tuple[str, str], int] = {}
        self._declared: set[str] = set()
        self._brought_by: dict[int, str] = {}
        self._brought: Counter[str] = Counter()
        # Rows without a value; looked for only after values went.
        self._spare: list[int] = []
        self._values_went = False
        self._contested: dict[str, list[int]] = {}
        self._told: dict[str, int] | None = None
        self._told_rows: frozenset[int] = frozenset()
        for rule in declared:
            if rule.name in self._declared:
                raise ValueError(f"signal {rule.name!r} is declared twice")
            self._declared.add(rule.name)
            self._enter(len(self.rules), rule)

    @property
    def outvoted(self) -> int:
        """Rows that are held and not told."""
        return sum(len(rows) - 1 for rows in self._contested.values())

    def holds(self, section: str, name: str) -> bool:
        """Return whether a name has a row in a section."""
        return (section, name) in self._row_of

    def find(
        self,
        site_id: str,
        section: str,
        name: str,
        values: NDArray[np.float64],
        in_use: Container[int],
    ) -> int | IgnoredReason:
        """Return the row of a name in a section, made new where need be, or why there is none.

        Args:
            site_id: Who sends it.
            section: Its section.
            name: The signal.
            values: What is held, rows x sites, `+inf` where missing.
            in_use: Rows that are about to be written.
        """
        row = self._row_of.get((section, name))
        if row is not None:
            return row
        refusal = self._refusal(site_id, name)
        if refusal is not None:
            return refusal
        row = len(self.rules)
        if row >= self._max_signals:
            spare = self._spare_row(values, in_use)
            if spare is None:
                return "vocabulary_full"
            row = spare
            self._leave(row)
        self._enter(row, SignalRule(name, section))
        self._brought_by[row] = site_id
        self._brought[site_id] += 1
        return row

    def row(self, section: str, name: str) -> int | None:
        """Return the row of a name in a section, or None where it has none."""
        return self._row_of.get((section, name))

    def may_take(self, site_id: str, name: str) -> bool:
        """Return whether a name without a row may get one; false only where `find` would refuse it."""
        room = len(self.rules) < self._max_signals or self._values_went or bool(self._spare)
        return room and self._refusal(site_id, name) is None

    def _refusal(self, site_id: str, name: str) -> IgnoredReason | None:
        if name in self._declared:
            return "section_conflict"
        if not self._open:
            return "undeclared"
        if self._brought[site_id] >= self._max_new_per_site:
            return "too_many_new_names"
        return None

    def values_came(self, rows: Iterable[int]) -> None:
        """Note that values were written: a name is held again, or another section the one of most sites."""
        if self._contested or not self._told_rows.issuperset(rows):
            self._told = None

    def values_went(self) -> None:
        """Note that values were taken away: rows may be empty now."""
        self._values_went = True
        self._told = None

    def told(self, values: NDArray[np.float64]) -> dict[str, int]:
        """Return the row that is told of every name that is declared or held, in row order.

        Args:
            values: What is held, rows x sites, `+inf` where missing.
        """
        if self._told is None:
            outvoted: set[int] = set()
            for rows in self._contested.values():
                behind = np.count_nonzero(values[rows] < np.inf, axis=1).tolist()
                ranks = [(-behind[i], self._rank(row), row) for i, row in enumerate(rows)]
                outvoted.update(set(rows) - {min(ranks)[2]})
            held = np.any(values < np.inf, axis=1)
            self._told = {
                rule.name: row
                for row, rule in enumerate(self.rules)
                if row not in outvoted and (held[row] or rule.name in self._declared)
            }
            self._told_rows = frozenset(self._told.values())
        return self._told

    def _rank(self, row: int) -> int:
        section = self.rules[row].section
        return SECTION_ORDER.index(section) if section in SECTION_ORDER else len(SECTION_ORDER)

    def _spare_row(self, values: NDArray[np.float64], in_use: Container[int]) -> int | None:
        if self._values_went:
            self._values_went = False
            empty = ~np.any(values < np.inf, axis=1)
            self._spare = [row for row in self._brought_by if row < len(empty) and empty[row]]
        while self._spare:
            row = self._spare.pop()
            # Somebody may have sent the name again since.
            if row not in in_use and not np.any(values[row] < np.inf):
                return row
        return None

    def _leave(self, row: int) -> None:
        rule = self.rules[row]
        del self._row_of[rule.section, rule.name]
        rows = self._contested.get(rule.name)
        if rows is not None:
            rows.remove(row)
            if len(rows) == 1:
                del self._contested[rule.name]
        site_id = self._brought_by.pop(row)
        self._brought[site_id] -= 1
        if not self._brought[site_id]:
            del self._brought[site_id]

    def _enter(self, row: int, rule: SignalRule) -> None:
        if row == len(self.rules):
            self.rules.append(rule)
        else:
            self.rules[row] = rule
        others = [
            self._row_of[section, rule.name]
            for section in SECTION_ORDER
            if (section, rule.name) in self._row_of
        ]
        if others:
            self._contested[rule.name] = [*others, row]
        self._row_of[rule.section, rule.name] = row
        self._told = None
