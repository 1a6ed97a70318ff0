"""What README and docs say is what happens."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from documents import ROOT, SCRIPTS, TARGET, blocks, console_commands, run, shell

from fmi.v1 import error_pb2
from fmi_server.transport.status import STATUS_CODES

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_sdk_example_runs(server: str) -> None:
    (example,) = blocks(README, "python")
    assert TARGET in example
    # A prior of one site, which has no values; then a second site, so that the example's has some.
    others = """
from fmi_client import FMIClient
for site in ("site_002", "site_003"):
    with FMIClient(TARGET, domain_id=site, cohort="healthcare") as client:
        client.emit_msp(metrics={"gain_p50": 0.15}, controller={"tau": 0.9})
        if site == "site_002":
            client.admin.release_now("healthcare")
"""
    code = f"TARGET = {server!r}\n{others}\n{example.replace(TARGET, server)}"
    done = run([sys.executable, "-W", "error", "-c", code], server, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "accepted 3"
    assert "{'tau': 0.9}" in done.stdout.splitlines()[-1]


def test_the_grpcurl_examples_print_what_is_shown(server: str) -> None:
    listed, described, emitted, refused, subscribed = console_commands(README, "grpcurl")
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
    for command, _ in console_commands(README, "fmi"):
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


def test_the_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(docs/([a-z-]+\.md)", README))
    assert linked == {path.name for path in ROOT.glob("docs/*.md")}


def test_every_reason_has_a_page_that_names_its_status() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^## (\w+)\n\nStatus `(\w+)`", text, flags=re.MULTILINE))
    reasons = {
        error_pb2.ErrorReason.Name(reason).removeprefix("ERROR_REASON_"): code.name
        for reason, code in STATUS_CODES.items()
    }
    assert told == reasons


def test_the_cohort_file_in_the_readme_is_in_order(tmp_path: Path) -> None:
    (example,) = blocks(README, "yaml")
    (tmp_path / "healthcare.yaml").write_text(example, encoding="utf-8")
    output = shell(f"fmi-server check-config --cohorts {tmp_path}", TARGET)
    assert "# 1 cohort file is in order" in output


def test_the_example_runs(server: str) -> None:
    example = ROOT / "examples" / "follow_the_prior.py"
    for site in ("site_001", "site_002", "site_003"):
        output = shell(f"{sys.executable} {example} {site} {server}", server, timeout=120)
        assert f"{site}: tau" in output, output
    assert "the cohort says tau" in output
    assert shell(f"{sys.executable} {example}", server).startswith("usage: ")
    assert shutil.which("grpcurl", path=SCRIPTS)
