"""The scaling benchmark runs, and its arithmetic is right."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.scaling.fitting import costs_of
from benchmarks.scaling.levels import two_levels
from benchmarks.scaling.model import Duty, Limits, load_of, release_rate, replica_of
from benchmarks.scaling.page import PARTS
from benchmarks.scaling.plan import Demand, plan, text_of
from benchmarks.scaling.record import COMMITTED, Record
from benchmarks.scaling.sketches import trimmed_mean_of_weighted
from benchmarks.scaling.unit_costs import UnitCosts
from fmi_server.aggregation import estimate

ROOT = Path(__file__).parents[2]


@pytest.fixture
def costs() -> UnitCosts:
    found = Record.read(COMMITTED).costs
    assert found is not None
    return found


@pytest.mark.timeout(1500)  # it starts some twenty servers
def test_everything_is_measured_simulated_and_written(tmp_path):
    page, chart = tmp_path / "scaling.md", tmp_path / "scaling.png"
    places = [f"<!-- begin {name}: generated -->\n<!-- end {name} -->\n" for name in PARTS]
    page.write_text("".join(places))
    where = ["--results", tmp_path / "measured.json", "--page", page, "--chart", chart]
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", "all", "--tiny", *map(str, where)],
        capture_output=True,
        text=True,
        timeout=1400,
        check=False,
        cwd=ROOT,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    measured = json.loads((tmp_path / "measured.json").read_text())
    found = measured["costs"]
    assert set(found) == {field.name for field in dataclasses.fields(UnitCosts)}
    # What cannot be nothing, however little is measured.
    for name in ("packet_alone_cpu_s", "update_signal_bytes", "told_frame_bytes", "server_bytes"):
        assert found[name] > 0.0, name
    # A packet of 25 values of 8 bytes, and its answer.
    assert 25 * 8 < found["packet_alone_up_bytes"] < 2000
    assert found["packet_batched_up_bytes"] < found["packet_alone_up_bytes"]
    (point,) = measured["points"]["servers"]
    assert point["update_bytes"]["predicted"] == pytest.approx(
        point["update_bytes"]["measured"], rel=0.2
    )
    assert measured["points"]["way_up"]["quiet_s"]["measured"] > 0.0
    assert page.read_text().count("| --- |") >= len(PARTS) - 2
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_costs_are_found_again_and_are_not_negative():
    amounts = np.array([[1, 10, 3], [1, 500, 20], [1, 40, 900], [1, 7, 7]])
    assert costs_of(amounts, amounts @ [5.0, 0.25, 2.0]) == pytest.approx([5.0, 0.25, 2.0])
    assert costs_of(amounts[:, 1:], [1e-9, 20.0, 1.0, 1e-9])[1] >= 0.0
    assert min(costs_of([[1, 1], [1, 2], [1, 3]], [3.0, 2.0, 1.0])) == 0.0


def test_a_weighted_trimmed_mean_is_that_of_all_the_sites_that_values_stand_for():
    random = np.random.default_rng(1)
    values, weights = random.normal(size=60), random.integers(1, 9, size=60)
    all_of_them = np.repeat(values, weights)
    share = (
        0.1 if len(all_of_them) % 10 == 0 else np.ceil(0.1 * len(all_of_them)) / len(all_of_them)
    )
    expected = stats.trim_mean(all_of_them, share + 1e-12)
    assert trimmed_mean_of_weighted(values, weights.astype(float)) == pytest.approx(expected)


def test_one_region_under_a_parent_is_the_region():
    sites = np.random.default_rng(2).normal(size=(5, 12))
    alone = estimate(sites).value
    assert np.allclose(two_levels([sites, sites, sites]), alone)


def test_releases_come_with_packets_and_no_faster_than_the_interval(costs):
    rare = Duty(100, 25, 4, 4e-3, 60.0)
    often = dataclasses.replace(rare, packets_per_s=4e6)
    assert release_rate(rare, costs) == pytest.approx(1e-3, rel=0.07)
    assert release_rate(often, costs) == pytest.approx(1 / 60.0, rel=0.01)
    assert release_rate(dataclasses.replace(rare, packets_per_s=0.0), costs) == 0.0


def test_several_servers_share_subscribers_and_not_sites(costs):
    duty = Demand(100_000).duty
    one, five = load_of(duty, costs), load_of(replica_of(duty, 5), costs)
    assert five.subscribers == one.subscribers / 5
    assert five.cpu["releases"] == pytest.approx(one.cpu["releases"] / 5)
    assert five.cpu["following"] > 0.0 == one.cpu["following"]
    held = 100_000 * (costs.site_bytes + 25 * costs.cell_bytes)
    assert min(one.memory_bytes, five.memory_bytes) > held
    assert five.disk_bytes == one.disk_bytes


def test_a_plan_covers_all_sites_within_the_limits(costs):
    found = plan(Demand(1_000_000), costs)
    regions, top = found.levels[0], found.levels[-1]
    assert regions.servers * regions.duty.sites == pytest.approx(1_000_000)
    assert top.servers == 1
    assert sum(level.servers for level in found.levels) < 1_000_000 / 5_000
    assert found.one.most_used(Limits()) > 1.0
    assert "each region" in text_of(found)
    deep = plan(Demand(1_000_000, fan_out=10, leaf_sites=5_000), costs)
    assert [level.servers for level in deep.levels] == [200, 20, 2, 1]
    assert deep.levels[-1].latency.busy_s > found.levels[-1].latency.busy_s
