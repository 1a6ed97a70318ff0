"""Attack a server from the network, and see what an honest site feels of it.

Each attack meets a `fmi-server serve` of its own on loopback, with SQLite on disk. An honest site in a
process of its own emits at an even rate; what its answers take during the attack stands beside what they took
just before. The attacker is a third process, and takes its share of the processor too.

    make bench-abuse            or: python -m benchmarks.abuse rapid-reset half-sent
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import tempfile
from collections.abc import Iterable
from pathlib import Path

import grpc

from benchmarks.abuse.attacks import ATTACKS
from benchmarks.abuse.run import Outcome, attacked, p50, p99

MIB = 2**20


def row(outcome: Outcome) -> list[str]:
    """Write a line of the table."""
    quick, slow = p50(outcome.before_ms), p50(outcome.during_ms)
    tail, long_tail = p99(outcome.before_ms), p99(outcome.during_ms)
    memory = " / ".join(f"{value / MIB:.0f}" for value in outcome.memory)
    files = " / ".join(str(value) for value in outcome.descriptors)
    failed = ", ".join(f"{count} {code}" for code, count in outcome.unanswered.items())
    return [
        outcome.attack,
        f"{quick:.1f} -> {slow:.1f} ({slow / quick:.1f})",
        f"{tail:.1f} -> {long_tail:.1f} ({long_tail / tail:.1f})",
        failed or "none",
        memory,
        files,
        f"{outcome.processor:.2f}",
        "yes" if outcome.ready else ("alive only" if outcome.alive else "NO"),
    ]


HEAD = [
    "attack",
    "Emit p50 ms (ratio)",
    "p99 ms (ratio)",
    "Emits unanswered",
    "RSS MiB before / peak / after",
    "files",
    "cores",
    "ready",
]


def table(rows: Iterable[list[str]]) -> str:
    """Lay the rows out."""
    lines = [HEAD, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    laid = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]
    laid.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(laid)


async def run(options: argparse.Namespace) -> list[Outcome]:
    """Run the attacks one after the other."""
    outcomes = []
    for name in options.attacks or ATTACKS:
        with tempfile.TemporaryDirectory() as data_dir:
            outcome = await attacked(
                name,
                Path(data_dir),
                before_s=options.before,
                attack_s=options.seconds,
                after_s=options.after,
                rate=options.rate,
                scale=options.scale,
                flags=options.flag,
            )
        outcomes.append(outcome)
        print(f"{name}: {ATTACKS[name].what}\n   {' | '.join(row(outcome)[1:])}", flush=True)
        print(
            f"   {', '.join(f'{key} {count}' for key, count in outcome.tally.items())}", flush=True
        )
    return outcomes


def main() -> None:
    """Attack, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.abuse",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=", ".join(ATTACKS))
    parser.add_argument("--before", type=float, default=4.0, help="seconds without an attack")
    parser.add_argument("--seconds", type=float, default=6.0, help="seconds of each attack")
    parser.add_argument("--after", type=float, default=3.0, help="seconds after it")
    parser.add_argument("--rate", type=float, default=50.0, help="honest packets a second")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the attacks")
    parser.add_argument("--flag", action="append", default=[], help="a flag of the server")
    options = parser.parse_args()
    if unknown := set(options.attacks) - set(ATTACKS):
        parser.error(f"there is no attack {', '.join(sorted(unknown))}")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"grpcio {grpc.__version__}; {options.rate:g} honest packets/s\n"
    )
    outcomes = asyncio.run(run(options))
    print(f"\n{table(row(outcome) for outcome in outcomes)}")


if __name__ == "__main__":
    main()
