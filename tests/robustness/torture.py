"""kill -9 under load, for as long as you like: what was acknowledged is there, once, in order, for everybody.

A campaign is one server folder that lives through many rounds. Sites emit, alone and in batches, straight
and through a bad network, and send again what was not answered and now and then what was; subscribers of
EVERY and LATEST follow, some through the bad network, some away now and then. Each round ends one life of
the server process, at a moment left to chance; half of its lives it compacts all the time. In the end the
history that clients wrote down is held against the store's file; see `guarantees`.

    make torture                or: python tests/robustness/torture.py --rounds 200 --seed 7

The seed decides what is left to chance, but not how the machine schedules it: a failure seen under a seed
may take some runs to come again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from followers import KINDS, Follower, SdkFollower
from guarantees import Broken, Compacted, History, Lagged, Store, broken
from proxy import BadNetwork, bad_network
from rig import COHORT, SHORT, Rig
from server_harness import Client, eventually
from server_process import COMMAND
from sites import Emitter, SingleEmitter, StreamEmitter

from fmi.v1 import cohort_pb2

__all__ = ["COMPACTING", "FAULTY", "Campaign", "campaign"]

FAULTY = (sys.executable, str(Path(__file__).with_name("faulty_server.py")))
COMPACTING = (*FAULTY, "compacts all the time", "serve")
ROUNDS_OF_CAMPAIGN = 250
QUIET_S = 90.0
CATCH_UP_S = 60.0
COMPLETE_S = 120.0

ENDINGS = {
    "at any moment": 5,
    "after an answer": 4,
    "before an answer": 4,
    "while it starts": 3,
    "while it stands still": 1,
    "while it drains": 2,
    "in good order": 2,
}
"""How a life ends, and how often."""


@dataclass
class Campaign:
    """What was done, and what came of it."""

    seed: int
    history: History
    store: Store
    log: str
    kills: int
    ends: int
    cuts: int
    took_s: float = 0.0
    endings: Counter[str] = field(default_factory=Counter)

    def broken(self) -> list[Broken]:
        """Return every way in which a guarantee was broken."""
        return broken(self.history, self.store)

    def told(self, kind: type[Lagged | Compacted]) -> int:
        """Return how often subscribers were told of something."""
        return sum(isinstance(e, kind) for record in self.history.records for e in record.events)

    def summary(self) -> str:
        """Say how much it was."""
        statuses = Counter(answer.status for answer in self.history.answers)
        seen = sum(len(record.seen) for record in self.history.records)
        rounds = sum(self.endings.values())
        endings = ", ".join(f"{count} {ending}" for ending, count in sorted(self.endings.items()))
        return (
            f"seed {self.seed}: {rounds} rounds in {self.took_s:.0f} s, {self.kills} kills and {self.ends} "
            f"ends in good order ({endings}); {self.cuts} connections cut\n"
            f"  {statuses['accepted']:,} packets accepted, {statuses['duplicate']:,} repeats; "
            f"{len(self.history.records)} subscribers saw {seen:,} updates, were told {self.told(Lagged):,} "
            f"times of some left out and {self.told(Compacted):,} times of some no longer kept"
        )


async def campaign(
    folder: Path,
    *,
    rounds: int,
    seed: int,
    commands: Sequence[Sequence[str]],
    until: float = 1e18,
    complete: Callable[[History], bool] = lambda _: True,
    catch_up_s: float = CATCH_UP_S,
) -> Campaign:
    """Run the load, end the server's life again and again, and bring everything to an end.

    Args:
        folder: An empty folder.
        rounds: Lives of the server.
        seed: Of all that is left to chance.
        commands: How the server is started; each life takes one of them.
        until: When to begin no more rounds, by `time.monotonic`.
        complete: Whether all that shall be part of it was; the load goes on behind the rounds until then.
        catch_up_s: How long subscribers have to get what was released last.
    """
    (folder / "data").mkdir()
    begun = time.monotonic()
    rig = Rig(folder / "data", seed, *commands)
    endings: Counter[str] = Counter()
    try:
        await rig.start()
        await declare_cohorts(rig)
        async with (
            bad_network(rig.target) as network,
            bad_network(rig.target) as single,
            asyncio.TaskGroup() as tasks,
        ):
            followers = followers_of(rig, network.target, single.target)
            following = [tasks.create_task(follower.run()) for follower in followers]
            await asyncio.gather(*(follower.ready.wait() for follower in followers))
            emitters = [tasks.create_task(site.run()) for site in sites_of(rig, network.target)]
            faults = [
                tasks.create_task(trouble(each, random.Random(rig.chance.random()), twice=twice))
                # A twin of the SDK's stream, under its secret `instance_id`, would end it: SUPERSEDED.
                for each, twice in ((network, True), (single, False))
            ]
            for _ in range(rounds):
                if time.monotonic() > until:
                    break
                (ending,) = rig.chance.choices(list(ENDINGS), list(ENDINGS.values()))
                endings[ending] += 1
                await one_round(rig, ending)
            await eventually(lambda: complete(rig.history), COMPLETE_S)
            for each, fault in zip((network, single), faults, strict=True):
                fault.cancel()
                each.heal()
            rig.stopping.set()
            async with asyncio.timeout(QUIET_S):
                await asyncio.gather(*emitters)
            await everything_seen(rig, catch_up_s)
            for task in following:
                task.cancel()
        await rig.end()
    finally:
        await rig.abandon()
    took_s = time.monotonic() - begun
    return Campaign(
        seed,
        rig.history,
        rig.store(),
        rig.log.read_text(),
        rig.kills,
        rig.ends,
        network.cuts + single.cuts,
        took_s,
        endings,
    )


def followers_of(rig: Rig, bad: str, single: str) -> list[Follower | SdkFollower]:
    """Make the subscribers, of which some are behind a bad network."""
    return [
        Follower(rig, "every", every=True),
        Follower(rig, "every, bad network", every=True, target=bad),
        Follower(rig, "every, away", every=True, away=True),
        Follower(rig, "latest", every=False),
        Follower(rig, "latest, bad network", every=False, target=bad),
        Follower(rig, "latest, away", every=False, away=True),
        SdkFollower(rig, "sdk", single),
    ]


def sites_of(rig: Rig, bad: str) -> list[Emitter]:
    """Make the sites, of which some are behind a bad network."""
    return [
        SingleEmitter(rig, "single-1"),
        SingleEmitter(rig, "single-2"),
        SingleEmitter(rig, "single-bad-network", bad),
        StreamEmitter(rig, "stream-1"),
        StreamEmitter(rig, "stream-bad-network", bad),
    ]


async def declare_cohorts(rig: Rig) -> None:
    """Declare one cohort that keeps everything, and one that keeps little."""
    async with Client(rig.target) as client:
        for name, kept in ((COHORT, 1_000_000), (SHORT, 4)):
            spec = cohort_pb2.CohortSpec(name=name)
            spec.release.min_interval.FromMilliseconds(50)
            spec.aggregation.vote_min_sites = 3
            spec.retention.updates = kept
            await client.put_spec(spec)


async def one_round(rig: Rig, ending: str) -> None:
    """Let the server live for a while, end its life in one of the ways, and start it again."""
    chance = rig.chance
    answers = len(rig.history.answers) + 5
    await eventually(lambda: len(rig.history.answers) >= answers)
    await asyncio.sleep(chance.uniform(0.0, 0.6))
    match ending:
        case "after an answer":
            await next_set(rig.answered)
        case "before an answer":
            await next_set(rig.sent)
            await asyncio.sleep(chance.uniform(0.0, 0.004))
        case "while it stands still":
            rig.tell(signal.SIGSTOP)
            await asyncio.sleep(chance.uniform(0.05, 0.5))
        case "while it drains":
            rig.tell(signal.SIGTERM)
            await asyncio.sleep(chance.uniform(0.0, 0.5))
    if ending == "in good order":
        await rig.end()
    else:
        await rig.kill()
    if ending == "while it starts":
        await rig.start(kill_after_s=chance.uniform(0.1, 1.0))
    await rig.start()


async def next_set(event: asyncio.Event) -> None:
    """Wait until something happens the next time."""
    event.clear()
    await event.wait()


async def trouble(network: BadNetwork, chance: random.Random, *, twice: bool) -> None:
    """Cut, freeze, delay, refuse, double and half-open connections until cancelled."""
    faults = ["cut", "freeze", "delay", "refuse", "one way", *["twice"] * twice]
    while True:
        await asyncio.sleep(chance.uniform(0.1, 1.0))
        match chance.choice(faults):
            case "cut":
                network.cut()
            case "twice":
                network.twice = not network.twice
                network.cut()
            case "freeze":
                network.freeze()
                await asyncio.sleep(chance.uniform(0.05, 0.5))
                network.cut()
                network.thaw()
            case "delay":
                network.delay_s = chance.uniform(0.0, 0.02)
            case "refuse":
                network.refuse(refusing=True)
                network.cut()
                await asyncio.sleep(chance.uniform(0.05, 0.3))
                network.refuse(refusing=False)
            case "one way":
                network.deafen()
                await asyncio.sleep(chance.uniform(0.05, 0.5))
                network.cut()
                network.thaw()


async def everything_seen(rig: Rig, catch_up_s: float) -> None:
    """Wait until nothing is left to release and every follower has what was released last."""
    async with Client(rig.target) as client:
        newest: dict[tuple[str, int], int] = {}
        for cohort in (COHORT, SHORT):

            async def quiet(cohort: str = cohort) -> bool:
                await client.release(cohort)
                return not await client.release(cohort)

            await eventually(quiet)
            for kind, revision in (await client.cohorts())[cohort].revisions.items():
                newest[cohort, KINDS[kind]] = revision

    def caught_up() -> bool:
        return all(
            record.newest.get(line) == revision
            for record in rig.history.records
            for line, revision in newest.items()
            if not record.cohorts or line[0] in record.cohorts
        )

    with contextlib.suppress(TimeoutError):  # the checker says what is missing
        await eventually(caught_up, catch_up_s)


def main() -> None:
    """Run campaigns until the time is over or the rounds are done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, help="stop after so many rounds")
    parser.add_argument("--seed", type=int, help="of the first campaign; by chance if not given")
    options = parser.parse_args()
    until = time.monotonic() + options.minutes * 60
    left = sys.maxsize if options.rounds is None else options.rounds
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    done = 0
    while left > 0 and time.monotonic() < until:
        rounds = min(left, ROUNDS_OF_CAMPAIGN)
        print(f"seed {seed}: begun", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            ended = asyncio.run(
                campaign(
                    Path(folder),
                    rounds=rounds,
                    seed=seed,
                    commands=(COMMAND, COMPACTING),
                    until=until,
                )
            )
        print(ended.summary(), flush=True)
        found = ended.broken()
        if found:
            for finding in found[:20]:
                print(f"  {finding.guarantee}: {finding.detail}")
            sys.exit(f"{len(found)} ways in which a guarantee was broken; seed {seed}")
        done += sum(ended.endings.values())
        left -= rounds
        seed += 1
    print(
        f"{done} rounds: 0 acknowledged packets lost, 0 counted twice, 0 revisions missing, 0 repeated; "
        "every subscriber's history is the store's"
    )


if __name__ == "__main__":
    main()
