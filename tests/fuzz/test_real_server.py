"""EXPLAINED and BOUNDED: a real server under requests made at random, and under the largest that there are.

FMI_FUZZ_EXAMPLES=100000 python -m pytest tests/fuzz/test_real_server.py --timeout 0
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutation import mutated
from samples import requests, specs
from server_harness import DEADLINE_S, Client, Refusal, msp

from fmi.descriptors import CONTRACT_FILES
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server.testing import running_server

EXAMPLES = int(os.environ.get("FMI_FUZZ_EXAMPLES", "1500"))
MIB = 2**20
METHODS = {
    method.name: method
    for file in CONTRACT_FILES
    for service in file.services_by_name.values()
    for method in service.methods
}
SEEDS = [(name, request.SerializeToString()) for name, request in requests()]


class Served:
    """A server and a client of it, driven from a test that is not a coroutine, as hypothesis wants."""

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._server = running_server(folder, max_cohorts=60)

    def __enter__(self) -> Self:
        server = self.run(self._server.__aenter__())
        self.client = self.run(self._connected(server.target))
        for spec in specs():
            self.run(self.client.put_spec(spec))
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self.client.__aexit__())
        self.run(self._server.__aexit__(None, None, None))
        self._loop.close()

    async def _connected(self, target: str) -> Client:
        return Client(target)  # a channel belongs to the loop that it was made in

    def run(self, work: Any) -> Any:
        return self._loop.run_until_complete(work)

    def call(self, name: str, *data: bytes) -> Refusal | None:
        """Call a method with bytes; return how it was refused, or None where it was not."""
        return self.run(asyncio.wait_for(self._call(METHODS[name], data), DEADLINE_S))

    async def _call(self, method: Any, data: tuple[bytes, ...]) -> Refusal | None:
        path = f"/{method.containing_service.full_name}/{method.name}"
        channel = self.client.channel
        try:
            if method.client_streaming:
                call = channel.stream_stream(path)(iter(data), timeout=DEADLINE_S)
                async for answer in call:
                    GetMessageClass(method.output_type).FromString(answer)
            elif method.server_streaming:
                call = channel.unary_stream(path)(data[0], timeout=DEADLINE_S)
                # What is wrong with it is told before the first event.
                await call.read()
                call.cancel()
            else:
                answer = await channel.unary_unary(path)(data[0], timeout=DEADLINE_S)
                GetMessageClass(method.output_type).FromString(answer)
        except grpc.aio.AioRpcError as error:
            return Refusal.read(error)
        return None

    def alive(self) -> None:
        """A good packet is taken."""
        (result,) = self.run(self.client.emit(msp("good", "free")))
        assert result.status == wire_pb2.EMIT_STATUS_ACCEPTED


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("fuzzed") / "data") as running:
        yield running


def assert_explained(refusal: Refusal | None) -> None:
    if refusal is None:
        return
    assert refusal.code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), refusal
    assert refusal.domain == "fmi", refusal
    assert refusal.reason, refusal
    assert refusal.message, refusal
    assert refusal.request_id == refusal.trailing_request_id


def rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MIB


CHANGED = st.tuples(st.sampled_from(SEEDS), st.integers(0, 2**32), st.integers(1, 4))
GARBAGE = st.tuples(st.sampled_from(sorted(METHODS)), st.binary(max_size=200))


@pytest.mark.timeout(max(120, EXAMPLES))
def test_requests_at_random(served):
    served.alive()
    before = rss_mb()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize="FMI_FUZZ_EXAMPLES" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(CHANGED | GARBAGE)
    def take(drawn: Any) -> None:
        if isinstance(drawn[0], str):
            name, data = drawn
        else:
            (name, data), seed, times = drawn
            rng = random.Random(seed)
            for _ in range(times):
                data = mutated(data, GetMessageClass(METHODS[name].input_type), rng, 2**16)
        assert_explained(served.call(name, data))

    take()
    served.alive()
    # Packets, cohorts and answers of slow filters are kept, up to bounds of their own.
    assert rss_mb() - before < 150 + EXAMPLES / 100


def repeated_fields() -> list[Any]:
    """Every list within two steps of a request, with the bytes of an item of it that is empty."""
    found = []
    for name, method in METHODS.items():
        for outer in method.input_type.fields:
            if outer.is_repeated:
                found.append(pytest.param(name, (), outer, id=f"{name}.{outer.name}"))
            elif outer.message_type is not None:
                for inner in outer.message_type.fields:
                    if inner.is_repeated:
                        where = f"{name}.{outer.name}.{inner.name}"
                        found.append(pytest.param(name, (outer,), inner, id=where))
    for body in ("msp", "pop", "ccs"):
        packet = METHODS["Emit"].input_type.fields_by_name["packet"]
        within = packet.message_type.fields_by_name[body]
        found += [
            pytest.param("Emit", (packet, within), inner, id=f"Emit.packet.{body}.{inner.name}")
            for inner in within.message_type.fields
            if inner.is_repeated
        ]
    return found


def bomb(around: tuple[FieldDescriptor, ...], field: FieldDescriptor, size: int) -> bytes:
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        data = bytes([field.number << 3, 99]) * (size // 2)
    else:
        data = bytes([field.number << 3 | 2, 0]) * (size // 2)
    for outer in reversed(around):
        length, head = len(data), bytearray([outer.number << 3 | 2])
        while length > 0x7F:
            head.append(length & 0x7F | 0x80)
            length >>= 7
        data = bytes([*head, length]) + data
    return data


@pytest.mark.parametrize(("name", "around", "field"), repeated_fields())
def test_a_request_that_is_one_endless_list_costs_little(served, name, around, field):
    """A megabyte, half a million items. Nothing may depend on how many there are but the parser."""
    started = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal = served.call(name, bomb(around, field, MIB))
    took = time.process_time() - started
    assert_explained(refusal)
    assert took < 5.0
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024 < 300
    served.alive()
