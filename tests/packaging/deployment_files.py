"""The files of a deployment, read; and the chart, rendered by Helm's own engine where it is installed."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import yaml

from fmi_server.commands import cli

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "fmi"

HAS_HELM = importlib.util.find_spec("helm_python") is not None
HAS_SCHEMAS = importlib.util.find_spec("kubernetes_validate") is not None

UNITS = {"s": 1, "m": 60}

CASES: dict[str, dict[str, Any]] = {
    "single": {"tls": {"secretName": "fmi-tls"}},
    "single with tokens": {
        "tls": {"secretName": "fmi-tls", "clientCertificates": False},
        "tokens": {"secretName": "fmi-tokens"},
        "persistence": {"size": "1Ti", "storageClassName": "fast"},
        "imagePullSecrets": [{"name": "registry"}],
        "priorityClassName": "high",
        "nodeSelector": {"disk": "nvme"},
        "tolerations": [{"key": "fmi", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "podLabels": {"team": "a"},
        "podAnnotations": {"note": "b"},
        "networkPolicy": {"enabled": False},
    },
    "open": {"settings": {"insecure": True, "open_cohorts": True}},
    "cluster": {
        "mode": "cluster",
        "tls": {"secretName": "fmi-tls"},
        "brokers": {"url": "nats://nats-0,nats-1,nats-2/fmi"},
    },
    "cluster with all": {
        "mode": "cluster",
        "replicas": 5,
        "image": {"repository": "registry.example.org/fmi", "tag": "1.2.3@sha256:00"},
        "tls": {"secretName": "fmi-tls", "revocations": False},
        "tokens": {"secretName": "fmi-tokens"},
        "operators": ["a", "b"],
        "brokers": {
            "url": "tls://nats/fmi",
            "replicas": 5,
            "loginSecretName": "login",
            "tlsSecretName": "brokers-tls",
            "clientCertificate": True,
        },
        "cohorts": {"care.yaml": "name: care\n", "retail.yaml": "name: retail\n"},
        "settings": {"max_message_bytes": 8388608, "drain_s": 12.5, "quota_packets_per_s": 0},
        "metrics": {"enabled": True},
        "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
        "networkPolicy": {
            "clients": [{"ipBlock": {"cidr": "192.0.2.0/24"}}],
            "metrics": [{"podSelector": {}}],
            "brokers": [{"namespaceSelector": {"matchLabels": {"name": "nats"}}}],
            "egress": [{"ports": [{"port": 50061}]}],
        },
    },
}
"""Values to render the chart with: together they reach each line of its templates."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no TLS, and nobody said so": ({}, "insecure"),
    "a cluster without brokers": (
        {"mode": "cluster", "tls": {"secretName": "x"}},
        "/brokers/url",
    ),
    "a password in a URL": (
        {
            "mode": "cluster",
            "tls": {"secretName": "x"},
            "brokers": {"url": "nats://me:secret@nats/fmi"},
        },
        "/brokers/url",
    ),
    "no setting": ({"tls": {"secretName": "x"}, "settings": {"listn": "x"}}, "listn"),
    "a setting of the chart's": (
        {"tls": {"secretName": "x"}, "settings": {"listen": "x"}},
        "listen",
    ),
    "tokens in plain text": (
        {"tokens": {"secretName": "x"}, "settings": {"insecure": True}},
        "/tls/secretName",
    ),
    "no value of the chart": ({"tls": {"secretName": "x"}, "replica": 3}, "replica"),
    "an even number of brokers": (
        {"tls": {"secretName": "x"}, "brokers": {"replicas": 2}},
        "/brokers/replicas",
    ),
}
"""Values that the chart refuses, and what is said of them."""


def version() -> str:
    """The version of this project."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return str(tomllib.load(file)["project"]["version"])


def load_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Instruction:
    """One line of a Containerfile, continued lines joined."""

    name: str
    rest: str

    @property
    def listed(self) -> list[str]:
        """What it gives in JSON."""
        found = json.loads(self.rest)
        assert isinstance(found, list)
        return found


@cache
def containerfile() -> list[Instruction]:
    text = (ROOT / "Containerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines()]


def last(name: str) -> Instruction:
    """The instruction of a name that counts in the image."""
    return [found for found in containerfile() if found.name == name][-1]


def unit() -> dict[str, list[str]]:
    """The keys of the systemd unit, each with its values in order."""
    text = (DEPLOY / "systemd" / "fmi-server.service").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith(("#", "[")):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def words(command: str | list[str]) -> list[str]:
    return shlex.split(command) if isinstance(command, str) else command


def seconds(text: str) -> int:
    found = re.fullmatch(r"(\d+)([sm])?", text)
    assert found, text
    return int(found[1]) * UNITS[found[2] or "s"]


def port(address: str) -> int:
    return int(address.rpartition(":")[2])


def check_command(arguments: list[str]) -> dict[str, Any]:
    """Read a command line of `fmi-server` as it does; return what it gives."""
    name, *rest = arguments
    context = cli.commands[name].make_context(name, list(rest))
    assert isinstance(context, click.Context)
    return {key: value for key, value in context.params.items() if value is not None}


def template_settings() -> set[str]:
    """The settings that the chart decides, by the text of its template."""
    text = (CHART / "templates" / "_helpers.tpl").read_text(encoding="utf-8")
    (first,) = re.findall(r"\$made := dict (.*?) -}}", text)
    return {*re.findall(r'set \$made "(\w+)"', text), *re.findall(r'"(\w+)" "', first)}


def rendered(values: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Render the chart; return its objects by their kind."""
    import helm_python  # noqa: PLC0415 - it is not installed everywhere

    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(values, name="fmi", namespace="fmi")
    objects: dict[str, list[dict[str, Any]]] = {}
    for name, text in files.items():
        if name.endswith(".yaml"):
            for found in yaml.safe_load_all(text):
                if found:
                    objects.setdefault(found["kind"], []).append(found)
    return objects
