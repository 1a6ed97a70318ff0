"""FMIContractRegistry: the packet types, their rules, and their translation from plain data.

The contract itself is the .proto files. Their rules are protovalidate constraints, so that every
language has the same; the few that span the sections of a packet stand here, because a rule on a large
message costs more than all the others together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import protovalidate

from fmi.descriptors import CONTRACT_FILES, contract_hash, descriptor_set
from fmi.plain import (
    CURRENT_REVISION,
    OLDEST_REVISION,
    PacketType,
    PlainDataError,
    packet_from_plain,
)
from fmi.v1 import error_pb2, packet_pb2
from fmi_server.errors import (
    PacketRefusedError,
    Reason,
    RequestInvalidError,
    ThingNotFoundError,
    Violation,
)

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor
    from google.protobuf.message import Message

__all__ = [
    "SECTIONS",
    "ConceptCausalSummary",
    "FMIContractRegistry",
    "MetaSignalPack",
    "PacketType",
    "PolicyOutcomePack",
]

MetaSignalPack = packet_pb2.MetaSignalPack
PolicyOutcomePack = packet_pb2.PolicyOutcomePack
ConceptCausalSummary = packet_pb2.ConceptCausalSummary

SECTIONS: Final = ("metrics", "controller", "evaluator", "operators")
"""The sections of an MSP in which signals stand."""

MAX_VIOLATIONS: Final = 100
"""Violations told of one packet: a hostile packet must not make the answer larger than itself."""


class FMIContractRegistry:
    """Knows the contract: checks packets against it, translates plain data, and gives its descriptors.

    A registry may be shared by threads.

    Attributes:
        revision: The contract revision that it speaks.
        oldest_revision: The oldest contract revision that it takes.
        contract_hash: SHA-256 over the descriptors of `fmi.v1`, as hex.
    """

    revision: Final[int] = CURRENT_REVISION
    oldest_revision: Final[int] = OLDEST_REVISION

    def __init__(self) -> None:
        # One Validator per registry: its rule cache is keyed by message name, so that the module-level
        # one would mix up contract revisions.
        self._validator = protovalidate.Validator()
        self.contract_hash: Final[str] = contract_hash()
        self._messages: dict[str, Descriptor] = {
            message.full_name: message
            for file in CONTRACT_FILES
            for message in file.message_types_by_name.values()
        }
        for body in (MetaSignalPack(), PolicyOutcomePack(), ConceptCausalSummary()):
            packet = packet_pb2.Packet()
            getattr(packet, _BODY_OF[type(body)]).SetInParent()
            self._validator.collect_violations(packet)  # compiles the rules before the first call

    def validate(
        self, packet_dict: Mapping[str, Any] | packet_pb2.Packet
    ) -> tuple[bool, list[str]]:
        """Say whether a packet keeps the contract, and which required fields it does not have.

        Args:
            packet_dict: A packet as plain data in any form that `coerce` takes, or typed.

        Returns:
            `(is_valid, missing)`. A packet can be invalid with nothing missing, where a field is there
            but wrong; `violations` tells of those too.
        """
        try:
            packet = self.coerce(packet_dict)
        except PacketRefusedError as error:
            return False, [v.field for v in error.violations if v.rule_id in _MISSING_RULES]
        found = self.violations(packet)
        return not found, [v.field for v in found if v.rule_id in _MISSING_RULES]

    def coerce(self, packet_dict: Mapping[str, Any] | packet_pb2.Packet) -> packet_pb2.Packet:
        """Translate a packet from plain data: flat, nested or ProtoJSON; nested numbers are flattened.

        Args:
            packet_dict: The packet. A typed packet is given back as it is.

        Returns:
            The typed packet; fields that `packet_dict` does not have are unset.

        Raises:
            PacketRefusedError: A field is unknown or of the wrong kind, or the packet type is not clear.
        """
        if isinstance(packet_dict, packet_pb2.Packet):
            return packet_dict
        try:
            return packet_from_plain(packet_dict)
        except PlainDataError as error:
            raise PacketRefusedError(
                [Violation(p.field, p.rule_id, p.description) for p in error.problems]
            ) from error

    def violations(self, packet: packet_pb2.Packet) -> list[Violation]:
        """List every rule of the contract that a packet breaks, at most `MAX_VIOLATIONS`."""
        revision = packet.header.rev
        if revision and not self.oldest_revision <= revision <= self.revision:
            # Other rules say nothing about a packet of another contract.
            return [
                Violation(
                    "header.rev",
                    "fmi.header.rev",
                    f"contract revision {revision} is not supported; this server takes "
                    f"{self.oldest_revision} to {self.revision}",
                    Reason.CONTRACT_REVISION_UNSUPPORTED,
                )
            ]
        raw = self._validator.collect_violations(packet)
        found = [_told(violation) for violation in raw[:MAX_VIOLATIONS]] if raw else []
        found.extend(_time_violations(packet.header))
        kind = packet.WhichOneof("body")
        if kind == "msp":
            found.extend(_signal_violations(packet.msp))
        elif kind == "pop":
            found.extend(_outcome_violations(packet.pop))
        elif kind == "ccs":
            found.extend(_summary_violations(packet.ccs))
        return found[:MAX_VIOLATIONS]

    def check_request(
        self,
        request: Message,
        *,
        reason: error_pb2.ErrorReason.ValueType = Reason.CONTRACT_VIOLATION,
        skip: str = "",
    ) -> None:
        """Check a request against the contract.

        Args:
            request: Any message of the contract.
            reason: The reason that a broken rule is refused for.
            skip: Start of the paths of fields that are checked elsewhere, with errors of their own.

        Raises:
            RequestInvalidError: A rule is broken.
        """
        found = [_told(v) for v in self._validator.collect_violations(request)]
        found = [v for v in found if not (skip and v.field.startswith(skip))]
        if found:
            raise RequestInvalidError(found[:MAX_VIOLATIONS], reason)

    def message_violations(self, message: Message) -> list[Violation]:
        """List every rule of the contract that a message other than a packet breaks."""
        return [_told(v) for v in self._validator.collect_violations(message)[:MAX_VIOLATIONS]]

    def descriptor(self, name: str) -> Descriptor:
        """Look up a message of the contract, by its full name or its name in `fmi.v1`.

        Raises:
            ThingNotFoundError: The contract has no such message.
        """
        for full_name in (name, f"fmi.v1.{name}"):
            if full_name in self._messages:
                return self._messages[full_name]
        raise ThingNotFoundError("message", name)

    def descriptor_set(self) -> bytes:
        """Return a serialised `FileDescriptorSet` of the contract and all it imports."""
        return descriptor_set()


_BODY_OF: Final[dict[type[Message], str]] = {
    MetaSignalPack: "msp",
    PolicyOutcomePack: "pop",
    ConceptCausalSummary: "ccs",
}
_LONG_NUMBER: Final = re.compile(r"-?\d{16,}")
_LAST_SECOND: Final = 253_402_300_799
"""The last second of the year 9999, up to which `google.protobuf.Timestamp` is defined."""

_REQUIRED: Final = "required"
_MISSING_RULES: Final = frozenset(
    {_REQUIRED, "map.min_pairs", "fmi.msp.no_signal", "fmi.ccs.empty", "fmi.plain.packet_type"}
)


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
    """Quote a name that a site chose: bounded, and without line breaks or control characters."""
    shown = name if len(name) <= 140 else name[:137] + "..."
    return '"' + shown.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'


def _time_violations(header: packet_pb2.PacketHeader) -> Iterator[Violation]:
    emitted_at = header.emitted_at
    if emitted_at.seconds > _LAST_SECOND or not 0 <= emitted_at.nanos < 1_000_000_000:
        yield Violation(
            "header.emitted_at",
            "fmi.header.emitted_at",
            "must be a valid timestamp: up to the year 9999, nanos from 0 to 999999999",
        )


def _signal_violations(msp: packet_pb2.MetaSignalPack) -> Iterator[Violation]:
    sections = {name: values for name in SECTIONS if (values := getattr(msp, name))}
    if not sections:
        yield Violation("msp", "fmi.msp.no_signal", "must carry at least one signal in a section")
    names = list(chain.from_iterable(sections.values()))
    # This is on the path of every packet: only where a name repeats is it worth asking which.
    if len(set(names)) != len(names):
        homes: dict[str, str] = {}
        for section, values in sections.items():
            for name in values:
                first = homes.setdefault(name, section)
                if first != section:
                    yield Violation(
                        f"msp.{section}[{_quoted(name)}]",
                        "fmi.msp.signal_in_one_section",
                        f"stands in {first} too; a signal has one section",
                    )
    if msp.HasField("evidence"):
        for name in msp.evidence.signals.keys() - set(names):
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
    seen: set[tuple[str, str, str]] = set()
    for index, pair in enumerate(ccs.causal_pairs):
        key = (pair.source, pair.target, pair.type or "direct")
        if key in seen:
            yield Violation(
                f"ccs.causal_pairs[{index}]",
                "fmi.ccs.pair_once",
                "repeats the source, target and type of an earlier pair",
            )
        seen.add(key)
    ids: set[str] = set()
    for index, concept in enumerate(ccs.concepts):
        if concept.id in ids:
            yield Violation(
                f"ccs.concepts[{index}].id", "fmi.ccs.concept_once", "repeats an earlier concept"
            )
        ids.add(concept.id)
