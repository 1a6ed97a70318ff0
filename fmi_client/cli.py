"""The `fmi` command.

Exit codes: 0 done; 1 refused or not valid; 2 wrong usage; 3 the server cannot be reached; 4 not found;
5 the server cannot do it now or is broken; 70 `fmi` itself is broken; 130 Ctrl-C; 141 the reader of the
output went away; 143 SIGTERM.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from fmi_client.commands.options import FMIGroup, Settings, current_settings, shared_options

if TYPE_CHECKING:
    from fmi_client.errors import FMIError

__all__ = ["cli", "main"]

_COMMANDS: Final = {
    "emit": "Send packets from a file, a pipe, or options.",
    "validate": "Check packets and send nothing.",
    "watch": "Follow updates as they are released.",
    "get": "Read a prior, warm start, policy hint or causal consensus.",
    "cohorts": "List cohorts, show or change their specs, release now.",
    "sites": "List sites and what is in quarantine.",
    "subscribers": "List who subscribes, and who applied which revision.",
    "privacy": "Plan a privacy budget; see what private cohorts spent.",
    "dictionaries": "Train, register and fetch compression dictionaries.",
    "contract": "Compare this site's contract with the server's.",
    "doctor": "Find out why a server cannot be reached or used.",
    "demo": "Run a whole federation on this machine.",
}
"""What each command does; its module is loaded when it is asked for, so that help is quick."""


class _Root(FMIGroup):
    """Loads commands when they are asked for, and turns every failure into a line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands in the order of their use."""
        del ctx
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a command."""
        del ctx
        if cmd_name not in _COMMANDS:
            return None
        command = importlib.import_module(f"fmi_client.commands.{cmd_name}").command
        return command if isinstance(command, click.Command) else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what each command does, without loading it."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; tell of an error of the SDK."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # What is still buffered has no reader; the interpreter would complain of it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            from fmi_client.commands.exits import ExitCode  # noqa: PLC0415 - help needs no SDK

            return ExitCode.PIPE
        except Exception as failure:
            from fmi_client.errors import FMIError  # noqa: PLC0415 - help needs no SDK

            if isinstance(failure, FMIError):
                return _told_error(failure)
            raise
        return result

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run the command line and exit with a code that says how it went."""
        extra["standalone_mode"] = False
        told: Sequence[str] = (args[0] if args else extra.get("args")) or sys.argv[1:]
        try:
            result = super().main(*args, **extra)
            code = result if isinstance(result, int) else 0
        except BaseException as failure:
            code = _told(failure, as_json="--json" in told)
        sys.exit(code)


def _told_error(error: FMIError) -> int:
    """Tell of an error of the SDK; return the exit code."""
    from fmi_client.commands.output import show_error  # noqa: PLC0415 - help needs no SDK
    from fmi_client.commands.suggestions import suggest_cohort  # noqa: PLC0415
    from fmi_client.errors import CohortUnknownError  # noqa: PLC0415

    settings = current_settings()
    if isinstance(error, CohortUnknownError) and not settings.json:
        suggest_cohort(error, settings)
    return show_error(error, settings)


def _told(failure: BaseException, *, as_json: bool) -> int:
    """Tell of what ended the command; return the exit code."""
    from fmi_client.commands.exits import ExitCode  # noqa: PLC0415 - help needs no SDK

    message = ""
    match failure:
        case click.exceptions.Exit():
            return failure.exit_code
        case click.ClickException():
            code, message = failure.exit_code, failure.format_message()
            if not as_json:
                failure.show()
        case click.Abort() | KeyboardInterrupt():
            code = ExitCode.INTERRUPTED
        case _ if isinstance(failure, SystemExit) or os.environ.get("FMI_DEBUG"):
            raise failure
        case _:
            code = ExitCode.FAULT
            message = f"something is broken in fmi itself: {repr(failure)[:500]}"
            if not as_json:
                click.echo(f"fmi: {message}; FMI_DEBUG=1 shows where", err=True)
    if as_json and message:
        error = {"reason": "", "message": message, "exit_code": int(code)}
        click.echo(json.dumps({"error": error}, indent=2), err=True)
    return code


@click.group(
    name="fmi",
    cls=_Root,
    epilog="Exit codes: 0 done, 1 refused or not valid, 2 wrong usage, 3 server not reached, 4 not "
    "found, 5 server overloaded or broken, 70 fmi itself broken, 130 Ctrl-C, 141 reader of the "
    "output gone, 143 SIGTERM.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="fmi-federation", message="fmi %(version)s")
@shared_options
def cli(_settings: Settings) -> None:
    """Share what sites learned about learning: emit packets, follow what a cohort knows.

    The options below may stand before or after the command.
    """


def _terminated(_number: int, _frame: object) -> NoReturn:
    """End in good order, with the exit code that a shell gives to one whom SIGTERM ended."""
    from fmi_client.commands.exits import ExitCode  # noqa: PLC0415 - help needs no SDK

    sys.exit(ExitCode.TERMINATED)


def main() -> NoReturn:
    """Run `fmi`."""
    signal.signal(signal.SIGTERM, _terminated)
    # The SDK's log would end on stderr; what went wrong is told in lines of the command.
    logging.getLogger("fmi_client").addHandler(logging.NullHandler())
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets its escape, not a UnicodeEncodeError.
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    cli.main(prog_name="fmi")
