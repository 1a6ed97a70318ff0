"""`python -m fmi_demo`: the demo from the command line."""

from __future__ import annotations

from pathlib import Path

import click

import fmi_demo
from fmi_demo.scenario import MAX_SITES, MIN_SITES

__all__ = ["main"]


@click.command(name="fmi_demo")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Where the chart, the results and the server's data go.",
)
@click.option(
    "--sites",
    type=click.IntRange(MIN_SITES, MAX_SITES),
    default=13,
    show_default=True,
    help="Sites that emit; two of them lie.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=7,
    show_default=True,
    help="Seed of everything random.",
)
@click.option("--keep-serving", is_flag=True, help="Let the server run on until Ctrl-C.")
@click.option("--quick", is_flag=True, help="Compute much less.")
@click.option(
    "--cluster", is_flag=True, help="Run three brokers and three servers, and kill one of each."
)
@click.option("--json", is_flag=True, help="Write the result to standard output as JSON.")
def main(
    *,
    output: Path,
    sites: int,
    seed: int,
    keep_serving: bool,
    quick: bool,
    cluster: bool,
    json: bool,
) -> None:
    """Run a server and a federation of sites on this machine, and show what they gain."""
    fmi_demo.run(
        output=output,
        sites=sites,
        seed=seed,
        keep_serving=keep_serving,
        quick=quick,
        json=json,
        cluster=cluster,
    )


if __name__ == "__main__":
    main()
