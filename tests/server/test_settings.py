"""`fmi-server serve` as a process: what stops its start, which setting wins, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sqlite3
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner
from server_harness import (
    DEADLINE_S,
    Client,
    Events,
    eventually,
    identity,
    msp,
    packet_keys,
    refusal_of,
    spec,
)
from server_process import Ended, run, started

from fmi.v1 import admin_service_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server.commands import cli
from fmi_server.config import ServerSettings
from fmi_server.testing import running_server

LOCAL = ("--listen", "127.0.0.1:0")

CARE = """\
name: care
signals:
  - {name: tau, section: controller, lower: 0, upper: 1}
"""


def assert_refused(ended: Ended, *words: str) -> None:
    """It stops with exit code 2 and one line that has the words; nothing ever listened."""
    assert ended.code == 2, ended
    assert ended.out == ""
    for word in words:
        assert word in ended.line, ended.line


@pytest.fixture
def command(tmp_path, monkeypatch) -> Iterator[Callable[..., Ended]]:
    """The command inside this process, for tables of settings: a process of its own takes a second."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("FMI_")]:
        monkeypatch.delenv(name)

    def invoke(*flags: str, env: dict[str, str] | None = None, name: str = "serve") -> Ended:
        result = CliRunner().invoke(cli, [name, *flags], env=env)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ended(result.exit_code, result.stdout, result.stderr)

    yield invoke
    root.handlers[:] = handlers
    root.setLevel(level)


# Settings


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0"])
async def test_it_does_not_listen_beyond_loopback_unless_told(tmp_path, address):
    ended = await run("--listen", address, "--data-dir", str(tmp_path / "data"))
    assert_refused(ended, "listen", address, "--insecure")
    assert not (tmp_path / "data").exists(), "nothing was made"


async def test_insecure_is_said_and_warned_of(tmp_path):
    async with started(
        "--listen", "0.0.0.0:0", "--insecure", "--data-dir", str(tmp_path)
    ) as server:
        port = server.target.rpartition(":")[2]
        async with Client(f"127.0.0.1:{port}") as client:
            await client.emit(msp())
    assert any("INSECURE" in line for line in server.err)


@pytest.mark.parametrize(
    ("flags", "env", "words"),
    [
        pytest.param(("--listen", "here"), {}, ("listen", "HOST:PORT", "here"), id="an address"),
        pytest.param(("--listen", "127.0.0.1:99999"), {}, ("listen", "99999"), id="a port"),
        pytest.param(("--store", "tape"), {}, ("store", "sqlite", "tape"), id="a store"),
        pytest.param(("--log-level", "loud"), {}, ("log_level", "loud"), id="a log level"),
        pytest.param((), {"FMI_MAX_INFLIGHT": "none"}, ("max_inflight", "none"), id="a number"),
        pytest.param((), {"FMI_DRAIN_S": "-1"}, ("drain_s", "-1"), id="a duration"),
        pytest.param(("--config", "no.yaml"), {}, ("no.yaml", "cannot be read"), id="a file"),
        pytest.param(("--cohorts", "no-dir"), {}, ("no-dir", "not a folder"), id="a folder"),
        pytest.param(
            ("--data-dir", "/proc/nowhere"), {}, ("data_dir", "/proc/nowhere"), id="a data folder"
        ),
        pytest.param(
            ("--log-level", "loud", "--store", "tape"), {}, ("log_level", "store"), id="two at once"
        ),
        pytest.param(
            ("--listen", "0.0.0.0:1"), {}, ("listen", "0.0.0.0:1", "--insecure"), id="everybody"
        ),
        pytest.param(
            ("--metrics-listen", "0.0.0.0:9"),
            {},
            ("metrics_listen", "0.0.0.0:9", "--insecure"),
            id="metrics for everybody",
        ),
        pytest.param(("--max-inflight", "0"), {}, ("max_inflight", "0"), id="a number as a flag"),
        pytest.param(("--dp-epsilon", "1"), {}, ("dp_epsilon", "privacy"), id="privacy as a flag"),
        pytest.param(
            (), {"FMI_DP_DELTA": "1"}, ("dp_delta", "privacy"), id="privacy as a variable"
        ),
    ],
)
@pytest.mark.parametrize("name", ["serve", "check-config"])
def test_a_wrong_setting_stops_the_start_with_one_line(command, name, flags, env, words):
    """And the check finds it before."""
    assert_refused(command(*LOCAL, *flags, env=env, name=name), *words)


def test_a_check_of_good_settings_shows_them_and_leaves_nothing(command, tmp_path):
    flags = ("--data-dir", "a/b", "--max-inflight", "7", "--drain-s", "1.5")
    ended = command(*flags, env={"FMI_MAX_INFLGHT": "5"}, name="check-config")
    assert ended.code == 0, ended
    for line in ("max_inflight: 7", "drain_s: 1.5", "data_dir: a/b", "0 cohort files are in order"):
        assert line in ended.out.splitlines()
    assert "did you mean FMI_MAX_INFLIGHT?" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_every_setting_has_a_flag(command):
    shown = command("--help").out
    for name in ServerSettings.model_fields:
        assert f"--{name.replace('_', '-')}" in shown


async def test_a_variable_that_is_no_setting_is_warned_of_and_stops_nothing(tmp_path):
    env = {"FMI_MAX_INFLGHT": "5", "FMI_TARGET": "here", "FMI_PORT": "tcp://10.0.0.1:1"}
    async with (
        started(*LOCAL, "--data-dir", str(tmp_path), env=env) as server,
        Client(server.target) as client,
    ):
        await client.emit(msp())
    warned = [line for line in server.err if "no such setting" in line]
    assert len(warned) == 1
    assert "FMI_MAX_INFLGHT" in warned[0]


async def test_a_wrong_setting_ends_the_process(tmp_path):
    ended = await run(*LOCAL, "--store", "tape", env={"FMI_DRAIN_S": "-1"}, cwd=tmp_path)
    assert_refused(ended, "store", "drain_s")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param("lissten: 127.0.0.1:0\n", ("lissten",), id="an unknown setting"),
        pytest.param("- a\n", ("settings by name",), id="a list"),
        pytest.param("listen: [\n", ("is not YAML",), id="no YAML"),
        pytest.param("max_inflight: many\n", ("max_inflight", "many"), id="a wrong value"),
        pytest.param("log_level: [a\n, b]\n", ("log_level",), id="a wrong type"),
    ],
)
def test_a_wrong_settings_file_stops_the_start(command, tmp_path, content, words):
    (tmp_path / "fmi.yaml").write_text(content)
    assert_refused(command("--config", "fmi.yaml"), *words)


async def test_flags_go_over_the_environment_over_the_file(tmp_path):
    for name in ("file", "environment", "flag"):
        (tmp_path / name).mkdir()
    (tmp_path / "fmi.yaml").write_text("data_dir: file\nlisten: '127.0.0.1:0'\n")
    config = ("--config", "fmi.yaml")
    env = {"FMI_DATA_DIR": "environment"}
    for flags, variables, wins in (
        (config, {}, "file"),
        (config, env, "environment"),
        ((*config, "--data-dir", "flag"), env, "flag"),
    ):
        async with started(*flags, env=variables, cwd=tmp_path):
            assert {p.parent.name for p in tmp_path.glob("*/fmi.sqlite3")} == {wins}
        for path in tmp_path.glob("*/fmi.sqlite3*"):
            path.unlink()


async def test_a_port_in_use_is_told(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = await run("--listen", address, "--data-dir", str(tmp_path))
        assert_refused(ended, "listen", address)
        metrics = await run(
            *LOCAL, "--metrics-listen", address, "--data-dir", str(tmp_path / "other")
        )
        assert_refused(metrics, "metrics_listen", address)


async def test_metrics_are_served(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    async with started(*LOCAL, "--metrics-listen", address, "--data-dir", str(tmp_path)) as server:
        async with Client(server.target) as client:
            await client.emit(msp())

        def page() -> str:
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
                return answer.read().decode()

        text = await asyncio.to_thread(page)
        assert 'fmi_packets_total{status="accepted",type="msp"} 1.0' in text


# The store


async def test_one_store_has_one_server(tmp_path):
    async with started(*LOCAL, "--data-dir", str(tmp_path)) as server:
        ended = await run(*LOCAL, "--data-dir", str(tmp_path))
        assert_refused(ended, str(server.pid), "has it open")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda _: b"this is no database\n" * 100, id="no database"),
        pytest.param(lambda data: data[: len(data) // 2], id="cut off"),
        pytest.param(lambda data: b"\0" * 4096 + data[4096:], id="no header"),
    ],
)
async def test_a_corrupt_database_is_left_as_it_is(tmp_path, damage):
    path = await filled_database(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    content = path.read_bytes()
    ended = await run(*LOCAL, "--data-dir", str(tmp_path))
    assert_refused(ended, str(path))
    assert path.read_bytes() == content


async def test_a_newer_database_is_left_as_it_is(tmp_path):
    path = await filled_database(tmp_path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 77")
    content = path.read_bytes()
    assert_refused(await run(*LOCAL, "--data-dir", str(tmp_path)), "77", "upgrade")
    assert path.read_bytes() == content


async def test_the_database_of_another_program_is_left_as_it_is(tmp_path):
    path = tmp_path / "fmi.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
        connection.commit()
    content = path.read_bytes()
    assert_refused(await run(*LOCAL, "--data-dir", str(tmp_path)), str(path))
    assert path.read_bytes() == content


async def filled_database(data_dir: Path) -> Path:
    async with running_server(data_dir) as server, Client(server.target) as client:
        await client.emit(*(msp(f"site-{i}") for i in range(5)))
    path = data_dir / "fmi.sqlite3"
    assert not path.with_name("fmi.sqlite3-wal").exists()
    return path


# Cohort files


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param("name: [", ("is not YAML",), id="no YAML"),
        pytest.param("- care", ("CohortSpec",), id="a list"),
        pytest.param("name: care\nsignal: []", ("signal",), id="an unknown field"),
        pytest.param("name: Care Unit", ("name", "string.pattern"), id="a name that is none"),
        pytest.param("description: x", ("name", "required"), id="no name"),
        pytest.param(
            "name: care\nsignals: [{name: tau, section: kitchen}]", ("section",), id="a section"
        ),
        pytest.param(
            "name: care\nsignals: [{name: tau, section: controller, lower: 2, upper: 1}]",
            ("lower must be less than upper",),
            id="bounds",
        ),
        pytest.param(
            "name: care\nprivacy: {dp_epsilon: 1.0}",
            ("dp_epsilon", "no differential privacy"),
            id="privacy that there is not",
        ),
        pytest.param(
            "name: care\nrelease: {min_interval: soon}", ("min_interval", "soon"), id="a duration"
        ),
        pytest.param("name: 2024-01-01\n", ("name",), id="a date for a name"),
        pytest.param("name: care\nsignals: 5\n", ("signals",), id="a number for a list"),
    ],
)
def test_a_wrong_cohort_file_stops_the_start_and_touches_nothing(command, tmp_path, content, words):
    (tmp_path / "cohorts").mkdir()
    (tmp_path / "cohorts" / "care.yaml").write_text(content)
    assert_refused(command(*LOCAL, "--data-dir", "data", "--cohorts", "cohorts"), *words)
    assert not (tmp_path / "data" / "fmi.sqlite3").exists()


async def test_a_cohort_declared_in_two_files_stops_the_start(tmp_path):
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text(CARE)
    ended = await run(*LOCAL, "--data-dir", str(tmp_path), "--cohorts", str(tmp_path))
    assert_refused(ended, "b.yaml", "care", "second time")


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
    assert_refused(await run(*flags), 'signals["tau"].upper', "force")
    (folder / "care.yaml").rename(folder / "care.yml")
    assert_refused(await run(*flags), 'signals["tau"].upper', "force")

    async with started(*flags, "--force-cohorts") as server, Client(server.target) as client:
        assert (await client.cohorts())["care"].schema_hash != declared
        refusal = await refusal_of(client.emit(msp("site", "care", controller={"tau": 0.75})))
        assert refusal.reason == "COHORT_RULE_VIOLATION"
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


# The end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_ends_with_0(tmp_path, number):
    """Calls in flight are answered, subscribers are told, and what was answered is there afterwards."""
    async with started(*LOCAL, "--data-dir", str(tmp_path)) as server:
        async with Client(server.target) as client, client.subscribed("**") as events:
            await events.snapshot()
            idle = client.interchange.EmitStream()
            await idle.write(wire_pb2.EmitStreamRequest(encoded=identity(msp("idle"))))
            await idle.read()
            acknowledged: list[str] = []

            async def emit_until_told() -> str:
                while True:
                    packet = msp("busy")
                    try:
                        await client.emit(packet)
                    except grpc.aio.AioRpcError as error:
                        return error.details() or ""
                    acknowledged.append(packet.header.packet_id)

            emitting = [asyncio.ensure_future(emit_until_told()) for _ in range(4)]
            await eventually(lambda: len(acknowledged) > 20)
            started_at = time.monotonic()
            os.kill(server.pid, number)
            ended = await events.refusal()
            assert (ended.code, ended.reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING")
            assert ended.retry_s == 1.0
            ended = await refusal_of(idle.read())
            assert ended.reason == "SERVER_DRAINING"
            async with asyncio.timeout(DEADLINE_S):
                await asyncio.gather(*emitting)
                assert await server.process.wait() == 0
        assert time.monotonic() - started_at < 5, "nothing waits for the end of its 10 s"
        await eventually(lambda: any("good order" in line for line in server.err))
    assert not any("Traceback" in line for line in server.err), server.err
    assert not (tmp_path / "fmi.sqlite3-wal").exists(), "the log was folded in"
    stored = {key[1] for key in packet_keys(tmp_path)}
    assert stored >= set(acknowledged)


async def test_a_drain_ends_at_its_deadline_with_a_subscriber_that_does_not_read(tmp_path):
    async with started(*LOCAL, "--data-dir", str(tmp_path), env={"FMI_DRAIN_S": "1"}) as server:
        slow = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536))
        async with Client(server.target) as client, Client(server.target, slow) as asleep:
            await client.put_spec(spec("care", aggregation={"vote_min_sites": 1}))
            call = asleep.interchange.Subscribe(wire_pb2.SubscribeRequest(cohorts=["**"]))
            await Events(call).next()
            for i in range(6):
                await client.emit(
                    msp("a", "care", controller={f"signal_{j}": float(i) for j in range(900)})
                )
                await client.admin.ReleaseNow(
                    admin_service_pb2.ReleaseNowRequest(cohort="care"), timeout=DEADLINE_S
                )
            started_at = time.monotonic()
            os.kill(server.pid, signal.SIGTERM)
            async with asyncio.timeout(DEADLINE_S):
                assert await server.process.wait() == 0
            assert time.monotonic() - started_at < 4
            call.cancel()


async def test_help_and_version_need_nothing(tmp_path):
    ended = await run("--help", cwd=tmp_path)
    assert ended.code == 0
    assert "--insecure" in ended.out
    assert list(tmp_path.iterdir()) == []
