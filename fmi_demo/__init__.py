"""A federation on one machine: a server, thirteen sites of which two lie, and one that comes late.

    import fmi_demo

    result = fmi_demo.run(output=Path("demo-output"))

Every site is a process with the handwriting of one writer of scikit-learn's digits. It tunes a learner,
tries policies, looks for causes, and tells what it found over gRPC. The numbers are computed in each run.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Final

from fmi_demo.errors import DemoArgumentError, DemoError, DemoExtraMissingError

if TYPE_CHECKING:
    from pathlib import Path

    from fmi_demo.result import DemoResult

__all__ = ["DemoArgumentError", "DemoError", "DemoExtraMissingError", "run"]

_NEEDED: Final = ("lingam", "matplotlib", "numpy", "sklearn", "structlog", "yaml")


def run(
    *,
    output: Path,
    sites: int = 13,
    seed: int = 7,
    keep_serving: bool = False,
    quick: bool = False,
    json: bool = False,
    cluster: bool = False,
) -> DemoResult:
    """Run the demo: about a minute on two cores.

    Args:
        output: Folder for the chart, the results and the server's data; a demo's earlier output in it is
            replaced.
        sites: Sites that emit, 6 to 13; two of them lie. The late site comes on top.
        seed: Decides who has which writer, and all that is random in the sites.
        keep_serving: Leave the server up until an interrupt (Ctrl-C).
        quick: Compute much less; the figures then show that everything works and nothing more.
        json: Write the result to standard output as JSON, and the progress to standard error.
        cluster: Run three brokers and three servers, and kill one of each on the way.

    Returns:
        All figures, and where the files are.

    Raises:
        DemoExtraMissingError: A library of the extra `demo` is not installed.
        DemoArgumentError: An argument is wrong, or there are other things in `output`.
        DemoError: The server or a site failed.
    """
    for name in _NEEDED:
        if importlib.util.find_spec(name) is None:
            raise DemoExtraMissingError(name)
    from fmi_demo.orchestrate import run_demo  # noqa: PLC0415 - needs what was just looked for

    return run_demo(
        output=output,
        sites=sites,
        seed=seed,
        keep_serving=keep_serving,
        quick=quick,
        json=json,
        cluster=cluster,
    )
