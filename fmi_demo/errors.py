"""What the demo raises."""

from __future__ import annotations

import click

__all__ = ["DemoArgumentError", "DemoError", "DemoExtraMissingError"]


class DemoError(click.ClickException):
    """The demo cannot go on; the text says why and what to do.

    A command line that is made with click shows the text and ends with `exit_code`.
    """


class DemoArgumentError(DemoError):
    """An argument is wrong, and nothing was done. On a command line that is wrong usage."""

    exit_code = 2


class DemoExtraMissingError(DemoError, ModuleNotFoundError):
    """A library of the extra `demo`, or of `demo-cluster`, is not installed. `name` is the library's."""

    def __init__(self, name: str, *, extra: str = "demo") -> None:
        super().__init__(
            f"the demo needs {name!r}, which is not installed: in the checkout, pip install '.[{extra}]'"
        )
        self.name = name
