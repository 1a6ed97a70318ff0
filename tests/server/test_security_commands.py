"""`fmi-server init`, `revoke` and `tokens`, and the settings that secure a server."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import ssl
import stat
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from cryptography import x509
from identity_harness import Office, calling
from server_harness import DEADLINE_S, Client, eventually, msp, spec
from server_process import COMMAND, assert_refused, started

from fmi.v1 import cohort_pb2
from fmi.v1 import registry_service_pb2 as registry_pb2
from fmi_client import AccessDeniedError, FMIClient, TLSConfig
from fmi_server.authority import Issued
from fmi_server.certificates import read_authorities, read_client_certificate, read_revocations
from fmi_server.commands import cli
from fmi_server.config import load_settings
from fmi_server.deployment import Deployment
from fmi_server.testing import running_server
from fmi_server.tokens import read_tokens

FMI = str(Path(COMMAND[0]).with_name("fmi"))
CONTRACT = ("fmi.v1.RegistryService/GetContract", registry_pb2.GetContractRequest())


@pytest.fixture
def office(tmp_path) -> Office:
    return Office(tmp_path / "office")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("FMI_")]:
        monkeypatch.delenv(name)


def invoke(*words: object, code: int = 0):
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


async def fmi(*words: object, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Run the site's command; return its exit code and all that it said."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FMI_")}
    process = await asyncio.create_subprocess_exec(
        FMI,
        *map(str, words),
        env={**kept, **(env or {})},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    return process.returncode or 0, out.decode()


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# A first deployment


def test_init_makes_what_is_missing_and_writes_over_nothing(tmp_path):
    folder = tmp_path / "deployment"
    invoke("init", folder, "--host", "127.0.0.1")
    made = files_of(folder)
    assert set(made) == {
        "ca/ca.crt",
        "ca/ca.key",
        "server/server.crt",
        "server/server.key",
        "server/ca.crt",
        "server/revoked.pem",
        "clients/operator/client.crt",
        "clients/operator/client.key",
        "clients/operator/ca.crt",
        "cohorts/default.yaml",
        "fmi.yaml",
    }
    for path in folder.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.suffix == ".key":
            assert mode == 0o600, path
        elif path.is_dir():
            assert mode == 0o700, path
    assert "all of it is there" in invoke("init", folder).output
    assert files_of(folder) == made
    (folder / "server" / "server.crt").unlink()
    (folder / "fmi.yaml").unlink()
    invoke("init", folder)
    assert "fmi.yaml" in files_of(folder)
    assert "server/server.crt" not in files_of(folder), "a folder that is there is not touched"
    assert {n: c for n, c in files_of(folder).items() if n != "fmi.yaml"} == {
        n: c for n, c in made.items() if n not in ("fmi.yaml", "server/server.crt")
    }


def test_init_makes_a_site_once(tmp_path):
    folder = tmp_path / "deployment"
    invoke("init", folder)
    said = invoke("init", folder, "--site", "site_001", "--domain-id", "ward-1").output
    assert str(folder / "clients" / "site_001") in said
    before = files_of(folder)
    told = invoke("init", folder, "--site", "site_001", code=2).stderr
    assert "exists, and nothing is written over" in told
    assert files_of(folder) == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--site", "../../etc"), "is no name"),
        (("--site", ".."), "is no name"),
        (("--site", "a" * 65), "is no name"),
        (("--site", "a b"), "is no name"),
        (("--site", "ok", "--domain-id", "*"), "is no name"),
        (("--domain-id", "x"), "goes with --site"),
        (("--site", "operator"), "exists"),
    ],
)
def test_a_name_that_is_none_makes_nothing(tmp_path, words, told):
    folder = tmp_path / "deployment"
    invoke("init", folder)
    before = files_of(folder)
    assert told in invoke("init", folder, *words, code=2).stderr
    assert files_of(folder) == before


def test_without_the_authority_nothing_is_signed(tmp_path):
    folder = tmp_path / "deployment"
    assert "is not there" in invoke("init", folder, "--site", "a", code=2).stderr
    invoke("init", folder)
    key = folder / "ca" / "ca.key"
    kept = key.read_bytes()
    key.unlink()
    assert "bring the authority's key back" in invoke("init", folder, "--site", "a", code=2).stderr
    key.write_bytes(b"garbage")
    assert "cannot be used" in invoke("init", folder, "--site", "a", code=2).stderr
    key.write_bytes(kept)
    invoke("init", folder, "--site", "a")
    assert "there is no" in invoke("revoke", folder, "nobody", code=2).stderr


async def test_a_first_deployment_works(tmp_path):
    """From nothing to a site that emits, one that is turned away, and one that is revoked."""
    folder = tmp_path / "deployment"
    invoke("init", folder, "--host", "127.0.0.1")
    for site in ("site_001", "site_002"):
        invoke("init", folder, "--site", site)
    settings = load_settings({}, config_file=folder / "fmi.yaml")
    assert settings.operators == ("operator",)
    assert settings.listen == "0.0.0.0:50061"
    invoke("check-config", "--config", folder / "fmi.yaml")
    (folder / "ca" / "ca.key").rename(tmp_path / "ca.key")  # the server does not need it

    flags = ("--config", str(folder / "fmi.yaml"), "--listen", "127.0.0.1:0")
    async with started(*flags) as server:
        told = "what is not allowed is denied; 1 operator"
        await eventually(lambda: any(told in line for line in server.err))

        def options(name):
            of = folder / "clients" / name
            return (
                *("--target", server.target, "--ca", of / "ca.crt"),
                *("--cert", of / "client.crt", "--key", of / "client.key"),
            )

        packet = tmp_path / "packet.json"
        fields = {"type": "msp", "controller": {"tau": 0.5}}
        packet.write_text(json.dumps({**fields, "domain_id": "site_001"}))
        for name, words, expected, told in (
            ("site_001", ("doctor",), 0, "all is well"),
            ("site_001", ("emit", packet), 0, "accepted"),
            ("site_002", ("emit", packet), 1, "DOMAIN_ID_MISMATCH"),
            ("site_001", ("cohorts",), 0, "default"),
            ("site_001", ("cohorts", "--json"), 0, '"cohort": "default"'),
            ("operator", ("cohorts", "--json"), 0, '"sites": 1'),
            ("site_001", ("sites",), 1, "ACCESS_DENIED"),
            ("operator", ("sites",), 0, "site_001"),
        ):
            code, said = await fmi(*options(name), *words)
            assert (code, told in said) == (expected, True), said
        code, said = await fmi(
            "--target", server.target, "--ca", folder / "ca" / "ca.crt", "doctor"
        )
        assert code != 0

        (tmp_path / "ca.key").rename(folder / "ca" / "ca.key")
        invoke("revoke", folder, "site_001")
        assert not (folder / "clients" / "site_001").exists()
        invoke("init", folder, "--site", "site_001")  # new credentials under the name
        (aside,) = (folder / "clients").glob("site_001.revoked-*")
        old = Issued((aside / "client.crt").read_bytes(), (aside / "client.key").read_bytes())
        async with calling(server.target, ca=(aside / "ca.crt").read_bytes(), client=old) as caller:

            async def turned_away() -> bool:
                return (await caller.outcome(*CONTRACT)).reason == "UNAUTHENTICATED"

            await eventually(turned_away)
        code, said = await fmi(*options("site_001"), "emit", packet)
        assert code == 0, said
    audit = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
    assert {"OK", "ACCESS_DENIED", "DOMAIN_ID_MISMATCH", "UNAUTHENTICATED"} <= {
        line["outcome"] for line in audit
    }


# Renewed and revoked


def listed_in(folder: Path, *names: str) -> list[bool]:
    """Say of the certificates in folders of clients whether the list that the server reads has them."""
    _, authorities = read_authorities(folder / "server" / "ca.crt")
    revoked = read_revocations(folder / "server" / "revoked.pem", authorities)
    clients = folder / "clients"
    return [
        read_client_certificate((clients / name / "client.crt").read_bytes()) in revoked
        for name in names
    ]


def set_aside(folder: Path, name: str, why: str) -> str:
    (found,) = (folder / "clients").glob(f"{name}.{why}-*Z")
    return found.name


@pytest.mark.parametrize("lost", ["server", "ca/revoked.pem", "clients"])
def test_what_was_revoked_stays_so_when_a_part_of_the_folder_is_made_anew(tmp_path, lost):
    folder = tmp_path / "deployment"
    invoke("init", folder, "--host", "127.0.0.1")
    for site in ("one", "two"):
        invoke("init", folder, "--site", site)
    invoke("revoke", folder, "one")
    one = set_aside(folder, "one", "revoked")
    assert listed_in(folder, one, "two") == [True, False]
    kept = tmp_path / "kept"
    (folder / lost).rename(kept)
    invoke("init", folder, "--host", "127.0.0.1")
    if lost == "clients":
        shutil.rmtree(folder / lost)
        kept.rename(folder / lost)
        shutil.move(folder / lost / one, folder / lost / "somewhere")
        one = "somewhere"
    assert listed_in(folder, one, "two") == [True, False]
    invoke("revoke", folder, "two")
    assert listed_in(folder, one, set_aside(folder, "two", "revoked")) == [True, True]


async def test_revocations_at_the_same_time_wait_for_each_other(tmp_path):
    folder = tmp_path / "deployment"
    invoke("init", folder)
    names = [f"site-{number}" for number in range(6)]
    for name in names:
        invoke("init", folder, "--site", name)
    deployment = Deployment(folder, datetime.now(UTC), timedelta(days=1))
    await asyncio.gather(*[asyncio.to_thread(deployment.revoke, name) for name in names])
    aside = [set_aside(folder, name, "revoked") for name in names]
    assert listed_in(folder, *aside) == [True] * len(names)


def test_the_certificate_of_a_client_is_renewed_and_the_old_one_goes_on(tmp_path):
    folder = tmp_path / "deployment"
    invoke("init", folder)
    invoke("init", folder, "--site", "gate", "--domain-id", "ward-1", "--domain-id", "ward-2")
    invoke("init", folder, "--site", "alone")

    def says(name):
        return read_client_certificate((folder / "clients" / name / "client.crt").read_bytes())

    for name in ("gate", "alone"):
        before = says(name)
        said = invoke("renew", folder, name, "--valid-days", 900).output
        old = set_aside(folder, name, "renewed")
        assert f"revoke {folder} {old}" in said
        after = says(name)
        assert (after.principal, after.domain_ids) == (before.principal, before.domain_ids)
        assert after.serial != before.serial
        assert after.expires_at > before.expires_at
        assert says(old) == before
        assert listed_in(folder, old, name) == [False, False]
    old = set_aside(folder, "gate", "renewed")
    invoke("revoke", folder, old)
    assert listed_in(folder, set_aside(folder, old, "revoked"), "gate") == [True, False]
    for words, told in (
        (("nobody",), "there is no"),
        (("../server",), "there is no"),
        (("gate", "--host", "x"), "leave NAME or --host out"),
    ):
        assert told in invoke("renew", folder, *words, code=2).stderr
    again = set_aside(folder, old, "revoked")
    for command in ("revoke", "renew"):
        assert "revoked already" in invoke(command, folder, again, code=2).stderr
    assert "is no name" in invoke("init", folder, "--site", again, code=2).stderr


async def test_the_certificate_of_the_server_is_renewed_while_it_runs(tmp_path):
    folder = tmp_path / "deployment"
    invoke("init", folder, "--host", "127.0.0.1", "--host", "fmi.example.org")
    invoke("init", folder, "--site", "one")
    of = folder / "clients" / "one"
    client = Issued((of / "client.crt").read_bytes(), (of / "client.key").read_bytes())
    ca = (of / "ca.crt").read_bytes()
    server_crt = folder / "server" / "server.crt"

    def shown(port: int) -> x509.Certificate:
        return x509.load_pem_x509_certificate(
            ssl.get_server_certificate(("127.0.0.1", port)).encode()
        )

    flags = ("--config", str(folder / "fmi.yaml"), "--listen", "127.0.0.1:0")
    async with started(*flags) as server:
        port = int(server.target.rpartition(":")[2])
        before = await asyncio.to_thread(shown, port)
        assert "server.crt" in invoke("renew", folder).output
        after = x509.load_pem_x509_certificate(server_crt.read_bytes())
        assert after.serial_number != before.serial_number
        san = x509.SubjectAlternativeName
        assert (
            after.extensions.get_extension_for_class(san).value
            == before.extensions.get_extension_for_class(san).value
        )
        assert stat.S_IMODE((folder / "server" / "server.key").stat().st_mode) == 0o600

        async def is_shown() -> bool:
            found = await asyncio.to_thread(shown, port)
            return found.serial_number == after.serial_number

        await eventually(is_shown)
        async with calling(server.target, ca=ca, client=client) as caller:
            assert (await caller.outcome(*CONTRACT)).reason == "ok"
    invoke("renew", folder, "--host", "127.0.0.2")
    renewed = x509.load_pem_x509_certificate(server_crt.read_bytes())
    names = renewed.extensions.get_extension_for_class(san).value
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.2"]
    server_crt.unlink()
    assert "there is no" in invoke("renew", folder, code=2).stderr


# Tokens


async def test_the_life_of_a_token(tmp_path, office):
    file = tmp_path / "tokens.json"
    out = tmp_path / "site.token"
    invoke("tokens", "create", "site_001", "--tokens", file, "--out", out)
    assert out.stat().st_mode & 0o777 == 0o600
    flags = [f"--tokens={file}", "--tls-cert", office.cert, "--tls-key", office.key]
    (tmp_path / "cohorts").mkdir()
    (tmp_path / "cohorts" / "care.yaml").write_text('name: care\naccess: {emit: ["*"]}\n')
    flags += ["--listen=127.0.0.1:0", f"--data-dir={tmp_path}", f"--cohorts={tmp_path / 'cohorts'}"]
    async with started(*map(str, flags)) as server:
        tls = TLSConfig(root_certificates=office.ca_file)

        def emit(token) -> str:
            with FMIClient(
                server.target, domain_id="site_001", cohort="care", tls=tls, token=token
            ) as client:
                return str(client.emit_msp(controller={"tau": 0.5}).status)

        assert await asyncio.to_thread(emit, out) == "accepted"
        (record,) = read_tokens(file).records.values()
        rotated = invoke("tokens", "rotate", record.token_id, "--tokens", file)
        new = rotated.stdout.strip()
        assert record.token_id not in new
        assert await asyncio.to_thread(accepted, emit, new)
        assert await asyncio.to_thread(emit, out) == "accepted", "the old one has its grace"
        invoke("tokens", "revoke", "--principal", "site_001", "--tokens", file)
        for token in (new, out):
            assert await asyncio.to_thread(turned_away, emit, token)
        text = out.read_text().strip()
        secret = text.split("_", 2)[2]
        assert not any(secret in line for line in server.err)
    assert secret not in file.read_text()


def accepted(emit, token) -> bool:
    """Say whether a token is taken before long."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        try:
            return emit(token) == "accepted"
        except AccessDeniedError:
            time.sleep(0.02)
    return False


def turned_away(emit, token) -> bool:
    """Say whether a token is refused before long."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        try:
            emit(token)
            time.sleep(0.02)
        except AccessDeniedError as error:
            return error.reason == "UNAUTHENTICATED"
    return False


def test_tokens_are_listed_without_their_secrets(tmp_path):
    file = tmp_path / "tokens.json"
    made = [
        invoke("tokens", "create", name, "--tokens", file, *more).stdout.strip()
        for name, more in (
            ("one", ()),
            ("gate", ("--domain-id", "a", "--domain-id", "b", "--no-expiry")),
        )
    ]
    plain = invoke("tokens", "list", "--tokens", file).output
    listed = json.loads(invoke("tokens", "list", "--json", "--tokens", file).output)
    assert [(t["principal"], t["domain_ids"], t["state"]) for t in listed] == [
        ("one", ["one"], "valid"),
        ("gate", ["a", "b"], "valid"),
    ]
    assert listed[1]["expires_at"] is None
    for text in made:
        assert text.split("_")[1] in plain
        assert text.split("_", 2)[2] not in plain + json.dumps(listed) + file.read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("create", "*"), "is not `*`"),
        (("create", ""), "1 to 256"),
        (("create", "a\nb"), "printable"),
        (("create", "a", "--domain-id", "*"), "is no name of a site"),
        (("create", "a", "--domain-id", ""), "is no name of a site"),
        (("create", "a", "--domain-id", "ward 1"), "is no name of a site"),
        (("revoke", "0000"), "there is no token 0000"),
        (("revoke",), "name the tokens to revoke"),
        (("revoke", "--principal", "nobody"), "name the tokens to revoke"),
        (("rotate", "0000"), "there is no token 0000"),
        (("create", "a", "--out", "taken"), "is not written over"),
    ],
)
def test_what_cannot_be_done_changes_nothing(tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("mine")
    invoke("tokens", "create", "one", "--tokens", "tokens.json")
    before = (tmp_path / "tokens.json").read_bytes()
    result = invoke("tokens", *words, "--tokens", "tokens.json", code=2)
    assert told in result.stderr
    assert result.stdout == ""
    assert (tmp_path / "tokens.json").read_bytes() == before
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_token_that_cannot_be_kept_is_not_handed_out(tmp_path):
    out = tmp_path / "site.token"
    missing = tmp_path / "no" / "tokens.json"
    told = invoke("tokens", "create", "a", "--tokens", missing, "--out", out, code=2).stderr
    assert "cannot be written" in told
    assert not out.exists()
    assert "name the file" in invoke("tokens", "list", code=2).stderr


def test_a_token_that_is_lost_in_the_end_leaves_no_file(tmp_path, monkeypatch):
    out, file = tmp_path / "site.token", tmp_path / "tokens.json"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fmi_server.tokens._replace", full)
    told = invoke("tokens", "create", "a", "--tokens", file, "--out", out, code=2).stderr
    assert "No space left" in told
    assert not out.exists()
    assert not file.exists()


def test_the_file_is_the_one_of_the_settings(tmp_path, monkeypatch):
    config = tmp_path / "fmi.yaml"
    config.write_text(yaml.safe_dump({"tokens": str(tmp_path / "a.json")}))
    invoke("tokens", "create", "one", "--config", config)
    monkeypatch.setenv("FMI_TOKENS", str(tmp_path / "b.json"))
    invoke("tokens", "create", "two")
    for name, principal in (("a.json", "one"), ("b.json", "two")):
        (record,) = read_tokens(tmp_path / name).records.values()
        assert record.principal == principal


# Settings


def settings_flags(office, tmp_path) -> dict[str, str]:
    office.token("x")
    crl = tmp_path / "others.pem"
    crl.write_bytes(Office(tmp_path / "other").authority.revocations(now=office.now))
    cohorts = tmp_path / "cohorts"
    cohorts.mkdir()
    (cohorts / "care.yaml").write_text('name: care\naccess: {emit: ["*"]}\n')
    return {
        "cert": f"--tls-cert={office.cert}",
        "key": f"--tls-key={office.key}",
        "ca": f"--tls-client-ca={office.ca_file}",
        "crl": f"--tls-crl={office.crl}",
        "others": f"--tls-crl={crl}",
        "tokens": f"--tokens={office.tokens}",
        "no tokens": f"--tokens={tmp_path / 'none.json'}",
        "wrong key": f"--tls-key={office.cert}",
        "everywhere": "--listen=0.0.0.0:1",
        "insecure": "--insecure",
        "boss": "--operators=boss, other",
        "star": "--operators=*",
        "cohorts": f"--cohorts={cohorts}",
        "audit": f"--audit-log={tmp_path / 'no' / 'audit.jsonl'}",
        "parent": "--parent=127.0.0.1:1",
        "site": "--parent-domain-id=r",
        "parent_ca": f"--parent-ca={office.ca_file}",
        "parent_token": f"--parent-token={tmp_path / 'none.token'}",
        "far": "--parent=192.0.2.1:1",
    }


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("cert", ("tls_cert and tls_key belong together",)),
        ("ca", ("tls_client_ca needs TLS",)),
        ("cert key crl", ("tls_crl is about client certificates",)),
        ("cert wrong_key", ("holds no private key",)),
        ("cert key ca others", ("signed by none of tls_client_ca",)),
        ("no_tokens", ("tokens:", "cannot be read")),
        ("boss", ("operators needs callers that are authenticated",)),
        ("tokens star", ("operators:", "not `*`")),
        ("cohorts", ("care.yaml", "authenticates nobody")),
        ("everywhere cert key", ("listen:", "nobody is authenticated", "--insecure")),
        ("everywhere tokens", ("listen:", "there is no TLS")),
        ("everywhere tokens insecure", ("tokens:", "in plain text")),
        ("parent_ca", ("of no use without a parent",)),
        ("far site", ("there is no TLS to it", "parent_ca")),
    ],
)
@pytest.mark.parametrize("name", ["serve", "check-config"])
def test_settings_that_do_not_secure_what_they_say_stop_the_start(
    command, office, tmp_path, names, words, name
):
    flags = settings_flags(office, tmp_path)
    given = [flags[word.replace("_", " ") if word not in flags else word] for word in names.split()]
    ended = command(*given, f"--data-dir={tmp_path / 'data'}", name=name)
    assert ended.code == 2
    for word in words:
        assert word in ended.err, ended.err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("names", ["audit", "parent site parent_token"])
def test_files_that_cannot_be_used_stop_the_start(command, office, tmp_path, names):
    flags = settings_flags(office, tmp_path)
    given = [flags[word] for word in names.split()]
    ended = command("--listen=127.0.0.1:0", "--store=memory", *given)
    assert_refused(ended, str(tmp_path))


def test_operators_are_a_list_or_names_with_commas(tmp_path, office, monkeypatch):
    office.token("x")
    tokens = {"tokens": str(office.tokens)}
    assert load_settings({**tokens, "operators": "a, b"}).operators == ("a", "b")
    config = tmp_path / "fmi.yaml"
    config.write_text(yaml.safe_dump({**tokens, "operators": ["Doe, Jane", "b"]}))
    assert load_settings({}, config_file=config).operators == ("Doe, Jane", "b")
    monkeypatch.setenv("FMI_OPERATORS", "c,d")
    assert load_settings({}, config_file=config).operators == ("c", "d")


# A region under a parent that wants credentials


async def test_a_region_shows_its_parent_who_it_is(office, tmp_path):
    issued = office.client("region-1")
    cert, key = tmp_path / "region.crt", tmp_path / "region.key"
    cert.write_bytes(issued.certificate)
    key.write_bytes(issued.key)
    token = office.token("region-2")
    (tmp_path / "region.token").write_text(token.text)
    access = cohort_pb2.AccessSpec(emit=["region-1", "region-2"])
    async with running_server(**office.mutual, tokens=office.tokens) as parent:
        await parent.service.put_cohort_spec(spec("care", access=access))
        shown = {"parent_ca": office.ca_file, "parent_cert": cert, "parent_key": key}
        for site, more in (
            ("region-1", {}),
            ("region-2", {"parent_token": tmp_path / "region.token"}),
        ):
            async with (
                running_server(
                    parent=parent.target, parent_domain_id=site, **shown, **more
                ) as region,
                Client(region.target) as client,
            ):
                await client.emit(*(msp(f"s{i}", "care") for i in range(3)))
                await client.release("care")

                async def arrived(site=site) -> bool:
                    return site in {s.domain_id for s in await parent.service.store.sites()}

                await eventually(arrived)
