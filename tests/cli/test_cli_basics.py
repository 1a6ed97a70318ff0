"""The command line itself: options anywhere, help, usage errors, exit codes, no traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import grpc
import pytest
from cli_server import RefusedError
from click.testing import CliRunner

from fmi.v1 import interchange_service_pb2, update_pb2
from fmi_client import errors
from fmi_client.cli import cli
from fmi_client.commands.exits import ExitCode, exit_code

COMMANDS = [
    "emit",
    "validate",
    "watch",
    "get",
    "cohorts",
    "sites",
    "subscribers",
    "dictionaries",
    "contract",
    "doctor",
    "demo",
]


def update_answer(_request=None):
    update = update_pb2.Update(cohort="care", kind=update_pb2.UPDATE_KIND_PRIOR, revision=3)
    update.prior_update.prior["tau"] = 0.5
    return interchange_service_pb2.GetUpdateResponse(update=update)


def test_every_command_is_listed_and_has_help(fmi):
    listing = fmi("--help")
    assert listing.exit_code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in listing.stdout
        told = fmi(name, "--help")
        assert told.exit_code == 0
        assert max(map(len, told.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("line", "metavar"),
    [
        (["emit", "file"], "[FILE]"),
        (["validate"], "[FILE]"),
        (["watch"], "PATTERN..."),
        (["get"], "COHORT"),
        (["cohorts", "put"], "FILE"),
        (["sites", "quarantine"], "[COHORT]"),
        (["dictionaries", "train"], "FILE..."),
        (["dictionaries", "get"], "[ID]"),
    ],
)
def test_arguments_are_described_under_a_heading_of_their_own(fmi, line, metavar):
    _, told = fmi(*line, "--help").stdout.split("\nArguments:\n")
    arguments, _ = told.split("\n\nOptions:\n") if "Options:" in told else (told, "")
    assert re.fullmatch(rf" +{re.escape(metavar)}  +\w[^\n]+", arguments), told


def test_help_loads_neither_rich_nor_a_command():
    """Help is quick because it needs only click and what `import fmi_client` itself brings."""
    code = (
        "import sys; from fmi_client.cli import cli\n"
        "try: cli.main(['--help'], prog_name='fmi')\n"
        "except SystemExit: pass\n"
        "print(sorted(m for m in sys.modules if m.startswith(('rich', 'fmi_client.commands.'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['fmi_client.commands.options']"


def test_version(fmi):
    assert re.fullmatch(r"fmi [0-9.]+\n", fmi("--version").stdout)


@pytest.mark.parametrize("line", [[], ["get"], ["emit"], ["emit", "msp"], ["cohorts", "put"]])
def test_help_has_a_short_name(fmi, line):
    assert fmi(*line, "-h").stdout == fmi(*line, "--help").stdout


def test_help_names_every_exit_code(fmi):
    told = fmi("--help").stdout.split("Exit codes:")[1]
    assert {int(code) for code in re.findall(r"[0-9]+", told)} == set(ExitCode)


def test_no_command_of_the_base_install_needs_the_server_numpy_or_yaml():
    code = (
        "import sys, importlib\n"
        "for name in ('numpy', 'yaml', 'fmi_server', 'grpc_health', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        f"for name in {COMMANDS}: importlib.import_module(f'fmi_client.commands.{{name}}')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("place", ["before", "after", "environment"])
def test_shared_options_count_wherever_they_stand(fmi, script, place, monkeypatch):
    script["GetUpdate"] = update_answer
    shared = ["--target", script.target, "--json"]
    command = ["get", "care"]
    if place == "environment":
        monkeypatch.setenv("FMI_TARGET", script.target)
        line = [*command, "--json"]
    else:
        line = [*shared, *command] if place == "before" else [*command, *shared]
    result = fmi(*line)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["revision"] == 3


def test_the_last_target_wins_over_an_earlier_one_and_the_environment(fmi, script, monkeypatch):
    script["GetUpdate"] = update_answer
    monkeypatch.setenv("FMI_TARGET", "127.0.0.1:2")
    result = fmi("--target", "127.0.0.1:1", "get", "care", "--target", script.target)
    assert result.exit_code == 0, result.output
    result = fmi("--target", script.target, "get", "care")
    assert result.exit_code == 0, result.output


def test_shared_options_count_between_a_group_and_its_command(fmi, script):
    script["GetCohortSpec"] = RefusedError(
        grpc.StatusCode.NOT_FOUND, "COHORT_UNKNOWN", "no such cohort"
    )
    result = fmi("cohorts", "--target", script.target, "--json", "show", "care")
    assert result.exit_code == ExitCode.NOT_FOUND
    assert json.loads(result.stderr)["error"]["reason"] == "COHORT_UNKNOWN"


def test_the_token_goes_along_and_not_in_plain_text_beyond_this_machine(fmi, script):
    script["GetUpdate"] = update_answer
    assert fmi("get", "care", "--target", script.target, "--token", "secret").exit_code == 0
    refused = fmi("get", "care", "--target", "192.0.2.1:1", "--token", "secret")
    assert refused.exit_code == ExitCode.USAGE
    assert "plain text" in refused.stderr
    assert "secret" not in refused.output
    told = " ".join(refused.stderr.split())
    assert "use TLS (--tls or --ca), or give --insecure" in told
    assert "tls=" not in told  # that is for programs


def test_a_token_file_keeps_the_token_off_the_command_line(fmi, script, tmp_path):
    script["GetUpdate"] = update_answer
    file = tmp_path / "site.token"
    file.write_text("secret\n")
    ask = ("get", "care", "--target", script.target)
    assert fmi(*ask, "--token-file", str(file)).exit_code == 0
    refused = fmi("get", "care", "--target", "192.0.2.1:1", "--token-file", str(file))
    assert refused.exit_code == ExitCode.USAGE
    assert "plain text" in refused.stderr
    assert "secret" not in refused.output
    file.write_text("")
    told = fmi(*ask, "--token-file", str(file))
    assert told.exit_code == ExitCode.USAGE
    assert "is empty" in " ".join(told.stderr.split())
    assert fmi(*ask, "--token-file", str(tmp_path / "none")).exit_code == ExitCode.USAGE


def test_half_of_a_certificate_is_told_by_the_names_of_the_options(fmi, tmp_path):
    certificate = tmp_path / "site.pem"
    certificate.touch()
    for option in ("--cert", "--key"):
        result = fmi("get", "care", option, str(certificate))
        assert result.exit_code == ExitCode.USAGE
        assert "--cert and --key belong together" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["get"], "Missing argument 'COHORT'"),
        (["get", "care", "--kind", "x"], "Invalid value for '--kind'"),
        (["emit", "/nowhere/at/all.json"], "neither a file nor a type of packet"),
        (["emit", "."], "Is a directory"),
        (["validate", "/nowhere/at/all.json"], "No such file"),
        (["get", "care", "--timeout", "0"], "Invalid value for '--timeout'"),
        (["watch"], "Missing argument 'PATTERN...'"),
        (["get", "care", "--ca", "/nowhere.pem"], "does not exist"),
    ],
)
def test_wrong_usage_is_code_2_as_text_and_as_json(fmi, line, told):
    plain = fmi(*line)
    assert plain.exit_code == ExitCode.USAGE
    assert told in plain.stderr
    assert plain.stdout == ""
    as_json = fmi(*line, "--json")
    assert as_json.exit_code == ExitCode.USAGE
    assert told in json.loads(as_json.stderr)["error"]["message"]
    assert as_json.stdout == ""


def test_a_certificate_without_its_key_is_wrong_usage(fmi, tmp_path):
    file = tmp_path / "cert.pem"
    file.write_text("x")
    result = fmi("get", "care", "--cert", str(file))
    assert result.exit_code == ExitCode.USAGE
    assert "belong together" in result.stderr


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        (RefusedError(grpc.StatusCode.NOT_FOUND, "UPDATE_NOT_FOUND", "no prior yet"), 4),
        (RefusedError(grpc.StatusCode.NOT_FOUND, "COHORT_UNKNOWN", "no such cohort"), 4),
        (RefusedError(grpc.StatusCode.OUT_OF_RANGE, "COMPACTED", "from 7 on"), 4),
        (
            RefusedError(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", "busy", retry_after_s=0.01
            ),
            5,
        ),
        (
            RefusedError(
                grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE", "disk full", retry_after_s=0.01
            ),
            5,
        ),
        (
            RefusedError(grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING", "bye", retry_after_s=0.01),
            5,
        ),
        (RefusedError(grpc.StatusCode.INTERNAL, "INTERNAL", "a fault"), 5),
        (RefusedError(grpc.StatusCode.DATA_LOSS, "STORE_CORRUPT", "damaged"), 5),
        (RefusedError(grpc.StatusCode.UNIMPLEMENTED, "", "no such method"), 5),
        (RefusedError(grpc.StatusCode.PERMISSION_DENIED, "", "not yours"), 1),
        (RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "CONTRACT_VIOLATION", "no"), 1),
    ],
)
def test_exit_codes_tell_failures_apart(ask, script, refusal, code):
    script["GetUpdate"] = refusal
    result = ask("get", "care")
    assert result.exit_code == code
    assert refusal.message in result.stderr
    assert result.stdout == ""
    told = json.loads(ask("get", "care", "--json").stderr)["error"]
    assert (told["exit_code"], told["reason"]) == (code, refusal.reason)


def test_every_error_of_the_sdk_has_an_exit_code_of_the_documented_ones():
    def leaves(kind):
        yield kind
        for sub in kind.__subclasses__():
            yield from leaves(sub)

    codes = {exit_code(kind("x")) for kind in leaves(errors.FMIError)}
    assert codes == {
        ExitCode.REFUSED,
        ExitCode.USAGE,
        ExitCode.UNREACHABLE,
        ExitCode.NOT_FOUND,
        ExitCode.SERVER,
    }


def test_nothing_listens(fmi, unused_port):
    result = fmi("get", "care", "--target", f"127.0.0.1:{unused_port}")
    assert result.exit_code == ExitCode.UNREACHABLE
    first, second = result.stderr.splitlines()
    assert first.startswith(f"fmi: cannot reach 127.0.0.1:{unused_port}: ")
    assert "fmi doctor" in second


def test_no_answer_in_time_is_code_3(ask, script):
    import time  # noqa: PLC0415

    script["GetUpdate"] = lambda _: time.sleep(1.5)
    result = ask("get", "care", "--timeout", "0.2")
    assert result.exit_code == ExitCode.UNREACHABLE


def test_a_fault_of_fmi_itself_has_a_line_and_no_traceback(ask, script, monkeypatch):
    script["GetUpdate"] = update_answer

    def broken(*_args, **_options):
        raise RuntimeError("a fault\x1b[31m")

    monkeypatch.setattr("fmi_client.commands.get.update_view", broken)
    result = ask("get", "care")
    assert result.exit_code == ExitCode.FAULT
    assert "RuntimeError" in result.stderr
    assert "Traceback" not in result.output
    assert "\x1b" not in result.output
    assert len(result.stderr.splitlines()) == 1
    monkeypatch.setenv("FMI_DEBUG", "1")
    assert isinstance(ask("get", "care").exception, RuntimeError)


def test_a_server_fault_names_its_request(ask, script):
    script["GetUpdate"] = RefusedError(grpc.StatusCode.INTERNAL, "INTERNAL", "a fault")
    assert "request-7" in ask("get", "care").stderr


def test_demo_without_its_extra_says_what_to_install(fmi, monkeypatch):
    monkeypatch.setitem(sys.modules, "fmi_demo", None)
    result = fmi("demo")
    assert result.exit_code == 1
    assert "in the checkout, pip install '.[demo]'" in result.stderr
    assert "pip install" in json.loads(fmi("demo", "--json").stderr)["error"]["message"]


def test_demo_passes_its_options_on(fmi, monkeypatch, tmp_path):
    import fmi_demo  # noqa: PLC0415

    seen = {}
    monkeypatch.setattr(fmi_demo, "run", lambda **options: seen.update(options))
    assert fmi("demo", "--output", str(tmp_path), "--sites", "7", "--seed", "3").exit_code == 0
    assert (seen["output"], seen["sites"], seen["seed"]) == (tmp_path, 7, 3)
    assert (seen["keep_serving"], seen["json"]) == (False, False)


@pytest.mark.parametrize("more", [[], ["--descriptors", "-"]], ids=["text", "bytes"])
def test_a_reader_that_goes_away_is_no_fault(script, more):
    """`fmi ... | head -1`: the pipe breaks, and fmi ends quietly."""
    script["ListSites"] = RefusedError(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "")
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "from fmi_client.cli import main; main()",
                "contract",
                "--local",
                *more,
            ],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (ExitCode.PIPE, "")


def test_the_root_command_is_what_main_runs():
    assert cli.name == "fmi"


@pytest.mark.parametrize("command", ["cohorts", "emit", "get", "sites", "watch"])
def test_examples_in_help_stand_on_lines_of_their_own(command):
    text = CliRunner().invoke(cli, [command, "--help"], terminal_width=80).output
    assert "\\b" not in text
    assert re.search(rf"^ +fmi {command}[^\n]*$", text, flags=re.MULTILINE)
