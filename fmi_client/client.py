"""FMIClient: the same client for programs without asyncio.

It runs an `AsyncFMIClient` on an event loop in a thread of its own, so that there is one implementation
of retries and of resuming.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import (
    AsyncIterator,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from fmi.plain import DEFAULT_COHORT
from fmi.v1 import (
    cohort_pb2,
    interchange_service_pb2,
    packet_pb2,
    registry_service_pb2,
    update_pb2,
)
from fmi_client._channel import TLSConfig
from fmi_client._emit_stream import BATCH_BYTES, BATCH_PACKETS
from fmi_client._loop_thread import LoopThread
from fmi_client._outbox_sender import FLUSH_S
from fmi_client.admin import Admin
from fmi_client.aio import AsyncFMIClient, Mode, PacketLike, Start
from fmi_client.applied import UNKNOWN
from fmi_client.blocking_subscription import BlockingSubscription
from fmi_client.emitter import FMIEmitter, Numbers, ProvenanceLike
from fmi_client.encoder import FMIEncoder
from fmi_client.errors import ClientClosedError
from fmi_client.kinds import KindLike
from fmi_client.local_privacy import LocalPrivacy
from fmi_client.outages import OnState
from fmi_client.outbox import Outbox
from fmi_client.receipts import Receipt, ValidationReport
from fmi_client.retry import RetryPolicy
from fmi_client.subscription import SILENCE_S, OnCompacted, Subscription

__all__ = ["Admin", "BlockingSubscription", "FMIClient"]

_DEFAULT_RETRY: Final = RetryPolicy()


class FMIClient:
    """A connection to an FMI server, for any thread of a program without asyncio.

    Use it as a context manager, or call `close`; one that is dropped open is closed with a
    `ResourceWarning`, as files are. After a fork, the child makes its own. Every method raises
    `FMIError`s and nothing of gRPC; an interrupt (Ctrl-C) ends a wait at once.

    The arguments are those of `AsyncFMIClient`.

    Raises:
        ConfigurationError: The target is no address, or the settings contradict each other.
    """

    def __init__(  # noqa: PLR0913  settings, all but one by keyword
        self,
        target: str,
        *,
        domain_id: str | None = None,
        cohort: str = DEFAULT_COHORT,
        profile_class: str = "",
        schema_hash: str = "",
        provenance: ProvenanceLike | None = None,
        tls: TLSConfig | None = None,
        token: str | Path | None = None,
        insecure: bool = False,
        retry: RetryPolicy = _DEFAULT_RETRY,
        timeout_s: float = 10.0,
        encoder: FMIEncoder | None = None,
        outbox: Outbox | None = None,
        privacy: LocalPrivacy | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._aio = AsyncFMIClient(
            target,
            domain_id=domain_id,
            cohort=cohort,
            profile_class=profile_class,
            schema_hash=schema_hash,
            provenance=provenance,
            tls=tls,
            token=token,
            insecure=insecure,
            retry=retry,
            timeout_s=timeout_s,
            encoder=encoder,
            outbox=outbox,
            privacy=privacy,
            clock=clock,
        )
        self._thread = LoopThread(f"FMIClient to {target}", self._aio.aclose)
        if outbox is not None and len(outbox):
            self._start_sending()
        self._admin = Admin(self._aio.admin, self._thread)

    @property
    def admin(self) -> Admin:
        """The operator's calls: cohorts, sites, quarantine, releases and dictionaries. See `AsyncAdmin`.

        ``client.admin.list_cohorts()`` says what the server holds.
        """
        return self._admin

    @property
    def target(self) -> str:
        """Where the server is."""
        return self._aio.target

    @property
    def outbox(self) -> Outbox:
        """Where packets wait for the server, with its `statistics` and what was `refused`.

        Raises:
            ConfigurationError: The client was made without one.
        """
        return self._aio.outbox

    @property
    def emitter(self) -> FMIEmitter:
        """Builds this site's packets.

        Raises:
            ConfigurationError: The client was made without `domain_id`.
        """
        return self._aio.emitter

    def emit(self, packet: PacketLike) -> Receipt:
        """Send one packet; return when it is durable. See `AsyncFMIClient.emit`."""
        return self._thread.run(self._aio.emit(packet))

    def emit_msp(
        self,
        metrics: Numbers | None = None,
        controller: Numbers | None = None,
        evaluator: Numbers | None = None,
        operators: Numbers | None = None,
        evidence: packet_pb2.Evidence | Mapping[str, Any] | None = None,
        window_span: packet_pb2.WindowSpan | Sequence[int] | Mapping[str, int] | None = None,
    ) -> Receipt:
        """Build a Meta Signal Pack as `FMIEmitter.emit_msp` does, and send it as `emit` does."""
        return self.emit(
            self.emitter.emit_msp(metrics, controller, evaluator, operators, evidence, window_span)
        )

    def emit_pop(
        self,
        bundle: Mapping[str, Any],
        before: Numbers,
        after: Numbers,
        windows: int = 1,
        confidence: float | None = None,
        control_delta: Numbers | None = None,
    ) -> Receipt:
        """Build a Policy Outcome Pack as `FMIEmitter.emit_pop` does, and send it as `emit` does."""
        return self.emit(
            self.emitter.emit_pop(bundle, before, after, windows, confidence, control_delta)
        )

    def emit_ccs(
        self,
        causal_pairs: Iterable[Any] = (),
        concepts: Iterable[Any] = (),
        tested_nodes: Iterable[str] = (),
        stability_delta: float = 0.0,
        trust: float | None = None,
    ) -> Receipt:
        """Build a Concept Causal Summary as `FMIEmitter.emit_ccs` does, and send it as `emit` does."""
        return self.emit(
            self.emitter.emit_ccs(causal_pairs, concepts, tested_nodes, stability_delta, trust)
        )

    def emit_many(
        self,
        packets: Iterable[PacketLike],
        *,
        batch_packets: int = BATCH_PACKETS,
        batch_bytes: int = BATCH_BYTES,
    ) -> list[Receipt]:
        """Send many packets in compressed batches over one stream. See `AsyncFMIClient.emit_many`.

        `packets` is iterated in another thread, so that it may block and may use this client.
        """
        return self._thread.run(
            self._aio.emit_many(
                _from_thread(packets, max(1, batch_packets)),
                batch_packets=batch_packets,
                batch_bytes=batch_bytes,
            )
        )

    def validate(self, packet: PacketLike) -> ValidationReport:
        """Let the server check a packet as `emit` would. See `AsyncFMIClient.validate`."""
        return self._thread.run(self._aio.validate(packet))

    def subscribe(
        self,
        cohorts: str | Iterable[str],
        kinds: KindLike | Iterable[KindLike] = (),
        *,
        mode: Mode = "latest",
        start: Start | None = None,
        resume_token: str | None = None,
        on_update: Callable[[update_pb2.Update], None] | None = None,
        on_state: OnState | None = None,
        on_compacted: OnCompacted = "raise",
        silence_s: float = SILENCE_S,
    ) -> BlockingSubscription:
        """Follow the updates of cohorts. See `AsyncFMIClient.subscribe` for the arguments.

        `on_update` is called in a thread of the subscription; what it raises ends the subscription and
        comes out of `BlockingSubscription.wait` and `close`. `on_state` is called in the client's own
        thread, so it must not block or use the client.
        """

        async def open_there() -> Subscription:
            return self._aio.subscribe(
                cohorts,
                kinds,
                mode=mode,
                start=start,
                resume_token=resume_token,
                on_state=on_state,
                on_compacted=on_compacted,
                silence_s=silence_s,
            )

        return BlockingSubscription(self._thread, self._thread.run(open_there()), on_update)

    def get_update(self, cohort: str, kind: KindLike, revision: int = 0) -> update_pb2.Update:
        """Read one update: a revision, or the newest. See `AsyncFMIClient.get_update`."""
        return self._thread.run(self._aio.get_update(cohort, kind, revision))

    def get_warm_start(
        self,
        cohort: str | None = None,
        profile_class: str | None = None,
        regime: str | None = None,
        concepts: Mapping[str, float] | None = None,
    ) -> interchange_service_pb2.GetWarmStartResponse:
        """Read where to begin. See `AsyncFMIClient.get_warm_start`."""
        return self._thread.run(self._aio.get_warm_start(cohort, profile_class, regime, concepts))

    def contract(
        self, *, include_descriptors: bool = False
    ) -> registry_service_pb2.GetContractResponse:
        """Read the server's contract: revisions, hash, version, clock, and the descriptors if asked."""
        return self._thread.run(self._aio.contract(include_descriptors=include_descriptors))

    def cohort_spec(self, name: str | None = None) -> registry_service_pb2.GetCohortSpecResponse:
        """Read a cohort's spec and its `schema_hash`; None means the client's cohort."""
        return self._thread.run(self._aio.cohort_spec(name))

    def cohort_specs(self) -> list[cohort_pb2.CohortSpec]:
        """Read the specs of all cohorts, in order of name."""
        return self._thread.run(self._aio.cohort_specs())

    def dictionary(self, dictionary_id: int = 0) -> registry_service_pb2.GetDictionaryResponse:
        """Read a compression dictionary, the newest for 0."""
        return self._thread.run(self._aio.dictionary(dictionary_id))

    def report_applied(self, update: update_pb2.Update) -> bool:
        """Tell the server that an update was put to use. See `AsyncFMIClient.report_applied`."""
        return self._thread.run(self._aio.report_applied(update))

    def report_failed(
        self, update: update_pb2.Update, reason: object, *, code: int = UNKNOWN
    ) -> bool:
        """Tell the server that an update could not be put to use. See `AsyncFMIClient.report_failed`."""
        return self._thread.run(self._aio.report_failed(update, reason, code=code))

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until the outbox is empty; say whether it is. See `AsyncFMIClient.flush`."""
        return self._thread.run(self._aio.flush(timeout_s))

    def close(self, *, flush_s: float = FLUSH_S) -> None:
        """End the subscriptions and calls, and close the connection. Closing twice does nothing.

        Args:
            flush_s: The most seconds to wait for what is in the outbox. See `AsyncFMIClient.aclose`.
        """
        try:
            with suppress(ClientClosedError):
                self._thread.run(self._aio.aclose(flush_s=flush_s))
        finally:
            self._thread.close()

    def __enter__(self) -> Self:
        self._thread.check_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start_sending(self) -> None:
        """Send what an earlier process left, though nothing is emitted."""
        try:
            self._thread.run(self._aio.__aenter__())
        except BaseException:
            self.close(flush_s=0)
            raise


async def _from_thread(packets: Iterable[PacketLike], chunk: int) -> AsyncIterator[PacketLike]:
    source = iter(packets)
    while taken := await asyncio.to_thread(lambda: list(itertools.islice(source, chunk))):
        for packet in taken:
            yield packet
