"""`fmi dictionaries`: compression dictionaries, so that single packets compress too."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import IO

import click

from fmi.v1 import packet_pb2
from fmi_client._counts import counted
from fmi_client.commands.exits import ExitCode
from fmi_client.commands.options import Argument, FMIGroup, Settings, json_option, shared_options
from fmi_client.commands.output import print_json, print_text, show_error, text, write_file
from fmi_client.commands.packets import Entry, read_packets
from fmi_client.commands.session import open_client
from fmi_client.emitter import HeaderDefaults
from fmi_client.encoder import FMIEncoder

__all__ = ["command"]

_SIZE_BYTES = 16_384
_OUTPUT = click.Path(dir_okay=False, writable=True, allow_dash=True)


@click.group(name="dictionaries", cls=FMIGroup)
@shared_options
def command(_settings: Settings) -> None:
    """Train, register and fetch compression dictionaries, in zstd's format.

    \b
      fmi dictionaries train packets.jsonl --out fmi.dict
      fmi dictionaries register fmi.dict
      fmi dictionaries get --out fmi.dict

    Batches compress without one; single packets need one. A server must have it registered before a
    site uses it: FMIClient(..., encoder=FMIEncoder(dictionary=data)) in the SDK.
    """  # noqa: D301 - click wants the character


@command.command("train")
@click.argument(
    "files",
    cls=Argument,
    nargs=-1,
    required=True,
    metavar="FILE...",
    type=click.File(encoding="utf-8-sig", lazy=False),
    help="Packets as `fmi emit` takes them; - is standard input.",
)
@click.option("--out", type=_OUTPUT, required=True, metavar="FILE", help="Where it goes.")
@click.option(
    "--size",
    type=click.IntRange(min=256, max=1024 * 1024),
    default=_SIZE_BYTES,
    show_default=True,
    metavar="BYTES",
    help="How large it becomes at most.",
)
@click.option("--force", is_flag=True, help="Write over FILE where there is one.")
@json_option
def _train(settings: Settings, files: tuple[IO[str], ...], out: str, size: int, force: bool) -> int:
    """Train a dictionary from the packets of FILEs; no server is asked.

    Take some hundreds of packets like those to come, of about ten times the dictionary's size in all.
    """
    # Sites may hold packets of the one that stands there, and no training makes it again.
    if not force and out != "-" and Path(out).is_file():
        raise click.UsageError(f"{out} exists; say --force to write over it.")
    entries = [entry for file in files for entry in read_packets(file, HeaderDefaults())]
    if _show_unreadable(settings, entries):
        return ExitCode.REFUSED
    packets = [entry.packet for entry in entries if isinstance(entry.packet, packet_pb2.Packet)]
    data = FMIEncoder.train(packets, dictionary_bytes=size)
    write_file(out, data)
    number = FMIEncoder(dictionary=data).dictionary_id
    if settings.json:
        told = {"dictionary_id": number, "bytes": len(data), "packets": len(packets), "file": out}
        print_json(told, to_stderr=out == "-")
    else:
        made = f"dictionary {number}: {len(data)} bytes from {counted(len(packets), 'packet')}, in {out}"
        print_text(text(made), to_stderr=out == "-")
    return ExitCode.OK


@command.command("register")
@click.argument(
    "file",
    cls=Argument,
    type=click.File("rb", lazy=False),
    help="A dictionary, of `fmi dictionaries train` or `zstd --train`.",
)
@shared_options
def _register(settings: Settings, file: IO[bytes]) -> int:
    """Register the dictionary in FILE with the server, so that sites can fetch and use it."""
    with open_client(settings) as client:
        number = client.admin.register_dictionary(file.read())
    if settings.json:
        print_json({"dictionary_id": number})
    else:
        print_text(text(f"dictionary {number} is registered"))
    return ExitCode.OK


@command.command("get")
@click.argument(
    "dictionary_id",
    cls=Argument,
    metavar="[ID]",
    required=False,
    type=click.IntRange(min=1, max=2**32 - 1),
    help="The dictionary. [default: the newest]",
)
@click.option("--out", type=_OUTPUT, metavar="FILE", help="Write it to FILE.")
@shared_options
def _get(settings: Settings, dictionary_id: int | None, out: str | None) -> int:
    """Fetch a dictionary that is registered with the server; without --out, just say what it is."""
    with open_client(settings) as client:
        answer = client.dictionary(dictionary_id or 0)
    if out is not None:
        write_file(out, answer.data)
    number, size = answer.dictionary_id, len(answer.data)
    if settings.json:
        print_json({"dictionary_id": number, "bytes": size, "file": out}, to_stderr=out == "-")
    else:
        place = f", in {out}" if out else ""
        print_text(text(f"dictionary {number}: {size} bytes{place}"), to_stderr=out == "-")
    return ExitCode.OK


def _show_unreadable(settings: Settings, entries: Iterable[Entry]) -> int:
    """Tell of every entry that is no packet; return how many there are."""
    count = 0
    for entry in entries:
        if not isinstance(entry.packet, packet_pb2.Packet):
            show_error(entry.packet, settings, subject=entry.subject)
            count += 1
    return count
