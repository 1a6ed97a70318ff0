"""What `fmi doctor` found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from fmi_client.commands.exits import ExitCode

__all__ = ["Finding", "Verdict", "fault", "warning", "well"]


class Verdict(StrEnum):
    """How a step went."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one step found.

    Attributes:
        step: Its name.
        verdict: How it went.
        told: What was found.
        advice: What to do; empty where it went well.
        values: The same for programs.
        code: The exit code that it is worth.
        final: Whether no further step can be made.
    """

    step: str
    verdict: Verdict
    told: str
    advice: str = ""
    values: Mapping[str, float | int | str | bool] = field(default_factory=dict)
    code: ExitCode = ExitCode.OK
    final: bool = False


def well(step: str, told: str, **values: float | str) -> Finding:
    """Make the finding of a step that went well."""
    return Finding(step, Verdict.OK, told, values=values)


def warning(step: str, told: str, advice: str, **values: float | str) -> Finding:
    """Make the finding of a step with something to look at; the next steps are made."""
    return Finding(step, Verdict.WARNING, told, advice, values, ExitCode.REFUSED)


def fault(
    step: str,
    told: str,
    advice: str,
    code: ExitCode = ExitCode.REFUSED,
    *,
    final: bool = True,
    values: Mapping[str, float | int | str | bool] | None = None,
) -> Finding:
    """Make the finding of a step that failed."""
    return Finding(step, Verdict.ERROR, told, advice, values or {}, code, final)
