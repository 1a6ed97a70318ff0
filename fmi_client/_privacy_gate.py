"""What a client with local privacy does not show to the server outside of packets that it emits."""

from __future__ import annotations

from collections.abc import Mapping

from fmi.v1 import packet_pb2
from fmi_client.errors import PrivacyCoverageError
from fmi_client.local_privacy import LocalPrivacy, declares_privacy

__all__ = ["check_dry_run", "check_question"]


def check_dry_run(privacy: LocalPrivacy | None, packet: object) -> None:
    """Check that a dry run shows nothing: it must neither spend of the budget nor go round it.

    Raises:
        PrivacyCoverageError: The packet is not private yet.
    """
    if privacy is None or (isinstance(packet, packet_pb2.Packet) and declares_privacy(packet)):
        return
    raise PrivacyCoverageError(
        "the server would see this packet as it is: build it with the client's emitter, which makes it "
        "private, and check that"
    )


def check_question(
    privacy: LocalPrivacy | None, regime: str | None, concepts: Mapping[str, float] | None
) -> None:
    """Check that a question for a warm start has nothing in it that no packet may have.

    Raises:
        PrivacyCoverageError: It has.
    """
    if privacy is None:
        return
    if concepts:
        raise PrivacyCoverageError("concepts would tell the server of the site's data; ask without")
    if regime and not privacy.regime_is_public:
        raise PrivacyCoverageError(
            "a regime would tell the server of the site's data; ask without, or say in LocalPrivacy that it "
            "is public (regime_is_public)"
        )
