"""A message in parts, so that what is wrong with a large one can be told without all of it being told.

The rules' engine tells everything that is wrong with a message, at some microseconds and kilobytes for each:
a message of a few hundred kilobytes, with nothing in it but empty items, costs seconds and gigabytes. So a
message that breaks rules is checked in parts, and who reads them stops where enough was told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any, Final, NamedTuple

from buf.validate import validate_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

__all__ = ["Excess", "Part", "parts"]

RUN: Final = 64
"""Items of one list, or entries of one map, in a part."""


class Part(NamedTuple):
    """A part of a message.

    Attributes:
        message: It, or a message within it, with some of its items.
        path: Where that stands; empty for the message itself.
        only: The list whose items it has; what is told of other fields is not so. Empty for the first part,
            which has all fields.
        offset: The index of the first of these items.
    """

    message: Message
    path: str = ""
    only: str = ""
    offset: int = 0


class Excess(NamedTuple):
    """A list or map that has more than the contract allows, of which twice as many are in parts at most."""

    path: str
    rule_id: str
    description: str


def parts(message: Message) -> Iterator[Part | Excess]:
    """Give a message in parts: what is too much, then the whole with shortened lists, then their rest."""
    cut = _Cut()
    first = cut.shortened(message, "")
    yield from cut.excess
    yield Part(first)
    yield from cut.rest()


class _ListLimits(NamedTuple):
    most: int | None
    rule_id: str
    description: str
    whole: bool

    @property
    def run(self) -> int:
        """Items in a part: never too many, which is told of the whole."""
        return RUN if self.most is None else min(RUN, self.most)


@cache
def _limits(descriptor: FieldDescriptor) -> _ListLimits:
    rules = descriptor.GetOptions().Extensions[validate_pb2.field]
    if _is_map(descriptor):
        most = rules.map.max_pairs if rules.map.HasField("max_pairs") else None
        return _ListLimits(
            most, "map.max_pairs", f"map must be at most {most} entries", whole=False
        )
    most = rules.repeated.max_items if rules.repeated.HasField("max_items") else None
    # Whether items are unique can be told of all of them only.
    told = f"must contain no more than {most} item(s)"
    return _ListLimits(most, "repeated.max_items", told, whole=rules.repeated.unique)


@cache
def _holds_lists(descriptor: Descriptor) -> bool:
    return any(
        found.is_repeated or (found.message_type is not None and _holds_lists(found.message_type))
        for found in descriptor.fields
    )


def _is_map(descriptor: FieldDescriptor) -> bool:
    entry = descriptor.message_type
    return entry is not None and bool(entry.GetOptions().map_entry)


@dataclass(slots=True)
class _Cut:
    """Shortens messages, and keeps what is left of their lists."""

    excess: list[Excess] = field(default_factory=list)
    _left: list[tuple[Message, FieldDescriptor, str]] = field(default_factory=list)

    def shortened(self, message: Message, path: str) -> Message:
        """Copy a message, of each list its first items."""
        short = type(message)()
        for found, value in message.ListFields():
            where = f"{path}.{found.name}" if path else found.name
            if found.is_repeated:
                self._add(short, found, self._first(message, found, path), 0, where)
            elif found.message_type is not None:
                inside = getattr(short, found.name)
                inside.SetInParent()
                inside.CopyFrom(self.shortened(value, where))
            else:
                setattr(short, found.name, value)
        return short

    def rest(self) -> Iterator[Part | Excess]:
        """Give what is left of the lists, in runs."""
        for message, found, path in self._left:
            where = f"{path}.{found.name}" if path else found.name
            limits = _limits(found)
            # Of what has far too many nobody reads to the end.
            end = None if limits.most is None else 2 * limits.most
            items = islice(_items(message, found), end)
            offset = len(list(islice(items, limits.run)))
            while run := list(islice(items, limits.run)):
                deeper = _Cut()
                part = type(message)()
                deeper._add(part, found, run, offset, where)
                yield from deeper.excess
                yield Part(part, path, found.name, offset)
                yield from deeper.rest()
                offset += len(run)

    def _first(self, message: Message, found: FieldDescriptor, path: str) -> Iterable[Any]:
        """Take the first items of a list, and note that there are more, or too many."""
        limits, items = _limits(found), _items(message, found)
        size = len(getattr(message, found.name))
        if limits.most is not None and size > limits.most:
            where = f"{path}.{found.name}" if path else found.name
            told = f"{limits.description}, and has {size}"
            self.excess.append(Excess(where, limits.rule_id, told))
        elif limits.whole:
            return items
        if size > limits.run:
            self._left.append((message, found, path))
        return islice(items, limits.run)

    def _add(
        self,
        target: Message,
        found: FieldDescriptor,
        items: Iterable[Any],
        offset: int,
        where: str,
    ) -> None:
        held = getattr(target, found.name)
        if _is_map(found):
            for key, value in items:
                if isinstance(value, Message):
                    held[key].CopyFrom(value)
                else:
                    held[key] = value
        elif found.message_type is None:
            held.extend(items)
        else:
            nested = _holds_lists(found.message_type)
            for index, item in enumerate(items, offset):
                held.append(self.shortened(item, f"{where}[{index}]") if nested else item)


def _items(message: Message, found: FieldDescriptor) -> Iterable[Any]:
    held: Any = getattr(message, found.name)
    items: Iterable[Any] = held.items() if _is_map(found) else held
    return items
