"""What was measured, as a file of JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np

from benchmarks.scaling.unit_costs import UnitCosts

__all__ = ["COMMITTED", "Record", "machine"]

COMMITTED: Final = Path(__file__).with_name("measured.json")
"""Of the run that docs/scaling.md tells of."""


@dataclass(slots=True)
class Record:
    """What was measured, part by part.

    Attributes:
        machine: Of the last part that was measured.
        costs: Unit costs.
        points: Servers that the model was held against, and the way up through levels.
        simulated: Levels and sketches.
    """

    machine: str = ""
    costs: UnitCosts | None = None
    points: dict[str, Any] = field(default_factory=dict)
    simulated: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read what is there; nothing where there is no file, no costs where they are others than today's."""
        if not path.exists():
            return cls()
        found = json.loads(path.read_text(encoding="utf-8"))
        names = {field.name for field in dataclasses.fields(UnitCosts)}
        costs = UnitCosts(**found["costs"]) if set(found["costs"] or ()) == names else None
        return cls(found["machine"], costs, found["points"], found["simulated"])

    def write(self, path: Path) -> None:
        """Write all of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_rounded(dataclasses.asdict(self)), indent=1)
        path.write_text(text + "\n", encoding="utf-8")


def machine() -> str:
    """Say where this runs."""
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"grpcio {grpc.__version__}, numpy {np.__version__}"
    )


def _rounded(value: Any) -> Any:
    """Leave out the digits that mean nothing."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
