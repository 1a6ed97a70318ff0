"""What is left of a client, and of gRPC, in a forked process: nothing, and it is told.

gRPC's threads do not come along into a child. With `grpc.aio` its fork handlers do not help: a channel
that is opened in a child after the parent opened one hangs in C code, out of reach of any timeout, or
kills the process. So the SDK refuses to open one. Such a child should end as those of `multiprocessing`
do, with `os._exit`: the interpreter's whole shutdown takes down what is left of gRPC in it, and now and then
(2 of 56 times, measured with grpcio 1.85.3) dies of a segmentation fault.
"""

from __future__ import annotations

import os

from fmi_client.errors import ForkedError

__all__ = ["check_process", "start_grpc"]


class _Started:
    """The process that opened the first channel."""

    pid: int | None = None


def start_grpc() -> None:
    """Note that this process opens a channel.

    Raises:
        ForkedError: A process that this one was forked from had opened one.
    """
    if _Started.pid is None:
        _Started.pid = os.getpid()
    elif _Started.pid != os.getpid():
        raise ForkedError(
            f"process {_Started.pid} used gRPC before it forked this one, where gRPC cannot work any "
            "more: fork before the first call, or start processes with the method spawn or forkserver"
        )


def check_process(pid: int, what: str) -> None:
    """Raise `ForkedError` where `what` was made in another process than this one."""
    if os.getpid() != pid:
        raise ForkedError(
            f"{what} was made in process {pid}, which forked this one: neither its threads nor gRPC "
            "survive a fork; make a new one in the child"
        )
