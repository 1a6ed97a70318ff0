"""Leases: who may do something alone, for a while, by a bucket of keys at the brokers that die by themselves.

A lease is one key of a key-value bucket whose keys live for the time to live of a lease. It is taken where
there is no key, and renewed or given back where the key is still the one that was written; the brokers
decide that, one after the other. A holder that does not renew loses it when its key dies, and nobody has to
notice.

A lease says who may begin, not that nobody else is still at it: a process that was stopped for a minute
goes on in the belief that it holds one. So what is done under a lease needs a fence of its own. Updates and
spends have theirs. Whatever else is written under a lease carries its `token`, which is higher with each
taking, and refuses a lower one.

The times: a holder counts from before it asked, by its own monotonic clock, and stops a tenth of the time
earlier than the brokers. They must agree among themselves within that tenth, since another one may lead
when the key is to die.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fmi_server.storage.base import StoreUnavailableError
from fmi_server.storage.jetstream_broker import FenceError
from fmi_server.storage.jetstream_errors import import_nats
from fmi_server.storage.jetstream_names import name_token

if TYPE_CHECKING:
    from collections.abc import Callable

    from nats.js.api import RawStreamMsg

    from fmi_server.storage.jetstream_broker import BrokerConnection
    from fmi_server.storage.jetstream_names import LogNames

__all__ = ["Lease", "LeaseHolder", "LeaseLostError", "LeaseTable"]

_MARGIN = 0.1
"""The part of its time that a holder does not use."""

_PATIENCE = 0.3
"""The part of its time that one try to take or renew a lease may last."""

_OPERATION = "KV-Operation"
_DELETED = "DEL"


class LeaseLostError(Exception):
    """The lease is another's by now, or nobody's."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        super().__init__(f"the lease of {lease.name!r} is lost; its token was {lease.token}")


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease that was taken.

    Attributes:
        name: What of.
        holder: Who has it.
        token: The fencing token: higher than that of any earlier holder; the same as long as it is held.
        revision: Of its key; another one after each renewal.
        good_until: By the monotonic clock of the holder; nothing may be begun under it later.
    """

    name: str
    holder: str
    token: int
    revision: int
    good_until: float


@dataclass(frozen=True, slots=True)
class LeaseHolder:
    """Who has a lease, as the brokers know it: the name it gave, and its token."""

    holder: str
    token: int


class LeaseTable:
    """Take, renew and give back leases.

    Args:
        broker: Connected.
        names: Of the federation.
        ttl_s: For how long a lease is good without renewal, at least a second. What the bucket was made
            with counts: see `ttl_s` once it is open.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        broker: BrokerConnection,
        names: LogNames,
        *,
        ttl_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if ttl_s < 1.0:
            raise ValueError(f"ttl_s must be at least 1, not {ttl_s}")
        self._broker = broker
        self._bucket = names.leases
        self._stream = f"KV_{names.leases}"
        self._clock = clock
        self.ttl_s = ttl_s

    async def open(self) -> None:
        """Make the bucket if there is none, and learn for how long its keys live.

        Raises:
            StoreUnavailableError: The brokers cannot be asked, or the bucket has keys that do not die.
        """
        api = import_nats().js.api
        info = await self._broker.ensure_stream(
            api.StreamConfig(
                name=self._stream,
                description="The leases of an FMI federation.",
                subjects=[f"$KV.{self._bucket}.>"],
                storage=api.StorageType.FILE,
                num_replicas=self._broker.options.replicas,
                max_msgs_per_subject=1,
                max_age=self.ttl_s,
                # No longer than the keys live; the brokers ask for that.
                duplicate_window=self.ttl_s,
                discard=api.DiscardPolicy.NEW,
                allow_rollup_hdrs=True,
                allow_direct=False,
                deny_delete=True,
            )
        )
        if not info.config.max_age:
            raise StoreUnavailableError(
                "unsupported",
                detail=f"the keys of the bucket {self._bucket} live for ever; delete it",
                path=self._broker.location,
            )
        self.ttl_s = float(info.config.max_age)

    async def acquire(self, name: str, holder: str) -> Lease | None:
        """Take a lease; None where somebody else has it.

        A holder that did not hear that it had taken or renewed it takes it once more, with a new token.

        Raises:
            StoreUnavailableError: The brokers do not answer; it may be held until it dies.
        """
        asked_at = self._clock()
        try:
            revision = await self._put(name, holder, token=0, expected=0)
        except FenceError:
            # A key is there. It may be the mark of one that was given back, or our own.
            found = await self._broker.last_message(self._stream, self._subject(name))
            if found is None or _holder_of(found) not in (None, holder):
                return None
            try:
                revision = await self._put(name, holder, token=0, expected=int(found.seq or 0))
            except FenceError:
                return None
        return Lease(name, holder, revision, revision, self._good_until(asked_at))

    async def renew(self, lease: Lease) -> Lease:
        """Hold a lease for longer; it has another `revision` and `good_until` then.

        Raises:
            LeaseLostError: It is another's, or it died.
            StoreUnavailableError: The brokers do not answer; the lease is as good as it was.
        """
        asked_at = self._clock()
        try:
            revision = await self._put(
                lease.name, lease.holder, token=lease.token, expected=lease.revision
            )
        except FenceError:
            raise LeaseLostError(lease) from None
        return replace(lease, revision=revision, good_until=self._good_until(asked_at))

    async def release(self, lease: Lease) -> bool:
        """Give a lease back, so that another has it at once; return whether it was still held."""
        try:
            await self._send(lease.name, b"", lease.revision, {_OPERATION: _DELETED})
        except FenceError:
            return False
        return True

    async def holder(self, name: str) -> LeaseHolder | None:
        """Return who has a lease, as the leader of the brokers knows it; None for nobody."""
        found = await self._broker.last_message(self._stream, self._subject(name))
        who = None if found is None else _holder_of(found)
        if found is None or who is None:
            return None
        return LeaseHolder(who, int(json.loads(found.data or b"")["token"] or found.seq or 0))

    async def held(self, prefix: str) -> dict[str, LeaseHolder]:
        """Return the leases that are held, of names of letters, digits and hyphens with a prefix."""
        subjects = f"$KV.{self._bucket}.>"
        info = await self._broker.stream_info(self._stream, subjects=subjects)
        names = (subject.rpartition(".")[2] for subject in info.state.subjects or ())
        found = {name: await self.holder(name) for name in sorted(names) if name.startswith(prefix)}
        return {name: holder for name, holder in found.items() if holder is not None}

    def is_good(self, lease: Lease) -> bool:
        """Tell whether something may still be begun under a lease."""
        return self._clock() < lease.good_until

    def _good_until(self, asked_at: float) -> float:
        return asked_at + self.ttl_s * (1 - _MARGIN)

    def _subject(self, name: str) -> str:
        return f"$KV.{self._bucket}.{name_token(name)}"

    async def _put(self, name: str, holder: str, *, token: int, expected: int) -> int:
        # Of a lease just taken the token is the revision, which is not known before.
        value = json.dumps({"holder": holder, "token": token}).encode()
        return await self._send(name, value, expected, {})

    async def _send(self, name: str, value: bytes, expected: int, headers: dict[str, str]) -> int:
        return await self._broker.send(
            self._stream,
            self._subject(name),
            value,
            message_id=secrets.token_hex(16),
            expected_last=expected,
            headers=headers,
            deadline=time.monotonic() + self.ttl_s * _PATIENCE,
        )


def _holder_of(message: RawStreamMsg) -> str | None:
    """Return who wrote a key; None where it is the mark of a lease that was given back."""
    if not message.data or (message.headers or {}).get(_OPERATION) == _DELETED:
        return None
    return str(json.loads(message.data)["holder"])
