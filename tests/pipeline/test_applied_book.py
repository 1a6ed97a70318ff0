"""The book of reports is bounded, per subscriber and in all; the one longest without a report goes."""

from __future__ import annotations

from histories import A, B, C, History

from fmi_server.applied import AppliedBook, Report


def held(book: AppliedBook) -> list[tuple[str, tuple[str, int]]]:
    return [(entry.subscriber, entry.key) for entry in book.list(limit=1000)]


def book_and_log(**bounds):
    history = History()
    for key in (A, B, C):
        history.publish(key, 3)
    return AppliedBook(**bounds), history.log


def test_a_subscriber_keeps_its_newest_reports():
    book, log = book_and_log(max_per_subscriber=2)
    book.record("x", [Report(A, 1), Report(B, 1)], log, 1)
    book.record("y", [Report(A, 1)], log, 2)
    book.record("x", [Report(A, 2)], log, 3)
    book.record("x", [Report(C, 1)], log, 4)
    assert held(book) == [("y", A), ("x", A), ("x", C)]


def test_all_together_are_bounded():
    book, log = book_and_log(max_total=3)
    for number in range(10):
        book.record(f"s{number}", [Report(A, 1)], log, number)
    assert held(book) == [("s7", A), ("s8", A), ("s9", A)]
    book.record("s7", [Report(A, 2)], log, 11)
    book.record("new", [Report(A, 1)], log, 12)
    assert held(book) == [("s9", A), ("s7", A), ("new", A)]


def test_forgotten_subscribers_leave_nothing_behind():
    book, log = book_and_log(max_total=2, max_per_subscriber=2)
    for number in range(50):
        book.record(f"s{number}", [Report(A, 1), Report(B, 1)], log, number)
    assert len(book._of) == 1
    assert len(book._held) == 2


def test_pages_go_on_behind_a_number():
    book, log = book_and_log()
    for name in "abcde":
        book.record(name, [Report(A, 1)], log, 1)
    first = book.list(limit=2)
    rest = book.list(after=first[-1].number)
    assert [entry.subscriber for entry in (*first, *rest)] == list("abcde")
