from __future__ import annotations

import os

import pytest

from fmi_demo import DemoError
from fmi_demo.processes import Job, Workshop


def counts(plan, send):
    for i in range(plan):
        send((os.getpid(), i))


def fails(plan, send):
    send("begun")
    raise ValueError(plan)


def dies(plan, send):
    send("begun")
    os._exit(plan)


def shows_threads(_plan, send):
    send(os.environ["OMP_NUM_THREADS"])


def job(function, plan):
    return Job(function.__name__, f"{__name__}:{function.__name__}", plan)


async def test_each_job_is_a_process_that_is_heard_in_order():
    heard = []
    await Workshop(at_once=2).run([job(counts, 3), job(counts, 2)], heard.append)
    by_process = {}
    for pid, i in heard:
        by_process.setdefault(pid, []).append(i)
    assert sorted(by_process.values()) == [[0, 1], [0, 1, 2]]
    assert os.getpid() not in by_process


async def test_a_job_computes_with_one_thread_and_the_parent_is_left_alone():
    before = os.environ.get("OMP_NUM_THREADS")
    heard = []
    await Workshop(at_once=1).run([job(shows_threads, None)], heard.append)
    assert heard == ["1"]
    assert os.environ.get("OMP_NUM_THREADS") == before


async def test_a_job_that_raises_is_told_with_its_traceback():
    with pytest.raises(DemoError, match=r"(?s)fails failed:.*ValueError: no such thing"):
        await Workshop(at_once=1).run([job(fails, "no such thing")], lambda _: None)


async def test_a_job_that_dies_is_told_with_its_exit_code():
    with pytest.raises(DemoError, match="dies ended with exit code 3"):
        await Workshop(at_once=2).run([job(counts, 1), job(dies, 3)], lambda _: None)
