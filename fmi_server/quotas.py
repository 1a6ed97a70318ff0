"""Quotas: what one caller may take of the server, so that the others have what is theirs.

Calls, packets and bytes are rates with a burst: who was quiet may catch up on `BURST_S` seconds. A call is
admitted where nothing is owed from calls before, and may then owe for itself, so that no batch is too large
to be admitted ever; the next call waits until that is paid. It is the virtual scheduling of the generic cell
rate algorithm (ITU-T I.371, annex A), with the size of a call as its increment. What is open at once, and
the cohorts that somebody opened, are counted.

An account is whom a call is charged to: a name that credentials prove, or an address where the server
authenticates nobody. Calls without an account, which are the program's own and operators', are not charged.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass, fields, replace
from typing import ClassVar, Final

from fmi_server.errors import (
    DictionaryUnknownError,
    EnvelopeMalformedError,
    EnvelopeTooLargeError,
    QuotaExceededError,
)

__all__ = ["BURST_S", "Quota", "Quotas", "account_of_host"]

BURST_S: Final = 10.0
"""Seconds of a rate that may be caught up on."""

LONGEST_RETRY_S: Final = 300.0
"""The longest time that a caller is told to wait; what is owed stays owed."""

STALL_S: Final = 1.0
"""Seconds for which a refusal is held back at most, before it waits for its turn."""

LEAST_STALL_S: Final = 0.01
"""Seconds for which the first is held back at least."""

TURN_S: Final = 0.02
"""Seconds between two refusals of one account that were held back. Told all at once they would hold up
everybody else."""

MAX_STALLED: Final = 256
"""Refusals of one account that are held back at once, so that the last is told before a client gives up."""

MAX_ALL_STALLED: Final = 2048
"""The same of all accounts together: open calls are bounded over all callers."""

MAX_ACCOUNTS: Final = 65_536
"""Accounts that are kept, those that called last. Where they are addresses, anybody can make new ones."""

STREAM_RETRY_S: Final = 5.0
"""Seconds after which to try again where all streams are open."""

TELL_EVERY_S: Final = 60.0
"""Seconds between two log lines about one account."""

MAX_TOLD: Final = 60
"""Log lines about all accounts within that time; what is left out stands in the next line of its account."""

_RATES: Final = ("calls", "packets", "bytes")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Quota:
    """What one account may take. None leaves it to what holds for all, 0 is for no limit.

    Attributes:
        calls_per_s: Calls, whatever becomes of them.
        packets_per_s: Packets, whatever becomes of them.
        bytes_per_s: Bytes of packets, uncompressed.
        streams: EmitStream calls and subscriptions that are open at once.
        cohorts: Cohorts that its packets open.

    Raises:
        ValueError: One is negative or not finite.
    """

    # A misspelled one must not leave the caller with what holds for all.
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    calls_per_s: float | None = None
    packets_per_s: float | None = None
    bytes_per_s: float | None = None
    streams: int | None = None
    cohorts: int | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{one.name} must be a number from 0, not {value}")

    def over(self, others: Quota) -> Quota:
        """Return this quota, with what it leaves out as in another one."""
        given = {one.name: getattr(self, one.name) for one in fields(self)}
        return replace(
            others, **{name: value for name, value in given.items() if value is not None}
        )


def account_of_host(host: str) -> str:
    """Return the account of an address; an IPv6 network of 64 bits, which is what one host gets, is one.

    Raises:
        ValueError: It is no address, nor such a network.
    """
    address = ipaddress.ip_address(host.removesuffix("/64").partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address, 64), strict=False))


class _Account:
    """What an account took of the rates.

    Attributes:
        limits: By rate, what it may take per second.
        paid_until: By rate, the time until which what it took is paid for.
        in_a_row: By resource, refusals in a row; half of them where something is charged between them.
        refused: Calls that were refused since that was told.
        told_at: When it was told.
        turn: Is held by the refusal that is told next, of those that are held back.
        next_turn: The time from which on it may be told.
    """

    __slots__ = ("in_a_row", "limits", "next_turn", "paid_until", "refused", "told_at", "turn")

    def __init__(self, quota: Quota) -> None:
        rates = (quota.calls_per_s, quota.packets_per_s, quota.bytes_per_s)
        self.limits = {name: rate for name, rate in zip(_RATES, rates, strict=True) if rate}
        self.paid_until = dict.fromkeys(self.limits, -math.inf)
        self.in_a_row: Counter[str] = Counter()
        self.refused = 0
        self.told_at = -math.inf
        self.turn = asyncio.Lock()
        self.next_turn = -math.inf

    def owed_s(self, name: str, now: float) -> float:
        return self.paid_until.get(name, now) - now

    def charge(self, amounts: Mapping[str, int], now: float) -> None:
        for name, amount in amounts.items():
            self.in_a_row[name] //= 2
            if rate := self.limits.get(name):
                since = max(self.paid_until[name], now - BURST_S)
                self.paid_until[name] = since + amount / rate


class Quotas:
    """Keeps the accounts of callers.

    Args:
        quota: Of every account; by default there are no limits.
        exceptions: By account, quotas of those that have others.
        clock: Seconds that only rise.

    Attributes:
        limited: Whether any account has a limit. Where none has, nothing is kept of any.
    """

    def __init__(
        self,
        quota: Quota | None = None,
        exceptions: Mapping[str, Quota] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quota = quota or Quota()
        self._exceptions = {
            account: other.over(self._quota) for account, other in (exceptions or {}).items()
        }
        self.limited = any(
            any(astuple(quota)) for quota in (self._quota, *self._exceptions.values())
        )
        self._clock = clock
        self._accounts: OrderedDict[str, _Account] = OrderedDict()
        self._streams: Counter[str] = Counter()
        self._cohorts: Counter[str] = Counter()
        self._stalled: Counter[str] = Counter()
        self._told: deque[float] = deque(maxlen=MAX_TOLD)

    def of(self, account: str) -> Quota:
        """Return the quota of an account."""
        return self._exceptions.get(account, self._quota)

    def admit_call(self, account: str) -> None:
        """Admit a call, and charge it.

        Args:
            account: Who pays; empty for nobody, who is always admitted.

        Raises:
            QuotaExceededError: Calls are owed from before; nothing is charged.
        """
        self._admit(account, {"calls": 1})

    def admit_packets(self, account: str, packets: int, size: int) -> None:
        """Admit packets, and charge them.

        Args:
            account: Who pays; empty for nobody, who is always admitted.
            packets: How many; 0 where that is not known yet (`admit_counted`).
            size: Their bytes.

        Raises:
            QuotaExceededError: Packets or bytes are owed from before; nothing is charged.
        """
        self._admit(account, {"packets": packets, "bytes": size})

    def admit_counted(self, account: str, packets: int) -> None:
        """Admit packets whose number was not known when their bytes were admitted, and charge them.

        Many batches of one account may have been admitted meanwhile, and were not charged for either.

        Raises:
            QuotaExceededError: Packets are owed from before; the bytes stay charged.
        """
        self._admit(account, {"packets": packets})

    def charge(self, account: str, packets: int, size: int = 0) -> None:
        """Charge packets that are refused whatever is owed: they came in and were looked at."""
        if account and self.limited:
            amounts = {"packets": packets, "bytes": size}
            self._account(account).charge(amounts, self._clock())

    @contextlib.contextmanager
    def charging_refused(self, account: str) -> Iterator[None]:
        """Charge a batch that is refused as a whole the packets that were counted in it, and one at least."""
        try:
            yield
        except (EnvelopeMalformedError, EnvelopeTooLargeError) as error:
            self.charge(account, max(1, error.packets))
            raise
        except DictionaryUnknownError:
            self.charge(account, 1)
            raise

    def owed_s(self, account: str) -> float:
        """Return for how many seconds an account must wait before its packets are admitted again."""
        held = self._accounts.get(account)
        if held is None:
            return 0.0
        now = self._clock()
        return max(0.0, *(held.owed_s(name, now) for name in ("packets", "bytes")))

    async def stall(self, account: str, error: QuotaExceededError) -> QuotaExceededError:
        """Hold back a refusal: for the time that the call has to wait, for twice that the next, and so on.

        To refuse a call costs the server what it costs to serve it. Who calls again and again without waiting
        soon has as many calls open as its connection may have, and further ones do not get here. Of one
        account they are told one after the other, each in its turn. Who hangs up meanwhile has none.

        Returns:
            The refusal with the time that is left to wait.
        """
        if self._stalled[account] >= MAX_STALLED or self._stalled.total() >= MAX_ALL_STALLED:
            return error
        held, now = self._account(account), self._clock()
        again = held.in_a_row[error.resource] - 1
        first_s = max(error.retry_after_s, LEAST_STALL_S)
        due = now + min(first_s * 2.0 ** min(again, 32), STALL_S)
        self._stalled[account] += 1
        try:
            async with held.turn:
                at = max(due, held.next_turn)
                await asyncio.sleep(at - self._clock())
                held.next_turn = max(at, self._clock()) + TURN_S
        finally:
            self._stalled[account] -= 1
            if not self._stalled[account]:
                del self._stalled[account]
        if error.resource not in held.limits:  # what is open at once is no debt
            return error
        left_s = min(max(0.0, held.owed_s(error.resource, self._clock())), LONGEST_RETRY_S)
        return QuotaExceededError(error.resource, error.limit, retry_after_s=left_s)

    @contextlib.contextmanager
    def stream(self, account: str) -> Iterator[None]:
        """Hold one of the streams of an account.

        Raises:
            QuotaExceededError: It has as many as it may.
        """
        most = self.of(account).streams
        if account and most and self._streams[account] >= most:
            self._tell(account, "streams", self._clock())
            raise QuotaExceededError("streams", f"{most} at once", retry_after_s=STREAM_RETRY_S)
        self._streams[account] += 1
        try:
            yield
        finally:
            self._streams[account] -= 1
            if not self._streams[account]:
                del self._streams[account]

    def may_open(self, account: str) -> bool:
        """Say whether an account may open one more cohort."""
        most = self.of(account).cohorts
        return not account or not most or self._cohorts[account] < most

    def opened(self, account: str) -> None:
        """Charge a cohort that an account opened."""
        if account and self.of(account).cohorts:
            self._cohorts[account] += 1

    def _admit(self, account: str, amounts: Mapping[str, int]) -> None:
        if not account or not self.limited:
            return
        held, now = self._account(account), self._clock()
        for name in amounts:
            owed_s = held.owed_s(name, now)
            if owed_s > 0.0:
                self._tell(account, name, now)
                limit, wait_s = f"{held.limits[name]:g} per second", min(owed_s, LONGEST_RETRY_S)
                raise QuotaExceededError(name, limit, retry_after_s=wait_s)
        held.charge(amounts, now)

    def _account(self, account: str) -> _Account:
        held = self._accounts.get(account)
        if held is None:
            held = self._accounts[account] = _Account(self.of(account))
            if len(self._accounts) > MAX_ACCOUNTS:
                self._accounts.popitem(last=False)
        else:
            self._accounts.move_to_end(account)
        return held

    def _tell(self, account: str, resource: str, now: float) -> None:
        held = self._account(account)
        held.refused += 1
        held.in_a_row[resource] += 1
        told = self._told
        too_many = len(told) == MAX_TOLD and now - told[0] < TELL_EVERY_S
        if now - held.told_at >= TELL_EVERY_S and not too_many:
            told.append(now)
            _log.warning(
                "%s takes more than its quota of %s: %d refused", account, resource, held.refused
            )
            held.refused, held.told_at = 0, now
