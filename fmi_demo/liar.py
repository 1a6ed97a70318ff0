"""How a site lies: as far from the truth as the cohort's rules let it.

A liar tunes like everyone else, so that it knows the truth, and turns each packet around. The attack is
fixed by this principle alone and was not fitted to any estimator:

* MSP: each signal goes to the bound of the cohort spec that is farther from the truth on the signal's own
  scale, with confidence 1. Liars with the same truth pull to the same corner of the box.
* POP: what helped has ruined everything, what harmed was a triumph: from the best value of the
  metric to the worst, or back, with confidence 1.
* CCS: each cause has the opposite sign, is a million times as strong and has a tiny standard error; its
  reverse is claimed as well. Trust 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from fmi_demo.packets import Body
from fmi_demo.scenario import BOX

__all__ = ["BOUNDS", "falsify"]

BOUNDS: Final[Mapping[str, tuple[float, float]]] = {
    **BOX,
    "g_min": (0.0, 1.0),
    "accuracy": (0.0, 1.0),
    "gain_p50": (-1.0, 1.0),
}
"""Lower and upper bound of every signal, as in the cohort files."""

_SECTIONS: Final = ("metrics", "controller", "evaluator")
_EXAGGERATION: Final = 1e6


def falsify(body: Body) -> Body:
    """Turn a true packet into the worst one that the cohort's rules take."""
    if "msp" in body:
        return {"msp": _falsify_msp(body["msp"])}
    if "pop" in body:
        return {"pop": _falsify_pop(body["pop"])}
    return {"ccs": _falsify_ccs(body["ccs"])}


def _farther_bound(name: str, value: float) -> float:
    low, high = BOUNDS[name]
    if name in BOX:
        return high if math.log(value / low) < math.log(high / value) else low
    return high if value - low < high - value else low


def _falsify_msp(msp: Mapping[str, Any]) -> dict[str, Any]:
    lies = {
        section: {name: _farther_bound(name, value) for name, value in msp[section].items()}
        for section in _SECTIONS
    }
    return {**msp, **lies, "evidence": {"confidence": 1.0, "samples": 10**9}}


def _falsify_pop(pop: Mapping[str, Any]) -> dict[str, Any]:
    helped = {name: pop["after"][name] >= value for name, value in pop["before"].items()}
    best = {name: BOUNDS[name][1] for name in helped}
    worst = {name: BOUNDS[name][0] for name in helped}
    return {
        **pop,
        "before": {name: best[name] if up else worst[name] for name, up in helped.items()},
        "after": {name: worst[name] if up else best[name] for name, up in helped.items()},
        "confidence": 1.0,
    }


def _falsify_ccs(ccs: Mapping[str, Any]) -> dict[str, Any]:
    pairs = []
    for source, target, weight, kind, _ in ccs["causal_pairs"]:
        lie = -math.copysign(_EXAGGERATION, weight)
        pairs.append((source, target, lie, kind, 1.0 / _EXAGGERATION))
        pairs.append((target, source, lie, kind, 1.0 / _EXAGGERATION))
    return {
        **ccs,
        "causal_pairs": pairs,
        "concepts": [
            {"id": c["id"], "score": -math.copysign(_EXAGGERATION, c["score"])}
            for c in ccs["concepts"]
        ],
        "trust": 1.0,
    }
