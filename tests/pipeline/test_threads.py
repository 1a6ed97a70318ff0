"""Work in threads: whoever asked for it has it to its end, and what it raises is nobody else's."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from fmi_server.threads import in_thread


async def test_it_returns_what_the_work_does_and_raises_what_it_raises():
    assert await in_thread(pow, 2, 5) == 32
    with pytest.raises(ZeroDivisionError):
        await in_thread(divmod, 1, 0)


async def test_who_is_cancelled_waits_for_the_work_however_often():
    going, may_end = threading.Event(), threading.Event()
    lock = asyncio.Lock()

    def work():
        going.set()
        may_end.wait(60)

    async def locked():
        async with lock:
            await in_thread(work)

    task = asyncio.ensure_future(locked())
    await asyncio.to_thread(going.wait, 60)
    for _ in range(3):
        task.cancel()
        await asyncio.wait([task], timeout=0.01)
        assert lock.locked(), "the work goes on, and it has what the lock is for"
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not lock.locked()


async def test_what_goes_wrong_for_who_is_gone_is_not_logged():
    """Whoever hangs up in the middle of something bad would else fill the log."""
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    going, may_end = threading.Event(), threading.Event()

    def work():
        going.set()
        may_end.wait(60)
        raise KeyError

    for cancels in (1, 2):
        going.clear()
        may_end.clear()
        task = asyncio.ensure_future(in_thread(work))
        await asyncio.to_thread(going.wait, 60)
        for _ in range(cancels):
            task.cancel()
            await asyncio.wait([task], timeout=0.01)
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
    gc.collect()
    await asyncio.sleep(0)
    assert told == []
