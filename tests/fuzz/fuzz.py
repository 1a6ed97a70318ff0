"""Coverage-guided fuzzing of all that takes bytes from others, with Atheris (libFuzzer).

    make fuzz                   or: python tests/fuzz/fuzz.py --inputs 200000 --target packet

Each target runs in a process of its own: a crash of native code ends that one, and is a finding. Inputs that
do what none may are kept in build/fuzz/findings, named by what they did, and taken again by:

    python tests/fuzz/fuzz.py --again build/fuzz/findings/packet/...
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import logging
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

FINDINGS = Path("build/fuzz/findings")
SLOW_S = 2.0
"""Seconds of processor time that no input may take, instrumented."""

GROWTH_MB = 300
"""Growth of the process after a tenth of the inputs; the fuzzer keeps inputs of its own."""

NAMES = ("envelope", "coerce", "json", "packet", "spec", "cohort-file", "subscribe", "calls")


def main() -> int:
    """Fuzz one target after the other, and tell of each what it took and found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=150_000, help="inputs for each target")
    parser.add_argument("--target", choices=NAMES, action="append", help="only this one")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of all that is chance")
    parser.add_argument("--again", type=Path, help="take an input once more, and show what it does")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return _fuzz(options.child, options.inputs, options.seed)
    if options.again:
        _targets()[options.again.parent.name]()(options.again.read_bytes())
        return 0
    print(f"seed {options.seed}")
    titles = f"{'target':12}{'inputs':>10}{'seconds':>9}{'edges':>8}{'RSS MB':>8}{'grew':>6}"
    print(f"{titles}{'slowest s':>11}  findings")
    found = total = 0
    for name in options.target or NAMES:
        told = _child(name, options.inputs, options.seed)
        total += told["inputs"]
        found += sum(told["findings"].values())
        print(
            f"{name:12}{told['inputs']:>10}{told['seconds']:>9.0f}{told['edges']:>8}{told['rss_mb']:>8.0f}"
            f"{told['grew_mb']:>6.0f}{told['slowest_s']:>11.2f}  {told['findings'] or 'none'}",
            flush=True,
        )
    print(f"{total} inputs, {found} findings")
    return 1 if found else 0


def _child(name: str, inputs: int, seed: int) -> dict[str, Any]:
    command = [
        sys.executable,
        __file__,
        "--child",
        name,
        "--inputs",
        str(inputs),
        "--seed",
        str(seed),
    ]
    started = time.monotonic()
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    lines = ended.stderr.splitlines() + ended.stdout.splitlines()
    told: dict[str, Any] = {
        "inputs": 0,
        "rss_mb": 0.0,
        "grew_mb": 0.0,
        "slowest_s": 0.0,
        "findings": {},
    }
    for line in lines:
        if line.startswith("FUZZ "):
            told |= json.loads(line[5:])
    edges = [int(match[1]) for line in lines if (match := re.search(r"\bcov: (\d+)", line))]
    told["edges"] = edges[-1] if edges else 0
    told["seconds"] = time.monotonic() - started
    if ended.returncode or not told["inputs"]:
        told["findings"] = {**told["findings"], f"ended with {ended.returncode}": 1}
        print("\n".join(lines[-40:]), file=sys.stderr)
    return told


def _targets() -> dict[str, Any]:
    from calls import Calls  # noqa: PLC0415 - imported where it is instrumented
    from targets import TARGETS  # noqa: PLC0415

    return {**TARGETS, Calls.name: Calls}


def _fuzz(name: str, inputs: int, seed: int) -> int:
    import atheris  # noqa: PLC0415 - the parent does without

    with atheris.instrument_imports(include=["fmi", "fmi_server"]):
        target = _targets()[name]()
    logging.getLogger("fmi_server").setLevel(logging.ERROR)
    watch = _Watch(name, target, inputs)

    def mutate(data: bytes, most: int, number: int) -> bytes:
        rng = random.Random(number)
        if rng.random() < 0.2:
            return bytes(atheris.Mutate(data, most))
        return bytes(target.mutate(data, rng)[:most])

    with tempfile.TemporaryDirectory() as corpus:
        for number, content in enumerate(target.seeds()):
            Path(corpus, f"{number:04}").write_bytes(content)
        arguments = [
            sys.argv[0],
            f"-runs={inputs}",
            f"-max_len={target.most}",
            f"-seed={seed % 2**31 or 1}",
            "-timeout=60",
            "-rss_limit_mb=4096",
            "-len_control=0",
            f"-artifact_prefix={_folder(name)}/",
            corpus,
        ]
        atheris.Setup(arguments, watch, custom_mutator=mutate)
        atheris.Fuzz()
    return 0


def _folder(name: str) -> Path:
    folder = FINDINGS / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class _Watch:
    """Gives inputs to a target, and keeps what they did: the fuzzer itself would stop at the first."""

    def __init__(self, name: str, target: Any, inputs: int) -> None:
        self._name, self._target, self._inputs = name, target, inputs
        self._taken = 0
        self._early_mb = 0.0
        self._slowest_s = 0.0
        self._findings: Counter[str] = Counter()

    def __call__(self, data: bytes) -> None:
        started = time.process_time()
        try:
            self._target(data)
        except Exception as error:
            self._keep(_called(error), data)
        took = time.process_time() - started
        self._slowest_s = max(took, self._slowest_s)
        if took > SLOW_S:
            self._keep("slow", data)
        self._taken += 1
        if self._taken == max(1, self._inputs // 10):
            self._early_mb = _rss_mb()
        if self._taken == self._inputs:
            self._tell()

    def _keep(self, what: str, data: bytes) -> None:
        self._findings[what] += 1
        if self._findings[what] <= 3:
            digest = hashlib.sha256(data).hexdigest()[:12]
            (_folder(self._name) / f"{what}-{digest}").write_bytes(data)

    def _tell(self) -> None:
        gc.collect()
        grew = _rss_mb() - self._early_mb
        if grew > GROWTH_MB:
            self._findings["memory grows"] += 1
        told = {
            "inputs": self._taken,
            "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "grew_mb": grew,
            "slowest_s": self._slowest_s,
            "findings": dict(self._findings),
        }
        print(f"FUZZ {json.dumps(told)}", file=sys.stderr, flush=True)
        self._target.close()


def _called(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error)[:40] if type(error).__name__ == "Finding" else ""
    name = f"{type(error).__name__}-{Path(last.filename).stem}-{last.lineno}-{text}"
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-")


def _rss_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


if __name__ == "__main__":
    sys.exit(main())
