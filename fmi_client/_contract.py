"""The contract's rules, checked before anything is sent.

The rules within a field are the protovalidate constraints of the .proto files. Those that span the
sections of a packet are written out here, as the server has them, under the same ids; a test compares the
two on the same packets.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Final

import protovalidate

from fmi.v1 import packet_pb2
from fmi_client.errors import Violation, error_from_violations

__all__ = ["check_packet", "packet_violations"]

SECTIONS: Final = ("metrics", "controller", "evaluator", "operators")
MAX_VIOLATIONS: Final = 100
_LONG_NUMBER: Final = re.compile(r"-?\d{20,}")  # bounds like 1e150 are written out by the validator


def check_packet(packet: packet_pb2.Packet) -> None:
    """Check a packet against the contract.

    Raises:
        ContractError: Rules are broken; `violations` has all of them.
    """
    if violations := packet_violations(packet):
        raise error_from_violations(violations, "packet")


def packet_violations(packet: packet_pb2.Packet) -> list[Violation]:
    """List every rule of the contract that a packet breaks, at most `MAX_VIOLATIONS`."""
    found = [_told(v) for v in _validator().collect_violations(packet)[:MAX_VIOLATIONS]]
    match packet.WhichOneof("body"):
        case "msp":
            found.extend(_signal_violations(packet.msp))
        case "pop":
            found.extend(_outcome_violations(packet.pop))
        case "ccs":
            found.extend(_summary_violations(packet.ccs))
    return found[:MAX_VIOLATIONS]


@functools.cache
def _validator() -> protovalidate.Validator:
    # The cache of the module-level one is keyed by message name and shared with everybody.
    return protovalidate.Validator()


def _told(violation: protovalidate.Violation) -> Violation:
    raw = violation.proto
    path = _path(raw.field.elements) if raw.field is not None else ""
    description = _LONG_NUMBER.sub(lambda m: f"{float(m[0]):g}", raw.message or "breaks a rule")
    value = violation.field_value
    if raw.for_key:
        description = f"the name {description}"
    elif isinstance(value, float):
        description = f"{description}, not {value:g}"
    return Violation(path or "body", raw.rule_id or "custom", description)


def _path(elements: Iterable[protovalidate.FieldPathElementPb]) -> str:
    parts = []
    for element in elements:
        key = element.subscript
        if key is None:
            parts.append(str(element.field_name))
        elif key.field == "index":
            parts.append(f"{element.field_name}[{key.value}]")
        else:
            parts.append(f"{element.field_name}[{_quoted(str(key.value))}]")
    return ".".join(parts)


def _quoted(name: str) -> str:
    shown = name if len(name) <= 140 else name[:137] + "..."
    return '"' + shown.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'


def _signal_violations(msp: packet_pb2.MetaSignalPack) -> Iterator[Violation]:
    homes: dict[str, str] = {}
    for section in SECTIONS:
        for name in getattr(msp, section):
            first = homes.setdefault(name, section)
            if first != section:
                yield Violation(
                    f"msp.{section}[{_quoted(name)}]",
                    "fmi.msp.signal_in_one_section",
                    f"stands in {first} too; a signal has one section",
                )
    if not homes:
        yield Violation("msp", "fmi.msp.no_signal", "must carry at least one signal in a section")
    for name in msp.evidence.signals.keys() - homes.keys():
        yield Violation(
            f"msp.evidence.signals[{_quoted(name)}]",
            "fmi.msp.evidence_of_a_signal",
            "is evidence of a signal that is not in the packet",
        )


def _outcome_violations(pop: packet_pb2.PolicyOutcomePack) -> Iterator[Violation]:
    if pop.before and pop.after and not pop.before.keys() & pop.after.keys():
        yield Violation(
            "pop.after",
            "fmi.pop.common_metric",
            "must have at least one metric in common with before",
        )


def _summary_violations(ccs: packet_pb2.ConceptCausalSummary) -> Iterator[Violation]:
    if not (ccs.causal_pairs or ccs.concepts or ccs.tested_nodes):
        yield Violation(
            "ccs", "fmi.ccs.empty", "must carry at least one causal pair, concept or tested node"
        )
    pairs: set[tuple[str, str, str]] = set()
    for index, pair in enumerate(ccs.causal_pairs):
        key = (pair.source, pair.target, pair.type or "direct")
        if key in pairs:
            yield Violation(
                f"ccs.causal_pairs[{index}]",
                "fmi.ccs.pair_once",
                "repeats the source, target and type of an earlier pair",
            )
        pairs.add(key)
    concepts: set[str] = set()
    for index, concept in enumerate(ccs.concepts):
        if concept.id in concepts:
            yield Violation(
                f"ccs.concepts[{index}].id", "fmi.ccs.concept_once", "repeats an earlier concept"
            )
        concepts.add(concept.id)
