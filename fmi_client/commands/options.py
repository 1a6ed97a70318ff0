"""The options that every command takes, before or after its name, and the commands' base classes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import click
from click.core import ParameterSource

__all__ = [
    "DEFAULT_TARGET",
    "Argument",
    "DefaultGroup",
    "FMICommand",
    "FMIGroup",
    "Settings",
    "current_settings",
    "json_option",
    "shared_options",
]

DEFAULT_TARGET: Final = "127.0.0.1:50061"
DEFAULT_TIMEOUT_S: Final = 10.0

_META: Final = "fmi_client.settings"

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the shared options say.

    Attributes:
        target: The server, as `HOST:PORT`.
        json: Whether the output is for programs.
        tls: Whether TLS is used although no certificate file is named.
        ca: PEM file of the authorities that the server's certificate is checked against.
        cert: PEM file of the site's own certificate chain, for mutual TLS.
        key: PEM file of the key of `cert`.
        server_name: The name that the server's certificate must have, where it is not the target's.
        token: A bearer token.
        token_file: A file with a bearer token.
        insecure: Whether the token may be sent in plain text beyond this machine.
        timeout_s: Seconds that a call may take, its repetitions included.
    """

    target: str = DEFAULT_TARGET
    json: bool = False
    tls: bool = False
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_name: str | None = None
    token: str | None = None
    token_file: Path | None = None
    insecure: bool = False
    timeout_s: float = DEFAULT_TIMEOUT_S

    @property
    def bearer(self) -> str | Path | None:
        """The token, or the file that has it; a file named on the command line goes before FMI_TOKEN."""
        return self.token_file or self.token

    @property
    def secure(self) -> bool:
        """Whether the connection uses TLS."""
        return self.tls or any((self.ca, self.cert, self.key, self.server_name))


def current_settings() -> Settings:
    """Return what the shared options said so far on this command line."""
    return Settings(**click.get_current_context().meta.get(_META, {}))


class _SharedOption(click.Option):
    """An option that counts wherever on the command line it stands; the last one wins."""


def _keep(ctx: click.Context, param: click.Parameter, value: object) -> object:
    told: dict[str, object] = ctx.meta.setdefault(_META, {})
    name = str(param.name)
    match ctx.get_parameter_source(name):
        case ParameterSource.COMMANDLINE:
            told[name] = value
        case ParameterSource.ENVIRONMENT:
            told.setdefault(name, value)
        case _:
            pass
    return value


_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)


def _shared(*names: str, **attributes: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    return click.option(*names, cls=_SharedOption, expose_value=False, callback=_keep, **attributes)


_JSON: Final = _shared("--json", is_flag=True, help="Print JSON for programs.")
_OPTIONS: Final = (
    _shared(
        "--target",
        metavar="HOST:PORT",
        envvar="FMI_TARGET",
        help=f"The server. [env: FMI_TARGET; default: {DEFAULT_TARGET}]",
    ),
    _JSON,
    _shared("--tls", is_flag=True, help="Use TLS and the system's authorities."),
    _shared("--ca", type=_FILE, metavar="PEM", help="Use TLS and these authorities."),
    _shared("--cert", type=_FILE, metavar="PEM", help="The site's certificate, for mutual TLS."),
    _shared("--key", type=_FILE, metavar="PEM", help="The key of the site's certificate."),
    _shared(
        "--server-name",
        metavar="NAME",
        help="The name in the server's certificate, where it is not the target's.",
    ),
    _shared(
        "--token",
        metavar="TOKEN",
        envvar="FMI_TOKEN",
        help="A bearer token. Better in a file, since other users see what a command line has. "
        "[env: FMI_TOKEN]",
    ),
    _shared(
        "--token-file",
        type=_FILE,
        metavar="FILE",
        envvar="FMI_TOKEN_FILE",
        help="A file with a bearer token; it goes before --token. [env: FMI_TOKEN_FILE]",
    ),
    _shared("--insecure", is_flag=True, help="Send the token in plain text beyond this machine."),
    _shared(
        "--timeout",
        "timeout_s",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help=f"The longest time for a call. [default: {DEFAULT_TIMEOUT_S:g}]",
    ),
)


def shared_options(function: Callable[Concatenate[Settings, P], R]) -> Callable[P, R]:
    """Give a command the shared options, and its function the `Settings` as first argument."""
    return _with_options(function, _OPTIONS)


def json_option(function: Callable[Concatenate[Settings, P], R]) -> Callable[P, R]:
    """Give a command that reaches no server just `--json`, and its function the `Settings`."""
    return _with_options(function, (_JSON,))


def _with_options(
    function: Callable[Concatenate[Settings, P], R],
    options: Iterable[Callable[[Callable[P, R]], Callable[P, R]]],
) -> Callable[P, R]:
    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(current_settings(), *args, **kwargs)

    decorated: Callable[P, R] = run
    for option in reversed(tuple(options)):
        decorated = option(decorated)
    return decorated


class Argument(click.Argument):
    """A positional argument that help can describe, with every version of click that we support."""

    def __init__(self, *args: Any, help: str = "", **attributes: Any) -> None:  # noqa: A002  click's name
        super().__init__(*args, **attributes)
        self.help = help


class _Sections(click.Command):
    """Writes arguments, options and the shared options, each under a heading of their own."""

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write nothing: `format_options` does, since older versions of click do not call this."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {
            "Arguments": [],
            "Options": [],
            "Connection and output": [],
        }
        for param in self.get_params(ctx):
            if isinstance(param, click.Argument):
                described = getattr(param, "help", None) or ""
                sections["Arguments"].append((param.make_metavar(ctx), described))
            elif (record := param.get_help_record(ctx)) is not None:
                shared = isinstance(param, _SharedOption)
                sections["Connection and output" if shared else "Options"].append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


class FMICommand(_Sections):
    """A command."""


class FMIGroup(_Sections, click.Group):
    """A group of commands."""

    command_class = FMICommand

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, then the commands."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


class DefaultGroup(FMIGroup):
    """A group in which one command needs no name: what is not a command's name is its argument.

    `default_command` is that command's name. It stays callable by name, for the argument that is called
    like one of the commands.
    """

    default_command: str = ""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        attributes.setdefault("invoke_without_command", True)
        settings = dict(attributes.pop("context_settings", None) or {})
        # Options of the default command may stand before its argument: they are passed on.
        attributes["context_settings"] = {"ignore_unknown_options": True, **settings}
        super().__init__(*args, **attributes)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; the default one where none is named."""
        if args and self.get_command(ctx, args[0]) is not None:
            return super().resolve_command(ctx, args)
        return self.default_command, self.get_command(ctx, self.default_command), args

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that is named, or the default one without arguments."""
        result = super().invoke(ctx)
        if ctx.invoked_subcommand is None:
            command = self.get_command(ctx, self.default_command)
            if command is not None:
                with command.make_context(self.default_command, [], parent=ctx) as sub_ctx:
                    return command.invoke(sub_ctx)
        return result
