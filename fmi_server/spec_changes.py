"""Changes of cohort specs: checked, stored, and then in force."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from google.protobuf.message import DecodeError

from fmi.v1 import cohort_pb2
from fmi_server.access import AccessRules
from fmi_server.cohorts import CohortRegistry, CohortRules, unsafe_change
from fmi_server.compaction import Compactor
from fmi_server.errors import ServerDrainingError, Violation
from fmi_server.releases import Releaser
from fmi_server.router import FMIRouter
from fmi_server.storage import Store
from fmi_server.storage.base import StoreCorruptError
from fmi_server.storage.records import CohortRecord
from fmi_server.telemetry import FMITelemetry

__all__ = ["SpecChanges", "stored_spec"]

_log = logging.getLogger(__name__)


def stored_spec(record: CohortRecord, location: str) -> cohort_pb2.CohortSpec:
    """Parse a spec as it comes back from the store.

    Args:
        record: The cohort.
        location: Where the store is, for the error.

    Raises:
        StoreCorruptError: It is none.
    """
    try:
        return cohort_pb2.CohortSpec.FromString(record.spec)
    except DecodeError:
        told = f"the spec of cohort {record.name!r} is not as it was stored; restore a backup"
        raise StoreCorruptError(path=location, detail=told) from None


class SpecChanges:
    """Puts specs in force, one change after the other.

    Args:
        store: Keeps the specs.
        cohorts: The cohorts and their rules.
        releaser: Counts a cohort anew where its packets say something else now.
        compactor: Rests meanwhile: it would judge by the rules of before.
        router: Lets subscriptions follow.
        telemetry: Counts cohorts.

    Attributes:
        unkept: Why a spec that another server stored cannot be kept here; None where all can. This server
            must not go on by the rules of before: who may see what may be what changed. It ends its
            subscriptions at once, and takes no calls (`require_kept`) until it is stopped.
    """

    def __init__(
        self,
        store: Store,
        cohorts: CohortRegistry,
        releaser: Releaser,
        *,
        compactor: Compactor,
        router: FMIRouter,
        telemetry: FMITelemetry,
    ) -> None:
        self._store = store
        self._cohorts = cohorts
        self._releaser = releaser
        self._compactor = compactor
        self._router = router
        self._telemetry = telemetry
        self._turn = asyncio.Lock()
        self._stuck = asyncio.Event()
        self.unkept: Exception | None = None

    def check(self, spec: cohort_pb2.CohortSpec, *, force: bool) -> tuple[CohortRules, bool]:
        """Check a spec; return the rules that it would make, and whether it changes anything.

        Raises:
            SpecInvalidError: The spec breaks rules.
            SpecChangeUnsafeError: The change would break sites, or promises a budget that is overspent
                already, and `force` was not said.
            SettingUnsupportedError: It asks for what this version does not have.
        """
        rules, changed = self._cohorts.check(spec, force=True)
        if not force and (unsafe := self.unsafe_changes(rules)):
            raise unsafe_change(unsafe)
        return rules, changed

    def unsafe_changes(self, rules: CohortRules) -> list[Violation]:
        """List what rules would change that breaks sites, or promise that is broken already."""
        overspent = self._overspent(rules)
        return [*self._cohorts.unsafe_changes(rules), *([overspent] if overspent else [])]

    def _overspent(self, rules: CohortRules) -> Violation | None:
        """Tell where rules promise anew a budget that is spent, and more than it."""
        if rules.schema_hash == self._declared_hash(rules.name):
            return None  # who may do what promises no budget
        return self._releaser.private.overspent(rules)

    async def put(self, spec: cohort_pb2.CohortSpec, *, force: bool) -> tuple[CohortRules, bool]:
        """Store a spec and put it in force; see `check`.

        Raises:
            SpecChangedError: Another server changed the spec meanwhile, so that it was checked against what
                is no longer in force. `put_stored` puts that in force, and must not be kept waiting.
            StoreError: It could not be stored; what was in force is.
        """
        async with self._turn:  # what is checked is what is stored and declared
            rules, changed = self.check(spec, force=force)
            if not changed:
                return rules, changed
            known = self._declared_hash(rules.name)
            overspent = self._overspent(rules)
            async with self._compactor.suspended(rules.name):
                # Stored before it is in force: a crash in between changes nothing that anybody saw.
                await self._store.put_cohort(
                    rules.name,
                    self._to_store(rules),
                    1,
                    holds=lambda: not self._releaser.spec_waits(rules.name),
                )
                self._put_in_force(rules)
                # Who may do what changes nothing of what the cohort's packets say.
                if known != rules.schema_hash:
                    await self._releaser.rebuild(rules.name)
        if overspent is not None:
            _log.warning("cohort %s was changed by force: %s", rules.name, overspent)
        _log.info("cohort %s is declared, schema hash %s", rules.name, rules.schema_hash)
        return rules, changed

    async def stuck(self) -> None:
        """Wait until there is a spec that cannot be kept."""
        await self._stuck.wait()

    def require_kept(self) -> None:
        """Refuse a call where there is a spec that cannot be kept: it might be shown what is closed.

        Raises:
            ServerDrainingError: There is one; another server can be asked.
        """
        if self.unkept is not None:
            raise ServerDrainingError

    async def put_stored(self, name: str) -> None:
        """Put the spec of a cohort in force that another server stored.

        Raises:
            SpecInvalidError: It breaks the rules of this version.
            SettingUnsupportedError: It asks for what this server does not have.
            StoreCorruptError: It cannot be read.
        """
        async with self._turn:
            stored = next((one for one in await self._store.cohorts() if one.name == name), None)
            if stored is None:
                return
            try:
                spec = stored_spec(stored, self._store.location)
                rules, changed = self._cohorts.check(spec, force=True)
            except Exception as error:
                self.unkept = error
                self._router.drain()
                self._stuck.set()
                raise
            # Who may do what changes nothing of what the cohort's packets say, and does not wait for them.
            counts_anew = self._declared_hash(name) != rules.schema_hash
            async with contextlib.AsyncExitStack() as stack:
                if counts_anew and self._compactor.compacted(name):
                    # What was retired here meanwhile was judged by the rules of before.
                    await stack.enter_async_context(self._compactor.suspended(name))
                if changed:
                    self._put_in_force(rules)
                if counts_anew:
                    await self._releaser.rebuild(name)

    def _to_store(self, rules: CohortRules) -> bytes:
        """Write a spec for the store.

        A server that authenticates says so: without lists nobody but operators may do anything in a cohort,
        and one that shares the store and authenticates nobody would let everybody.
        """
        spec = cohort_pb2.CohortSpec()
        spec.CopyFrom(rules.spec)
        if self._store.shared and self._cohorts.authenticated:
            spec.access.SetInParent()
        return spec.SerializeToString()

    def _put_in_force(self, rules: CohortRules) -> None:
        """Put the rules of a spec in force that is stored, and let subscriptions follow."""
        before = self._cohorts.access(rules.name) or AccessRules()
        self._cohorts.put_in_force(rules)
        log = self._releaser.publisher.log
        self._router.access_changed(rules.name, before, rules.access, log)
        self._telemetry.cohorts(len(self._cohorts))

    def _declared_hash(self, name: str) -> str:
        """Return the schema hash of a cohort that is declared; empty where it is not."""
        rules = self._cohorts.rules(name) if name in self._cohorts else None
        return rules.schema_hash if rules is not None and rules.declared else ""
