"""The audit log: one whole line for each entry, whatever a caller chose, and bounded under a flood."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmi_server import audit
from fmi_server.audit import MAX_VALUE, REFUSALS_AT_ONCE, REFUSALS_PER_S, AuditLog


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "audit.jsonl"


def lines_of(path) -> list[dict]:
    content = path.read_bytes()
    assert content.isascii()
    assert content.endswith(b"\n") or not content
    return [json.loads(line) for line in content.splitlines()]


@given(st.dictionaries(st.sampled_from(["principal", "cohort", "told"]), st.text(max_size=1000)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_text_breaks_or_forges_a_line(tmp_path, entry):
    path = tmp_path / "audit.jsonl"
    path.unlink(missing_ok=True)
    log = AuditLog(path)
    log.operated("OK", entry)
    log.refused("ACCESS_DENIED", entry)
    log.close()
    lines = lines_of(path)
    assert [line["outcome"] for line in lines] == ["OK", "ACCESS_DENIED"]
    for line in lines:
        for name, value in entry.items():
            if value:
                told = line[name]
                assert told == value or (told.endswith("...") and value.startswith(told[:-3]))
                assert len(told) <= MAX_VALUE
    assert all(len(line) < 6 * 3 * MAX_VALUE + 400 for line in path.read_bytes().splitlines())


def test_it_is_appended_to_and_only_its_owner_reads_it(path):
    for outcome in ("ONE", "TWO"):
        log = AuditLog(path)
        log.operated(outcome, {})
        log.close()
    assert [line["outcome"] for line in lines_of(path)] == ["ONE", "TWO"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_flood_of_refusals_is_bounded_and_counted_and_operators_are_not(path):
    clock = Clock()
    log = AuditLog(path, monotonic=clock)
    flood = 10_000
    for _ in range(flood):
        log.refused("UNAUTHENTICATED", {"peer": "x"})
        clock.now += 0.001
    log.operated("OK", {"principal": "boss"})
    lines = lines_of(path)
    refused = [line for line in lines if line["outcome"] == "UNAUTHENTICATED"]
    written = len(refused)
    assert written <= REFUSALS_AT_ONCE + REFUSALS_PER_S * flood * 0.001 + 1
    assert written > REFUSALS_AT_ONCE
    left_out = sum(line.get("left_out", 0) for line in lines)
    assert written + left_out == flood
    assert lines[-1]["outcome"] == "OK"
    clock.now += 60
    for _ in range(10):
        log.refused("UNAUTHENTICATED", {})
    assert [line["outcome"] for line in lines_of(path)[-10:]] == ["UNAUTHENTICATED"] * 10
    log.close()


def test_what_was_left_out_last_is_told_at_the_end(path):
    log = AuditLog(path, monotonic=lambda: 0.0)
    for _ in range(REFUSALS_AT_ONCE + 7):
        log.refused("UNAUTHENTICATED", {})
    log.close()
    assert lines_of(path)[-1]["left_out"] == 7


def test_a_file_that_is_moved_away_is_followed_by_a_new_one(path, tmp_path):
    clock = Clock()
    log = AuditLog(path, monotonic=clock)
    log.operated("ONE", {})
    path.rename(tmp_path / "old.jsonl")
    log.operated("TWO", {})  # within a second it may go to the old one
    clock.now += 1.5
    log.operated("THREE", {})
    log.close()
    assert [line["outcome"] for line in lines_of(tmp_path / "old.jsonl")] == ["ONE", "TWO"]
    assert [line["outcome"] for line in lines_of(path)] == ["THREE"]


def test_a_disk_that_is_full_is_told_of_once_and_what_is_missing_counted(path, monkeypatch, caplog):
    log = AuditLog(path)
    log.operated("ONE", {})
    write = os.write

    def full(_file, _data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(audit.os, "write", full)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            log.operated("LOST", {})
        assert caplog.text.count("No space left") == 1
        monkeypatch.setattr(audit.os, "write", lambda file, data: write(file, data[:10]))
        log.operated("CUT", {})
        monkeypatch.setattr(audit.os, "write", write)
        log.operated("TWO", {})
        assert "written again" in caplog.text
    log.close()
    *_, last = path.read_text().splitlines()
    assert json.loads(last) | {"time": ""} == {"time": "", "outcome": "TWO", "left_out": 4}
