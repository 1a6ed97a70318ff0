"""The log of a server process: no secrets, no forged lines, nothing that a peer could fill the disk with."""

from __future__ import annotations

import json
import logging

import pytest

from fmi_server.config import ServerSettings
from fmi_server.server_log import configure_log

SECRET = "fmi_0123_a-secret-of-somebody"
GRPC = logging.getLogger("grpc._cython.cygrpc")


@pytest.fixture
def written(capsys):
    """Configure the log; return a function that gives what was written since it was last called."""
    loggers = [logging.getLogger(name) for name in ("", "grpc", "asyncio", GRPC.name)]
    kept = [(logger, logger.level, logger.handlers[:], logger.filters[:]) for logger in loggers]

    def configure(form):
        configure_log(ServerSettings(log_format=form))
        return lambda: capsys.readouterr().err

    yield configure
    for logger, level, handlers, filters in kept:
        logger.setLevel(level)
        logger.handlers[:], logger.filters[:] = handlers, filters


def fail(token: str) -> None:
    told = "told by a peer\n2026-03-01T09:00:00Z [info] forged\x1b[31m \u202e"
    del token
    raise ValueError(told)


def log_a_failure() -> None:
    token = SECRET
    try:
        fail(token)
    except ValueError:
        logging.getLogger("fmi_server.x").exception("it failed")


def test_a_traceback_has_no_values_of_variables_and_forges_no_line(written):
    read = written("text")
    log_a_failure()
    text = read()
    assert "in fail" in text
    assert "told by a peer" in text
    assert SECRET not in text
    first, *others = text.splitlines()
    assert "it failed" in first
    assert others
    assert all(line.startswith("  | ") for line in others)
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_a_traceback_is_part_of_its_line_in_json(written):
    read = written("json")
    log_a_failure()
    (line,) = read().splitlines()
    found = json.loads(line)
    assert found["event"] == "it failed"
    assert "in fail" in found["exception"]
    assert "told by a peer" in found["exception"]
    assert SECRET not in line


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_header_that_is_no_text_is_not_written_down(written, form):
    """As gRPC does it: all of the header, with a traceback, at each call."""
    read = written(form)
    try:
        b"\xff".decode()
    except UnicodeDecodeError:
        GRPC.exception("Invalid encoding on %s", f"Bearer \xff{SECRET}".encode("latin-1"))
    assert read() == ""
    GRPC.error("something else")
    assert "something else" in read()
