"""Budgets and ledgers of private cohorts as messages of the contract."""

from __future__ import annotations

from fmi.v1 import admin_service_pb2 as wire_pb2
from fmi_server.errors import LAST_MOMENT_S
from fmi_server.operations import PrivacyOverview
from fmi_server.privacy.budget import BudgetPlan, natural_sensitivity
from fmi_server.storage.records import SpendRecord

__all__ = ["budget_message", "plan_message", "spend_message"]


def plan_message(plan: BudgetPlan) -> wire_pb2.PrivacyPlan:
    """Tell a plan."""
    return wire_pb2.PrivacyPlan(
        epsilon=plan.epsilon,
        delta=plan.delta,
        epochs=plan.epochs,
        rho_per_release=plan.rho_per_release,
        noise_multiplier=plan.noise_multiplier,
        sensitivity=natural_sensitivity(plan.sums.signals, plan.sums.clip_norm),
    )


def budget_message(overview: PrivacyOverview) -> wire_pb2.PrivacyBudget:
    """Tell what a cohort spent and what is left."""
    account = overview.account
    message = wire_pb2.PrivacyBudget(
        cohort=overview.rules.name,
        releases=account.releases,
        rho_spent=account.rho_spent,
        epsilon_spent=account.epsilon_spent,
        releases_left=account.releases_left,
    )
    if overview.rules.privacy is not None:
        message.plan.CopyFrom(plan_message(overview.rules.privacy))
    if account.next_release_at is not None:
        # A period may be so long that the next begins past all dates.
        due = min(account.next_release_at, LAST_MOMENT_S)
        message.next_release_at.FromNanoseconds(round(due * 1e9))
    return message


def spend_message(spend: SpendRecord) -> wire_pb2.PrivacySpend:
    """Tell an entry of a ledger."""
    message = wire_pb2.PrivacySpend(
        number=spend.number, rho=spend.rho, history_epoch=spend.history_epoch
    )
    message.period_start.FromMicroseconds(spend.period)
    message.spent_at.FromMicroseconds(spend.spent_at_us)
    return message
