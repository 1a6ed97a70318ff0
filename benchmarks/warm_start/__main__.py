"""Run the experiment, print the report, and write it, the numbers and the chart into a folder.

make bench-warm-start      or: python -m benchmarks.warm_start --quick
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

from benchmarks.warm_start.chart import draw_chart
from benchmarks.warm_start.experiment import FULL, QUICK, run
from benchmarks.warm_start.report import text_of
from benchmarks.warm_start.summary import summarise


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.warm_start",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="few and short searches, to see it run"
    )
    parser.add_argument("--repetitions", type=int, help="paired searches per data set and arm")
    parser.add_argument("--output", type=Path, default=Path("build/bench-warm-start"))
    options = parser.parse_args()
    effort = QUICK if options.quick else FULL
    if options.repetitions is not None:
        if options.repetitions < 1:
            parser.error(f"--repetitions must be at least 1, not {options.repetitions}")
        effort = dataclasses.replace(effort, repetitions=options.repetitions)
    started = time.monotonic()

    def tell(doing: str) -> None:
        print(f"{time.monotonic() - started:5.0f} s  {doing}", flush=True)

    outcome = run(effort, tell)
    tell("computing intervals")
    summary = summarise(outcome)
    report = text_of(outcome, summary)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "report.txt").write_text(report, encoding="utf-8")
    numbers = json.dumps(summary.as_json(outcome), indent=2)
    (options.output / "results.json").write_text(numbers + "\n", encoding="utf-8")
    draw_chart(outcome, summary, options.output / "warm-start.png")
    tell(f"wrote report.txt, results.json and warm-start.png to {options.output}")
    print(f"\n{report}")


if __name__ == "__main__":
    main()
