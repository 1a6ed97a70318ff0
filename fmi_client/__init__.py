"""The FMI client: emit what a site learned about learning, and follow what its cohort knows.

    from fmi_client import FMIClient

    with FMIClient("127.0.0.1:50061", domain_id="site_001", cohort="healthcare") as client:
        client.emit_msp(metrics={"gain_p50": 0.15}, controller={"tau": 0.9})
        for update in client.subscribe(["healthcare"], kinds=["prior"]):
            print(update.prior_update.prior)

`AsyncFMIClient` is the same for asyncio. `FMIEmitter` builds and checks packets without a network,
`LocalPrivacy` adds a site's own noise to them, `FMIEncoder` packs many of them into one envelope.
`consensus_to_graphml` and `consensus_to_dot` write what a cohort knows about causes as a graph.
"""

from __future__ import annotations

from fmi.plain import PacketType
from fmi_client import _import_grpc as _import_grpc  # first, before anything else imports gRPC
from fmi_client._channel import TLSConfig
from fmi_client.aio import AsyncFMIClient
from fmi_client.client import FMIClient
from fmi_client.emitter import FMIEmitter
from fmi_client.encoder import FMIEncoder
from fmi_client.errors import (
    AccessDeniedError,
    ClientClosedError,
    CohortRuleError,
    CohortUnknownError,
    CompactedError,
    ConfigurationError,
    ConnectionFailedError,
    ContractError,
    ContractRevisionError,
    DeadlineError,
    DictionaryUnknownError,
    EnvelopeError,
    FMIError,
    ForkedError,
    InvalidFilterError,
    LocalPrivacyError,
    NotFoundError,
    OutboxCorruptError,
    OutboxError,
    OutboxFullError,
    OutboxLockedError,
    OutboxUnavailableError,
    OverloadedError,
    PacketIdReusedError,
    PacketPolicyError,
    PacketRefusedError,
    PacketTooLargeError,
    PrivacyAccountError,
    PrivacyBudgetError,
    PrivacyBudgetExhaustedError,
    PrivacyCoverageError,
    ProtocolError,
    QuotaExceededError,
    ReleaseRefusedError,
    SchemaMismatchError,
    ServerDrainingError,
    ServerInternalError,
    SettingUnsupportedError,
    SpecChangeUnsafeError,
    SpecError,
    StoreCorruptError,
    StoreUnavailableError,
    SubscriptionError,
    SupersededError,
    TemporaryError,
    UpdateNotFoundError,
    Violation,
)
from fmi_client.graphs import consensus_to_dot, consensus_to_graphml
from fmi_client.local_privacy import LocalPrivacy, SignalBounds
from fmi_client.outbox import FileOutbox, Outbox
from fmi_client.receipts import Receipt
from fmi_client.retry import RetryPolicy
from fmi_client.subscription import Subscription

__all__ = [
    "AccessDeniedError",
    "AsyncFMIClient",
    "ClientClosedError",
    "CohortRuleError",
    "CohortUnknownError",
    "CompactedError",
    "ConfigurationError",
    "ConnectionFailedError",
    "ContractError",
    "ContractRevisionError",
    "DeadlineError",
    "DictionaryUnknownError",
    "EnvelopeError",
    "FMIClient",
    "FMIEmitter",
    "FMIEncoder",
    "FMIError",
    "FileOutbox",
    "ForkedError",
    "InvalidFilterError",
    "LocalPrivacy",
    "LocalPrivacyError",
    "NotFoundError",
    "Outbox",
    "OutboxCorruptError",
    "OutboxError",
    "OutboxFullError",
    "OutboxLockedError",
    "OutboxUnavailableError",
    "OverloadedError",
    "PacketIdReusedError",
    "PacketPolicyError",
    "PacketRefusedError",
    "PacketTooLargeError",
    "PacketType",
    "PrivacyAccountError",
    "PrivacyBudgetError",
    "PrivacyBudgetExhaustedError",
    "PrivacyCoverageError",
    "ProtocolError",
    "QuotaExceededError",
    "Receipt",
    "ReleaseRefusedError",
    "RetryPolicy",
    "SchemaMismatchError",
    "ServerDrainingError",
    "ServerInternalError",
    "SettingUnsupportedError",
    "SignalBounds",
    "SpecChangeUnsafeError",
    "SpecError",
    "StoreCorruptError",
    "StoreUnavailableError",
    "Subscription",
    "SubscriptionError",
    "SupersededError",
    "TLSConfig",
    "TemporaryError",
    "UpdateNotFoundError",
    "Violation",
    "consensus_to_dot",
    "consensus_to_graphml",
]
