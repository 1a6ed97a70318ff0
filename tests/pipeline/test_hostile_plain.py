"""Plain data that is made to hurt: what refers to itself, cannot be written, or would write to a terminal."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import pytest
from parts import NOW, packet_id

from fmi.plain import PlainDataError, packet_from_plain, packet_to_plain
from fmi_server.contracts import FMIContractRegistry
from fmi_server.errors import PacketRefusedError

REGISTRY = FMIContractRegistry()
HEADER = {
    "packet_id": packet_id(7),
    "domain_id": "site-1",
    "cohort": "care",
    "rev": 1,
    "emitted_at": NOW,
}


def shared(leaf: Any, width: int = 2, depth: int = 30) -> Any:
    """Small to hold and endless to write: what the aliases of YAML give."""
    for _ in range(depth):
        leaf = [leaf] * width
    return leaf


def loop() -> dict[str, Any]:
    itself: dict[str, Any] = {}
    itself.update(dict.fromkeys("abcdefgh", itself))
    return itself


class Odd:
    def __repr__(self) -> str:
        raise RuntimeError("no")

    __str__ = __repr__


ESC = "\x1b]0;you\x07\n\u2028"

HOSTILE = {
    "shared lists for a number": {"controller": {"tau": shared(1)}},
    "shared lists for a text": {"provenance": {"software": shared("x")}},
    "shared lists for a time": {"emitted_at": shared("x")},
    "shared lists for a list": {"type": "ccs", "concepts": [{"id": "a", "links": [shared("x")]}]},
    "shared lists for a packet type": {"type": shared("x")},
    "a mapping that holds itself": {"controller": loop()},
    "a bundle that holds itself": {"type": "pop", "bundle": loop()},
    "an endless sequence": {"type": "ccs", "tested_nodes": itertools.count()},
    "a name of too many digits": {10**5000: 1},
    "a window of too many digits": {"window_span": {10**5000: 1, "start": 1}},
    "evidence of too many digits": {
        "evidence": {10**5000: {}, "signals": {10**5000: {10**5000: 1}}}
    },
    "what cannot be written": {
        "controller": {"tau": Odd()},
        Odd(): 1,
        "provenance": {Odd(): Odd()},
    },
    "control characters in names": {
        ESC: 1,
        "controller": {ESC: "x"},
        "provenance": {ESC: 1},
        "window_span": {ESC: 1},
        "evidence": {ESC: 1, "tau": {ESC: 1}},
    },
    "endless names": {"x" * 10**6: 1, "controller": {"y" * 10**6: "z" * 10**6}},
    "a name that is empty": {"": 1},
    "half a character": {"\ud800": 1, "controller": {"\ud800": "\ud800"}, "type": "\ud800"},
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE.keys())
def test_it_is_refused_in_few_plain_words(fields):
    tracemalloc.start()
    with pytest.raises(PacketRefusedError) as refused:
        REGISTRY.coerce({"type": "msp", **HEADER, "controller": {"tau": 0.9}, **fields})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20
    for violation in refused.value.violations:
        assert violation.field
        assert len(violation.field) <= 320
        assert 0 < len(violation.description) <= 640
        assert f"{violation.field}{violation.description}".isprintable(), violation


def test_a_field_of_a_small_message_under_both_its_names_is_told():
    """Before, the one that came last won without a word."""
    provenance = {"nSamples": 1, "n_samples": 2}
    with pytest.raises(PlainDataError) as refused:
        packet_from_plain({"type": "msp", **HEADER, "provenance": provenance})
    (problem,) = refused.value.problems
    assert problem.field == "header.provenance.n_samples"
    assert problem.rule_id == "fmi.plain.name_collision"


def test_a_small_message_that_is_empty_is_there_all_the_same():
    plain = {"header": {**HEADER, "provenance": {}}, "msp": {"controller": {"tau": 0.5}}}
    packet = packet_from_plain(plain)
    assert packet.header.HasField("provenance")
    assert packet_from_plain(packet_to_plain(packet)) == packet
