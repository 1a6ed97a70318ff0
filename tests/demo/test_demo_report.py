"""The closing words: true to a reader who does not know the demo, at the width of any terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from fmi.v1 import update_pb2
from fmi_demo.events import HintTried, SiteFinished, WarmStarted
from fmi_demo.report import print_report
from fmi_demo.result import ArmResult, DemoResult, Edge, PriorValue
from fmi_demo.scenario import ARMS, BOX, COHORTS

HONEST = {"gamma": 0.1, "eta0": 2.0, "alpha": 1e-5}
LIE = {name: low for name, (low, _) in BOX.items()}
TWO_THIRDS = "labelled_thirds=2"


def site(number, *, lies, gain):
    # The median is 0.2 over the honest sites, and 0.1 with the liars.
    claimed = LIE if lies else {**HONEST, "gamma": 0.1 if number <= 5 else 0.2}
    return SiteFinished(
        f"site-{number:02d}", 0, lies, 130, HONEST, 0.9, 0.3, claimed, 14, {TWO_THIRDS: gain}
    )


def edge(**changes):
    plain = Edge(
        source="alpha",
        target="weight_norm",
        weight=-0.13,
        lower=-0.19,
        upper=-0.07,
        estimator="trimmed_mean",
        sites=10,
        testing_sites=13,
        opposite_sites=2,
        sign_conflict=False,
        direction_conflict=False,
    )
    return replace(plain, **changes)


def warm_start(cohort, source="profile_and_regime"):
    return WarmStarted(cohort, HONEST, source, 0.99)


RESULT = DemoResult(
    seed=7,
    sites=tuple(site(i, lies=i > 11, gain=-0.01 if i == 1 else 0.02) for i in range(1, 14)),
    late_budget=25,
    target_accuracy=0.992,
    arms=tuple(ArmResult(arm, 0.419, 0.992, None, 7, 1, 15) for arm in ARMS),
    warm_starts=tuple(map(warm_start, COHORTS)),
    hints=(
        HintTried(COHORTS[0], "Observational.", {"labelled_thirds": 2.0}, 0.991, 0.995, 13),
        HintTried(COHORTS[1], "no hint: too few sites", {}, 0.991, 0.991, 0),
    ),
    # The widest values that the bounds let a prior have.
    priors={
        cohort: {name: PriorValue(1.2e-05, 9.6e-07, 1.5e-04, 13, 4) for name in BOX}
        for cohort in COHORTS
    },
    edges=(
        edge(),
        edge(
            source="weight_norm",
            target="accuracy",
            sites=9,
            opposite_sites=4,
            sign_conflict=True,
            direction_conflict=True,
        ),
    ),
    below_quorum=9,
    packets=182,
    revisions={},
    seconds=40.0,
    chart=Path("demo.png"),
    results=Path("results.json"),
    commands=("fmi-server serve &", "fmi get digits"),
)


def lines(result=RESULT, *, width=80):
    out = io.StringIO()
    print_report(Console(file=out, width=width), result)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def words(result=RESULT):
    """Return the report as one line, so that it does not matter where it is wrapped."""
    return " ".join(" ".join(lines(result)).split())


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_cut(width):
    shown = lines(width=width)
    assert max(map(len, shown)) <= width
    assert not any("…" in line for line in shown)


def test_an_interval_that_a_liar_has_blown_up_still_fits():
    blown = replace(RESULT, edges=(edge(lower=-745261.99, upper=745261.67),))
    assert "-7.5e+05 .. +7.5e+05 10 of 13" in words(blown)
    assert max(map(len, lines(blown))) <= 80


def test_a_relation_shows_who_found_it_and_who_with_the_opposite_sign():
    assert "-0.19 .. -0.07 10 of 13 2 of 10 none" in words()
    assert "-0.19 .. -0.07 9 of 13 4 of 9 sign, direction" in words()


def test_the_liars_are_named_and_said_to_be_counted():
    said = words()
    assert "site-12 and site-13 lied" in said
    assert "2 of these 13 sites lie" in said
    assert "Both cohorts heard the 2 liars, who turn each effect around" in said
    assert "those of the 2 liars included" in said
    assert "from the reports of all sites, those of the 2 liars included" in said


def test_what_is_true_is_told_of_honest_sites_alone():
    said = words()
    assert "In truth it helped 10 of 11 honest sites" in said
    assert "gamma 0.2 1.2e-05" in said  # the honest median, beside the first prior


def test_a_hint_that_is_not_there_is_told_once():
    assert f"{COHORTS[1]}: no hint: too few sites" in words()
    assert words().count("no hint") == 1


def test_percentages_are_all_written_alike():
    said = words()
    assert "until 0.8 % wrong answers" in said
    assert "0.9 % -> 0.5 %" in said
    assert not any(before.isdigit() for before, after in pairwise(said) if after == "%")


def test_warm_starts_say_in_the_contract_s_words_where_they_come_from():
    assert (
        "Warm start of digits and digits-plain-mean: from profile_and_regime, sites of the same "
        "profile class in the nearest regime." in words()
    )
    differ = replace(RESULT, warm_starts=(warm_start(COHORTS[0]), warm_start(COHORTS[1], "cohort")))
    assert "Warm start of digits-plain-mean: from cohort, the whole cohort." in words(differ)


def test_every_source_of_a_warm_start_can_be_told():
    for name in update_pb2.WarmStartSource.DESCRIPTOR.values_by_name:
        source = name.removeprefix("WARM_START_SOURCE_").lower()
        if source not in {"unspecified", "none"}:  # without a start the late site does not begin
            told = replace(RESULT, warm_starts=(warm_start(COHORTS[0], source),))
            assert f"Warm start of digits: from {source}, " in words(told)


def test_a_consensus_without_relations_says_so():
    assert "none has a quorum" in words(replace(RESULT, edges=()))


def test_how_to_go_on_depends_on_whether_the_server_does():
    assert "kill %1 stops the server" in words()
    serving = replace(RESULT, commands=("fmi get digits",))
    assert "kill" not in words(serving)
