"""FMIContractRegistry: the packet types, their rules, and their translation from plain data.

The contract itself is the .proto files and the rules beside them (`fmi.rules`); the registry is the
server's way to both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

from fmi.descriptors import CONTRACT_FILES, contract_hash, descriptor_set
from fmi.plain import (
    CURRENT_REVISION,
    OLDEST_REVISION,
    PacketType,
    PlainDataError,
    Problem,
    packet_from_plain,
)
from fmi.rules import ContractRules, without_follow_ups
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
    "ConceptCausalSummary",
    "FMIContractRegistry",
    "MetaSignalPack",
    "PacketStatus",
    "PacketType",
    "PolicyOutcomePack",
]

MetaSignalPack = packet_pb2.MetaSignalPack
PolicyOutcomePack = packet_pb2.PolicyOutcomePack
ConceptCausalSummary = packet_pb2.ConceptCausalSummary

PacketStatus = Literal["accepted", "duplicate", "quarantined", "refused"]
"""What became of a packet."""


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
        self._rules = ContractRules()
        self.contract_hash: Final[str] = contract_hash()
        self._messages: dict[str, Descriptor] = {
            message.full_name: message
            for file in CONTRACT_FILES
            for message in file.message_types_by_name.values()
        }
        for kind in PacketType:
            packet = packet_pb2.Packet()
            getattr(packet, kind.value).SetInParent()
            self._rules.problems(packet)  # compiles the rules before the first call

    def validate(
        self, packet_dict: Mapping[str, Any] | packet_pb2.Packet
    ) -> tuple[bool, list[str]]:
        """Say whether a packet keeps the contract, and which required fields it does not have.

        Args:
            packet_dict: A packet as plain data in any form that `coerce` takes, or typed.

        Returns:
            `(is_valid, missing)`. Where it is not clear which type of packet it is, `missing` has
            ``type`` and what packets of every type must have. A packet can be invalid with nothing
            missing, where a field is there but wrong: what `coerce` raises and `violations` tell of those
            too.
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
            PacketRefusedError: A field is unknown or of the wrong kind, or the packet type is not clear. It
                tells the rules too that the rest breaks.
        """
        if isinstance(packet_dict, packet_pb2.Packet):
            return packet_dict
        try:
            return packet_from_plain(packet_dict)
        except PlainDataError as error:
            raise PacketRefusedError(self._plain_violations(error)) from error

    def _plain_violations(self, error: PlainDataError) -> list[Violation]:
        """Tell what could not be translated, and the rules that what could be breaks by itself."""
        found = _violations(error.problems)
        if error.packet is not None:
            found += without_follow_ups(self.violations(error.packet), error.problems)
        return found

    def violations(self, packet: packet_pb2.Packet, *, at_once: bool = False) -> list[Violation]:
        """List every rule of the contract that a packet breaks, at most `fmi.rules.MAX_PROBLEMS`.

        Args:
            packet: The packet.
            at_once: Whether nothing that takes long may be done.

        Raises:
            LongToTellError: There are some, and they were to be told at once.
        """
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
        return _violations(self._rules.packet_problems(packet, at_once=at_once))

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
        problems = self._rules.problems(request)
        found = [p for p in problems if not (skip and p.field.startswith(skip))]
        if found:
            raise RequestInvalidError(_violations(found), reason)

    def message_violations(self, message: Message) -> list[Violation]:
        """List every rule of the contract that a message other than a packet breaks."""
        return _violations(self._rules.problems(message))

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


_REQUIRED: Final = "required"
_MISSING_RULES: Final = frozenset(
    {_REQUIRED, "map.min_pairs", "fmi.msp.no_signal", "fmi.ccs.empty", "fmi.plain.packet_type"}
)


def _violations(problems: Iterable[Problem]) -> list[Violation]:
    return [Violation(p.field, p.rule_id, p.description) for p in problems]
