"""Bearer tokens: made, kept as hashes in a file, and looked up.

A token is `fmi_<id>_<secret>`: the id finds its record, the secret has 256 random bits. So a plain SHA-256 of
it can stand in the file: what slows guessing down protects secrets that can be guessed. The file is replaced
as a whole, with mode 0600, under a lock that the commands take; a server reads it again when it changes.

It is a file of its own and not part of the store: see docs/decisions/0017.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = [
    "IssuedToken",
    "TokenBook",
    "TokenFileError",
    "TokenRecord",
    "changed_tokens",
    "issue_token",
    "read_tokens",
    "rotate_token",
]

PREFIX: Final = "fmi"
VERSION: Final = 1
MAX_TOKEN_LENGTH: Final = 256
"""Characters; what is longer is no token, and is not hashed."""

_ID_BYTES: Final = 6
_SECRET_BYTES: Final = 32
_NO_SECRET: Final = hashlib.sha256(b"no token has this").hexdigest()


class TokenFileError(Exception):
    """The file of tokens cannot be used. The message names it and says why."""


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """What is kept of a token.

    Attributes:
        token_id: Finds it; no secret.
        principal: Who it is for.
        domain_ids: The names of sites that it may be used under.
        sha256: SHA-256 of the secret, as hex.
        created_at: When it was made, Unix time in seconds.
        expires_at: When it expires; None for never.
    """

    token_id: str
    principal: str
    domain_ids: tuple[str, ...]
    sha256: str
    created_at: int
    expires_at: int | None = None

    def expired(self, now: float) -> bool:
        """Say whether it has expired."""
        return self.expires_at is not None and now >= self.expires_at


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A new token: the only place where its secret is."""

    record: TokenRecord
    text: str

    def __repr__(self) -> str:
        return f"IssuedToken({self.record.token_id})"


class TokenBook:
    """The tokens of a file, ready to be looked up.

    Args:
        records: The records.
    """

    __slots__ = ("_records",)

    def __init__(self, records: Iterable[TokenRecord] = ()) -> None:
        self._records = {record.token_id: record for record in records}

    @property
    def records(self) -> Mapping[str, TokenRecord]:
        """The records by id."""
        return MappingProxyType(self._records)

    def find(self, text: str) -> TokenRecord | None:
        """Return the record of a token, expired or not; None where there is none.

        It takes as long for an id that is known as for one that is not.
        """
        if len(text) > MAX_TOKEN_LENGTH or not text.isascii():
            return None
        prefix, _, rest = text.partition("_")
        token_id, _, secret = rest.partition("_")
        record = self._records.get(token_id) if prefix == PREFIX else None
        expected = _NO_SECRET if record is None else record.sha256
        return record if hmac.compare_digest(_hash(secret), expected) else None


def issue_token(
    principal: str, *, domain_ids: Iterable[str] = (), now: float, lifetime_s: float | None
) -> IssuedToken:
    """Make a token.

    Args:
        principal: Who it is for.
        domain_ids: The names of sites that it may be used under; the principal's own where none is given.
        now: Unix time in seconds.
        lifetime_s: Seconds until it expires; None for never.
    """
    token_id, secret = secrets.token_hex(_ID_BYTES), secrets.token_urlsafe(_SECRET_BYTES)
    record = TokenRecord(
        token_id=token_id,
        principal=principal,
        domain_ids=tuple(dict.fromkeys(domain_ids)) or (principal,),
        sha256=_hash(secret),
        created_at=int(now),
        expires_at=None if lifetime_s is None else int(now + lifetime_s),
    )
    return IssuedToken(record, f"{PREFIX}_{token_id}_{secret}")


def rotate_token(
    old: TokenRecord, *, now: float, lifetime_s: float | None, grace_s: float
) -> tuple[TokenRecord, IssuedToken]:
    """Make a token with the rights of another; return that one, which expires after a grace, and the new."""
    new = issue_token(old.principal, domain_ids=old.domain_ids, now=now, lifetime_s=lifetime_s)
    last = int(now + grace_s)
    expires_at = last if old.expires_at is None else min(old.expires_at, last)
    return replace(old, expires_at=expires_at), new


def read_tokens(path: Path) -> TokenBook:
    """Read a file of tokens.

    Raises:
        TokenFileError: It cannot be read, is none, or may be written by others than its owner.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read()
    except OSError as error:
        raise TokenFileError(f"{path}: cannot be read: {error.strerror}") from None
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise TokenFileError(f"{path}: others may write to it (mode {mode:04o}); chmod 600 it")
    try:
        found = _Content.model_validate_json(content)
    except ValidationError as error:
        # What stands in the file is not told: it may be a token where an id should be.
        (first, *_) = error.errors(include_url=False, include_input=False, include_context=False)
        place = ".".join(map(str, first["loc"])) or "content"
        raise TokenFileError(f"{path}: is no file of tokens: {place}: {first['msg']}") from None
    if found.version != VERSION:
        raise TokenFileError(f"{path}: is of version {found.version}, this one reads {VERSION}")
    try:
        records = [entry.record() for entry in found.tokens]
    except ValueError as error:
        raise TokenFileError(f"{path}: is no file of tokens: a time is none: {error}") from None
    if len({record.token_id for record in records}) < len(records):
        raise TokenFileError(f"{path}: an id stands twice")
    return TokenBook(records)


@contextlib.contextmanager
def changed_tokens(path: Path) -> Iterator[dict[str, TokenRecord]]:
    """Give the records of a file to change, and write them when the context ends well.

    A file that is not there yet is made. Commands that change it wait for each other.

    Raises:
        TokenFileError: It cannot be read or written.
    """
    try:
        with _locked(path):
            records = dict(read_tokens(path).records) if path.exists() else {}
            yield records
            _replace(path, _serialised(records.values()))
    except OSError as error:
        raise TokenFileError(f"{path}: cannot be written: {error.strerror}") from None


class _Entry(BaseModel):
    """A record as it stands in the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str = Field(pattern="^[0-9a-f]{4,64}$")
    principal: str = Field(min_length=1, max_length=256)
    domain_ids: list[str] = Field(max_length=1024)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    created_at: str
    expires_at: str | None = None

    def record(self) -> TokenRecord:
        return TokenRecord(
            token_id=self.id,
            principal=self.principal,
            domain_ids=tuple(self.domain_ids),
            sha256=self.sha256,
            created_at=_seconds(self.created_at),
            expires_at=None if self.expires_at is None else _seconds(self.expires_at),
        )


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: int
    tokens: list[_Entry]


def _serialised(records: Iterable[TokenRecord]) -> bytes:
    entries: list[dict[str, Any]] = [
        {
            "id": record.token_id,
            "principal": record.principal,
            "domain_ids": list(record.domain_ids),
            "sha256": record.sha256,
            "created_at": _time(record.created_at),
            "expires_at": None if record.expires_at is None else _time(record.expires_at),
        }
        for record in records
    ]
    return json.dumps({"version": VERSION, "tokens": entries}, indent=1).encode() + b"\n"


def _replace(path: Path, content: bytes) -> None:
    """Put a file in the place of another at once, readable by its owner only."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _seconds(text: str) -> int:
    found = datetime.fromisoformat(text)
    if found.tzinfo is None:
        raise ValueError("a time without its zone")
    return int(found.timestamp())
