"""`fmi-server serve` as a process: what stops its start, which setting wins, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sqlite3
import time
import urllib.request
from pathlib import Path

import grpc
import pytest
import yaml
from click.testing import CliRunner
from ports import lasting_address
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
from server_process import LOCAL, assert_refused, run, started

from fmi.v1 import admin_service_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server.commands import cli
from fmi_server.config import ServerSettings, load_settings
from fmi_server.testing import running_server

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
        pytest.param(("--listen", "..:0"), {}, ("listen", "HOST:PORT", ".."), id="no host"),
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


def test_what_is_wrong_with_settings_together_is_told_without_all_of_them(command):
    ended = command(*LOCAL, "--parent", "127.0.0.1:9")
    assert_refused(ended, "parent and parent_domain_id belong together")
    assert "{" not in ended.line


def test_a_check_of_good_settings_shows_them_and_leaves_nothing(command, tmp_path):
    flags = ("--data-dir", "a/b", "--max-inflight", "7", "--drain-s", "1.5")
    ended = command(*flags, env={"FMI_MAX_INFLGHT": "5"}, name="check-config")
    assert ended.code == 0, ended
    for line in ("max_inflight: 7", "drain_s: 1.5", "data_dir: a/b"):
        assert line in ended.out.splitlines()
    assert "did you mean FMI_MAX_INFLIGHT?" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_what_a_check_prints_is_a_settings_file_that_says_the_same(command, tmp_path):
    (tmp_path / "Kohörten").mkdir()
    flags = (
        "--cohorts",
        "Kohörten",
        "--no-open-cohorts",
        "--metrics-listen",
        "[::1]:9",
        "--drain-s",
        "0",
    )
    first = command(*flags, name="check-config")
    assert first.code == 0, first
    (tmp_path / "fmi.yaml").write_text(first.out)
    again = command("--config", "fmi.yaml", name="check-config")
    assert again == first
    settings = load_settings({}, config_file=tmp_path / "fmi.yaml")
    assert settings.cohorts == Path("Kohörten")
    assert (settings.open_cohorts, settings.metrics_listen, settings.drain_s) == (
        False,
        "[::1]:9",
        0,
    )
    assert settings.model_dump().keys() == yaml.safe_load(first.out).keys()


@pytest.mark.parametrize(
    ("names", "line"),
    [
        ((), "# 0 cohort files are in order"),
        (("a",), "# 1 cohort file is in order"),
        (("a", "b"), "# 2 cohort files are in order"),
    ],
)
def test_a_check_counts_the_cohort_files_and_says_what_it_did_not_check(
    command, tmp_path, names, line
):
    for name in names:
        (tmp_path / f"{name}.yaml").write_text(f"name: {name}\n")
    ended = command("--cohorts", ".", name="check-config")
    said = [text for text in ended.out.splitlines() if text.startswith("#")]
    assert said[0] == line, ended
    assert [text.startswith("# not compared with the store") for text in said[1:]] == (
        [True] if names else []
    )


PRIVATE = """
name: {name}
signals: [{{name: tau, section: controller, lower: 0, upper: 1}}]
privacy: {{dp_epsilon: 1, dp_delta: 1e-6, dp_epochs: 2}}
"""


def test_a_check_warns_of_private_cohorts_where_nobody_is_authenticated(command, tmp_path):
    (tmp_path / "open.yaml").write_text("name: open\n")
    assert "private" not in command("--cohorts", ".", name="check-config").err
    (tmp_path / "care.yaml").write_text(PRIVATE.format(name="care"))
    ended = command("--cohorts", ".", name="check-config")
    assert ended.code == 0
    assert "warning: cohort care is private, but callers are not authenticated" in ended.err
    for number in range(4):
        (tmp_path / f"c{number}.yaml").write_text(PRIVATE.format(name=f"c{number}"))
    told = command("--cohorts", ".", name="check-config").err
    assert "cohorts c0, c1, c2 and 2 more are private" in told
    made = CliRunner().invoke(
        cli, ["tokens", "create", "a", "--tokens", "tokens.json", "--out", "a.token"]
    )
    assert made.exit_code == 0, made.output
    (tmp_path / "cohorts").mkdir()
    (tmp_path / "care.yaml").rename(tmp_path / "cohorts" / "care.yaml")
    ended = command("--cohorts", "cohorts", "--tokens", "tokens.json", name="check-config")
    assert (ended.code, ended.err) == (0, "")


@pytest.mark.parametrize("folder", ["afile", "afile/below"])
@pytest.mark.parametrize("name", ["serve", "check-config"])
def test_a_data_folder_that_is_a_file_is_told(command, tmp_path, name, folder):
    (tmp_path / "afile").write_text("kept")
    ended = command(*LOCAL, "--data-dir", folder, name=name)
    assert_refused(ended, f"data_dir: {tmp_path / 'afile'} is not a folder")
    assert (tmp_path / "afile").read_text() == "kept"


def test_a_check_tells_what_is_wrong_with_addresses_folders_and_cohort_files_together(
    command, tmp_path
):
    (tmp_path / "afile").write_text("kept")
    (tmp_path / "cohorts").mkdir()
    (tmp_path / "cohorts" / "care.yaml").write_text("name: [")
    flags = ["--listen", "192.0.2.1:1", "--metrics-listen", "192.0.2.1:2", "--data-dir", "afile"]
    flags += ["--cohorts", "cohorts", "--parent", "192.0.2.9:3", "--parent-domain-id", "us"]
    ended = command(*flags, name="check-config")
    assert (ended.code, ended.out) == (2, "")
    said = [line.removeprefix("fmi-server: ").split(": ")[0] for line in ended.err.splitlines()]
    assert said == [
        "listen",
        "metrics_listen",
        "parent",
        "data_dir",
        "cohorts",
        "cohorts/care.yaml",
    ]


def test_help_says_what_a_flag_takes(command):
    shown = command("--help").out
    for flag in (
        "--log-format [text|json]",
        "--log-level [debug|info|warning|error]",
        "--max-inflight INTEGER",
        "--drain-s FLOAT",
    ):
        assert flag in shown


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
        pytest.param("listen: [\n", ("is not YAML", "at line 2, column 1"), id="no YAML"),
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


async def test_a_port_in_use_is_told_by_nothing_but_our_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = await run("--listen", address, "--data-dir", str(tmp_path))
        assert_refused(ended, "listen", address, "Address already in use")
        assert ended.err.count("\n") == 1, ended.err
        metrics = await run(
            *LOCAL, "--metrics-listen", address, "--data-dir", str(tmp_path / "other")
        )
        assert_refused(metrics, "metrics_listen", address)


async def test_the_port_of_a_server_that_ended_is_free_at_once(tmp_path):
    """Its connections keep the port busy for a while, in a state that stops nobody who may reuse it."""
    address = lasting_address()
    async with (
        started("--listen", address, "--data-dir", str(tmp_path)) as server,
        Client(address) as client,
        client.subscribed("**") as events,
    ):
        await events.snapshot()
        server.process.send_signal(signal.SIGTERM)
        assert await server.process.wait() == 0
    async with started("--listen", address, "--data-dir", str(tmp_path)) as server:
        assert server.target == address


async def test_an_address_of_another_machine_is_told(tmp_path):
    elsewhere = "192.0.2.1:0"  # kept free for documentation by RFC 5737
    ended = await run("--listen", elsewhere, "--insecure", "--data-dir", str(tmp_path))
    assert_refused(ended, f"listen: cannot listen on {elsewhere}", "Cannot assign")


async def test_metrics_are_served(tmp_path):
    address = lasting_address()
    async with started(*LOCAL, "--metrics-listen", address, "--data-dir", str(tmp_path)) as server:
        async with Client(server.target) as client:
            await client.emit(msp())

        def page() -> str:
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
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


# The end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_ends_with_0(tmp_path, number):
    """Calls in flight are answered, subscribers are told, and what was answered is there afterwards."""
    patient = {"FMI_DRAIN_S": "200"}
    async with started(*LOCAL, "--data-dir", str(tmp_path), env=patient) as server:
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
            assert 1.0 <= ended.retry_s < 2.0
            ended = await refusal_of(idle.read())
            assert ended.reason == "SERVER_DRAINING"
            async with asyncio.timeout(DEADLINE_S):
                await asyncio.gather(*emitting)
                assert await server.process.wait() == 0
        assert time.monotonic() - started_at < 100, "nothing waits for the end of its 200 s"
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
            assert time.monotonic() - started_at < 9, "less than without the setting"
            call.cancel()


async def test_help_and_version_need_nothing(tmp_path):
    ended = await run("--help", cwd=tmp_path)
    assert ended.code == 0
    assert "--insecure" in ended.out
    assert list(tmp_path.iterdir()) == []
