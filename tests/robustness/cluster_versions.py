"""Two versions of the server in one cluster under load, where each server gets the other one by and by.

The newer version is the one that this file is of; the older one is another checkout of the same repository,
with the same Python. Three brokers and three servers run, sites emit and subscribers follow all the while, as
in `cluster_torture`. A round is a rolling upgrade or downgrade, or gives any server any of the two, with
SIGTERM or with SIGKILL. In the end the history that clients wrote down is held against the view of every
server, whichever versions made it; see `guarantees`.

    git worktree add --detach /tmp/older v0.1.0
    python tests/robustness/cluster_versions.py --older /tmp/older --rounds 10 --seed 7

The newest version is in all servers at the end where the rounds are a multiple of six.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from cluster_rig import ClusterRig, Replica
from cluster_torture import ClusterCampaign, cluster_campaign, goes_on
from server_process import environment

__all__ = ["versions_campaign"]

_log = logging.getLogger(__name__)

NEWER = Path(__file__).parents[2]

ROUNDS = (
    "upgrade in good order",
    "downgrade in good order",
    "upgrade by kills",
    "downgrade by kills",
    "any server gets any version",
    "upgrade in good order",
)
"""What the rounds do, in turn; the servers begin with the older version."""

CHANGES = 5
"""Servers that get any version, in a round of that."""


def variables_of(checkout: Path) -> dict[str, str]:
    """Return what lets a server be the version of a checkout.

    Raises:
        RuntimeError: It would be another one.
    """
    path = {"PYTHONPATH": f"{checkout}:{checkout / 'proto'}"}
    found = subprocess.run(
        [sys.executable, "-c", "import fmi, fmi_server; print(fmi_server.__file__, fmi.__file__)"],
        env=environment(**path),
        cwd="/",
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    if not all(Path(file).is_relative_to(checkout) for file in found):
        raise RuntimeError(f"{found} are not of {checkout}")
    return path


async def versions_campaign(
    folder: Path, older: Path, *, rounds: int, seed: int
) -> ClusterCampaign:
    """Run the load, let the servers have one version and the other, and bring everything to an end.

    Args:
        folder: An empty folder.
        older: The checkout of the older version, as an absolute path.
        rounds: How many, of `ROUNDS` in turn.
        seed: Of all that is left to chance.
    """
    versions = {"older": variables_of(older), "newer": variables_of(NEWER)}
    lives: Counter[str] = Counter(older=3)

    async def change(rig: ClusterRig, replica: Replica, version: str, *, kill: bool) -> None:
        if kill:
            await replica.kill()
            await asyncio.sleep(rig.chance.choice((0.0, 0.5, 8.0)))
        else:
            await replica.end()
        replica.variables = versions[version]
        lives[version] += 1
        await replica.start()
        await goes_on(rig)

    async def act(rig: ClusterRig, what: str) -> None:
        if what == "any server gets any version":
            for _ in range(CHANGES):
                chosen, version = rig.chance.choice(rig.replicas), rig.chance.choice(list(versions))
                await change(rig, chosen, version, kill=rig.chance.random() < 0.5)
            return
        version = "newer" if what.startswith("upgrade") else "older"
        for replica in rig.chance.sample(rig.replicas, len(rig.replicas)):
            await change(rig, replica, version, kill=what.endswith("kills"))

    done = await cluster_campaign(
        folder,
        rounds=rounds,
        seed=seed,
        choose=lambda _rig, number: ROUNDS[number % len(ROUNDS)],
        act=act,
        variables=versions["older"],
    )
    _log.info("%d lives of the older version, %d of the newer", lives["older"], lives["newer"])
    return done


def main() -> None:
    """Run a campaign."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--older", type=Path, required=True, help="checkout of the older version")
    parser.add_argument("--rounds", type=int, default=len(ROUNDS))
    parser.add_argument("--seed", type=int, help="by chance if not given")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    print(f"seed {seed}: begun", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run = partial(versions_campaign, rounds=options.rounds, seed=seed)
        ended = asyncio.run(run(Path(folder), options.older.resolve()))
    print(ended.summary(), flush=True)
    if found := ended.broken():
        for finding in found[:20]:
            print(f"  {finding.guarantee}: {finding.detail}")
        sys.exit(f"{len(found)} ways in which a guarantee was broken; seed {seed}")
    if "Traceback" in ended.logs:
        sys.exit(f"nothing broken, and a server met an error that it does not know:\n{ended.logs}")
    print(
        "0 acknowledged packets lost, 0 counted twice, 0 revisions missing, 0 repeated; every subscriber's "
        "history is that of every server's view"
    )


if __name__ == "__main__":
    main()
