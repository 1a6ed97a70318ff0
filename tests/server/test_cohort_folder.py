"""`--cohorts`: wrong files stop the start, unsafe changes need force, and closed cohorts are closed."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from server_harness import Client, msp, refusal_of
from server_process import LOCAL, assert_refused, run, started

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
