"""kill -9 under load: what was acknowledged is there, once, in order, and everybody finds his place again.

A short campaign of `torture`, which says how it goes; and servers with faults, which it must notice.
FMI_SIGKILL_ROUNDS sets the number of rounds; 16 where it is not set. `make torture` runs for an hour.
"""

from __future__ import annotations

import os
import random

import pytest
from guarantees import History, Lagged
from server_process import COMMAND
from torture import COMPACTING, FAULTY, campaign

ROUNDS = int(os.environ.get("FMI_SIGKILL_ROUNDS", "16"))
CAMPAIGNS = 5


@pytest.mark.timeout(400 + 15 * ROUNDS)
async def test_kill_9_under_load_breaks_no_guarantee(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - to run it again
    done = await campaign(
        tmp_path, rounds=ROUNDS, seed=seed, commands=(COMMAND, COMPACTING), complete=complete
    )
    assert done.broken() == []
    assert done.kills + done.ends >= ROUNDS
    assert done.cuts > 0
    assert "Traceback" not in done.log, done.log


def complete(history: History) -> bool:
    """Repeats, updates of all kinds to everybody, and updates that were left out were part of it."""
    repeats = sum(answer.status == "duplicate" for answer in history.answers)
    lagged = any(isinstance(e, Lagged) for record in history.records for e in record.events)
    return repeats >= ROUNDS and lagged and history.of_all_kinds


@pytest.mark.timeout(600)
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
    found = set()
    for seed in range(1, 1 + CAMPAIGNS):  # a kill may fall beside the fault, but not every time
        folder = tmp_path / str(seed)
        folder.mkdir()
        done = await campaign(folder, rounds=2, seed=seed, commands=(command,), catch_up_s=2.0)
        found = {finding.guarantee for finding in done.broken()}
        if guarantees <= found:
            break
    assert guarantees <= found
