"""What became of packets: the answers of the server as small values."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Self

from fmi.v1 import interchange_service_pb2, registry_service_pb2
from fmi_client._translation import error_from_refusal
from fmi_client.errors import FMIError, Violation

__all__ = ["EmitStatus", "Receipt", "ValidationReport", "raise_for_refused"]


class EmitStatus(StrEnum):
    """What became of a packet."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    QUARANTINED = "quarantined"
    REFUSED = "refused"
    SPOOLED = "spooled"


_STATUSES: Final = {
    interchange_service_pb2.EMIT_STATUS_ACCEPTED: EmitStatus.ACCEPTED,
    interchange_service_pb2.EMIT_STATUS_DUPLICATE: EmitStatus.DUPLICATE,
    interchange_service_pb2.EMIT_STATUS_QUARANTINED: EmitStatus.QUARANTINED,
    interchange_service_pb2.EMIT_STATUS_REFUSED: EmitStatus.REFUSED,
}


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of one packet.

    Attributes:
        packet_id: The packet's id.
        status: What became of it. ``duplicate`` is a success: the packet is durable and counts once;
            it is also what a packet gets that the SDK itself had to send again. ``spooled`` means that
            the outbox has it, and that what the server says of it is still to come.
        sequence: Its place among all packets of the server; None where the answer does not say (a
            batch's answer is short about packets of which nothing else is to be said).
        received_at: When the server first took it, in UTC; None where the answer does not say.
        warnings: What the site should look at although the packet was taken.
        error: Why it was refused or quarantined; None where it was not.
    """

    packet_id: str
    status: EmitStatus
    sequence: int | None = None
    received_at: dt.datetime | None = None
    warnings: tuple[str, ...] = ()
    error: FMIError | None = None

    @property
    def ok(self) -> bool:
        """Whether the packet is durable and counts."""
        return self.status in (EmitStatus.ACCEPTED, EmitStatus.DUPLICATE)

    @property
    def refused(self) -> bool:
        """Whether nothing of the packet was stored."""
        return self.status is EmitStatus.REFUSED

    def raise_for_refused(self) -> Self:
        """Return the receipt, or raise its error where the packet was refused."""
        if self.refused:
            raise self.error or FMIError(f"packet {self.packet_id} was refused without a reason")
        return self

    @classmethod
    def from_result(cls, result: interchange_service_pb2.EmitResult, packet_id: str) -> Receipt:
        """Read a result of the contract.

        Args:
            result: The server's answer.
            packet_id: The id that was sent, for an answer that could not read it.
        """
        refused = result.HasField("refusal")
        return cls(
            packet_id=result.packet_id or packet_id,
            status=_STATUSES.get(
                result.status, EmitStatus.REFUSED if refused else EmitStatus.ACCEPTED
            ),
            sequence=result.sequence or None,
            received_at=(
                result.received_at.ToDatetime(tzinfo=dt.UTC)
                if result.HasField("received_at")
                else None
            ),
            warnings=tuple(result.warnings),
            error=error_from_refusal(result.refusal) if refused else None,
        )


def raise_for_refused(receipts: Iterable[Receipt]) -> None:
    """Raise the first refusal among `receipts`, with a note on how many there are."""
    refused = [receipt for receipt in receipts if receipt.refused]
    if not refused:
        return
    error = refused[0].error or FMIError(f"packet {refused[0].packet_id} was refused")
    error.add_note(f"first of {len(refused)} refused; packet {refused[0].packet_id}")
    raise error


@dataclass(frozen=True, slots=True)
class ValidationReport:
    """What `Emit` would have answered, from a dry run.

    Attributes:
        valid: Whether the packet would be taken and count.
        quarantined: Whether it would be kept in quarantine.
        warnings: What the site should look at all the same.
        error: Why it would be refused or quarantined; None where it would not.
    """

    valid: bool
    quarantined: bool = False
    warnings: tuple[str, ...] = ()
    error: FMIError | None = None

    @property
    def violations(self) -> tuple[Violation, ...]:
        """Every rule that is broken."""
        return self.error.violations if self.error else ()

    @classmethod
    def from_response(cls, response: registry_service_pb2.ValidatePacketResponse) -> Self:
        """Read the answer to a dry run."""
        return cls(
            valid=response.valid,
            quarantined=response.quarantined,
            warnings=tuple(response.warnings),
            error=error_from_refusal(response.refusal) if response.HasField("refusal") else None,
        )
