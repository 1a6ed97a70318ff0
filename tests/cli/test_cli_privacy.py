"""`fmi privacy` and private cohorts, against the server itself."""

from __future__ import annotations

import json
import math
import re
import time

import pytest

from fmi.v1 import admin_service_pb2
from fmi_client import FMIClient, FMIEmitter
from fmi_client.commands.exits import ExitCode

COHORT = """
name: care
signals:
  - {name: tau, section: controller, lower: 0, upper: 1}
  - {name: gain, section: metrics, lower: -1, upper: 1}
release: {max_interval: 0.2s}
privacy: {dp_epsilon: 60, dp_delta: 1e-6, dp_epochs: 3}
"""


def test_the_life_of_a_budget(ask_real, real_target, tmp_path):
    assert "no cohort is private" in ask_real("privacy ledger").stdout
    file = tmp_path / "care.yaml"
    file.write_text(COHORT)
    # The sites are there before the budget runs: the cohort is declared without it first.
    file.write_text(COHORT[: COHORT.index("privacy")].replace("0.2s", "60s"))
    assert ask_real("cohorts put", str(file)).exit_code == 0
    with FMIClient(real_target) as client:
        for number in range(60):
            client.emit(
                FMIEmitter(domain_id=f"s{number}", cohort="care").emit_msp(
                    controller={"tau": 0.3}, metrics={"gain": 0.5}
                )
            )
        file.write_text(COHORT)
        assert ask_real("cohorts put", str(file)).exit_code == 0
        deadline = time.monotonic() + 100.0
        while client.admin.list_privacy_budgets("care")[0].releases_left:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        receipt = client.emit(
            FMIEmitter(domain_id="late", cohort="care").emit_msp(controller={"tau": 1.0})
        )
        assert receipt.status == "accepted"
        assert receipt.sequence is None, "the places of two packets would count those between them"
    told = ask_real("privacy ledger care").stdout
    assert re.search(r"care +60 +60 +1e-06 +3 +0 +exhausted", told), told
    assert re.search(r"1 +20.+Z +opened", told), told
    assert len(re.findall(r"^ +\d  20", told, re.MULTILINE)) == 4
    data = json.loads(ask_real("privacy ledger care --json").stdout)
    (budget,) = data["budgets"]
    assert budget["rho_spent"] == pytest.approx(
        sum(spend.get("rho", 0) for spend in data["spends"])
    )
    assert budget["epsilon_spent"] == pytest.approx(60.0, rel=1e-3)
    assert "spends" not in json.loads(ask_real("privacy ledger --json").stdout)

    shown = ask_real("get care").stdout
    assert "private, confidence" in shown
    assert "epsilon 60 spent" in shown
    assert "site" not in shown.partition("signal")[0]
    assert max(map(len, shown.splitlines())) <= 80
    assert "tau" in ask_real("get care --kind warm_start").stdout
    hint = ask_real("get care --kind policy_hint")
    assert hint.exit_code == ExitCode.NOT_FOUND
    told = " ".join(hint.output.split())
    assert "'care' is private, and releases priors and warm starts only: there is no policy" in told
    refused = ask_real("cohorts release care")
    assert refused.exit_code == ExitCode.REFUSED
    assert "PRIVACY_BUDGET_EXHAUSTED" in refused.output

    weaker = tmp_path / "weaker.yaml"
    weaker.write_text(COHORT.replace("dp_epsilon: 60", "dp_epsilon: 90"))
    refused = ask_real("cohorts put", str(weaker))
    assert refused.exit_code == ExitCode.REFUSED
    assert "more than sites were promised" in " ".join(refused.output.split())


@pytest.mark.parametrize(("charged", "cost"), [(0.04, "0.04"), (0.0, "0")])
def test_a_ledger_says_what_a_restore_charged(ask, script, charged, cost):
    budgets = admin_service_pb2.ListPrivacyBudgetsResponse()
    budgets.budgets.add(cohort="care").plan.epochs = 9
    spends = admin_service_pb2.ListPrivacySpendsResponse()
    for number, (rho, epoch) in enumerate([(0.0, "a"), (0.01, "a"), (charged, "b"), (0.01, "b")]):
        spends.spends.add(number=number + 1, rho=rho, history_epoch=epoch)
    script["ListPrivacyBudgets"], script["ListPrivacySpends"] = budgets, spends
    told = ask("privacy", "ledger", "care").stdout.splitlines()
    assert max(map(len, told)) <= 80
    ends = [line.split(" - ")[-1].split() for line in told[-4:]]
    assert ends == [["opened"], ["0.01"], [cost, "by", "a", "restore"], ["0.01"]]
    del spends.spends[2:]
    assert "restore" not in ask("privacy", "ledger", "care").stdout


def test_a_plan_says_what_a_budget_means_and_what_to_change(ask_real):
    line = "privacy plan --sites 200 --signals 20 --epsilon 1 --delta 1e-6 --epochs 50"
    told = ask_real(line)
    assert told.exit_code == 0
    assert max(map(len, told.stdout.splitlines()[:-4])) <= 80
    said = " ".join(told.stdout.split())
    for words in ("sensitivity 5.477", "noise 32.04", "error by noise 0.877", "and there are 200"):
        assert words in said
    data = json.loads(ask_real(line, "--json").stdout)
    assert data["noise_stderr"] == pytest.approx(0.8774, abs=1e-4)
    assert data["plan"]["epochs"] == 50


def test_a_plan_with_a_norm_for_vectors_has_less_noise(ask_real):
    line = "privacy plan --sites 4000 --signals 200 --signals-per-site 20 --epsilon 1 --delta 1e-6 --epochs 5"
    told = json.loads(ask_real(line, "--json").stdout)
    (advice,) = [said for said in told["advice"] if "dp_clip_norm" in said]
    assert "a dp_clip_norm of 4.082 takes 76% off the noise" in advice
    better = ask_real(f"{line} --clip-norm 4.082")
    data = json.loads(ask_real(f"{line} --clip-norm 4.082 --json").stdout)
    assert data["plan"]["sensitivity"] == pytest.approx(4.082)
    assert data["plan"]["noise_multiplier"] == told["plan"]["noise_multiplier"]
    assert data["noise_stderr"] == pytest.approx(0.2357 * told["noise_stderr"], rel=1e-3)
    assert re.search(r"sensitivity +4\.082", better.stdout)
    assert "half widths, 400 sites, mid-range" in " ".join(better.stdout.split())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--sites 200 --epsilon 1", "Say how many --signals"),
        ("--signals 20 --epsilon 1", "Missing option '--sites'"),
        ("--sites 0 --signals 20", "0 is not in the range"),
        ("--sites 200 --signals 20 --epsilon 1 --epochs 5", "privacy.dp_delta"),
        ("--sites 200 --signals 20 --epsilon nan --delta 1e-6 --epochs 5", "privacy.dp_epsilon"),
        (
            "--sites 200 --signals 20 --epsilon 1 --delta 1e-6 --epochs 5 --noise 0.5",
            "privacy.dp_noise_sigma",
        ),
        (
            "--sites 200 --signals 2 --epsilon 1 --delta 1e-6 --epochs 5 --clip-norm 0.001",
            "privacy.dp_clip_norm",
        ),
        (
            "--sites 200 --signals 2 --signals-per-site 3 --epsilon 1 --delta 1e-6 --epochs 5",
            "signals_per_site  is 3, of 2 signals",
        ),
        ("--sites 200 --cohort nowhere", "nowhere"),
    ],
)
def test_a_plan_that_is_none_says_why(ask_real, line, said):
    told = ask_real(f"privacy plan {line}")
    assert told.exit_code in (ExitCode.REFUSED, ExitCode.USAGE, ExitCode.NOT_FOUND)
    assert said in told.output
    assert "Traceback" not in told.output


def test_a_plan_for_a_cohort_tells_the_error_of_each_signal_in_its_unit(ask_real, tmp_path):
    file = tmp_path / "plant.yaml"
    file.write_text(
        """
        name: plant
        signals:
          - {name: temperature, section: metrics, lower: 20, upper: 120, unit: K}
          - {name: rate, section: controller, lower: 0.0001, upper: 1, transform: log}
          - {name: share, section: controller, lower: 0.01, upper: 0.99, transform: logit}
        """
    )
    assert ask_real("cohorts put", str(file)).exit_code == 0
    line = "privacy plan --cohort plant --sites 100 --epsilon 4 --delta 1e-6 --epochs 10"
    data = json.loads(ask_real(line, "--json").stdout)
    noise = data["noise_stderr"]
    assert data["signal_stderr"] == {
        "temperature": pytest.approx(50.0 * noise),
        # In the middle of its logarithms, by the half width of these.
        "rate": pytest.approx(0.01 * math.log(1e4) / 2.0 * noise),
        # Log odds end a millionth of the width before the bounds, so that they are wide.
        "share": pytest.approx(0.25 * 0.98 * math.log(1e6 - 1.0) * noise, rel=1e-4),
    }
    shown = ask_real(line).stdout
    assert re.search(r"temperature +20 \.\. 120 +[0-9.]+ +K", shown), shown
