"""A cluster of which servers and brokers die, stand still and are cut off breaks no guarantee.

A short campaign of `cluster_torture`. FMI_CLUSTER_ROUNDS sets the number of rounds; 4 where it is not set.
"""

from __future__ import annotations

import os
import random

import pytest
from cluster_torture import cluster_campaign

ROUNDS = int(os.environ.get("FMI_CLUSTER_ROUNDS", "4"))


@pytest.mark.timeout(360 + 90 * ROUNDS)
async def test_a_cluster_in_trouble_breaks_no_guarantee(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    done = await cluster_campaign(tmp_path, rounds=ROUNDS, seed=seed)

    assert done.broken() == []
    assert done.history.of_all_kinds
    assert "Traceback" not in done.logs, done.logs
