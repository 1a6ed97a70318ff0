"""Write what follows from the definitions of settings, or check that it is up to date.

That is the tables of docs/settings.md, of which the text around them is written by hand, and the settings
that the chart takes (deploy/helm/fmi/values.schema.json), which are those that it does not decide itself.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from fmi_server import releases
from fmi_server.commands import cli
from fmi_server.config import ServerSettings
from fmi_server.envelope import EnvelopeLimits
from fmi_server.storage.sqlite_writer import GroupLimits

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "settings.md"
CHART = ROOT / "deploy" / "helm" / "fmi"
SCHEMA = CHART / "values.schema.json"

SAID_BY_PEOPLE_TOO = {"insecure"}
"""Settings that the chart decides in one case, and leaves to its values in all others."""

BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
"""What pydantic calls a bound, and what people call it."""


def generated(document: str) -> str:
    """Return the document with its tables as the code says."""
    for name, rows in (("settings", _settings()), ("budgets", _budgets())):
        before, begin, rest = document.partition(f"<!-- begin {name}: generated -->\n")
        _, end, after = rest.partition(f"<!-- end {name} -->")
        if not end:
            raise SystemExit(f"{DOCUMENT}: there must be a place for the table {name}")
        document = "".join((before, begin, _table(list(rows)), end, after))
    return document


def generated_schema(schema: str) -> str:
    """Return the schema of the chart's values with the settings that may stand among them."""
    names = [name for name in ServerSettings.model_fields if name not in _decided_by_the_chart()]
    content = json.loads(schema)
    content["properties"]["settings"]["propertyNames"] = {"enum": names}
    return json.dumps(content, indent=2) + "\n"


def _decided_by_the_chart() -> set[str]:
    template = (CHART / "templates" / "_helpers.tpl").read_text(encoding="utf-8")
    (first,) = re.findall(r"\$made := dict (.*?) -}}", template)
    decided = {*re.findall(r'set \$made "(\w+)"', template), *re.findall(r'"(\w+)" "', first)}
    return decided - SAID_BY_PEOPLE_TOO


def _settings() -> Iterator[Sequence[str]]:
    yield "YAML key", "Flag", "Variable", "Default", "Takes", "Meaning"
    yield "", "`--config`", "", "none", "file", "YAML file with settings by their keys"
    flags = _flags()
    for name, setting in ServerSettings.model_fields.items():
        yield (
            f"`{name}`",
            flags[name],
            f"`FMI_{name.upper()}`",
            _default(setting),
            _takes(name, setting),
            setting.description or "",
        )


def _flags() -> dict[str, str]:
    return {
        str(option.name): " ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
        for option in cli.commands["serve"].params
    }


def _default(setting: FieldInfo) -> str:
    match setting.default:
        case None | ():
            return "none"
        case dict() as empty if not empty:
            return "none"
        case bool() as flag:
            return f"`{str(flag).lower()}`"
        case int() as number if number >= 2**20 and number % 2**20 == 0:
            return f"`{number}` ({number >> 20} MiB)"
        case other:
            return f"`{other}`"


def _takes(name: str, setting: FieldInfo) -> str:
    if setting.annotation is bool:
        return "`true`, `false`"
    if get_origin(setting.annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(setting.annotation))
    extra = setting.json_schema_extra
    if not isinstance(extra, dict) or "unit" not in extra:
        raise SystemExit(f"setting {name}: say its unit, as json_schema_extra={{'unit': ...}}")
    bounds = [
        f"{words} {getattr(bound, kind)}"
        for bound in setting.metadata
        for kind, words in BOUNDS.items()
        if hasattr(bound, kind)
    ]
    return ", ".join([str(extra["unit"]), *bounds])


def _budgets() -> Iterator[Sequence[str]]:
    yield "Of", "At most", "Past it"
    envelopes, writer = EnvelopeLimits(), GroupLimits()
    yield (
        "envelopes and batches that are being taken, all together",
        _mib(envelopes.max_decoded_bytes),
        "further ones wait their turn; where many wait already, OVERLOADED",
    )
    yield (
        "packets that wait for the disk",
        f"{writer.pending_records} packets and {_mib(writer.pending_bytes)}",
        "OVERLOADED",
    )
    yield (
        "stored packets of one cohort that are not counted yet",
        _mib(releases.MAX_UNCOUNTED_BYTES),
        "those who emit wait",
    )
    yield (
        "the same of all cohorts together",
        _mib(releases.MAX_ALL_UNCOUNTED_BYTES),
        "those who emit wait",
    )


def _mib(size: int) -> str:
    return f"{size >> 20} MiB"


def _table(rows: Sequence[Sequence[str]]) -> str:
    ruled = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in ruled)


def main() -> int:
    """Write them, or compare (`--check`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    options = parser.parse_args()
    outdated = 0
    for path, generate in ((DOCUMENT, generated), (SCHEMA, generated_schema)):
        present = path.read_text(encoding="utf-8")
        wanted = generate(present)
        if not options.check:
            path.write_text(wanted, encoding="utf-8")
        elif present != wanted:
            outdated += 1
            print(
                f"{path.relative_to(ROOT)}: run `python tools/generate_settings.py`",
                file=sys.stderr,
            )
    return min(outdated, 1)


if __name__ == "__main__":
    sys.exit(main())
