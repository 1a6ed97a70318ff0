"""The commands of the page on operating a server, run in its order."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))

import yaml
from broker import Broker
from documents import ROOT, TARGET, console_commands, run

from fmi.plain import new_packet_id, packet_from_plain
from fmi_server.app import STORE_FILE
from fmi_server.service import FMIService
from fmi_server.storage import JetStreamStore, SqliteStore
from fmi_server.telemetry import FMITelemetry

PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
EMBEDDED, _, SHARED = PAGE.partition("## Several servers")


async def fill(data_dir: Path) -> None:
    async with FMIService(store=SqliteStore(data_dir / STORE_FILE)) as service:
        await service.emit(
            packet_from_plain(
                {
                    "type": "msp",
                    "packet_id": new_packet_id(),
                    "domain_id": "site_001",
                    "cohort": "care",
                    "rev": 1,
                    "emitted_at": time.time(),
                    "controller": {"tau": 0.9},
                }
            )
        )


def test_the_alert_rules_are_of_metrics_that_there_are() -> None:
    (block,) = re.findall(r"```yaml\n(groups:.*?)```", EMBEDDED, re.DOTALL)
    (group,) = yaml.safe_load(block)["groups"]
    there = FMITelemetry().snapshot()  # before any was counted: an increase is from something
    for rule in group["rules"]:
        for name in re.findall(r"fmi_\w+(?:\{.*?\})?", rule["expr"]):
            assert name in there, rule["alert"]
        assert rule["annotations"]["summary"]
    assert len({rule["alert"] for rule in group["rules"]}) == 4


def commands_of(text: str) -> list[str]:
    return [command.partition("#")[0] for command, _ in console_commands(text, "fmi-server")]


def test_the_commands_do_what_the_page_says(tmp_path: Path) -> None:
    for name in ("fmi-data", "backups"):
        (tmp_path / name).mkdir()
    asyncio.run(fill(tmp_path / "fmi-data"))
    commands = commands_of(EMBEDDED)
    assert [command.split()[1] for command in commands] == [
        "backup",
        "inspect",
        "inspect",
        "restore",
    ]
    outputs = []
    for command in commands:
        done = run(command.split(), TARGET, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert "checked: all is in order, 1 packet and every page" in outputs[2]
    assert "set aside" in outputs[3]
    names = {path.name.partition("-2")[0] for path in (tmp_path / "fmi-data").iterdir()}
    assert {"fmi.sqlite3", "fmi.sqlite3.replaced"} <= names


async def test_a_store_moves_to_brokers_as_the_page_says(tmp_path: Path) -> None:
    (tmp_path / "fmi-data").mkdir()
    await fill(tmp_path / "fmi-data")
    backup, restore, serve = commands_of(SHARED)
    assert serve.split()[:2] == ["fmi-server", "serve"]
    async with Broker(tmp_path / "broker") as broker:
        for command in (backup, restore):
            # One broker in place of three.
            here = command.replace("nats://a,b,c", broker.url()).replace("replicas 3", "replicas 1")
            done = await asyncio.to_thread(run, here.split(), TARGET, folder=tmp_path)
            assert done.returncode == 0, done.stderr
        async with JetStreamStore(broker.url(), tmp_path / "view.db") as store:
            assert len(await store.load()) == 1
