"""Cohort files: one `CohortSpec` each, written as YAML."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from fmi.plain import PlainDataError
from fmi.specs import cohort_spec_from_plain
from fmi.v1 import cohort_pb2
from fmi_server.cohorts import CohortRegistry
from fmi_server.errors import Reason, SettingUnsupportedError, SpecInvalidError, Violation

__all__ = ["read_cohort_file", "read_cohort_folder"]


def read_cohort_file(path: Path) -> cohort_pb2.CohortSpec:
    """Read a cohort file: YAML (or JSON) in the form that `fmi.specs` takes.

    Raises:
        SpecInvalidError: The file cannot be read or is not a cohort spec.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _file_error(path, f"cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: text that is not UTF-8, or a date or number that YAML knows and Python does not.
        raise _file_error(path, f"is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise _file_error(path, "must have the fields of a CohortSpec by name")
    try:
        return cohort_spec_from_plain(content)
    except PlainDataError as error:
        raise _file_error(path, error.problems[0].description) from error


def read_cohort_folder(folder: Path, cohorts: CohortRegistry) -> list[cohort_pb2.CohortSpec]:
    """Read every `*.yaml`, `*.yml` and `*.json` file below a folder as a cohort spec, and check it.

    Args:
        folder: The folder.
        cohorts: Checks the specs; none is declared.

    Raises:
        SpecInvalidError: The folder is not there, a file is not a cohort spec or breaks rules, or a cohort
            is declared twice. The file is named.
        SettingUnsupportedError: A file asks for what this version does not have.
    """
    if not folder.is_dir():
        raise _file_error(folder, "is not a folder")
    specs: dict[str, cohort_pb2.CohortSpec] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".yaml", ".yml", ".json") or not path.is_file():
            continue
        spec = read_cohort_file(path)
        if spec.name in specs:
            raise _file_error(path, f"declares cohort {spec.name!r} a second time")
        try:
            cohorts.compile(spec)
        except SpecInvalidError as error:
            raise SpecInvalidError(
                [replace(found, field=f"{path}: {found.field}") for found in error.violations]
            ) from error
        except SettingUnsupportedError as error:
            raise SettingUnsupportedError(f"{path}: {error.setting}", error.detail) from error
        specs[spec.name] = spec
    return list(specs.values())


def _file_error(path: Path, detail: str) -> SpecInvalidError:
    return SpecInvalidError(
        [Violation(str(path), "fmi.cohort_spec.file", detail, Reason.SPEC_INVALID)]
    )
