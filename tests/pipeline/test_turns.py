"""Turns: one works at a time, and who has much to do keeps nobody else waiting for all of it."""

from __future__ import annotations

import asyncio

from fmi_server.turns import Turns


class Work:
    """Work in turns, and in which order it was done."""

    def __init__(self):
        self.turns = Turns()
        self.done = []
        self.at_once = 0

    async def one(self, caller):
        async with self.turns.taken(caller):
            self.at_once += 1
            try:
                assert self.at_once == 1
                await asyncio.sleep(0)
                self.done.append(caller)
            finally:
                self.at_once -= 1

    def begin(self, *callers):
        return [asyncio.ensure_future(self.one(caller)) for caller in callers]


async def test_each_caller_has_one_turn_after_the_other():
    work = Work()
    await asyncio.gather(*work.begin(*"aaaa", *"bb", "c"))
    assert "".join(work.done) == "aabcaba"


async def test_of_one_caller_who_came_first_is_first():
    turns, done = Turns(), []

    async def one(number):
        async with turns.taken("a"):
            await asyncio.sleep(0)
            done.append(number)

    await asyncio.gather(*map(one, range(20)))
    assert done == list(range(20))


async def test_who_gives_up_while_waiting_is_passed_over():
    work = Work()
    tasks = work.begin(*"aaab", *"bc")
    await asyncio.sleep(0)
    for place in (1, 3):
        tasks[place].cancel()
    await asyncio.wait(tasks)
    assert "".join(work.done) == "aabc"
    await work.one("d")
    assert not work.turns._waiting


async def test_who_gives_up_in_its_turn_hands_it_on():
    for steps in range(6):
        work = Work()
        tasks = work.begin(*"abc")
        for _ in range(steps):
            await asyncio.sleep(0)
        tasks[1].cancel()  # before its turn, just as it is given, in it, and behind it
        await asyncio.wait(tasks)
        assert work.done[0] == "a"
        assert work.done[-1] == "c"
        await asyncio.wait_for(work.one("d"), 60)


async def test_an_error_hands_the_turn_on():
    turns = Turns()

    async def fail():
        async with turns.taken("a"):
            await asyncio.sleep(0)
            raise KeyError

    failed, work = await asyncio.gather(fail(), _hold(turns), return_exceptions=True)
    assert isinstance(failed, KeyError)
    assert work == "held"


async def _hold(turns):
    async with turns.taken("b"):
        return "held"
