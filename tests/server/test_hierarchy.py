"""Two levels: servers that are sites of a parent server."""

from __future__ import annotations

import contextlib

import pytest
from server_harness import PRIOR, Client, eventually, msp

from fmi.v1 import cohort_pb2
from fmi_server.testing import running_server


def values(region):
    """Five sites of a region."""
    return [0.50 + 0.1 * region + 0.01 * site for site in range(5)]


async def emitted(client, region):
    await client.emit(
        *(
            msp(f"r{region}-site-{i}", "care", controller={"tau": value})
            for i, value in enumerate(values(region))
        )
    )


async def prior_of_sites(client, sites):
    """The newest prior, when it has so many sites."""
    async with client.subscribed("care", kinds=[PRIOR]) as events:
        while True:
            event = await events.next()
            found = event.update.prior_update
            if found.lineage.sites == sites:
                return found


@contextlib.asynccontextmanager
async def region(number, parent, **settings):
    async with (
        running_server(
            parent=parent.target, parent_domain_id=f"region-{number}", **settings
        ) as server,
        Client(server.target) as client,
    ):
        quick = cohort_pb2.CohortSpec(name="care")
        quick.release.min_interval.FromMilliseconds(20)
        quick.aggregation.vote_min_sites = 5  # so that there is one release
        await client.put_spec(quick)
        yield client


async def test_regions_are_sites_of_their_parent():
    async with (
        running_server() as parent,
        Client(parent.target) as above,
        contextlib.AsyncExitStack() as regions,
    ):
        for number in range(3):
            client = await regions.enter_async_context(region(number, parent))
            await emitted(client, number)
        found = await prior_of_sites(above, 3)
    # Each region's trimmed mean is its middle; the parent's is the median of three.
    assert found.prior["tau"] == pytest.approx(values(1)[2])
    estimate = found.estimates["tau"]
    assert (estimate.section, estimate.sites) == ("controller", 3)


async def test_a_region_sends_what_it_has_when_its_parent_comes_later(tmp_path):
    async with running_server(tmp_path) as parent:
        target = parent.target
    # Nothing listens there now.
    async with region(1, parent) as client:
        await emitted(client, 1)
        await prior_of_sites(client, 5)
        async with (
            running_server(tmp_path, listen=target) as again,
            Client(again.target) as above,
        ):
            sites = await eventually(above.sites)
    assert list(sites) == ["care:region-1"]


async def test_a_region_that_starts_again_counts_once(tmp_path):
    async with running_server() as parent, Client(parent.target) as above:

        async def child():
            return (await above.sites()).get("care:region-1")

        async def repeated():
            return (await child()).duplicates

        async with region(1, parent, data_dir=tmp_path) as client:
            await emitted(client, 1)
            await eventually(child)
        async with region(1, parent, data_dir=tmp_path):
            assert await eventually(repeated) == 1
        assert (await child()).packets["msp"] == 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--parent", "127.0.0.1:50061"), "belong together"),
        (("--parent-domain-id", "region-1"), "belong together"),
        (("--parent", "region", "--parent-domain-id", "r"), "must be HOST:PORT"),
        (("--parent", "127.0.0.1:1", "--parent-domain-id", "a b"), "must be 1 to 128 letters"),
        (("--parent", "192.0.2.1:1", "--parent-domain-id", "r"), "has no TLS to it"),
        (("--parent", "127.0.0.1:50061", "--parent-domain-id", "r"), "is this server itself"),
    ],
)
def test_settings_of_a_parent_that_cannot_be_are_refused(command, flags, told):
    ended = command(*flags)
    assert ended.code == 2
    assert told in ended.err
