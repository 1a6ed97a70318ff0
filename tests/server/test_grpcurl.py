"""The server from a shell, with the real grpcurl and nothing but reflection."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import shutil
import sysconfig
from dataclasses import dataclass
from typing import Any

import pytest
from server_harness import DEADLINE_S, msp, packet_keys

from fmi.descriptors import SERVICE_NAMES
from fmi.plain import new_packet_id

GRPCURL = shutil.which("grpcurl", path=sysconfig.get_path("scripts")) or shutil.which("grpcurl")

pytestmark = pytest.mark.skipif(GRPCURL is None, reason="grpcurl is not installed")


@dataclass
class Output:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def grpcurl(server):
    async def call(*arguments: str, flags: tuple[str, ...] = (), data: Any = None) -> Output:
        sent = () if data is None else ("-d", json.dumps(data))
        process = await asyncio.create_subprocess_exec(
            GRPCURL,
            "-plaintext",
            *flags,
            *sent,
            server.target,
            *arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(DEADLINE_S):
            out, err = await process.communicate()
        return Output(process.returncode, out.decode(), err.decode())

    return call


def packet(**body: Any) -> dict[str, Any]:
    now = dt.datetime.now(dt.UTC).isoformat().replace("+00:00", "Z")
    header = {
        "packetId": new_packet_id(),
        "domainId": "site_001",
        "cohort": "healthcare",
        "rev": 1,
        "emittedAt": now,
    }
    return {"packet": {"header": header, **body}}


async def test_list(grpcurl):
    listed = (await grpcurl("list")).out.split()
    assert set(SERVICE_NAMES) < set(listed)
    methods = (await grpcurl("list", "fmi.v1.InterchangeService")).out.split()
    assert "fmi.v1.InterchangeService.EmitStream" in methods


async def test_describe_shows_the_packet_with_its_rules(grpcurl):
    told = (await grpcurl("describe", "fmi.v1.Packet")).out
    assert "message Packet" in told
    for name in ("PacketHeader header", "MetaSignalPack msp", "buf.validate.field"):
        assert name in told, told


async def test_emit_and_read_back(grpcurl, data_dir):
    sent = packet(msp={"metrics": {"gain_p50": 0.15}, "controller": {"tau": 0.9}})
    answer = (await grpcurl("fmi.v1.InterchangeService/Emit", data=sent)).json
    assert answer["results"][0]["status"] == "EMIT_STATUS_ACCEPTED"
    again = (await grpcurl("fmi.v1.InterchangeService/Emit", data=sent)).json
    assert again["results"][0]["status"] == "EMIT_STATUS_DUPLICATE"
    assert packet_keys(data_dir) == [("site_001", sent["packet"]["header"]["packetId"])]
    sites = (await grpcurl("fmi.v1.AdminService/ListSites")).json
    assert sites["sites"][0]["duplicates"] == "1"
    contract = (await grpcurl("fmi.v1.RegistryService/GetContract")).json
    assert contract["revision"] == 1


async def test_subscribe(grpcurl, client):
    await client.emit(*(msp(f"site-{i}", "healthcare") for i in range(3)))
    await client.release("healthcare")
    output = await grpcurl(
        "fmi.v1.InterchangeService/Subscribe",
        flags=("-max-time", "2"),
        data={"cohorts": ["health*"], "kinds": ["UPDATE_KIND_PRIOR"]},
    )
    decoder, events, text = json.JSONDecoder(), [], output.out.strip()
    while text:
        event, end = decoder.raw_decode(text)
        events.append(event)
        text = text[end:].strip()
    assert events[0]["update"]["priorUpdate"]["prior"] == {"tau": pytest.approx(0.9)}
    assert events[1]["snapshotEnd"]["updates"] == "1"
    assert "DeadlineExceeded" in output.err


async def test_an_error_tells_reason_fields_and_request(grpcurl):
    output = await grpcurl(
        "fmi.v1.InterchangeService/Emit",
        flags=("-format-error",),
        data=packet(msp={"controller": {"tau": "NaN"}, "metrics": {"tau": 1}}),
    )
    assert output.code != 0
    told = json.loads(output.err)
    assert told["code"] == 3
    details = {d["@type"].rpartition(".")[2]: d for d in told["details"]}
    assert details["ErrorInfo"]["reason"] == "CONTRACT_VIOLATION"
    assert details["ErrorInfo"]["domain"] == "fmi"
    assert {v["field"] for v in details["BadRequest"]["field_violations"]} == {
        'msp.controller["tau"]'
    }
    assert len(details["BadRequest"]["field_violations"]) == 2
    assert details["RequestInfo"]["request_id"]


async def test_what_is_no_message_is_told_by_grpcurl_itself(grpcurl, data_dir):
    output = await grpcurl(
        "fmi.v1.InterchangeService/Emit", data={"packet": {"header": {"domain": "x"}}}
    )
    assert output.code != 0
    assert "no known field" in output.err
    assert packet_keys(data_dir) == []
