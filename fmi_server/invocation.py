"""What the subcommands of `fmi-server` share: settings from a command line, and how a command fails."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final, NoReturn

import click

from fmi_server.config import ServerSettings, SettingsError, load_settings

__all__ = ["EXIT_AGAIN", "EXIT_SETTINGS", "fail", "settings_of"]

EXIT_AGAIN: Final = 1
"""A server cannot go on as it is, and can as soon as it is started again."""

EXIT_SETTINGS: Final = 2
"""A setting, a cohort file or the store is wrong: starting again will not help."""


def settings_of(config: Path | None, flags: dict[str, Any]) -> ServerSettings:
    """Read the settings that a command line gives; end the command where they are wrong."""
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return load_settings(given, config_file=config)
    except SettingsError as error:
        fail(error)


def fail(error: BaseException, *, code: int = EXIT_SETTINGS) -> NoReturn:
    """End the command with one line that says why."""
    click.echo(f"fmi-server: {error}", err=True)
    sys.exit(code)
