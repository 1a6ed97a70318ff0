"""What the exit codes of `fmi` say."""

from __future__ import annotations

from enum import IntEnum

from fmi_client.errors import (
    CompactedError,
    ConfigurationError,
    ConnectionFailedError,
    DeadlineError,
    FMIError,
    NotFoundError,
    ProtocolError,
    ServerInternalError,
    TemporaryError,
)

__all__ = ["ExitCode", "exit_code"]


class ExitCode(IntEnum):
    """The exit codes of `fmi`.

    Attributes:
        OK: All that was asked for was done. A packet in quarantine is durable, so it is no failure.
        REFUSED: Something was refused or is not valid, or there was no packet at all; trying again does
            not help.
        USAGE: The command line is wrong, or a file named in it cannot be read.
        UNREACHABLE: There is no connection, or no answer came in time.
        NOT_FOUND: There is no such cohort, update, site or packet (yet), or it is no longer kept.
        SERVER: The server cannot do it now, or something is broken in it.
        FAULT: Something is broken in `fmi` itself.
        INTERRUPTED: Ctrl-C.
        PIPE: The reader of the output went away.
        TERMINATED: SIGTERM.
    """

    OK = 0
    REFUSED = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_FOUND = 4
    SERVER = 5
    FAULT = 70
    INTERRUPTED = 130
    PIPE = 141
    TERMINATED = 143


def exit_code(error: FMIError) -> ExitCode:
    """Return the exit code for an error of the SDK."""
    match error:
        case ConnectionFailedError() | DeadlineError():
            return ExitCode.UNREACHABLE
        case NotFoundError() | CompactedError():
            return ExitCode.NOT_FOUND
        case TemporaryError() | ServerInternalError() | ProtocolError():
            return ExitCode.SERVER
        case ConfigurationError():
            return ExitCode.USAGE
        case _:
            return ExitCode.REFUSED
