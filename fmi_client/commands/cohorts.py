"""`fmi cohorts`: what cohorts there are, and their rules."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import click
from google.protobuf.message import Message
from rich.console import RenderableType
from rich.text import Text

from fmi.plain_values import fields_once
from fmi.v1 import admin_service_pb2, cohort_pb2, error_pb2
from fmi_client.commands.exits import ExitCode
from fmi_client.commands.options import Argument, DefaultGroup, Settings, shared_options
from fmi_client.commands.output import (
    age,
    message_data,
    number,
    print_json,
    print_text,
    safe,
    show_note,
    table,
    text,
)
from fmi_client.commands.session import open_client
from fmi_client.commands.updates import headline, settings_line
from fmi_client.errors import AccessDeniedError, SpecError, Violation

__all__ = ["command"]

_REASON: Final = error_pb2.ErrorReason.Name(error_pb2.ERROR_REASON_SPEC_INVALID).removeprefix(
    "ERROR_REASON_"
)
_PARTS: Final = ("aggregation", "release", "ingest", "policy", "privacy", "access", "retention")


class _CohortsGroup(DefaultGroup):
    default_command = "show"


@click.group(name="cohorts", cls=_CohortsGroup, subcommand_metavar="[NAME | put | release] ...")
@shared_options
def command(_settings: Settings) -> None:
    """List the cohorts, or show the spec of the cohort NAME.

    \b
      fmi cohorts
      fmi cohorts healthcare
      fmi cohorts put healthcare.json --dry-run
      fmi cohorts release healthcare

    Who may not administer any cohort gets the names of those that he may use.

    In the list, "quar." is the number of packets in quarantine, "subs." that of subscribers; an "open"
    cohort was never declared, a "dirty" one has news to release. A "private" one releases by the clock,
    until its budget is "exhausted".
    """  # noqa: D301 - click wants the character


@command.command("show")
@click.argument(
    "name", cls=Argument, required=False, help="The cohort whose spec to show. [default: list all]"
)
@shared_options
def _show(settings: Settings, name: str | None) -> int:
    """List the cohorts, or show the spec of the cohort NAME (the word `show` may be left out)."""
    with open_client(settings) as client:
        if name is not None:
            answer = client.cohort_spec(name)
            if settings.json:
                print_json(message_data(answer))
            else:
                print_text(*_spec_view(answer.spec, answer.schema_hash))
            return ExitCode.OK
        try:
            cohorts = client.admin.list_cohorts()
            budgets = [] if settings.json else client.admin.list_privacy_budgets()
        except AccessDeniedError:
            return _list_names(settings, [spec.name for spec in client.cohort_specs()])
    if settings.json:
        print_json({"cohorts": [message_data(cohort) for cohort in cohorts]})
    elif cohorts:
        print_text(_list_view(cohorts, budgets))
    else:
        print_text("no cohorts yet")
    return ExitCode.OK


def _list_names(settings: Settings, names: list[str]) -> int:
    """List what a site sees that administers nothing: the cohorts that it may use."""
    if settings.json:
        print_json({"cohorts": [{"cohort": name} for name in names]})
        return ExitCode.OK
    print_text(*(Text(safe(name)) for name in names or ["no cohorts for these credentials"]))
    return ExitCode.OK


@command.command("put")
@click.argument(
    "file",
    cls=Argument,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The spec, as JSON or YAML.",
)
@click.option("--force", is_flag=True, help="Make a change that breaks sites all the same.")
@click.option("--dry-run", is_flag=True, help="Only check the change.")
@shared_options
def _put(settings: Settings, file: Path, force: bool, dry_run: bool) -> int:
    """Declare a cohort, or change its spec, from a FILE: the JSON form of CohortSpec, or YAML."""
    plain = _read_spec(file)
    with open_client(settings) as client:
        answer = client.admin.put_cohort_spec(plain, force=force, dry_run=dry_run)
    if settings.json:
        print_json({**message_data(answer), "dry_run": dry_run})
        return ExitCode.OK
    name = safe(plain.get("name", ""))
    if not answer.changed:
        print_text(Text(f"{name} is as the file says; nothing to change"))
    elif dry_run:
        print_text(Text(f"{name} would change; nothing was done (--dry-run)"))
    else:
        print_text(Text(f"{name} is now as the file says"))
    print_text(text(f"schema hash {answer.schema_hash}", "dim"))
    return ExitCode.OK


@command.command("release")
@click.argument("name", cls=Argument, help="The cohort.")
@shared_options
def _release(settings: Settings, name: str) -> int:
    """Release the aggregates of the cohort NAME now, without waiting for its interval."""
    with open_client(settings) as client:
        updates = client.admin.release_now(name)
    if settings.json:
        print_json({"updates": [message_data(update) for update in updates]})
        return ExitCode.OK
    for update in updates:
        print_text(headline(update))
        print_text(*settings_line(update), indent=2)
    if not updates:
        show_note(f"nothing to release: nothing changed in {name} since its last release")
    return ExitCode.OK


def _read_spec(file: Path) -> Mapping[str, Any]:
    """Read a cohort file.

    Raises:
        SpecError: It is not JSON or YAML, or not an object.
        click.UsageError: It is YAML, and there is no reader for it.
    """
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _spec_error(file, f"is not UTF-8 text: {error.reason}") from None
    if file.suffix in (".yaml", ".yml"):
        plain = _read_yaml(file, content)
    else:
        try:
            plain = json.loads(content, object_pairs_hook=fields_once)
        except json.JSONDecodeError as error:
            detail = f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
            raise _spec_error(file, detail) from None
        except ValueError as error:  # a name twice; a number of thousands of digits
            raise _spec_error(file, f"is not JSON that can be read: {error}") from None
        except RecursionError:
            raise _spec_error(file, "is nested too deep to be a cohort spec") from None
    if not isinstance(plain, Mapping):
        raise _spec_error(file, "must have the fields of a CohortSpec by name")
    return plain


def _read_yaml(file: Path, content: str) -> object:
    if importlib.util.find_spec("yaml") is None:
        raise click.UsageError(
            f"{file} is YAML, and PyYAML is not installed: pip install pyyaml, or write it as JSON."
        )
    from fmi.yaml_text import YAMLTextError, parse_yaml  # noqa: PLC0415 - it needs PyYAML

    try:
        return parse_yaml(content)
    except YAMLTextError as error:
        raise _spec_error(file, str(error)) from None


def _spec_error(file: Path, detail: str) -> SpecError:
    return SpecError(
        f"cohort spec cannot be read: {file} {detail}",
        reason=_REASON,
        violations=[Violation(str(file), "fmi.cohort_spec.file", detail)],
    )


def _list_view(
    cohorts: list[admin_service_pb2.CohortStatus], budgets: list[admin_service_pb2.PrivacyBudget]
) -> RenderableType:
    private = {budget.cohort: budget for budget in budgets if budget.HasField("plan")}
    right = ("sites", "packets", "quar.", "subs.")
    listed = table(
        "cohort", "sites", "packets", "quar.", "prior", "released", "subs.", "state", right=right
    )
    now = time.time()
    for cohort in cohorts:
        budget = private.get(cohort.cohort)
        states = (
            ("open", not cohort.declared),
            ("private", budget is not None),
            ("exhausted", budget is not None and not budget.releases_left),
            ("dirty", cohort.dirty and budget is None),  # a private one is released by the clock
        )
        listed.add_row(
            text(cohort.cohort, "cyan"),
            str(cohort.sites),
            str(cohort.packets),
            str(cohort.quarantined) if cohort.quarantined else "",
            f"rev {cohort.revisions['prior']}" if "prior" in cohort.revisions else "-",
            age(cohort.released_at, now),
            str(cohort.subscribers),
            ", ".join(name for name, there in states if there),
        )
    return listed


def _spec_view(spec: cohort_pb2.CohortSpec, schema_hash: str) -> Iterator[RenderableType]:
    yield text(spec.name, "bold cyan")
    if spec.description:
        yield text(spec.description)
    yield text(f"schema hash {schema_hash}", "dim")
    free = spec.free_signals if spec.HasField("free_signals") else not spec.signals
    yield text("signals that are not declared are taken too" if free else "declared signals only")
    if spec.signals:
        yield Text()
        listed = table("signal", "section", "bounds", "transform", "better", "unit")
        for signal in spec.signals:
            better = _short(signal, "direction").removesuffix("_is_better")
            listed.add_row(
                text(signal.name),
                _short(signal, "section"),
                _bounds(signal),
                _short(signal, "transform"),
                f"{better}, guardrail" if signal.guardrail else better,
                text(signal.unit),
            )
        yield listed
    for part in _PARTS:
        if spec.HasField(part):
            rules = list(_rules(getattr(spec, part)))
            if rules:
                yield Text()
                yield text(part, "bold")
                listed = table("rule", "value")
                listed.show_header = False
                for name, value in rules:
                    listed.add_row(Text(f"  {name}"), text(value))
                yield listed


def _rules(part: Message) -> Iterator[tuple[str, str]]:
    for name, value in message_data(part).items():
        shown = value
        if isinstance(value, list):
            shown = ", ".join(map(str, value)) or "everyone"
        elif isinstance(value, dict):
            shown = ", ".join(f"{key} {number(item)}" for key, item in value.items()) or "-"
        elif isinstance(value, bool):
            shown = "yes" if value else "no"
        elif isinstance(value, float):
            shown = number(value)
        elif name == "schema_mismatch":
            shown = str(value).removeprefix("SCHEMA_MISMATCH_").lower()
        yield name, str(shown) or "-"


def _short(signal: cohort_pb2.SignalSpec, field: str) -> str:
    """Write an enum value as in a cohort file; empty where it is unset."""
    kind = signal.DESCRIPTOR.fields_by_name[field].enum_type
    value = getattr(signal, field)
    if kind is None or not value or value not in kind.values_by_number:
        return ""
    prefix = str(kind.values[0].name).removesuffix("UNSPECIFIED")
    return str(kind.values_by_number[value].name).removeprefix(prefix).lower()


def _bounds(signal: cohort_pb2.SignalSpec) -> str:
    lower = number(signal.lower) if signal.HasField("lower") else ""
    upper = number(signal.upper) if signal.HasField("upper") else ""
    return f"{lower} .. {upper}" if lower or upper else ""
