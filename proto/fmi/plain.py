"""Plain Python data in, typed packets out.

The server's registry and the client's emitter both take packets as plain dicts. They may not import
each other, so the one translation stands here, beside the contract that it translates to. Three forms
are understood, and they may be mixed:

* flat, ``{"type": "msp", "domain_id": "site_001", "metrics": {...}}``;
* nested, ``{"header": {...}, "msp": {...}}``;
* ProtoJSON, the same with camel-case names and text timestamps.

Nothing is invented: a field that is missing stays unset, and the contract's rules tell of it. Whatever
cannot be translated is collected, so that one `PlainDataError` names all of it.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, TypeGuard

from google.protobuf import json_format
from google.protobuf.message import Message

from fmi.plain_values import (
    PlainDataError,
    Problem,
    ValueReader,
    is_numeric,
    is_sequence,
    name_of,
    quoted,
    shown,
)
from fmi.v1 import packet_pb2

__all__ = [
    "CURRENT_REVISION",
    "DEFAULT_COHORT",
    "DEFAULT_PROFILE_CLASS",
    "OLDEST_REVISION",
    "PacketType",
    "PlainDataError",
    "Problem",
    "flatten",
    "new_packet_id",
    "packet_from_plain",
    "packet_to_plain",
    "param_value",
]

CURRENT_REVISION: Final = max(packet_pb2.ContractRevision.values())
"""The contract revision that this code speaks."""

OLDEST_REVISION: Final = max(1, CURRENT_REVISION - 1)
"""The oldest contract revision that a server of this version takes."""

DEFAULT_COHORT: Final = "default"
DEFAULT_PROFILE_CLASS: Final = "default"


class PacketType(StrEnum):
    """The three kinds of packet, under the names of the bodies of `fmi.v1.Packet`."""

    MSP = "msp"
    POP = "pop"
    CCS = "ccs"


def new_packet_id(*, now_ms: int | None = None) -> str:
    """Make a packet id: a UUIDv7 (RFC 9562, section 5.7), so that ids sort by the time they were made.

    Args:
        now_ms: Unix time in milliseconds; the system clock's where it is not given.
    """
    unix_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    bits = (unix_ms & 0xFFFF_FFFF_FFFF) << 80 | int.from_bytes(os.urandom(10), "big")
    bits = bits & ~(0xF << 76) | 0x7 << 76  # version 7
    bits = bits & ~(0x3 << 62) | 0x2 << 62  # the RFC's variant
    return str(uuid.UUID(int=bits))


def flatten(values: Mapping[str, Any], *, field: str = "values") -> dict[str, float]:
    """Flatten nested dicts of numbers: ``{"ctl": {"tau": 0.9}}`` becomes ``{"ctl.tau": 0.9}``.

    Args:
        values: Names to numbers or to further mappings.
        field: What to call `values` in an error.

    Raises:
        PlainDataError: A value is not a number, two names collide, or the nesting is too deep.
    """
    reader = _PacketReader()
    flat = reader.numbers(values, field)
    reader.raise_problems()
    return flat


def param_value(value: object, *, field: str = "value") -> packet_pb2.ParamValue:
    """Translate a number, a text or a flag to a `ParamValue`.

    Raises:
        PlainDataError: The value is none of these.
    """
    reader = _PacketReader()
    translated = reader.param(value, field)
    reader.raise_problems()
    return translated


def packet_from_plain(data: Mapping[str, Any]) -> packet_pb2.Packet:
    """Translate a plain dict in any of the three forms to a typed packet.

    Args:
        data: The packet. A `Packet` is not accepted here: it is typed already.

    Returns:
        The packet. Fields that `data` does not have are unset; the contract's rules are not checked.

    Raises:
        PlainDataError: A field is unknown or cannot be translated, or it is not clear which type of
            packet it is.
    """
    reader = _PacketReader()
    packet = reader.packet(data)
    if reader.problems:
        raise PlainDataError(reader.problems, packet)
    return packet


def packet_to_plain(message: Message) -> dict[str, Any]:
    """Translate a packet, or any other message of the contract, to plain data with the contract's names.

    The inverse of `packet_from_plain` for packets whose numbers are finite.
    """
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


_HEADER_FIELDS: Final = frozenset(packet_pb2.PacketHeader.DESCRIPTOR.fields_by_name)
_BODIES: Final[dict[PacketType, type[Message]]] = {
    PacketType.MSP: packet_pb2.MetaSignalPack,
    PacketType.POP: packet_pb2.PolicyOutcomePack,
    PacketType.CCS: packet_pb2.ConceptCausalSummary,
}
_BODY_FIELDS: Final = {
    kind: frozenset(body.DESCRIPTOR.fields_by_name) for kind, body in _BODIES.items()
}
_TYPE_KEYS: Final = ("type", "packet_type")
_ALIASES: Final = {"timestamp": "emitted_at"}
_CAMEL: Final = {
    field.json_name: field.name
    for descriptor in (
        packet_pb2.PacketHeader.DESCRIPTOR,
        *(body.DESCRIPTOR for body in _BODIES.values()),
    )
    for field in descriptor.fields
}
_EVIDENCE_FIELDS: Final = ("confidence", "samples", "stderr")


class _PacketReader(ValueReader):
    """Reads packets in any of the three forms."""

    def packet(self, data: object) -> packet_pb2.Packet:
        if data is None:
            self.problem("packet", "mapping", "must be a mapping, not NoneType")
        named = self._named(self.mapping(data, "packet"))
        kind = self._kind(named)
        header = self.mapping(named.pop("header", {}), "header")
        header_fields = self._named(header)
        self._move(named, header_fields, _HEADER_FIELDS)
        packet = packet_pb2.Packet(header=self.header(header_fields))
        if kind is None:
            return packet
        body = self._named(self.mapping(named.pop(kind.value, {}), kind.value))
        self._move(named, body, _BODY_FIELDS[kind])
        for name in named:
            self.problem(name, "unknown_field", f"is not a field of a packet of type {kind.value}")
        match kind:
            case PacketType.MSP:
                packet.msp.CopyFrom(self.msp(body))
            case PacketType.POP:
                packet.pop.CopyFrom(self.pop(body))
            case PacketType.CCS:
                packet.ccs.CopyFrom(self.ccs(body))
        return packet

    def header(self, fields: Mapping[str, Any]) -> packet_pb2.PacketHeader:
        header = packet_pb2.PacketHeader()
        for name, value in fields.items():
            path = f"header.{name}"
            match name:
                case "emitted_at":
                    self.timestamp(header.emitted_at, value, path)
                case "provenance":
                    self.message(value, header.provenance, path)
                case "rev":
                    header.rev = self.integer(value, path, limit=2**32)
                case _ if name in _HEADER_FIELDS:
                    setattr(header, name, self.text(value, path))
                case _:
                    self.problem(path, "unknown_field", "is not a field of a packet's header")
        return header

    def msp(self, fields: Mapping[str, Any]) -> packet_pb2.MetaSignalPack:
        sections: dict[str, dict[str, float]] = {}
        pack = packet_pb2.MetaSignalPack()
        for name, value in fields.items():
            path = f"msp.{name}"
            match name:
                case "metrics" | "controller" | "evaluator" | "operators":
                    sections[name] = self.numbers(value, path)
                case "window_span":
                    span = self.window_span(value, path)
                    if span is not None:
                        pack.window_span.CopyFrom(span)
                case "evidence":
                    pack.evidence.CopyFrom(self.evidence(value, path))
                case _:
                    self.problem(path, "unknown_field", "is not a field of a Meta Signal Pack")
        for name, values in sections.items():
            getattr(pack, name).update(values)
        return pack

    def pop(self, fields: Mapping[str, Any]) -> packet_pb2.PolicyOutcomePack:
        pack = packet_pb2.PolicyOutcomePack()
        for name, value in fields.items():
            path = f"pop.{name}"
            match name:
                case "bundle":
                    for key, item in self.leaves(value, path, is_leaf=_is_param):
                        where = f"{path}[{quoted(key)}]"
                        if key in pack.bundle:
                            self.collision(where)
                        pack.bundle[key].CopyFrom(self.param(item, where))
                case "before" | "after" | "control_delta":
                    getattr(pack, name).update(self.numbers(value, path))
                case "windows":
                    pack.windows = self.integer(value, path, limit=2**32)
                case "confidence":
                    if value is not None:
                        pack.confidence = self.number(value, path)
                case _:
                    self.problem(path, "unknown_field", "is not a field of a Policy Outcome Pack")
        return pack

    def ccs(self, fields: Mapping[str, Any]) -> packet_pb2.ConceptCausalSummary:
        pack = packet_pb2.ConceptCausalSummary()
        for name, value in fields.items():
            path = f"ccs.{name}"
            match name:
                case "causal_pairs":
                    pack.causal_pairs.extend(
                        self.causal_pair(item, f"{path}[{index}]")
                        for index, item in enumerate(self.items(value, path))
                    )
                case "concepts":
                    for index, item in enumerate(self.items(value, path)):
                        self.message(item, pack.concepts.add(), f"{path}[{index}]")
                case "tested_nodes":
                    pack.tested_nodes.extend(
                        self.text(item, f"{path}[{index}]")
                        for index, item in enumerate(self.items(value, path))
                    )
                case "stability_delta":
                    pack.stability_delta = self.number(value, path)
                case "trust":
                    if value is not None:
                        pack.trust = self.number(value, path)
                case _:
                    self.problem(
                        path, "unknown_field", "is not a field of a Concept Causal Summary"
                    )
        return pack

    def numbers(self, values: object, path: str) -> dict[str, float]:
        flat: dict[str, float] = {}
        for name, value in self.leaves(values, path):
            if name in flat:
                self.collision(f"{path}[{quoted(name)}]")
            flat[name] = self.number(value, f"{path}[{quoted(name)}]")
        return flat

    def param(self, value: object, path: str) -> packet_pb2.ParamValue:
        if isinstance(value, packet_pb2.ParamValue):
            return value
        if _is_param(value):
            (value,) = value.values()  # ProtoJSON: {"number": 0.5}
        if isinstance(value, bool):
            return packet_pb2.ParamValue(flag=value)
        if isinstance(value, str):
            return packet_pb2.ParamValue(text=self.text(value, path))
        return packet_pb2.ParamValue(number=self.number(value, path))

    def window_span(self, value: object, path: str) -> packet_pb2.WindowSpan | None:
        if value is None:
            return None
        if isinstance(value, packet_pb2.WindowSpan):
            return value
        if isinstance(value, Mapping):
            ends: list[Any] = [value.get("start", 0), value.get("end", 0)]
            if unknown := sorted(set(map(name_of, value)) - {"start", "end"}):
                told = ", ".join(quoted(name)[1:-1] for name in unknown[:5])
                self.problem(path, "unknown_field", f"has unknown fields: {told}")
        else:
            ends = list(self.items(value, path)) if is_sequence(value) else []
        if len(ends) != 2:
            self.problem(path, "window_span", "must be a pair: the first and the last window")
            return None
        start, end = (self.integer(e, path, limit=2**63) for e in ends)
        return packet_pb2.WindowSpan(start=start, end=end)

    def evidence(self, value: object, path: str) -> packet_pb2.Evidence:
        """Read evidence: numbers for the packet as a whole, mappings for single signals, or ProtoJSON."""
        if isinstance(value, packet_pb2.Evidence):
            return value
        evidence = packet_pb2.Evidence()
        for key, item in self.mapping(value, path).items():
            name = self.text(name_of(key), path)
            if name in _EVIDENCE_FIELDS and isinstance(item, Mapping):
                for signal, number in self.leaves(item, f"{path}.{name}"):
                    where = f"{path}.{name}[{quoted(signal)}]"
                    self._evidence_number(evidence.signals[signal], name, number, where)
            elif name in ("confidence", "samples", "sites") and not isinstance(item, Mapping):
                self._evidence_number(evidence, name, item, f"{path}.{name}")
            elif name == "signals":
                for signal, fields in self.mapping(item, f"{path}.signals").items():
                    self._signal_evidence(evidence, self.text(name_of(signal), path), fields, path)
            elif isinstance(item, Mapping):
                self._signal_evidence(evidence, name, item, path)
            else:
                self.problem(
                    f"{path}.{name}",
                    "evidence",
                    "must be confidence, samples, sites, or a signal with its own confidence, samples, "
                    "stderr",
                )
        return evidence

    def _signal_evidence(
        self, evidence: packet_pb2.Evidence, signal: str, fields: object, path: str
    ) -> None:
        where = f"{path}.signals[{quoted(signal)}]"
        evidence.signals[signal].SetInParent()
        for key, number in self.mapping(fields, where).items():
            name = name_of(key)
            if name in _EVIDENCE_FIELDS:
                self._evidence_number(evidence.signals[signal], name, number, f"{where}.{name}")
            else:
                self.problem(f"{where}.{name}", "unknown_field", "is not evidence of a signal")

    def _evidence_number(
        self,
        target: packet_pb2.Evidence | packet_pb2.SignalEvidence,
        name: str,
        value: object,
        path: str,
    ) -> None:
        if name == "samples":
            target.samples = self.integer(value, path, limit=2**64)
        else:
            setattr(target, name, self.number(value, path))

    def causal_pair(self, value: object, path: str) -> packet_pb2.CausalPair:
        """Read a pair from ``(source, target, weight, type[, stderr])`` or from a mapping."""
        pair = packet_pb2.CausalPair()
        if isinstance(value, packet_pb2.CausalPair):
            return value
        if isinstance(value, Mapping):
            self.message(value, pair, path)
            return pair
        parts = list(self.items(value, path)) if is_sequence(value) else []
        if not 3 <= len(parts) <= 5:
            self.problem(path, "causal_pair", "must be (source, target, weight, type[, stderr])")
            return pair
        pair.source = self.text(parts[0], f"{path}.source")
        pair.target = self.text(parts[1], f"{path}.target")
        pair.weight = self.number(parts[2], f"{path}.weight")
        if len(parts) > 3 and parts[3] is not None:
            pair.type = self.text(parts[3], f"{path}.type")
        if len(parts) > 4 and parts[4] is not None:
            pair.stderr = self.number(parts[4], f"{path}.stderr")
        return pair

    def _named(self, data: Mapping[str, Any]) -> dict[str, Any]:
        named: dict[str, Any] = {}
        for key, value in data.items():
            given = name_of(key)
            name = _CAMEL.get(given, _ALIASES.get(given, given))
            if name in named:
                self.problem(name, "name_collision", "is given twice")
            named[name] = value
        return named

    def _move(self, named: dict[str, Any], target: dict[str, Any], fields: frozenset[str]) -> None:
        for name in [name for name in named if name in fields]:
            if name in target:
                self.problem(name, "name_collision", "is given twice")
            target[name] = named.pop(name)

    def _kind(self, named: dict[str, Any]) -> PacketType | None:
        given = [named.pop(key) for key in _TYPE_KEYS if key in named]
        known = {kind.value for kind in PacketType}
        unknown = [i for i in given if not (isinstance(i, str) and i.lower() in known)]
        told = {item.lower() for item in given if isinstance(item, str) and item.lower() in known}
        told |= known & named.keys()
        if not told and not unknown:
            told = {kind.value for kind in PacketType if _BODY_FIELDS[kind] & named.keys()}
        if len(told) == 1 and not unknown:
            return PacketType(told.pop())
        if unknown:
            text = f"unknown packet type {shown(unknown[0])}; the types are msp, pop, ccs"
        elif told:
            text = f"says more than one packet type: {', '.join(sorted(told))}"
        else:
            text = "must say the packet type: msp, pop or ccs"
        self.problem("type", "packet_type", text)
        return None


def _is_param(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Say whether a mapping is a `ParamValue` in ProtoJSON's form and not a nested bundle."""
    if not isinstance(value, Mapping) or len(value) != 1:
        return False
    ((kind, item),) = value.items()
    match kind:
        case "text":
            return isinstance(item, str)
        case "flag":
            return isinstance(item, bool)
        case "number":
            return is_numeric(item)
        case _:
            return False
