"""`fmi emit` and `fmi validate`."""

from __future__ import annotations

import json
import uuid

import grpc
import pytest
from cli_server import RefusedError

from fmi.plain import CURRENT_REVISION
from fmi.v1 import error_pb2, interchange_service_pb2, registry_service_pb2
from fmi_client.commands.exits import ExitCode
from fmi_client.encoder import FMIEncoder

PLAIN = {"type": "msp", "domain_id": "site_001", "controller": {"tau": 0.9}}
PROTOJSON = {
    "header": {"domainId": "site_001", "emittedAt": "2026-01-02T03:04:05Z", "rev": 1},
    "msp": {"controller": {"tau": 0.9}},
}


def accept(request):
    """Answer as the server does; refuse what has no site or is for the cohort `closed`."""
    header = request.packet.header
    if not header.domain_id:
        raise RefusedError(
            grpc.StatusCode.INVALID_ARGUMENT,
            "CONTRACT_VIOLATION",
            "packet refused",
            [("header.domain_id", "required", "value is required")],
        )
    response = interchange_service_pb2.EmitResponse()
    result = response.results.add(
        packet_id=header.packet_id,
        status=interchange_service_pb2.EMIT_STATUS_ACCEPTED,
        sequence=7,
    )
    if header.cohort == "doubtful":
        result.status = interchange_service_pb2.EMIT_STATUS_QUARANTINED
        result.refusal.message = "trust 0.1 is below 0.5"
        result.warnings.append("look at this")
    result.received_at.FromJsonString("2026-01-02T03:04:06Z")
    return response


def accept_batch(request):
    """Answer a batch; refuse the packets in it that name no site."""
    packets = (
        list(request.packets.packets)
        if request.HasField("packets")
        else FMIEncoder().decode(request.encoded)
    )
    response = interchange_service_pb2.EmitStreamResponse(
        batch_id=request.batch_id, packets=len(packets)
    )
    for index, packet in enumerate(packets):
        if packet.header.domain_id:
            response.accepted += 1
        else:
            refused = response.exceptions.add(
                index=index, status=interchange_service_pb2.EMIT_STATUS_REFUSED
            )
            refused.refusal.reason = error_pb2.ERROR_REASON_CONTRACT_VIOLATION
            refused.refusal.message = "packet refused"
            refused.refusal.violations.add(
                field="header.domain_id", rule_id="required", description="value is required"
            )
    return response


@pytest.fixture
def server(script):
    script["Emit"] = accept
    script["EmitStream"] = accept_batch
    return script


def sent(server):
    return [request.packet for request in server.requests["Emit"]]


def test_msp_from_options(ask, server):
    result = ask(
        *[
            "emit",
            "msp",
            "--domain",
            "site_001",
            "--cohort",
            "healthcare",
            "--profile-class",
            "icu",
        ],
        *["--controller", "tau=0.9", "--controller", "a.b=1e-3", "--metric", "gain_p50=0.15"],
        *[
            "--evaluator",
            "g_min=1",
            "--operator",
            "on=0",
            "--confidence",
            "0.5",
            "--window",
            "3",
            "7",
        ],
        *["--regime", "winter", "--samples", "900", "--software", "acme/1"],
    )
    assert result.exit_code == 0, result.output
    (packet,) = sent(server)
    header = packet.header
    assert uuid.UUID(header.packet_id).version == 7
    assert (header.domain_id, header.cohort, header.profile_class, header.rev) == (
        "site_001",
        "healthcare",
        "icu",
        CURRENT_REVISION,
    )
    assert header.HasField("emitted_at")
    assert header.provenance.regime_tag == "winter"
    assert header.provenance.n_samples == 900
    assert header.provenance.software == "acme/1"
    assert dict(packet.msp.controller) == {"tau": 0.9, "a.b": 1e-3}
    assert dict(packet.msp.metrics) == {"gain_p50": 0.15}
    assert dict(packet.msp.evaluator) == {"g_min": 1}
    assert dict(packet.msp.operators) == {"on": 0}
    assert packet.msp.evidence.confidence == 0.5
    assert (packet.msp.window_span.start, packet.msp.window_span.end) == (3, 7)
    assert result.stdout == f"accepted    {header.packet_id}  cohort healthcare\n"


def test_pop_from_options(ask, server):
    result = ask(
        *[
            "emit",
            "pop",
            "--domain",
            "s",
            "--set",
            "tau=0.8",
            "--set",
            "kernel=rbf",
            "--set",
            "warm=true",
            "--set",
            "n=3",
        ],
        *["--before", "loss=0.4", "--after", "loss=0.35", "--control-delta", "loss=-0.01"],
        *["--windows", "12", "--confidence", "0.7"],
    )
    assert result.exit_code == 0, result.output
    pop = sent(server)[0].pop
    assert pop.bundle["tau"].number == 0.8
    assert pop.bundle["kernel"].text == "rbf"
    assert pop.bundle["warm"].flag is True
    assert pop.bundle["n"].number == 3
    assert (pop.before["loss"], pop.after["loss"]) == (0.4, 0.35)
    assert (pop.control_delta["loss"], pop.windows, pop.confidence) == (-0.01, 12, 0.7)


def test_ccs_from_options(ask, server):
    result = ask(
        *[
            "emit",
            "ccs",
            "--domain",
            "s",
            "--pair",
            "dose,outcome,0.4",
            "--pair",
            "a,b,-1,lagged,0.05",
        ],
        *[
            "--concept",
            "load=0.7",
            "--tested",
            "age",
            "--trust",
            "0.9",
            "--stability-delta",
            "-0.1",
        ],
    )
    assert result.exit_code == 0, result.output
    ccs = sent(server)[0].ccs
    first, second = ccs.causal_pairs
    assert (first.source, first.target, first.weight, first.type) == ("dose", "outcome", 0.4, "")
    assert (second.type, second.stderr) == ("lagged", 0.05)
    assert [(c.id, c.score) for c in ccs.concepts] == [("load", 0.7)]
    assert (list(ccs.tested_nodes), ccs.trust, ccs.stability_delta) == (["age"], 0.9, -0.1)


def test_the_domain_may_come_from_the_environment(ask, server, monkeypatch):
    monkeypatch.setenv("FMI_DOMAIN_ID", "site_009")
    assert ask("emit", "msp", "--controller", "tau=1").exit_code == 0
    assert sent(server)[0].header.domain_id == "site_009"


@pytest.mark.parametrize(
    "option",
    ["--controller=tau", "--controller=tau=x", "--controller==1", "--confidence=2", "--window=1"],
)
def test_options_that_are_not_numbers_by_name_are_wrong_usage(ask, option):
    result = ask("emit", "msp", "--domain", "s", option)
    assert result.exit_code == ExitCode.USAGE


def test_a_name_given_twice_is_wrong_usage(ask):
    result = ask(
        *["emit", "msp", "--domain", "s", "--controller", "tau=1", "--controller", "tau=2"]
    )
    assert result.exit_code == ExitCode.USAGE
    assert "twice" in result.stderr


def test_a_pair_that_cannot_be_read_is_refused_before_sending(ask, server):
    result = ask(*["emit", "ccs", "--domain", "s", "--pair", "dose,outcome", "--pair", "a,b,c"])
    assert result.exit_code == ExitCode.REFUSED
    assert "ccs.causal_pairs[0]" in result.stderr
    assert "ccs.causal_pairs[1].weight" in result.stderr
    assert "Emit" not in server.requests


def test_print_shows_the_packet_and_sends_nothing(ask, server):
    result = ask(*["emit", "msp", "--domain", "s", "--controller", "tau=0.9", "--print"])
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    assert printed["msp"] == {"controller": {"tau": 0.9}}
    assert "Emit" not in server.requests
    # What was printed is what can be sent.
    assert ask("emit", "-", stdin=result.stdout).exit_code == 0
    assert sent(server)[0].header.packet_id == printed["header"]["packet_id"]


@pytest.mark.parametrize("packet", [PLAIN, PROTOJSON], ids=["plain", "protojson"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_with_one_packet(ask, server, tmp_path, packet, indent):
    file = tmp_path / "packet.json"
    file.write_text(json.dumps(packet, indent=indent))
    result = ask("emit", str(file), "--json")
    assert result.exit_code == 0, result.output
    receipt = json.loads(result.stdout)
    assert receipt["status"] == "accepted"
    assert receipt["cohort"] == packet.get("cohort", "default")
    (sent_packet,) = sent(server)
    assert sent_packet.header.packet_id == receipt["packet_id"]
    if packet is PROTOJSON:
        assert sent_packet.header.emitted_at.ToJsonString() == "2026-01-02T03:04:05Z"


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([PLAIN, PLAIN, PLAIN]),
        json.dumps([PLAIN, PLAIN, PLAIN], indent=1),
        "\n".join([json.dumps(PLAIN)] * 3),
        "\n\n" + "\n\n".join([json.dumps(PLAIN)] * 3) + "\n\n",
        "\n".join([json.dumps(PLAIN, indent=2)] * 3),
        "\ufeff" + "\n".join([json.dumps(PLAIN)] * 3),
        json.dumps([PLAIN, PLAIN]) + "\n" + json.dumps(PLAIN),
    ],
    ids=["array", "indented", "lines", "blank", "documents", "bom", "mixed"],
)
@pytest.mark.parametrize("where", ["file", "stdin", "dash"])
@pytest.mark.usefixtures("server")
def test_many_packets(ask, tmp_path, content, where):
    if where == "file":
        file = tmp_path / "packets.json"
        file.write_text(content, encoding="utf-8")
        result = ask("emit", str(file), "--json")
    else:
        line = ["emit", "--json"] if where == "stdin" else ["emit", "--json", "-"]
        result = ask(*line, stdin=content.encode())
    assert result.exit_code == 0, result.output
    receipts = [json.loads(line) for line in result.stdout.splitlines()]
    assert [receipt["status"] for receipt in receipts] == ["accepted"] * 3
    assert len({receipt["packet_id"] for receipt in receipts}) == 3


def test_options_complete_the_packets_of_a_file_and_do_not_overwrite(ask, server, tmp_path):
    file = tmp_path / "packet.json"
    file.write_text(json.dumps({"type": "msp", "controller": {"tau": 1}, "cohort": "own"}))
    assert ask("emit", "--domain", "s", "--cohort", "given", str(file)).exit_code == 0
    header = sent(server)[0].header
    assert (header.domain_id, header.cohort) == ("s", "own")


@pytest.mark.usefixtures("server")
def test_a_bad_packet_does_not_harm_its_neighbours(ask, tmp_path):
    file = tmp_path / "packets.jsonl"
    nobody = {"type": "msp", "controller": {"tau": 1}}
    unreadable = {"type": "msp", "controller": {"tau": "much"}, "colour": 1}
    items = [PLAIN, nobody, unreadable, 7, PLAIN]
    file.write_text("\n".join(map(json.dumps, items)))
    result = ask("emit", str(file), "--json")
    assert result.exit_code == ExitCode.REFUSED
    receipts = [json.loads(line) for line in result.stdout.splitlines()]
    assert [receipt["status"] for receipt in receipts] == [
        "accepted",
        "refused",
        "refused",
        "refused",
        "accepted",
    ]
    fields = [[v["field"] for v in r["error"]["violations"]] for r in receipts if r["error"]]
    assert fields == [
        ["header.domain_id"],
        ["colour", 'msp.controller["tau"]', "header.domain_id"],
        ["packet"],
    ]
    assert [(r["file"], r["line"]) for r in receipts] == [(str(file), n) for n in range(1, 6)]
    shown = ask("emit", str(file))
    assert shown.exit_code == ExitCode.REFUSED
    assert shown.stdout.count("accepted") == 2
    assert "2 accepted, 3 refused" in shown.stderr
    assert f"fmi: {file}:3: CONTRACT_VIOLATION" in shown.stderr


OWN_ID = "0190b2c4-7e8a-7c3d-9f10-000000000001"
REFUSED = {"type": "msp", "controller": {"tau": 1}}
REFUSED_WITH_ID = {**REFUSED, "header": {"packetId": OWN_ID}}
UNREADABLE_WITH_ID = {"type": "msp", "controller": {"tau": "x"}, "packet_id": OWN_ID}
ITEMS = [PLAIN, REFUSED, REFUSED_WITH_ID, UNREADABLE_WITH_ID]


@pytest.mark.parametrize("line", [["emit"], ["validate", "--offline"]], ids=["emit", "validate"])
@pytest.mark.parametrize(
    ("content", "places"),
    [
        ("\n" + "\n".join(map(json.dumps, ITEMS)), [{"line": n} for n in (2, 3, 4, 5)]),
        ("\n".join(json.dumps(i, indent=1) for i in ITEMS), [{"line": n} for n in (1, 8, 14, 23)]),
        (json.dumps(ITEMS), [{"item": n} for n in (1, 2, 3, 4)]),
        (json.dumps(ITEMS, indent=2), [{"item": n} for n in (1, 2, 3, 4)]),
        (
            f"{json.dumps(ITEMS[:1])}\n{json.dumps(ITEMS[1:])}",
            [{"item": 1}, *({"line": 2, "item": n} for n in (1, 2, 3))],
        ),
    ],
    ids=["lines", "documents", "list", "indented-list", "lists"],
)
@pytest.mark.usefixtures("server")
def test_a_refused_packet_is_told_by_its_place(ask, tmp_path, line, content, places):
    file = tmp_path / "packets.json"
    file.write_text(content)
    told = ask(*line, "--json", str(file))
    assert told.exit_code == ExitCode.REFUSED
    entries = [json.loads(printed) for printed in told.stdout.splitlines()]
    found = [{k: v for k, v in e.items() if k in ("file", "line", "item")} for e in entries]
    assert found == [{"file": str(file), **place} for place in places]
    # An id that was made up here is no help: nothing is stored under it.
    assert [entry["packet_id"] for entry in entries[1:]] == ["", OWN_ID, OWN_ID]
    output = ask(*line, str(file)).output
    for place, own in zip(places[1:], ("", OWN_ID, OWN_ID), strict=True):
        shown = str(file) + (f":{place['line']}" if "line" in place else "")
        shown += f" item {place['item']}" if "item" in place else ""
        assert shown + (f" (packet {own})" if own else "") in output
    assert output.count("(packet") == 2


@pytest.mark.parametrize("command", ["emit", "validate"])
@pytest.mark.parametrize("content", ["", "[]", " \n"])
def test_a_file_without_packets_is_told_and_no_success(ask, tmp_path, command, content):
    file = tmp_path / "none.json"
    file.write_text(content)
    told = ask(command, str(file))
    assert told.exit_code == ExitCode.REFUSED
    assert told.stderr == f"fmi: no packets in {file}\n"
    assert told.stdout == ""
    as_json = ask(command, str(file), "--json")
    assert json.loads(as_json.stderr)["error"]["message"] == f"no packets in {file}"


def test_a_word_that_is_no_file_is_told_what_is_expected(ask):
    told = ask("emit", "xsp")
    assert told.exit_code == ExitCode.USAGE
    usage, *_, error = told.stderr.splitlines()
    assert usage.startswith("Usage: ")
    assert usage.endswith("emit [OPTIONS] [FILE | - | msp | pop | ccs] ...")
    assert error == (
        "Error: 'xsp' is neither a file nor a type of packet; say what to send: a FILE, - (standard "
        "input), msp, pop or ccs."
    )


def test_an_unknown_cohort_is_told_with_the_command_that_lists_them(ask, script):
    script["Emit"] = RefusedError(grpc.StatusCode.NOT_FOUND, "COHORT_UNKNOWN", "no such cohort")
    told = ask("emit", "msp", "--domain", "s", "--controller", "tau=1")
    assert told.exit_code == ExitCode.NOT_FOUND
    assert "`fmi cohorts` lists" in told.stderr
    response = registry_service_pb2.ValidatePacketResponse()
    response.refusal.reason = error_pb2.ERROR_REASON_COHORT_UNKNOWN
    script["ValidatePacket"] = response
    assert "`fmi cohorts` lists" in ask("validate", stdin=json.dumps(PLAIN)).stdout


def test_batches_of_one_go_out_one_by_one(ask, server, tmp_path):
    file = tmp_path / "packets.jsonl"
    file.write_text("\n".join([json.dumps(PLAIN)] * 3))
    assert ask("emit", str(file), "--batch", "1").exit_code == 0
    assert len(sent(server)) == 3
    assert "EmitStream" not in server.requests


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no packets in standard input"),
        (b"  \n ", "no packets in standard input"),
        (b"[]", "no packets in standard input"),
        (b"[]\n[]\n", "no packets in standard input"),
        (b"not json", "line 1, column 1"),
        (b'{"type": "msp"', "standard input:1: CONTRACT_VIOLATION: not JSON"),
        (b'\n\n{"type": \n"msp"', "standard input:4: CONTRACT_VIOLATION: not JSON"),
        (b'{"type":"msp","domain_id":"s","controller":{"a":1}}\n{oops', "line 2, column 2"),
        (b"\xff\xfe", "standard input: CONTRACT_VIOLATION: not UTF-8 text"),
        (b"[" * 100_000, "nested too deep"),
        (b"[[1]]", "not a JSON object"),
        (b"null", "not a JSON object"),
    ],
)
@pytest.mark.usefixtures("server")
def test_what_is_not_packets_is_told_in_a_line(ask, content, told):
    result = ask("emit", stdin=content)
    assert result.exit_code == ExitCode.REFUSED
    assert told in result.stderr
    assert "Traceback" not in result.output


def test_a_refusal_shows_every_violation(ask, script):
    script["Emit"] = RefusedError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "COHORT_RULE_VIOLATION",
        'packet refused: msp.controller["tau"]: is 9, above 1 [fmi.cohort.upper]',
        [
            ('msp.controller["tau"]', "fmi.cohort.upper", "is 9, above 1"),
            ('msp.metrics["x"]', "fmi.cohort.known", "is not a signal"),
        ],
    )
    result = ask(*["emit", "msp", "--domain", "s", "--controller", "tau=9"])
    assert result.exit_code == ExitCode.REFUSED
    first, *rest = result.stderr.splitlines()
    assert first == "fmi: COHORT_RULE_VIOLATION: packet refused"
    assert any('msp.controller["tau"]' in line and "above 1" in line for line in rest)
    assert any('msp.metrics["x"]' in line and "fmi.cohort.known" in line for line in rest)
    told = json.loads(
        ask(*["emit", "msp", "--domain", "s", "--controller", "tau=9", "--json"]).stdout
    )
    assert told["status"] == "refused"
    assert [v["rule_id"] for v in told["error"]["violations"]] == [
        "fmi.cohort.upper",
        "fmi.cohort.known",
    ]


@pytest.mark.usefixtures("server")
def test_quarantine_is_durable_and_so_no_failure(ask):
    result = ask(*["emit", "ccs", "--domain", "s", "--cohort", "doubtful", "--pair", "a,b,1"])
    assert result.exit_code == 0
    assert result.stdout.startswith("quarantined")
    assert "trust 0.1 is below 0.5" in result.stdout
    assert "warning: look at this" in result.stdout


def test_overload_is_code_5_and_says_how_long_to_wait(ask, script):
    script["Emit"] = RefusedError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", "too much under way", retry_after_s=0.01
    )
    result = ask(*["emit", "msp", "--domain", "s", "--controller", "tau=1"])
    assert result.exit_code == ExitCode.SERVER
    assert "asks to wait 0.01 s" in result.stderr
    ids = {request.packet.header.packet_id for request in script.requests["Emit"]}
    assert len(script.requests["Emit"]) == 3
    assert len(ids) == 1  # ONCE: every attempt is the same packet


def test_validate_offline_needs_no_server(fmi):
    good = {**PLAIN, "rev": 1}
    both = {**PLAIN, "metrics": {"tau": 1}}
    stdin = "\n".join(map(json.dumps, [good, both, {"type": "msp", "domain_id": "s"}]))
    result = fmi("validate", "--offline", "--json", "--target", "127.0.0.1:1", stdin=stdin)
    assert result.exit_code == ExitCode.REFUSED
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert [report["valid"] for report in reports] == [True, False, False]
    rules = [[v["rule_id"] for v in r["error"]["violations"]] for r in reports if r["error"]]
    assert rules == [["fmi.msp.signal_in_one_section"], ["fmi.msp.no_signal"]]
    shown = fmi("validate", "--offline", stdin=stdin)
    assert "1 of 3 packets is valid" in shown.stderr
    assert fmi("validate", "--offline", stdin=json.dumps(good)).exit_code == 0


def test_validate_asks_the_server(ask, script):
    def answer(request):
        response = registry_service_pb2.ValidatePacketResponse(valid=True, warnings=["old spec"])
        cohort = request.packet.header.cohort
        if cohort == "strict":
            response.valid = False
            response.refusal.reason = error_pb2.ERROR_REASON_COHORT_RULE_VIOLATION
            response.refusal.message = "packet refused"
            response.refusal.violations.add(field="x", rule_id="r", description="is wrong")
        elif cohort == "doubtful":
            response.valid, response.quarantined = False, True
            response.refusal.message = "too little trust"
        return response

    script["ValidatePacket"] = answer
    packets = [{**PLAIN, "cohort": cohort} for cohort in ("open", "strict", "doubtful")]
    stdin = "\n".join(map(json.dumps, packets))
    result = ask("validate", stdin=stdin)
    assert result.exit_code == ExitCode.REFUSED
    for told in ("warning: old spec", "is wrong [r]", "quarantine", "too little trust"):
        assert told in result.stdout
    assert ask("validate", stdin=json.dumps(packets[0])).exit_code == 0
    assert "Emit" not in script.requests
