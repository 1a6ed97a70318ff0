"""Changes to plain data, with the values that Python has and no packet expects."""

from __future__ import annotations

import copy
import datetime as dt
import random
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

from google.protobuf import timestamp_pb2

from fmi.v1 import packet_pb2

__all__ = ["changed_plain"]


def _deep() -> Any:
    nested: Any = 1
    for _ in range(1200):
        nested = {"a": nested}
    return nested


def _deep_list() -> Any:
    nested: Any = [1]
    for _ in range(1200):
        nested = [nested]
    return nested


def _wide() -> Any:
    """Small to hold, endless to write: what YAML's aliases give."""
    nested: Any = ["x" * 100]
    for _ in range(30):
        nested = [nested, nested]
    return nested


class _Odd:
    def __repr__(self) -> str:
        raise RuntimeError("no")

    __str__ = __repr__


MAKERS: tuple[Callable[[], Any], ...] = (
    *(
        (lambda value=value: copy.deepcopy(value))
        for value in (
            None,
            True,
            False,
            0,
            -1,
            1,
            2**31,
            2**32,
            2**63,
            2**64,
            10**5000,
            -(10**5000),
            0.5,
            -0.0,
            1e308,
            5e-324,
            float("nan"),
            float("inf"),
            float("-inf"),
            "",
            "NaN",
            "-Infinity",
            "1e999",
            "1" * 5000,
            "\ud800",
            "\n",
            "\x1b[31mred",
            "\u2028",
            "x" * 3000,
            "tau",
            "msp",
            "2025-06-15T15:06:40Z",
            "9999-12-31T23:59:60Z",
            "0001-01-01T00:00:00Z",
            "12",
            "true",
            b"bytes",
            bytearray(b"b"),
            1j,
            Decimal("sNaN"),
            Decimal("1.5"),
            Fraction(10**400, 3),
            Fraction(1, 3),
            dt.datetime(1, 1, 1),  # noqa: DTZ001 - as people give them
            dt.datetime(9999, 12, 31, 23, 59, 59),  # noqa: DTZ001 - as people give them
            dt.datetime(2025, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=23))),
            dt.date(2025, 1, 1),
            object,
            range(3),
            frozenset({1}),
            (1, 2),
            (1, 2, 3),
            (),
            [],
            {},
            (None, None),
            [["a", "b", 1.0, "direct"]],
            {"number": 1},
            {"text": "x"},
            {"flag": 1},
            {"number": "x"},
            {"start": 1, "end": 2},
            {"start": -1, "\n": 2},
            {1: 2},
            {None: 1},
            {"": 1.0},
            {"a": {"b": 1}, "a.b": 2},
            {"signals": {"tau": {"confidence": 1}}},
            {10**5000: 1},
            {"\ud800": 1},
            {"x" * 5000: 1},
            {"\x1b\n": 1},
            {(1, 2): 3},
            {True: 1},
            {"seconds": 1},
            {"@type": "x"},
        )
    ),
    _deep,
    _deep_list,
    _wide,
    _Odd,
    lambda: {_Odd(): 1},
    lambda: (number for number in (1, 2)),
    packet_pb2.Packet,
    packet_pb2.ParamValue,
    packet_pb2.Evidence,
    packet_pb2.CausalPair,
    packet_pb2.WindowSpan,
    lambda: packet_pb2.ParamValue(number=float("nan")),
    lambda: timestamp_pb2.Timestamp(seconds=2**62, nanos=-1),
    lambda: {f"k{number}": number for number in range(200)},
    lambda: {f"k{number}": None for number in range(200)},
    lambda: [None] * 300,
)

KEYS: tuple[Any, ...] = (
    "type",
    "packet_type",
    "header",
    "msp",
    "pop",
    "ccs",
    "metrics",
    "controller",
    "evidence",
    "window_span",
    "windowSpan",
    "bundle",
    "before",
    "causal_pairs",
    "concepts",
    "tested_nodes",
    "testedNodes",
    "trust",
    "timestamp",
    "emitted_at",
    "emittedAt",
    "provenance",
    "applied_privacy",
    "rev",
    "signals",
    "samples",
    "confidence",
    "sites",
    "number",
    "text",
    "tau",
    "",
    "\n",
    "\ud800",
    "x" * 3000,
    1,
    None,
    2.5,
    True,
    (1,),
    10**5000,
    "seconds",
    "nanos",
    "msp.metrics",
    "a.b",
    "[0]",
    '"',
    "metric",
    "Metrics",
    "\x1b]0;x\x07",
)


JSON_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    2**31,
    2**64,
    10**400,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "NaN",
    "1e999",
    "\ud800",
    "\n",
    "\x1b[31m",
    "x" * 300,
    "tau",
    "2025-06-15T15:06:40Z",
    [],
    {},
    [1, 2],
    [None],
    [["a", "b", 1, "direct"]],
    {"number": 1},
    {"a": {"b": 1}, "a.b": 2},
    {"tau": {"confidence": 1}},
    {"": 1},
    {"x" * 200: 1},
    {"\x1b": 1},
)


def changed_plain(plain: Any, rng: random.Random, *, json: bool = False) -> Any:
    """Change one place somewhere in plain data; give back the whole."""
    holders = [(None, None)]
    stack = [plain]
    seen = 0
    while stack and seen < 300:
        value = stack.pop()
        seen += 1
        if isinstance(value, dict):
            children = [(value, key) for key in value]
        elif isinstance(value, list):
            children = [(value, index) for index in range(len(value))]
        else:
            continue
        holders += children
        stack += [holder[key] for holder, key in children[:50]]
    holder, key = rng.choice(holders)
    value = copy.deepcopy(rng.choice(JSON_VALUES)) if json else rng.choice(MAKERS)()
    keys = [name for name in KEYS if isinstance(name, str)] if json else KEYS
    if holder is None:
        if rng.random() < 0.05:
            return value
        if isinstance(plain, dict):
            plain[rng.choice(keys)] = value
        return plain
    match rng.randrange(5):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(keys)] = holder.pop(key)
        case 2 if isinstance(holder, dict):
            holder[rng.choice(keys)] = value
        case 3 if isinstance(holder[key], dict):
            holder[key][rng.choice(keys)] = value
        case _:
            holder[key] = value
    return plain
