"""What a forked process can do with a client, and with gRPC: work, or be told. Never hang, never die.

The one exception is gRPC's: where the parent had made a call, a child that ends with the whole interpreter's
shutdown and not with `os._exit` is killed by a segmentation fault now and then.

Each scene is a program of its own, since the rest of the tests have used gRPC long before.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

SCENE_S = 200

BEGINNING = """
import asyncio, os, signal, sys, warnings
from fmi_client import AsyncFMIClient, FileOutbox, FMIClient, Outbox, FMIError
warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of a fork with threads
TARGET, FOLDER = sys.argv[1:]
SITE = {"domain_id": "s", "timeout_s": 30.0}

used = False  # whether this process has made a call

def emit(client):
    global used
    status = client.emit_msp(controller={"tau": 1}).status
    used = True
    return str(status)

async def emit_async(client):
    global used
    status = (await client.emit_msp(controller={"tau": 1})).status
    used = True
    return str(status)

def tell(who, work):
    try:
        print(who, work(), flush=True)
    except FMIError as error:
        print(who, type(error).__name__, flush=True)

def fork(work):
    sys.stdout.flush()
    inherited = used
    child = os.fork()
    if not child:
        signal.alarm(60)  # a child that hangs is killed, and seen
        tell("child", work)
        if inherited:
            os._exit(0)  # as multiprocessing does: gRPC's own end in such a child crashes now and then
        sys.exit(0)  # in good order: what the interpreter does at its end must not hang either
    _, code = os.waitpid(child, 0)
    print("ended", code, flush=True)

def anew():
    with FMIClient(TARGET, **SITE) as client:
        return emit(client)

async def anew_async():
    async with AsyncFMIClient(TARGET, **SITE) as client:
        return await emit_async(client)
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    command = [sys.executable, "-m", "fmi_server", "serve", "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(
        [*command, "--data-dir", str(tmp_path_factory.mktemp("server"))],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process, process.stdout:
        try:
            yield process.stdout.readline().removeprefix("listening on ").strip()
        finally:
            process.terminate()
            assert process.wait(60) == 0


@pytest.fixture
def play(target, tmp_path):
    def run(scene: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", BEGINNING + scene, target, str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=SCENE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout.splitlines()

    return run


@pytest.mark.parametrize("call", [True, False])
def test_a_blocking_client_is_not_the_childs(play, call):
    scene = f"""
client = FMIClient(TARGET, **SITE)
if {call}: tell("parent", lambda: emit(client))
fork(lambda: emit(client))
tell("parent", lambda: emit(client))
client.close()
"""
    before = ["parent accepted"] if call else []
    assert play(scene) == [*before, "child ForkedError", "ended 0", "parent accepted"]


@pytest.mark.parametrize("call", [True, False])
def test_closing_it_in_the_child_does_nothing(play, call):
    scene = f"""
client = FMIClient(TARGET, **SITE)
if {call}: tell("parent", lambda: emit(client))
fork(client.close)
tell("parent", lambda: emit(client))
client.close()
"""
    before = ["parent accepted"] if call else []
    assert play(scene) == [*before, "child None", "ended 0", "parent accepted"]


@pytest.mark.parametrize("call", [True, False])
def test_an_asynchronous_client_is_not_the_childs(play, call):
    scene = f"""
async def main():
    client = AsyncFMIClient(TARGET, **SITE)
    if {call}: print("parent", await emit_async(client))
    def work():
        async def both():
            try:
                return await emit_async(client)
            finally:
                await client.aclose()
        return asyncio.run(both())
    fork(work)
    print("parent", await emit_async(client))
    await client.aclose()
asyncio.run(main())
"""
    before = ["parent accepted"] if call else []
    assert play(scene) == [*before, "child ForkedError", "ended 0", "parent accepted"]


@pytest.mark.parametrize("work", ["anew", "lambda: asyncio.run(anew_async())"])
def test_a_child_makes_its_own_where_the_parent_made_no_call(play, work):
    """As a server that loads the program first, and forks its workers then."""
    scene = f"""
client = FMIClient(TARGET, **SITE)
fork({work})
fork({work})
tell("parent", lambda: emit(client))
client.close()
"""
    assert play(scene) == ["child accepted", "ended 0"] * 2 + ["parent accepted"]


@pytest.mark.parametrize("work", ["anew", "lambda: asyncio.run(anew_async())"])
@pytest.mark.parametrize("closed", [True, False])
def test_where_the_parent_made_a_call_a_child_is_told_that_it_cannot(play, work, closed):
    """gRPC itself hangs in the child, or kills it."""
    scene = f"""
client = FMIClient(TARGET, **SITE)
tell("parent", lambda: emit(client))
if {closed}: client.close()
fork({work})
tell("parent", lambda: emit(FMIClient(TARGET, **SITE)) if {closed} else emit(client))
"""
    assert play(scene + "\nwarnings.simplefilter('ignore')") == [
        "parent accepted",
        "child ForkedError",
        "ended 0",
        "parent accepted",
    ]


@pytest.mark.parametrize("outbox", ["Outbox()", "FileOutbox(FOLDER + '/site.outbox')"])
@pytest.mark.parametrize("call", [True, False])
def test_an_outbox_stays_with_the_parent(play, outbox, call):
    scene = f"""
outbox = {outbox}
client = FMIClient(TARGET, outbox=outbox, **SITE)
if {call}: tell("parent", lambda: emit(client))
fork(lambda: emit(client))
fork(lambda: outbox.put([client.emitter.emit_msp(controller={{"tau": 1}})]))
fork(lambda: FMIClient(TARGET, outbox=outbox, **SITE))
tell("parent", lambda: emit(client))
tell("parent", lambda: client.flush(10))
client.close()
"""
    before = ["parent spooled"] if call else []
    children = ["child ForkedError", "ended 0"] * 3
    assert play(scene) == [*before, *children, "parent spooled", "parent True"]


def test_a_child_neither_keeps_the_lock_of_the_file_nor_takes_it(play):
    scene = """
import time
outbox = FileOutbox(FOLDER + "/site.outbox")
go, went = os.pipe()
child = os.fork()
if not child:
    signal.alarm(60)
    os.read(go, 1)  # until the parent has let go, and taken it again
    tell("child", lambda: FileOutbox(FOLDER + "/site.outbox"))
    sys.exit(0)
outbox.close()
again = FileOutbox(FOLDER + "/site.outbox")
tell("parent", lambda: len(again))
os.write(went, b"x")
print("ended", os.waitpid(child, 0)[1])
again.close()
"""
    assert play(scene) == ["parent 0", "child OutboxLockedError", "ended 0"]


def test_forks_while_packets_are_written_lose_none(play):
    scene = """
import threading
outbox = FileOutbox(FOLDER + "/site.outbox")
client = FMIClient(TARGET, outbox=outbox, **SITE)
taken = []
def emit_all():
    for _ in range(200):
        taken.append(client.emit_msp(controller={"tau": 1}).packet_id)
thread = threading.Thread(target=emit_all)
thread.start()
forks = 0
while thread.is_alive():
    child = os.fork()
    if not child:
        os._exit(0)
    forks += os.waitpid(child, 0)[1] == 0
thread.join()
print(len(set(taken)), forks > 3)
tell("parent", lambda: client.flush(20))
print(outbox.statistics.sent, outbox.statistics.refused, outbox.statistics.duplicates)
client.close()
"""
    assert play(scene) == ["200 True", "parent True", "200 0 0"]


def test_children_end_well_whatever_grpc_is_at(play):
    """With gRPC's own handlers for forks, a tenth of these children is killed by a signal."""
    scene = """
outbox = FileOutbox(FOLDER + "/site.outbox")
client = FMIClient(TARGET, outbox=outbox, **SITE)
ended = []
for _ in range(40):
    emit(client)
    child = os.fork()
    if not child:
        signal.alarm(60)
        try:
            emit(client)
        except FMIError:
            sys.exit(0)
        sys.exit(1)
    ended.append(os.waitpid(child, 0)[1])
print(set(ended), "GRPC_ENABLE_FORK_SUPPORT" in os.environ)
client.close()
"""
    assert play(scene) == ["{0} False"]
