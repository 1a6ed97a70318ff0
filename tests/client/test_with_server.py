"""The SDK against the project's own server, from the first packet to the update at a subscriber."""

from __future__ import annotations

import asyncio

import pytest
from ports import lasting_address

from fmi.v1 import cohort_pb2
from fmi_client import (
    AsyncFMIClient,
    CohortRuleError,
    CohortUnknownError,
    ContractError,
    DictionaryUnknownError,
    FMIEmitter,
    FMIEncoder,
    LocalPrivacy,
    PacketIdReusedError,
    PacketPolicyError,
    PrivacyBudgetError,
    RetryPolicy,
    SpecChangeUnsafeError,
    SpecError,
    UpdateNotFoundError,
)
from fmi_client.receipts import EmitStatus
from fmi_server.testing import running_server

SITES = [f"site_{i:03}" for i in range(5)]
TAUS = [0.88, 0.90, 0.91, 0.92, 0.99]


def packets(cohort="care", shift=0.0):
    return [
        FMIEmitter(site, cohort=cohort).emit_msp(
            metrics={"gain_p50": 0.15}, controller={"tau": tau + shift}
        )
        for site, tau in zip(SITES, TAUS, strict=True)
    ]


@pytest.fixture
async def client():
    async with (
        running_server() as server,
        AsyncFMIClient(server.target, domain_id="site_001", cohort="care") as opened,
    ):
        yield opened


async def test_from_packets_to_the_update_at_a_subscriber(client):
    async with client.subscribe("care", "prior") as subscription:
        first = asyncio.create_task(anext(subscription))
        receipts = await client.emit_many(packets(), batch_packets=2)
        assert [receipt.status for receipt in receipts] == [EmitStatus.ACCEPTED] * 5
        update = await first
        while update.prior_update.estimates["tau"].sites < len(SITES):
            update = await anext(subscription)
    assert 0.90 <= update.prior_update.prior["tau"] <= 0.92
    assert await client.get_update("care", "prior", update.revision) == update
    warm = await client.get_warm_start()
    assert 0.90 <= warm.profile.init["tau"] <= 0.92


async def test_sending_again_is_a_duplicate_and_counts_once(client):
    batch = packets()
    await client.emit_many(batch)
    again = await client.emit_many(batch)
    assert [receipt.status for receipt in again] == [EmitStatus.DUPLICATE] * 5
    assert (await client.emit(batch[0])).status is EmitStatus.DUPLICATE
    (cohort,) = await client.admin.list_cohorts()
    assert (cohort.packets, cohort.sites) == (5, 5)
    changed = packets()[0]
    changed.header.packet_id = batch[0].header.packet_id
    with pytest.raises(PacketIdReusedError):
        await client.emit(changed)


async def test_the_server_finds_what_the_emitter_finds(client):
    with pytest.raises(ContractError) as here:
        client.emitter.emit_msp(metrics={"tau": 1}, controller={"tau": 2, "bad name": 3})
    spoilt = packets()[0]
    spoilt.msp.metrics.clear()
    spoilt.msp.metrics["tau"] = 1
    spoilt.msp.controller.clear()
    spoilt.msp.controller.update({"tau": 2, "bad name": 3})
    with pytest.raises(ContractError) as there:
        await client.emit(spoilt)
    assert {(v.field, v.rule_id) for v in here.value.violations} == {
        (v.field, v.rule_id) for v in there.value.violations
    }
    assert there.value.request_id
    report = await client.validate(spoilt)
    assert not report.valid
    assert isinstance(report.error, ContractError)


async def test_refused_items_stand_beside_accepted_ones(client):
    batch = packets()
    batch[1].header.emitted_at.FromSeconds(1)
    batch[3].msp.controller["tau"] = float("nan")
    receipts = await client.emit_many(batch)
    assert [receipt.ok for receipt in receipts] == [True, False, True, False, True]
    assert isinstance(receipts[1].error, PacketPolicyError)
    assert isinstance(receipts[3].error, ContractError)


async def test_dictionary_is_registered_fetched_and_used(client):
    samples = [client.emitter.emit_msp(controller={"tau": i / 300}) for i in range(300)]
    data = FMIEncoder.train(samples, dictionary_bytes=2048)
    unknown = AsyncFMIClient(client.target, encoder=FMIEncoder(dictionary=data))
    async with unknown:
        with pytest.raises(DictionaryUnknownError):
            await unknown.emit(samples[0])
    dictionary_id = await client.admin.register_dictionary(data)
    fetched = await client.dictionary(dictionary_id)
    assert fetched.data == data
    async with AsyncFMIClient(client.target, encoder=FMIEncoder(dictionary=data)) as packing:
        assert (await packing.emit(samples[0])).ok
        assert all(r.ok for r in await packing.emit_many(samples, batch_packets=50))


async def test_cohort_spec_is_put_read_and_enforced(client):
    spec = {
        "name": "care",
        "signals": [
            {"name": "tau", "section": "SIGNAL_SECTION_CONTROLLER", "lower": 0, "upper": 1}
        ],
    }
    assert (await client.admin.put_cohort_spec(spec)).changed
    read = await client.cohort_spec()
    assert [s.name for s in read.spec.signals] == ["tau"]
    assert [s.name for s in await client.cohort_specs()] == ["care"]
    with pytest.raises(CohortRuleError) as caught:
        await client.emit_msp(controller={"tau": 7})
    assert 'msp.controller["tau"]' in [v.field for v in caught.value.violations]
    spec["signals"][0]["upper"] = 0.5
    with pytest.raises(SpecChangeUnsafeError):
        await client.admin.put_cohort_spec(spec)
    spec["signals"][0]["upper"] = -1
    with pytest.raises(SpecError):
        await client.admin.put_cohort_spec(spec)
    assert isinstance(read.spec, cohort_pb2.CohortSpec)


async def test_a_cohort_that_requires_privacy_takes_what_local_privacy_made(client):
    spec = {
        "name": "care",
        "signals": [
            {"name": "tau", "section": "controller", "lower": 0, "upper": 1},
            {"name": "c", "section": "controller", "lower": 1e-6, "upper": 1e3, "transform": "log"},
        ],
        "ingest": {"dp_required": True},
    }
    await client.admin.put_cohort_spec(spec)
    with pytest.raises(PacketPolicyError) as caught:
        await client.emit_msp(controller={"tau": 0.9, "c": 0.1})
    assert caught.value.reason == "PRIVACY_REQUIRED"
    declared = (await client.cohort_spec()).spec
    for place, site in enumerate(SITES):
        privacy = LocalPrivacy.from_spec(
            declared, epsilon=20.0, delta=1e-6, emissions=40, bounds={"c": (1e-3, 1.0)}
        )
        async with AsyncFMIClient(
            client.target, domain_id=site, cohort="care", privacy=privacy
        ) as noisy:
            # Now below its bounds, now above: noise alone decides, and the server takes all of it.
            receipts = await noisy.emit_many(
                {"type": "msp", "controller": {"tau": place, "c": 10.0**n}} for n in range(-10, 10)
            )
            assert all(receipt.ok and not receipt.warnings for receipt in receipts)
            packet = noisy.emitter.emit_msp(controller={"tau": 0.9, "c": 0.1})
            assert (await noisy.validate(packet)).valid
            assert (await noisy.emit(packet)).ok
            assert (await noisy.emit(packet)).status is EmitStatus.DUPLICATE
            assert privacy.emissions_left == 19
    await client.admin.release_now("care")
    prior = (await client.get_update("care", "prior")).prior_update
    assert prior.lineage.sites == len(SITES)
    assert 0.0 <= prior.prior["tau"] <= 1.0


async def test_a_budget_that_is_spent_ends_what_a_site_emits_and_not_what_it_has(client):
    privacy = LocalPrivacy({"tau": (0.0, 1.0)}, epsilon=1.0, delta=1e-6)
    async with AsyncFMIClient(
        client.target, domain_id="s", cohort="care", privacy=privacy
    ) as noisy:
        packet = noisy.emitter.emit_msp(controller={"tau": 0.9})
        with pytest.raises(PrivacyBudgetError):
            await noisy.emit_msp(controller={"tau": 0.8})
        assert (await noisy.emit(packet)).status is EmitStatus.ACCEPTED
        assert (await noisy.emit(packet)).status is EmitStatus.DUPLICATE
    (cohort,) = await client.admin.list_cohorts()
    assert (cohort.packets, cohort.sites) == (1, 1)


async def test_what_is_not_there(client):
    await client.emit_msp(controller={"tau": 0.9})
    with pytest.raises(UpdateNotFoundError):
        await client.get_update("care", "causal_consensus")
    assert await client.admin.list_quarantine() == []
    contract = await client.contract(include_descriptors=True)
    assert contract.revision == 1
    assert contract.descriptors


async def test_closed_server_knows_declared_cohorts_only():
    async with (
        running_server(open_cohorts=False) as server,
        AsyncFMIClient(server.target, domain_id="s", cohort="nowhere") as client,
    ):
        with pytest.raises(CohortUnknownError):
            await client.emit_msp(controller={"tau": 0.9})
        (receipt,) = await client.emit_many(packets("nowhere")[:1])
        assert isinstance(receipt.error, CohortUnknownError)
        with pytest.raises(CohortUnknownError):
            await client.cohort_spec()


async def test_restart_is_survived(tmp_path):
    """A server that goes away and comes back on the same data: nothing is lost, nothing twice."""
    patient = RetryPolicy(initial_s=0.05, max_s=0.2, max_attempts=200)
    async with running_server(tmp_path, listen=lasting_address()) as server:
        client = AsyncFMIClient(server.target, domain_id="s", cohort="care", retry=patient)
        subscription = client.subscribe("care", "prior", mode="every")
        await client.emit_many(packets())
        await client.admin.release_now("care")
        before = await anext(subscription)
    resent = packets(shift=0.05)
    sending = asyncio.create_task(client.emit_many(resent, batch_packets=1))
    waiting = asyncio.create_task(anext(subscription))
    async with running_server(tmp_path, listen=server.target):
        assert all(receipt.ok for receipt in await sending)
        await client.admin.release_now("care")
        after = await waiting
        assert after.revision == before.revision + 1
        assert after.history_epoch == before.history_epoch
        (cohort,) = await client.admin.list_cohorts()
        assert cohort.packets == 10
        assert subscription.statistics.reconnects >= 1
        await client.aclose()
