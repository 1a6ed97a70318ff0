"""What a process holds, as Linux counts it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

__all__ = ["held_bytes"]


def held_bytes(field: Literal["VmRSS", "VmHWM"], pid: int | Literal["self"] = "self") -> int:
    """Return the memory that a process holds now (`VmRSS`), or has held at most (`VmHWM`)."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
