"""`fmi get --format`: the causal consensus of a real server as a graph, for other programs."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import networkx as nx
import pydot
import pytest

from fmi_client.commands.exits import ExitCode
from fmi_server.testing import running_server

# pydot still calls pyparsing by the names of its version 2.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pydot")

PAIRS = [
    ("smoking", "tar", 0.8, "direct"),
    ("smoking", "tar", 0.3, "lagged"),
    ("tar", "smoking", 0.1, "direct"),
    ('tar "ß" \\ <b>&lt;\ufffe', "node", -0.2, "direct"),
]


@pytest.fixture
async def ask(fmi, tmp_path):
    async with running_server(tmp_path / "server") as server:

        async def run(line: str, *more: str, stdin: str | None = None):
            told = (*line.split(), *more, "--target", server.target)
            return await asyncio.to_thread(fmi, *told, stdin=stdin)

        run.target = server.target
        yield run


@pytest.fixture
async def agreed(ask):
    """The same, after three sites found the same causes and one more another."""
    pairs = [dict(zip(("source", "target", "weight", "type"), p, strict=True)) for p in PAIRS]
    packets = [
        {"type": "ccs", "domain_id": f"site_{site}", "cohort": "care", "causal_pairs": found}
        for site, found in enumerate([pairs, pairs, pairs, pairs[:2]])
    ]
    told = await ask("emit", stdin="\n".join(map(json.dumps, packets)))
    assert told.exit_code == 0, told.output
    assert (await ask("cohorts release care")).exit_code == 0
    return ask


async def test_graphml_has_what_json_has(agreed, tmp_path):
    file = tmp_path / "causes.graphml"
    told = await agreed("get care --format graphml -o", str(file))
    assert told.exit_code == 0, told.output
    assert told.stdout == ""
    assert f"revision 1, relations: 4, written to {file}" in told.stderr
    graph = nx.read_graphml(file)
    assert isinstance(graph, nx.MultiDiGraph)
    update = json.loads((await agreed("get care --kind causal_consensus --json")).stdout)
    assert (graph.graph["cohort"], graph.graph["revision"]) == ("care", update["revision"])
    assert graph.graph["released_at"] == update["released_at"]
    edges = update["causal_consensus"]["edges"]
    assert len(edges) == graph.number_of_edges() == len(PAIRS)
    for edge in edges:
        source = edge.pop("source").replace("\ufffe", r"\ufffe")
        (found,) = (
            attributes
            for attributes in graph[source][edge.pop("target")].values()
            if attributes["type"] == edge["type"]
        )
        assert found == {**edge, "weakest": (source, edge["type"]) == ("tar", "direct")}
    assert nx.get_node_attributes(graph, "cycle") == {"smoking": 1, "tar": 1}


async def test_dot_is_written_to_standard_output_as_utf_8(agreed):
    told = await agreed("get care --kind causal_consensus --revision 1 --format dot")
    assert told.exit_code == 0, told.output
    assert told.stderr == ""
    (graph,) = pydot.graph_from_dot_data(told.stdout_bytes.decode("utf-8"))
    assert graph.get_name() == '"care"'
    found = [(e.get_source(), e.get_destination()) for e in graph.get_edges()]
    hostile = r'"tar \"ß\" \\ <b>&amp;lt;\\ufffe"'
    ends = [('"smoking"', '"tar"')] * 2 + [('"tar"', '"smoking"'), (hostile, '"node"')]
    assert sorted(found) == sorted(ends)


async def test_without_a_consensus_nothing_is_written(ask, tmp_path):
    file = tmp_path / "causes.dot"
    file.write_text("as it was")
    told = await ask("get nowhere --format dot -o", str(file))
    assert told.exit_code == ExitCode.NOT_FOUND
    assert "COHORT_UNKNOWN" in told.stderr
    packet = {"type": "ccs", "domain_id": "s", "cohort": "young"}
    packet["causal_pairs"] = [{"source": "a", "target": "b", "weight": 1}]
    assert (await ask("emit", stdin=json.dumps(packet))).exit_code == 0
    told = await ask("get young --format graphml --out", str(file))
    assert told.exit_code == ExitCode.NOT_FOUND
    assert "UPDATE_NOT_FOUND" in told.stderr
    assert file.read_text() == "as it was"


async def test_a_reader_that_goes_away_is_no_fault(agreed):
    """`fmi get ... | head -1`: the pipe breaks, and fmi ends quietly."""
    read, write = os.pipe()
    os.close(read)
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "from fmi_client.cli import main; main()"),
            *("get", "care", "--format", "graphml", "--target", agreed.target),
            stdout=write,
            stderr=asyncio.subprocess.PIPE,
        )
    finally:
        os.close(write)
    _, stderr = await process.communicate()
    assert (process.returncode, stderr) == (ExitCode.PIPE, b"")


@pytest.mark.parametrize("format_", ["graphml", "dot"])
@pytest.mark.parametrize("narrowed", ["--kind prior", "--kind warm_start", "--regime winter"])
def test_other_kinds_are_no_graph(fmi, format_, narrowed):
    told = fmi("get", "care", "--format", format_, *narrowed.split())
    assert told.exit_code == ExitCode.USAGE
    assert f"--format {format_} is for --kind causal_consensus" in told.stderr


def test_options_that_contradict_each_other(fmi, tmp_path):
    told = fmi("get", "care", "--format", "dot", "--json")
    assert told.exit_code == ExitCode.USAGE
    assert "leave out one of them" in json.loads(told.stderr)["error"]["message"]
    told = fmi("get", "care", "-o", str(tmp_path / "causes.dot"))
    assert told.exit_code == ExitCode.USAGE
    assert "add --format graphml or --format dot" in told.stderr
    told = fmi("get", "care", "--format", "dot", "-o", str(tmp_path))
    assert told.exit_code == ExitCode.USAGE
    assert "is a directory" in told.stderr
