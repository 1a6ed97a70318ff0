"""A site that tunes, tells its cohort, and follows what the cohort knows.

Start a server (`fmi-server serve`), then run this for a few sites in as many terminals:

    python examples/follow_the_prior.py site_001
    python examples/follow_the_prior.py site_002
    python examples/follow_the_prior.py site_003
"""

from __future__ import annotations

import random
import sys

from fmi_client import FMIClient


def tune(tau: float, rng: random.Random) -> tuple[float, float]:
    """Stand for a site's own tuning: try a value near `tau`, and measure what it gains here."""
    tried = min(1.0, max(0.01, rng.gauss(tau, 0.05)))
    best_here = 0.8
    return tried, 0.2 - abs(tried - best_here)


def main(domain_id: str, target: str = "127.0.0.1:50061", *, rounds: int = 5) -> None:
    """Tune for some rounds, each from the newest prior."""
    rng = random.Random(domain_id)
    with FMIClient(target, domain_id=domain_id, cohort="example") as client:
        start = client.get_warm_start().profile.init if _known(client) else {}
        best = tune(start.get("tau", 0.5), rng)
        with client.subscribe(["example"], kinds=["prior"]) as updates:
            for _ in range(rounds):
                tau, gain = best
                client.emit_msp(controller={"tau": tau}, metrics={"gain_p50": gain})
                try:
                    update = updates.next(timeout_s=0.5)
                except TimeoutError:
                    continue  # too few sites yet, or nothing changed
                if update is not None and "tau" in update.prior_update.prior:
                    prior = update.prior_update.prior["tau"]
                    print(f"revision {update.revision}: the cohort says tau = {prior:.3f}")
                    best = max(best, tune(prior, rng), key=lambda found: found[1])
        print(f"{domain_id}: tau = {best[0]:.3f} gains {best[1]:.3f}")


def _known(client: FMIClient) -> bool:
    return any(spec.name == "example" for spec in client.cohort_specs())


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit("usage: follow_the_prior.py SITE [HOST:PORT]")
    main(*sys.argv[1:])
