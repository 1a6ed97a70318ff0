"""`fmi watch` against the project's own server: nothing to see, an outage, and what comes then."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import threading
from contextlib import AsyncExitStack

import grpc
import pytest
from cli_process import fmi_process
from cli_server import RefusedError
from ports import lasting_address

from fmi.v1 import interchange_service_pb2, update_pb2
from fmi_client import AsyncFMIClient, FMIEmitter, outages
from fmi_client.commands.exits import ExitCode
from fmi_server.testing import running_server

PATIENCE_S = 60


async def line(stream: asyncio.StreamReader) -> str:
    async with asyncio.timeout(PATIENCE_S):
        return (await stream.readline()).decode().rstrip("\n")


async def emit_five(target: str, cohort: str) -> None:
    packets = [
        FMIEmitter(f"site_{i}", cohort=cohort).emit_msp(controller={"tau": 0.9}) for i in range(5)
    ]
    async with AsyncFMIClient(target) as client:
        await client.emit_many(packets)


async def test_nothing_to_see_an_outage_and_then_an_update(tmp_path):
    async with AsyncExitStack() as stack:
        target = lasting_address()
        async with running_server(tmp_path, listen=target):
            watch = ("watch", "ca?e", "--kind", "prior", "--json", "--target", target)
            process = await stack.enter_async_context(fmi_process(*watch))
            assert "snapshot_end" in json.loads(await line(process.stdout))
            assert await line(process.stderr) == (
                "-- no update matches ca?e yet, waiting for the first "
                "(`fmi cohorts` lists the cohorts) --"
            )
        told = await line(process.stderr)
        assert told.startswith(f"-- connection to {target} lost (")
        assert told.endswith("), trying again --")
        async with running_server(tmp_path, listen=target):
            told = await line(process.stderr)
            assert re.fullmatch(r"-- connected again after [0-9]+\.[0-9] s --", told)
            await emit_five(target, "care")
            events = [json.loads(await line(process.stdout)) for _ in range(2)]
            assert "snapshot_end" in events[0]
            assert events[1]["update"]["cohort"] == "care"
            process.send_signal(signal.SIGINT)
            async with asyncio.timeout(PATIENCE_S):
                assert await process.wait() == ExitCode.INTERRUPTED
            assert not (await process.stderr.read()).strip()  # once each, and nothing from the log


def quiet(_request):
    end = interchange_service_pb2.SnapshotEnd()
    return [
        interchange_service_pb2.SubscribeResponse(resume_token="t1", snapshot_end=end),  # noqa: S106
        interchange_service_pb2.SubscribeResponse(resume_token="t2", snapshot_end=end),  # noqa: S106
        interchange_service_pb2.SubscribeResponse(
            resume_token="t3",  # noqa: S106
            update=update_pb2.Update(cohort="care", kind=update_pb2.UPDATE_KIND_PRIOR, revision=1),
        ),
    ]


def test_that_nothing_matches_is_told_once(ask, script):
    script["Subscribe"] = quiet
    result = ask("watch", "care", "retail/*", "--count", "1")
    assert result.exit_code == ExitCode.OK
    assert result.stderr.count("no update matches care retail/* yet") == 1


def test_after_an_outage_all_is_up_to_date_over_a_connection_that_is_there_again(
    ask, script, monkeypatch
):
    monkeypatch.setattr(outages, "SETTLED_S", 0.2)
    settled, told_so = outages.OutageMonitor._settled, threading.Event()

    def tells(self, *args):
        settled(self, *args)
        told_so.set()

    monkeypatch.setattr(outages.OutageMonitor, "_settled", tells)
    starts = iter(range(2))

    def breaks_once(request):
        yield quiet(request)[0]
        if next(starts) == 0:
            raise RefusedError(grpc.StatusCode.UNAVAILABLE, "", "gone")
        yield quiet(request)[1]
        assert told_so.wait(PATIENCE_S)
        yield quiet(request)[2]

    script["Subscribe"] = breaks_once
    result = ask("watch", "care", "--count", "1")
    assert result.exit_code == ExitCode.OK
    told = [re.sub(r"[0-9]+\.[0-9] s", "N s", line) for line in result.output.splitlines()]
    up_to_date = "-- up to date (0 updates), live now --"
    assert told[0] == up_to_date
    assert told[2].startswith(f"-- connection to {script.target} lost (")
    assert told[3:5] == ["-- connected again after N s --", up_to_date]
    assert told[5].startswith("care  prior  revision 1")


def test_behind_a_token_nothing_new_is_no_surprise(ask, script):
    script["Subscribe"] = quiet
    result = ask("watch", "care", "--count", "1", "--resume", "t0")
    assert "no update matches" not in result.stderr


def test_a_server_that_is_not_there_is_told_before_watch_gives_up(fmi, unused_port):
    result = fmi("watch", "care", "--target", f"127.0.0.1:{unused_port}")
    assert result.exit_code == ExitCode.UNREACHABLE
    first, *_ = result.stderr.splitlines()
    assert first.startswith(f"-- no connection to 127.0.0.1:{unused_port} (")
    assert result.stderr.count("trying again") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    "line",
    [
        "watch care",
        "get care",
        "cohorts",
        "sites",
        "contract",
        "emit msp --domain s --controller tau=1",
        "doctor",
    ],
)
@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("", "is not HOST:PORT"),
        ("http://localhost:50061", "is a URL: leave out what is before the host"),
        ("localhost", "the port is missing"),
        ("localhost:99999", "99999 is not a port"),
    ],
)
def test_an_impossible_target_is_wrong_usage_of_every_command(fmi, line, target, told):
    result = fmi(*line.split(), "--target", target)
    assert result.exit_code == ExitCode.USAGE
    assert told in " ".join(result.output.split())
