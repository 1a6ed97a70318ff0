"""The commands of the page on security, run in its order, and its examples."""

from __future__ import annotations

import json
import re
from pathlib import Path

from documents import ROOT, TARGET, blocks, console_commands, run

from fmi.descriptors import CONTRACT_FILES
from fmi_server.errors import reason_name
from fmi_server.tokens import read_tokens
from fmi_server.transport.auditing import AUDITED_REASONS

PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def test_the_commands_do_what_the_page_says(tmp_path: Path) -> None:
    commands = [command for command, _ in console_commands(PAGE, "fmi-server")]
    assert [command.split()[1] for command in commands] == [
        *("init", "init", "check-config"),
        *("tokens", "tokens", "tokens"),
        *("tokens", "tokens", "renew", "renew", "revoke"),
    ]
    for command in commands:
        words = command.split()
        if "ID" in words:
            (token_id, *_) = read_tokens(tmp_path / "tokens.json").records
            words[words.index("ID")] = token_id
        done = run(words, TARGET, folder=tmp_path)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    principals = [r.principal for r in read_tokens(tmp_path / "tokens.json").records.values()]
    assert principals == ["gateway", "site_001"], "the one that was rotated is revoked"
    for name in ("site_001.token", "gateway.token", "site_001.token.new"):
        assert (tmp_path / name).read_text().startswith("fmi_")


def test_the_cohort_shown_is_in_order(tmp_path: Path) -> None:
    (example,) = blocks(PAGE, "yaml")
    (tmp_path / "cohorts").mkdir()
    (tmp_path / "cohorts" / "healthcare.yaml").write_text(example, encoding="utf-8")
    (tmp_path / "tokens.json").write_text('{"version": 1, "tokens": []}')
    command = "fmi-server check-config --cohorts cohorts --tokens tokens.json --operators boss"
    done = run(command.split(), TARGET, folder=tmp_path)
    assert "# 1 cohort file is in order" in done.stdout, done.stderr


def test_every_method_stands_in_the_table_of_rights() -> None:
    rows = PAGE[PAGE.index("| | listed, or") : PAGE.index("**Operators** are")]
    for file in CONTRACT_FILES:
        for service in file.services_by_name.values():
            for method in service.methods:
                assert re.search(rf"\b{method.name}\b", rows), method.full_name


def test_the_audited_reasons_are_told() -> None:
    section = PAGE[PAGE.index("## The audit log") :]
    told = re.search(r"for\s+who\s+calls\s+\(([A-Z_,\s]+)\)", section)
    assert told is not None
    names = {name.strip() for name in told[1].replace("\n", " ").split(",")}
    assert names == {reason_name(reason) for reason in AUDITED_REASONS}
    (line,) = blocks(section, "json")
    assert json.loads(line)["outcome"] == "OK"
