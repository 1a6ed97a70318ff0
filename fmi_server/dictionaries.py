"""Compression dictionaries: registered, kept, and at hand for decoding."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import zstandard

from fmi_server.envelope import EnvelopeDecoder
from fmi_server.errors import DictionaryInvalidError, Reason, ThingNotFoundError, Violation
from fmi_server.storage import Store

__all__ = ["DictionaryShelf"]

MAX_DICTIONARIES: Final = 64
"""Dictionaries at most: each stays in memory, with the tables that it is used by."""


class DictionaryShelf:
    """The dictionaries of a server.

    Args:
        store: Keeps them.
        decoder: Uses them.
        clock: Unix time in seconds.
    """

    def __init__(
        self, store: Store, decoder: EnvelopeDecoder, *, clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._decoder = decoder
        self._clock = clock
        self._data: dict[int, bytes] = {}

    async def load(self) -> None:
        """Bring back what was registered."""
        records = await self._store.dictionaries()
        records.sort(key=lambda record: record.created_at_us)  # the newest stands last
        self._data = {record.dictionary_id: record.data for record in records}
        self._decoder.dictionaries = {
            number: zstandard.ZstdCompressionDict(data) for number, data in self._data.items()
        }

    async def register(self, data: bytes) -> int:
        """Register a dictionary; return its id, as it stands in it. The same once more changes nothing.

        Raises:
            DictionaryInvalidError: It is no trained zstd dictionary, or there are as many as there may be.
            DictionaryConflictError: The id is taken by other data.
        """
        dictionary = zstandard.ZstdCompressionDict(data)
        number: int = dictionary.dict_id()
        if number not in self._data and len(self._data) >= MAX_DICTIONARIES:
            raise _refused("limit", f"{MAX_DICTIONARIES} are registered, and no more are kept")
        if not number or not await asyncio.to_thread(_usable, dictionary):
            raise _refused("trained", "is no trained zstd dictionary; make one with `zstd --train`")
        await self._store.put_dictionary(number, data, int(self._clock() * 1e6))
        self._data.setdefault(number, data)
        self._decoder.dictionaries = {**self._decoder.dictionaries, number: dictionary}
        return number

    async def read(self, dictionary_id: int = 0) -> tuple[int, bytes]:
        """Return a dictionary with its id; the newest where no id is given.

        Raises:
            ThingNotFoundError: There is none.
        """
        if not dictionary_id and self._data:
            dictionary_id = next(reversed(self._data))
        if dictionary_id not in self._data:
            raise ThingNotFoundError("dictionary", str(dictionary_id or "(any)"))
        return dictionary_id, self._data[dictionary_id]


def _usable(dictionary: zstandard.ZstdCompressionDict) -> bool:
    try:
        dictionary.precompute_compress(level=3)  # reads its tables
    except zstandard.ZstdError:
        return False
    return True


def _refused(rule: str, description: str) -> DictionaryInvalidError:
    return DictionaryInvalidError(
        [Violation("data", f"fmi.dictionary.{rule}", description, Reason.SPEC_INVALID)]
    )
