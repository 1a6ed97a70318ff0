"""What README and docs say is what happens."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from fmi.v1 import error_pb2
from fmi_server.transport.status import STATUS_CODES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = sysconfig.get_path("scripts")
TARGET = "127.0.0.1:50061"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def console_commands(first_word: str) -> list[tuple[str, str]]:
    """Return (command, the output shown) of the README's console blocks."""
    found = []
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = part.splitlines()
            command = [lines.pop(0)]
            while command[-1].endswith("\\") or "".join(command).count("'") % 2:
                command.append(lines.pop(0))
            text = "\n".join(command)
            if text.split()[0] == first_word:
                found.append((text, "\n".join(lines).strip()))
    return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "fmi_server", "serve", "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(
        [*command, "--data-dir", str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process, process.stdout:
        try:
            yield process.stdout.readline().removeprefix("listening on ").strip()
        finally:
            process.terminate()
            assert process.wait(30) == 0


def shell(command: str, target: str, *, timeout: float = 30) -> str:
    port = target.rpartition(":")[2]
    environment = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
    environment["FMI_TARGET"] = target
    done = subprocess.run(
        ["bash", "-c", command.replace("localhost:50061", f"localhost:{port}")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return done.stdout + done.stderr


def test_the_sdk_example_runs(server: str) -> None:
    (example,) = blocks("python")
    assert TARGET in example
    # Two more sites, so that there is a prior to read.
    others = """
from fmi_client import FMIClient
for site in ("site_002", "site_003"):
    with FMIClient(TARGET, domain_id=site, cohort="healthcare") as client:
        client.emit_msp(metrics={"gain_p50": 0.15}, controller={"tau": 0.9})
"""
    code = f"TARGET = {server!r}\n{others}\n{example.replace(TARGET, server)}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "accepted 3"
    assert "{'tau': 0.9}" in done.stdout.splitlines()[-1]


def test_the_grpcurl_examples_print_what_is_shown(server: str) -> None:
    listed, described, emitted, refused, subscribed = console_commands("grpcurl")
    for command, shown in (listed, described):
        assert shell(command, server).strip() == shown
    command, shown = emitted
    volatile = re.compile(r'"receivedAt": "[^"]*"')
    assert volatile.sub("", shell(command, server).strip()) == volatile.sub("", shown)
    assert '"reason":"CONTRACT_VIOLATION"' in shell(refused[0], server)
    # A subscription has no end of its own: grpcurl gives up at its deadline.
    output = shell(subscribed[0].replace("-plaintext", "-plaintext -max-time 2"), server)
    assert '"snapshotEnd"' in output


def test_the_commands_shown_are_there(server: str, tmp_path: Path) -> None:
    packet = tmp_path / "packet.json"
    packet.write_text('{"type": "msp", "domain_id": "a", "cohort": "c", "controller": {"x": 1}}')
    for command, _ in console_commands("fmi"):
        plain = command.split("#", maxsplit=1)[0].replace("packet.json", str(packet))
        if plain.split()[1] == "watch":
            plain = f"timeout 3 {plain}"  # it has no end of its own
        output = shell(plain, server)
        assert "Usage:" not in output, f"{command}: {output}"
        assert "no such" not in output.lower(), f"{command}: {output}"


def test_every_make_target_named_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    for document in (README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        named = re.findall(r"`make ([a-z -]+)`|\$ make ([a-z]+)", document)
        for words in named:
            for word in " ".join(words).split():
                assert word in targets, word


def test_the_links_lead_somewhere() -> None:
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_every_reason_has_a_page_that_names_its_status() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^## (\w+)\n\nStatus `(\w+)`", text, flags=re.MULTILINE))
    reasons = {
        error_pb2.ErrorReason.Name(reason).removeprefix("ERROR_REASON_"): code.name
        for reason, code in STATUS_CODES.items()
    }
    assert told == reasons


def test_the_cohort_file_in_the_readme_is_in_order(tmp_path: Path) -> None:
    (example,) = blocks("yaml")
    (tmp_path / "healthcare.yaml").write_text(example, encoding="utf-8")
    output = shell(f"fmi-server check-config --cohorts {tmp_path}", TARGET)
    assert "1 cohort files are in order" in output


def test_the_example_runs(server: str) -> None:
    example = ROOT / "examples" / "follow_the_prior.py"
    for site in ("site_001", "site_002", "site_003"):
        output = shell(f"{sys.executable} {example} {site} {server}", server, timeout=60)
        assert f"{site}: tau" in output, output
    assert "the cohort says tau" in output
    assert shutil.which("grpcurl", path=SCRIPTS)
