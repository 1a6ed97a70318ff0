"""YAML as people write it in cohort files and settings, read strictly.

PyYAML keeps the last of two values under one key, so that a value which somebody wrote is lost without a
word. It also copies what merge keys (``<<``) refer to as often as it is referred to, so that ten lines
of them fill the memory.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Final

import yaml

__all__ = ["YAMLTextError", "parse_yaml", "read_yaml"]

_MAX_SHOWN: Final = 60
"""Characters told of a key that somebody else wrote."""

_MAX_REASON: Final = 200
"""Characters told of why a text is not YAML."""


class YAMLTextError(ValueError):
    """A file cannot be read, is not YAML, or has a key twice. The message says so in one line."""


def read_yaml(path: Path) -> object:
    """Read a file with one YAML document, as `parse_yaml`.

    Raises:
        YAMLTextError: The file cannot be read, is not UTF-8, or as for `parse_yaml`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise YAMLTextError(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise YAMLTextError(f"is not YAML: {error}") from error
    return parse_yaml(text)


def parse_yaml(text: str) -> object:
    """Read one YAML document, with the safe types only.

    Raises:
        YAMLTextError: It is not YAML, or a mapping in it has a key twice.
    """
    try:
        return yaml.load(text, _StrictLoader)  # noqa: S506 - a SafeLoader
    except YAMLTextError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: a date or a number that YAML knows and Python does not.
        reason = str(error).replace('in "<unicode string>", ', "at ")
        raise YAMLTextError(f"is not YAML: {_line(reason)}") from error
    except (AttributeError, LookupError) as error:
        # What PyYAML does with a tag whose value is none of its kind: `!!timestamp soon`, `!!bool si`.
        raise YAMLTextError(
            "is not YAML: a value is not of the kind that its !! tag says"
        ) from error


class _StrictLoader(yaml.SafeLoader):
    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        _check_keys(node)
        super().flatten_mapping(node)
        node.value = list({_identity(key): (key, value) for key, value in node.value}.values())


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[Hashable, int] = {}
    for key, _ in node.value:
        same, line = _identity(key), key.start_mark.line + 1
        if same in lines:
            raise YAMLTextError(
                f"line {line}: {_shown(key)} stands here twice, first in line {lines[same]}; "
                "leave one of them out"
            )
        lines[same] = line


def _shown(key: yaml.Node) -> str:
    return _cut(str(key.value), _MAX_SHOWN).encode("unicode_escape").decode("ascii")


def _line(text: str) -> str:
    line = _cut(" ".join(text.split()), _MAX_REASON)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _identity(key: yaml.Node) -> Hashable:
    """Return what two keys have in common that are the same."""
    return (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
