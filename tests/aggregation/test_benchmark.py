"""The benchmark runs, and tells what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.aggregation import peers
from benchmarks.aggregation.side_by_side import Section, Task, alternate, text_of
from fmi_server.aggregation import estimate

ROOT = Path(__file__).parents[2]


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.aggregation", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_it_prints_and_writes_what_it_measured(tmp_path):
    written = tmp_path / "new" / "numbers.json"
    # The median of nine: a pause of the machine is longer than what takes least.
    ran = benchmark("dirty", "--rounds", "9", "--json", str(written))
    assert ran.returncode == 0, ran.stderr
    report = json.loads(written.read_text())
    rows = report["sections"]["dirty"]["rows"]
    assert [row["name"] for row in rows][:2] == [
        "100 % of the signals changed",
        "  0 % of the signals changed",
    ]
    assert rows[0]["ratio"] == 1.0
    assert rows[1]["ratio"] < 1.0  # nothing changed, nothing computed
    assert "100 % of the signals changed" in ran.stdout


def test_it_says_which_sections_there_are():
    ran = benchmark("relaese")
    assert ran.returncode == 2
    assert "unknown section 'relaese'; there are release, estimators," in ran.stderr


def test_rounds_alternate_and_preparation_is_not_timed(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def step(name: str, seconds: float):
        def run() -> None:
            order.append(name)
            now[0] += seconds

        return run

    tasks = [
        Task("reference", step("a", 2.0)),
        Task("ours", step("b", 12.0), prepare=step("-", 99.0), units=2, target=1.5),
    ]
    rows = alternate(tasks, rounds=3)
    assert "".join(order) == "a-b" * 5
    assert [(row.seconds, row.ratio) for row in rows] == [(2.0, 1.0), (6.0, 3.0)]
    assert "ours          6.00 s    ratio    3.00   (target: at most 1.5)" in text_of(
        Section("title", rows)
    )


def test_the_trimmed_means_of_others_equal_ours_where_they_trim_as_many():
    values = np.random.default_rng(0).normal(
        size=(3, 40)
    )  # a tenth of 40 is 4, however it is rounded
    ours = estimate(values).value
    tasks = peers.tasks(values)
    assert tasks[0].name == "scipy.stats.trim_mean, per signal"
    for task in tasks:
        np.testing.assert_allclose(np.ravel(task.run()), ours, err_msg=task.name)
