"""The subcommands of `fmi-server` for the store: backup, restore, inspect."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

import click

from fmi_server.app import STORE_FILE, VIEW_FILE
from fmi_server.broker_settings import broker_options, wrong_broker_settings
from fmi_server.config import ServerSettings, SettingsError
from fmi_server.errors import FMIError
from fmi_server.feed_requests import kind_name
from fmi_server.invocation import fail, settings_of
from fmi_server.storage import backup_database, backup_log, restore_backup, restore_log
from fmi_server.storage.sqlite_inspect import (
    CohortContents,
    DatabaseContents,
    check_integrity,
    check_packets,
    inspect_database,
    open_for_inspection,
)

__all__ = ["COMMANDS"]


def _store_options(command: Any) -> Any:  # click's decorators carry no useful types
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON for programs."),
        click.option(
            "--data-dir",
            type=click.Path(path_type=Path),
            help="Where the SQLite store lives, or a view of what brokers have [fmi-data].",
        ),
        click.option("--store", help="sqlite, or the URL of brokers: nats://a,b,c [sqlite]."),
        click.option("--config", type=click.Path(path_type=Path), help="YAML file with settings."),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("target", type=click.Path(path_type=Path))
@_store_options
def backup(target: Path, config: Path | None, *, as_json: bool, **flags: Any) -> None:
    """Write a consistent copy of the store to the new file TARGET.

    Servers may be running on the store; they are not held up. TARGET appears when it is whole and on disk,
    and is never written over. Of what brokers have, it needs room for twice the copy meanwhile.
    """
    settings = _settings(config, **flags)
    with _failing():
        if _at_brokers(settings):
            options = broker_options(settings)
            size = asyncio.run(backup_log(settings.store, target.absolute(), options=options))
        else:
            size = backup_database(settings.data_dir / STORE_FILE, target.absolute())
    said = {"store": _location(settings), "backup": str(target), "bytes": size}
    _say(said, as_json=as_json)


@click.command()
@click.argument("source", metavar="BACKUP", type=click.Path(path_type=Path))
@click.option("--replace", is_flag=True, help="Set aside a store that is there, and restore.")
@click.option("--store-replicas", type=int, help="Brokers that keep each packet: 1, 3 or 5 [1].")
@_store_options
def restore(
    source: Path, config: Path | None, *, replace: bool, as_json: bool, **flags: Any
) -> None:
    """Make the store from BACKUP, as a new history.

    The server must be stopped. BACKUP is checked whole first; it may be of either kind of store, so that it
    also moves one from a file to brokers, or back. Subscribers that come back get a snapshot, and are told
    that the history changed; packets that were acknowledged after the backup are not in it.

    Brokers can set nothing aside: there must be no log of the federation.
    """
    settings = _settings(config, **flags)
    folder = settings.data_dir
    with _failing():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            message = f"data_dir: {folder} cannot be made: {error.strerror}"
            raise SettingsError(message) from None
        if _at_brokers(settings):
            said = _restore_at_brokers(settings, source.absolute(), replace=replace)
        else:
            said = _restore_file(folder / STORE_FILE, source.absolute(), replace=replace)
    _say({"store": _location(settings), **said}, as_json=as_json)


def _restore_file(path: Path, source: Path, *, replace: bool) -> dict[str, str]:
    try:
        restored = restore_backup(source, path.resolve(), replace=replace)
    except FileExistsError:
        message = f"{path} exists; say --replace to set it aside, or choose another --data-dir"
        raise FileExistsError(message) from None
    said = {"history_epoch": restored.history_epoch}
    if restored.set_aside is not None:
        said["set_aside"] = str(restored.set_aside)
    return said


def _restore_at_brokers(settings: ServerSettings, source: Path, *, replace: bool) -> dict[str, str]:
    if replace:
        raise SettingsError(
            "--replace: brokers can set nothing aside; restore under another name of the federation, as in "
            "nats://host/name"
        )
    options = broker_options(settings)
    epoch = asyncio.run(restore_log(source, settings.store, settings.data_dir, options=options))
    return {"history_epoch": epoch}


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Read and check every page and every packet.")
@_store_options
def inspect(
    file: Path | None, config: Path | None, *, check: bool, as_json: bool, **flags: Any
) -> None:
    """Say what the store holds, or the backup FILE. A server may be running on it.

    Of what brokers have it reads the view in the data directory, which is as new as its server's. With
    --check all of it is read and compared, which takes as long as reading the file.
    """
    settings = _settings(config, **flags)
    path = file or settings.data_dir / (VIEW_FILE if _at_brokers(settings) else STORE_FILE)
    checked: int | None = None
    with _failing(), contextlib.closing(open_for_inspection(path)) as connection:
        contents = inspect_database(connection, path)
        if check:
            check_integrity(connection, path)
            checked = check_packets(connection, path)
    if as_json:
        said = _plain(contents)
        if checked is not None:
            said["checked_packets"] = checked
        click.echo(json.dumps(said))
        return
    click.echo("\n".join(_text(contents)))
    if checked is not None:
        packets = "packet" if checked == 1 else "packets"
        click.echo(f"checked: all is in order, {checked} {packets} and every page")


COMMANDS: Final[tuple[click.Command, ...]] = (backup, restore, inspect)
"""The commands of this module."""


def _settings(config: Path | None, **flags: Any) -> ServerSettings:
    settings = settings_of(config, flags)
    wrong = "; ".join(wrong_broker_settings(settings))
    if settings.store == "memory":
        wrong = "store: what is in memory is nowhere else; name the store that is meant"
    if wrong:
        fail(SettingsError(wrong))
    return settings


def _at_brokers(settings: ServerSettings) -> bool:
    return "://" in settings.store


def _location(settings: ServerSettings) -> str:
    return settings.store if _at_brokers(settings) else str(settings.data_dir / STORE_FILE)


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    """End the command with one line where something fails, and on SIGTERM without what is half done."""
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    except (FMIError, SettingsError, OSError) as error:
        fail(error)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _say(said: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(said))
        return
    for line in _aligned([(name.replace("_", " "), str(value)) for name, value in said.items()]):
        click.echo(line)


def _plain(contents: DatabaseContents) -> dict[str, Any]:
    return {
        "store": str(contents.path),
        "bytes": contents.size_bytes,
        "schema_version": contents.schema_version,
        "history_epoch": contents.history_epoch,
        "update_sequence": contents.update_sequence,
        "dictionaries": contents.dictionaries,
        "server_pid": contents.server_pid,
        "cohorts": {name: _plain_cohort(cohort) for name, cohort in contents.cohorts.items()},
    }


def _plain_cohort(cohort: CohortContents) -> dict[str, Any]:
    return {
        "declared": cohort.declared,
        "sites": cohort.sites,
        "packets": {kind: asdict(held) for kind, held in cohort.packets.items()},
        "oldest": _time(cohort.oldest_us),
        "newest": _time(cohort.newest_us),
        "updates": {
            kind_name(held.kind): {
                "oldest_revision": held.oldest,
                "newest_revision": held.newest,
                "published_at": _time(held.published_at_us),
            }
            for held in cohort.updates
        },
    }


def _text(contents: DatabaseContents) -> Iterator[str]:
    pid = contents.server_pid
    yield from _aligned(
        [
            ("store", str(contents.path)),
            ("bytes", f"{contents.size_bytes:,}"),
            ("schema version", str(contents.schema_version)),
            ("history epoch", contents.history_epoch),
            ("update sequence", str(contents.update_sequence)),
            ("dictionaries", str(contents.dictionaries)),
            ("in use", "no" if pid is None else f"by process {pid}"),
        ]
    )
    if not contents.cohorts:
        yield "no cohorts"
        return
    rows = [("cohort", "declared", "sites", "oldest packet", "newest packet")]
    packets = [("cohort", "packets", "live", "retired", "quarantined")]
    revisions = [("cohort", "kind", "revisions held", "newest published")]
    for name, cohort in contents.cohorts.items():
        rows.append(
            (
                name,
                "yes" if cohort.declared else "no",
                str(cohort.sites),
                _time(cohort.oldest_us) or "-",
                _time(cohort.newest_us) or "-",
            )
        )
        packets += [
            (name, kind, str(held.live), str(held.retired), str(held.quarantined))
            for kind, held in cohort.packets.items()
        ]
        revisions += [
            (name, kind_name(u.kind), f"{u.oldest}-{u.newest}", _time(u.published_at_us) or "-")
            for u in cohort.updates
        ]
    for table in (rows, packets, revisions):
        if len(table) > 1:
            yield ""
            yield from _aligned(table)


def _time(at_us: int | None) -> str | None:
    if at_us is None:
        return None
    return datetime.fromtimestamp(at_us / 1e6, UTC).isoformat(timespec="seconds")


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()
