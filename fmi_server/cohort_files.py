"""Cohort files: one `CohortSpec` each, written as YAML, with all that is wrong with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from fmi.specs import read_cohort_spec
from fmi.v1 import cohort_pb2
from fmi.yaml_text import YAMLTextError, read_yaml
from fmi_server.cohorts import UNKEPT, CohortRegistry, CohortRules, unkept_access
from fmi_server.config import SettingsError
from fmi_server.contracts import FMIContractRegistry
from fmi_server.errors import Violation
from fmi_server.spec_checks import spec_violations

__all__ = [
    "CohortFile",
    "CohortFilesError",
    "FileProblem",
    "check_changes",
    "read_cohort_folder",
]

_SUFFIXES: Final = frozenset({".yaml", ".yml", ".json"})

_MAX_TOLD: Final = 50
"""Problems of one file that are told; whoever made more of them made most of them alike."""

_MAX_FIELD: Final = 200
"""Characters told of the path of a field, which may have a name in it that somebody else wrote."""


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
        name = f"{self.field[:_MAX_FIELD]}..." if len(self.field) > _MAX_FIELD else self.field
        where = f"{self.path}: {name}" if name else str(self.path)
        return f"{where}: {self.description}"


class CohortFilesError(SettingsError):
    """Cohort files are wrong. `problems` has all of them; the message lists at most 50 of each file."""

    def __init__(self, problems: Sequence[FileProblem]) -> None:
        self.problems = tuple(problems)
        files = len({problem.path for problem in problems})
        found = f"{_counted(len(problems), 'problem')} in {_counted(files, 'cohort file')}"
        super().__init__("\n".join([f"cohorts: {found}", *_lines(problems)]))


def _lines(problems: Iterable[FileProblem]) -> Iterator[str]:
    for path, grouped in groupby(problems, lambda problem: problem.path):
        of_file = list(grouped)
        yield from map(str, of_file[:_MAX_TOLD])
        if (more := len(of_file) - _MAX_TOLD) > 0:
            yield f"{path}: and {_counted(more, 'more problem')}"


@dataclass(frozen=True, slots=True)
class CohortFile:
    """A cohort file that is in order."""

    path: Path
    spec: cohort_pb2.CohortSpec


def read_cohort_folder(
    folder: Path, registry: FMIContractRegistry, *, authenticated: bool = False
) -> list[CohortFile]:
    """Read every `*.yaml`, `*.yml` and `*.json` file below a folder as a cohort spec, and check it.

    Links are followed. What begins with a dot is not read: editors keep their own files there, and
    Kubernetes the files that the visible links of a ConfigMap lead to.

    Args:
        folder: The folder.
        registry: Checks the contract's rules.
        authenticated: Whether callers are authenticated; where they are not, access rules are refused.

    Returns:
        The files, by path.

    Raises:
        SettingsError: The folder is not there.
        CohortFilesError: Files cannot be read, are no cohort specs, break rules, ask for what this server
            cannot keep, or declare a cohort twice.
    """
    if not folder.is_dir():
        raise SettingsError(f"cohorts: {folder} is not a folder")
    reading = _Reading(registry, authenticated=authenticated)
    for path in _cohort_files(folder):
        reading.read(path)
    if reading.problems:
        raise CohortFilesError(reading.problems)
    return list(reading.files.values())


def _cohort_files(folder: Path) -> list[Path]:
    """List what is to be read, by path; a folder that links lead back to is gone through once."""
    seen: set[tuple[int, int]] = set()
    found: list[Path] = []
    for root, folders, names in os.walk(folder, followlinks=True):
        status = Path(root).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(root, name) for name in names if not name.startswith("."))
        found += (path for path in paths if path.suffix in _SUFFIXES)
    return sorted(found)


def check_changes(
    files: Sequence[CohortFile],
    cohorts: CohortRegistry,
    unsafe_changes: Callable[[CohortRules], Iterable[Violation]],
) -> None:
    """Check that no file changes a cohort in force in a way that breaks its sites.

    Args:
        files: The files.
        cohorts: Makes rules of them.
        unsafe_changes: Lists what is unsafe about putting rules in force.

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
        for change in unsafe_changes(cohorts.compile(file.spec))
    ]
    if problems:
        raise CohortFilesError(problems)


@dataclass(slots=True)
class _Reading:
    """Reads one file after the other and keeps what is wrong with each."""

    registry: FMIContractRegistry
    authenticated: bool
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
        if not self.authenticated:
            unkept = unkept_access(spec)
            if unkept == ["access"] and any(name.startswith("access") for name in unreadable):
                unkept = []  # who it lists could not be read, which is told
            self.problems += [FileProblem(path, name, UNKEPT) for name in unkept]
        self.problems += self._repeated(path, spec.name)
        self.files.setdefault(spec.name, CohortFile(path, spec))

    def _repeated(self, path: Path, name: str) -> Iterator[FileProblem]:
        first = self.files.get(name)
        if first is not None and name:
            yield FileProblem(
                path,
                "name",
                f"cohort {name[:_MAX_FIELD]!r} is declared in {first.path} already; a cohort has one file",
            )


class _UnreadableError(Exception):
    """A file has no fields to check."""


def _content(path: Path) -> Mapping[Any, Any]:
    if path.exists() and not path.is_file():
        raise _UnreadableError("is no file with text in it")
    try:
        content = read_yaml(path)
    except YAMLTextError as error:
        raise _UnreadableError(str(error)) from error
    if not isinstance(content, dict):
        raise _UnreadableError("must have the fields of a CohortSpec by name, as in `name: care`")
    return content


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
