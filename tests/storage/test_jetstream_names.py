"""Names of sites and cohorts as tokens, URLs of brokers, and writes as bytes."""

from __future__ import annotations

import json
import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmi_server.storage import jetstream_commands as commands
from fmi_server.storage.base import EntryVersionError, StoreCorruptError, StoreVersionError
from fmi_server.storage.jetstream_names import MAX_TOKEN, BrokerAddress, LogNames, name_token
from fmi_server.storage.records import PacketKey, PacketRecord, SpendRecord, UpdateRecord

NAMES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
    st.text("ab./:@*>_-% \x00é", max_size=40),
    st.text("_0123456789ABCDEFabcdef", max_size=80),
    st.sampled_from(
        ["retail/eu", "a.b:c@d", "_", "__", "_2F", "a_2Fb", "a/b", "*", ">", "a.>", " "]
    ),
)


def name_of(token: str) -> str | None:
    """Read a name back, by rules written down apart from the code; None where it was too long."""
    if token.startswith("__"):
        return None
    if token == "_":
        return ""
    pieces = re.findall(r"_[0-9A-F]{2}|[A-Za-z0-9-]", token)
    assert "".join(pieces) == token
    return bytes(int(p[1:], 16) if p[0] == "_" else ord(p) for p in pieces).decode()


@given(NAMES)
def test_a_token_is_safe_and_can_be_read_back(name: str) -> None:
    token = name_token(name)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", token)
    assert len(token) <= MAX_TOKEN
    read = name_of(token)
    assert read == name or (read is None and len(name.encode()) > MAX_TOKEN / 3)
    if len(name.encode()) <= 128:
        assert read == name


@given(NAMES, NAMES)
def test_no_two_names_have_one_token(one: str, other: str) -> None:
    assert (name_token(one) == name_token(other)) == (one == other)


def test_long_names_are_told_apart() -> None:
    names = ["é" * 300, "é" * 299 + "e", "x" * 384, "x" * 385, "x" * 386]
    tokens = [name_token(name) for name in names]
    assert len(set(tokens)) == len(names)
    assert tokens[2] == names[2]
    assert all(len(token) <= MAX_TOKEN for token in tokens)


def test_a_name_that_is_no_unicode_has_no_token() -> None:
    with pytest.raises(UnicodeEncodeError):
        name_token("\ud800")


def test_the_subject_of_a_ledger_is_one_token_longer() -> None:
    assert LogNames("eu").ledger("retail/eu.*") == "fmi.eu.log.ledger.retail_2Feu_2E_2A"


@pytest.mark.parametrize(
    ("url", "servers", "federation", "location"),
    [
        ("nats://a", ("nats://a",), "fmi", "nats://a/fmi"),
        ("nats://a:1,b,[::1]:2/eu-1", ("nats://a:1", "nats://b", "nats://[::1]:2"), "eu-1", None),
        ("tls://u:p@a,b/x", ("tls://u:p@a", "tls://u:p@b"), "x", "tls://a,b/x"),
    ],
)
def test_urls(url: str, servers: tuple[str, ...], federation: str, location: str | None) -> None:
    address = BrokerAddress.parse(url)
    assert (address.servers, address.federation) == (servers, federation)
    assert location in (None, address.location)


@pytest.mark.parametrize(
    "url", ["a,b", "http://a", "nats://", "nats://a,,b", "nats://a/B", "nats://a/x.y", "nats://a/-"]
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match=r"brokers|federation"):
        BrokerAddress.parse(url)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
INT64 = st.integers(-(2**63), 2**63 - 1)
RECORDS = st.builds(
    PacketRecord,
    TEXT,
    TEXT,
    TEXT,
    st.sampled_from(["msp", "pop", "ccs"]),
    st.binary(min_size=16, max_size=16),
    INT64,
    INT64,
    st.booleans(),
    TEXT,
    st.binary(max_size=30),
)
UPDATES = st.builds(
    UpdateRecord, INT64, TEXT, INT64, INT64, INT64, st.binary(max_size=9), st.binary(max_size=9)
)
RHO = st.floats(0, 1e300, exclude_min=True)
COMMANDS = st.one_of(
    st.builds(commands.Append, st.lists(RECORDS, max_size=5)),
    st.builds(commands.Retire, st.lists(INT64), st.booleans()),
    st.builds(commands.Forget, TEXT, st.lists(INT64), INT64),
    st.builds(commands.Quarantine, INT64 | st.builds(PacketKey, TEXT, TEXT), st.booleans(), TEXT),
    st.builds(commands.Publish, st.lists(UPDATES, max_size=4)),
    st.builds(commands.Trim, TEXT, INT64, INT64),
    st.builds(commands.Spend, st.builds(SpendRecord, TEXT, INT64, INT64, INT64, RHO, TEXT)),
    st.builds(commands.PutCohort, TEXT, st.binary(max_size=20), INT64),
    st.builds(
        commands.PutReputations,
        TEXT,
        st.lists(st.tuples(TEXT, st.floats(allow_nan=False, allow_infinity=False))),
    ),
    st.builds(commands.PutDictionary, INT64, st.binary(max_size=20), INT64),
    st.builds(commands.Probe),
)


@given(COMMANDS)
def test_a_write_is_read_as_it_was_written(command: commands.Command) -> None:
    assert commands.decode_command(commands.encode_command(command), where="log") == command


@given(st.binary(max_size=80) | st.binary(max_size=60).map(lambda tail: b"\x01\0\0\0\x0a" + tail))
def test_what_is_no_write_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises((StoreCorruptError, StoreVersionError)) as caught:
        commands.decode_command(data, where="log entry 7")
    assert caught.value.path == "log entry 7"
    newer = len(data) >= 5 and data[0] > 1
    assert isinstance(caught.value, StoreVersionError) <= newer


@given(COMMANDS, st.data())
def test_a_write_that_is_cut_off_is_never_taken_for_another(
    command: commands.Command, data: st.DataObject
) -> None:
    whole = commands.encode_command(command)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(StoreCorruptError):
        commands.decode_command(cut, where="log")


def test_what_a_newer_version_writes_is_told_from_what_nobody_does() -> None:
    """Its format may be that of today, where it is a new kind of write."""
    kind = "merge" * 20
    for data, words in (
        (b"\x02\0\0\0\0", "of format 2, and it knows formats up to 1"),
        (written([kind, 1, 2]), "'mergemergemerge"),
        (
            written(["append", [["s", "p", "c", 3, 5, 4, 0, "", 0]]]) + b"h" * 16,
            "'append of packets of kind 3', which",
        ),
    ):
        with pytest.raises(EntryVersionError) as caught:
            commands.decode_command(data, where="log entry 7")
        assert str(caught.value).startswith("log entry 7 is ")
        assert words in str(caught.value)
        assert str(caught.value).endswith("a newer version wrote it, so upgrade the server")
        assert len(str(caught.value)) < 200
    for head in ([7], ["retire"], [["append"]], ["append", [["s"]]], {"append": 1}, []):
        with pytest.raises(StoreCorruptError):
            commands.decode_command(written(head), where="log")


def written(head: object) -> bytes:
    text = json.dumps(head).encode()
    return struct.pack(">BI", 1, len(text)) + text


def test_what_is_in_logs_today_is_read_tomorrow() -> None:
    """The bytes are a format on disk: these were written by the first version."""
    head = json.dumps(["append", [["s", "p", "c", 0, 5, 4, 1, "why", 3]]]).encode()
    data = struct.pack(">BI", 1, len(head)) + head + b"h" * 16 + b"abc"
    record = PacketRecord("s", "p", "c", "msp", b"h" * 16, 5, 4, True, "why", b"abc")
    assert commands.decode_command(data, where="log") == commands.Append([record])
