"""kill -9 under load: what was acknowledged is there, once, in order, and everybody finds his place again.

A short campaign of `torture`, which says how it goes; and servers with faults, which it must notice.
FMI_SIGKILL_ROUNDS sets the number of rounds; 16 where it is not set. `make torture` runs for an hour.
"""

from __future__ import annotations

import os
import random

import pytest
from guarantees import Lagged
from server_process import COMMAND
from torture import COMPACTING, FAULTY, campaign

ROUNDS = int(os.environ.get("FMI_SIGKILL_ROUNDS", "16"))


@pytest.mark.timeout(120 + 15 * ROUNDS)
async def test_kill_9_under_load_breaks_no_guarantee(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - to run it again
    done = await campaign(tmp_path, rounds=ROUNDS, seed=seed, commands=(COMMAND, COMPACTING))

    assert done.broken() == []
    assert done.kills + done.ends >= ROUNDS
    statuses = [answer.status for answer in done.history.answers]
    assert statuses.count("duplicate") >= ROUNDS, "repeats were part of it"
    for record in done.history.records:
        assert {kind for _, kind in record.newest} == {1, 2, 3, 4}, record.name
    assert done.cuts > 0
    assert done.told(Lagged) > 0
    assert "Traceback" not in done.log, done.log


@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    ("fault", "guarantees"),
    [
        ("answers early", {"DURABLE"}),
        ("counts repeats", {"ONCE"}),
        ("skips an update", {"RESUMABLE"}),
        ("repeats an update", {"ORDERED", "RESUMABLE"}),
        ("hides what was left out", {"RESUMABLE"}),
        ("alters an update", {"RESUMABLE"}),
    ],
)
async def test_a_server_with_a_fault_is_caught(tmp_path, fault, guarantees):
    """The same load against a server with that fault: the checker must name what it breaks."""
    command = (*FAULTY, fault, "serve")
    done = await campaign(tmp_path, rounds=2, seed=1, commands=(command,))
    assert guarantees <= {found.guarantee for found in done.broken()}
