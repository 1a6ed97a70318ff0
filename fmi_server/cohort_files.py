"""Cohort files: one `CohortSpec` each, written as YAML, with all that is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from fmi.specs import read_cohort_spec
from fmi.v1 import cohort_pb2
from fmi_server.cohorts import CohortRegistry
from fmi_server.config import SettingsError
from fmi_server.contracts import FMIContractRegistry
from fmi_server.spec_checks import spec_violations

__all__ = [
    "CohortFile",
    "CohortFilesError",
    "FileProblem",
    "check_changes",
    "read_cohort_folder",
]

_SUFFIXES: Final = frozenset({".yaml", ".yml", ".json"})


@dataclass(frozen=True, slots=True)
class FileProblem:
    """One thing that is wrong with a cohort file.

    Attributes:
        path: The file.
        field: Path of the field, for example ``signals[0].section``; empty where it is the whole file.
        description: What is wrong, and what is allowed.
    """

    path: Path
    field: str
    description: str

    def __str__(self) -> str:
        where = f"{self.path}: {self.field}" if self.field else str(self.path)
        return f"{where}: {self.description}"


class CohortFilesError(SettingsError):
    """Cohort files are wrong. `problems` has all of them; the message has a line for each."""

    def __init__(self, problems: Sequence[FileProblem]) -> None:
        self.problems = tuple(problems)
        files = len({problem.path for problem in problems})
        found = f"{_counted(len(problems), 'problem')} in {_counted(files, 'cohort file')}"
        super().__init__("\n".join([f"cohorts: {found}", *map(str, problems)]))


@dataclass(frozen=True, slots=True)
class CohortFile:
    """A cohort file that is in order."""

    path: Path
    spec: cohort_pb2.CohortSpec


def read_cohort_folder(folder: Path, registry: FMIContractRegistry) -> list[CohortFile]:
    """Read every `*.yaml`, `*.yml` and `*.json` file below a folder as a cohort spec, and check it.

    Args:
        folder: The folder.
        registry: Checks the contract's rules.

    Returns:
        The files, by path.

    Raises:
        SettingsError: The folder is not there.
        CohortFilesError: Files cannot be read, are no cohort specs, break rules, ask for what this version
            does not have, or declare a cohort twice.
    """
    if not folder.is_dir():
        raise SettingsError(f"cohorts: {folder} is not a folder")
    reading = _Reading(registry)
    for path in sorted(folder.rglob("*")):
        if path.suffix in _SUFFIXES and path.is_file():
            reading.read(path)
    if reading.problems:
        raise CohortFilesError(reading.problems)
    return list(reading.files.values())


def check_changes(files: Sequence[CohortFile], cohorts: CohortRegistry) -> None:
    """Check that no file changes a cohort in force in a way that breaks its sites.

    Raises:
        CohortFilesError: Files do; nothing was changed.
    """
    problems = [
        FileProblem(
            file.path,
            change.field,
            f"of cohort {file.spec.name} {change.description}; change it in another way, or start "
            "with --force-cohorts to do it all the same",
        )
        for file in files
        for change in cohorts.unsafe_changes(cohorts.compile(file.spec))
    ]
    if problems:
        raise CohortFilesError(problems)


@dataclass(slots=True)
class _Reading:
    """Reads one file after the other and keeps what is wrong with each."""

    registry: FMIContractRegistry
    files: dict[str, CohortFile] = field(default_factory=dict)
    problems: list[FileProblem] = field(default_factory=list)

    def read(self, path: Path) -> None:
        try:
            content = _content(path)
        except _UnreadableError as error:
            self.problems.append(FileProblem(path, "", str(error)))
            return
        spec, untranslated = read_cohort_spec(content)
        unreadable = [problem.field for problem in untranslated]
        violations = spec_violations(spec, self.registry, unreadable=unreadable)
        self.problems += [FileProblem(path, p.field, p.description) for p in untranslated]
        self.problems += [FileProblem(path, v.field, v.description) for v in violations]
        self.problems += self._repeated(path, spec.name)
        self.files.setdefault(spec.name, CohortFile(path, spec))

    def _repeated(self, path: Path, name: str) -> Iterator[FileProblem]:
        first = self.files.get(name)
        if first is not None and name:
            text = f"cohort {name!r} is declared in {first.path} already; a cohort has one file"
            yield FileProblem(path, "name", text)


class _UnreadableError(Exception):
    """A file has no fields to check."""


def _content(path: Path) -> Mapping[Any, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _UnreadableError(f"cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: text that is not UTF-8, or a date or number that YAML knows and Python does not.
        raise _UnreadableError(f"is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise _UnreadableError("must have the fields of a CohortSpec by name, as in `name: care`")
    return content


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
