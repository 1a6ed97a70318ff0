"""Budgets: what is asked is kept, what contradicts itself is refused with what to change."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmi_server.privacy.accounting import zcdp_epsilon, zcdp_of_noise
from fmi_server.privacy.advice import report_plan
from fmi_server.privacy.budget import (
    BudgetError,
    PrivacySettings,
    budget_faults,
    natural_sensitivity,
    plan_budget,
)

EPSILON, DELTA, EPOCHS = st.floats(0.01, 50.0), st.floats(1e-12, 0.01), st.integers(1, 1000)


@given(EPSILON, DELTA, EPOCHS, st.integers(1, 300))
def test_all_epochs_together_keep_within_the_budget(epsilon, delta, epochs, signals):
    plan = plan_budget(PrivacySettings(epsilon, delta, dp_epochs=epochs), signals)
    assert plan.epochs == epochs
    assert plan.spent(epochs) <= epsilon
    assert plan.spent(epochs) == pytest.approx(epsilon, rel=0.01)  # and waste little of it
    assert plan.spent(0) == 0.0


def test_noise_alone_says_what_it_is_worth():
    plan = plan_budget(PrivacySettings(0.0, 1e-6, dp_noise_sigma=10.0, dp_epochs=12), 5)
    assert plan.noise_multiplier == 10.0
    assert plan.epsilon == pytest.approx(
        zcdp_epsilon(12 * zcdp_of_noise(1.0, 10.0), 1e-6), rel=1e-6
    )


def test_noise_and_a_budget_say_how_long_it_lasts():
    asked = PrivacySettings(2.0, 1e-6, dp_noise_sigma=10.0)
    plan = plan_budget(asked, 5)
    assert plan.spent(plan.epochs) <= 2.0 < plan.spent(plan.epochs + 1)
    fewer = plan_budget(PrivacySettings(2.0, 1e-6, 10.0, dp_epochs=plan.epochs - 1), 5)
    assert (fewer.epochs, fewer.noise_multiplier) == (plan.epochs - 1, 10.0)


def test_more_epochs_than_the_noise_allows_are_refused_with_what_would_do():
    asked = PrivacySettings(2.0, 1e-6, dp_noise_sigma=10.0, dp_epochs=1000)
    with pytest.raises(
        BudgetError, match=r"dp_noise_sigma: is 10.*needs at least ([0-9.]+)"
    ) as refusal:
        plan_budget(asked, 5)
    advice = refusal.value.advice
    least = float(advice.split("at least ")[1].split(":")[0])
    assert (
        plan_budget(PrivacySettings(2.0, 1e-6, least * 1.00001, dp_epochs=1000), 5).epochs == 1000
    )
    lasts = int(advice.split("plan ")[1].split()[0])
    assert plan_budget(PrivacySettings(2.0, 1e-6, 10.0, dp_epochs=lasts), 5).epochs == lasts
    with pytest.raises(BudgetError):
        plan_budget(PrivacySettings(2.0, 1e-6, 10.0, dp_epochs=lasts + 1), 5)


def test_too_little_noise_for_a_single_release_is_refused():
    with pytest.raises(
        BudgetError, match=r"dp_noise_sigma: is 0\.1, but dp_epsilon 1 over 1 release needs"
    ):
        plan_budget(PrivacySettings(1.0, 1e-6, dp_noise_sigma=0.1), 5)


@pytest.mark.parametrize(
    ("asked", "setting"),
    [
        (PrivacySettings(1.0, 0.0, dp_epochs=1), "dp_delta"),
        (PrivacySettings(1.0, 1e-6), "dp_epochs"),
        (PrivacySettings(0.0, 1e-6, dp_noise_sigma=1.0), "dp_epochs"),
        (PrivacySettings(1.0, 1e-6, dp_sensitivity=1.0, dp_epochs=1), "dp_sensitivity"),
        (PrivacySettings(1.0, 1e-6, dp_sensitivity=1e308, dp_epochs=1), "dp_sensitivity"),
        (PrivacySettings(1e-9, 1e-9, dp_epochs=10**6), "dp_epsilon"),
        (PrivacySettings(1.0, 1e-6, dp_epochs=1, dp_clip_norm=0.001), "dp_clip_norm"),
        (PrivacySettings(1.0, 1e-6, dp_epochs=1, dp_clip_norm=-1.0), "dp_clip_norm"),
        (PrivacySettings(1.0, 1e-6, dp_epochs=1, dp_clip_norm=math.nan), "dp_clip_norm"),
        (
            PrivacySettings(1.0, 1e-6, dp_sensitivity=0.9, dp_epochs=1, dp_clip_norm=1.0),
            "dp_sensitivity",
        ),
        (PrivacySettings(0.0, 1e-6, dp_noise_sigma=1e9, dp_epochs=1), "dp_noise_sigma"),
    ],
)
def test_what_promises_nothing_is_refused_by_its_name(asked, setting):
    with pytest.raises(BudgetError) as refusal:
        plan_budget(asked, 3)
    assert refusal.value.setting == setting


def test_a_declared_sensitivity_may_only_add_noise():
    natural = natural_sensitivity(4)
    assert natural == pytest.approx(math.sqrt(4 * 1.5), rel=1e-6)
    plain = plan_budget(PrivacySettings(1.0, 1e-6, dp_epochs=3), 4)
    same = plan_budget(PrivacySettings(1.0, 1e-6, dp_sensitivity=natural, dp_epochs=3), 4)
    assert same.noise_multiplier == plain.noise_multiplier
    doubled = plan_budget(PrivacySettings(1.0, 1e-6, dp_sensitivity=2 * natural, dp_epochs=3), 4)
    assert doubled.noise_multiplier == pytest.approx(2 * plain.noise_multiplier, rel=1e-6)
    assert doubled.spent(3) < plain.spent(3)


def test_a_clip_norm_is_the_sensitivity_where_it_is_smaller_than_the_bounds_have_it():
    assert natural_sensitivity(4, 1.0) == pytest.approx(1.0, rel=1e-6)
    assert natural_sensitivity(4, 99.0) == natural_sensitivity(4)
    plain = plan_budget(PrivacySettings(1.0, 1e-6, dp_epochs=3), 4)
    clipped = plan_budget(PrivacySettings(1.0, 1e-6, dp_epochs=3, dp_clip_norm=1.0), 4)
    assert clipped.noise_multiplier == plain.noise_multiplier
    assert clipped.rho_per_release == pytest.approx(plain.rho_per_release, rel=1e-6)
    assert clipped.noise_stderr(100) == pytest.approx(
        plain.noise_stderr(100) / math.sqrt(6), rel=1e-5
    )
    declared = PrivacySettings(1.0, 1e-6, dp_sensitivity=2.0, dp_epochs=3, dp_clip_norm=1.0)
    assert plan_budget(declared, 4).noise_multiplier == pytest.approx(
        2 * plain.noise_multiplier, rel=1e-6
    )


def test_another_norm_takes_no_release_away():
    """On another grid a release costs another rounding; ten of one leave forty of the other."""
    for step in range(40):
        one, other = (
            plan_budget(PrivacySettings(2.0, 1e-6, dp_epochs=50, dp_clip_norm=norm), 20)
            for norm in (3.0 + 0.05 * step, 3.07 + 0.05 * step)
        )
        left = (other.rho - 10 * one.rho_per_release) / other.rho_per_release
        assert math.floor(left) == 40
        assert float(one.sums.rho) <= one.rho_per_release


def test_the_plan_counts_what_is_left_of_a_site_and_how_many_send_a_signal():
    asked = PrivacySettings(1.0, 1e-6, dp_epochs=1, dp_clip_norm=2.0)
    plain = plan_budget(PrivacySettings(1.0, 1e-6, dp_epochs=1), 50)
    clipped = plan_budget(asked, 50)
    # Vectors of all 50 signals are scaled to 2: by that much less noise, and by that much less weight.
    everything = report_plan(clipped, 10_000)
    assert everything.noise_stderr == pytest.approx(
        report_plan(plain, 10_000).noise_stderr * math.sqrt(0.5 / 1.5), rel=1e-5
    )
    assert everything.noise_stderr_at_bound == pytest.approx(
        report_plan(plain, 10_000).noise_stderr_at_bound, rel=1e-5
    )
    assert [line.split(" leaves")[0] for line in everything.advice] == ["dp_clip_norm 2"]
    # Of 4 signals they are scaled at the bounds only, and a signal comes from 4 of 50 sites.
    few = report_plan(clipped, 10_000, signals_per_site=4)
    assert few.noise_stderr == pytest.approx(clipped.noise_stderr(800), rel=1e-9)
    assert few.noise_stderr_at_bound == pytest.approx(
        clipped.noise_stderr(800 * 2.0 / math.sqrt(6.0), 1.0), rel=1e-6
    )
    assert not few.advice
    for wrong in (0, 51):
        with pytest.raises(ValueError, match="signals_per_site"):
            report_plan(clipped, 100, signals_per_site=wrong)


def test_the_norm_that_the_advice_goes_up_to_is_not_advised_against():
    asked = PrivacySettings(1.0, 1e-6, dp_epochs=1, dp_clip_norm=1.0)
    (line,) = report_plan(plan_budget(asked, 20), 10_000).advice
    norm = float(line.split("up to ")[1].split()[0])
    assert report_plan(plan_budget(replace(asked, dp_clip_norm=norm), 20), 10_000).advice == ()


def test_a_clip_norm_that_is_advised_takes_off_what_is_said():
    asked = PrivacySettings(1.0, 1e-6, dp_epochs=50)
    report = report_plan(plan_budget(asked, 20), 200, signals_per_site=5)
    (line,) = [line for line in report.advice if "a dp_clip_norm of" in line]
    words = line.split()
    norm, gain = float(words[3]), int(words[5].rstrip("%")) / 100
    better = plan_budget(replace(asked, dp_clip_norm=norm), 20)
    after = report_plan(better, 200, signals_per_site=5)
    assert after.noise_stderr == pytest.approx(report.noise_stderr * (1 - gain), rel=0.02)
    assert not any("dp_clip_norm" in line for line in after.advice)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_where_a_sensitivity_is_declared_the_advice_is_for_its_noise(clip_norm):
    """A norm takes nothing off noise that is for a larger sensitivity, and neither do fewer signals."""
    asked = PrivacySettings(1.0, 1e-6, dp_sensitivity=12.0, dp_epochs=50, dp_clip_norm=clip_norm)
    report = report_plan(plan_budget(asked, 20), 2_000)
    assert not any("a dp_clip_norm of" in line for line in report.advice)
    (ways,) = [line for line in report.advice if "choose one of" in line]
    assert "signals instead" not in ways
    epsilon = float(ways.split("epsilon of about ")[1].split(";")[0].split(",")[0])
    with_it = plan_budget(replace(asked, dp_epsilon=epsilon), 20)
    assert report_plan(with_it, 2_000).noise_stderr == pytest.approx(0.1, rel=0.01)
    (line,) = [line for line in report.advice if line.startswith("dp_sensitivity 12")]
    without = report_plan(plan_budget(replace(asked, dp_sensitivity=None), 20), 2_000)
    assert float(line.split()[-1]) == pytest.approx(without.noise_stderr, rel=0.05)


def test_a_norm_below_a_declared_sensitivity_may_grow_for_nothing():
    asked = PrivacySettings(1.0, 1e-6, dp_sensitivity=3.0, dp_epochs=50, dp_clip_norm=1.0)
    report = report_plan(plan_budget(asked, 20), 10_000)
    (line,) = [line for line in report.advice if line.startswith("dp_clip_norm 1 leaves")]
    assert "the error is the same" not in line
    norm = float(line.split("up to ")[1].split()[0])
    assert norm == 3.0
    after = report_plan(plan_budget(replace(asked, dp_clip_norm=norm), 20), 10_000)
    assert after.noise_stderr == pytest.approx(report.noise_stderr / 3, rel=1e-5)


@pytest.mark.parametrize("epsilon", [0.0, 2.0])
@pytest.mark.parametrize("clip_norm", [None, 3.0])
def test_where_the_noise_is_stated_the_advice_is_to_state_less(epsilon, clip_norm):
    """Neither a larger budget nor fewer releases change noise that stands in the settings."""
    asked = PrivacySettings(
        epsilon, 1e-6, dp_noise_sigma=20.0, dp_epochs=30, dp_clip_norm=clip_norm
    )
    report = report_plan(plan_budget(asked, 20), 300)
    (ways,) = [line for line in report.advice if "choose one of" in line]
    assert "releases instead" not in ways
    sigma, _, rest = ways.split("a dp_noise_sigma of ")[1].partition(" (an epsilon of about ")
    within = float(rest.split()[0]) * 1.01
    less = replace(asked, dp_noise_sigma=float(sigma), dp_epsilon=epsilon and within)
    plan = plan_budget(less, 20)
    assert plan.epsilon <= within
    assert report_plan(plan, 300).noise_stderr == pytest.approx(0.1, rel=0.01)


def test_the_expected_error_falls_with_sites_and_rises_with_signals():
    asked = PrivacySettings(1.0, 1e-6, dp_epochs=1)
    few, many = plan_budget(asked, 5), plan_budget(asked, 50)
    assert few.noise_stderr(1000) == pytest.approx(few.noise_stderr(100) / 10)
    assert many.noise_stderr(100) == pytest.approx(few.noise_stderr(100) * math.sqrt(10), rel=1e-5)
    assert few.noise_stderr(100, value=1.0) > few.noise_stderr(100)


def test_privacy_is_asked_for_or_not():
    assert not PrivacySettings().private
    assert not PrivacySettings(dp_delta=1e-6, dp_epochs=4).private
    assert PrivacySettings(dp_epsilon=1.0).private
    assert PrivacySettings(dp_noise_sigma=1.0).private


@given(
    st.builds(
        PrivacySettings,
        dp_epsilon=st.floats(0.0, allow_nan=False, allow_infinity=False),
        dp_delta=st.floats(0.0, 1.0, exclude_max=True),
        dp_noise_sigma=st.floats(0.0, allow_nan=False, allow_infinity=False) | st.just(0.0),
        dp_sensitivity=st.none() | st.floats(0.0, allow_infinity=False, exclude_min=True),
        dp_epochs=st.integers(0, 2**32 - 1),
        dp_clip_norm=st.none() | st.floats(0.0, allow_nan=False, exclude_min=True),
    ),
    st.integers(1, 4096),
    st.integers(1, 2**32 - 1),
)
def test_whatever_is_asked_gets_a_plan_that_keeps_its_word_or_a_reason(settings, signals, sites):
    if faults := budget_faults(settings, signals):
        with pytest.raises(BudgetError, match=re.escape(str(faults[0]))):
            plan_budget(settings, signals)
        return
    plan = plan_budget(settings, signals)
    assert 1 <= plan.epochs < 2**32
    assert plan.spent(plan.epochs) <= plan.epsilon * (1.0 + 1e-9)
    assert plan.sums.rho <= plan.rho_per_release * (1.0 + 1e-12)
    report = report_plan(plan, sites)
    assert 0.0 < report.noise_stderr <= report.noise_stderr_at_bound < math.inf


@pytest.mark.parametrize(
    ("asked", "setting", "said"),
    [
        (PrivacySettings(2e4, 1e-6, dp_epochs=1), "dp_epsilon", "promises nothing"),
        (PrivacySettings(0.0, 1e-6, 1e-5, dp_epochs=1), "dp_noise_sigma", "promises nothing"),
        (PrivacySettings(1.0, 0.5, dp_epochs=1), "dp_delta", "promises nothing"),
        (PrivacySettings(1.0, 1e-6, 1e9, dp_epochs=1), "dp_noise_sigma", "ask for less noise"),
        (PrivacySettings(1.0, 1e-6, 0.1), "dp_noise_sigma", "raise it or leave it out"),
        (PrivacySettings(1.0, 1e-6, 10.0, dp_epochs=9), "dp_noise_sigma", "out or plan 4 releases"),
    ],
)
def test_what_promises_nothing_is_refused_in_words_of_the_settings(asked, setting, said):
    with pytest.raises(BudgetError) as refused:
        plan_budget(asked, 5)
    assert refused.value.setting == setting
    assert said in refused.value.advice


def test_all_that_is_wrong_with_a_budget_is_told_at_once():
    asked = PrivacySettings(2e4, 0.0, dp_sensitivity=0.1)
    named = [fault.setting for fault in budget_faults(asked, 5)]
    assert named == ["dp_epsilon", "dp_delta", "dp_epochs", "dp_sensitivity"]
    asked = PrivacySettings(0.0, 1.0, 3.0, dp_sensitivity=0.1, dp_clip_norm=0.001)
    faults = budget_faults(asked, 5)
    assert [fault.setting for fault in faults] == ["dp_delta", "dp_epochs", "dp_clip_norm"]
    assert "is 1, which promises nothing" in faults[0].advice
    asked = PrivacySettings(math.inf, math.nan, dp_epochs=1)
    assert [fault.setting for fault in budget_faults(asked, 5)] == ["dp_epsilon", "dp_delta"]


@given(EPSILON, EPOCHS, st.integers(1, 4096), st.floats(0.02, 10.0))
def test_a_least_value_that_a_refusal_tells_is_taken(epsilon, epochs, signals, norm):
    for asked, setting in (
        (PrivacySettings(epsilon, 1e-6, 1e-5, dp_epochs=epochs), "dp_noise_sigma"),
        (PrivacySettings(epsilon, 1e-6, 0.0, 1e-3, epochs, norm), "dp_sensitivity"),
        (PrivacySettings(epsilon, 1e-6, 0.0, 1e-3, epochs), "dp_sensitivity"),
    ):
        (fault,) = budget_faults(asked, signals)
        assert fault.setting == setting
        least = re.search(r"(?:at least|signals by) ([0-9.e+-]*[0-9])", fault.advice)[1]
        assert budget_faults(replace(asked, **{setting: float(least)}), signals) == ()


def test_advice_where_the_noise_is_asked_for_names_what_changes_it():
    asked = PrivacySettings(2.0, 1e-6, dp_noise_sigma=40.0, dp_epochs=20)
    report = report_plan(plan_budget(asked, 5), 400)
    (advice,) = [line for line in report.advice if "choose one of" in line]
    assert "releases instead of" not in advice  # they would have the same noise
    least = float(re.search(r"a dp_noise_sigma of ([0-9.]+)", advice)[1])
    alone = replace(asked, dp_epsilon=0.0, dp_noise_sigma=least)
    plan = plan_budget(alone, 5)
    assert report_plan(plan, 400).noise_stderr == pytest.approx(0.1, rel=0.01)
    epsilon = float(re.search(r"epsilon of about ([0-9.]+)", advice)[1])
    assert epsilon == pytest.approx(plan.epsilon, rel=0.01)


def test_advice_names_ways_that_lead_there():
    plan = plan_budget(PrivacySettings(1.0, 1e-6, dp_epochs=50), 20)
    report = report_plan(plan, 200)
    (advice,) = [line for line in report.advice if "choose one of" in line]
    sites = int(advice.split("choose one of: ")[1].split(" sites")[0])
    assert report_plan(plan, sites).noise_stderr <= 0.1 < report.noise_stderr
    assert report_plan(plan, sites - 1).noise_stderr > 0.1
    few = report_plan(plan, 10)
    assert any("and there are 10" in line for line in few.advice)
    loose = report_plan(plan_budget(PrivacySettings(50.0, 0.01, dp_epochs=1), 1), 1000)
    assert [line.split()[0] for line in loose.advice] == ["delta", "epsilon"]
    assert report_plan(plan_budget(PrivacySettings(2.0, 1e-7, dp_epochs=5), 5), 10**4).advice == ()
