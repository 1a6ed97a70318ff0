"""The `fmi` command, and a scripted server for it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest
from cli_server import Script, contract_answer, serve
from click.testing import CliRunner, Result

from fmi_client.cli import cli


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


@pytest.fixture
def unused_port() -> Iterator[int]:
    """A port on which nothing listens: it is bound, so that nobody else gets it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]
