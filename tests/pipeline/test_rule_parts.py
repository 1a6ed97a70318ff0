"""What is wrong with a large message is told in bounded time and memory, and is the same as ever."""

from __future__ import annotations

import time
import tracemalloc

import protovalidate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import msp

from fmi.parts import RUN, Part, parts
from fmi.rules import MAX_PROBLEMS, ContractRules, has_too_much
from fmi.v1 import cohort_pb2, packet_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2

RULES = ContractRules()
ENGINE = protovalidate.Validator()
NAN = float("nan")


def engine(message) -> set[tuple[str, str]]:
    """What the engine itself says of a whole message, as paths and rules."""
    found = set()
    for violation in ENGINE.collect_violations(message):
        raw = violation.proto
        path = ""
        for element in raw.field.elements if raw.field else ():
            key = element.subscript
            path += f".{element.field_name}" + (f"[{key.value}]" if key is not None else "")
        found.add((path.removeprefix("."), raw.rule_id))
    return found


def in_parts(message) -> set[tuple[str, str]]:
    return {(p.field.replace('"', ""), p.rule_id) for p in RULES._all_problems(message)}


def summary(pairs: int, concepts: int, links: int, nodes: int) -> packet_pb2.ConceptCausalSummary:
    """Items of which each third is wrong."""
    ccs = packet_pb2.ConceptCausalSummary(trust=2.0)
    for number in range(pairs):
        ccs.causal_pairs.add(source=f"a{number}", target=f"b{number}" if number % 3 else "")
    for number in range(concepts):
        named = (f"l{n}" if n % 3 else "\n" for n in range(links))
        ccs.concepts.add(id=f"c{number}" if number % 3 else "", links=named)
    ccs.tested_nodes.extend(f"n{number % 70}" for number in range(nodes))
    return ccs


COUNTS = st.sampled_from([0, 1, RUN - 1, RUN, RUN + 1, 2 * RUN, 3 * RUN + 5])


@settings(max_examples=40, deadline=None)
@given(COUNTS, st.sampled_from([0, 1, 3, 90]), st.sampled_from([0, 2, RUN, RUN + 2]), COUNTS)
def test_in_parts_the_same_is_told(pairs, concepts, links, nodes):
    ccs = summary(pairs, concepts, links, nodes)
    for message in (ccs, packet_pb2.Packet(ccs=ccs)):
        assert in_parts(message) == engine(message)


def test_maps_and_lists_of_words_in_parts():
    names = {f"m{n}" if n % 3 else f"m {n}": float(n) if n % 4 else NAN for n in range(300)}
    pack = packet_pb2.MetaSignalPack(metrics=names, controller=names)
    for name in names:
        pack.evidence.signals[name].stderr = -1.0
    access = cohort_pb2.AccessSpec(emit=["a", "", "\n"] * 100)
    for message in (pack, cohort_pb2.CohortSpec(name="x", access=access), packet_pb2.Packet()):
        assert in_parts(message) == engine(message)


def test_a_message_that_breaks_nothing_is_not_cut():
    packet = msp(metrics={f"m{n}": 1.0 for n in range(1000)})
    assert RULES.packet_problems(packet) == []
    (whole,) = parts(packet_pb2.Packet())
    assert whole == Part(packet_pb2.Packet())


@pytest.mark.parametrize(
    ("data", "kind", "field"),
    [
        pytest.param(b"\x0a\x00", packet_pb2.ConceptCausalSummary, "causal_pairs", id="pairs"),
        pytest.param(b"\x12\x00", packet_pb2.ConceptCausalSummary, "concepts", id="concepts"),
        pytest.param(b"\x1a\x00", packet_pb2.ConceptCausalSummary, "tested_nodes", id="nodes"),
        pytest.param(b"\x22\x00", wire_pb2.SubscribeRequest, "start_revisions", id="starts"),
        pytest.param(b"\x0a\x00", wire_pb2.SubscribeRequest, "cohorts", id="patterns"),
        pytest.param(b"\x12\x00", wire_pb2.ReportAppliedRequest, "reports", id="reports"),
        pytest.param(b"\x1a\x00", cohort_pb2.CohortSpec, "signals", id="signals"),
    ],
)
def test_a_bomb_of_empty_items_costs_little(data, kind, field):
    """The engine alone takes 11 s and 1.5 GB for 200,000 of them: 400 kB."""
    message = kind.FromString(data * 400_000)
    RULES.problems(kind())
    tracemalloc.start()
    started = time.process_time()
    found = RULES.problems(message)
    took = time.process_time() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) <= MAX_PROBLEMS
    assert has_too_much(found)
    assert any(p.field == field and p.description.endswith("and has 400000") for p in found)
    assert took < 8.0, "instrumented for memory; it is 30 ms without"
    assert peak < 20 * 2**20


def test_links_in_concepts_cost_little():
    """As many as the contract allows of both: 262,144 links, all of them wrong."""
    ccs = packet_pb2.ConceptCausalSummary()
    for number in range(1024):
        ccs.concepts.add(id=f"c{number}", links=["\n"] * 256)
    RULES.problems(packet_pb2.ConceptCausalSummary())
    started = time.process_time()
    assert len(RULES.problems(ccs)) == MAX_PROBLEMS
    assert time.process_time() - started < 4.0


def test_pairs_that_repeat_without_end_are_not_all_told():
    packet = packet_pb2.Packet()
    for _ in range(4000):
        packet.ccs.causal_pairs.add(source="a", target="b")
    assert len(RULES.packet_problems(packet)) == MAX_PROBLEMS
