"""The contract's rules, checked before anything is sent; `fmi.rules` has them."""

from __future__ import annotations

import functools

from fmi.rules import ContractRules
from fmi.v1 import packet_pb2
from fmi_client.errors import Violation, error_from_violations

__all__ = ["check_packet", "packet_violations"]


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


@functools.cache
def _rules() -> ContractRules:
    return ContractRules()
