"""The FMI federation server.

Start at `fmi_server.service`: `FMIService` is the map of the system.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmi.plain import PacketType
    from fmi.v1.packet_pb2 import (
        ConceptCausalSummary,
        MetaSignalPack,
        Packet,
        PolicyOutcomePack,
    )
    from fmi.v1.update_pb2 import (
        CausalConsensus,
        MetaPolicyHint,
        MetaPriorUpdate,
        Update,
        WarmStartProfile,
    )
    from fmi_server.aggregator import AggregationResult, FMIAggregator
    from fmi_server.bus import FederationBusAdapter, InProcessBus
    from fmi_server.config import AggregationConfig, RouterConfig, ServerSettings
    from fmi_server.contracts import FMIContractRegistry
    from fmi_server.errors import FMIError, Violation
    from fmi_server.router import FMIRouter
    from fmi_server.service import FMIService
    from fmi_server.telemetry import FMITelemetry
    from fmi_server.validator import FMIValidator
    from fmi_server.version import VERSION as __version__  # noqa: N811 - it is one, by another name

__all__ = [
    "AggregationConfig",
    "AggregationResult",
    "CausalConsensus",
    "ConceptCausalSummary",
    "FMIAggregator",
    "FMIContractRegistry",
    "FMIError",
    "FMIRouter",
    "FMIService",
    "FMITelemetry",
    "FMIValidator",
    "FederationBusAdapter",
    "InProcessBus",
    "MetaPolicyHint",
    "MetaPriorUpdate",
    "MetaSignalPack",
    "Packet",
    "PacketType",
    "PolicyOutcomePack",
    "RouterConfig",
    "ServerSettings",
    "Update",
    "Violation",
    "WarmStartProfile",
    "__version__",
]

_HOMES = {
    "AggregationConfig": "fmi_server.config",
    "AggregationResult": "fmi_server.aggregator",
    "CausalConsensus": "fmi.v1.update_pb2",
    "ConceptCausalSummary": "fmi.v1.packet_pb2",
    "FMIAggregator": "fmi_server.aggregator",
    "FMIContractRegistry": "fmi_server.contracts",
    "FMIError": "fmi_server.errors",
    "FMIRouter": "fmi_server.router",
    "FMIService": "fmi_server.service",
    "FMITelemetry": "fmi_server.telemetry",
    "FMIValidator": "fmi_server.validator",
    "FederationBusAdapter": "fmi_server.bus",
    "InProcessBus": "fmi_server.bus",
    "MetaPolicyHint": "fmi.v1.update_pb2",
    "MetaPriorUpdate": "fmi.v1.update_pb2",
    "MetaSignalPack": "fmi.v1.packet_pb2",
    "Packet": "fmi.v1.packet_pb2",
    "PacketType": "fmi.plain",
    "PolicyOutcomePack": "fmi.v1.packet_pb2",
    "RouterConfig": "fmi_server.config",
    "ServerSettings": "fmi_server.config",
    "Update": "fmi.v1.update_pb2",
    "Violation": "fmi_server.errors",
    "WarmStartProfile": "fmi.v1.update_pb2",
}


def __getattr__(
    name: str,
) -> Any:  # the type is that of the name, which TYPE_CHECKING imports above
    """Import a public name when it is first asked for.

    So `fmi-server --help` is quick, and a base install, which has no numpy, gets one clear line from the
    command and not an import error from this package.
    """
    if name == "__version__":
        return importlib.import_module("fmi_server.version").VERSION
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
