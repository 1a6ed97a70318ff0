"""The attacker in a process of its own: it attacks until SIGTERM, and says what it counted.

attacker.py TARGET ATTACK SCALE
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import signal
import sys

from benchmarks.abuse.attacks import ATTACKS, Ground


async def attack_until_told(target: str, name: str, scale: float) -> None:
    """Attack a server on this machine; print the tally as JSON at the end."""
    host, _, port = target.rpartition(":")
    if not ipaddress.ip_address(host).is_loopback:
        raise SystemExit(f"{host} is not this machine, and only that is attacked")
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print("begun", flush=True)
    async with ATTACKS[name].going_on(Ground(host, int(port), scale)) as ground:
        await ended.wait()
    print(json.dumps(ground.tally))


if __name__ == "__main__":
    asyncio.run(attack_until_told(sys.argv[1], sys.argv[2], float(sys.argv[3])))
