"""`fmi doctor`: find out why a server cannot be reached or used."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import click
import grpc
from google.protobuf import wrappers_pb2
from rich.table import Table

from fmi.descriptors import DELIVERY, INGEST
from fmi.v1 import registry_service_pb2
from fmi_client._causes import last_cause
from fmi_client._target import parse_target
from fmi_client.commands.connection import examine_connection
from fmi_client.commands.contract import agreement, local_version
from fmi_client.commands.exits import ExitCode
from fmi_client.commands.findings import Finding, Verdict, fault, warning, well
from fmi_client.commands.options import FMICommand, Settings, shared_options
from fmi_client.commands.output import print_json, print_text, safe, text
from fmi_client.commands.probes import proxies
from fmi_client.commands.session import call_credentials
from fmi_client.errors import ConfigurationError

__all__ = ["command", "examine"]

T = TypeVar("T")

CLOCK_WARNING_S: Final = 2.0
"""Difference of the clocks from which on there is a warning; packets are still taken."""

CLOCK_ERROR_S: Final = 300.0
"""Difference from which on a cohort with the default `max_clock_skew` refuses packets."""

_CALLS: Final = 5
_HEALTH: Final = "/grpc.health.v1.Health/Check"
_CONTRACT: Final = "/fmi.v1.RegistryService/GetContract"
_SERVING: Final = 1
_NOT_SERVING: Final = 2
_STYLES: Final = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.ERROR: "bold red"}
_MARKS: Final = {Verdict.OK: "ok", Verdict.WARNING: "warn", Verdict.ERROR: "FAIL"}


@click.command(name="doctor", cls=FMICommand)
@shared_options
def command(settings: Settings) -> int:
    """Examine the way to a server step by step: address, TCP, TLS, health, contract, clock.

    Of a target with several addresses each is examined, one after the other, from its address on.
    Each step has a verdict, and where something is wrong, advice. Steps behind a failure that stops
    everything are left out.

    Exit codes: 0 all is well; 1 something is to be looked at; 2 the options are wrong; 3 the server
    cannot be reached; 5 it can, and is not serving.
    """
    findings: list[Finding] = []
    for finding in examine(settings):
        findings.append(finding)
        if not settings.json:
            _tell(finding)
    worst = next((f.code for f in findings if f.verdict is Verdict.ERROR), None)
    if worst is None:
        warned = any(finding.verdict is Verdict.WARNING for finding in findings)
        worst = ExitCode.REFUSED if warned else ExitCode.OK
    if settings.json:
        print_json(
            {
                "target": settings.target,
                "well": worst is ExitCode.OK,
                "exit_code": int(worst),
                "steps": [
                    {
                        "step": finding.step,
                        "verdict": finding.verdict.value,
                        "told": finding.told,
                        "advice": finding.advice,
                        "values": dict(finding.values),
                    }
                    for finding in findings
                ],
            }
        )
    elif worst is ExitCode.OK:
        print_text(text(f"all is well with {settings.target}", "bold green"))
    return worst


def examine(settings: Settings) -> Iterator[Finding]:
    """Examine a server, one step after the other, up to the first that makes the next impossible.

    Of a target with several addresses each is examined by itself: clients go on at another one where one
    fails, and would not say which.
    """
    targets = _targets(settings.target)
    for target in targets:
        yield from _examine_server(replace(settings, target=target))
    if len(targets) > 1 and settings.secure and settings.server_name is None:
        yield warning(
            "name",
            "of a list of addresses gRPC makes a name that is in no certificate",
            "Say which name the servers' certificate has: --server-name, or TLSConfig(server_name=...).",
        )


def _targets(target: str) -> Sequence[str]:
    try:
        addresses = parse_target(target)
    except ConfigurationError:
        return [target]
    return [target] if len(addresses) < 2 else [str(address) for address in addresses]


def _examine_server(settings: Settings) -> Iterator[Finding]:
    for finding in examine_connection(settings):
        yield finding
        if finding.final:
            return
    try:
        metadata = call_credentials(settings)
    except ConfigurationError as error:
        yield fault("credentials", error.message, "Correct the options.", ExitCode.USAGE)
        return
    with _open_channel(settings) as channel:
        yield from _examine_calls(_Calls(channel, metadata, settings.timeout_s))


@dataclass(frozen=True, slots=True)
class _Calls:
    """Makes calls without the SDK: its retries and errors would hide what is to be found out."""

    channel: grpc.Channel
    metadata: tuple[tuple[str, str], ...]
    timeout_s: float

    def health(self, name: str = "") -> int:
        """Return the `ServingStatus` of a name, by default of the server as a whole.

        The only field of a `HealthCheckRequest` is a text in field 1, and the answer's an enum in field 1,
        on the wire as in a `StringValue` and a `UInt32Value`; so the base install needs no health package.
        """
        request = wrappers_pb2.StringValue(value=name).SerializeToString()
        raw = self._call(_HEALTH, request, _same, _same)
        return wrappers_pb2.UInt32Value.FromString(raw).value

    def contract(self) -> registry_service_pb2.GetContractResponse:
        """Return the server's contract."""
        return self._call(
            _CONTRACT,
            registry_service_pb2.GetContractRequest(),
            registry_service_pb2.GetContractRequest.SerializeToString,
            registry_service_pb2.GetContractResponse.FromString,
        )

    def _call(
        self,
        method: str,
        request: Any,
        serialize: Callable[[Any], bytes],
        parse: Callable[[bytes], T],
    ) -> T:
        call = self.channel.unary_unary(
            method, request_serializer=serialize, response_deserializer=parse
        )
        return call(request, timeout=self.timeout_s, metadata=self.metadata)


def _examine_calls(calls: _Calls) -> Iterator[Finding]:
    healthy = _examine_health(calls)
    yield healthy
    if healthy.final:
        return
    if healthy.verdict is Verdict.OK:
        yield from _examine_parts(calls)
    try:
        answer = calls.contract()
    except grpc.RpcError as error:
        yield _refused("contract", error)
        return
    yield _judge_contract(answer)
    rounds = []
    try:
        for _ in range(_CALLS):
            before, started = time.time(), time.perf_counter()
            answer = calls.contract()
            taken_s = time.perf_counter() - started
            rounds.append((taken_s, _server_s(answer) - (before + taken_s / 2)))
    except grpc.RpcError as error:
        yield _refused("clock", error)
        return
    yield _judge_clock(rounds, told=answer.HasField("server_time"))
    taken_ms = statistics.median(taken_s for taken_s, _ in rounds) * 1000
    yield well("round trip", f"{taken_ms:.1f} ms, median of {_CALLS} calls", median_ms=taken_ms)


def _examine_health(calls: _Calls) -> Finding:
    try:
        status = calls.health()
    except grpc.RpcError as error:
        if _code(error) is grpc.StatusCode.UNIMPLEMENTED:
            return warning(
                "health",
                "a gRPC server without a health service",
                "It may be another server than FMI's; the next step says.",
            )
        return _refused("health", error)
    if status == _SERVING:
        return well("health", "serving")
    return fault(
        "health",
        "the server is up and not serving",
        "It is starting or going down; its log says which.",
        ExitCode.SERVER,
        final=False,
        values={"status": status},
    )


def _examine_parts(calls: _Calls) -> Iterator[Finding]:
    """Say what a server that serves does not do now, where it says so; of one that does all, nothing."""
    if _says_no(calls, INGEST):
        yield fault(
            "packets",
            "the server wants none now: its store refuses writes, is damaged, or stands still",
            "The operator finds the cause in the server's log. Where the disk is full, sites do nothing: "
            "the SDK sends again.",
            ExitCode.SERVER,
            final=False,
        )
    if _says_no(calls, DELIVERY):
        yield fault(
            "updates",
            "this server does not hear what the others on its store release",
            "The operator finds the cause in its log; meanwhile subscribe to another one of them.",
            ExitCode.SERVER,
            final=False,
        )


def _says_no(calls: _Calls, part: str) -> bool:
    try:
        return calls.health(part) == _NOT_SERVING
    except grpc.RpcError:
        return False  # a server that tells of no such thing


def _judge_contract(answer: registry_service_pb2.GetContractResponse) -> Finding:
    agree, verdict = agreement(answer)
    told = f"revision {answer.revision}, hash {answer.contract_hash[:12]}: {verdict}"
    values: dict[str, Any] = {
        "revision": answer.revision,
        "contract_hash": answer.contract_hash,
        "server_version": answer.server_version,
        "version": local_version(),
    }
    if agree:
        return well("contract", told, **values)
    advice = f"This site has version {local_version()}, the server {answer.server_version}."
    return fault("contract", told, advice, final=False, values=values)


def _judge_clock(rounds: Sequence[tuple[float, float]], *, told: bool) -> Finding:
    if not told:
        return warning("clock", "the server does not tell its time", "Its version is another one.")
    # The quickest call bounds the error best: it is at most half of what it took (NTP, RFC 5905).
    taken_s, ahead_s = min(rounds)
    off_s = abs(ahead_s)
    which = "behind" if ahead_s > 0 else "ahead of"
    values = {"server_ahead_s": round(ahead_s, 6), "error_s": round(taken_s / 2, 6)}
    if off_s <= CLOCK_WARNING_S:
        return well(
            "clock", f"within {max(off_s, taken_s / 2) * 1000:.1f} ms of the server's", **values
        )
    found = f"this machine's clock is {off_s:.1f} s {which} the server's"
    advice = "Synchronise both clocks (NTP)."
    if off_s <= CLOCK_ERROR_S:
        return warning("clock", found, advice, **values)
    return fault(
        "clock",
        found,
        f"{advice} Packets from more than {CLOCK_ERROR_S:.0f} s in the future are refused.",
        final=False,
        values=values,
    )


def _refused(step: str, error: grpc.RpcError) -> Finding:
    code = _code(error)
    details = _details(error)
    match code:
        case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
            return fault(
                step,
                f"the server does not accept these credentials: {details}",
                "Give --token-file (or FMI_TOKEN), or --cert and --key; ask the server's operator for them.",
            )
        case grpc.StatusCode.UNIMPLEMENTED:
            return fault(
                step,
                "a gRPC server, but not one of FMI",
                "Check --target: another server is there.",
                ExitCode.UNREACHABLE,
            )
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return fault(
                step,
                "the connection is there, and the server does not answer calls in time",
                "It is overloaded or stuck; its log and metrics say which. --timeout waits longer.",
                ExitCode.SERVER,
            )
        case grpc.StatusCode.UNAVAILABLE:
            through = proxies()
            advice = "Check what is between this machine and the server."
            if through:
                advice = (
                    f"gRPC goes through the proxy in {through[0]}, the steps above did not: put the "
                    "host into no_proxy."
                )
            return fault(step, f"gRPC finds no connection: {details}", advice, ExitCode.UNREACHABLE)
        case _:
            name = code.name if code else "an unknown status"
            return fault(
                step, f"the server answers {name}: {details}", "Its log says more.", ExitCode.SERVER
            )


def _open_channel(settings: Settings) -> grpc.Channel:
    # Raw sockets made the steps before, so a connection that fails now is not worth long waits.
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
    if not settings.secure:
        return grpc.insecure_channel(settings.target, options=options)
    files = (settings.ca, settings.key, settings.cert)
    ca, key, cert = (path.read_bytes() if path else None for path in files)
    name = settings.server_name
    override = (("grpc.ssl_target_name_override", name),) if name else ()
    return grpc.secure_channel(
        settings.target,
        grpc.ssl_channel_credentials(ca, key, cert),
        options=(*options, *override),
    )


def _server_s(answer: registry_service_pb2.GetContractResponse) -> float:
    return answer.server_time.seconds + answer.server_time.nanos / 1e9


def _code(error: grpc.RpcError) -> grpc.StatusCode | None:
    code = getattr(error, "code", None)
    return code() if callable(code) else None


def _details(error: grpc.RpcError) -> str:
    details = getattr(error, "details", None)
    told = str(details() or "") if callable(details) else ""
    return last_cause(told, "")


def _same(data: bytes) -> bytes:
    return data


def _tell(finding: Finding) -> None:
    row = Table.grid(padding=(0, 2, 0, 0))
    row.add_column(width=4)
    row.add_column(width=11)
    row.add_column(overflow="fold")
    told = text(finding.told)
    if finding.advice:
        told.append(f"\n{safe(finding.advice)}", style="dim")
    row.add_row(
        text(_MARKS[finding.verdict], _STYLES[finding.verdict]), text(finding.step, "bold"), told
    )
    print_text(row)
