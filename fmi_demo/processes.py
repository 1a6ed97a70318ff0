"""Run functions in processes of their own, a few at a time, and hear of them while they run."""

from __future__ import annotations

import asyncio
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Final, TypeAlias

from fmi_demo.errors import DemoError

__all__ = ["Job", "Workshop"]

Event: TypeAlias = Any
"""What a job tells is its own affair; it is pickled."""

_ONE_THREAD: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_PRELOAD: Final = ("fmi_demo.learner", "fmi_demo.causes", "lingam")


@dataclass(frozen=True, slots=True)
class Job:
    """Something to run in a new process.

    Attributes:
        name: Of the process.
        target: `module:function`, called with `plan` and with a function that tells what happens. It is
            named and not given, because the parent needs nothing of what the function imports.
        plan: Its argument.
    """

    name: str
    target: str
    plan: object


@dataclass(frozen=True, slots=True)
class _Failed:
    text: str


class Workshop:
    """Starts processes, each with one thread to compute with.

    They are forked from a server process that imports the heavy libraries once (some seconds each time
    otherwise) and has neither threads nor a connection, so that its children may have both.

    Args:
        at_once: Processes that run at the same time.
    """

    def __init__(self, *, at_once: int) -> None:
        self._slots = asyncio.Semaphore(at_once)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_PRELOAD))
        with _single_threaded():
            multiprocessing.forkserver.ensure_running()

    async def run(self, jobs: Sequence[Job], on_event: Callable[[Event], None]) -> None:
        """Run each job in a process of its own, and return when all have ended.

        Args:
            jobs: Started in this order.
            on_event: Called in the event loop with everything that the jobs tell.

        Raises:
            DemoError: A process failed; the others are ended.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for job in jobs:
                    group.create_task(self._run(job, on_event), name=job.name)
        except* DemoError as failures:
            raise failures.exceptions[0] from None

    async def _run(self, job: Job, on_event: Callable[[Event], None]) -> None:
        async with self._slots:
            loop = asyncio.get_running_loop()
            receiver, sender = self._context.Pipe(duplex=False)
            process = self._context.Process(
                target=_child, args=(job.target, job.plan, sender), name=job.name, daemon=True
            )

            def supervise() -> _Failed | None:
                """Start the process and hear it out, in a thread: it may wait for the fork server."""
                failed = None
                with receiver:
                    with sender:
                        process.start()
                    with suppress(EOFError):
                        while True:
                            event = receiver.recv()
                            if isinstance(event, _Failed):
                                failed = event
                            else:
                                loop.call_soon_threadsafe(on_event, event)
                process.join()
                return failed

            try:
                failed = await asyncio.to_thread(supervise)
            finally:
                if process.pid is not None and process.is_alive():
                    process.terminate()  # its end of the pipe closes, and so the thread ends
        if failed is not None:
            raise DemoError(f"{job.name} failed:\n{failed.text}")
        if process.exitcode:
            raise DemoError(f"{job.name} ended with exit code {process.exitcode}")


def _child(target: str, plan: object, sender: Connection) -> None:
    try:
        module, function = target.split(":")
        getattr(importlib.import_module(module), function)(plan, sender.send)
    except Exception:
        sender.send(_Failed(traceback.format_exc()))
    finally:
        sender.close()


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Let what is started within compute with one thread; the fork server reads this at its start."""
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
