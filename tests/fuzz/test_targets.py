"""Each fuzz target, for a moment: `make fuzz` goes on for as long as it is told to."""

from __future__ import annotations

import os
import random

import pytest
from calls import Calls
from targets import TARGETS

INPUTS = int(os.environ.get("FMI_FUZZ_EXAMPLES", "200"))


@pytest.mark.timeout(max(120, INPUTS))
@pytest.mark.parametrize("target", [*TARGETS.values(), Calls], ids=lambda target: target.name)
def test_no_input_does_what_none_may(target):
    made = target()
    rng = random.Random(7)
    corpus = list(made.seeds())
    try:
        for data in corpus:
            made(data)
        for _ in range(INPUTS):
            data = made.mutate(rng.choice(corpus), rng)
            made(data)
            corpus.append(data)
    finally:
        made.close()


def test_a_target_tells_of_what_no_input_may_do(monkeypatch):
    """The oracle is not blind."""
    made = TARGETS["packet"]()
    (seed, *_) = made.seeds()

    def forgetful(*_: object, **__: object) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(made._intake, "_inspect_item", forgetful)
    with pytest.raises(KeyError):
        made(seed)
    calls = Calls()
    try:
        seed = next(s for s in calls.seeds() if calls.name_of(s) == "GetWarmStart")
        calls(seed)
        monkeypatch.setattr(calls.service, "warm_start", forgetful)
        with pytest.raises(AssertionError, match="INTERNAL"):
            calls(seed)
    finally:
        calls.close()
