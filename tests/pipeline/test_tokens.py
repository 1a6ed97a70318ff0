"""Tokens: what is kept of them, how they are found, and a file that is never half written."""

from __future__ import annotations

import hashlib
import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmi_server.tokens import (
    TokenBook,
    TokenFileError,
    changed_tokens,
    issue_token,
    read_tokens,
    rotate_token,
)

NOW = 1_800_000_000.0


def issue(principal="site", *, lifetime_s=3600.0, **fields):
    return issue_token(principal, now=NOW, lifetime_s=lifetime_s, **fields)


def test_a_token_is_found_by_all_of_it_and_nothing_less():
    one, other = issue("one"), issue("other")
    book = TokenBook([one.record, other.record])
    assert book.find(one.text) == one.record
    assert book.find(other.text) == other.record
    _, token_id, secret = one.text.split("_", 2)
    for wrong in (
        "",
        "fmi",
        one.text[:-1],
        one.text + "a",
        one.text.upper(),
        secret,
        f"{token_id}_{secret}",
        f"FMI_{token_id}_{secret}",
        f"fmi_{other.record.token_id}_{secret}",
        f"fmi_{token_id}_{one.record.sha256}",
        one.text.replace(token_id, "unknown"),
        f"{one.text}é",
    ):
        assert book.find(wrong) is None


@given(st.text(max_size=400))
def test_no_text_of_anybody_is_a_token(text):
    book = TokenBook([issue().record])
    assert book.find(text) is None
    assert book.find(f"fmi_{issue().record.token_id}_{text}") is None


def test_a_secret_has_256_bits_and_is_kept_as_a_hash():
    tokens = [issue() for _ in range(50)]
    assert len({token.text for token in tokens}) == 50
    for token in tokens:
        secret = token.text.split("_", 2)[2]
        assert len(secret) == 43  # 32 bytes in base64
        assert token.record.sha256 == hashlib.sha256(secret.encode()).hexdigest()
        assert secret not in repr(token)


def test_by_default_a_token_is_for_the_name_of_its_principal():
    assert issue("site").record.domain_ids == ("site",)
    assert issue("gate", domain_ids=["a", "b", "a"]).record.domain_ids == ("a", "b")


def test_it_expires_at_its_time_and_not_before():
    record = issue(lifetime_s=10).record
    assert not record.expired(NOW + 9.9)
    assert record.expired(NOW + 10)
    assert not issue(lifetime_s=None).record.expired(NOW * 1000)


def test_a_rotated_token_keeps_its_rights_and_never_lives_longer():
    old = issue("gate", domain_ids=["a", "b"], lifetime_s=100).record
    aged, new = rotate_token(old, now=NOW, lifetime_s=1000, grace_s=10)
    assert (aged.token_id, aged.expires_at) == (old.token_id, int(NOW) + 10)
    assert (new.record.principal, new.record.domain_ids) == ("gate", ("a", "b"))
    assert new.record.expires_at == int(NOW) + 1000
    aged, _ = rotate_token(old, now=NOW, lifetime_s=None, grace_s=1e6)
    assert aged.expires_at == int(NOW) + 100
    aged, _ = rotate_token(issue(lifetime_s=None).record, now=NOW, lifetime_s=1, grace_s=5)
    assert aged.expires_at == int(NOW) + 5


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "tokens.json"
    issued = [issue(f"site {i}", lifetime_s=None if i % 2 else 60.0 * i) for i in range(5)]
    with changed_tokens(path) as records:
        assert records == {}
        records |= {token.record.token_id: token.record for token in issued}
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_tokens(path).records == {token.record.token_id: token.record for token in issued}
    text = path.read_text()
    assert all(token.text.split("_", 2)[2] not in text for token in issued)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokens.json", "tokens.json.lock"]


def test_a_change_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "tokens.json"
    with changed_tokens(path) as records:
        records["ab12"] = issue().record
    before = path.read_bytes()

    def fail() -> None:
        with changed_tokens(path) as records:
            records.clear()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_bytes() == before


def test_changes_at_the_same_time_wait_for_each_other(tmp_path):
    path = tmp_path / "tokens.json"

    def add() -> None:
        for _ in range(5):
            with changed_tokens(path) as records:
                new = issue()
                records[new.record.token_id] = new.record

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_tokens(path).records) == 20


GOOD = {
    "id": "ab12",
    "principal": "site",
    "domain_ids": ["site"],
    "sha256": "0" * 64,
    "created_at": "2026-01-01T00:00:00+00:00",
    "expires_at": None,
}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is no file of tokens"),
        (b"{", "is no file of tokens"),
        (b"\xff\xfe", "is no file of tokens"),
        ([], "is no file of tokens"),
        ({"version": 2, "tokens": []}, "version 2"),
        ({"version": 1}, "tokens"),
        ({"version": 1, "tokens": [{**GOOD, "sha256": "secret-token"}]}, "tokens.0.sha256"),
        ({"version": 1, "tokens": [{**GOOD, "extra": "secret-token"}]}, "tokens.0.extra"),
        ({"version": 1, "tokens": [{**GOOD, "principal": ""}]}, "tokens.0.principal"),
        ({"version": 1, "tokens": [{**GOOD, "created_at": "soon"}]}, "a time is none"),
        ({"version": 1, "tokens": [{**GOOD, "expires_at": "2026-01-01"}]}, "a time is none"),
        ({"version": 1, "tokens": [GOOD, GOOD]}, "twice"),
    ],
)
def test_a_file_that_is_none_is_told_without_what_stands_in_it(tmp_path, content, told):
    path = tmp_path / "tokens.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(TokenFileError) as caught:
        read_tokens(path)
    assert str(path) in str(caught.value)
    assert told in str(caught.value)
    assert "secret-token" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_refused(tmp_path, mode):
    path = tmp_path / "tokens.json"
    path.write_text('{"version": 1, "tokens": []}')
    path.chmod(mode)
    with pytest.raises(TokenFileError, match="others may write"):
        read_tokens(path)
    path.chmod(0o444)  # as a secret is mounted
    assert read_tokens(path).records == {}


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(TokenFileError, match="cannot be read"):
        read_tokens(tmp_path / "none.json")
    with (
        pytest.raises(TokenFileError, match="cannot be written"),
        changed_tokens(tmp_path / "no" / "tokens.json"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
