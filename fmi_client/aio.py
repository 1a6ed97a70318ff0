"""AsyncFMIClient: the whole contract for asyncio."""

from __future__ import annotations

import asyncio
import functools
import time
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeAlias, TypeVar

from fmi.plain import DEFAULT_COHORT
from fmi.v1 import (
    cohort_pb2,
    interchange_service_pb2,
    packet_pb2,
    registry_service_pb2,
    update_pb2,
)
from fmi_client._arguments import check_kind, check_whole
from fmi_client._calls import Caller
from fmi_client._channel import TLSConfig
from fmi_client._emit_stream import BATCH_BYTES, BATCH_PACKETS, BatchSender
from fmi_client._outbox_sender import FLUSH_S, OutboxSender
from fmi_client._privacy_gate import check_dry_run, check_question
from fmi_client.admin import AsyncAdmin
from fmi_client.applied import UNKNOWN, apply_failure, send_report
from fmi_client.emitter import (
    FMIEmitter,
    HeaderDefaults,
    Numbers,
    ProvenanceLike,
    provenance_from_plain,
)
from fmi_client.encoder import FMIEncoder
from fmi_client.errors import (
    ConfigurationError,
    FMIError,
    PacketRefusedError,
    ProtocolError,
)
from fmi_client.kinds import KindLike, update_kind
from fmi_client.local_privacy import LocalPrivacy
from fmi_client.outages import OnState
from fmi_client.outbox import Outbox
from fmi_client.receipts import Receipt, ValidationReport
from fmi_client.retry import RetryPolicy
from fmi_client.subscription import SILENCE_S, OnCompacted, OnUpdate, Subscription

__all__ = ["AsyncFMIClient", "Mode", "PacketLike", "Start"]

PacketLike: TypeAlias = packet_pb2.Packet | Mapping[str, Any]
"""A typed packet, which is sent as it is, or plain data, whose header is completed."""

Mode: TypeAlias = Literal["latest", "every"]

Start: TypeAlias = (
    Mapping[tuple[str, KindLike], int] | Iterable[interchange_service_pb2.StartRevision]
)
"""Where to start: the first revision wanted by ``(cohort, kind)``."""

_MODES: Final[dict[str, interchange_service_pb2.DeliveryMode.ValueType]] = {
    "latest": interchange_service_pb2.DELIVERY_MODE_LATEST,
    "every": interchange_service_pb2.DELIVERY_MODE_EVERY,
}
_DEFAULT_RETRY: Final = RetryPolicy()
_T = TypeVar("_T")


class AsyncFMIClient:
    """A connection to an FMI server, for asyncio.

    It connects on the first call and belongs to the event loop of that call. Use it as an asynchronous
    context manager, or call `aclose`. Every method raises `FMIError`s and nothing of gRPC.

    Args:
        target: Where the server is, for example ``fmi.example.org:50061``.
        domain_id: The site; needed by the `emit_*` methods that build packets.
        cohort: The cohort that packets are for.
        profile_class: The class of learner or site; empty means the class ``default``.
        schema_hash: Hash of the cohort spec that the site was built against; empty means unsaid.
        provenance: Where packets come from, typed or as a mapping.
        tls: How the connection is secured. None means plain text.
        token: A bearer token, or the `Path` of a file that has it, which is read again when it changes.
            Without TLS it is refused for targets beyond this machine.
        insecure: Send the token in plain text all the same.
        retry: When to try again.
        timeout_s: Seconds that one attempt of a call, or the answer to one batch, may take.
        encoder: How packets are packed. With one that has a dictionary, single packets are packed
            too; batches always are.
        outbox: Where packets wait for the server. With one, `emit` and its like return as soon as the
            packet is in it, with a receipt that says ``spooled``; it is sent in the background, in
            order. None means that they return when the server has answered. It is the client's own
            from then on, and closed with it.
        privacy: Adds noise to every packet that does not declare privacy already, before anything else is
            done with it, and declares it. What is sent again is what was sent before; what waits in the
            outbox from an earlier process is sent as it was put there.
        clock: Unix time in seconds, for packets that are built here.

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
        self._caller = Caller(
            target, tls=tls, token=token, insecure=insecure, retry=retry, timeout_s=timeout_s
        )
        self._defaults = HeaderDefaults(
            domain_id=domain_id,
            cohort=cohort,
            profile_class=profile_class,
            schema_hash=schema_hash,
            provenance=provenance_from_plain(provenance),
            privacy=privacy,
            clock=clock,
        )
        check_kind("encoder", encoder, FMIEncoder, optional=True)
        check_kind("outbox", outbox, Outbox, optional=True)
        self._encoder = encoder or FMIEncoder()
        self._subscriptions: weakref.WeakSet[Subscription] = weakref.WeakSet()
        self._sender = None if outbox is None else OutboxSender(outbox, self._caller, self._encoder)

    @property
    def target(self) -> str:
        """Where the server is."""
        return self._caller.target

    @property
    def outbox(self) -> Outbox:
        """Where packets wait for the server, with its `statistics` and what was `refused`.

        Raises:
            ConfigurationError: The client was made without one.
        """
        return self._outbox_sender().outbox

    @cached_property
    def emitter(self) -> FMIEmitter:
        """Builds this site's packets.

        Raises:
            ConfigurationError: The client was made without `domain_id`.
        """
        defaults = self._defaults
        if defaults.domain_id is None:
            raise ConfigurationError("give the client a domain_id, so that it can build packets")
        return FMIEmitter(
            defaults.domain_id,
            cohort=defaults.cohort,
            profile_class=defaults.profile_class,
            schema_hash=defaults.schema_hash,
            provenance=defaults.provenance,
            privacy=defaults.privacy,
            clock=defaults.clock,
        )

    @property
    def admin(self) -> AsyncAdmin:
        """The operator's calls: cohorts, sites, quarantine, releases and dictionaries. See `AsyncAdmin`.

        ``await client.admin.list_cohorts()`` says what the server holds.
        """
        return AsyncAdmin(self._caller)

    async def emit(self, packet: PacketLike) -> Receipt:
        """Send one packet; return when it is durable, or with an outbox, when that has it.

        Attempts that fail, or get no answer in time, are repeated with the same packet id, so that it
        counts once. Where they are used up the error has the packet: ``emit(error.packet)`` later is
        safe too, while the same plain data, or `emit_pop` again, is another packet and counts twice.

        Args:
            packet: A typed packet, which is sent as it is, or plain data, whose header is completed
                with a new packet id, the time, and what the client was made with.

        Raises:
            PacketRefusedError: The packet breaks rules; nothing was stored. With an outbox only the
                contract's rules are known by then; what the server refuses, the outbox tells.
            LocalPrivacyError: The client's `privacy` does not let it out; nothing was sent.
            OutboxError: The outbox is full, or its file cannot take the packet.
            FMIError: The server could not be reached, or refuses for another reason.
        """
        typed = await self._prepared(lambda: self._typed(packet))
        try:
            if self._sender is not None:
                return (await self._sender.put([typed]))[0]
            return await self._emit(typed)
        except FMIError as error:
            error.packet = typed
            raise

    async def _emit(self, typed: packet_pb2.Packet) -> Receipt:
        if self._encoder.dictionary_id:
            request = interchange_service_pb2.EmitRequest(encoded=self._encoder.encode([typed]))
        else:
            request = interchange_service_pb2.EmitRequest(packet=typed)
        response = await self._caller.call(
            self._caller.stubs().interchange.Emit, request, retry_late=True
        )
        if len(response.results) != 1:
            raise ProtocolError(f"the server gave {len(response.results)} results for one packet")
        return Receipt.from_result(response.results[0], typed.header.packet_id).raise_for_refused()

    async def emit_msp(
        self,
        metrics: Numbers | None = None,
        controller: Numbers | None = None,
        evaluator: Numbers | None = None,
        operators: Numbers | None = None,
        evidence: packet_pb2.Evidence | Mapping[str, Any] | None = None,
        window_span: packet_pb2.WindowSpan | Sequence[int] | Mapping[str, int] | None = None,
    ) -> Receipt:
        """Build a Meta Signal Pack as `FMIEmitter.emit_msp` does, and send it as `emit` does."""
        emitter = self.emitter
        return await self.emit(
            await self._prepared(
                lambda: emitter.emit_msp(
                    metrics, controller, evaluator, operators, evidence, window_span
                )
            )
        )

    async def emit_pop(
        self,
        bundle: Mapping[str, Any],
        before: Numbers,
        after: Numbers,
        windows: int = 1,
        confidence: float | None = None,
        control_delta: Numbers | None = None,
    ) -> Receipt:
        """Build a Policy Outcome Pack as `FMIEmitter.emit_pop` does, and send it as `emit` does."""
        emitter = self.emitter
        return await self.emit(
            await self._prepared(
                lambda: emitter.emit_pop(bundle, before, after, windows, confidence, control_delta)
            )
        )

    async def emit_ccs(
        self,
        causal_pairs: Iterable[Any] = (),
        concepts: Iterable[Any] = (),
        tested_nodes: Iterable[str] = (),
        stability_delta: float = 0.0,
        trust: float | None = None,
    ) -> Receipt:
        """Build a Concept Causal Summary as `FMIEmitter.emit_ccs` does, and send it as `emit` does."""
        emitter = self.emitter
        return await self.emit(
            await self._prepared(
                lambda: emitter.emit_ccs(
                    causal_pairs, concepts, tested_nodes, stability_delta, trust
                )
            )
        )

    async def emit_many(
        self,
        packets: Iterable[PacketLike] | AsyncIterable[PacketLike],
        *,
        batch_packets: int = BATCH_PACKETS,
        batch_bytes: int = BATCH_BYTES,
    ) -> list[Receipt]:
        """Send many packets in compressed batches over one stream; the fast way.

        With an outbox it returns when that has them; `batch_packets` are then written at a time.

        A stream that breaks goes on in a new one with the batches that were not answered; the packets
        of these that the server had taken already come back as ``duplicate``, which is a success.

        Args:
            packets: Typed packets or plain data, as in `emit`. They are taken as they are sent: a
                bounded number of batches is under way. A source that blocks should be asynchronous,
                since it is iterated in the event loop.
            batch_packets: The most packets in a batch.
            batch_bytes: The most bytes in a batch before compression.

        Returns:
            One receipt per packet, in their order. A refused packet does not harm the others: its
            receipt has the error; `Receipt.raise_for_refused` raises it. So it is with plain data that
            is no packet (its receipt has no id), with what the client's `privacy` does not let out, and
            with a packet that does not fit into a message.

        Raises:
            FMIError: A whole batch was refused, or the server could not be reached any more. Its
                `receipts` are the answers up to then, None where there is none, and its `unanswered`
                the packets without one: to send these again is safe.
        """
        check_whole("batch_packets", batch_packets)
        check_whole("batch_bytes", batch_bytes)
        if batch_packets < 1 or batch_bytes < 1:
            raise ConfigurationError("batch_packets and batch_bytes must be at least 1")
        if self._sender is not None:
            return await self._sender.put_many(self._typed_all(packets), batch_packets)
        sender = BatchSender(
            self._caller, self._encoder, batch_packets=batch_packets, batch_bytes=batch_bytes
        )
        return await sender.send(self._typed_all(packets))

    async def validate(self, packet: PacketLike) -> ValidationReport:
        """Let the server check a packet as `emit` would, and store nothing.

        Raises:
            PrivacyCoverageError: The client has `privacy`, and the packet declares none: the server would
                see it as it is. Check what ``client.emitter`` built; emitting that spends nothing more.
        """
        check_dry_run(self._defaults.privacy, packet)
        response = await self._caller.call(
            self._caller.stubs().registry.ValidatePacket,
            registry_service_pb2.ValidatePacketRequest(packet=self._typed(packet)),
        )
        return ValidationReport.from_response(response)

    def subscribe(
        self,
        cohorts: str | Iterable[str],
        kinds: KindLike | Iterable[KindLike] = (),
        *,
        mode: Mode = "latest",
        start: Start | None = None,
        resume_token: str | None = None,
        on_update: OnUpdate | None = None,
        on_state: OnState | None = None,
        on_compacted: OnCompacted = "raise",
        silence_s: float = SILENCE_S,
    ) -> Subscription:
        """Follow the updates of cohorts: what is there now, then everything new.

        Needs a running event loop; the stream opens when the first event is asked for.

        Args:
            cohorts: Names or patterns: `*` within a segment, `**` for any characters, `?` for one.
            kinds: ``prior``, ``warm_start``, ``policy_hint``, ``causal_consensus``, or values of
                `UpdateKind`. Empty means all.
            mode: ``latest`` leaves out updates that were overtaken while the consumer was slow;
                ``every`` gives each revision that is still kept.
            start: The first revision wanted by ``(cohort, kind)``; what is not named starts with the
                newest.
            resume_token: Where an earlier subscription was; not with `start`.
            on_update: Called with each update, in a task of the subscription; may be asynchronous.
                What it raises ends the subscription and comes out of `wait` and `aclose`.
            on_state: Called with a `ConnectionState` when the connection is lost, and when it is back and
                has held for some seconds, once each per outage. It runs in the event loop, so it must not
                block, and it is a plain function.
            on_compacted: What to do where the revisions to go on from are no longer kept: raise
                `CompactedError`, or begin again with the newest.
            silence_s: Seconds without any event after which the stream is opened again.

        Raises:
            InvalidFilterError: A kind is not known.
            ConfigurationError: The arguments contradict each other.
        """
        if mode not in _MODES:
            raise ConfigurationError(f"mode {mode!r} is not known; the modes are latest and every")
        if on_compacted not in ("raise", "snapshot"):
            raise ConfigurationError("on_compacted must be 'raise' or 'snapshot'")
        if start is not None and resume_token:
            raise ConfigurationError("give start or resume_token, not both")
        if isinstance(kinds, str | int):
            kinds = (kinds,)
        subscription = Subscription(
            self._caller,
            interchange_service_pb2.SubscribeRequest(
                cohorts=[cohorts] if isinstance(cohorts, str) else list(cohorts),
                kinds=[update_kind(kind) for kind in kinds],
                mode=_MODES[mode],
                start_revisions=_start_revisions(start),
                resume_token=resume_token or "",
                subscriber=self._defaults.domain_id or "",
            ),
            on_update=on_update,
            on_state=on_state,
            on_compacted=on_compacted,
            silence_s=silence_s,
        )
        self._subscriptions.add(subscription)
        return subscription

    async def get_update(self, cohort: str, kind: KindLike, revision: int = 0) -> update_pb2.Update:
        """Read one update: a revision, or the newest.

        Raises:
            UpdateNotFoundError: There is no such update (yet).
            CompactedError: The revision is no longer kept.
        """
        response = await self._caller.call(
            self._caller.stubs().interchange.GetUpdate,
            interchange_service_pb2.GetUpdateRequest(
                cohort=cohort, kind=update_kind(kind), revision=revision
            ),
        )
        return response.update

    async def get_warm_start(
        self,
        cohort: str | None = None,
        profile_class: str | None = None,
        regime: str | None = None,
        concepts: Mapping[str, float] | None = None,
    ) -> interchange_service_pb2.GetWarmStartResponse:
        """Read where to begin: by profile class and nearest regime.

        Args:
            cohort: The cohort; None means the client's.
            profile_class: The class of learner or site; None means the client's.
            regime: The regime that the site works in; None means that it is found by `concepts`.
            concepts: Scores of the concepts that the site sees, by id.

        Returns:
            ``profile.init`` has the initial parameters, ``profile.context_selector`` says how they
            were found, ``prior_revision`` the prior that they go with.

        Raises:
            PrivacyCoverageError: The client has `privacy`, and `concepts`, or a `regime` that is not
                public, would tell the server of the site's data; nothing was sent.
        """
        check_question(self._defaults.privacy, regime, concepts)
        return await self._caller.call(
            self._caller.stubs().interchange.GetWarmStart,
            interchange_service_pb2.GetWarmStartRequest(
                cohort=self._defaults.cohort if cohort is None else cohort,
                profile_class=(
                    self._defaults.profile_class if profile_class is None else profile_class
                ),
                regime_tag=regime or "",
                concepts={name: float(score) for name, score in (concepts or {}).items()},
            ),
        )

    async def contract(
        self, *, include_descriptors: bool = False
    ) -> registry_service_pb2.GetContractResponse:
        """Read the server's contract: revisions, hash, version, clock, and the descriptors if asked."""
        return await self._caller.call(
            self._caller.stubs().registry.GetContract,
            registry_service_pb2.GetContractRequest(include_descriptors=include_descriptors),
        )

    async def cohort_spec(
        self, name: str | None = None
    ) -> registry_service_pb2.GetCohortSpecResponse:
        """Read a cohort's spec and its `schema_hash`; None means the client's cohort.

        Raises:
            CohortUnknownError: There is no such cohort.
        """
        return await self._caller.call(
            self._caller.stubs().registry.GetCohortSpec,
            registry_service_pb2.GetCohortSpecRequest(
                cohort=self._defaults.cohort if name is None else name
            ),
        )

    async def cohort_specs(self) -> list[cohort_pb2.CohortSpec]:
        """Read the specs of all cohorts, in order of name."""
        response = await self._caller.call(
            self._caller.stubs().registry.ListCohortSpecs,
            registry_service_pb2.ListCohortSpecsRequest(),
        )
        return list(response.specs)

    async def dictionary(
        self, dictionary_id: int = 0
    ) -> registry_service_pb2.GetDictionaryResponse:
        """Read a compression dictionary, the newest for 0; its `data` is for `FMIEncoder`.

        Raises:
            NotFoundError: There is no such dictionary.
        """
        return await self._caller.call(
            self._caller.stubs().registry.GetDictionary,
            registry_service_pb2.GetDictionaryRequest(dictionary_id=dictionary_id),
        )

    async def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until the outbox is empty; say whether it is.

        An attempt is made at once, unless the server has asked for time.

        Args:
            timeout_s: The most seconds to wait; None means as long as it takes.

        Raises:
            ConfigurationError: The client was made without an outbox.
            OutboxCorruptError: Its file was found damaged, and nothing more is sent.
        """
        return await self._outbox_sender().flush(timeout_s)

    async def aclose(self, *, flush_s: float = FLUSH_S) -> None:
        """End the subscriptions and calls, and close the connection. Closing twice does nothing.

        Args:
            flush_s: The most seconds to wait for what is in the outbox. What is left stays in a
                `FileOutbox`; of an `Outbox` in memory it is lost, and the log says how much.
        """
        try:
            for subscription in list(self._subscriptions):
                await subscription.aclose()
        finally:
            try:
                if self._sender is not None:
                    await self._sender.aclose(flush_s)
            finally:
                await self._caller.aclose()

    async def __aenter__(self) -> Self:
        self._caller.check_open()
        if self._sender is not None:
            self._sender.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def _outbox_sender(self) -> OutboxSender:
        if self._sender is None:
            raise ConfigurationError("give the client an outbox, so that packets can wait in it")
        return self._sender

    def _typed(self, packet: PacketLike) -> packet_pb2.Packet:
        if isinstance(packet, packet_pb2.Packet):
            return self._defaults.private(packet)
        return self._defaults.packet(packet)

    async def _prepared(self, work: Callable[[], _T]) -> _T:
        """Do work on packets; in a thread where noise is drawn for it, and an account synced."""
        return work() if self._defaults.privacy is None else await asyncio.to_thread(work)

    async def _typed_all(
        self, packets: Iterable[PacketLike] | AsyncIterable[PacketLike]
    ) -> AsyncIterator[packet_pb2.Packet | PacketRefusedError]:
        if isinstance(packets, AsyncIterable):
            async for packet in packets:
                yield await self._prepared(functools.partial(self._typed_or_error, packet))
        else:
            for packet in packets:
                yield await self._prepared(functools.partial(self._typed_or_error, packet))

    def _typed_or_error(self, packet: PacketLike) -> packet_pb2.Packet | PacketRefusedError:
        try:
            return self._typed(packet)
        except PacketRefusedError as error:
            if isinstance(packet, packet_pb2.Packet):
                error.packet = packet
            return error

    async def report_applied(self, update: update_pb2.Update) -> bool:
        """Tell the server that an update was put to use (ACK), for its operator to see.

        The report is under the client's `domain_id`. It changes nothing of what is sent.

        Returns:
            Whether the server keeps the report; not where the update is of another history than the
            server's present one.

        Raises:
            ConfigurationError: The client was made without `domain_id`.
            UpdateNotFoundError: The server has not released such an update.
        """
        return await send_report(self._caller, self._defaults.domain_id, update, None)

    async def report_failed(
        self, update: update_pb2.Update, reason: object, *, code: int = UNKNOWN
    ) -> bool:
        """Tell the server that an update could not be put to use (NACK), for its operator to see.

        Args:
            update: The update.
            reason: Why: a text or an exception. It goes on one line, cut to 512 bytes.
            code: What went wrong, as a number of `google.rpc.Code`, from 1 to 16.

        Returns:
            As `report_applied`.

        Raises:
            ConfigurationError: The client was made without `domain_id`, or `code` is out of range.
            UpdateNotFoundError: The server has not released such an update.
        """
        failure = apply_failure(reason, code)
        return await send_report(self._caller, self._defaults.domain_id, update, failure)


def _start_revisions(start: Start | None) -> list[interchange_service_pb2.StartRevision]:
    if start is None:
        return []
    if not isinstance(start, Mapping):
        return list(start)
    return [
        interchange_service_pb2.StartRevision(
            cohort=cohort, kind=update_kind(kind), revision=revision
        )
        for (cohort, kind), revision in start.items()
    ]
