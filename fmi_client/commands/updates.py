"""Updates for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from rich.cells import cell_len
from rich.console import RenderableType
from rich.text import Text

from fmi.v1 import packet_pb2, update_pb2
from fmi_client._counts import counted
from fmi_client.commands.output import interval, moment, number, safe, share, table, text
from fmi_client.kinds import kind_name

__all__ = ["headline", "settings_line", "update_view", "warm_start_view"]

_SETTINGS: Final = ("controller", "evaluator", "operators")
_METRICS: Final = "metrics"
_MOST_ITEMS: Final = 6
_LINE_COLUMNS: Final = 78
"""What a line may hold, so that it fits 80 columns where it is indented."""

_NO_VALUE: Final[Mapping[str, str]] = {"below_quorum": "too few sites"}
"""What the reasons of signals without a value say; others say it themselves."""

_SOURCES: Final[Mapping[int, str]] = {
    update_pb2.WARM_START_SOURCE_PROFILE_AND_REGIME: "profile class and regime",
    update_pb2.WARM_START_SOURCE_REGIME: "regime",
    update_pb2.WARM_START_SOURCE_PROFILE_CLASS: "profile class",
    update_pb2.WARM_START_SOURCE_COHORT: "cohort",
    update_pb2.WARM_START_SOURCE_NONE: "none",
}


def headline(update: update_pb2.Update) -> Text:
    """Say in one line what an update is."""
    line = text(update.cohort, "bold cyan")
    line.append(f"  {kind_name(update.kind)}", style="bold")
    line.append(f"  revision {update.revision}")
    line.append(f"  {moment(update.released_at)}", style="dim")
    return line


def settings_line(update: update_pb2.Update) -> list[Text]:
    """Say on a few lines what an update carries."""
    match update.WhichOneof("body"):
        case "prior_update":
            return _prior_lines(update.prior_update)
        case "warm_start":
            return [
                line
                for profile in update.warm_start.profiles
                for line in _listed(
                    [f"{safe(n)} {number(v)}" for n, v in sorted(profile.init.items())]
                    or ["no values yet"],
                    lead=f"{safe(profile.profile_class)}: ",
                )
            ]
        case "policy_hint":
            return _hint_lines(update.policy_hint)
        case "causal_consensus":
            return _consensus_lines(update.causal_consensus)
        case _:
            return [_line("an update of a kind that this version does not know")]


def update_view(update: update_pb2.Update) -> Iterator[RenderableType]:
    """Show all of an update."""
    yield headline(update)
    match update.WhichOneof("body"):
        case "prior_update":
            yield from _prior_view(update.prior_update)
        case "warm_start":
            if not update.warm_start.profiles:
                yield text("no profiles yet")
            for profile in update.warm_start.profiles:
                yield Text()
                yield from warm_start_view(profile)
        case "policy_hint":
            yield from _hint_view(update.policy_hint)
        case "causal_consensus":
            yield from _consensus_view(update.causal_consensus)
        case _:
            yield text("an update of a kind that this version of fmi does not know")


def warm_start_view(profile: update_pb2.WarmStartProfile) -> Iterator[RenderableType]:
    """Show where a site should begin, and why there."""
    selector = profile.context_selector
    line = Text("profile class ").append_text(text(profile.profile_class or "default", "bold"))
    line.append(f"  from {_SOURCES.get(selector.source, 'unknown')}")
    if selector.regime:
        line.append(f" {safe(selector.regime)}")
    if selector.HasField("distance"):
        line.append(f" (distance {share(selector.distance)})")
    line.append(f"  confidence {share(profile.confidence)}")
    yield line
    if selector.shared_concepts:
        compared = ", ".join(safe(name) for name in selector.shared_concepts)
        yield Text(f"compared by {compared}", style="dim", overflow="fold")
    if profile.init:
        right = ("value", "sites", "conf.")
        listed = table("parameter", "value", "95 % interval", "sites", "conf.", "from", right=right)
        for name, value in sorted(profile.init.items()):
            origin = profile.origins.get(name, _NO_ORIGIN)
            listed.add_row(
                text(name),
                number(value),
                _interval(origin),
                str(origin.sites or "-"),
                share(origin.confidence),
                _SOURCES.get(origin.source, ""),
            )
        yield listed


def _prior_lines(prior: update_pb2.MetaPriorUpdate) -> list[Text]:
    shown = []
    for name, value in sorted(prior.prior.items()):
        spread = interval(prior.estimates[name]) if name in prior.estimates else ""
        shown.append(f"{safe(name)} {number(value)}" + (f" [{spread}]" if spread else ""))
    lines = _listed(shown) or [_line("no settings have a value")]
    made_from = f"{_made_from(prior.lineage)[0]}, confidence {share(prior.confidence)}"
    lines.append(_line(made_from, "dim"))
    for reason, names in _missing_by_reason(prior).items():
        lines += _listed(names, lead="no value yet: ", tail=f" ({reason})", style="dim")
    return lines


def _missing_by_reason(prior: update_pb2.MetaPriorUpdate) -> dict[str, list[str]]:
    missing: dict[str, list[str]] = {}
    for name, estimate in sorted(prior.estimates.items()):
        if not estimate.HasField("value"):
            missing.setdefault(_why_none(estimate.reason), []).append(safe(name))
    return missing


def _why_none(reason: str) -> str:
    return _NO_VALUE.get(reason) or safe(reason) or "no reason given"


def _hint_lines(hint: update_pb2.MetaPolicyHint) -> list[Text]:
    if not hint.hint_id:
        return [_line(safe(hint.reason) or "no hint")]
    bundle = _listed([f"{safe(n)} = {_param(v)}" for n, v in sorted(hint.bundle.items())])
    effect = f"effect {number(hint.effect)} (at least {number(hint.effect_lower)})"
    return [*bundle, _line(f"{effect}, {counted(hint.sites, 'site')}", "dim")]


def _consensus_lines(consensus: update_pb2.CausalConsensus) -> list[Text]:
    edges = [f"{_relation(edge)} {number(edge.weight)}" for edge in consensus.edges]
    lines = _listed(edges) or [_line("no relation has a quorum")]
    if consensus.cycles:
        lines.append(_line(f"cycles: {len(consensus.cycles)}", "dim"))
    return lines


def _relation(edge: update_pb2.ConsensusEdge) -> str:
    kind = f" ({safe(edge.type)})" if edge.type not in ("", "direct") else ""
    return f"{safe(edge.source)} -> {safe(edge.target)}{kind}"


def _prior_view(prior: update_pb2.MetaPriorUpdate) -> Iterator[RenderableType]:
    yield _lineage(prior.lineage, f"confidence {share(prior.confidence)}")
    numbers = ("value", "sites", "eff.", "trim", "conf.")
    listed = table("signal", "value", "95 % interval", *numbers[1:], right=numbers)
    by_section: dict[str, list[str]] = {}
    for name, estimate in prior.estimates.items():
        by_section.setdefault(estimate.section, []).append(name)
    for name in prior.prior.keys() - prior.estimates.keys():
        by_section.setdefault("", []).append(name)
    for section in sorted(by_section, key=_section_order):
        rows = sorted(n for n in by_section[section] if _has_value(prior, n))
        if rows:
            applied = "" if section != _METRICS else " (observed)"
            listed.add_row(text((section or "prior") + applied, "bold"))
        for name in rows:
            estimate = prior.estimates.get(name, _NO_ESTIMATE)
            value = prior.prior.get(name, estimate.value)
            listed.add_row(
                text(f"  {name}"),
                number(value),
                _interval(estimate),
                str(estimate.sites or "-"),
                format(estimate.effective_sites, ".1f"),
                str(estimate.trimmed),
                share(estimate.confidence),
            )
    if listed.row_count:
        yield Text()
        yield listed
    yield from _without_value(prior)
    if prior.contexts:
        yield Text()
        contexts = table("regime", "sites", "settings", right=("sites",))
        for context in prior.contexts:
            settings = [f"{safe(n)} {number(v)}" for n, v in sorted(context.settings.items())]
            contexts.add_row(text(context.regime), str(context.sites), _some(settings) or "-")
        yield contexts
    if prior.untagged_sites:
        yield text(f"{counted(prior.untagged_sites, 'site')} named no regime", "dim")


def _without_value(prior: update_pb2.MetaPriorUpdate) -> Iterator[RenderableType]:
    missing = {n: e for n, e in prior.estimates.items() if not e.HasField("value")}
    if not missing:
        return
    yield Text()
    listed = table("no value yet", "section", "sites", "reason", right=("sites",))
    for name in sorted(missing, key=lambda n: (_section_order(missing[n].section), n)):
        estimate = missing[name]
        listed.add_row(
            text(name),
            text(estimate.section),
            str(estimate.sites or "-"),
            _why_none(estimate.reason),
        )
    yield listed


def _hint_view(hint: update_pb2.MetaPolicyHint) -> Iterator[RenderableType]:
    if not hint.hint_id:
        yield _lineage(hint.lineage)
        yield text(hint.reason or "no hint")
        return
    yield _lineage(hint.lineage, f"confidence {share(hint.confidence)}")
    yield text(
        f"hint {hint.hint_id}: effect {number(hint.effect)}, at least {number(hint.effect_lower)}, "
        f"tried by {counted(hint.sites, 'site')}"
    )
    yield Text()
    listed = table("parameter", "value", "10-90 % of sites", right=("value",))
    for name, value in sorted(hint.bundle.items()):
        spread = ""
        if name in hint.bounds:
            spread = f"{number(hint.bounds[name].lower)} .. {number(hint.bounds[name].upper)}"
        listed.add_row(text(name), _param(value), spread)
    yield listed
    if hint.reason:
        yield Text()
        yield text(hint.reason)


def _consensus_view(consensus: update_pb2.CausalConsensus) -> Iterator[RenderableType]:
    yield _lineage(consensus.lineage)
    if consensus.edges:
        yield Text()
        listed = table(
            "relation",
            "weight",
            "95 % interval",
            "support",
            "sites",
            "I2",
            "conflict",
            right=("weight", "support", "sites", "I2"),
        )
        for edge in consensus.edges:
            listed.add_row(
                Text(_relation(edge), overflow="fold"),
                number(edge.weight),
                interval(edge) or "none",
                share(edge.support),
                f"{edge.sites}/{edge.testing_sites}",
                share(edge.i_squared) if edge.HasField("i_squared") else "",
                text(_conflict(edge), "red"),
            )
        yield listed
    else:
        yield text("no relation has a quorum")
    for cycle in consensus.cycles:
        nodes = ", ".join(safe(node) for node in cycle.nodes)
        yield text(
            f"cycle: each of {nodes} can be reached from each other; the weakest edge is "
            f"{safe(cycle.weakest_source)} -> {safe(cycle.weakest_target)}",
            "yellow",
        )
    if consensus.unpooled:
        counts = ", ".join(
            f"{safe(reason).replace('_', ' ')} {count}"
            for reason, count in sorted(consensus.unpooled.items())
        )
        yield Text(f"relations left out: {counts}", style="dim", overflow="fold")


_NO_ESTIMATE: Final = update_pb2.SignalEstimate()
_NO_ORIGIN: Final = update_pb2.InitOrigin()


def _interval(estimate: update_pb2.SignalEstimate | update_pb2.InitOrigin) -> str:
    return interval(estimate) or "none: too few, or too alike"


def _has_value(prior: update_pb2.MetaPriorUpdate, name: str) -> bool:
    return name in prior.prior or prior.estimates[name].HasField("value")


def _section_order(section: str) -> tuple[int, str]:
    known = (*_SETTINGS, "", _METRICS)
    return (known.index(section) if section in known else len(known), section)


def _lineage(lineage: update_pb2.Lineage, *more: str) -> Text:
    parts = [*_made_from(lineage), *more]
    if lineage.estimator:
        parts.append(safe(lineage.estimator))
    if lineage.trimmed:
        parts.append(f"{counted(lineage.trimmed, 'value')} trimmed")
    if lineage.epsilon_spent:
        parts.append(f"epsilon {number(lineage.epsilon_spent)} spent")
    return Text(", ".join(parts), style="dim")


def _made_from(lineage: update_pb2.Lineage) -> list[str]:
    """Say how much it was made from, which a private cohort does not tell."""
    if lineage.epsilon_spent:
        return ["private"]
    return [counted(lineage.sites, "site"), counted(lineage.packets, "packet")]


def _conflict(edge: update_pb2.ConsensusEdge) -> str:
    told = []
    if edge.sign_conflict:
        told.append(f"sign {edge.positive_sites}+ {edge.negative_sites}-")
    if edge.direction_conflict:
        told.append("direction")
    return ", ".join(told)


def _param(value: packet_pb2.ParamValue) -> str:
    match value.WhichOneof("kind"):
        case "number":
            return number(value.number)
        case "flag":
            return "true" if value.flag else "false"
        case _:
            return safe(value.text)


def _some(items: list[str]) -> str:
    return ", ".join(_first(items))


def _first(items: list[str]) -> list[str]:
    """Return the first items, the last with how many more there are."""
    more = len(items) - _MOST_ITEMS
    if more <= 0:
        return items
    return [*items[: _MOST_ITEMS - 1], f"{items[_MOST_ITEMS - 1]} and {more} more"]


def _listed(items: list[str], *, lead: str = "", tail: str = "", style: str = "") -> list[Text]:
    """Write the first items one after the other; a line breaks between items, never in one."""
    if not items:
        return []
    *others, last = _first(items)
    indent = "  " if lead else ""
    lines = [lead]
    for piece in (*(f"{item}, " for item in others), f"{last}{tail}"):
        if lines[-1].strip() and cell_len(lines[-1] + piece.rstrip()) > _LINE_COLUMNS:
            lines.append(indent)
        lines[-1] += piece
    return [_line(line.rstrip(), style) for line in lines]


def _line(content: str, style: str = "") -> Text:
    return Text(content, style=style, overflow="fold")
