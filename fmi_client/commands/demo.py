"""`fmi demo`: a whole federation on this machine."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click

from fmi_client.commands.exits import ExitCode
from fmi_client.commands.options import FMICommand, Settings, json_option
from fmi_client.commands.output import print_json, print_text, text

__all__ = ["command"]

_ADVICE = "the demo needs more than the base install: in the checkout, pip install '.[demo]'"


@click.command(name="demo", cls=FMICommand)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    metavar="DIR",
    help="Where figures and results go.",
)
@click.option(
    "--sites",
    type=click.IntRange(6, 13),
    default=13,
    show_default=True,
    help="How many sites emit; two of them lie. The late site comes on top.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=7,
    show_default=True,
    help="Seed of everything random.",
)
@click.option("--quick", is_flag=True, help="Compute much less: shows that everything works.")
@click.option("--keep-serving", is_flag=True, help="Let the server run on until Ctrl-C.")
@click.option(
    "--cluster", is_flag=True, help="Run three brokers and three servers, and kill one of each."
)
@json_option
def command(
    settings: Settings,
    output: Path,
    sites: int,
    seed: int,
    quick: bool,
    keep_serving: bool,
    cluster: bool,
) -> int:
    """Run a server and a federation of sites on this machine, and show what they gain."""
    options: dict[str, Any] = {
        "output": output,
        "sites": sites,
        "seed": seed,
        "keep_serving": keep_serving,
        "quick": quick,
        "json": settings.json,
        "cluster": cluster,
    }
    try:
        result = importlib.import_module("fmi_demo").run(**options)
    except ModuleNotFoundError as error:
        if settings.json:
            print_json({"error": {"message": _ADVICE, "missing": error.name}}, to_stderr=True)
        else:
            missing = f" ({error.name} is missing)" if error.name else ""
            print_text(text(f"fmi: {_ADVICE}{missing}", "bold red"), to_stderr=True)
        return ExitCode.REFUSED
    return result if isinstance(result, int) else ExitCode.OK
