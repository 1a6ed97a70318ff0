"""What the SDK is set up with: whatever is given, it works, or it is told what is wrong with it at once."""

from __future__ import annotations

import contextlib
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from fmi_client import (
    AsyncFMIClient,
    FileOutbox,
    FMIClient,
    FMIEmitter,
    FMIEncoder,
    LocalPrivacy,
    Outbox,
    RetryPolicy,
    SignalBounds,
    TLSConfig,
)
from fmi_client.errors import ConfigurationError, ContractError

SECRET = "do-not-tell"
ODD = [
    None,
    SECRET,
    "",
    b"b",
    -1,
    0,
    -0.5,
    1.5,
    math.nan,
    math.inf,
    10**400,
    True,
    [],
    {},
    object(),
    Path("not/there"),
]


def client(**given) -> None:
    made = FMIClient(**{"target": "localhost:1", **given})
    made.close()


def aio_client(**given) -> AsyncFMIClient:
    return AsyncFMIClient(**{"target": "localhost:1", **given})


def private(**given) -> LocalPrivacy:
    return LocalPrivacy(**{"bounds": {"tau": (0, 1)}, "epsilon": 1.0, "delta": 1e-6, **given})


def emitter(**given) -> FMIEmitter:
    return FMIEmitter(**{"domain_id": "site", **given})


PLACES = {
    client: [
        *("target", "domain_id", "cohort", "profile_class", "schema_hash", "provenance", "tls"),
        *("token", "insecure", "retry", "timeout_s", "encoder", "outbox", "privacy", "clock"),
    ],
    aio_client: ["target", "tls", "token", "retry", "timeout_s", "outbox", "privacy", "clock"],
    emitter: ["domain_id", "cohort", "profile_class", "schema_hash", "privacy", "clock"],
    RetryPolicy: ["initial_s", "max_s", "multiplier", "max_attempts", "deadline_s"],
    FMIEncoder: ["level", "dictionary"],
    Outbox: ["max_packets", "max_bytes", "when_full", "on_refused", "keep_refused"],
    private: ["bounds", "epsilon", "delta", "emissions", "regime_is_public"],
    TLSConfig: ["root_certificates", "certificate", "private_key", "server_name"],
}


@pytest.mark.parametrize(
    ("make", "name"),
    [(make, name) for make, names in PLACES.items() for name in names],
    ids=lambda given: given if isinstance(given, str) else given.__name__,
)
def test_an_argument_is_taken_or_refused_by_its_name(make, name):
    """Never an error of Python from inside."""
    expected = ContractError if name == "provenance" else ConfigurationError
    for odd in ODD:
        refused = ""
        with contextlib.suppress(expected):
            try:
                make(**{name: odd})
            except expected as error:
                refused = str(error)
                raise
        assert name in refused or not refused or name in ("certificate", "private_key"), odd
        assert name != "token" or SECRET not in refused


@pytest.mark.parametrize(
    ("make", "given", "told"),
    [
        (client, {"target": None}, "target must be a text; it is None"),
        (client, {"timeout_s": None}, "timeout_s must be a number; it is None"),
        (client, {"timeout_s": math.nan}, "timeout_s must be a finite number"),
        (client, {"timeout_s": -1}, "timeout_s must be above 0"),
        (client, {"tls": True}, "tls must be of type TLSConfig or None; it is of type bool"),
        (client, {"token": b"x"}, "token must be a text or the Path of a file"),
        (client, {"retry": None}, "retry must be a RetryPolicy"),
        (client, {"cohort": None}, "cohort must be a text; it is None"),
        (client, {"domain_id": 7}, "domain_id must be a text or None; it is of type int"),
        (client, {"outbox": "file"}, "outbox must be of type Outbox or None"),
        (client, {"encoder": ""}, "encoder must be of type FMIEncoder or None"),
        (client, {"privacy": 0}, "privacy must be of type LocalPrivacy or None"),
        (client, {"clock": None}, "clock must be a function"),
        (emitter, {"domain_id": None}, "domain_id must be a text; it is None"),
        (RetryPolicy, {"max_attempts": 1.5}, "max_attempts must be a whole number"),
        (RetryPolicy, {"max_attempts": None}, "max_attempts must be a whole number; it is None"),
        (RetryPolicy, {"deadline_s": math.nan}, "deadline_s must be a finite number"),
        (RetryPolicy, {"multiplier": math.nan}, "multiplier must be a finite number"),
        (FMIEncoder, {"level": 99}, "level must be between -22 and 22"),
        (FMIEncoder, {"dictionary": "x"}, "dictionary must be bytes or None"),
        (Outbox, {"max_packets": 1.5}, "max_packets must be a whole number"),
        (Outbox, {"max_bytes": math.nan}, "max_bytes must be a whole number"),
        (Outbox, {"on_refused": 5}, "on_refused must be a function or None"),
        (private, {"bounds": [("tau", 0, 1)]}, "bounds must be a mapping"),
        (private, {"regime_is_public": "no"}, "regime_is_public must be True or False"),
        (private, {"emissions": 1.5}, "emissions must be a whole number"),
        (TLSConfig, {"server_name": 5}, "server_name must be a text or None"),
    ],
)
def test_what_is_wrong_with_an_argument_is_told(make, given, told):
    with pytest.raises(ConfigurationError, match=told):
        make(**given)


@pytest.mark.parametrize("path", ["", ".", "/", None, b"x", 5, True])
def test_what_is_no_path_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="path"):
        FileOutbox(path)
    if path is not None:
        with pytest.raises(ConfigurationError, match="account"):
            private(account=path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "bounds",
    [
        *(None, 5, "ab", (1,), (0, 1, 2), (None, 1), ("a", "b"), (False, True)),
        SignalBounds(0, 1, limits=(1,)),  # type: ignore[arg-type]
        SignalBounds(0, 1, limits="ab"),  # type: ignore[arg-type]
        SignalBounds(0, None),  # type: ignore[arg-type]
        SignalBounds(1, 2, log="no"),  # type: ignore[arg-type]
    ],
)
def test_what_are_no_bounds_is_told_of_the_signal(bounds):
    with pytest.raises(ConfigurationError, match=r'bounds\["tau"\] (is|has)') as caught:
        private(bounds={"tau": bounds})
    assert [violation.field for violation in caught.value.violations] == ['bounds["tau"]']


def test_numbers_may_be_of_other_libraries():
    policy = RetryPolicy(initial_s=np.float32(0.5), max_attempts=np.int64(3), max_s=Fraction(7, 2))
    assert policy.bound_s(3) == 2.0
    aio_client(timeout_s=np.float64(3.0))
    private(bounds={"tau": np.array([0.0, 1.0])}, epsilon=np.float64(1.0))


@pytest.mark.parametrize("given", [{"batch_packets": None}, {"batch_bytes": "1"}])
async def test_the_size_of_a_batch_is_a_whole_number(given):
    async with aio_client() as made:
        with pytest.raises(ConfigurationError, match="must be a whole number"):
            await made.emit_many([], **given)
