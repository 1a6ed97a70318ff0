"""Cohort files: one `CohortSpec` each, written as YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml
from google.protobuf import json_format

from fmi.v1 import cohort_pb2
from fmi_server.errors import Reason, SpecInvalidError, Violation

__all__ = ["read_cohort_file", "read_cohort_folder"]


def read_cohort_file(path: Path) -> cohort_pb2.CohortSpec:
    """Read a cohort file: YAML (or JSON) in the JSON form of `CohortSpec`.

    Enum values may be written short (`section: controller`, `direction: higher_is_better`) and durations
    as seconds (`min_interval: 1`) or as text (`"1.5s"`).

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
        return json_format.ParseDict(_expanded(content), cohort_pb2.CohortSpec())
    except (json_format.ParseError, ValueError, ArithmeticError, RecursionError) as error:
        raise _file_error(path, str(error).splitlines()[0]) from error


def read_cohort_folder(folder: Path) -> list[cohort_pb2.CohortSpec]:
    """Read every `*.yaml`, `*.yml` and `*.json` file below a folder as a cohort spec.

    Raises:
        SpecInvalidError: The folder is not there, a file is not a cohort spec, or a cohort is declared
            twice.
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
        specs[spec.name] = spec
    return list(specs.values())


def _file_error(path: Path, detail: str) -> SpecInvalidError:
    return SpecInvalidError(
        [Violation(str(path), "fmi.cohort_spec.file", detail, Reason.SPEC_INVALID)]
    )


_SHORT_ENUMS: Final = {
    "section": "SIGNAL_SECTION_",
    "transform": "SIGNAL_TRANSFORM_",
    "direction": "SIGNAL_DIRECTION_",
    "schema_mismatch": "SCHEMA_MISMATCH_",
    "schemaMismatch": "SCHEMA_MISMATCH_",
}
_DURATIONS: Final = frozenset(
    name
    for snake in ("min_interval", "max_interval", "max_age", "max_clock_skew", "window", "site_ttl")
    for name in (snake, "".join(w.title() if i else w for i, w in enumerate(snake.split("_"))))
)


def _expanded(content: object, key: str = "") -> Any:
    """Write short enum names and plain seconds the long way that ProtoJSON wants."""
    if isinstance(content, dict):
        if key == "quantum":  # its keys are names of parameters, and mean nothing here
            return {str(name): value for name, value in content.items()}
        return {str(name): _expanded(value, str(name)) for name, value in content.items()}
    if isinstance(content, list):
        return [_expanded(item) for item in content]
    if key in _SHORT_ENUMS and isinstance(content, str) and content.islower():
        return _SHORT_ENUMS[key] + content.upper()
    if key in _DURATIONS and isinstance(content, int | float) and not isinstance(content, bool):
        return f"{content}s"
    return content
