"""The wheel, installed as a site installs it: in an environment of its own, from the base install."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOWEST_CLIENT = ROOT / "requirements" / "lowest-client.txt"

pytestmark = pytest.mark.timeout(600)


def run(command: Sequence[str | Path], *, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done = run([sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT], cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module", params=["newest", "lowest"])
def site(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the scripts folder of an environment with the base install and nothing else.

    It has the newest versions of what that needs, or the lowest that are declared.
    """
    folder = tmp_path_factory.mktemp("site")
    assert run([sys.executable, "-m", "venv", folder / "venv"], cwd=folder).returncode == 0
    scripts = folder / "venv" / "bin"
    bounds = ["--constraint", LOWEST_CLIENT] if request.param == "lowest" else []
    done = run([scripts / "python", "-m", "pip", "install", "--quiet", *bounds, wheel], cwd=folder)
    assert done.returncode == 0, done.stderr
    return scripts


def test_the_wheel_has_the_contract_and_its_sources(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for source in (ROOT / "proto" / "fmi" / "v1").glob("*.proto"):
        assert f"fmi/v1/{source.name}" in names
        assert f"fmi/v1/{source.stem}_pb2.py" in names
        assert f"fmi/v1/{source.stem}_pb2.pyi" in names
    assert {"buf/validate/validate_pb2.py", "fmi/py.typed", "fmi_client/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests/", "proto/", "benchmarks/"))]


def test_a_base_install_emits_and_subscribes_without_numpy_or_the_server(site: Path) -> None:
    listed = run([site / "python", "-m", "pip", "list", "--format", "freeze"], cwd=site).stdout
    installed = {line.partition("==")[0].lower() for line in listed.splitlines()}
    assert not installed & {"numpy", "scipy", "pydantic", "prometheus-client", "grpcio-reflection"}
    code = """
import sys
from fmi.v1 import packet_pb2, interchange_service_pb2_grpc
from fmi_client import FMIClient, FMIEmitter, FMIEncoder
packet = FMIEmitter(domain_id="site_001").emit_msp(controller={"tau": 0.9})
assert FMIEncoder().decode(FMIEncoder().encode([packet])) == [packet]
assert not {name.partition(".")[0] for name in sys.modules} & {"numpy", "fmi_server", "fmi_demo"}
print("fine")
"""
    done = run([site / "python", "-W", "error", "-c", code], cwd=site)
    assert done.stdout == "fine\n", done.stderr


def test_a_base_install_talks_to_a_real_server(site: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fmi_server", "serve", "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(
        [*command, "--data-dir", str(tmp_path / "data")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process, process.stdout:
        target = process.stdout.readline().removeprefix("listening on ").strip()
        try:
            for name in ("a", "b", "c"):
                words = [
                    "emit",
                    "msp",
                    "--domain",
                    name,
                    "--cohort",
                    "c",
                    "--controller",
                    "tau=0.5",
                ]
                done = run([site / "fmi", *words, "--target", target], cwd=tmp_path)
                assert done.returncode == 0, done.stderr
            words = ["watch", "c", "--kind", "prior", "--count", "1", "--json"]
            done = run([site / "fmi", *words, "--target", target], cwd=tmp_path)
            assert '"tau": 0.5' in done.stdout, done.stderr
            done = run([site / "fmi", "doctor", "--target", target], cwd=tmp_path)
            assert done.returncode == 0, done.stdout
        finally:
            process.terminate()


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["fmi-server", "serve"], "pip install '.[server]'"),
        (["fmi", "demo"], "pip install '.[demo]'"),
    ],
)
def test_a_command_says_in_one_line_which_extra_it_needs(
    site: Path, tmp_path: Path, command: list[str], told: str
) -> None:
    done = run([site / command[0], *command[1:]], cwd=tmp_path)
    assert done.returncode != 0
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
