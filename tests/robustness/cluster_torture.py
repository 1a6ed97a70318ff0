"""A cluster under load, of which servers and brokers die, stand still and are cut off.

Three brokers and three servers run; sites emit and subscribers follow at whichever server they find, and go
on at another one where that is gone. Each round does something to the cluster, and mends it. In the end the
history that clients wrote down is held against the view of every server; see `guarantees`.

    make torture-cluster        or: python tests/robustness/cluster_torture.py --rounds 100 --seed 7

The seed decides what is left to chance, but not how the machine schedules it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from cluster_rig import ClusterRig, Replica, cluster_rig
from followers import Follower
from guarantees import Broken, History, Store, broken
from server_harness import eventually
from sites import Emitter, SingleEmitter, StreamEmitter
from torture import CATCH_UP_S, declare_cohorts, everything_seen, next_set

__all__ = ["ClusterCampaign", "cluster_campaign", "goes_on"]

_log = logging.getLogger(__name__)

QUIET_S = 180.0
LONGEST_S = 90.0
"""Seconds within which the cluster has to answer and to release again, whatever was done to it."""

TROUBLES = {
    "a server is killed": 4,
    "a server ends in good order": 3,
    "a server stands still": 3,
    "a server is cut off from the brokers": 3,
    "a broker is killed": 3,
    "a broker stands still": 2,
    "a server and a broker are killed": 2,
    "all brokers are killed": 1,
    "all servers end in turn": 1,
}
"""What is done to the cluster, and how often."""


@dataclass
class ClusterCampaign:
    """What was done, and what came of it.

    Attributes:
        troubles: What was done, and how often.
        silent_s: By trouble, the longest times between two updates that subscribers saw after it.
    """

    seed: int
    history: History
    views: Sequence[Store]
    logs: str
    took_s: float = 0.0
    troubles: Counter[str] = field(default_factory=Counter)
    silent_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def broken(self) -> list[Broken]:
        """Return every way in which a guarantee was broken, in any view."""
        found = [finding for view in self.views for finding in broken(self.history, view)]
        if any(view != self.views[0] for view in self.views):
            found.append(Broken("ORDERED", "the views of the servers are not the same"))
        return list(dict.fromkeys(found))

    def summary(self) -> str:
        """Say how much it was."""
        statuses = Counter(answer.status for answer in self.history.answers)
        seen = sum(len(record.seen) for record in self.history.records)
        lines = [
            (
                f"seed {self.seed}: {self.troubles.total()} rounds in {self.took_s:.0f} s; "
                f"{statuses['accepted']:,} packets accepted, {statuses['duplicate']:,} repeats; "
                f"{len(self.history.records)} subscribers saw {seen:,} updates"
            ),
        ]
        for trouble, times in sorted(self.silent_s.items()):
            lines.append(
                f"  {trouble} ({len(times)}): longest silence median {statistics.median(times):.1f} s, "
                f"most {max(times):.1f} s"
            )
        return "\n".join(lines)


def by_chance(rig: ClusterRig, _number: int) -> str:
    """Choose what a round does."""
    (trouble,) = rig.chance.choices(list(TROUBLES), list(TROUBLES.values()))
    return trouble


async def cluster_campaign(
    folder: Path,
    *,
    rounds: int,
    seed: int,
    until: float = 1e18,
    choose: Callable[[ClusterRig, int], str] = by_chance,
    act: Callable[[ClusterRig, str], Awaitable[None]] | None = None,
    variables: Mapping[str, str] | None = None,
) -> ClusterCampaign:
    """Run the load, do something to the cluster in each round, and bring everything to an end.

    Args:
        folder: An empty folder.
        rounds: How many.
        seed: Of all that is left to chance.
        until: When to begin no more rounds, by `time.monotonic`.
        choose: Says what the round of a number does.
        act: Does it, and mends it; `one_trouble` where it is not given.
        variables: Of the environment of the servers that begin.
    """
    act = act or one_trouble
    begun = time.monotonic()
    troubles: Counter[str] = Counter()
    silent: dict[str, list[float]] = defaultdict(list)
    async with cluster_rig(folder, seed, variables) as rig:
        await declare_cohorts(rig)
        async with asyncio.TaskGroup() as tasks:
            followers = followers_of(rig)
            following = [tasks.create_task(follower.run()) for follower in followers]
            await asyncio.gather(*(follower.ready.wait() for follower in followers))
            emitters = [tasks.create_task(site.run()) for site in sites_of(rig)]
            for number in range(rounds):
                if time.monotonic() > until:
                    break
                trouble = choose(rig, number)
                troubles[trouble] += 1
                _log.info("round %d: %s", number, trouble)
                watch = tasks.create_task(longest_silence(rig))
                await act(rig, trouble)
                await goes_on(rig)
                watch.cancel()
                silent[trouble].append(await watch)
            await eventually(lambda: rig.history.of_all_kinds, LONGEST_S)
            rig.stopping.set()
            async with asyncio.timeout(QUIET_S):
                await asyncio.gather(*emitters)
            await everything_seen(rig, CATCH_UP_S)
            for task in following:
                task.cancel()
        for replica in rig.replicas:
            await replica.end()
        views = rig.views()
        logs = "".join(replica.log.read_text() for replica in rig.replicas)
    took_s = time.monotonic() - begun
    return ClusterCampaign(seed, rig.history, views, logs, took_s, troubles, silent)


def followers_of(rig: ClusterRig) -> list[Follower]:
    """Make the subscribers; each goes on at another server where its own is gone."""
    return [
        Follower(rig, "every", every=True),
        Follower(rig, "every, another", every=True),
        Follower(rig, "every, away", every=True, away=True),
        Follower(rig, "latest", every=False),
        Follower(rig, "latest, away", every=False, away=True),
        *(
            Follower(rig, f"every, of {replica.name}", every=True, target=replica.target)
            for replica in rig.replicas
        ),
    ]


def sites_of(rig: ClusterRig) -> list[Emitter]:
    """Make the sites; each goes on at another server where its own is gone."""
    return [
        SingleEmitter(rig, "single-1"),
        SingleEmitter(rig, "single-2"),
        StreamEmitter(rig, "stream-1"),
        StreamEmitter(rig, "stream-2"),
    ]


async def one_trouble(rig: ClusterRig, trouble: str) -> None:  # noqa: C901 - one case for each
    """Do something to the cluster, and mend it."""
    chance = rig.chance
    replica, broker = chance.choice(rig.replicas), chance.choice(rig.brokers)
    await asyncio.sleep(chance.uniform(0.0, 0.5))
    if chance.random() < 0.5:
        await next_set(rig.answered)
    pause_s = chance.choice((0.2, 2.0, chance.uniform(2.0, 14.0)))
    match trouble:
        case "a server is killed":
            await replica.kill()
            await asyncio.sleep(pause_s)
            await replica.start()
        case "a server ends in good order":
            await replica.end()
            await replica.start()
        case "a server stands still":
            replica.tell(signal.SIGSTOP)
            await asyncio.sleep(pause_s)
            replica.tell(signal.SIGCONT)
        case "a server is cut off from the brokers":
            replica.cut_off()
            await asyncio.sleep(pause_s)
            replica.reconnect()
        case "a broker is killed":
            broker.kill()
            await asyncio.sleep(pause_s)
            await broker.start()
        case "a broker stands still":
            broker.tell(signal.SIGSTOP)
            await asyncio.sleep(pause_s)
            broker.tell(signal.SIGCONT)
        case "a server and a broker are killed":
            broker.kill()
            await replica.kill()
            await asyncio.sleep(pause_s)
            await broker.start()
            await replica.start()
        case "all brokers are killed":
            for each in rig.brokers:
                each.kill()
            await asyncio.sleep(min(pause_s, 3.0))
            await asyncio.gather(*(each.start() for each in rig.brokers))
        case "all servers end in turn":
            for each in rig.replicas:
                await _restart(each)


async def _restart(replica: Replica) -> None:
    await replica.end()
    await replica.start()


async def goes_on(rig: ClusterRig) -> None:
    """Wait until packets are answered and updates are seen again."""
    answers, record = len(rig.history.answers) + 10, rig.history.records[0]
    seen = len(record.events) + 3
    await eventually(
        lambda: len(rig.history.answers) >= answers and len(record.events) >= seen, LONGEST_S
    )


async def longest_silence(rig: ClusterRig) -> float:
    """Measure until cancelled the longest time, in seconds, between two updates that anybody saw."""
    longest, last, seen = 0.0, time.monotonic(), -1
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            now, count = time.monotonic(), sum(len(r.events) for r in rig.history.records)
            if count != seen:
                longest, last, seen = max(longest, now - last), now, count
            await asyncio.sleep(0.02)
    return max(longest, time.monotonic() - last)


def main() -> None:
    """Run a campaign."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, help="by chance if not given")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    print(f"seed {seed}: begun", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        until = time.monotonic() + options.minutes * 60
        ended = asyncio.run(
            cluster_campaign(Path(folder), rounds=options.rounds, seed=seed, until=until)
        )
    print(ended.summary(), flush=True)
    if found := ended.broken():
        for finding in found[:20]:
            print(f"  {finding.guarantee}: {finding.detail}")
        sys.exit(f"{len(found)} ways in which a guarantee was broken; seed {seed}")
    print(
        f"{ended.troubles.total()} rounds: 0 acknowledged packets lost, 0 counted twice, 0 revisions "
        "missing, 0 repeated; every subscriber's history is that of every server's view"
    )


if __name__ == "__main__":
    main()
