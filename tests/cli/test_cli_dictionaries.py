"""`fmi dictionaries train`; what needs a server stands in `test_cli_real_server`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fmi_client.commands.exits import ExitCode
from fmi_client.emitter import HeaderDefaults
from fmi_client.encoder import FMIEncoder

SIZE = 1024


def plain(number):
    return {"type": "msp", "domain_id": "site_001", "controller": {"tau": number / 300}}


@pytest.fixture
def packets(tmp_path):
    """Two files of packets, in two of the forms that `fmi emit` takes."""
    files = tmp_path / "packets.jsonl", tmp_path / "packets.json"
    files[0].write_text("\n".join(json.dumps(plain(number)) for number in range(200)))
    files[1].write_text(json.dumps([plain(number) for number in range(100)]))
    return [str(file) for file in files]


@pytest.fixture
def train(fmi, tmp_path):
    out = tmp_path / "fmi.dict"

    def run(*files, more=()):
        line = ["dictionaries", "train", *files, "--out", str(out), "--size", str(SIZE)]
        return fmi(*line, *more), out

    return run


def test_training_makes_single_packets_small(train, packets):
    result, out = train(*packets, more=["--json"])
    assert result.exit_code == 0, result.output
    encoder = FMIEncoder(dictionary=out.read_bytes())
    assert json.loads(result.stdout) == {
        "dictionary_id": encoder.dictionary_id,
        "bytes": out.stat().st_size,
        "packets": 300,
        "file": str(out),
    }
    assert out.stat().st_size <= SIZE
    other = [HeaderDefaults().packet(plain(7.5))]
    assert len(encoder.encode(other).data) < len(FMIEncoder().encode(other).data) / 1.5


@pytest.mark.parametrize("of_packets", [False, True], ids=["a dictionary", "its own packets"])
def test_training_writes_over_nothing_unless_it_is_forced(train, packets, of_packets):
    if of_packets:
        out = Path(packets[0])
        more = ["--out", str(out)]
    else:
        _, out = train(*packets)
        more = []
    before = out.read_bytes()
    result, _ = train(*packets, more=more)
    assert result.exit_code == ExitCode.USAGE
    assert "say --force to write over it" in result.stderr
    assert str(out) in result.stderr
    assert out.read_bytes() == before
    result, _ = train(packets[1], more=[*more, "--force"])
    assert result.exit_code == 0, result.output
    assert FMIEncoder(dictionary=out.read_bytes()).dictionary_id
    assert out.read_bytes() != before


def test_training_says_what_it_made(train, packets):
    result, out = train(*packets)
    number = FMIEncoder(dictionary=out.read_bytes()).dictionary_id
    size = out.stat().st_size
    assert result.stdout == f"dictionary {number}: {size} bytes from 300 packets, in {out}\n"


def test_training_refuses_what_is_no_packet_and_names_its_place(train, packets, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(f"{json.dumps(plain(1))}\n7\n")
    result, out = train(*packets, str(bad))
    assert result.exit_code == ExitCode.REFUSED
    assert f"fmi: {bad}:2: CONTRACT_VIOLATION" in result.stderr
    assert not out.exists()


def test_too_few_packets_are_told(train, tmp_path):
    few = tmp_path / "few.json"
    few.write_text(json.dumps([plain(1), plain(2)]))
    result, out = train(str(few))
    assert result.exit_code == ExitCode.USAGE
    assert "from 2 packets" in result.stderr
    assert "give more samples" in result.stderr
    assert not out.exists()
