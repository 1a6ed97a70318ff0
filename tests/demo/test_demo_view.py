from __future__ import annotations

import io

import pytest
from rich.console import Console

from fmi.v1 import update_pb2
from fmi_demo.events import Curve, Emitted, HintTried, SiteFinished, Tuned, WarmStarted
from fmi_demo.scenario import COHORTS
from fmi_demo.view import View, policy_text


def prior_update(cohort, revision, sites):
    update = update_pb2.Update(cohort=cohort, revision=revision)
    update.prior_update.lineage.sites = sites
    estimate = update.prior_update.estimates["gamma"]
    estimate.value, estimate.lower, estimate.upper = 0.1, 0.05, 0.2
    return update


EVENTS = (
    Tuned("site-01", 5, 0.75),
    Emitted("site-01", "MSP", "accuracy 0.750 by 5 evaluations"),
    Emitted("site-06", "POP", "averaging=True: accuracy +0.010"),
    SiteFinished("site-01", 3, False, 130, {}, 0.9, 0.3, {}, 14, {}),
    WarmStarted(COHORTS[0], {"gamma": 0.1}, "regime", 0.9),
    WarmStarted(COHORTS[0], {"gamma": 0.1}, "regime", 0.9),
    Curve("cold", 0, (0.1, 0.2)),
    HintTried(COHORTS[0], "observational", {"n_components": 256.0}, 0.9, 0.95, 6),
    HintTried(COHORTS[1], "no hint", {}, 0.9, 0.9, 0),
)


def shown(*, terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, height=50, no_color=True)
    with View(console, sites=6, searches=4) as view:
        view.stage("tuning")
        for event in EVENTS:
            view.on_event(event)
        view.on_update(prior_update(COHORTS[0], 1, 5))
        view.on_update(prior_update(COHORTS[0], 2, 5))
    return out.getvalue()


def test_without_a_terminal_there_is_a_line_for_each_thing_that_matters():
    lines = shown(terminal=False).splitlines()
    assert lines == [
        "tuning",
        "site-01  MSP  accuracy 0.750 by 5 evaluations",
        "site-06  POP  averaging=True: accuracy +0.010 (and sends the reverse)",
        "late-site  warm start of digits, from regime: gamma 0.1",
        "late-site  hint of digits: n_components=256: accuracy 0.900 -> 0.950",
        "digits  prior, revision 1, 5 sites: gamma 0.1 [0.05, 0.2]",
    ]


@pytest.mark.parametrize(
    "text", ["site-01", "0.750", "done", "0.1 [0.05, 0.2]", "1 of 4 searches", "sends the reverse"]
)
def test_on_a_terminal_there_is_a_table_of_what_is(text):
    assert text in shown(terminal=True)


def test_policies_are_written_as_they_were_meant():
    bundle = {"n_components": 256.0, "averaging": True, "augment": "shift"}
    assert policy_text(bundle) == "n_components=256, averaging=True, augment=shift"
