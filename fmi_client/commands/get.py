"""`fmi get`: read what a cohort knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import click
from rich.text import Text

from fmi.v1 import interchange_service_pb2, update_pb2
from fmi_client.commands.exits import ExitCode
from fmi_client.commands.options import Argument, FMICommand, Settings, shared_options
from fmi_client.commands.output import (
    message_data,
    print_json,
    print_text,
    show_note,
    text,
    write_file,
)
from fmi_client.commands.packets import numbers
from fmi_client.commands.session import open_client
from fmi_client.commands.updates import update_view, warm_start_view
from fmi_client.graphs import consensus_to_dot, consensus_to_graphml
from fmi_client.kinds import KIND_NAMES

__all__ = ["command"]

_GRAPH_KIND: Final = "causal_consensus"
_GRAPH_FORMATS: Final[Mapping[str, Callable[[update_pb2.Update], str]]] = {
    "graphml": consensus_to_graphml,
    "dot": consensus_to_dot,
}


@click.command(name="get", cls=FMICommand)
@click.argument("cohort", cls=Argument, help="The cohort to read of.")
@click.option(
    "--kind",
    type=click.Choice(KIND_NAMES),
    help="What to read. [default: prior; warm_start with --profile-class, --regime or --concept, "
    "causal_consensus with --format]",
)
@click.option(
    "--revision",
    type=click.IntRange(min=1),
    help="A revision of the past. [default: the newest]",
)
@click.option("--profile-class", metavar="CLASS", help="Warm start: the class of learner or site.")
@click.option("--regime", metavar="TAG", help="Warm start: the regime that the site works in.")
@click.option(
    "--concept",
    callback=numbers,
    multiple=True,
    metavar="NAME=NUMBER",
    help="Warm start: the score of a concept that the site sees; may be repeated.",
)
@click.option(
    "--format",
    "graph_format",
    type=click.Choice(tuple(_GRAPH_FORMATS)),
    help="Causal consensus: write it as a graph, GraphML for programs or DOT for Graphviz.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, writable=True, allow_dash=True),
    metavar="FILE",
    help="Write the graph to FILE, as UTF-8. [default: standard output]",
)
@shared_options
def command(
    settings: Settings,
    cohort: str,
    kind: str | None,
    revision: int | None,
    profile_class: str | None,
    regime: str | None,
    concept: dict[str, float],
    graph_format: str | None,
    out: str | None,
) -> int:
    """Read the prior, warm start, policy hint or causal consensus of a COHORT.

    \b
      fmi get healthcare
      fmi get healthcare --kind causal_consensus --revision 4
      fmi get healthcare --profile-class icu-small --concept load=0.7
      fmi get healthcare --format graphml -o causes.graphml
      fmi get healthcare --format dot | dot -Tsvg -o causes.svg

    Intervals are 95 % confidence intervals; there is none for one site, or for few that agree exactly.
    "eff." is the effective number of sites after trimming and weighting, "trim" the number of sites left
    out by trimming. Metrics are observed, and not part of the prior.
    """  # noqa: D301 - click wants the character
    narrowed = profile_class is not None or regime is not None or bool(concept)
    if narrowed and (kind not in (None, "warm_start") or revision is not None):
        raise click.UsageError(
            "--profile-class, --regime and --concept are for the warm start of now: leave out "
            "--revision and other kinds."
        )
    kind = kind or ("warm_start" if narrowed else _GRAPH_KIND if graph_format else "prior")
    _check_graph_options(graph_format, out, kind=kind, as_json=settings.json)
    with open_client(settings) as client:
        if kind == "warm_start" and revision is None:
            answer = client.get_warm_start(
                cohort,
                profile_class=profile_class or "",
                regime=regime or "",
                concepts=concept,
            )
            _show_warm_start(settings, cohort, answer)
            return ExitCode.OK
        update = client.get_update(cohort, kind, revision or 0)
    if graph_format is not None:
        _write_graph(update, graph_format, out)
    elif settings.json:
        print_json(message_data(update))
    else:
        print_text(*update_view(update))
    return ExitCode.OK


def _check_graph_options(
    graph_format: str | None, out: str | None, *, kind: str, as_json: bool
) -> None:
    if graph_format is None:
        if out is not None:
            raise click.UsageError("--out is for graphs: add --format graphml or --format dot.")
        return
    if kind != _GRAPH_KIND:
        raise click.UsageError(
            f"--format {graph_format} is for --kind {_GRAPH_KIND}, the only kind that is a graph, and "
            f"not for {kind}; --json writes every kind."
        )
    if as_json:
        raise click.UsageError("--format and --json are two formats: leave out one of them.")


def _show_warm_start(
    settings: Settings, cohort: str, answer: interchange_service_pb2.GetWarmStartResponse
) -> None:
    if settings.json:
        print_json(message_data(answer))
        return
    line = text(cohort, "bold cyan")
    line.append("  warm start", style="bold")
    line.append(f"  goes with prior revision {answer.prior_revision}", style="dim")
    print_text(line, Text(), *warm_start_view(answer.profile))


def _write_graph(update: update_pb2.Update, graph_format: str, out: str | None) -> None:
    data = _GRAPH_FORMATS[graph_format](update).encode()
    if out in (None, "-"):
        click.echo(data, nl=False)
        return
    write_file(out, data)
    relations = len(update.causal_consensus.edges)
    show_note(f"revision {update.revision}, relations: {relations}, written to {out}")
