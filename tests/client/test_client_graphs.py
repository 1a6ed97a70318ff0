"""The causal consensus as a graph: networkx reads the GraphML, pydot and Graphviz read the DOT."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections import Counter
from xml.etree import ElementTree as ET

import networkx as nx
import pydot
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fmi.v1 import update_pb2
from fmi_client import ConfigurationError, consensus_to_dot, consensus_to_graphml

# pydot still calls pyparsing by the names of its version 2.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pydot")

CONSENSUS = update_pb2.UPDATE_KIND_CAUSAL_CONSENSUS

HOSTILE = [
    'say "no"',
    '"',
    "back\\",
    '\\"',
    r"\n",
    r"\N",
    "two\nlines\ttab\r",
    "\x00\x1b[31m\x7f\x85",
    "<b>bold</b>",
    "<",
    "a -> b; }",
    "// no comment",
    "# no comment",
    "node",
    "Digraph",
    "subgraph",
    "port:n",
    "-1.5",
    " ",
    " padded ",
    "]]>",
    "&lt;",
    "&#38;",
    "&amp;lt;",
    "&bogus;",
    "&;",
    "R&D",
    "\N{LATIN SMALL LETTER U WITH DIAERESIS}\N{GRINNING FACE}\N{RIGHT-TO-LEFT OVERRIDE}",
    "\ufffe",
    "\uffff",
    r"\ufffe",
    r"\u005c",
    "\\\\ufffe",
]
"""Names that break a careless writer. The contract allows no control characters; this does not rely on it."""

names = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
    st.text('\\"<>&;:u0fe-', min_size=1, max_size=8),
)
numbers = st.floats(allow_nan=False)
counts = st.integers(min_value=0, max_value=2**32 - 1)
edges = st.builds(
    update_pb2.ConsensusEdge,
    source=names,
    target=names,
    type=st.one_of(st.just("direct"), names, st.just("")),
    weight=numbers,
    stderr=st.none() | numbers,
    lower=st.none() | numbers,
    upper=st.none() | numbers,
    sites=counts,
    testing_sites=counts,
    support=numbers,
    positive_sites=counts,
    negative_sites=counts,
    estimator=names,
    pooled_sites=counts,
    i_squared=st.none() | numbers,
    tau_squared=st.none() | numbers,
    sign_conflict=st.booleans(),
    direction_conflict=st.booleans(),
    in_cycle=st.booleans(),
)


@st.composite
def updates(draw):
    update = update_pb2.Update(cohort=draw(names), kind=CONSENSUS, revision=draw(counts))
    update.released_at.FromSeconds(draw(st.integers(min_value=0, max_value=2**33)))
    update.causal_consensus.edges.extend(draw(st.lists(edges, max_size=6, unique_by=relation)))
    for edge in update.causal_consensus.edges[:2]:
        if draw(st.booleans()):
            weakest = dict(zip(WEAKEST, relation(edge), strict=True))
            update.causal_consensus.cycles.add(nodes=[edge.source, edge.target], **weakest)
    return update


WEAKEST = ("weakest_source", "weakest_target", "weakest_type")
FIELDS = [
    field
    for field in update_pb2.ConsensusEdge.DESCRIPTOR.fields
    if field.name not in ("source", "target")
]


def relation(edge):
    return edge.source, edge.target, edge.type


def variables(consensus):
    ends = {end for edge in consensus.edges for end in (edge.source, edge.target)}
    return ends.union(*(cycle.nodes for cycle in consensus.cycles))


def weakest(consensus):
    return {tuple(getattr(cycle, name) for name in WEAKEST) for cycle in consensus.cycles}


def unescaped(text):
    return re.sub(r"\\u([0-9a-f]{4})", lambda found: chr(int(found[1], 16)), text)


def typed(attributes):
    """Attributes with their types, names unescaped: what can be compared as a whole."""
    return frozenset(
        (name, type(value), unescaped(value) if isinstance(value, str) else value)
        for name, value in attributes.items()
    )


def hostile_update():
    update = update_pb2.Update(cohort='care "north"', kind=CONSENSUS, revision=4)
    update.released_at.FromJsonString("2026-01-02T03:04:05Z")
    for name in HOSTILE:
        update.causal_consensus.edges.add(source=name, target="outcome", type=name, weight=0.5)
    return update


def small_update():
    update = update_pb2.Update(cohort="care", kind=CONSENSUS, revision=4)
    edge = update.causal_consensus.edges.add
    edge(source="dose", target="outcome", type="direct", weight=0.41234, lower=0.3, upper=0.52)
    edge(
        source="dose",
        target="outcome",
        type="lagged",
        weight=-0.2,
        sign_conflict=True,
        positive_sites=3,
        negative_sites=5,
    )
    edge(source="a", target="b", type="direct", weight=1, in_cycle=True)
    edge(source="b", target="c", type="direct", weight=2, in_cycle=True)
    edge(source="c", target="a", type="direct", weight=3, in_cycle=True, direction_conflict=True)
    update.causal_consensus.cycles.add(
        nodes=["a", "b", "c"], weakest_source="b", weakest_target="c", weakest_type="direct"
    )
    return update


@settings(deadline=None)  # the oracles are slow the first time
@given(updates())
@example(hostile_update())
def test_networkx_reads_back_all_of_the_graphml(update):
    consensus = update.causal_consensus
    graph = nx.parse_graphml(consensus_to_graphml(update), force_multigraph=True)
    assert isinstance(graph, nx.MultiDiGraph)
    assert sorted(map(unescaped, graph)) == sorted(variables(consensus))
    assert unescaped(graph.graph["cohort"]) == update.cohort
    assert graph.graph["revision"] == update.revision
    assert graph.graph["released_at"] == update.released_at.ToJsonString()
    expected = Counter()
    for edge in consensus.edges:
        values = {
            field.name: getattr(edge, field.name)
            for field in FIELDS
            if not field.has_presence or edge.HasField(field.name)
        }
        values["weakest"] = relation(edge) in weakest(consensus)
        ends = edge.source, edge.target
        expected[ends, frozenset((n, type(v), v) for n, v in values.items())] += 1
    read = Counter(
        ((unescaped(source), unescaped(target)), typed(attributes))
        for source, target, attributes in graph.edges(data=True)
    )
    assert read == expected


@pytest.mark.parametrize(
    ("name", "node"),
    [
        ("R&D <b>", "R&D <b>"),
        ("back\\slash\\", "back\\slash\\"),
        ("\ufffe", r"\ufffe"),
        (r"\ufffe", r"\u005cufffe"),
        (r"\under", r"\under"),
        ("\x1b[31m", r"\u001b[31m"),
    ],
)
def test_only_names_that_xml_cannot_hold_are_changed(name, node):
    update = update_pb2.Update(kind=CONSENSUS)
    update.causal_consensus.edges.add(source=name, target="outcome")
    assert list(nx.parse_graphml(consensus_to_graphml(update))) == [node, "outcome"]


def test_nodes_have_the_number_of_their_cycle():
    update = small_update()
    told = {"nodes": ["p", "q"], "weakest_source": "p", "weakest_target": "q"}
    update.causal_consensus.cycles.add(**told)  # its edges are beyond what an update holds
    graph = nx.parse_graphml(consensus_to_graphml(update))
    cycles = nx.get_node_attributes(graph, "cycle")
    assert cycles == {"a": 1, "b": 1, "c": 1, "p": 2, "q": 2}
    assert set(graph) == {"dose", "outcome", *cycles}


def test_numbers_are_written_as_xml_schema_has_them():
    update = update_pb2.Update(kind=CONSENSUS)
    update.causal_consensus.edges.add(
        source="a", target="b", weight=math.nan, lower=-math.inf, upper=math.inf, stderr=5e-324
    )
    root = ET.fromstring(consensus_to_graphml(update))  # noqa: S314 - our own
    told = {data.get("key"): data.text for data in root.iterfind(".//{*}edge/{*}data")}
    assert told["edge-weight"] == "NaN"
    assert (told["edge-lower"], told["edge-upper"]) == ("-INF", "INF")
    assert told["edge-stderr"] == "5e-324"
    assert told["edge-weakest"] == "false"


def content(token):
    """What Graphviz shows of a quoted string of DOT, line by line."""
    assert token[0] == token[-1] == '"'
    lines = re.sub(r"\\(.)", lambda f: "\0" if f[1] == "n" else f[1], token[1:-1])
    return [unescaped(line.replace("&amp;", "&")) for line in lines.split("\0")]


def name(token):
    (told,) = content(token)
    return told


def parsed(dot):
    (graph,) = pydot.graph_from_dot_data(dot)
    nodes = [node for node in graph.get_nodes() if node.get_name() not in ("graph", "node")]
    return graph, nodes, graph.get_edges()


@settings(deadline=None, max_examples=25)  # pydot parses slowly
@given(updates())
@example(hostile_update())
def test_pydot_reads_back_the_dot(update):
    consensus = update.causal_consensus
    graph, nodes, found = parsed(consensus_to_dot(update))
    assert graph.get_type() == "digraph"
    assert not graph.get_strict()
    assert name(graph.get_name()) == update.cohort
    assert sorted(name(node.get_name()) for node in nodes) == sorted(variables(consensus))
    assert Counter((name(e.get_source()), name(e.get_destination())) for e in found) == Counter(
        (edge.source, edge.target) for edge in consensus.edges
    )
    types = Counter(edge.type for edge in consensus.edges if edge.type not in ("", "direct"))
    shown = [line for edge in found for line in content(edge.get_label())]
    assert types <= Counter(shown)


def test_dot_shows_intervals_conflicts_and_cycles():
    update = small_update()
    update.released_at.FromJsonString("2026-01-02T03:04:05.678Z")
    graph, _, found = parsed(consensus_to_dot(update))
    (about,) = graph.get_graph_defaults()
    assert (about["cohort"], about["revision"]) == ('"care"', '"4"')
    title = ["care: causal consensus, revision 4", "2026-01-02T03:04:05Z"]
    assert content(about["label"]) == title
    assert [content(edge.get_label()) for edge in found] == [
        ["0.4123 (0.3 .. 0.52)"],
        ["-0.2", "lagged", "sign conflict: 3+ 5-"],
        ["1"],
        ["2", "weakest of its cycle"],
        ["3", "direction conflict"],
    ]
    assert [edge.get_style() for edge in found] == [None, "dashed", None, None, None]
    colors = [edge.get_color() for edge in found]
    assert colors == [None, None, '"#D55E00"', '"#D55E00"', '"#0072B2"']
    assert [edge.get_penwidth() for edge in found] == [None, None, None, "3", None]


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_graphviz_shows_every_name_as_it_is():
    drawn = subprocess.run(
        ["dot", "-Tsvg"],
        input=consensus_to_dot(hostile_update()).encode(),
        capture_output=True,
        check=True,
        timeout=120,
    )
    assert drawn.stderr == b""
    svg = ET.fromstring(drawn.stdout)  # noqa: S314 - our own
    shown = Counter(
        unescaped((text.text or "").replace("\N{NO-BREAK SPACE}", " "))
        for text in svg.iterfind(".//{*}text")
    )
    assert {name: shown[name] for name in HOSTILE} == dict.fromkeys(HOSTILE, 2)  # node and edge


@pytest.mark.parametrize("write", [consensus_to_graphml, consensus_to_dot])
def test_an_update_of_another_kind_is_no_graph(write):
    update = update_pb2.Update(kind=update_pb2.UPDATE_KIND_PRIOR)
    update.prior_update.prior["tau"] = 1
    with pytest.raises(ConfigurationError, match=r"kind causal_consensus, .* kind prior"):
        write(update)


@pytest.mark.parametrize("write", [consensus_to_graphml, consensus_to_dot])
def test_a_consensus_without_relations_is_an_empty_graph(write):
    update = update_pb2.Update(cohort="care", kind=CONSENSUS, revision=1)
    update.causal_consensus.SetInParent()
    if write is consensus_to_graphml:
        assert len(nx.parse_graphml(write(update))) == 0
    else:
        _, nodes, found = parsed(write(update))
        assert nodes == found == []
