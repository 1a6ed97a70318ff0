"""Files that are read again: a bad version changes nothing, and one that could not be read is not missed."""

from __future__ import annotations

import logging

import pytest

from fmi_server.watched_files import AGAIN_S, WatchedFiles


class Reader:
    """Reads a file, unless it is told to fail."""

    def __init__(self, path) -> None:
        self.path = path
        self.fault: Exception | None = None
        self.reads = 0

    def __call__(self) -> str:
        self.reads += 1
        if self.fault is not None:
            raise self.fault
        return self.path.read_text()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_text("first")
    return path


def replaced(path, text) -> None:
    new = path.with_name("new")
    new.write_text(text)
    new.replace(path)


def complaints(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


def test_a_change_that_could_not_be_read_for_a_moment_is_taken_later(path, caplog):
    """The file stays as it is: only its reader knows that there is something new."""
    now = 0.0
    read = Reader(path)
    files = WatchedFiles([path], read, what="tokens", monotonic=lambda: now)
    replaced(path, "second")
    read.fault = OSError(24, "Too many open files")
    assert not files.refresh()
    assert files.value == "first"
    for _ in range(3):
        now += AGAIN_S
        assert not files.refresh()
    assert len(complaints(caplog)) == 1
    read.fault = None
    assert not files.refresh()  # not at once: whoever connects may ask
    now += AGAIN_S
    assert files.refresh()
    assert files.value == "second"
    now += 100 * AGAIN_S
    reads = read.reads
    assert not files.refresh()
    assert read.reads == reads


def test_another_reason_and_another_version_are_told_of(path, caplog):
    now = 0.0
    read = Reader(path)
    files = WatchedFiles([path], read, what="tokens", monotonic=lambda: now)
    replaced(path, "second")
    read.fault = ValueError("one")
    files.refresh()
    read.fault = ValueError("other")
    now += AGAIN_S
    files.refresh()
    replaced(path, "a third")
    files.refresh()  # at once, since it is another one
    files.refresh()
    assert [line.rpartition(" ")[2] for line in complaints(caplog)] == ["one", "other", "other"]
    assert files.value == "first"


def test_who_asks_often_reads_seldom(path):
    now = 0.0
    read = Reader(path)
    files = WatchedFiles([path], read, what="tokens", monotonic=lambda: now)
    read.fault = ValueError("bad")
    replaced(path, "second")
    for _ in range(1000):
        files.refresh()
    assert read.reads == 2  # the first one, and the version that is bad
