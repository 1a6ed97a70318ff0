"""The subcommands of `fmi-server` for credentials: tokens, init, renew, revoke."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import click

from fmi_server.config import SITE_NAME, SettingsError
from fmi_server.deployment import Deployment, DeploymentError
from fmi_server.invocation import fail, settings_of
from fmi_server.tokens import (
    IssuedToken,
    TokenFileError,
    TokenRecord,
    changed_tokens,
    issue_token,
    read_tokens,
    rotate_token,
)

__all__ = ["COMMANDS"]

_DAY_S: Final = 86_400.0

_FOLDER: Final = click.Path(file_okay=False, path_type=Path)


def _file_options(command: Any) -> Any:  # click's decorators carry no useful types
    for option in (
        click.option(
            "--tokens",
            type=click.Path(path_type=Path),
            help="The file of tokens, where it is not the one of the settings.",
        ),
        click.option("--config", type=click.Path(path_type=Path), help="YAML file with settings."),
    ):
        command = option(command)
    return command


def _lifetime_options(command: Any) -> Any:
    for option in (
        click.option("--no-expiry", is_flag=True, help="Let it be valid until it is revoked."),
        click.option(
            "--valid-days",
            type=click.IntRange(min=1, max=36500),
            default=365,
            show_default=True,
            help="Days until it expires.",
        ),
        click.option(
            "--out",
            type=click.Path(path_type=Path),
            help="Write the token to this new file (mode 0600) and not to standard output.",
        ),
    ):
        command = option(command)
    return command


@click.group()
def tokens() -> None:
    """Make, list, rotate and revoke bearer tokens.

    The file has their hashes only, so a token is shown once, when it is made. A server that runs takes a
    change within about a second.
    """


@tokens.command()
@click.argument("principal")
@click.option(
    "--domain-id",
    "domain_ids",
    multiple=True,
    metavar="NAME",
    help="A name of a site that it may be used under, any number of times; by default PRINCIPAL alone.",
)
@_lifetime_options
@_file_options
def create(
    principal: str,
    domain_ids: tuple[str, ...],
    config: Path | None,
    tokens: Path | None,
    out: Path | None,
    valid_days: int,
    *,
    no_expiry: bool,
) -> None:
    """Make a token for PRINCIPAL and print it."""
    _check_principal(principal)
    for name in domain_ids:
        if not SITE_NAME.fullmatch(name):
            told = "1 to 128 letters, digits and ._:@- that begin with a letter or a digit"
            fail(SettingsError(f"--domain-id: {name!r} is no name of a site: {told}"))
    with _failing(), _room(out) as write, changed_tokens(_path(config, tokens)) as records:
        issued = issue_token(
            principal,
            domain_ids=domain_ids,
            now=time.time(),
            lifetime_s=None if no_expiry else valid_days * _DAY_S,
        )
        records[issued.record.token_id] = issued.record
        write(issued)


@tokens.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@_file_options
def list_(config: Path | None, tokens: Path | None, *, as_json: bool) -> None:
    """List the tokens, without their secrets."""
    with _failing():
        records = list(read_tokens(_path(config, tokens)).records.values())
    now = time.time()
    if as_json:
        click.echo(json.dumps([_plain(record, now) for record in records]))
        return
    rows = [("id", "principal", "names of sites", "expires", "state")]
    rows += [
        (
            record.token_id,
            record.principal,
            " ".join(record.domain_ids),
            _time(record.expires_at) or "never",
            _state(record, now),
        )
        for record in records
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


@tokens.command()
@click.argument("token_ids", metavar="ID...", nargs=-1)
@click.option("--principal", help="Revoke all tokens of this principal.")
@_file_options
def revoke(
    token_ids: tuple[str, ...], principal: str | None, config: Path | None, tokens: Path | None
) -> None:
    """Revoke tokens, by their ids or by their principal. Subscriptions that they opened end."""
    with _failing(), changed_tokens(_path(config, tokens)) as records:
        for token_id in token_ids:
            _known(records, token_id)
        doomed = {*token_ids, *(i for i, r in records.items() if r.principal == principal)}
        if not doomed:
            raise SettingsError("name the tokens to revoke: their ids, or --principal with tokens")
        for token_id in doomed:
            del records[token_id]
    for token_id in sorted(doomed):
        click.echo(f"revoked {token_id}")


@tokens.command()
@click.argument("token_id", metavar="ID")
@click.option(
    "--grace-hours",
    type=click.FloatRange(min=0, max=24 * 366),
    default=24.0,
    show_default=True,
    help="Hours for which the old token still is valid.",
)
@_lifetime_options
@_file_options
def rotate(
    token_id: str,
    grace_hours: float,
    config: Path | None,
    tokens: Path | None,
    out: Path | None,
    valid_days: int,
    *,
    no_expiry: bool,
) -> None:
    """Make a token with the rights of another and print it; the other one expires after a grace."""
    with _failing(), _room(out) as write, changed_tokens(_path(config, tokens)) as records:
        old, issued = rotate_token(
            _known(records, token_id),
            now=time.time(),
            lifetime_s=None if no_expiry else valid_days * _DAY_S,
            grace_s=grace_hours * 3600,
        )
        records[old.token_id] = old
        records[issued.record.token_id] = issued.record
        write(issued)


_days: Final = click.option(
    "--valid-days",
    type=click.IntRange(min=1, max=3650),
    default=365,
    show_default=True,
    help="Days until a certificate expires.",
)


@click.command()
@click.argument("folder", type=_FOLDER)
@click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="A name or address of the server as clients will write it, any number of times; by default "
    "this machine's name and localhost.",
)
@click.option(
    "--operator", metavar="NAME", default="operator", show_default=True, help="The operator."
)
@click.option("--site", metavar="NAME", help="Make credentials for this site, and nothing else.")
@click.option(
    "--domain-id",
    "domain_ids",
    multiple=True,
    metavar="NAME",
    help="With --site: a name that it may emit under, any number of times; by default its own alone.",
)
@_days
def init(
    folder: Path,
    hosts: tuple[str, ...],
    operator: str,
    site: str | None,
    domain_ids: tuple[str, ...],
    valid_days: int,
) -> None:
    """Make certificates and settings for a first deployment in FOLDER.

    What is there stays as it is; what is missing is made. With --site, credentials for one more site.
    """
    deployment = Deployment(folder, datetime.now(UTC), timedelta(days=valid_days))
    with _failing():
        if site is not None:
            made = deployment.add_client(site, domain_ids)
        elif domain_ids:
            raise SettingsError("--domain-id goes with --site")
        else:
            names = hosts or tuple(dict.fromkeys((socket.gethostname(), "localhost", "127.0.0.1")))
            made = deployment.create(names, operator)
    for path in made:
        click.echo(f"made {path}")
    click.echo(_next_steps(deployment, site) if made else "all of it is there; nothing was made")


@click.command("revoke")
@click.argument("folder", type=_FOLDER)
@click.argument("name")
def revoke_client(folder: Path, name: str) -> None:
    """Revoke the certificate of the client NAME that `init` made in FOLDER.

    A server that runs refuses it within about a second, and ends its subscriptions. `init --site` can make
    new credentials under the name.
    """
    deployment = Deployment(folder, datetime.now(UTC), timedelta(days=1))
    with _failing():
        aside = deployment.revoke(name)
    click.echo(f"revoked {name}; its files are in {aside}")
    listed = folder / "server" / "revoked.pem"
    click.echo(f"where the server has another copy of the folder, bring it {listed}")


@click.command()
@click.argument("folder", type=_FOLDER)
@click.argument("name", required=False)
@click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="Without NAME: a name or address of the server, any number of times; by default those that it has.",
)
@_days
def renew(folder: Path, name: str | None, hosts: tuple[str, ...], valid_days: int) -> None:
    """Make a new certificate for the server, or for the client NAME, that `init` made in FOLDER.

    A server that runs shows its new one to new connections within about a second. The old one of a client is
    valid until it expires or is revoked, so that the client has time to change.
    """
    deployment = Deployment(folder, datetime.now(UTC), timedelta(days=valid_days))
    with _failing():
        if name is None:
            made = deployment.renew_server(hosts)
            told = "the server's certificate is new; its clients need nothing"
        elif hosts:
            raise SettingsError("--host is for the server's certificate: leave NAME or --host out")
        else:
            aside, made = deployment.renew_client(name)
            told = (
                f"Next: bring {deployment.client_folder(name)} to {name}, over a way that nobody reads.\n"
                f"The old certificate is valid too; `fmi-server revoke {folder} {aside.name}` ends that."
            )
    for path in made:
        click.echo(f"made {path}")
    click.echo(f"\n{told}")


COMMANDS: Final[tuple[click.Command, ...]] = (tokens, init, renew, revoke_client)
"""The commands of this module."""


def _next_steps(deployment: Deployment, site: str | None) -> str:
    if site is not None:
        folder = deployment.client_folder(site)
        return (
            f"\nNext: bring {folder} to the site, over a way that nobody reads, and there\n"
            f"  fmi --target HOST:50061 --ca ca.crt --cert client.crt --key client.key doctor\n"
            f'Then list {site} under `access` of its cohorts, where they do not say "*".'
        )
    return (
        "\nNext:\n"
        f"  fmi-server serve --config {deployment.settings_file}\n"
        f"  fmi-server init {deployment.folder} --site NAME    for each site\n"
        f"and keep {deployment.folder / 'ca' / 'ca.key'} where the server is not: whoever has it can be\n"
        "any site. docs/security.md has the rest."
    )


def _path(config: Path | None, tokens: Path | None) -> Path:
    if tokens is None:
        tokens = settings_of(config, {}).tokens
    if tokens is None:
        raise SettingsError("tokens: name the file: --tokens FILE, or the setting `tokens`")
    return tokens


def _check_principal(name: str) -> None:
    if not name or name == "*" or not name.isprintable() or len(name.encode()) > 256:
        fail(SettingsError("a principal has 1 to 256 printable bytes and is not `*`"))


def _known(records: dict[str, TokenRecord], token_id: str) -> TokenRecord:
    if token_id not in records:
        raise SettingsError(f"there is no token {token_id}; `fmi-server tokens list` has their ids")
    return records[token_id]


@contextlib.contextmanager
def _room(out: Path | None) -> Iterator[Callable[[IssuedToken], None]]:
    """Give a function that hands a token out; a file for it is made before the token is."""
    if out is None:
        yield _print
        return
    try:
        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise SettingsError(f"{out} exists, and is not written over") from None

    def write(issued: IssuedToken) -> None:
        os.write(handle, f"{issued.text}\n".encode())
        os.fsync(handle)
        _tell(issued)

    try:
        yield write
    except BaseException:
        out.unlink(missing_ok=True)  # a token that is not in the file of tokens is none
        raise
    finally:
        os.close(handle)


def _print(issued: IssuedToken) -> None:
    click.echo(issued.text)
    _tell(issued)


def _tell(issued: IssuedToken) -> None:
    record = issued.record
    expires = _time(record.expires_at)
    until = f"until {expires}" if expires else "until it is revoked"
    names = ", ".join(record.domain_ids)
    click.echo(f"token {record.token_id} of {record.principal}, for {names}, {until}", err=True)


def _plain(record: TokenRecord, now: float) -> dict[str, Any]:
    return {
        "id": record.token_id,
        "principal": record.principal,
        "domain_ids": list(record.domain_ids),
        "created_at": _time(record.created_at),
        "expires_at": _time(record.expires_at),
        "state": _state(record, now),
    }


def _state(record: TokenRecord, now: float) -> str:
    return "expired" if record.expired(now) else "valid"


def _time(seconds: int | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except (SettingsError, TokenFileError, DeploymentError, OSError) as error:
        fail(error)
