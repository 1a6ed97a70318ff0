"""The `fmi` command, and a scripted server for it."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from cli_server import Script, contract_answer, serve
from click.testing import CliRunner, Result

from fmi_client.cli import cli
from fmi_server.testing import running_server


@pytest.fixture
def script() -> Iterator[Script]:
    """A running server that answers for its contract and health, and for what a test scripts."""
    script = Script(answers={"GetContract": contract_answer})
    stop = serve(script)
    yield script
    stop()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "FMI_TARGET",
        "FMI_TOKEN",
        "FMI_TOKEN_FILE",
        "FMI_DOMAIN_ID",
        "FMI_DEBUG",
        "FORCE_COLOR",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")


Run = Callable[..., Result]


@pytest.fixture
def fmi() -> Run:
    """Run `fmi` in this process, against nothing in particular."""

    def run(*args: str, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(cli, list(args), input=stdin)

    return run


@pytest.fixture
def ask(script: Script, fmi: Run) -> Run:
    """Run `fmi` in this process against the scripted server."""

    def run(*args: str, stdin: str | bytes | None = None) -> Result:
        return fmi(*args, "--target", script.target, stdin=stdin)

    return run


@pytest.fixture(scope="module")
def real_target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with its own store on disk, in a thread."""
    folder = tmp_path_factory.mktemp("server")
    told: list[str] = []
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    stopping = asyncio.Event()

    async def run() -> None:
        async with running_server(folder) as server:
            told.append(server.target)
            ready.set()
            await stopping.wait()

    def work() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(run())

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(60)
    yield told[0]
    loop.call_soon_threadsafe(stopping.set)
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture
def ask_real(fmi: Run, real_target: str) -> Run:
    """Run `fmi` in this process against that server; the first argument is a line to be split."""

    def run(line: str, *more: str, stdin: str | None = None) -> Result:
        return fmi(*line.split(), *more, "--target", real_target, stdin=stdin)

    return run


@pytest.fixture
def unused_port() -> Iterator[int]:
    """A port on which nothing listens: it is bound, so that nobody else gets it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]
