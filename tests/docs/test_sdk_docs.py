"""What docs/sdk.md says is what happens."""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path

from click.testing import CliRunner
from documents import ROOT, TARGET, blocks, console_commands, run

from fmi_client import LocalPrivacy, errors
from fmi_client.admin import AsyncAdmin
from fmi_client.cli import cli
from fmi_client.commands.exits import ExitCode, exit_code

GUIDE = (ROOT / "docs" / "sdk.md").read_text(encoding="utf-8")


def test_the_program_prints_what_stands_behind_its_lines(server: str, tmp_path: Path) -> None:
    program = "\n".join(blocks(GUIDE, "python"))
    assert TARGET in program
    command = [sys.executable, "-W", "error", "-c", program.replace(TARGET, server)]
    done = run(command, server, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == re.findall(r"print\(.*\)  # (.+)$", program, re.MULTILINE)


def test_the_commands_shown_succeed(server: str, tmp_path: Path) -> None:
    packets = ({"type": "msp", "domain_id": "a", "controller": {"x": n / 400}} for n in range(400))
    (tmp_path / "packets.jsonl").write_text("\n".join(map(json.dumps, packets)))
    for command, _ in console_commands(GUIDE, "fmi"):
        done = run(command.split(), server, folder=tmp_path)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    assert (tmp_path / "newest.dict").read_bytes() == (tmp_path / "fmi.dict").read_bytes()


def test_a_refused_packet_is_told_by_its_place_as_described(server: str, tmp_path: Path) -> None:
    good, bad = {"type": "msp", "domain_id": "a", "controller": {"x": 1}}, {"type": "msp"}
    (tmp_path / "packets.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(bad)}")
    (tmp_path / "packets.json").write_text(json.dumps([good, bad]))
    for file, place in (("packets.jsonl", ":2"), ("packets.json", " item 2")):
        assert f"`{file}{place}`" in GUIDE
        assert f"{file}{place}: " in run(["fmi", "emit", file], server, folder=tmp_path).stderr


def table_rows(heading: str) -> list[list[str]]:
    table = GUIDE[GUIDE.index(f"| {heading} |") :].split("\n\n")[0]
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in table.splitlines()[2:]]


def test_every_call_of_the_operator_is_listed_with_a_command_that_is_there() -> None:
    told = dict(table_rows("`client.admin`"))
    calls = {name for name in vars(AsyncAdmin) if not name.startswith("_")}
    assert {re.match(r"`(\w+)\(", call)[1] for call in told} == calls
    for call, command in told.items():
        name, parameters = re.match(r"`(\w+)\((.*)\)`", call).groups()
        known = inspect.signature(getattr(AsyncAdmin, name)).parameters
        assert {part.partition("=")[0] for part in parameters.split(", ") if part} <= set(known)
        words = [word for word in re.findall(r"[\w-]+", command) if word not in ("or", "fmi")]
        path = [word for word in words if word.islower() and not word.startswith("-")]
        shown = CliRunner().invoke(cli, [*path, "--help"]).output
        assert f" {' '.join(path)} [" in shown.splitlines()[0]
        assert all(f"  {word} " in shown for word in words if word.startswith("-"))


def test_the_noise_of_local_privacy_is_as_told() -> None:
    for epsilon, *told in table_rows("epsilon"):
        for signals, sigma in zip((1, 4, 20), told, strict=True):
            bounds = {f"s{number}": (0.0, 1.0) for number in range(signals)}
            privacy = LocalPrivacy(bounds, epsilon=float(epsilon), delta=1e-6)
            assert f"{privacy.noise_sigma:.2f}" == sigma


def test_the_exit_codes_are_those_of_the_errors() -> None:
    told = {ExitCode(int(code)): names for code, _, names in table_rows("exit code of `fmi`")}
    assert set(told) == set(ExitCode)
    for code, names in told.items():
        for name in re.findall(r"`(\w+?)s?`", names):
            kind = getattr(errors, name)
            if kind not in (errors.FMIError, errors.TemporaryError):
                assert exit_code(kind("")) == code, name
    assert exit_code(errors.TemporaryError("")) == ExitCode.SERVER
    assert exit_code(errors.FMIError("")) == ExitCode.REFUSED
