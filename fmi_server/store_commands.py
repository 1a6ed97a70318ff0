"""The subcommands of `fmi-server` for the store: backup, restore, inspect."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click

from fmi_server.app import STORE_FILE
from fmi_server.config import SettingsError
from fmi_server.errors import FMIError
from fmi_server.feed_requests import kind_name
from fmi_server.invocation import fail, settings_of
from fmi_server.storage import backup_database, restore_backup
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
            help="Where the SQLite store lives [fmi-data].",
        ),
        click.option("--config", type=click.Path(path_type=Path), help="YAML file with settings."),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("target", type=click.Path(path_type=Path))
@_store_options
def backup(target: Path, config: Path | None, data_dir: Path | None, *, as_json: bool) -> None:
    """Write a consistent copy of the store to the new file TARGET.

    A server may be running on the store; it is not held up. TARGET appears when it is whole and on disk, and
    is never written over.
    """
    path = _store_path(config, data_dir)
    with _failing():
        size = backup_database(path, target.absolute())
    _say({"store": str(path), "backup": str(target), "bytes": size}, as_json=as_json)


@click.command()
@click.argument("source", metavar="BACKUP", type=click.Path(path_type=Path))
@click.option("--replace", is_flag=True, help="Set aside a store that is there, and restore.")
@_store_options
def restore(
    source: Path, config: Path | None, data_dir: Path | None, *, replace: bool, as_json: bool
) -> None:
    """Make the store from BACKUP, as a new history.

    The server must be stopped. BACKUP is checked whole first. Subscribers that come back get a snapshot, and
    are told that the history changed; packets that were acknowledged after the backup are not in it.
    """
    path = _store_path(config, data_dir)
    with _failing():
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            message = f"data_dir: {path.parent} cannot be made: {error.strerror}"
            raise SettingsError(message) from None
        try:
            restored = restore_backup(source.absolute(), path.resolve(), replace=replace)
        except FileExistsError:
            message = f"{path} exists; say --replace to set it aside, or choose another --data-dir"
            raise FileExistsError(message) from None
    said = {"store": str(path), "history_epoch": restored.history_epoch}
    if restored.set_aside is not None:
        said["set_aside"] = str(restored.set_aside)
    _say(said, as_json=as_json)


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Read and check every page and every packet.")
@_store_options
def inspect(
    file: Path | None, config: Path | None, data_dir: Path | None, *, check: bool, as_json: bool
) -> None:
    """Say what the store holds, or the backup FILE. A server may be running on it.

    With --check all of it is read and compared, which takes as long as reading the file.
    """
    path = file or _store_path(config, data_dir)
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


def _store_path(config: Path | None, data_dir: Path | None) -> Path:
    settings = settings_of(config, {"data_dir": data_dir})
    return settings.data_dir / STORE_FILE


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except (FMIError, SettingsError, OSError) as error:
        fail(error)


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
