"""The soak runs, looks at the server, and says how fast things grow."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

from benchmarks.soak.readings import slope_per_hour

ROOT = Path(__file__).parents[2]


def test_a_short_soak_has_readings_a_table_and_a_chart(tmp_path):
    flags = ["--minutes", "0.1", "--every", "1", "--rate", "30", "--output", str(tmp_path)]
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", *flags],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=ROOT,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "\n0 faults" in ran.stdout
    readings = json.loads((tmp_path / "readings.json").read_text())
    assert len(readings) >= 4
    assert all(r["rss_mb"] > 20 and r["descriptors"] > 5 and r["p50_ms"] > 0 for r in readings)
    assert sum(r["packets_per_s"] for r in readings[1:]) / len(readings[1:]) == pytest.approx(
        30, abs=20
    )
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


def test_the_slope_is_that_of_theil_and_sen():
    chance = random.Random(1)
    at_s = [float(i * 5) for i in range(50)]
    values = [100 + 0.01 * at + chance.gauss() for at in at_s]
    values[7], values[30] = 1000.0, float("nan")
    known = [(at, value) for at, value in zip(at_s, values, strict=True) if value == value]  # noqa: PLR0124 - not NaN
    expected = stats.theilslopes([v for _, v in known], [at / 3600 for at, _ in known]).slope
    assert slope_per_hour(at_s, values) == pytest.approx(expected)
    assert slope_per_hour([1.0], [1.0]) != slope_per_hour([1.0], [1.0]), "one reading has no slope"
