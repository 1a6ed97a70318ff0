"""Two levels: servers that are sites of a parent server."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2
from ports import lasting_address
from server_harness import PRIOR, Client, eventually, msp

from fmi.v1 import cohort_pb2
from fmi_server.config import SettingsError
from fmi_server.testing import running_server
from fmi_server.transport.parent import ParentLink
from fmi_server.uplink import ParentRefusedError, ParentUnavailableError


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
    target = lasting_address()
    async with running_server(tmp_path, listen=target) as parent:
        pass
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


async def test_a_region_without_a_word_in_common_still_sends_the_rest():
    async with running_server() as parent, Client(parent.target) as above:
        closed = cohort_pb2.CohortSpec(name="care")
        closed.signals.add(name="tau", section=cohort_pb2.SIGNAL_SECTION_CONTROLLER)
        await above.put_spec(closed)
        async with region(1, parent) as client:
            for i in range(5):
                await client.emit(msp(f"s{i}", "care", controller={"tau": 0.5, "zz": float(i)}))
            await eventually(lambda: sent_up(above))


async def sent_up(above):
    return (await above.sites()).get("care:region-1")


async def test_each_others_parents_come_to_rest():
    first, second = lasting_address(), lasting_address()
    async with (
        running_server(
            listen=first,
            parent=second,
            parent_domain_id="one",
        ) as one,
        running_server(
            listen=second,
            parent=first,
            parent_domain_id="two",
        ) as two,
        Client(one.target) as below,
        Client(two.target) as above,
    ):
        for client in (below, above):
            quick = cohort_pb2.CohortSpec(name="care")
            quick.release.min_interval.FromMilliseconds(10)
            await client.put_spec(quick)
            await emitted(client, 0)
        await eventually(lambda: known(below, "care:two"))
        await eventually(lambda: known(above, "care:one"))

        async def at_rest():
            before = [await revision(client) for client in (below, above)]
            await asyncio.sleep(0.5)
            return before == [await revision(client) for client in (below, above)]

        assert await eventually(at_rest)


async def known(client, site):
    return (await client.sites()).get(site)


async def revision(client):
    return (await client.update("care")).revision


async def test_with_a_parent_a_wrong_start_is_told_as_without(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(SettingsError, match="metrics_listen"):
            async with running_server(
                tmp_path, parent="127.0.0.1:9", parent_domain_id="r", metrics_listen=address
            ):
                pass


class Scripted:
    """A parent that answers every Emit as told."""

    def __init__(self, code, *details, raw=None):
        self.code, self.details, self.raw = code, details, raw

    async def emit(self, _request, context):
        status = status_pb2.Status(code=self.code.value[0], message="scripted")
        for detail in self.details:
            status.details.add().Pack(detail)
        raw = status.SerializeToString() if self.raw is None else self.raw
        await context.abort(self.code, "scripted", (("grpc-status-details-bin", raw),))


@contextlib.asynccontextmanager
async def scripted_parent(answer):
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(answer.emit)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("fmi.v1.InterchangeService", {"Emit": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with ParentLink(f"127.0.0.1:{port}") as link:
            yield link
    finally:
        await server.stop(None)


HINT = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=7))
WRONG = error_details_pb2.BadRequest(
    field_violations=[error_details_pb2.BadRequest.FieldViolation(field='msp.controller["zz"]')]
)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Scripted(grpc.StatusCode.UNAVAILABLE), ParentUnavailableError),
        (Scripted(grpc.StatusCode.UNAVAILABLE, raw=b"\xff\xff"), ParentUnavailableError),
        (Scripted(grpc.StatusCode.RESOURCE_EXHAUSTED, HINT), ParentUnavailableError),
        (Scripted(grpc.StatusCode.RESOURCE_EXHAUSTED), ParentRefusedError),
        (Scripted(grpc.StatusCode.PERMISSION_DENIED), ParentRefusedError),
        (Scripted(grpc.StatusCode.INVALID_ARGUMENT, WRONG), ParentRefusedError),
    ],
)
async def test_what_a_parent_answers_is_understood(answer, kind):
    async with scripted_parent(answer) as link:
        with pytest.raises(kind, match="scripted") as caught:
            await link.send(msp("s", "care"))
    if HINT in answer.details:
        assert caught.value.retry_after_s == 7.0
    if WRONG in answer.details:
        assert caught.value.fields == ('msp.controller["zz"]',)


async def test_a_parent_on_this_machine_is_not_asked_through_a_proxy(monkeypatch):
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    nobody = lasting_address()
    for name in ("http_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, f"http://{nobody}")
    async with scripted_parent(Scripted(grpc.StatusCode.PERMISSION_DENIED)) as link:
        with pytest.raises(ParentRefusedError, match="scripted"):
            await link.send(msp("s", "care"))


async def test_a_parent_that_is_not_there_is_unavailable():
    async with ParentLink(lasting_address()) as link:
        with pytest.raises(ParentUnavailableError):
            await link.send(msp("s", "care"))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--parent", "127.0.0.1:50061"), "belong together"),
        (("--parent-domain-id", "region-1"), "belong together"),
        (("--parent", "region", "--parent-domain-id", "r"), "must be HOST:PORT"),
        (("--parent", "127.0.0.1:1", "--parent-domain-id", "a b"), "must be 1 to 128 letters"),
        (("--parent", "192.0.2.1:1", "--parent-domain-id", "r"), "there is no TLS to it"),
        (("--parent", "127.0.0.1:50061", "--parent-domain-id", "r"), "is this server itself"),
        (("--parent", "localhost:50061", "--parent-domain-id", "r"), "is this server itself"),
        (("--parent", "127.0.0.1:0", "--parent-domain-id", "r"), "must name the port"),
    ],
)
def test_settings_of_a_parent_that_cannot_be_are_refused(command, flags, told):
    ended = command(*flags)
    assert ended.code == 2
    assert told in ended.err
