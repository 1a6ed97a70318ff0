"""What docs/privacy.md shows is what a server says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import ROOT, blocks, console_commands, run, shell

from fmi.v1 import admin_service_pb2
from fmi_client import FMIClient, FMIEmitter

PAGE = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
(COHORT_FILE,) = blocks(PAGE, "yaml")
SHOWN = dict(console_commands(PAGE, "fmi"))
WEEK = "max_interval: 604800"


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    """Start servers of one cohort file."""
    started: list[subprocess.Popen[str]] = []

    def serve(cohort_file: str) -> str:
        folder = tmp_path / str(len(started))
        cohorts = folder / "cohorts"
        cohorts.mkdir(parents=True)
        (cohorts / "healthcare.yaml").write_text(cohort_file, encoding="utf-8")
        folders = ["--data-dir", str(folder / "data"), "--cohorts", str(cohorts)]
        process = subprocess.Popen(
            [sys.executable, "-m", "fmi_server", "serve", "--listen", "127.0.0.1:0", *folders],
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        return process.stdout.readline().removeprefix("listening on ").strip()

    yield serve
    for process in started:
        process.terminate()
        assert process.wait(60) == 0
        process.stdout.close()


def words(output: str) -> list[list[str]]:
    """Return the words of each line, without numbers: in 8e-05 there is none."""
    return [re.findall(r"(?<![\w.])[A-Za-z_][\w.]*", line) for line in output.strip().splitlines()]


def test_the_plans_are_those_that_a_server_makes(start) -> None:
    target = start(COHORT_FILE)
    plans = [command for command in SHOWN if command.startswith("fmi privacy plan")]
    assert len(plans) == 2
    for command in plans:
        assert shell(command, target).strip() == SHOWN[command]


def test_a_release_and_its_cost_look_as_shown(start) -> None:
    # All sites are there before the first release; twenty of them are long enough for what follows.
    target = start(COHORT_FILE.replace(WEEK, "max_interval: 4"))
    packets = [
        FMIEmitter(f"s{number}", cohort="healthcare").emit_msp(
            controller={"tau": 0.6, "lr": 0.003},
            evaluator={"g_min": 0.3},
            metrics={"gain_p50": 0.1, "gain_p90": 0.25},
        )
        for number in range(400)
    ]
    with FMIClient(target, domain_id="s0", cohort="healthcare") as client:
        assert all(receipt.ok for receipt in client.emit_many(packets))
        assert client.emit_msp(controller={"tau": 0.6}).sequence is None
    for _ in range(60):
        prior = json.loads(shell("fmi get healthcare --json", target) or "{}")
        told = prior.get("prior_update", {}).get("estimates", {})
        if told and all("value" in estimate for estimate in told.values()):
            break
        time.sleep(0.2)
    else:
        pytest.fail("400 sites have no values")
    for command in ("fmi get healthcare", "fmi get healthcare --kind warm_start"):
        assert words(shell(command, target)) == words(SHOWN[command]), command
    ledger = shell("fmi privacy ledger healthcare", target).strip().splitlines()
    shown = SHOWN["fmi privacy ledger healthcare"].splitlines()
    assert words(ledger[0]) == words(shown[0])
    assert words(ledger[4]) == words(shown[4])
    costs = [line.split()[-1] for line in shown[6:]]
    assert [line.split()[-1] for line in ledger[6:8]] == costs[:2] == ["opened", costs[1]]
    assert "RELEASE_SCHEDULED" in shell("fmi cohorts release healthcare", target)


def test_two_releases_have_spent_what_is_shown(start) -> None:
    shown = SHOWN["fmi privacy ledger healthcare"].splitlines()[2].split()
    assert shown[4] == "2"
    for period_s in (1, 4, 16):  # a machine that is slow may look when there was a third
        target = start(COHORT_FILE.replace(WEEK, f"max_interval: {period_s}"))
        with FMIClient(target) as client:
            budget = second_release(client)
        if budget.releases == 2:
            break
    assert budget.releases == 2
    assert f"{budget.epsilon_spent:.4g}" == shown[1]


def second_release(client: FMIClient) -> admin_service_pb2.PrivacyBudget:
    """Return what was spent when there are two releases, or more."""
    while True:
        (budget,) = client.admin.list_privacy_budgets("healthcare")
        if budget.releases >= 2:
            return budget
        time.sleep(0.05)


def test_the_program_prints_what_stands_behind_its_lines() -> None:
    (program,) = blocks(PAGE, "python")
    done = run([sys.executable, "-W", "error", "-c", program], "localhost:1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == re.findall(r"print\(.*\)  # (.+)$", program, re.MULTILINE)
