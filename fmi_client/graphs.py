r"""The causal consensus as a graph: GraphML for programs that count, DOT for pictures.

    update = client.get_update("healthcare", "causal_consensus")
    Path("causes.graphml").write_text(consensus_to_graphml(update), encoding="utf-8")
    Path("causes.dot").write_text(consensus_to_dot(update), encoding="utf-8")

Both are directed, and have one edge per relation: two nodes may have several, of different types.
Nodes are called as the sites call them. The characters that XML cannot hold, U+FFFE for one, become
escapes as in JSON, ``\ufffe``; so that no two names become one, a backslash before what reads as such an
escape becomes ``\u005c``. Every other name is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final, TypeAlias
from xml.etree import ElementTree as ET

from google.protobuf.descriptor import FieldDescriptor

from fmi.v1 import update_pb2
from fmi_client.errors import ConfigurationError
from fmi_client.kinds import kind_name

__all__ = ["consensus_to_dot", "consensus_to_graphml"]

_EdgeKey: TypeAlias = tuple[str, str, str]
"""Source, target, type."""

_Value: TypeAlias = str | float | bool | None
"""An attribute of a graph, node or edge; None where it is unset."""

_GRAPHML: Final = "http://graphml.graphdrawing.org/xmlns"
_GRAPHML_TYPES: Final = {
    FieldDescriptor.CPPTYPE_BOOL: "boolean",
    FieldDescriptor.CPPTYPE_DOUBLE: "double",
    FieldDescriptor.CPPTYPE_STRING: "string",
    FieldDescriptor.CPPTYPE_UINT32: "long",  # its int is signed
}
_EDGE_FIELDS: Final = {
    field.name: field
    for field in update_pb2.ConsensusEdge.DESCRIPTOR.fields
    if field.name not in ("source", "target")
}
_KEYS: Final[Mapping[str, Mapping[str, str]]] = {
    "graph": {"cohort": "string", "revision": "long", "released_at": "string"},
    "node": {"cycle": "long"},
    "edge": {
        **{name: _GRAPHML_TYPES[field.cpp_type] for name, field in _EDGE_FIELDS.items()},
        "weakest": "boolean",
    },
}
"""Per kind of element its attributes and their GraphML types."""

_ESCAPED: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]|\\(?=u[0-9a-f]{4})")
_ENTITY: Final = re.compile(r"&(?=#?\w*;)")

# Of the palette of Okabe and Ito, which people who do not tell red from green can tell apart.
_VERMILION: Final = "#D55E00"
_BLUE: Final = "#0072B2"


def consensus_to_graphml(update: update_pb2.Update) -> str:
    """Write a causal consensus as GraphML, which networkx, igraph and other graph programs read.

    Edges have every field of `ConsensusEdge` under its name and with its type, and `weakest`: whether the
    relation is the weakest one of a cycle. What is unset in the consensus is not there. Nodes on a cycle have
    its number, from 1, as `cycle`. The graph has `cohort`, `revision` and `released_at` (RFC 3339, UTC).

    Args:
        update: An update of kind ``causal_consensus``.

    Returns:
        An XML document without a declared encoding: to be stored as UTF-8.

    Raises:
        ConfigurationError: The update is of another kind.
    """
    consensus = _consensus(update)
    weakest = _weakest(consensus)
    root = ET.Element("graphml", xmlns=_GRAPHML)
    for scope, types in _KEYS.items():
        for name, kind in types.items():
            declared = {"id": _key_id(scope, name), "for": scope}
            ET.SubElement(root, "key", {**declared, "attr.name": name, "attr.type": kind})
    graph = ET.SubElement(root, "graph", edgedefault="directed")
    _add_data(graph, _about(update))
    for name, cycle in _nodes(consensus).items():
        node = ET.SubElement(graph, "node", id=_escaped(name))
        _add_data(node, {"cycle": cycle})
    for edge in consensus.edges:
        ends = {"source": _escaped(edge.source), "target": _escaped(edge.target)}
        _add_data(
            ET.SubElement(graph, "edge", ends),
            {**_edge_values(edge), "weakest": _key(edge) in weakest},
        )
    ET.indent(root)
    return f'<?xml version="1.0"?>\n{ET.tostring(root, encoding="unicode")}\n'


def consensus_to_dot(update: update_pb2.Update) -> str:
    """Write a causal consensus in DOT, the language of Graphviz: ``dot -Tsvg causes.dot``.

    An edge says its weight with the 95 % interval, its type where it is not ``direct``, and what speaks
    against it: it is dashed where the sites do not agree on the sign, blue where the reverse relation is in
    the consensus too, else vermilion where it lies on a cycle, and bold where it is the weakest of a cycle.
    In names, backslashes are doubled, and ``&`` is ``&amp;`` where it would begin an entity: Graphviz shows
    them as they are.

    Args:
        update: An update of kind ``causal_consensus``.

    Returns:
        A digraph: to be stored as UTF-8.

    Raises:
        ConfigurationError: The update is of another kind.
    """
    consensus = _consensus(update)
    about = {name: str(value) for name, value in _about(update).items()}
    title = [f"{update.cohort}: causal consensus, revision {update.revision}"]
    if "released_at" in about:
        title.append(f"{about['released_at'][:19]}Z")  # to the second
    graph = {name: _quoted(value) for name, value in about.items()}
    graph |= {"label": _quoted(*title), "labelloc": "t"}
    weakest = _weakest(consensus)
    lines = [
        f"digraph {_quoted(update.cohort)} {{",
        f"  graph {_attributes(graph)};",
        "  node [shape=box, style=rounded];",
        *(f"  {_quoted(name)};" for name in _nodes(consensus)),
        *(f"  {_dot_edge(edge, weakest=_key(edge) in weakest)};" for edge in consensus.edges),
        "}",
    ]
    return "".join(f"{line}\n" for line in lines)


def _consensus(update: update_pb2.Update) -> update_pb2.CausalConsensus:
    if update.WhichOneof("body") != "causal_consensus":
        raise ConfigurationError(
            f"a graph is made of an update of kind causal_consensus, and this one is of kind "
            f"{kind_name(update.kind)}"
        )
    return update.causal_consensus


def _about(update: update_pb2.Update) -> dict[str, _Value]:
    about: dict[str, _Value] = {"cohort": update.cohort, "revision": update.revision}
    if update.HasField("released_at"):
        about["released_at"] = update.released_at.ToJsonString()
    return about


def _nodes(consensus: update_pb2.CausalConsensus) -> dict[str, int | None]:
    """Return every variable, and the number of the cycle that it lies on."""
    nodes: dict[str, int | None] = {}
    for edge in consensus.edges:
        nodes |= {edge.source: None, edge.target: None}
    for number, cycle in enumerate(consensus.cycles, start=1):
        nodes |= dict.fromkeys(cycle.nodes, number)
    return nodes


def _weakest(consensus: update_pb2.CausalConsensus) -> frozenset[_EdgeKey]:
    return frozenset(
        (cycle.weakest_source, cycle.weakest_target, cycle.weakest_type)
        for cycle in consensus.cycles
    )


def _key(edge: update_pb2.ConsensusEdge) -> _EdgeKey:
    return (edge.source, edge.target, edge.type)


def _escaped(name: str) -> str:
    """Write what XML cannot hold as escapes; no two names come out the same."""
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", name)


def _edge_values(edge: update_pb2.ConsensusEdge) -> dict[str, _Value]:
    is_set = {field.name for field, _ in edge.ListFields()}
    return {
        name: None if field.has_presence and name not in is_set else getattr(edge, name)
        for name, field in _EDGE_FIELDS.items()
    }


def _key_id(scope: str, name: str) -> str:
    return f"{scope}-{name}"


def _add_data(element: ET.Element, values: Mapping[str, _Value]) -> None:
    for name, value in values.items():
        if value is not None:
            data = ET.SubElement(element, "data", key=_key_id(element.tag, name))
            data.text = _xml_value(value)


def _xml_value(value: str | float | bool) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case float():  # infinity is INF in XML
            return repr(value).replace("inf", "INF").replace("nan", "NaN")
        case _:
            return _escaped(str(value))


def _dot_edge(edge: update_pb2.ConsensusEdge, *, weakest: bool) -> str:
    attributes = {"label": _quoted(*_remarks(edge, weakest=weakest))}
    if edge.sign_conflict:
        attributes["style"] = "dashed"
    if edge.direction_conflict or edge.in_cycle:
        attributes["color"] = _quoted(_BLUE if edge.direction_conflict else _VERMILION)
    if weakest:
        attributes["penwidth"] = "3"
    return f"{_quoted(edge.source)} -> {_quoted(edge.target)} {_attributes(attributes)}"


def _remarks(edge: update_pb2.ConsensusEdge, *, weakest: bool) -> Iterator[str]:
    """Say of an edge what a picture should, line by line."""
    known = edge.HasField("lower") and edge.HasField("upper")
    interval = f" ({edge.lower:.4g} .. {edge.upper:.4g})" if known else ""
    yield f"{edge.weight:.4g}{interval}"
    if edge.type not in ("", "direct"):
        yield edge.type
    if edge.sign_conflict:
        yield f"sign conflict: {edge.positive_sites}+ {edge.negative_sites}-"
    if edge.direction_conflict:
        yield "direction conflict"
    if weakest:
        yield "weakest of its cycle"


def _attributes(tokens: Mapping[str, str]) -> str:
    return f"[{', '.join(f'{name}={token}' for name, token in tokens.items())}]"


def _quoted(*lines: str) -> str:
    """Write any text as a quoted string of DOT, which is neither a keyword nor HTML.

    Graphviz reads backslashes and entities in the labels that it makes of it, so both are escaped.
    """
    shown = (_ENTITY.sub("&amp;", _escaped(line)).replace("\\", "\\\\") for line in lines)
    content = r"\n".join(shown).replace('"', r"\"")
    return f'"{content}"'
