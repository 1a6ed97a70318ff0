"""The server process: settings in, a gRPC server out, drained in good order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2
from prometheus_client import start_http_server

from fmi.descriptors import CONTRACT_FILES, DELIVERY, INGEST, SERVICE_NAMES
from fmi.v1 import update_pb2
from fmi_server.broker_settings import broker_store, wrong_broker_settings
from fmi_server.cohort_files import CohortFile, check_changes, read_cohort_folder
from fmi_server.cohorts import CohortRegistry
from fmi_server.config import RouterConfig, ServerSettings, SettingsError
from fmi_server.contracts import FMIContractRegistry
from fmi_server.envelope import EnvelopeLimits
from fmi_server.errors import ServerDrainingError
from fmi_server.listening import (
    described,
    probe_address,
    reaches_beyond_loopback,
    warn_of_open_listening,
    wrong_addresses,
)
from fmi_server.memory_watch import default_limit
from fmi_server.private_specs import exposed_private
from fmi_server.quotas import Quotas
from fmi_server.router import FMIRouter
from fmi_server.service import FMIService
from fmi_server.storage import MemoryStore, SqliteStore, Store
from fmi_server.telemetry import FMITelemetry
from fmi_server.transport.admin import AdminServicer
from fmi_server.transport.admission import Admission
from fmi_server.transport.foreign import for_operators
from fmi_server.transport.handlers import bind
from fmi_server.transport.health import HEALTH, HealthServicer
from fmi_server.transport.health_port import health_port
from fmi_server.transport.interchange import InterchangeServicer
from fmi_server.transport.parent import ParentLink, parent_credentials
from fmi_server.transport.registry import RegistryServicer
from fmi_server.transport.security import Security, wrong_credentials
from fmi_server.update_log import PublishedUpdate
from fmi_server.uplink import Uplink
from fmi_server.version import VERSION

__all__ = [
    "RunningServer",
    "check_settings",
    "running",
    "serve",
    "server_arguments",
]

STORE_FILE: Final = "fmi.sqlite3"

VIEW_FILE: Final = "view.sqlite3"
"""Another name than that of a store: a view must not be served as one."""

LAST_CALLS_S: Final = 1.0
"""Seconds for what is still open when every Emit is answered: reads, watchers of health, and calls that came
in as the server stopped, which grpc.aio neither hands out nor refuses before this time is over."""

HANDSHAKE_MS: Final = 20_000
"""Milliseconds until a new connection has to have said TLS's and HTTP/2's words of greeting."""

READ_BYTES: Final = 2**20
"""Bytes that are read of a connection at once. gRPC doubles them for as long as more is there: a flood of
frames that are read quicker than they are worked on took hundreds of MiB. Ignored before grpcio 1.84."""

BOUNDED_READS: Final = (1, 84)
"""The version of grpcio that knows that bound."""

IDLE_MS: Final = 600_000
"""Milliseconds after which a connection without a call is closed; clients connect again when they need it."""

METADATA_BYTES: Final = 8 * 1024
"""Bytes of the headers of a call. Past it calls are refused at random, past twice that all of them."""

OTHER_FILES: Final = 128
"""Files that the process needs besides its connections: the store, its readers, a backup, the log."""

# Of protobuf's two types of descriptors, or one.
_CHANNELZ: Final[Any] = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"]
_REFLECTION: Final[Any] = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that listens.

    Attributes:
        target: Where clients reach it, `HOST:PORT`.
        service: What it serves.
        stop: Set it to let the server drain and end.
    """

    target: str
    service: FMIService
    stop: asyncio.Event


def server_arguments(settings: ServerSettings) -> Sequence[tuple[str, int]]:
    """Return the gRPC arguments of the server.

    Keepalive matches what the SDK does: it pings after 120 s of silence, the server allows a ping each
    60 s. A client that pings more often would be sent away with `too_many_pings`.

    With gRPC's own bounds on pending requests, more than about a thousand streams that open at once are
    rejected at random with a bare CANCELLED; a reconnect storm of all subscribers must fit.

    The bound on the calls of a connection is what protects from rapid resets and floods of streams: past it
    gRPC refuses streams before they cost more than a frame, and counts those that were reset until they are
    gone. gRPC's own compression is off: a message is decompressed whole before its size is checked.
    """
    pending = settings.max_subscribers + settings.max_inflight
    return (
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", settings.max_connection_calls),
        ("grpc.max_allowed_incoming_connections", _most_connections(settings)),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", IDLE_MS),
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", 2 * METADATA_BYTES),
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.server.max_pending_requests", pending),
        ("grpc.server.max_pending_requests_hard_limit", 2 * pending),
        ("grpc.keepalive_time_ms", 120_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 60_000),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.experimental.tcp_max_read_buffer_size", READ_BYTES),
        ("grpc.so_reuseport", 0),
    )


def _most_connections(settings: ServerSettings) -> int:
    """Return how many connections are taken: the store needs files too, which must not run out."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return settings.max_connections
    return max(1, min(settings.max_connections, files - OTHER_FILES))


def _take_files() -> None:
    """Let this process open as many files as it may: the default of most systems is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _warn_of_few_files(settings: ServerSettings) -> None:
    taken = _most_connections(settings)
    if taken < settings.max_connections:
        _log.warning(
            "%d connections are taken at the same time, and not max_connections (%d): the process may open "
            "no more files (ulimit -n)",
            taken,
            settings.max_connections,
        )


def _warn_of_old_grpc(settings: ServerSettings) -> None:
    version = tuple(int(part) for part in grpc.__version__.split(".")[:2])
    if version < BOUNDED_READS and reaches_beyond_loopback(settings):
        _log.warning(
            "grpcio %s reads ahead without bound: a flood of frames takes hundreds of MiB, "
            "and others wait; install %d.%d or newer",
            grpc.__version__,
            *BOUNDED_READS,
        )


def check_settings(settings: ServerSettings, *, own_store: bool = True) -> None:
    """Check what can be known of settings before a server starts. Nothing that it makes stays.

    Args:
        settings: How the server shall run.
        own_store: Whether the store is the one that the settings name.

    Raises:
        SettingsError: The server may not listen there, or cannot write to its folder; all of it is told.
    """
    wrong = [*wrong_addresses(settings), *wrong_credentials(settings)]
    if own_store:
        wrong += wrong_broker_settings(settings)
    if own_store and settings.store != "memory":
        try:
            _check_folder(settings.data_dir)
        except SettingsError as error:
            wrong.append(str(error))
    if wrong:
        raise SettingsError("\n".join(wrong))


@contextlib.asynccontextmanager
async def running(
    settings: ServerSettings, *, store: Store | None = None
) -> AsyncIterator[RunningServer]:
    """Run a server for as long as the context lasts; leaving it drains.

    Args:
        settings: How it runs.
        store: The store to use in place of the one that the settings name.

    Raises:
        SettingsError: It may not or cannot listen where it was told to.
        CohortFilesError: Cohort files are wrong, or would change a cohort in a way that breaks its sites.
        StoreError: The store cannot be opened.
    """
    check_settings(settings, own_store=store is None)
    warn_of_open_listening(settings)
    _warn_of_few_files(settings)
    _warn_of_old_grpc(settings)
    registry = FMIContractRegistry()
    # A wrong file stops the start before anything is made or opened.
    files: Sequence[CohortFile] = ()
    if settings.cohorts:
        files = read_cohort_folder(settings.cohorts, registry, authenticated=settings.authenticated)
    security = Security(settings)
    telemetry = FMITelemetry()
    cohorts = CohortRegistry(
        registry,
        open_cohorts=settings.open_cohorts,
        max_cohorts=settings.max_cohorts,
        authenticated=settings.authenticated,
    )
    router_config = RouterConfig(
        max_subscribers=settings.max_subscribers, progress_interval_s=settings.progress_interval_s
    )
    service = FMIService(
        store=store or _store(settings),
        registry=registry,
        cohorts=cohorts,
        router=FMIRouter(router_config, telemetry=telemetry),
        telemetry=telemetry,
        limits=EnvelopeLimits(settings.max_batch_bytes, settings.max_batch_packets),
        max_inflight=settings.max_inflight,
    )
    service.lease_s = settings.lease_s
    service.quotas = Quotas(settings.quota, settings.quotas)
    asked = settings.max_memory_bytes
    service.memory_watch.limit_bytes = default_limit() if asked is None else asked
    admission = Admission(
        # As many may watch health as may subscribe, and take nothing from the others by that.
        max_calls=2 * settings.max_subscribers + settings.max_inflight,
        pressed=lambda: service.memory_watch.pressed,
        telemetry=telemetry,
    )
    service.memory_watch.on_pressure(admission.relieve)
    server = grpc.aio.server(interceptors=[admission], options=server_arguments(settings))
    names = ("", INGEST, DELIVERY, *SERVICE_NAMES)
    health = HealthServicer(names, max_watchers=settings.max_subscribers)
    _add_services(server, service, health, settings, security)
    port = _bind(server, settings.listen, security)
    async with (
        contextlib.AsyncExitStack() as closing,
        service,
        _uplinked(settings, service),
        _beside(security.watch(service.router), "credentials"),
        health_port(settings.health_listen, health.handler(telemetry)),
    ):
        closing.callback(security.close)
        await _put_files(files, service, force=settings.force_cohorts)
        metrics = _serve_metrics(settings, telemetry)  # before the server, which it may not stop
        await server.start()
        health.tell(*names, well=True)
        host = settings.listen.rpartition(":")[0]
        _log.info(
            "fmi-server %s listens on %s:%d: process %d, %s, %d cohorts",
            VERSION,
            host,
            port,
            os.getpid(),
            _where(settings),
            len(cohorts),
        )
        _log.info("%s", described(settings))
        _warn_of_exposed(settings, cohorts)
        stop = asyncio.Event()
        try:
            async with (
                _beside(_tell_of_store(service, health), "health of the store"),
                _beside(_tell_of_following(service, health), "health of following"),
                _beside(_stop_where_stuck(service, stop), "specs"),
                _beside(_stop_where_store_ended(service, stop), "end of the store"),
                _beside(_stop_where_unfit(service, stop), "end of the part among others"),
            ):
                yield RunningServer(f"{host}:{port}", service, stop)
        finally:
            # Readiness falls first, then subscriptions end with a hint to reconnect, then calls at work
            # get their time, all of it counted from here.
            health.stop()
            clock = asyncio.get_running_loop().time
            deadline = clock() + settings.drain_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await service.drain()
            await server.stop(min(LAST_CALLS_S, max(0.0, deadline - clock())))
            metrics()


async def _put_files(files: Sequence[CohortFile], service: FMIService, *, force: bool) -> None:
    """Put the specs of cohort files in force."""
    if not force:
        check_changes(files, service.cohorts, service.specs.unsafe_changes)
    try:
        for file in files:
            await service.put_cohort_spec(file.spec, force=force)
    except ServerDrainingError as error:
        raise service.specs.unkept or error from None


async def _tell_of_store(service: FMIService, health: HealthServicer) -> None:
    """Tell health whether packets are taken, until cancelled."""
    watch = service.store_watch
    while True:
        await watch.changed()
        health.tell(INGEST, well=watch.sound)


async def _tell_of_following(service: FMIService, health: HealthServicer) -> None:
    """Tell health whether what other servers write comes to subscribers here, until cancelled."""
    cluster = service.cluster
    if cluster is None:
        return
    while True:
        await cluster.changed()
        health.tell(DELIVERY, well=cluster.well)


async def _stop_where_stuck(service: FMIService, stop: asyncio.Event) -> None:
    """Stop the server where another one put a spec in force that cannot be kept here."""
    await service.specs.stuck()
    _log.critical(
        "a spec that another server put in force cannot be kept here, so this one stops: %s",
        service.specs.unkept,
    )
    stop.set()


async def _stop_where_store_ended(service: FMIService, stop: asyncio.Event) -> None:
    """Stop the server where its store is at an entry that only another start or version gets past."""
    await service.store_watch.ended()
    _log.critical(
        "others go on where this server cannot follow, so it stops: %s", service.store_watch.end
    )
    stop.set()


async def _stop_where_unfit(service: FMIService, stop: asyncio.Event) -> None:
    """Stop the server where it fails at what other servers go on with."""
    if service.cluster is None:
        return
    await service.cluster.ended()
    error = service.cluster.end
    _log.critical("%s", error, exc_info=error and error.__cause__)
    stop.set()


@contextlib.asynccontextmanager
async def _uplinked(settings: ServerSettings, service: FMIService) -> AsyncIterator[None]:
    """Send the priors to the parent, where there is one, for as long as the context lasts."""
    if settings.parent is None or settings.parent_domain_id is None:
        yield
        return
    publisher = service.releaser.publisher

    def newest(cohort: str) -> PublishedUpdate | None:
        return publisher.log.latest.get((cohort, update_pb2.UPDATE_KIND_PRIOR))

    async with ParentLink(settings.parent, parent_credentials(settings)) as parent:
        uplink = Uplink(
            settings.parent_domain_id,
            cohorts=lambda: [rules.name for rules in service.cohorts],
            newest=newest,
            send=parent.send,
            telemetry=service.telemetry,
            clock=time.time,
        )
        publisher.on_update(uplink.notice)
        _log.info(
            "priors go up to %s, where this server is the site %s",
            settings.parent,
            settings.parent_domain_id,
        )
        async with _beside(uplink.run(), "uplink"):
            yield


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """Carry work on for as long as the context lasts."""
    # Not a task group: that would wrap what goes wrong in the server itself.
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_tell_of_the_end)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


def _tell_of_the_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.critical("%s ended; it starts again with the server", task.get_name(), exc_info=error)


async def serve(settings: ServerSettings) -> None:
    """Run a server until SIGTERM or SIGINT, then drain. Prints a line when it listens.

    Raises:
        FMIError: It stopped by itself, for this.
        UnfitError: The same; other servers of the store go on.
    """
    _take_files()
    async with running(settings) as server:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.stop.set)
        print(f"listening on {server.target}", flush=True)  # noqa: T201 - the one line for scripts
        await server.stop.wait()
        _log.info("draining: no new packets, subscriptions end, calls have %g s", settings.drain_s)
    service = server.service
    error = service.specs.unkept or service.store_watch.end
    if error is None and service.cluster is not None:
        error = service.cluster.end
    if error is not None:
        raise error
    _log.info("stopped in good order")


def _warn_of_exposed(settings: ServerSettings, cohorts: CohortRegistry) -> None:
    private = [rules.name for rules in cohorts if rules.privacy is not None]
    if told := exposed_private(private, authenticated=settings.authenticated):
        _log.warning("%s", told)


def _check_folder(folder: Path) -> None:
    absolute = present = folder.absolute()
    try:
        present = next(path for path in (absolute, *absolute.parents) if path.exists())
        if not present.is_dir():
            raise SettingsError(f"data_dir: {present} is not a folder, and the store needs one")
        # Rights alone do not tell: the file system may be read-only or may not take folders.
        with tempfile.TemporaryDirectory(dir=present, prefix=".fmi-check-"):
            return
    except OSError as error:
        said = "written to" if present == absolute else "made"
        raise SettingsError(f"data_dir: {folder} cannot be {said}: {error.strerror}") from None


def _store(settings: ServerSettings) -> Store:
    if settings.store == "memory":
        return MemoryStore()
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise SettingsError(
            f"data_dir: {settings.data_dir} cannot be made: {error.strerror}"
        ) from None
    embedded = settings.data_dir / STORE_FILE
    if settings.store == "sqlite":
        return SqliteStore(embedded)
    if embedded.exists():
        _log.warning(
            "%s is not served: the store of this server is at brokers. `fmi-server backup` and "
            "`fmi-server restore --store` move what is in it there",
            embedded,
        )
    return broker_store(settings, settings.data_dir / VIEW_FILE)


def _where(settings: ServerSettings) -> str:
    if settings.store == "memory":
        return "packets in memory"
    if settings.store == "sqlite":
        return f"packets in {settings.data_dir}"
    return f"packets at {settings.store}, a view of them in {settings.data_dir}"


def _add_services(
    server: grpc.aio.Server,
    service: FMIService,
    health: HealthServicer,
    settings: ServerSettings,
    security: Security,
) -> None:
    ours = {
        found.full_name: found
        for file in CONTRACT_FILES
        for found in file.services_by_name.values()
    }
    servicers: list[tuple[Any, object]] = [  # of protobuf's two types of descriptors, or one
        (
            ours["fmi.v1.InterchangeService"],
            InterchangeServicer(service, audit=security.audit),
        ),
        (ours["fmi.v1.RegistryService"], RegistryServicer(service, version=VERSION)),
    ]
    if settings.admin:
        servicers.append((ours["fmi.v1.AdminService"], AdminServicer(service)))
    if settings.reflection:
        served = [name for name in SERVICE_NAMES if settings.admin or "Admin" not in name]
        foreign: list[tuple[Any, object]] = []
        # It tells who is connected from where, which is not for whoever reaches the port.
        if settings.authenticated or (settings.admin and not reaches_beyond_loopback(settings)):
            foreign.append((_CHANNELZ, channelz.aio.ChannelzServicer()))
        names = [*served, HEALTH.full_name, reflection.SERVICE_NAME]
        names += [found.full_name for found, _ in foreign]
        foreign.append((_REFLECTION, reflection.aio.ReflectionServicer(names)))
        servicers += [
            (found, for_operators(found, inner, service.gate)) for found, inner in foreign
        ]
    server.add_generic_rpc_handlers(
        tuple(
            bind(
                found,
                servicer,
                telemetry=service.telemetry,
                authenticator=security.authenticator,
                audit=security.audit,
                quotas=service.quotas,
                require=service.specs.require_kept,
            )
            for found, servicer in servicers
        )
    )
    # Whether it is well a server says to everybody: load balancers have no credentials.
    server.add_generic_rpc_handlers((health.handler(service.telemetry),))


def _bind(server: grpc.aio.Server, listen: str, security: Security) -> int:
    probe_address(listen)
    try:
        port = security.add_port(server, listen)
    except RuntimeError:
        port = 0
    if port == 0:
        raise SettingsError(
            f"listen: cannot listen on {listen}; is something else listening there already?"
        )
    return port


def _serve_metrics(settings: ServerSettings, telemetry: FMITelemetry) -> Callable[[], None]:
    if settings.metrics_listen is None:
        return lambda: None
    host, _, port = settings.metrics_listen.rpartition(":")
    try:
        page, thread = start_http_server(int(port), host.strip("[]"), telemetry.registry)
    except OSError as error:
        raise SettingsError(
            f"metrics_listen: cannot listen on {settings.metrics_listen}: {error.strerror}"
        ) from None
    _log.info("metrics on http://%s/metrics", settings.metrics_listen)

    def stop() -> None:
        page.shutdown()
        page.server_close()
        thread.join()

    return stop
