"""Files and pipes of packets in every shape, sent to the project's own server."""

from __future__ import annotations

import asyncio
import itertools
import json

import pytest
from cli_process import fmi_process

from fmi_client.commands.exits import ExitCode
from fmi_server.testing import running_server

PATIENCE_S = 60

LINE = json.dumps({"type": "msp", "domain_id": "site_001", "controller": {"tau": 0.9}})
LINES = json.dumps(json.loads(LINE), indent=1)
NOBODY = json.dumps({"type": "msp", "controller": {"tau": 0.9}})
ELSEWHERE = json.dumps({**json.loads(LINE), "cohort": "elsewhere"})
LONG = LINE.replace("0.9", "9" * 5000)


@pytest.fixture
async def emit(fmi, tmp_path):
    """Give a function that sends a text as a file and returns the result, with its receipts."""
    folder = tmp_path / "cohorts"
    folder.mkdir()
    (folder / "default.yaml").write_text("{name: default, free_signals: true}")
    async with running_server(cohorts=folder, open_cohorts=False) as server:

        async def send(text, *more, command="emit"):
            file = tmp_path / "packets.json"
            file.write_text(text)
            line = (command, str(file), "--json", "--target", server.target, *more)
            result = await asyncio.to_thread(fmi, *line)
            return result, [json.loads(told) for told in result.stdout.splitlines()]

        yield send


def places(receipts):
    return [(told["line"], told["status"]) for told in receipts]


@pytest.mark.parametrize(
    ("documents", "lines"),
    [
        ([LINE, LINES, LINE], [1, 2, 9]),
        ([LINES, LINE, LINES], [1, 8, 9]),
        ([LINE, LINE + LINES, LINES + LINE], [1, 2, 2, 9, 15]),
        (["", LINE, "", LINES], [2, 4]),
    ],
    ids=["lines in the middle", "line in the middle", "side by side", "blank lines"],
)
async def test_documents_on_one_line_and_on_several_may_be_mixed(emit, documents, lines):
    result, receipts = await emit("\n".join(documents))
    assert result.exit_code == ExitCode.OK, result.output
    assert places(receipts) == [(line, "accepted") for line in lines]


async def test_what_is_no_json_is_told_by_its_own_line_behind_documents_of_every_kind(emit):
    result, receipts = await emit(f"{LINE}\n{LINES}\n{LINE}\n  oops\n{LINE}")
    assert result.exit_code == ExitCode.REFUSED
    assert [told["line"] for told in receipts] == [1, 2, 9, 10, 11]
    assert [told["line"] for told in receipts if told["status"] != "accepted"] == [10]
    (violation,) = receipts[3]["error"]["violations"]
    assert violation["field"] == "line 10, column 3"


@pytest.mark.parametrize("text", [f"{LINE}\n{LONG}\n{LINES}", f"{LINES}\n{LONG}\n{LINE}"])
async def test_a_number_of_thousands_of_digits_is_refused_alone(emit, text):
    for command, verdict in (("emit", "status"), ("validate", "valid")):
        result, told = await emit(text, command=command)
        assert result.exit_code == ExitCode.REFUSED, result.output
        assert [entry[verdict] in ("accepted", True) for entry in told] == [True, False, True]
        assert told[1]["line"] == 1 + text[: text.index(LONG)].count("\n")
        (violation,) = told[1]["error"]["violations"]
        assert violation["field"] == 'msp.controller["tau"]'
        assert len(json.dumps(told[1])) < 1000


@pytest.mark.parametrize(
    "line",
    [
        LINE.replace('"type"', '"type": "pop", "type"'),
        LINE.replace("0.9", '0.9, "tau": 0.1'),
        LINE.replace('"controller"', '"evidence": [{"a": 1, "a": 2}], "controller"'),
    ],
)
async def test_a_name_that_stands_twice_is_refused_alone(emit, line):
    """Python would keep the last value, and lose the other without a word."""
    result, receipts = await emit(f"{LINE}\n{line}\n{LINE}")
    assert result.exit_code == ExitCode.REFUSED, result.output
    assert places(receipts) == [(1, "accepted"), (2, "refused"), (3, "accepted")]
    (violation,) = receipts[1]["error"]["violations"]
    assert violation["description"] == "stands twice in one object; leave one of them out"


async def test_training_tells_of_a_number_of_thousands_of_digits(fmi, tmp_path):
    file = tmp_path / "packets.jsonl"
    file.write_text(f"{LINE}\n{LONG}\n")
    result = fmi("dictionaries", "train", str(file), "--out", str(tmp_path / "fmi.dict"))
    assert result.exit_code == ExitCode.REFUSED, result.output
    assert f"fmi: {file}:2: " in result.stderr


@pytest.mark.parametrize("batch", ["1", "250"])
async def test_the_exit_code_does_not_depend_on_the_order_of_the_packets(emit, batch):
    for items in itertools.permutations([LINE, NOBODY, ELSEWHERE]):
        result, _ = await emit("\n".join(items), "--batch", batch)
        assert result.exit_code == ExitCode.REFUSED, items
    for items in itertools.permutations([LINE, ELSEWHERE]):
        result, _ = await emit("\n".join(items), "--batch", batch)
        assert result.exit_code == ExitCode.NOT_FOUND, items


@pytest.mark.parametrize("junk", ["oops", '{"type": "ms', '{"a": 1]', '{"a": 1,'])
async def test_a_pipe_goes_on_behind_a_line_that_is_not_json(junk):
    """Only a document that may go on, on further lines, is waited for."""
    async with fmi_process(
        "validate", "--offline", "--json", stdin=asyncio.subprocess.PIPE
    ) as process:
        process.stdin.write(f"{LINE}\n{junk}\n{LINE}\n".encode())
        async with asyncio.timeout(PATIENCE_S):
            told = [json.loads(await process.stdout.readline()) for _ in range(3)]
            process.stdin.close()
            assert await process.wait() == ExitCode.REFUSED
    assert [(entry["line"], entry["valid"]) for entry in told] == [
        (1, True),
        (2, False),
        (3, True),
    ]


BAD_LINES = {"garbage": "oops", "cut off": '{"type": "msp",', "a log line": "[2026-01-02 03:04] up"}


@pytest.mark.parametrize("command", ["emit", "validate"])
@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES)
@pytest.mark.parametrize("number", [2, 3, 4])
async def test_behind_a_line_that_is_not_json_the_next_is_read(emit, command, bad, number):
    lines = [LINE] * 4
    lines[number - 1] = bad
    result, told = await emit("\n".join(lines) + "\n", command=command)
    assert result.exit_code == ExitCode.REFUSED
    assert [entry["line"] for entry in told] == [1, 2, 3, 4]
    assert [entry["line"] for entry in told if entry["error"]] == [number]


async def test_a_first_line_and_lines_side_by_side_may_be_cut_off(emit):
    cut = BAD_LINES["cut off"]
    _, told = await emit(f"{cut}\n{LINE}\n{cut}\n{cut}\n{LINE}")
    assert [(entry["line"], entry["error"] is None) for entry in told] == [
        (1, False),
        (2, True),
        (3, False),
        (4, False),
        (5, True),
    ]


async def test_of_a_list_that_is_not_json_nothing_is_sent(emit):
    result, told = await emit(f"[\n{LINE},\n{LINE}\n{LINE}\n]")
    assert result.exit_code == ExitCode.REFUSED
    assert [entry["status"] for entry in told] == ["refused"]
