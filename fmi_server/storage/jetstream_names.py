"""What is called how at the broker: servers, the stream, its subjects, the keys of the buckets.

Names of sites and cohorts are free text, subjects and keys are not: dots part them, `*` and `>` select
among them, blanks end them. So a name goes in as one token, and two names never as the same one.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

__all__ = ["MAX_TOKEN", "BrokerAddress", "LogNames", "name_token"]

MAX_TOKEN = 384
"""Characters of a token: a name of 128 bytes, each of them escaped."""

_ESCAPED = re.compile(rb"[^A-Za-z0-9-]")
_FEDERATION = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,46}[a-z0-9])?")
_SCHEMES = ("nats", "tls")


def name_token(name: str) -> str:
    """Return the token of a name: letters, digits, `-` and `_` only, and of at most `MAX_TOKEN` characters.

    Every other byte of its UTF-8 form stands as `_` and two digits, so that the name can be read back. No
    name is `_`. A name that would be longer is `__` and its 256-bit BLAKE2b: nobody finds two with the same
    one.

    Raises:
        UnicodeEncodeError: The name is not valid Unicode.
    """
    data = name.encode()
    if not data:
        return "_"
    token = _ESCAPED.sub(lambda found: b"_%02X" % found[0][0], data).decode()
    if len(token) <= MAX_TOKEN:
        return token
    return "__" + hashlib.blake2b(data, digest_size=32).hexdigest()


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where the brokers are, and which of their logs is meant.

    Attributes:
        servers: URLs, one for each server, with credentials where they were given.
        federation: Names the stream and the buckets.
    """

    servers: tuple[str, ...]
    federation: str

    @classmethod
    def parse(cls, url: str) -> BrokerAddress:
        """Take `nats://a,b:4223,c/name` apart; without a name it is `fmi`.

        Credentials stand before the first host and count for all of them: `nats://user:password@a,b`.

        Raises:
            ValueError: It is not of that form.
        """
        scheme, found, rest = url.partition("://")
        if not found or scheme not in _SCHEMES:
            raise ValueError("the URL of the brokers must begin with nats:// or tls://")
        hosts, _, federation = rest.partition("/")
        credentials, at, hosts = hosts.rpartition("@")
        federation = federation or "fmi"
        if not _FEDERATION.fullmatch(federation):
            raise ValueError(
                f"the name of the federation {federation!r} must be 1 to 48 of a-z, 0-9 and inner hyphens"
            )
        names = hosts.split(",")
        if not all(names):
            raise ValueError("the URL of the brokers must name hosts, with commas between them")
        return cls(tuple(f"{scheme}://{credentials}{at}{name}" for name in names), federation)

    @property
    def location(self) -> str:
        """The same for messages to the operator: without credentials."""
        scheme = self.servers[0].partition("://")[0]
        hosts = (server.partition("://")[2].rpartition("@")[2] for server in self.servers)
        return f"{scheme}://{','.join(hosts)}/{self.federation}"


@dataclass(frozen=True, slots=True)
class LogNames:
    """What belongs to one federation at the brokers.

    The subjects are few, whatever the sites send: one for each kind of write, and one per cohort for the
    ledger.
    """

    federation: str

    @property
    def stream(self) -> str:
        """The stream that is the log."""
        return f"FMI-{self.federation}"

    @property
    def snapshots(self) -> str:
        """The stream of the snapshots."""
        return f"FMI-{self.federation}-snapshots"

    @property
    def leases(self) -> str:
        """The bucket of the leases."""
        return f"FMI-{self.federation}-leases"

    @property
    def all_subjects(self) -> str:
        """Everything the stream takes."""
        return f"fmi.{self.federation}.log.>"

    def subject(self, kind: str) -> str:
        """Return the subject of a kind of write."""
        return f"fmi.{self.federation}.log.{kind}"

    def snapshot(self, part: str) -> str:
        """Return the subject of a part of a snapshot."""
        return f"fmi.{self.federation}.snapshot.{part}"

    def ledger(self, cohort: str) -> str:
        """Return the subject of a cohort's privacy ledger."""
        return f"fmi.{self.federation}.log.ledger.{name_token(cohort)}"
