"""docs/settings.md says what the code says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from fmi_server.config import ServerSettings

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
TOOL = runpy.run_path(str(ROOT / "tools" / "generate_settings.py"))


def test_the_tables_are_up_to_date() -> None:
    assert TOOL["generated"](DOCUMENT) == DOCUMENT, "run `python tools/generate_settings.py`"


@pytest.mark.parametrize(
    "word", ["`10000`", "above 0", "`--no-reflection`", "`FMI_DRAIN_S`", "64 MiB"]
)
def test_a_table_that_is_out_of_date_is_found(word: str) -> None:
    assert word in DOCUMENT
    assert TOOL["generated"](DOCUMENT.replace(word, "something else")) == DOCUMENT


@pytest.mark.parametrize("name", ServerSettings.model_fields)
def test_every_setting_has_a_row(name: str) -> None:
    (row,) = [line for line in DOCUMENT.splitlines() if line.startswith(f"| `{name}` |")]
    assert f"`--{name.replace('_', '-')}`" in row
    assert f"`FMI_{name.upper()}`" in row


@pytest.mark.parametrize(
    "name", [n for n in ServerSettings.model_fields if n.startswith("max_") or n.endswith("_s")]
)
def test_every_limit_is_explained(name: str) -> None:
    assert f"`{name}`" in DOCUMENT.partition("## Limits")[2]
