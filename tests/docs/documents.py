"""The snippets of documents, and a shell to run them in."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sysconfig.get_path("scripts")
TARGET = "127.0.0.1:50061"
"""The address of the server in every snippet."""


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document, flags=re.DOTALL)


def console_commands(document: str, first_word: str) -> list[tuple[str, str]]:
    """Return (command, the output shown) of a document's console blocks."""
    found = []
    for block in blocks(document, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = part.splitlines()
            command = [lines.pop(0)]
            while command[-1].endswith("\\") or "".join(command).count("'") % 2:
                command.append(lines.pop(0))
            text = "\n".join(command)
            if text.split()[0] == first_word:
                found.append((text, "\n".join(lines).strip()))
    return found


def run(
    command: list[str], target: str, *, folder: Path | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a command that finds ours on its path and the server in its environment."""
    environment = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
    environment["FMI_TARGET"] = target
    return subprocess.run(
        command,
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def shell(command: str, target: str, *, timeout: float = 120) -> str:
    """Run a line that names a server on `localhost`; return all that it prints."""
    port = target.rpartition(":")[2]
    command = command.replace("localhost:50061", f"localhost:{port}")
    done = run(["bash", "-c", command], target, timeout=timeout)
    return done.stdout + done.stderr
