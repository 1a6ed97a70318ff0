"""What a mistyped name may have meant."""

from __future__ import annotations

import difflib

from fmi_client.commands.options import Settings
from fmi_client.commands.output import safe
from fmi_client.commands.session import open_client
from fmi_client.errors import CohortUnknownError, FMIError

__all__ = ["suggest_cohort"]


def suggest_cohort(error: CohortUnknownError, settings: Settings) -> None:
    """Note on an error which cohort of the server is called almost like the one that it has not.

    A server that cannot be asked for its cohorts leaves the error as it is.
    """
    try:
        with open_client(settings) as client:
            there = [spec.name for spec in client.cohort_specs()]
    except FMIError:
        return
    likely = difflib.get_close_matches(error.metadata.get("cohort", ""), there, n=1)
    if likely:
        error.add_note(f"Did you mean {safe(likely[0])}?")
