"""FMIEmitter: packets from the state of a site's learner, checked at once, without a network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from fmi.plain import (
    CURRENT_REVISION,
    DEFAULT_COHORT,
    PacketType,
    PlainDataError,
    new_packet_id,
    packet_from_plain,
)
from fmi.v1 import packet_pb2
from fmi_client._arguments import check_kind
from fmi_client._contract import check_packet, plain_packet_error
from fmi_client._translation import error_from_plain_data
from fmi_client.errors import ConfigurationError
from fmi_client.local_privacy import LocalPrivacy

__all__ = [
    "FMIEmitter",
    "HeaderDefaults",
    "Numbers",
    "ProvenanceLike",
    "provenance_from_plain",
]

Numbers: TypeAlias = Mapping[str, Any]
"""Numbers by name; nested mappings are flattened with dots. Any `numbers.Real` will do, and so will
the scalars of numpy."""

ProvenanceLike: TypeAlias = packet_pb2.Provenance | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class HeaderDefaults:
    """What packets say about themselves where they do not say it on their own.

    Attributes:
        domain_id: The site; None where each packet names its own.
        cohort: The cohort.
        profile_class: The class of learner or site; empty means the class ``default``.
        schema_hash: Hash of the cohort spec that the site was built against; empty means unsaid.
        provenance: Where packets come from.
        privacy: Makes packets private that do not declare privacy already; None lets them say what they
            say.
        clock: Unix time in seconds.

    Raises:
        ConfigurationError: One is of a wrong type, or `provenance` declares for every packet what `privacy`
            is to see to.
    """

    domain_id: str | None = None
    cohort: str = DEFAULT_COHORT
    profile_class: str = ""
    schema_hash: str = ""
    provenance: packet_pb2.Provenance | None = None
    privacy: LocalPrivacy | None = None
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        check_kind("domain_id", self.domain_id, str, optional=True)
        for name in ("cohort", "profile_class", "schema_hash"):
            check_kind(name, getattr(self, name), str)
        check_kind("privacy", self.privacy, LocalPrivacy, optional=True)
        if not callable(self.clock):
            raise ConfigurationError("clock must be a function that returns Unix time in seconds")
        if (
            self.privacy is not None
            and self.provenance is not None
            and self.provenance.HasField("applied_privacy")
        ):
            raise ConfigurationError(
                "give privacy, or a provenance that declares applied_privacy, not both: packets that declare "
                "it are sent as they are"
            )

    def packet(self, data: Mapping[str, Any]) -> packet_pb2.Packet:
        """Translate plain data to a packet, fill in what its header does not have, and make it private.

        Raises:
            ContractError: A field cannot be translated; it tells the rules too that the rest breaks. Of
                data that can be translated the contract's rules are checked only where privacy is applied.
            FMIError: As `LocalPrivacy.apply`.
        """
        return self.private(self._translated(data))

    def private(self, packet: packet_pb2.Packet) -> packet_pb2.Packet:
        """Return what may leave the site of a packet.

        Raises:
            FMIError: As `LocalPrivacy.apply`.
        """
        return packet if self.privacy is None else self.privacy.apply(packet)

    def _translated(self, data: Mapping[str, Any]) -> packet_pb2.Packet:
        try:
            return self._filled(packet_from_plain(data))
        except PlainDataError as error:
            rest = self._filled(error.packet) if error.packet is not None else None
            raise plain_packet_error(error, rest) from error

    def _filled(self, packet: packet_pb2.Packet) -> packet_pb2.Packet:
        now = self.clock()
        header = packet.header
        header.packet_id = header.packet_id or new_packet_id(now_ms=int(now * 1000))
        header.domain_id = header.domain_id or self.domain_id or ""
        header.cohort = header.cohort or self.cohort
        header.profile_class = header.profile_class or self.profile_class
        header.rev = header.rev or CURRENT_REVISION
        header.schema_hash = header.schema_hash or self.schema_hash
        if not header.HasField("emitted_at"):
            header.emitted_at.FromMicroseconds(int(now * 1e6))
        if self.provenance is not None and not header.HasField("provenance"):
            header.provenance.CopyFrom(self.provenance)
        return packet


def provenance_from_plain(provenance: ProvenanceLike | None) -> packet_pb2.Provenance | None:
    """Translate where packets come from.

    Raises:
        ContractError: It cannot be translated.
    """
    if provenance is None:
        return None
    try:
        return packet_from_plain({"msp": {}, "provenance": provenance}).header.provenance
    except PlainDataError as error:
        raise error_from_plain_data(error) from error


class FMIEmitter:
    """Builds typed packets of one site and checks them against the contract.

    Every packet has an id of its own (UUIDv7) and the time at which it was made. Sending a packet again
    must keep both: send the same object.

    Args:
        domain_id: The site.
        cohort: The cohort that the packets are for.
        profile_class: The class of learner or site; empty means the class ``default``.
        schema_hash: Hash of the cohort spec that the site was built against; empty means unsaid.
        provenance: Where the packets come from, typed or as a mapping.
        privacy: Adds noise to every packet and declares it; each packet that is built spends of its budget,
            whether it is sent or not. Building raises what `LocalPrivacy.apply` does, too.
        clock: Unix time in seconds.

    Raises:
        ContractError: The provenance cannot be translated.
        ConfigurationError: An argument is of a wrong type, or the provenance declares privacy, and there is
            `privacy` too.
    """

    def __init__(
        self,
        domain_id: str,
        *,
        cohort: str = DEFAULT_COHORT,
        profile_class: str = "",
        schema_hash: str = "",
        provenance: ProvenanceLike | None = None,
        privacy: LocalPrivacy | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        check_kind("domain_id", domain_id, str)
        self.defaults = HeaderDefaults(
            domain_id=domain_id,
            cohort=cohort,
            profile_class=profile_class,
            schema_hash=schema_hash,
            provenance=provenance_from_plain(provenance),
            privacy=privacy,
            clock=clock,
        )

    @property
    def domain_id(self) -> str:
        """The site."""
        return self.defaults.domain_id or ""

    @property
    def cohort(self) -> str:
        """The cohort that the packets are for."""
        return self.defaults.cohort

    def emit_msp(
        self,
        metrics: Numbers | None = None,
        controller: Numbers | None = None,
        evaluator: Numbers | None = None,
        operators: Numbers | None = None,
        evidence: packet_pb2.Evidence | Mapping[str, Any] | None = None,
        window_span: packet_pb2.WindowSpan | Sequence[int] | Mapping[str, int] | None = None,
    ) -> packet_pb2.Packet:
        """Build a Meta Signal Pack: the state of the learner over a window.

        Args:
            metrics: Performance metrics by name.
            controller: Parameters of the controller by name.
            evaluator: Parameters of the evaluator by name.
            operators: States of operators by name.
            evidence: How sure the site is: ``{"confidence": 0.8, "samples": 900}`` for all signals,
                ``{"tau": {"stderr": 0.02}}`` for one, or both.
            window_span: The first and the last window that the packet covers.

        Raises:
            ContractError: Rules of the contract are broken; `violations` has all of them.
        """
        return self._built(
            PacketType.MSP,
            metrics=metrics,
            controller=controller,
            evaluator=evaluator,
            operators=operators,
            evidence=evidence,
            window_span=window_span,
        )

    def emit_pop(
        self,
        bundle: Mapping[str, Any],
        before: Numbers,
        after: Numbers,
        windows: int = 1,
        confidence: float | None = None,
        control_delta: Numbers | None = None,
    ) -> packet_pb2.Packet:
        """Build a Policy Outcome Pack: metrics before and after a policy change.

        Args:
            bundle: The parameters that the policy sets, by name: numbers, texts and flags.
            before: Metrics before the change, by name.
            after: Metrics after the change, by name.
            windows: Windows observed after the change; at least 1.
            confidence: Confidence in the outcome, in 0..1; None means 1.
            control_delta: What the metrics did over the same windows without the change.

        Raises:
            ContractError: Rules of the contract are broken; `violations` has all of them.
        """
        return self._built(
            PacketType.POP,
            bundle=bundle,
            before=before,
            after=after,
            windows=windows,
            confidence=confidence,
            control_delta=control_delta,
        )

    def emit_ccs(
        self,
        causal_pairs: Iterable[Any] = (),
        concepts: Iterable[Any] = (),
        tested_nodes: Iterable[str] = (),
        stability_delta: float = 0.0,
        trust: float | None = None,
    ) -> packet_pb2.Packet:
        """Build a Concept Causal Summary: the causal relations and concepts that the site found.

        Args:
            causal_pairs: ``(source, target, weight[, type[, stderr]])`` each, or mappings of the same.
            concepts: Mappings with ``id``, ``score`` and, if there are any, ``links``.
            tested_nodes: Every variable among which the site looked for relations.
            stability_delta: Change in the stability of the structure since the last summary.
            trust: The site's trust in its own summary, in 0..1; None means 1.

        Raises:
            ContractError: Rules of the contract are broken; `violations` has all of them.
        """
        return self._built(
            PacketType.CCS,
            causal_pairs=causal_pairs,
            concepts=concepts,
            tested_nodes=tested_nodes,
            stability_delta=stability_delta,
            trust=trust,
        )

    def emit_plain(self, data: Mapping[str, Any]) -> packet_pb2.Packet:
        """Build a packet from plain data in any form of `fmi.plain`; fill in what its header lacks.

        Raises:
            ContractError: The data cannot be translated, or breaks rules of the contract.
        """
        packet = self.defaults.packet(data)
        check_packet(packet)
        return packet

    def _built(self, kind: PacketType, **fields: Any) -> packet_pb2.Packet:
        given = {name: value for name, value in fields.items() if value is not None}
        return self.emit_plain({kind.value: given})
