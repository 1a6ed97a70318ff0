"""RegistryService: what may be said, and how."""

from __future__ import annotations

import time

from fmi.v1 import cohort_pb2, error_pb2
from fmi.v1 import registry_service_pb2 as wire_pb2
from fmi_server.errors import CohortUnknownError, PacketRefusedError
from fmi_server.service import FMIService
from fmi_server.transport.identity import Caller
from fmi_server.transport.requests import RawValidatePacketRequest
from fmi_server.transport.status import refusal_message

__all__ = ["RegistryServicer"]


class RegistryServicer:
    """Converts, calls the service, and converts back. Methods have the names of the contract's."""

    def __init__(self, service: FMIService, *, version: str) -> None:
        self._service = service
        self._version = version

    async def GetContract(
        self, request: wire_pb2.GetContractRequest, caller: Caller
    ) -> wire_pb2.GetContractResponse:
        """Read the contract."""
        del caller  # it is the same for all, and is read before anything else
        registry = self._service.registry
        response = wire_pb2.GetContractResponse(
            revision=registry.revision,
            oldest_supported_revision=registry.oldest_revision,
            contract_hash=registry.contract_hash,
            descriptors=registry.descriptor_set() if request.include_descriptors else b"",
            server_version=self._version,
        )
        response.server_time.FromNanoseconds(time.time_ns())
        return response

    async def GetCohortSpec(
        self, request: wire_pb2.GetCohortSpecRequest, caller: Caller
    ) -> wire_pb2.GetCohortSpecResponse:
        """Read the spec of a cohort."""
        self._service.registry.check_request(request)
        shown = self._service.gate.shows(caller.principal, request.cohort)
        # A cohort that could be opened is not there yet.
        if not shown or request.cohort not in self._service.cohorts:
            raise CohortUnknownError(request.cohort)
        rules = self._service.cohorts.rules(request.cohort)
        return wire_pb2.GetCohortSpecResponse(
            spec=_shown(rules.spec, caller), schema_hash=rules.schema_hash
        )

    async def ListCohortSpecs(
        self, request: wire_pb2.ListCohortSpecsRequest, caller: Caller
    ) -> wire_pb2.ListCohortSpecsResponse:
        """List the specs of all cohorts that the caller sees."""
        del request
        principal = caller.principal
        return wire_pb2.ListCohortSpecsResponse(
            specs=[
                _shown(rules.spec, caller)
                for rules in self._service.cohorts
                if self._service.gate.shows(principal, rules.name)
            ]
        )

    async def GetDictionary(
        self, request: wire_pb2.GetDictionaryRequest, caller: Caller
    ) -> wire_pb2.GetDictionaryResponse:
        """Read a compression dictionary."""
        del caller  # dictionaries belong to the server, not to a cohort
        dictionary_id, data = await self._service.dictionary(request.dictionary_id)
        return wire_pb2.GetDictionaryResponse(dictionary_id=dictionary_id, data=data)

    async def ValidatePacket(
        self, request: RawValidatePacketRequest, caller: Caller
    ) -> wire_pb2.ValidatePacketResponse:
        """Check a packet as Emit would."""
        if not request.HasField("packet"):
            self._service.registry.check_request(wire_pb2.ValidatePacketRequest())
        found = await self._service.inspect(request.packet, caller=caller.principal)
        response = wire_pb2.ValidatePacketResponse(
            valid=not found.violations and not found.quarantine_reason,
            quarantined=bool(found.quarantine_reason),
            warnings=found.warnings,
        )
        if found.violations:
            response.refusal.CopyFrom(refusal_message(PacketRefusedError(found.violations)))
        elif found.quarantine_reason:
            response.refusal.CopyFrom(error_pb2.Refusal(message=found.quarantine_reason))
        return response


def _shown(spec: cohort_pb2.CohortSpec, caller: Caller) -> cohort_pb2.CohortSpec:
    """Return what a caller may read of a spec: who else may do what is for operators."""
    if caller.principal.operator or caller.principal.unrestricted or not spec.HasField("access"):
        return spec
    shown = cohort_pb2.CohortSpec()
    shown.CopyFrom(spec)
    shown.ClearField("access")
    return shown
