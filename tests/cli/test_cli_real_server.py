"""`fmi` against the server itself: what a newcomer types, from the first packet to the prior."""

from __future__ import annotations

import json
import re

from fmi_client import FMIClient, FMIEmitter, FMIEncoder
from fmi_client.commands.exits import ExitCode


def test_from_the_first_packet_to_the_prior(ask_real):
    for site, tau in enumerate((0.90, 0.91, 0.92, 0.93, 5.0), start=1):
        told = ask_real(
            f"emit msp --domain site_{site} --cohort care --controller tau={tau} --metric gain=0.1"
        )
        assert told.exit_code == 0, told.output
        assert told.stdout.startswith("accepted")
    # The release comes by itself; the watch waits for it.
    seen = ask_real("watch care --kind prior --count 1 --json")
    updates = [json.loads(line) for line in seen.stdout.splitlines() if '"update"' in line]
    assert updates[-1]["update"]["prior_update"]["lineage"]["sites"] >= 3
    told = ask_real("cohorts release care")
    assert told.exit_code == 0
    prior = json.loads(ask_real("get care --json").stdout)
    assert 0.90 <= prior["prior_update"]["prior"]["tau"] <= 0.93  # ROBUST: one of five lies
    assert prior["prior_update"]["lineage"]["sites"] == 5
    shown = ask_real("get care").stdout
    assert re.search(r"tau +0\.9\d* +[0-9.e-]+ \.\. [0-9.]+ +5 ", shown), shown
    assert max(map(len, shown.splitlines())) <= 80
    sites = json.loads(ask_real("sites care --json").stdout)["sites"]
    assert [(s["domain_id"], s["packets"]["msp"]) for s in sites] == [
        (f"site_{n}", 1) for n in range(1, 6)
    ]
    (cohort,) = (
        c for c in json.loads(ask_real("cohorts --json").stdout)["cohorts"] if c["cohort"] == "care"
    )
    assert (cohort["sites"], cohort["packets"], cohort["declared"]) == (5, 5, False)
    warm = json.loads(ask_real("get care --kind warm_start --json").stdout)
    assert 0.90 <= warm["profile"]["init"]["tau"] <= 0.93


def test_a_cohort_that_a_packet_opens_is_told(ask_real):
    line = "emit msp --domain s --cohort helathcare --controller tau=1"
    warning = "opens cohort 'helathcare' with its first packet; is the name mistyped?"
    told = ask_real(line)
    assert told.exit_code == 0
    assert warning in told.stdout
    assert "warning" not in ask_real(line).output


def test_a_packet_sent_twice_counts_once(ask_real):
    packet = ask_real("emit msp --domain s --cohort once --controller tau=1 --print").stdout
    assert json.loads(ask_real("emit --json", stdin=packet).stdout)["status"] == "accepted"
    assert json.loads(ask_real("emit --json", stdin=packet).stdout)["status"] == "duplicate"
    other = packet.replace("1.0", "2.0")
    assert other != packet
    told = ask_real("emit --json", stdin=other)
    assert told.exit_code == ExitCode.REFUSED
    assert json.loads(told.stdout)["error"]["reason"] == "PACKET_ID_REUSED"


def test_a_batch_with_bad_packets(ask_real):
    good = {"type": "msp", "domain_id": "s", "cohort": "batch", "controller": {"tau": 1}}
    bad = {**good, "controller": {"no name": 1}}
    stdin = "\n".join(json.dumps(packet) for packet in (good, bad, good))
    told = ask_real("emit --json", stdin=stdin)
    assert told.exit_code == ExitCode.REFUSED
    receipts = [json.loads(line) for line in told.stdout.splitlines()]
    assert [receipt["status"] for receipt in receipts] == ["accepted", "refused", "accepted"]
    assert receipts[1]["error"]["violations"]


def test_validate_says_what_emit_would_and_what_offline_does(ask_real):
    packets = [
        {"type": "msp", "domain_id": "s", "controller": {"tau": 1}},
        {"type": "msp", "domain_id": "s", "controller": {"tau": 1}, "metrics": {"tau": 1}},
        {
            "type": "pop",
            "domain_id": "s",
            "bundle": {"a": 1},
            "before": {"x": 1},
            "after": {"y": 1},
        },
        {"type": "ccs", "domain_id": "-", "trust": 2},
    ]
    stdin = "\n".join(map(json.dumps, packets))
    reports = []
    for options in ("", " --offline"):
        told = ask_real(f"validate --json{options}", stdin=stdin)
        assert told.exit_code == ExitCode.REFUSED
        lines = [json.loads(line) for line in told.stdout.splitlines()]
        reports.append(
            [
                (r["valid"], sorted(v["rule_id"] for v in (r["error"] or {}).get("violations", ())))
                for r in lines
            ]
        )
    assert reports[0] == reports[1]
    assert [valid for valid, _ in reports[0]] == [True, False, False, False]


def test_a_cohort_spec_is_put_checked_and_in_force(ask_real, tmp_path):
    spec = {
        "name": "strict",
        "signals": [
            {"name": "tau", "section": "SIGNAL_SECTION_CONTROLLER", "lower": 0.1, "upper": 1.0}
        ],
        "ingest": {"min_trust": 0.5},
    }
    file = tmp_path / "strict.json"
    file.write_text(json.dumps(spec))
    assert "would change" in ask_real("cohorts put --dry-run", str(file)).stdout
    assert "0.1 .. 1" not in ask_real("cohorts strict").stdout
    assert ask_real("cohorts put", str(file)).exit_code == 0
    assert "nothing to change" in ask_real("cohorts put", str(file)).stdout
    assert "0.1 .. 1" in ask_real("cohorts strict").stdout
    refused = ask_real("emit msp --domain s --cohort strict --controller tau=9")
    assert refused.exit_code == ExitCode.REFUSED
    assert "COHORT_RULE_VIOLATION" in refused.stderr
    assert 'msp.controller["tau"]' in refused.stderr
    spec["signals"][0]["upper"] = 0.5
    file.write_text(json.dumps(spec))
    unsafe = ask_real("cohorts put", str(file))
    assert unsafe.exit_code == ExitCode.REFUSED
    assert "SPEC_CHANGE_UNSAFE" in unsafe.stderr
    assert "tau" in unsafe.stderr
    assert ask_real("cohorts put --force", str(file)).exit_code == 0


def test_quarantine_from_holding_to_release(ask_real, tmp_path):
    file = tmp_path / "doubt.json"
    file.write_text(json.dumps({"name": "doubt", "ingest": {"min_trust": 0.5}}))
    assert ask_real("cohorts put", str(file)).exit_code == 0
    told = ask_real("emit ccs --domain s --cohort doubt --pair a,b,1 --trust 0.1 --json")
    assert told.exit_code == 0
    receipt = json.loads(told.stdout)
    assert receipt["status"] == "quarantined"
    listed = ask_real("sites quarantine doubt").stdout
    assert receipt["packet_id"] in listed
    assert "0.1" in listed
    freed = ask_real(f"sites quarantine --release s {receipt['packet_id']}")
    assert "is now out of quarantine" in freed.stdout
    assert ask_real("sites quarantine doubt").stdout == "nothing is in quarantine\n"
    unknown = ask_real("sites quarantine --release s 0199f2c4-7c1e-7d3a-9a52-3f0c5d1e8b11")
    assert unknown.exit_code == ExitCode.NOT_FOUND


def test_watch_goes_on_where_it_ended(ask_real):
    for revision in (1, 2, 3):
        for site in range(3):
            ask_real(f"emit msp --domain s{site} --cohort again --controller tau={revision}")
        ask_real("cohorts release again")
    newest = json.loads(ask_real("get again --json").stdout)["revision"]
    assert newest >= 3
    line = f"watch again --kind prior --every --since-revision 1 --count {newest} --json"
    events = [json.loads(event) for event in ask_real(line).stdout.splitlines()]
    updates = [event for event in events if "update" in event]
    assert [event["update"]["revision"] for event in updates] == list(range(1, newest + 1))
    token = updates[0]["resume_token"]
    line = f"watch again --kind prior --every --resume {token} --count 1 --json"
    (event,) = (
        json.loads(line) for line in ask_real(line).stdout.splitlines() if '"update"' in line
    )
    assert event["update"]["revision"] == 2


def test_what_is_not_there(ask_real):
    assert ask_real("get nowhere").exit_code == ExitCode.NOT_FOUND
    ask_real("emit msp --domain s --cohort young --controller tau=1")
    young = ask_real("get young")
    assert young.exit_code == ExitCode.NOT_FOUND
    assert "UPDATE_NOT_FOUND" in young.stderr
    assert ask_real("watch ,").exit_code == ExitCode.REFUSED


def test_contract_and_doctor_are_well(ask_real):
    assert ask_real("contract").exit_code == 0
    told = ask_real("doctor")
    assert told.exit_code == 0, told.output
    assert "all is well" in told.stdout


def test_the_contract_is_written_as_the_server_has_it(ask_real, tmp_path):
    from google.protobuf import descriptor_pb2  # noqa: PLC0415

    file = tmp_path / "fmi.binpb"
    assert ask_real("contract --descriptors", str(file)).exit_code == 0
    names = {f.name for f in descriptor_pb2.FileDescriptorSet.FromString(file.read_bytes()).file}
    assert {"fmi/v1/packet.proto", "buf/validate/validate.proto"} <= names


def test_a_dictionary_is_registered_fetched_and_used(ask_real, real_target, tmp_path):
    assert ask_real("dictionaries get").exit_code == ExitCode.NOT_FOUND
    emitter = FMIEmitter("site_1", cohort="packed")
    packets = [emitter.emit_msp(controller={"tau": n / 300}) for n in range(300)]
    trained, fetched = tmp_path / "trained.dict", tmp_path / "fetched.dict"
    trained.write_bytes(FMIEncoder.train(packets, dictionary_bytes=1024))
    number = FMIEncoder(dictionary=trained.read_bytes()).dictionary_id

    told = ask_real(f"dictionaries register {trained}")
    assert (told.exit_code, told.stdout) == (0, f"dictionary {number} is registered\n")
    size = trained.stat().st_size
    assert ask_real(f"dictionaries get {number}").stdout == f"dictionary {number}: {size} bytes\n"
    assert json.loads(ask_real(f"dictionaries get --json --out {fetched}").stdout) == {
        "dictionary_id": number,
        "bytes": size,
        "file": str(fetched),
    }
    assert ask_real("dictionaries get 7").exit_code == ExitCode.NOT_FOUND
    encoder = FMIEncoder(dictionary=fetched.read_bytes())
    with FMIClient(real_target, encoder=encoder) as client:
        assert client.emit(packets[0]).ok


def test_what_is_no_dictionary_is_refused(ask_real, tmp_path):
    (tmp_path / "none").write_bytes(b"no dictionary")
    told = ask_real(f"dictionaries register {tmp_path / 'none'}")
    assert told.exit_code == ExitCode.REFUSED
    assert "SPEC_INVALID" in told.stderr
    assert ask_real("dictionaries register /nowhere/at/all").exit_code == ExitCode.USAGE


def test_a_mistyped_cohort_is_told_the_one_that_was_meant(ask_real):
    told = ask_real("emit msp --domain site_1 --cohort emergency --controller tau=0.5")
    assert "cohort emergency" in told.stdout
    told = ask_real("get emergancy")
    assert told.exit_code == ExitCode.NOT_FOUND
    assert "Did you mean emergency?" in told.stderr
    assert "ListCohortSpecs" not in told.stderr
    assert "Did you mean" not in ask_real("get quite-another").stderr
    assert "lower-case letters" in ask_real("get HealthCare").stderr


def test_receipts_of_one_packet_and_of_several_have_the_same_fields(ask_real):
    packet = {"type": "msp", "domain_id": "site_1", "cohort": "care", "controller": {"tau": 0.5}}
    told = [
        ask_real("emit --json", stdin="\n".join([json.dumps(packet)] * count)).stdout.splitlines()[
            0
        ]
        for count in (1, 2)
    ]
    one, several = ({k for k, v in json.loads(line).items() if v is not None} for line in told)
    assert one == several
