"""The subcommands of `fmi-server`."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import yaml

from fmi_server import app, security_commands, store_commands
from fmi_server.cluster import UnfitError
from fmi_server.cohort_files import CohortFile, read_cohort_folder
from fmi_server.config import (
    PRIVACY_SETTINGS,
    ServerSettings,
    SettingsError,
    unknown_variables,
)
from fmi_server.contracts import FMIContractRegistry
from fmi_server.errors import FMIError
from fmi_server.invocation import EXIT_AGAIN, fail, settings_of
from fmi_server.private_specs import exposed_private, privacy_settings
from fmi_server.server_log import configure_log
from fmi_server.storage.base import StoreBehindError, StoreStoppedError

__all__ = ["cli"]

_log = logging.getLogger(__name__)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fmi-federation", message="fmi-server %(version)s")
def cli() -> None:
    """Run and check an FMI federation server.

    Settings come from flags, then from the environment (FMI_DATA_DIR and so on), then from the YAML file
    given by --config.
    """


for _command in (*store_commands.COMMANDS, *security_commands.COMMANDS):
    cli.add_command(_command)


def _setting_options(command: Any) -> Any:  # click's decorators carry no useful types
    options = [
        click.option("--config", type=click.Path(path_type=Path), help="YAML file with settings.")
    ]
    for name, setting in ServerSettings.model_fields.items():
        description = setting.description or ""
        text = f"{description[:1].upper()}{description[1:]}"
        flag = f"--{name.replace('_', '-')}"
        default = setting.default
        if default is True:
            both = f"{flag}/--no-{flag[2:]}"
            options.append(click.option(both, default=None, help=f"{text} [yes]."))
        elif default is False:
            options.append(click.option(flag, is_flag=True, default=None, help=f"{text}."))
        else:
            shown = f" [{default}]" if default else ""
            kind = click.Path(path_type=Path) if Path in _kinds(setting.annotation) else None
            metavar = _metavar(setting.annotation)
            options.append(click.option(flag, type=kind, metavar=metavar, help=f"{text}{shown}."))
    # They are taken to be refused with a reason.
    options += [
        click.option(f"--{name.replace('_', '-')}", hidden=True) for name in PRIVACY_SETTINGS
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) or (annotation,)


def _metavar(kind: Any) -> str | None:
    """Say what a setting of a type takes; None leaves it to click.

    The values are checked with the settings, so that those of every source are told of alike.
    """
    if get_origin(kind) is Literal:
        return f"[{'|'.join(get_args(kind))}]"
    return {int: "INTEGER", float: "FLOAT"}.get(kind)


@cli.command()
@_setting_options
def serve(config: Path | None, **flags: Any) -> None:
    """Serve until SIGTERM, then drain."""
    settings = settings_of(config, flags)
    configure_log(settings)
    for line in unknown_variables(os.environ):
        _log.warning("%s", line)
    try:
        asyncio.run(app.serve(settings))
    except (StoreBehindError, StoreStoppedError, UnfitError) as error:
        fail(error, code=EXIT_AGAIN)
    except (FMIError, SettingsError) as error:
        fail(error)


@cli.command("check-config")
@_setting_options
def check_config(config: Path | None, **flags: Any) -> None:
    """Check the settings and the cohort files, and start nothing.

    Prints the settings in force as YAML, which --config takes.
    """
    settings = settings_of(config, flags)
    for line in unknown_variables(os.environ):
        click.echo(f"warning: {line}", err=True)
    files: Sequence[CohortFile] = ()
    wrong: list[str] = []
    try:
        app.check_settings(settings)
    except SettingsError as error:
        wrong.append(str(error))
    try:
        if settings.cohorts:
            files = read_cohort_folder(
                settings.cohorts, FMIContractRegistry(), authenticated=settings.authenticated
            )
    except SettingsError as error:
        wrong.append(str(error))
    if wrong:
        fail(SettingsError("\n".join(wrong)))
    shown = settings.model_dump(mode="json")
    click.echo(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True), nl=False)
    click.echo(f"# {len(files)} cohort {'file is' if len(files) == 1 else 'files are'} in order")
    if files:
        click.echo("# not compared with the store: a change that would break sites stops the start")
    private = [file.spec.name for file in files if privacy_settings(file.spec.privacy).private]
    if told := exposed_private(private, authenticated=settings.authenticated):
        click.echo(f"warning: {told}", err=True)
