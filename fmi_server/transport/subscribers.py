"""Subscribers and their reports, to and from the contract's messages."""

from __future__ import annotations

from fmi.v1 import admin_service_pb2, update_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server.applied import Applied, Failure, Report
from fmi_server.router import OpenSubscription

__all__ = ["applied_status", "report_from_message", "subscriber_status"]


def report_from_message(message: wire_pb2.ApplyReport) -> Report:
    """Read a report that keeps the contract's rules."""
    failure = message.failure
    return Report(
        key=(message.cohort, message.kind),
        revision=message.revision,
        history_epoch=message.history_epoch,
        failure=Failure(failure.code, failure.message) if message.HasField("failure") else None,
    )


def subscriber_status(subscription: OpenSubscription) -> admin_service_pb2.SubscriberStatus:
    """Write an open subscription. Its instance id stays out: who knows it could end the stream."""
    feed = subscription.feed
    request = feed.request
    status = admin_service_pb2.SubscriberStatus(
        subscriber=request.subscriber,
        cohorts=request.patterns,
        kinds=[_kind(kind) for kind in sorted(request.kinds)],
        mode=wire_pb2.DELIVERY_MODE_EVERY if request.every else wire_pb2.DELIVERY_MODE_LATEST,
        live=feed.live,
        behind=feed.behind,
        sent=feed.sent,
        conflated=feed.conflated,
    )
    status.connected_at.FromNanoseconds(subscription.opened_ns)
    return status


def applied_status(applied: Applied, newest_revision: int) -> admin_service_pb2.AppliedStatus:
    """Write what a subscriber reported."""
    cohort, kind = applied.key
    status = admin_service_pb2.AppliedStatus(
        subscriber=applied.subscriber,
        cohort=cohort,
        kind=_kind(kind),
        applied_revision=applied.applied_revision,
        newest_revision=newest_revision,
        failed_revision=applied.failed_revision,
    )
    if applied.applied_revision:
        status.applied_at.FromNanoseconds(applied.applied_at_ns)
    if applied.failure is not None:
        status.failed_at.FromNanoseconds(applied.failed_at_ns)
        status.failure.code = applied.failure.code
        status.failure.message = applied.failure.message
    return status


def _kind(kind: int) -> update_pb2.UpdateKind.ValueType:
    return update_pb2.UpdateKind.ValueType(kind)
