"""What the files of a deployment say, held to the server, to each other and to the engines that read them."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployment_files import (
    DEPLOY,
    ROOT,
    check_command,
    containerfile,
    last,
    load_yaml,
    port,
    seconds,
    unit,
    version,
    words,
)
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ports import lasting_address

from fmi_server.config import ServerSettings, load_settings

COMPOSE = load_yaml(DEPLOY / "compose.yaml")
BROKERS = [name for name in COMPOSE["services"] if name.startswith("nats-")]
SERVERS = [name for name in COMPOSE["services"] if name.startswith("fmi-")]
SETTINGS_FILES = (DEPLOY / "container" / "fmi.yaml", DEPLOY / "compose" / "fmi.yaml")


def tool(name: str) -> str:
    """A program beside this Python, or of the system."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; `make check-deploy` has it")
    return found


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


# Settings


@pytest.mark.parametrize("path", SETTINGS_FILES, ids=lambda path: path.parent.name)
def test_the_server_reads_each_file_of_settings(path: Path) -> None:
    settings = load_settings({}, config_file=path)
    assert port(settings.listen) == 50061
    assert settings.health_listen == "127.0.0.1:50060"
    assert str(settings.data_dir) == "/data"


def test_the_image_alone_lets_nobody_in() -> None:
    settings = load_settings({}, config_file=DEPLOY / "container" / "fmi.yaml")
    assert not settings.insecure
    assert settings.tls_cert is None
    done = run(
        *(sys.executable, "-m", "fmi_server", "check-config"),
        *("--config", DEPLOY / "container" / "fmi.yaml"),
    )
    assert done.returncode == 2
    assert "there is no TLS" in done.stderr


def test_variables_of_the_containers_and_the_docs_are_settings() -> None:
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    assigned = set(re.findall(r"\bFMI_([A-Z_]+)=", page)) - {"BIND"}
    assert {"TLS_CERT", "TLS_KEY", "OPERATORS"} <= assigned
    for name in assigned:
        assert name.lower() in ServerSettings.model_fields, name


# The image


def test_the_image_is_of_this_version() -> None:
    assert f"VERSION={version()}" in [found.rest for found in containerfile()]
    assert f"fmi-server:{version()}" in (ROOT / "docs" / "deployment.md").read_text()


def test_the_image_runs_the_server_as_nobody_in_particular() -> None:
    assert last("ENTRYPOINT").listed == ["fmi-server"]
    given = check_command(last("CMD").listed)
    assert {found.rest for found in containerfile() if "/etc/fmi/fmi.yaml" in found.rest} >= {
        f"deploy/container/fmi.yaml {given['config']}"
    }
    user, _, group = last("USER").rest.partition(":")
    assert int(user) >= 10_000
    assert int(group) >= 10_000
    assert last("STOPSIGNAL").rest == "SIGTERM"


def test_the_image_and_its_settings_agree() -> None:
    settings = load_settings({}, config_file=DEPLOY / "container" / "fmi.yaml")
    assert int(last("EXPOSE").rest) == port(settings.listen)
    assert last("VOLUME").rest == str(settings.data_dir)
    health = last("HEALTHCHECK").rest
    assert f'"fmi_server.probe", "{settings.health_listen}"' in health


def test_both_stages_have_one_base_that_is_pinned() -> None:
    (base,) = [found.rest for found in containerfile() if found.rest.startswith("PYTHON_IMAGE=")]
    assert re.fullmatch(r"PYTHON_IMAGE=docker\.io/library/python:3\.\d+-slim-\w+", base)
    bases = [found.rest.split()[0] for found in containerfile() if found.name == "FROM"]
    assert bases == ["${PYTHON_IMAGE}"] * 2
    minor = base.partition("python:")[2].partition("-")[0]
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert (
            f"Programming Language :: Python :: {minor}"
            in tomllib.load(file)["project"]["classifiers"]
        )


def test_what_is_copied_is_there_and_nothing_else_reaches_the_builder() -> None:
    ignored = (ROOT / ".containerignore").read_text().splitlines()
    taken = {line[1:] for line in ignored if line.startswith("!")}
    copied: set[str] = set()
    for found in containerfile():
        if found.name == "COPY" and not found.rest.startswith("--from"):
            copied |= set(found.rest.split()[:-1])
    assert copied == taken
    for name in copied:
        assert (ROOT / name).exists(), name
    assert "*" in ignored
    docker = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [[line for line in text if not line.startswith("#")] for text in (ignored, docker)]
    assert rules[0] == rules[1]


def test_the_locked_versions_are_what_the_project_asks_for() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    asked = [*project["dependencies"]]
    for extra in ("server", "nats"):
        asked += project["optional-dependencies"][extra]
    text = (ROOT / "requirements" / "container.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    locked = dict(line.split("==") for line in lines)
    assert len(locked) == len(lines)
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        if name != "fmi-federation":
            assert requirement.specifier.contains(locked[name]), requirement


def test_hadolint_has_nothing_to_say() -> None:
    done = run(tool("hadolint"), ROOT / "Containerfile")
    assert (done.returncode, done.stdout) == (0, "")


# One machine


def test_the_unit_starts_the_server() -> None:
    (command,) = unit()["ExecStart"]
    program, *arguments = words(command)
    assert program == "/opt/fmi/bin/fmi-server"
    assert str(check_command(arguments)["config"]) == "/etc/fmi/fmi.yaml"
    drain_s = ServerSettings.model_fields["drain_s"].default
    assert int(unit()["TimeoutStopSec"][0]) > drain_s + 30
    assert int(unit()["LimitNOFILE"][0]) > ServerSettings.model_fields["max_connections"].default


def test_the_unit_and_the_docs_have_the_same_paths() -> None:
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    for told in ("/etc/fmi/fmi.yaml", "/opt/fmi/bin", "/var/lib/fmi/data", "useradd --system"):
        assert told in page
    assert unit()["StateDirectory"] == ["fmi"]
    assert unit()["User"] == ["fmi"]


def test_systemd_understands_the_unit_and_finds_little_exposed(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze")
    text = (DEPLOY / "systemd" / "fmi-server.service").read_text(encoding="utf-8")
    copy = tmp_path / "fmi-server.service"
    copy.write_text(text.replace("/opt/fmi/bin/fmi-server", "/bin/true"))
    done = run(analyze, "verify", copy)
    assert (done.returncode, [t for t in done.stderr.splitlines() if "fmi-server" in t]) == (0, [])
    exposed = run(analyze, "security", "--offline=true", "--threshold=15", copy)
    assert exposed.returncode == 0, exposed.stdout + exposed.stderr


# Compose


def test_there_are_three_of_each() -> None:
    assert (len(BROKERS), len(SERVERS)) == (3, 3)
    assert set(COMPOSE["services"]) == {*BROKERS, *SERVERS}


def test_the_servers_of_compose_differ_in_their_view_and_their_port_alone() -> None:
    views, ports = set(), set()
    alike: list[dict[str, Any]] = []
    for name in SERVERS:
        service = dict(COMPOSE["services"][name])
        (published,) = service.pop("ports")
        view, *folders = service.pop("volumes")
        ports.add(published)
        views.add(view)
        alike.append({**service, "folders": folders})
    assert alike[0] == alike[1] == alike[2]
    assert views == {f"view-{n}:/data" for n in (1, 2, 3)}
    bound = "${FMI_BIND:-127.0.0.1}"
    assert ports == {f"{bound}:{port}:50061" for port in (50061, 50062, 50063)}


def test_compose_and_the_settings_of_its_servers_agree() -> None:
    settings = load_settings({}, config_file=DEPLOY / "compose" / "fmi.yaml")
    assert settings.store == f"nats://{','.join(BROKERS)}/fmi"
    assert settings.store_replicas == len(BROKERS)
    assert port(settings.listen) == 50061
    for name in SERVERS:
        service = COMPOSE["services"][name]
        assert service["healthcheck"]["test"][-1] == settings.health_listen
        assert service["image"].endswith(f"fmi-server:{version()}}}")
        assert seconds(service["stop_grace_period"]) > settings.drain_s + 30
        mounted = [volume.split(":")[-2] for volume in service["volumes"][1:]]
        files = (
            *(settings.tls_cert, settings.tls_key, settings.tls_client_ca, settings.tls_crl),
            settings.cohorts,
        )
        for path in files:
            assert path is not None
            assert any(str(path).startswith(folder) for folder in mounted), path
        assert service["secrets"] == ["store_login"]
        assert str(settings.store_login) == "/run/secrets/store_login"
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert "user" not in service  # the image's


def test_what_compose_mounts_is_there() -> None:
    for found in COMPOSE["configs"].values():
        assert (DEPLOY / found["file"]).is_file()
    for name, found in COMPOSE["secrets"].items():
        assert found["file"] == f"${{FMI_DEPLOYMENT:-./deployment}}/secrets/{name}"


def test_each_broker_has_a_name_and_a_volume_of_its_own() -> None:
    for name in BROKERS:
        service = COMPOSE["services"][name]
        assert service["command"][-2:] == ["--name", name]
        assert service["volumes"] == [f"{name}:/data"]
        assert service["networks"] == ["brokers"]
    assert COMPOSE["networks"]["brokers"] == {"internal": True}


def broker_files(folder: Path, text: str, login: str) -> Path:
    """Lay the files of a broker as in its container; return its configuration."""
    config = folder / "etc" / "nats" / "nats.conf"
    secret = folder / "run" / "secrets" / "store_login.conf"
    for path, content in ((config, text), (secret, login)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return config


def test_the_brokers_configuration_is_in_order(tmp_path: Path) -> None:
    text = (DEPLOY / "compose" / "nats.conf").read_text(encoding="utf-8")
    assert "sync_interval: always" in text
    for name in BROKERS:
        assert f"nats-route://{name}:6222" in text
        service = COMPOSE["services"][name]
        assert service["configs"] == [{"source": "nats", "target": "/etc/nats/nats.conf"}]
        assert service["command"][:2] == ["--config", "/etc/nats/nats.conf"]
        assert service["secrets"] == ["store_login.conf"]
    config = broker_files(tmp_path, text, 'user: fmi\npassword: "secret"\n')
    done = run(tool("nats-server"), "-t", "-c", config)
    assert done.returncode == 0, done.stderr
    config.write_text(text.replace("sync_interval", "sync_intervall"))
    assert run(tool("nats-server"), "-t", "-c", config).returncode != 0


def test_docker_compose_understands_the_file() -> None:
    compose = tool("docker-compose")
    done = run(compose, "--file", DEPLOY / "compose.yaml", "config")
    assert "error" not in done.stderr.lower(), done.stderr
    read = yaml.safe_load(done.stdout)
    assert set(read["services"]) == {*BROKERS, *SERVERS}
    assert read["services"][SERVERS[0]]["deploy"]["resources"]["limits"]["pids"] == 256


def test_compose_lint_finds_nothing_that_matters() -> None:
    """It asks for digests of images too, which is the business of who knows the registry."""
    done = run(tool("compose-lint"), DEPLOY / "compose.yaml")
    assert done.returncode == 0, done.stdout
    rules = set(re.findall(r"^ +\d+ +[A-Z]+ +(CL-\d+)", done.stdout, flags=re.MULTILINE))
    assert rules == {"CL-0019"}


# The commands of the page, with a real server and a real broker


def compose_commands() -> Iterator[str]:
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    section = page.partition("## Several servers, by compose\n")[2]
    block = section.partition("```console\n")[2].partition("```")[0]
    for line in block.splitlines():
        if line.startswith("$ ") and not line.startswith(("$ sudo", "$ docker", "$ fmi ")):
            yield line[2:]


async def test_the_files_made_by_the_page_let_a_real_server_in_at_a_real_broker(
    tmp_path: Path,
) -> None:
    scripts = Path(sys.executable).parent
    commands = list(compose_commands())
    assert [command.split()[0] for command in commands] == [
        "fmi-server",
        "mkdir",
        "printf",
        "printf",
    ]
    script = f'set -eu; PATH="{scripts}:$PATH"; ' + "; ".join(commands)
    made = await asyncio.to_thread(run, "bash", "-c", script, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    folder = tmp_path / "deploy" / "deployment"
    listen, health, broker = (lasting_address() for _ in range(3))
    conf = (DEPLOY / "compose" / "nats.conf").read_text(encoding="utf-8")
    conf = conf.replace("store_dir: /data", f'store_dir: "{tmp_path}/files"')
    conf = conf.replace("listen: 0.0.0.0:4222", f"listen: {broker}").partition("\ncluster {")[0]
    conf = re.sub(r"(?m)^http: .*$", "", conf)
    login = (folder / "secrets" / "store_login.conf").read_text(encoding="utf-8")
    config = broker_files(tmp_path / "broker", conf, login)
    flags = {
        "--config": DEPLOY / "compose" / "fmi.yaml",
        "--listen": listen,
        "--health-listen": health,
        "--store": f"nats://{broker}/fmi",
        "--store-replicas": 1,
        "--store-login": folder / "secrets" / "store_login",
        "--data-dir": tmp_path / "data",
        "--cohorts": folder / "cohorts",
        "--audit-log": tmp_path / "audit.jsonl",
        "--tls-cert": folder / "server" / "server.crt",
        "--tls-key": folder / "server" / "server.key",
        "--tls-client-ca": folder / "server" / "ca.crt",
        "--tls-crl": folder / "server" / "revoked.pem",
    }
    arguments = [str(part) for pair in flags.items() for part in pair]
    log = tmp_path / "log"
    async with (
        process(tool("nats-server"), "-c", str(config), log=log),
        process(sys.executable, "-m", "fmi_server", "serve", *arguments, log=log) as server,
    ):
        # It waits for the broker, which begins at the same time.
        assert server.stdout is not None
        async with asyncio.timeout(90):
            line = await server.stdout.readline()
        assert line.startswith(b"listening on "), log.read_text()
        probe = (sys.executable, "-m", "fmi_server.probe", health, "fmi.v1.InterchangeService")
        done = await asyncio.to_thread(run, *probe)
        assert done.returncode == 0, done.stderr
        client = folder / "clients" / "operator"
        reached = await asyncio.to_thread(
            run,
            *(scripts / "fmi", "cohorts", "--server-name", "fmi"),
            *("--target", f"ipv4:{listen},127.0.0.1:1", "--ca", client / "ca.crt"),
            *("--cert", client / "client.crt", "--key", client / "client.key"),
        )
        assert reached.returncode == 0, reached.stderr
        assert "default" in reached.stdout
        server.terminate()
        async with asyncio.timeout(60):
            assert await server.wait() == 0, log.read_text()


@contextlib.asynccontextmanager
async def process(*command: str, log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a program; it is killed at the end if it still runs."""
    with log.open("ab") as errors:
        started = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=errors
        )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.communicate()
