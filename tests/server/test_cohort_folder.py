"""`--cohorts`: wrong files stop the start, unsafe changes need force, and closed cohorts are closed."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from server_harness import Client, eventually, msp, refusal_of
from server_process import LOCAL, assert_refused, run, started

from fmi.v1 import admin_service_pb2, registry_service_pb2
from fmi_server.storage import SqliteStore

CARE = """\
name: care
signals:
  - {name: tau, section: controller, lower: 0, upper: 1}
"""


def test_all_that_is_wrong_with_the_files_stops_the_start_and_touches_nothing(command, tmp_path):
    """And the check says the same before."""
    folder = tmp_path / "cohorts"
    folder.mkdir()
    (folder / "care.yaml").write_text(CARE.replace("controller", "kitchen") + "aggregatoin: {}\n")
    (folder / "private.yaml").write_text("{name: private, access: {emit: [site]}}")
    (folder / "zero.yml").write_text("name: [")
    flags = (*LOCAL, "--data-dir", "data", "--cohorts", "cohorts")
    served, checked = (command(*flags, name=name) for name in ("serve", "check-config"))
    assert served == checked
    assert_refused(served, "4 problems in 3 cohort files")
    assert [line.split(": ")[:2] for line in served.err.splitlines()[1:]] == [
        ["cohorts/care.yaml", "signals[0].section"],
        ["cohorts/care.yaml", "aggregatoin"],
        ["cohorts/private.yaml", "access.emit"],
        ["cohorts/zero.yml", "is not YAML"],
    ]
    assert "did you mean aggregation?" in served.err
    assert not (tmp_path / "data" / "fmi.sqlite3").exists()


async def cohorts_kept(data_dir: Path) -> list[str]:
    store = SqliteStore(data_dir / "fmi.sqlite3")
    await store.open()
    try:
        return [record.name for record in await store.cohorts()]
    finally:
        await store.close()


async def test_an_unsafe_cohort_file_needs_force(tmp_path):
    folder = tmp_path / "cohorts"
    folder.mkdir()
    flags = (*LOCAL, "--data-dir", str(tmp_path / "data"), "--cohorts", str(folder))
    (folder / "care.yaml").write_text(CARE)
    async with started(*flags) as server, Client(server.target) as client:
        await client.emit(msp("site", "care", controller={"tau": 0.75}))
        declared = (await client.cohorts())["care"].schema_hash
    async with started(*flags) as server, Client(server.target) as client:
        assert (await client.cohorts())["care"].schema_hash == declared

    (folder / "care.yaml").write_text(CARE.replace("upper: 1", "upper: 0.5"))
    (folder / "a.yaml").write_text("name: new")
    for name in ("care.yaml", "care.yml"):
        (folder / "care.yaml").rename(folder / name)
        refused = await run(*flags)
        assert_refused(refused, "1 problem in 1 cohort file")
        assert (
            f'{folder / name}: signals["tau"].upper: of cohort care is narrowed from [0, 1] to [0, 0.5]'
        ) in refused.err
        assert "--force-cohorts" in refused.err
    assert set(await cohorts_kept(tmp_path / "data")) == {"care"}, (
        "a safe file waits for the others"
    )

    async with started(*flags, "--force-cohorts") as server, Client(server.target) as client:
        assert (await client.cohorts())["care"].schema_hash != declared
        refusal = await refusal_of(client.emit(msp("site", "care", controller={"tau": 0.75})))
        assert refusal.reason == "COHORT_RULE_VIOLATION"
    (warning,) = [line for line in server.err if "by force" in line]
    for words in ("warning", "cohort care", 'signals["tau"].upper', "from [0, 1] to [0, 0.5]"):
        assert words in warning
    async with started(*flags) as server, Client(server.target) as client:
        assert (await client.sites())["care:site"].packets["msp"] == 1


PRIVATE = (
    CARE
    + """
release: {max_interval: 0.2}
privacy: {dp_epsilon: 40, dp_delta: 1e-6, dp_epochs: 5}
"""
)


async def test_a_file_that_promises_a_spent_budget_is_named_before_any_file_is_in_force(tmp_path):
    folder = tmp_path / "cohorts"
    folder.mkdir()
    flags = (*LOCAL, "--data-dir", str(tmp_path / "data"), "--cohorts", str(folder))
    (folder / "care.yaml").write_text(PRIVATE)
    async with started(*flags) as server, Client(server.target) as client:
        request = admin_service_pb2.ListPrivacyBudgetsRequest()

        async def paid_for() -> int:
            return (await client.admin.ListPrivacyBudgets(request)).budgets[0].releases

        await eventually(paid_for)
        smaller = {"dp_epsilon: 40": "dp_epsilon: 1", "upper: 1}": "upper: 0.5}"}
        known = registry_service_pb2.GetCohortSpecRequest(cohort="care")
        spec = (await client.registry.GetCohortSpec(known)).spec
        spec.privacy.dp_epsilon, spec.signals[0].upper = 1.0, 0.5
        refusal = await refusal_of(client.put_spec(spec))
        assert refusal.reason == "SPEC_CHANGE_UNSAFE"
        assert [place for place, _ in refusal.violations] == ['signals["tau"].upper', "privacy"]
        assert all("; say force" in description for description in refusal.descriptions)
    (folder / "a.yaml").write_text("name: new")
    for old, new in smaller.items():
        (folder / "care.yaml").write_text((folder / "care.yaml").read_text().replace(old, new))
    refused = await run(*flags)
    assert_refused(refused, "2 problems in 1 cohort file")
    assert f"{folder / 'care.yaml'}: privacy: of cohort care promises epsilon 1" in refused.err
    assert refused.err.count("--force-cohorts") == 2
    assert set(await cohorts_kept(tmp_path / "data")) == {"care"}
    async with started(*flags, "--force-cohorts") as server:
        pass
    forced = [line for line in server.err if "by force" in line]
    assert len(forced) == 2
    assert "cohort care was changed by force: privacy: promises epsilon 1 at delta" in forced[1]
    async with started(*flags) as server:
        pass
    assert not [line for line in server.err if "by force" in line]


@pytest.mark.parametrize("declared", [True, False], ids=["some declared", "none declared"])
async def test_closed_cohorts_are_closed(tmp_path, declared):
    folder = tmp_path / "cohorts"
    folder.mkdir()
    if declared:
        (folder / "care.yaml").write_text(CARE)
    flags = (*LOCAL, "--data-dir", str(tmp_path / "data"), "--cohorts", str(folder))
    async with (
        started(*flags, "--no-open-cohorts") as server,
        Client(server.target) as client,
    ):
        refusal = await refusal_of(client.emit(msp("site", "elsewhere")))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "COHORT_UNKNOWN")
        assert set(await client.cohorts()) == ({"care"} if declared else set())
