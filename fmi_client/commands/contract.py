"""`fmi contract`: do this site and the server speak the same contract."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import click
from rich.text import Text

from fmi.descriptors import contract_hash, descriptor_set
from fmi.plain import CURRENT_REVISION, OLDEST_REVISION
from fmi.v1 import registry_service_pb2
from fmi_client.commands.exits import ExitCode
from fmi_client.commands.options import FMICommand, Settings, shared_options
from fmi_client.commands.output import (
    print_json,
    print_text,
    show_note,
    table,
    text,
    write_file,
)
from fmi_client.commands.session import open_client

__all__ = ["agreement", "command", "local_version"]


def local_version() -> str:
    """Return the version of the software that is installed here."""
    try:
        return metadata.version("fmi-federation")
    except metadata.PackageNotFoundError:
        return "unknown"


def agreement(answer: registry_service_pb2.GetContractResponse) -> tuple[bool, str]:
    """Say whether a server takes this site's packets and means the same by them, and what to do."""
    oldest, newest = answer.oldest_supported_revision, answer.revision
    if not oldest <= CURRENT_REVISION <= newest:
        older = "this site" if oldest > CURRENT_REVISION else "the server"
        return False, (
            f"the server takes revisions {oldest} to {newest}, this site speaks {CURRENT_REVISION}: "
            f"upgrade {older}"
        )
    if newest == CURRENT_REVISION and answer.contract_hash != contract_hash():
        return False, (
            "the revision is the same but the text is not: one of the two is no released version"
        )
    if newest != CURRENT_REVISION:
        return True, f"the server is at revision {newest} and takes {CURRENT_REVISION} too"
    return True, "this site and the server speak the same contract"


@click.command(name="contract", cls=FMICommand)
@click.option(
    "--descriptors",
    type=click.Path(dir_okay=False, writable=True, allow_dash=True),
    metavar="FILE",
    help="Write the server's descriptors, a FileDescriptorSet for grpcurl or buf, to FILE (- for "
    "standard output).",
)
@click.option("--local", is_flag=True, help="Only this site's side; no server is asked.")
@shared_options
def command(settings: Settings, descriptors: str | None, local: bool) -> int:
    """Compare the contract of this site with the server's: revision and hash.

    Exit codes: 0 they agree, 1 they do not.
    """
    here = {
        "revision": CURRENT_REVISION,
        "oldest_supported_revision": OLDEST_REVISION,
        "contract_hash": contract_hash(),
        "version": local_version(),
    }
    if local:
        _write(descriptors, descriptor_set())
        _tell(settings, descriptors, {"local": here})
        return ExitCode.OK
    with open_client(settings) as client:
        answer = client.contract(include_descriptors=descriptors is not None)
    _write(descriptors, answer.descriptors)
    there = {
        "revision": answer.revision,
        "oldest_supported_revision": answer.oldest_supported_revision,
        "contract_hash": answer.contract_hash,
        "version": answer.server_version,
    }
    agree, verdict = agreement(answer)
    _tell(
        settings,
        descriptors,
        {"local": here, "server": there, "agree": agree, "verdict": verdict},
    )
    return ExitCode.OK if agree else ExitCode.REFUSED


def _write(file: str | None, data: bytes) -> None:
    if file is None:
        return
    write_file(file, data)
    if file != "-":
        show_note(f"{len(data)} bytes of descriptors written to {file}")


def _tell(settings: Settings, descriptors: str | None, data: dict[str, Any]) -> None:
    to_stderr = descriptors == "-"
    if settings.json:
        print_json(data, to_stderr=to_stderr)
        return
    sides = [side for side in ("local", "server") if side in data]
    listed = table("", *("this site" if side == "local" else "server" for side in sides))
    for label, field in (
        ("revision", "revision"),
        ("oldest taken", "oldest_supported_revision"),
        ("version", "version"),
    ):
        listed.add_row(label, *(text(data[side][field]) for side in sides))
    print_text(listed, to_stderr=to_stderr)
    print_text(Text(), text("hash of the contract", "bold"), to_stderr=to_stderr)
    for side in sides:
        label = "this site" if side == "local" else "server"
        print_text(text(f"{label:<9}  {data[side]['contract_hash']}"), to_stderr=to_stderr)
    if "verdict" in data:
        style = "green" if data["agree"] else "bold red"
        print_text(text(data["verdict"], style), to_stderr=to_stderr)
