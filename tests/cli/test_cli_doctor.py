"""`fmi doctor` against everything that can be wrong with a server."""

from __future__ import annotations

import datetime as dt
import json
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import trustme
from cli_server import Script, contract_answer, serve
from grpc_health.v1 import health_pb2

from fmi_client.commands.exits import ExitCode


def judge(result):
    """Return the exit code, and by step the verdict, what was told, and the advice."""
    data = json.loads(result.stdout)
    assert data["exit_code"] == result.exit_code
    assert data["well"] is (result.exit_code == 0)
    return result.exit_code, {
        s["step"]: (s["verdict"], s["told"], s["advice"]) for s in data["steps"]
    }


@pytest.fixture
def doctor(fmi):
    def run(target: str, *options: str):
        return judge(fmi("doctor", "--json", "--timeout", "2", "--target", target, *options))

    return run


@pytest.fixture
def listener() -> Iterator[Callable[[Callable[[socket.socket], None]], str]]:
    """Listen on a port and give each connection to a function; returns the address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threads: list[threading.Thread] = []
        held: list[socket.socket] = []

        def accept(answer: Callable[[socket.socket], None]) -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                held.append(connection)
                answer(connection)

        def start(answer: Callable[[socket.socket], None]) -> str:
            threads.append(threading.Thread(target=accept, args=(answer,)))
            threads[-1].start()
            return f"127.0.0.1:{server.getsockname()[1]}"

        yield start
        server.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._ca = trustme.CA(organization_name=name)
        self.root = Pair(folder / f"{name}.pem", folder / f"{name}.key")
        self._ca.cert_pem.write_to_path(self.root.certificate)
        self._ca.private_key_pem.write_to_path(self.root.key)

    def sign(self, name: str, *identities: str, days: int = 200) -> Pair:
        now = dt.datetime.now(dt.UTC)
        issued = self._ca.issue_cert(
            *identities,
            common_name=name,
            not_before=now - dt.timedelta(days=400),
            not_after=now + dt.timedelta(days=days),
        )
        pair = Pair(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(pair.certificate)
        issued.private_key_pem.write_to_path(pair.key)
        return pair


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "authority")


@pytest.fixture
def tls_server() -> Iterator[Callable[..., Script]]:
    """Serve a script over TLS."""
    stops = []

    def start(pair: Pair, *, clients: Path | None = None) -> Script:
        script = Script(answers={"GetContract": contract_answer})
        credentials = grpc.ssl_server_credentials(
            [(pair.key.read_bytes(), pair.certificate.read_bytes())],
            root_certificates=clients.read_bytes() if clients else None,
            require_client_auth=clients is not None,
        )
        stops.append(serve(script, credentials))
        return script

    yield start
    for stop in stops:
        stop()


STEPS = ["address", "tcp", "protocol", "health", "contract", "clock", "round trip"]


def test_all_is_well(doctor, script, ask):
    code, steps = doctor(script.target)
    assert code == ExitCode.OK
    assert list(steps) == STEPS
    assert {verdict for verdict, _, _ in steps.values()} == {"ok"}
    shown = ask("doctor")
    assert shown.exit_code == 0
    assert shown.stdout.endswith(f"all is well with {script.target}\n")
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_nothing_listens(doctor, unused_port):
    code, steps = doctor(f"127.0.0.1:{unused_port}")
    assert code == ExitCode.UNREACHABLE
    assert list(steps) == ["address", "tcp"]
    verdict, told, advice = steps["tcp"]
    assert (verdict, told) == ("error", f"nothing listens on 127.0.0.1:{unused_port}")
    assert "fmi-server serve" in advice


def test_a_socket_file_is_spoken_of_as_one(doctor, tmp_path, monkeypatch, authority):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    code, steps = doctor("unix:nope")
    assert code == ExitCode.UNREACHABLE
    assert list(steps) == ["address", "socket"]
    assert steps["socket"][:2] == ("error", "there is no socket file nope")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("here")
        code, steps = doctor("unix:here")
        assert code == ExitCode.UNREACHABLE
        assert steps["socket"][1] == "here is there, and nothing listens on it"
        assert "port" not in " ".join(advice for _, _, advice in steps.values())
        server.listen()
        code, steps = doctor("unix:here", "--timeout", "0.2")
        assert code == ExitCode.UNREACHABLE
        assert steps["socket"][0] == "ok"
        assert steps["protocol"][2].startswith("Check the path in --target")
        code, steps = doctor("unix:here", "--ca", str(authority.root.certificate))
        assert code == ExitCode.USAGE
        assert "--server-name" in steps["tls"][2]


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("localhost", "is not HOST:PORT"),
        ("http://localhost:50061", "is a URL"),
        ("localhost:0", "is not a port"),
        ("localhost:99999", "is not a port"),
        ("::1:50061", "[::1]:50061"),
        ("", "is not HOST:PORT"),
    ],
)
def test_targets_that_are_no_addresses(doctor, target, told):
    code, steps = doctor(target)
    assert code == ExitCode.USAGE
    assert told in steps["address"][1]


def test_a_name_that_does_not_resolve(doctor):
    code, steps = doctor("no-such-host.invalid:50061")
    assert code == ExitCode.UNREACHABLE
    assert "does not resolve" in steps["address"][1]


@pytest.mark.parametrize("scheme", ["dns:///", "ipv4:"])
def test_a_target_with_a_scheme_is_examined_like_one_without(doctor, script, scheme):
    code, steps = doctor(f"{scheme}{script.target}")
    assert code == ExitCode.OK
    assert list(steps) == STEPS


def test_of_several_addresses_each_is_examined(fmi, script, unused_port):
    """A client would go on at the next one; the doctor says which does not answer."""
    down = f"127.0.0.1:{unused_port}"
    result = fmi("doctor", "--json", "--target", f"ipv4:{script.target},{down},{script.target}")
    steps = json.loads(result.stdout)["steps"]
    assert result.exit_code == ExitCode.UNREACHABLE
    assert [s["told"] for s in steps if s["step"] == "address"] == [
        script.target,
        down,
        script.target,
    ]
    assert [s["told"] for s in steps if s["verdict"] == "error"] == [f"nothing listens on {down}"]
    assert [s["step"] for s in steps].count("round trip") == 2


def test_what_only_grpc_can_resolve_is_tested_as_a_whole(doctor):
    code, steps = doctor("unix-abstract:nobody-listens-here")
    assert code == ExitCode.UNREACHABLE
    assert list(steps) == ["address", "health"]


def test_a_listener_that_never_answers(doctor, listener):
    target = listener(lambda _connection: None)
    code, steps = doctor(target)
    assert code == ExitCode.UNREACHABLE
    assert "says nothing" in steps["protocol"][1]


def test_a_listener_that_hangs_up(doctor, listener):
    code, steps = doctor(listener(lambda connection: connection.close()))
    assert code == ExitCode.UNREACHABLE
    assert "closes them at once" in steps["protocol"][1]


def test_a_web_server(doctor, listener):
    def answer(connection: socket.socket) -> None:
        connection.recv(1024)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
        connection.close()

    target = listener(answer)
    code, steps = doctor(target)
    assert code == ExitCode.UNREACHABLE
    assert "web server" in steps["protocol"][1]
    code, steps = doctor(target, "--tls")
    assert code == ExitCode.UNREACHABLE
    assert "web server" in steps["protocol"][1]


def test_something_else(doctor, listener):
    def answer(connection: socket.socket) -> None:
        connection.sendall(b"220 mail.example ESMTP \x1b[31m\r\n")

    code, steps = doctor(listener(answer))
    assert code == ExitCode.UNREACHABLE
    assert "220 mail.example ESMTP" in steps["protocol"][1]
    assert "\x1b" not in steps["protocol"][1]


def test_another_grpc_server(doctor):
    script = Script()
    stop = serve(script, fmi=False)
    try:
        code, steps = doctor(script.target)
    finally:
        stop()
    assert code == ExitCode.UNREACHABLE
    assert steps["health"][0] == "warning"
    assert steps["contract"][:2] == ("error", "a gRPC server, but not one of FMI")


def test_a_server_that_does_not_serve(doctor, script):
    script.health = health_pb2.HealthCheckResponse.NOT_SERVING
    code, steps = doctor(script.target)
    assert code == ExitCode.SERVER
    assert steps["health"][:2] == ("error", "the server is up and not serving")
    assert list(steps) == STEPS  # what can be said all the same is said


def test_credentials_that_are_not_accepted(doctor, script):
    script.health = grpc.StatusCode.UNAUTHENTICATED
    code, steps = doctor(script.target)
    assert code == ExitCode.REFUSED
    assert "--token" in steps["health"][2]


def test_a_token_in_plain_text_is_stopped(doctor, monkeypatch, script):
    monkeypatch.setattr("fmi_client._channel.is_loopback", lambda _target: False)
    code, steps = doctor(script.target, "--token", "secret")
    assert code == ExitCode.USAGE
    assert "plain text" in steps["credentials"][1]


@pytest.mark.parametrize(
    ("shift_s", "verdict", "code"),
    [(0, "ok", 0), (1, "ok", 0), (60, "warning", 1), (-60, "warning", 1), (400, "error", 1)],
)
def test_the_clock(doctor, script, shift_s, verdict, code):
    def contract(request):
        response = contract_answer(request)
        response.server_time.seconds += shift_s
        return response

    script["GetContract"] = contract
    found, steps = doctor(script.target)
    assert (found, steps["clock"][0]) == (code, verdict)
    if verdict != "ok":
        which = "behind" if shift_s > 0 else "ahead of"
        assert which in steps["clock"][1]
        (told_s,) = re.findall(r"is ([0-9.]+) s ", steps["clock"][1])
        assert float(told_s) == pytest.approx(abs(shift_s), abs=2.0)
        assert "NTP" in steps["clock"][2]


def test_the_clock_allows_for_the_time_that_a_call_takes(fmi, script):
    """Half of a slow call is no difference of clocks: the server's time is read in its middle."""
    import time  # noqa: PLC0415

    def contract(request):
        time.sleep(0.15)
        response = contract_answer(request)
        time.sleep(0.15)
        return response

    script["GetContract"] = contract
    data = json.loads(fmi("doctor", "--json", "--target", script.target).stdout)
    values = {step["step"]: step["values"] for step in data["steps"]}
    assert abs(values["clock"]["server_ahead_s"]) <= 0.15
    assert values["clock"]["error_s"] >= 0.15
    assert values["round trip"]["median_ms"] >= 300


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"contract_hash": "0" * 64}, "the text is not"),
        ({"revision": 9, "oldest_supported_revision": 8}, "upgrade this site"),
    ],
)
def test_another_contract(doctor, script, changes, told):
    def contract(request):
        response = contract_answer(request)
        for name, value in changes.items():
            setattr(response, name, value)
        return response

    script["GetContract"] = contract
    code, steps = doctor(script.target)
    assert code == ExitCode.REFUSED
    assert steps["contract"][0] == "error"
    assert told in steps["contract"][1]


def test_tls_is_well(doctor, tls_server, authority):
    pair = authority.sign("good", "localhost", "127.0.0.1")
    server = tls_server(pair)
    code, steps = doctor(server.target, "--ca", str(authority.root.certificate))
    assert code == ExitCode.OK, steps
    assert list(steps) == ["address", "tcp", "tls", *STEPS[2:]]
    assert "is trusted until" in steps["tls"][1]


def test_several_addresses_with_tls_need_a_name(doctor, fmi, tls_server, authority):
    pair = authority.sign("named", "fmi", "127.0.0.1")
    one, other = tls_server(pair), tls_server(pair)
    several = f"ipv4:{one.target},{other.target}"
    options = ("--ca", str(authority.root.certificate))
    code, steps = doctor(several, *options)
    assert code == ExitCode.REFUSED
    assert steps["name"][0] == "warning"
    # It is true of a client.
    call = ("contract", "--timeout", "2", "--target", several, *options)
    assert fmi(*call).exit_code == ExitCode.UNREACHABLE
    named = ("--server-name", "fmi")
    assert fmi(*call, *named).exit_code == ExitCode.OK
    code, steps = doctor(several, *options, *named)
    assert code == ExitCode.OK, steps
    assert "name" not in steps


def test_tls_where_plain_text_was_tried(doctor, tls_server, authority):
    server = tls_server(authority.sign("good", "127.0.0.1"))
    code, steps = doctor(server.target)
    assert code == ExitCode.UNREACHABLE
    assert steps["protocol"][1] == "the server speaks TLS, and plain text was tried"
    assert "--ca" in steps["protocol"][2]


def test_plain_text_where_tls_was_tried(doctor, script, authority):
    code, steps = doctor(script.target, "--ca", str(authority.root.certificate))
    assert code == ExitCode.UNREACHABLE
    assert steps["tls"][1] == "the server speaks plain text, and TLS was tried"


def test_an_expired_certificate(doctor, tls_server, authority):
    pair = authority.sign("old", "127.0.0.1", days=-1)
    dates = ssl._ssl._test_decode_cert(str(pair.certificate))
    day = ssl.cert_time_to_seconds(dates["notAfter"])
    code, steps = doctor(tls_server(pair).target, "--ca", str(authority.root.certificate))
    assert code == ExitCode.UNREACHABLE
    import time  # noqa: PLC0415

    expired = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(day))
    assert steps["tls"][1] == f"a certificate of the server expired on {expired}"


def test_a_certificate_that_expires_soon(doctor, tls_server, authority):
    server = tls_server(authority.sign("soon", "127.0.0.1", days=7))
    code, steps = doctor(server.target, "--ca", str(authority.root.certificate))
    assert code == ExitCode.REFUSED
    assert steps["tls"][0] == "warning"
    assert "in 7 days" in steps["tls"][1]
    assert steps["health"][0] == "ok"


def test_a_certificate_for_another_host(doctor, tls_server, authority):
    server = tls_server(authority.sign("other", "fmi.example", "b.example"))
    ca = ["--ca", str(authority.root.certificate)]
    code, steps = doctor(server.target, *ca)
    assert code == ExitCode.UNREACHABLE
    assert steps["tls"][1] == "the certificate is for fmi.example, b.example, not for 127.0.0.1"
    code, steps = doctor(server.target, *ca, "--server-name", "b.example")
    assert code == ExitCode.OK, steps


def test_a_certificate_of_an_unknown_authority(doctor, tls_server, authority, tmp_path):
    server = tls_server(authority.sign("good", "127.0.0.1"))
    other = Authority(tmp_path, "other-authority")
    for options in (["--ca", str(other.root.certificate)], ["--tls"]):
        code, steps = doctor(server.target, *options)
        assert code == ExitCode.UNREACHABLE
        assert "authority that is not known here: authority" in steps["tls"][1]


def test_a_self_signed_certificate(doctor, tls_server, tmp_path):
    own = Authority(tmp_path, "own").root
    code, steps = doctor(tls_server(own).target, "--tls")
    assert code == ExitCode.UNREACHABLE
    assert "self-signed" in steps["tls"][1]


def test_mutual_tls(doctor, tls_server, authority, tmp_path):
    server = tls_server(authority.sign("good", "127.0.0.1"), clients=authority.root.certificate)
    ca = ["--ca", str(authority.root.certificate)]
    code, steps = doctor(server.target, *ca)
    assert code == ExitCode.UNREACHABLE
    assert any("mutual TLS" in told for _, told, _ in steps.values()), steps
    site = authority.sign("site_001", "site-001.example")
    own = ["--cert", str(site.certificate), "--key", str(site.key)]
    code, steps = doctor(server.target, *ca, *own)
    assert code == ExitCode.OK, steps
    stranger = Authority(tmp_path, "stranger").sign("site_002", "site-002.example")
    own = ["--cert", str(stranger.certificate), "--key", str(stranger.key)]
    code, steps = doctor(server.target, *ca, *own)
    assert code == ExitCode.UNREACHABLE
    assert any("does not accept the certificate" in told for _, told, _ in steps.values()), steps


def test_files_that_are_no_certificates(doctor, script, authority, tmp_path):
    junk = tmp_path / "junk.pem"
    junk.write_text("not PEM")
    code, steps = doctor(script.target, "--ca", str(junk))
    assert code == ExitCode.USAGE
    assert "cannot be used" in steps["tls"][1]
    code, steps = doctor(script.target, "--cert", str(authority.root.certificate))
    assert code == ExitCode.USAGE
    other = authority.sign("unlike", "x")
    code, steps = doctor(
        *(script.target, "--cert", str(authority.root.certificate), "--key", str(other.key))
    )
    assert code == ExitCode.USAGE
