"""The contract's rules, checked before anything is sent; `fmi.rules` has them."""

from __future__ import annotations

import functools

from fmi.plain import PlainDataError
from fmi.rules import ContractRules, without_follow_ups
from fmi.v1 import packet_pb2
from fmi_client._translation import error_from_plain_data, error_from_violations
from fmi_client.errors import ContractError, Violation

__all__ = ["check_packet", "packet_violations", "plain_packet_error"]


def check_packet(packet: packet_pb2.Packet) -> None:
    """Check a packet against the contract.

    Raises:
        ContractError: Rules are broken; `violations` has all of them.
    """
    if violations := packet_violations(packet):
        raise error_from_violations(violations, "packet")


def packet_violations(packet: packet_pb2.Packet) -> list[Violation]:
    """List every rule of the contract that a packet breaks."""
    return [
        Violation(problem.field, problem.rule_id, problem.description)
        for problem in _rules().packet_problems(packet)
    ]


def plain_packet_error(error: PlainDataError, packet: packet_pb2.Packet | None) -> ContractError:
    """Build the error for plain data that is no packet.

    Args:
        error: What could not be translated.
        packet: What could be; the rules that it breaks by itself are told too.
    """
    broken = [] if packet is None else packet_violations(packet)
    return error_from_plain_data(error, without_follow_ups(broken, error.problems))


@functools.cache
def _rules() -> ContractRules:
    return ContractRules()
