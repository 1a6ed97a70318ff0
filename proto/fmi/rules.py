"""The contract's rules, told as problems.

Rules that a field can hold are protovalidate constraints in the .proto files, so that every language has
them. The few that span the sections of a packet stand here, because one on a large message costs more than
all the others together. Server and client both check with this, so they find the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from itertools import chain, islice
from typing import Final, Protocol, TypeVar

import protovalidate
from google.protobuf.message import Message

from fmi.parts import Excess, Part, parts
from fmi.plain_values import Problem, quoted
from fmi.v1 import packet_pb2

__all__ = [
    "MAX_PROBLEMS",
    "SECTIONS",
    "ContractRules",
    "LongToTellError",
    "has_too_much",
    "without_follow_ups",
]

SECTIONS: Final = ("metrics", "controller", "evaluator", "operators")
"""The sections of an MSP in which signals stand."""

MAX_PROBLEMS: Final = 100
"""Problems told of one message: a hostile one must not make the answer larger than itself."""

MAX_SORTED: Final = 500
"""Problems of which these are the first, at some 50 us each."""


class LongToTellError(Exception):
    """A message breaks rules, and to tell which may take tens of milliseconds."""


class ContractRules:
    """Checks messages against the contract's rules. May be shared by threads.

    Each has a validator of its own: protovalidate keeps compiled rules by message name, so that the one of
    its module would mix up contract revisions.
    """

    def __init__(self) -> None:
        self._validator = protovalidate.Validator()

    def problems(self, message: Message, *, at_once: bool = False) -> list[Problem]:
        """List the rules that a message breaks, at most `MAX_PROBLEMS`; of a packet, use the next.

        Args:
            message: The message.
            at_once: Whether nothing that takes long may be done.

        Raises:
            LongToTellError: There are some, and they were to be told at once.
        """
        if not self._validator.collect_violations(message, fail_fast=True):
            return []
        if at_once:
            raise LongToTellError
        return _in_order(list(islice(self._all_problems(message), MAX_SORTED)))[:MAX_PROBLEMS]

    def packet_problems(self, packet: packet_pb2.Packet, *, at_once: bool = False) -> list[Problem]:
        """List the rules that a packet breaks, those across its sections too, at most `MAX_PROBLEMS`.

        See `problems`.
        """
        found = self.problems(packet, at_once=at_once)
        if has_too_much(found):
            return found  # what is across such sections is not worth its time
        found.extend(_time_problems(packet.header))
        kind = packet.WhichOneof("body")
        if kind == "msp":
            found.extend(islice(_signal_problems(packet.msp), MAX_PROBLEMS))
        elif kind == "pop":
            found.extend(_outcome_problems(packet.pop))
        elif kind == "ccs":
            found.extend(islice(_summary_problems(packet.ccs), MAX_PROBLEMS))
        return found[:MAX_PROBLEMS]

    def _all_problems(self, message: Message) -> Iterator[Problem]:
        for part in parts(message):
            if isinstance(part, Excess):
                yield Problem(*part)
                continue
            for violation in self._validator.collect_violations(part.message):
                problem = _told(violation, part)
                if problem is not None:
                    yield problem


def has_too_much(found: Iterable[_Broken]) -> bool:
    """Say whether a list or map has more than the contract allows."""
    return any(broken.rule_id in TOO_MUCH for broken in found)


_SIGNALS: Final = tuple(f"msp.{section}" for section in SECTIONS)
_LOOKS_AT: Final[Mapping[str, tuple[str, ...]]] = {
    "fmi.msp.no_signal": _SIGNALS,
    "fmi.msp.evidence_of_a_signal": _SIGNALS,
    "fmi.pop.common_metric": ("pop.before", "pop.after"),
    "fmi.ccs.empty": ("ccs.causal_pairs", "ccs.concepts", "ccs.tested_nodes"),
}
"""What rules look at that tell of another field. Names are enough for them."""

TOO_MUCH: Final = ("map.max_pairs", "repeated.max_items")
"""Rules that nothing breaks by being lost."""

_ENTRY: Final = '["'
_PLACES: Final = re.compile(r"\[.*?\]")
_THE_NAME: Final = "the name "
_FIELDS: Final = sorted(
    {
        field.name
        for message in packet_pb2.DESCRIPTOR.message_types_by_name.values()
        for field in message.fields
    }
)


@lru_cache(maxsize=1024)
def _meant_by(name: str) -> tuple[str, ...]:
    """Return the field that a name may be a misspelling of, or nothing."""
    return tuple(get_close_matches(name, _FIELDS, 1))


class _Broken(Protocol):
    """A rule that is broken somewhere."""

    @property
    def field(self) -> str: ...
    @property
    def rule_id(self) -> str: ...
    @property
    def description(self) -> str: ...


_B = TypeVar("_B", bound=_Broken)


def without_follow_ups(broken: Iterable[_B], untranslated: Sequence[Problem]) -> list[_B]:
    """Leave out the rules that may be broken only because a field that was given could not be translated.

    Args:
        broken: The rules that a packet breaks.
        untranslated: What could not be translated to it.
    """
    lost = _Lost(untranslated)
    # Where a number is none its name is there all the same.
    lost_names = _Lost(p for p in untranslated if p.rule_id != "fmi.plain.number")
    return [rule for rule in broken if not _follows(rule, lost, lost_names)]


def _follows(rule: _Broken, lost: _Lost, lost_names: _Lost) -> bool:
    if rule.rule_id in _LOOKS_AT:
        return any(map(lost_names.touches, _LOOKS_AT[rule.rule_id]))
    if rule.description.startswith(_THE_NAME):
        return lost_names.touches(rule.field)
    if rule.rule_id in TOO_MUCH:
        return lost.holds(rule.field)
    return lost.touches(rule.field)


class _Lost:
    """Fields that could not be translated, to be found by what lies above and below them.

    A field that nobody knows may be a known one misspelt, which is lost then.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        problems = tuple(problems)
        self._fields = frozenset("body" if p.field == "type" else p.field for p in problems)
        self._around = frozenset(path for field in self._fields for path in _with_parents(field))
        self._all = "packet" in self._fields
        unknown = (p for p in problems if p.rule_id == "fmi.plain.unknown_field")
        self._misspelt = frozenset(
            meant
            for problem in islice(unknown, MAX_PROBLEMS)  # each costs a millisecond
            for meant in _meant_by(problem.field.rpartition(".")[2][:64])
        )

    def holds(self, path: str) -> bool:
        """Say whether a field is lost itself, or with one that it is a part of."""
        return self._all or not self._fields.isdisjoint(_with_parents(path))

    def touches(self, path: str) -> bool:
        """Say whether a field is lost, or a part of it."""
        if self.holds(path) or path in self._around:
            return True
        return not self._misspelt.isdisjoint(_PLACES.sub("", path).split("."))


def _with_parents(path: str) -> Iterator[str]:
    yield path
    for index, char in enumerate(path):
        if char in ".[":
            yield path[:index]


_ALPHANUMERIC: Final = "beginning with a letter or a digit"
_IN_WORDS: Final = {
    "^[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*$": "must have only lower-case letters a-z, digits "
    f"and . _ -, in parts joined by /, each {_ALPHANUMERIC}",
    "^[a-z0-9*?][a-z0-9._/*?-]{0,127}$": "must be 1 to 128 lower-case letters a-z, digits and . _ / * ? "
    "-, beginning with a letter, a digit, * or ?",
    "^[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}$": "must be 1 to 128 letters a-z, digits and . _ : @ -, "
    f"{_ALPHANUMERIC}",
    "^[A-Za-z0-9][A-Za-z0-9._:@-]{0,63}$": "must be 1 to 64 letters a-z, digits and . _ : @ -, "
    f"{_ALPHANUMERIC}",
    "^[A-Za-z_][A-Za-z0-9_.:/@+-]{0,127}$": "must be 1 to 128 letters a-z, digits and _ . : / @ + -, "
    "beginning with a letter or _",
    "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$": "must be a UUID in lower case, "
    "such as 0190b2c4-7e8a-7c3d-9f10-000000000001",
    "^[0-9a-f]{64}$": "must be 64 hexadecimal digits in lower case",
    "^[0-9]{0,19}$": "must be the page token of an earlier answer",
    "^[0-9]{0,18}$": "must be the page token of an earlier answer",
    "^[A-Za-z0-9_-]{16,64}$": "must be 16 to 64 letters a-z, digits and _ -, small or capital",
    r"^[^\p{Cc}\p{Zl}\p{Zp}]*$": "must have no control characters or line breaks",
}
"""What each pattern of the contract allows; of one that allows emptiness too, `^(...)?$`, the inside."""

_PATTERN: Final = re.compile(r"does not match regex pattern `\^(?:\((.*)\)\?|(.*))\$`", re.DOTALL)
_LONG_NUMBER: Final = re.compile(r"-?\d{16,}")
_LAST_SECOND: Final = 253_402_300_799
"""The last second of the year 9999, up to which `google.protobuf.Timestamp` is defined."""


def _told(violation: protovalidate.Violation, part: Part) -> Problem | None:
    """Tell a violation in a part of a message; None where the part alone is what breaks the rule."""
    raw = violation.proto
    elements = raw.field.elements if raw.field is not None else ()
    if part.only and not (elements and elements[0].field_name == part.only):
        return None
    path = ".".join(filter(None, (part.path, _path(elements, part.offset))))
    description = _description(raw.message or "breaks a rule")
    value = violation.field_value
    if raw.for_key:
        description = f"{_THE_NAME}{description}"
    elif isinstance(value, float):
        description = f"{description}, not {value:g}"
    return Problem(path or "body", raw.rule_id or "custom", description)


def _in_order(problems: list[Problem]) -> list[Problem]:
    """Put the entries of a map into the order of their names: that of a protobuf map is another each time."""
    places: dict[str, int] = {}
    for problem in problems:
        places.setdefault(problem.field.partition(_ENTRY)[0], len(places))

    def place(problem: Problem) -> tuple[int, str]:
        around, entry, name = problem.field.partition(_ENTRY)
        return places[around], entry + name

    return sorted(problems, key=place)


def _description(message: str) -> str:
    """Say in words what protovalidate says in the terms of its rules."""
    if broken := _PATTERN.fullmatch(message):
        return _IN_WORDS.get(f"^{broken[1] or broken[2]}$", message)
    # A choice that may be left out is the first of its list, and empty.
    message = message.replace("must be in list [, ", "must be in list [")
    return _LONG_NUMBER.sub(lambda number: f"{float(number[0]):g}", message)


def _path(elements: Iterable[protovalidate.FieldPathElementPb], offset: int = 0) -> str:
    """Write a path. An index of the first element counts from `offset`."""
    steps = []
    for element in elements:
        key = element.subscript
        if key is None:
            steps.append(str(element.field_name))
        elif key.field == "index":
            steps.append(f"{element.field_name}[{key.value + (0 if steps else offset)}]")
        else:
            steps.append(f"{element.field_name}[{quoted(str(key.value))}]")
    return ".".join(steps)


def _time_problems(header: packet_pb2.PacketHeader) -> Iterator[Problem]:
    emitted_at = header.emitted_at
    if emitted_at.seconds > _LAST_SECOND or not 0 <= emitted_at.nanos < 1_000_000_000:
        yield Problem(
            "header.emitted_at",
            "fmi.header.emitted_at",
            "must be a valid timestamp: up to the year 9999, nanos from 0 to 999999999",
        )


def _signal_problems(msp: packet_pb2.MetaSignalPack) -> Iterator[Problem]:
    sections = {name: values for name in SECTIONS if (values := getattr(msp, name))}
    if not sections:
        yield Problem("msp", "fmi.msp.no_signal", "must carry at least one signal in a section")
    names = list(chain.from_iterable(sections.values()))
    # This is on the path of every packet: only where a name repeats is it worth asking which.
    if len(set(names)) != len(names):
        homes: dict[str, str] = {}
        for section, values in sections.items():
            for name in values:
                first = homes.setdefault(name, section)
                if first != section:
                    yield Problem(
                        f"msp.{section}[{quoted(name)}]",
                        "fmi.msp.signal_in_one_section",
                        f"stands in {first} too; a signal has one section",
                    )
    if msp.HasField("evidence"):
        for name in sorted(msp.evidence.signals.keys() - set(names)):
            yield Problem(
                f"msp.evidence.signals[{quoted(name)}]",
                "fmi.msp.evidence_of_a_signal",
                "is evidence of a signal that is not in the packet",
            )


def _outcome_problems(pop: packet_pb2.PolicyOutcomePack) -> Iterator[Problem]:
    if pop.before and pop.after and not pop.before.keys() & pop.after.keys():
        yield Problem(
            "pop.after",
            "fmi.pop.common_metric",
            "must have at least one metric in common with before",
        )


def _summary_problems(ccs: packet_pb2.ConceptCausalSummary) -> Iterator[Problem]:
    if not (ccs.causal_pairs or ccs.concepts or ccs.tested_nodes):
        yield Problem(
            "ccs", "fmi.ccs.empty", "must carry at least one causal pair, concept or tested node"
        )
    pairs: set[tuple[str, str, str]] = set()
    for index, pair in enumerate(ccs.causal_pairs):
        key = (pair.source, pair.target, pair.type or "direct")
        if key in pairs:
            yield Problem(
                f"ccs.causal_pairs[{index}]",
                "fmi.ccs.pair_once",
                "repeats the source, target and type of an earlier pair",
            )
        pairs.add(key)
    concepts: set[str] = set()
    for index, concept in enumerate(ccs.concepts):
        if concept.id in concepts:
            yield Problem(
                f"ccs.concepts[{index}].id", "fmi.ccs.concept_once", "repeats an earlier concept"
            )
        concepts.add(concept.id)
