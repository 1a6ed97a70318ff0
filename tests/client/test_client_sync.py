"""FMIClient: the same over a thread of its own."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from pathlib import Path

import grpc
import pytest
from scripted_server import FAST, ScriptedServer, aborts, answers, status, streams, update_event

from fmi.v1 import admin_service_pb2, registry_service_pb2
from fmi_client import (
    ClientClosedError,
    CompactedError,
    ContractError,
    FMIClient,
    FMIEmitter,
)


@pytest.fixture
def served():
    """A scripted server on an event loop in a thread, as a program without asyncio sees one."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work):
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    async def make():
        scripted = ScriptedServer()
        await scripted.start()
        return scripted

    scripted = run(make())
    yield scripted
    run(scripted.stop())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def client(served):
    with FMIClient(served.target, domain_id="site_001", cohort="care", retry=FAST) as opened:
        yield opened


def test_emits(served, client):
    assert client.emit_msp(metrics={"gain_p50": 0.15}, controller={"tau": 0.9}).ok
    assert client.emit_pop({"tau": 1}, {"loss": 1}, {"loss": 0.5}).ok
    assert client.emit_ccs([("a", "b", 1.0)]).ok
    assert client.emit({"type": "msp", "controller": {"tau": 1}}).ok
    assert [r.packet.WhichOneof("body") for r in served.seen("Emit")] == [
        "msp",
        "pop",
        "ccs",
        "msp",
    ]
    assert client.target == served.target


def test_retries_are_those_of_the_asynchronous_client(served, client):
    served.script("Emit", *[aborts(grpc.StatusCode.UNAVAILABLE)] * 2)
    assert client.emit_msp(controller={"tau": 0.9}).ok
    assert len(served.seen("Emit")) == 3


def test_errors_come_through(client):
    with pytest.raises(ContractError):
        client.emit_msp(controller={"tau": float("nan")})


def test_emit_many_takes_a_source_that_uses_the_client(served, client):
    """The source runs outside the client's event loop: it may block, and may call the client."""
    served.script("GetContract", *[answers(registry_service_pb2.GetContractResponse())] * 3)

    def source():
        for i in range(3):
            client.contract()
            yield client.emitter.emit_msp(controller={"tau": i})

    receipts = client.emit_many(source(), batch_packets=2)
    assert [receipt.packet_id for receipt in receipts] == list(served.taken)
    assert len(receipts) == 3


def test_reads_and_admin(served, client):
    contract = registry_service_pb2.GetContractResponse(revision=1)
    served.script("GetContract", answers(contract))
    served.script("ListCohorts", answers(admin_service_pb2.ListCohortsResponse()))
    served.script(
        "ValidatePacket", answers(registry_service_pb2.ValidatePacketResponse(valid=True))
    )
    assert client.contract() == contract
    assert client.admin.list_cohorts() == []
    assert client.validate({"type": "msp", "controller": {"tau": 1}}).valid


def test_subscription_is_a_blocking_iterator(served, client):
    served.script(
        "Subscribe",
        streams(update_event(1), update_event(2), then=grpc.StatusCode.UNAVAILABLE),
        streams(update_event(3), hold=True),
    )
    with client.subscribe("care", "prior") as subscription:
        seen = []
        for update in subscription:
            seen.append(update.revision)
            if len(seen) == 3:
                break
        assert seen == [1, 2, 3]
        assert subscription.resume_token == "t3"
        assert subscription.statistics.reconnects == 1
        with pytest.raises(TimeoutError):
            subscription.next(timeout_s=0.01)
    assert subscription.closed
    assert list(subscription) == []
    assert list(subscription.events()) == []


def test_events(served, client):
    served.script("Subscribe", streams(update_event(1), hold=True))
    with client.subscribe("care") as subscription:
        assert next(subscription.events()).resume_token == "t1"


def test_refusal_comes_out_of_the_iterator(served, client):
    refusal = status(grpc.StatusCode.OUT_OF_RANGE, "COMPACTED")
    served.script("Subscribe", streams(then=refusal))
    with client.subscribe("care") as subscription, pytest.raises(CompactedError):
        next(subscription)


def test_closing_from_another_thread_ends_the_iteration(served, client):
    served.script("Subscribe", streams(update_event(1), hold=True))
    subscription = client.subscribe("care")
    first = threading.Event()
    seen = []

    def follow():
        for update in subscription:
            seen.append(update.revision)
            first.set()

    thread = threading.Thread(target=follow)
    thread.start()
    assert first.wait(60)
    subscription.close()
    thread.join(60)
    assert not thread.is_alive()
    assert seen == [1]


def test_callback_may_use_the_client(served, client):
    served.script("Subscribe", streams(update_event(1), hold=True))
    served.script("GetContract", answers(registry_service_pb2.GetContractResponse(revision=1)))
    done = threading.Event()

    def on_update(_update):
        assert client.contract().revision == 1
        done.set()

    with client.subscribe("care", on_update=on_update) as subscription:
        assert done.wait(60)
        with pytest.raises(TimeoutError):
            subscription.wait(0.01)
    subscription.wait()


def test_error_of_the_callback_comes_out(served, client):
    served.script("Subscribe", streams(update_event(1), hold=True))

    def on_update(_update):
        raise LookupError("in the callback")

    subscription = client.subscribe("care", on_update=on_update)
    with pytest.raises(LookupError):
        subscription.wait(60)
    subscription.close()


def test_many_threads_share_a_client(served, client):
    def work():
        for _ in range(20):
            client.emit_msp(controller={"tau": 0.9})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(served.taken) == 80


def test_closed_client_says_so(served):
    client = FMIClient(served.target, domain_id="s")
    client.close()
    client.close()
    with pytest.raises(ClientClosedError):
        client.emit_msp(controller={"tau": 1})
    with pytest.raises(ClientClosedError):
        client.subscribe("care")
    with pytest.raises(ClientClosedError), client:
        pass


def threads_of_clients():
    return [thread for thread in threading.enumerate() if thread.name == "fmi-client"]


def test_dropped_client_closes_with_a_warning(served):
    before = set(threads_of_clients())
    client = FMIClient(served.target, domain_id="s")
    assert client.emit_msp(controller={"tau": 1}).ok
    (thread,) = set(threads_of_clients()) - before
    loop = client._thread.loop
    with pytest.warns(ResourceWarning, match=f"unclosed FMIClient to {served.target}"):
        del client
    thread.join(60)
    assert not thread.is_alive()
    assert loop.is_closed()


@pytest.mark.filterwarnings("ignore:unclosed FMIClient:ResourceWarning")
def test_dropped_clients_leave_no_descriptors():
    def drop(count):
        before = set(threads_of_clients())
        for _ in range(count):
            FMIClient("127.0.0.1:9")
        for thread in set(threads_of_clients()) - before:
            thread.join(60)
        return len(list(Path("/dev/fd").iterdir()))

    assert drop(20) == drop(1)


def test_closed_client_is_dropped_in_silence(served, recwarn):
    client = FMIClient(served.target)
    client.close()
    del client
    gc.collect()
    assert [w for w in recwarn if w.category is ResourceWarning] == []


def test_subscription_keeps_the_connection_of_a_dropped_client(served):
    served.script("Subscribe", streams(update_event(1), update_event(2), hold=True))
    subscription = FMIClient(served.target).subscribe("care")
    gc.collect()
    assert [next(subscription).revision, next(subscription).revision] == [1, 2]
    subscription.close()
    with pytest.warns(ResourceWarning, match="unclosed"):
        del subscription


def test_closing_ends_a_call_in_another_thread(served):
    async def hangs(_request, _context):
        started.set()
        await asyncio.Event().wait()

    started = threading.Event()
    served.script("Emit", hangs)
    client = FMIClient(served.target, domain_id="s")
    caught = []

    def call():
        try:
            client.emit_msp(controller={"tau": 1})
        except ClientClosedError as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert started.wait(60)
    client.close()
    thread.join(60)
    assert len(caught) == 1


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts, as it does not in a background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_ends_a_wait_and_the_client_goes_on(served, client):
    async def hangs(_request, _context):
        started.set()
        await asyncio.Event().wait()

    started = threading.Event()
    served.script("Emit", hangs)

    def interrupt():
        started.wait(60)
        signal.pthread_kill(main.ident, signal.SIGINT)

    main = threading.main_thread()
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        client.emit_msp(controller={"tau": 1})
    thread.join()
    assert client.emit_msp(controller={"tau": 2}).ok


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_child_is_told(client):
    client.emit_msp(controller={"tau": 1})
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover  the child's lines are not seen by the parent
        try:
            client.emit_msp(controller={"tau": 2})
            os.write(writer, b"sent")
        except ClientClosedError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        assert "fork" in pipe.read()


def test_emitter_of_the_client(client):
    assert isinstance(client.emitter, FMIEmitter)
    assert client.emitter.domain_id == "site_001"
    assert client.emitter.cohort == "care"
