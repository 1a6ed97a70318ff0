"""The subcommands of `fmi-server`."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import structlog

from fmi_server import app
from fmi_server.cohort_files import read_cohort_folder
from fmi_server.cohorts import CohortRegistry
from fmi_server.config import ServerSettings, SettingsError, load_settings
from fmi_server.contracts import FMIContractRegistry
from fmi_server.errors import FMIError

__all__ = ["cli"]

EXIT_SETTINGS: Final = 2
"""A setting, a cohort file or the store is wrong: starting again will not help."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fmi-federation", message="fmi-server %(version)s")
def cli() -> None:
    """Run and check an FMI federation server.

    Settings come from flags, then from the environment (FMI_DATA_DIR and so on), then from the YAML file
    given by --config.
    """


def _setting_options(command: Any) -> Any:  # click's decorators carry no useful types
    options = [
        click.option("--config", type=click.Path(path_type=Path), help="YAML file with settings."),
        click.option("--listen", help="Address and port [127.0.0.1:50061]; port 0 picks one."),
        click.option("--data-dir", type=click.Path(path_type=Path), help="Where the store lives."),
        click.option("--store", help="sqlite (default) or memory."),
        click.option(
            "--cohorts", type=click.Path(path_type=Path), help="Folder of cohort files (*.yaml)."
        ),
        click.option(
            "--open-cohorts/--no-open-cohorts",
            default=None,
            help="Open undeclared cohorts on demand [yes].",
        ),
        click.option(
            "--force-cohorts",
            is_flag=True,
            default=None,
            help="Put cohort files in force that would break sites.",
        ),
        click.option("--metrics-listen", help="Address and port of the Prometheus page."),
        click.option(
            "--insecure", is_flag=True, default=None, help="Listen beyond loopback without TLS."
        ),
        click.option(
            "--reflection/--no-reflection",
            default=None,
            help="Serve reflection and channelz [yes].",
        ),
        click.option("--log-level", help="debug, info (default), warning or error."),
        click.option("--log-format", help="text (default) or json."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@_setting_options
def serve(config: Path | None, **flags: Any) -> None:
    """Serve until SIGTERM, then drain."""
    settings = _settings(config, flags)
    _configure_logging(settings)
    try:
        asyncio.run(app.serve(settings))
    except (FMIError, SettingsError) as error:
        _fail(error)


@cli.command("check-config")
@_setting_options
def check_config(config: Path | None, **flags: Any) -> None:
    """Check the settings and the cohort files, and start nothing."""
    settings = _settings(config, flags)
    registry = CohortRegistry(FMIContractRegistry())
    try:
        specs = read_cohort_folder(settings.cohorts, registry) if settings.cohorts else []
    except FMIError as error:
        _fail(error)
    for name, value in settings.model_dump(mode="json").items():
        click.echo(f"{name}: {value}")
    click.echo(f"{len(specs)} cohort files are in order")


def _settings(config: Path | None, flags: dict[str, Any]) -> ServerSettings:
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return load_settings(given, config_file=config)
    except SettingsError as error:
        _fail(error)


def _fail(error: BaseException) -> NoReturn:
    click.echo(f"fmi-server: {error}", err=True)
    sys.exit(EXIT_SETTINGS)


def _configure_logging(settings: ServerSettings) -> None:
    """Write log lines to standard error; site-chosen text cannot break a line."""
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _one_line,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())


def _one_line(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    text = str(event.get("event", ""))
    event["event"] = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return event
