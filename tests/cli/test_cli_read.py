"""`fmi get`, `watch`, `cohorts`, `sites`, `contract`."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time

import grpc
import pytest
from cli_process import fmi_process
from cli_server import RefusedError

from fmi.v1 import (
    admin_service_pb2,
    cohort_pb2,
    interchange_service_pb2,
    registry_service_pb2,
    update_pb2,
)
from fmi_client.commands.exits import ExitCode

KINDS = {
    "prior": update_pb2.UPDATE_KIND_PRIOR,
    "warm_start": update_pb2.UPDATE_KIND_WARM_START,
    "policy_hint": update_pb2.UPDATE_KIND_POLICY_HINT,
    "causal_consensus": update_pb2.UPDATE_KIND_CAUSAL_CONSENSUS,
}


def update(kind="prior", revision=3):
    made = update_pb2.Update(cohort="care", kind=KINDS[kind], revision=revision)
    made.released_at.FromJsonString("2026-01-02T03:04:05Z")
    match kind:
        case "prior":
            prior = made.prior_update
            prior.prior["tau"] = 0.91
            tau = prior.estimates["tau"]
            tau.section, tau.value, tau.lower, tau.upper = "controller", 0.91, 0.88, 0.94
            tau.sites, tau.effective_sites, tau.trimmed, tau.confidence = 5, 3.25, 2, 0.83
            gain = prior.estimates["gain"]
            gain.section, gain.value, gain.sites = "metrics", 0.15, 4
            drop = prior.estimates["drop"]
            drop.section, drop.sites, drop.reason = "operators", 2, "2 sites, 3 are needed"
            prior.confidence, prior.lineage.sites, prior.lineage.packets = 0.71, 5, 12
        case "warm_start":
            made.warm_start.profiles.add(profile_class="icu").init["tau"] = 0.5
        case "policy_hint":
            hint = made.policy_hint
            hint.hint_id, hint.reason, hint.effect, hint.effect_lower = "h1", "because", 0.3, 0.1
            hint.bundle["tau"].number = 0.8
            hint.bounds["tau"].lower, hint.bounds["tau"].upper = 0.75, 0.85
            hint.bundle["warm"].flag = False
        case "causal_consensus":
            consensus = made.causal_consensus
            edge = consensus.edges.add(source="dose", target="outcome", type="lagged", weight=0.41)
            edge.lower, edge.upper, edge.sites, edge.testing_sites = 0.3, 0.52, 4, 5
            edge.support, edge.i_squared, edge.sign_conflict = 0.57, 0.25, True
            edge.positive_sites, edge.negative_sites = 3, 1
            consensus.cycles.add(nodes=["a", "b"], weakest_source="b", weakest_target="a")
            consensus.unpooled["below_quorum"] = 7
    return made


@pytest.fixture
def server(script):
    def get(request):
        names = {value: name for name, value in KINDS.items()}
        return interchange_service_pb2.GetUpdateResponse(
            update=update(names[request.kind], request.revision or 3)
        )

    script["GetUpdate"] = get
    return script


@pytest.mark.usefixtures("server")
def test_get_shows_the_prior_with_its_uncertainty(ask):
    result = ask("get", "care")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "care  prior  revision 3  2026-01-02 03:04:05Z"
    assert lines[1].startswith("5 sites, 12 packets, confidence 0.71")
    (tau,) = [line.split() for line in lines if "tau" in line]
    assert tau == ["tau", "0.91", "0.88", "..", "0.94", "5", "3.2", "2", "0.83"]
    (gain,) = [line for line in lines if "gain" in line]
    assert "none: too few, or too alike" in gain
    order = [line.strip() for line in lines if line.strip() in ("controller", "metrics (observed)")]
    assert order == ["controller", "metrics (observed)"]
    assert any("drop" in line and "2 sites, 3 are needed" in line for line in lines)


def test_get_passes_revision_and_kind(ask, server):
    result = ask("get", "care", "--kind", "policy_hint", "--revision", "2")
    assert "revision 2" in result.stdout
    assert "0.75 .. 0.85" in result.stdout
    assert "at least 0.1" in result.stdout
    assert "because" in result.stdout
    request = server.requests["GetUpdate"][0]
    assert (request.cohort, request.kind, request.revision) == ("care", KINDS["policy_hint"], 2)


@pytest.mark.usefixtures("server")
def test_get_shows_the_causal_consensus_with_conflicts_and_cycles(ask):
    told = ask("get", "care", "--kind", "causal_consensus").stdout
    for part in ("0.3 .. 0.52", "0.57", "4/5", "0.25", "sign 3+ 1-", "b -> a", "below quorum 7"):
        assert part in told
    assert "dose -> outcome" in told
    assert "(lagged)" in told


def test_an_effect_without_an_interval_says_so(ask, script):
    made = update("causal_consensus")
    made.causal_consensus.edges[0].ClearField("lower")
    script["GetUpdate"] = interchange_service_pb2.GetUpdateResponse(update=made)
    (row,) = [
        line.split()
        for line in ask("get", "care", "--kind", "causal_consensus").stdout.splitlines()
        if "0.41" in line
    ]
    assert row[row.index("0.41") + 1] == "none"


def test_get_says_why_there_is_no_hint(ask, script):
    made = update_pb2.Update(cohort="care", kind=KINDS["policy_hint"], revision=1)
    made.policy_hint.reason = "no bundle was tried by enough sites"
    script["GetUpdate"] = interchange_service_pb2.GetUpdateResponse(update=made)
    told = ask("get", "care", "--kind", "policy_hint").stdout
    assert "no bundle was tried by enough sites" in told


def warm_start(_request):
    answer = interchange_service_pb2.GetWarmStartResponse(prior_revision=12)
    answer.profile.profile_class = "icu"
    answer.profile.init["tau"] = 0.5
    origin = answer.profile.origins["tau"]
    origin.source, origin.sites = update_pb2.WARM_START_SOURCE_COHORT, 4
    selector = answer.profile.context_selector
    selector.source = update_pb2.WARM_START_SOURCE_PROFILE_AND_REGIME
    selector.regime, selector.distance = "winter", 0.12
    return answer


def test_get_asks_for_the_warm_start_of_a_site(ask, script):
    script["GetWarmStart"] = warm_start
    result = ask(
        *["get", "care", "--profile-class", "icu", "--regime", "winter", "--concept", "load=0.7"],
        *["--concept", "noise=0.1"],
    )
    assert result.exit_code == 0, result.output
    (request,) = script.requests["GetWarmStart"]
    assert (request.profile_class, request.regime_tag) == ("icu", "winter")
    assert dict(request.concepts) == {"load": 0.7, "noise": 0.1}
    for part in ("class and regime winter", "distance 0.12", "prior revision 12", "tau", "cohort"):
        assert part in result.stdout
    data = json.loads(ask("get", "care", "--kind", "warm_start", "--json").stdout)
    assert data["profile"]["init"] == {"tau": 0.5}


def test_get_reads_a_warm_start_of_the_past_as_an_update(ask, server):
    told = ask("get", "care", "--kind", "warm_start", "--revision", "2").stdout
    assert "profile class icu" in told
    assert "GetWarmStart" not in server.requests


def test_warm_start_options_with_another_kind_are_wrong_usage(ask, server):
    assert ask("get", "care", "--kind", "prior", "--regime", "x").exit_code == ExitCode.USAGE
    assert ask("get", "care", "--revision", "2", "--regime", "x").exit_code == ExitCode.USAGE
    assert server.requests.keys() <= {"GetContract"}


def events(_request):
    tokens = iter(f"t{number}" for number in range(1, 9))

    def event(**happened):
        answer = interchange_service_pb2.SubscribeResponse(**happened)
        answer.resume_token = next(tokens)
        return answer

    lagged = interchange_service_pb2.Lagged(
        cohort="care", kind=KINDS["prior"], from_revision=4, to_revision=5
    )
    return [
        event(update=update(revision=3)),
        event(update=update("warm_start", 1)),
        event(update=update("policy_hint", 1)),
        event(update=update("causal_consensus", 1)),
        event(snapshot_end=interchange_service_pb2.SnapshotEnd(updates=4)),
        event(progress=interchange_service_pb2.Progress()),
        event(lagged=lagged),
        event(update=update(revision=6)),
    ]


def test_watch_shows_what_comes_and_where_to_go_on(ask, script):
    script["Subscribe"] = events
    result = ask("watch", "ca*", "--count", "5")
    assert result.exit_code == 0, result.output
    for part in (
        "care  prior  revision 3  2026-01-02 03:04:05Z",
        "tau 0.91 [0.88 .. 0.94]",
        "5 sites, confidence 0.71\n  no value yet: drop (2 sites, 3 are needed)",
        "icu: tau 0.5",
        "tau = 0.8, warm = false\n  effect 0.3 (at least 0.1)",
        "dose -> outcome (lagged) 0.41\n  cycles: 1",
        "up to date (4 updates), live now",
        "revisions 4 to 5 were left out",
        "revision 6",
    ):
        assert part in result.stdout
    assert "--resume t8" in result.stderr


def test_watch_as_json_lines(ask, script):
    script["Subscribe"] = events
    result = ask("watch", "care", "--count", "5", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    told = [(set(line) - {"resume_token"}).pop() for line in lines]
    assert told == ["update"] * 4 + ["snapshot_end", "lagged", "update"]
    assert lines[-1]["resume_token"] == "t8"
    assert lines[0]["update"]["prior_update"]["prior"] == {"tau": 0.91}
    assert result.stderr == ""


def test_watch_passes_filter_mode_and_start(ask, script):
    script["Subscribe"] = events
    line = "watch care --count 1 --kind prior --kind policy_hint --every --since-revision 2"
    assert ask(*line.split()).exit_code == 0
    request = script.requests["Subscribe"][0]
    assert list(request.cohorts) == ["care"]
    assert list(request.kinds) == [KINDS["prior"], KINDS["policy_hint"]]
    assert request.mode == interchange_service_pb2.DELIVERY_MODE_EVERY
    starts = {(s.cohort, s.kind): s.revision for s in request.start_revisions}
    assert starts == {("care", KINDS["prior"]): 2, ("care", KINDS["policy_hint"]): 2}


def test_watch_starts_cohorts_and_kinds_at_their_own_revisions(ask, script):
    script["Subscribe"] = events
    ask(*["watch", "care", "retail/eu", "--count", "1", "--since-revision", "care:prior=4"])
    ask(*["watch", "care", "--count", "1", "--since-revision", "care=4"])
    ask(*["watch", "care", "--count", "1", "--resume", "tok"])
    first, second, third = script.requests["Subscribe"]
    assert [(s.cohort, s.kind, s.revision) for s in first.start_revisions] == [
        ("care", KINDS["prior"], 4)
    ]
    assert {s.kind for s in second.start_revisions} == set(KINDS.values())
    assert third.resume_token == "tok"


@pytest.mark.parametrize(
    "line",
    [
        "watch c* --since-revision 3",
        "watch care --since-revision 0",
        "watch care --since-revision x",
        "watch care --since-revision care:bogus=3",
        "watch care --since-revision 3 --resume tok",
        "watch care --count 0",
    ],
)
def test_watch_refuses_starts_that_make_no_sense(ask, script, line):
    script["Subscribe"] = events
    assert ask(*line.split()).exit_code == ExitCode.USAGE
    assert "Subscribe" not in script.requests


def test_watch_without_a_server_ends_and_says_so(fmi, unused_port):
    result = fmi("watch", "care", "--target", f"127.0.0.1:{unused_port}")
    assert result.exit_code == ExitCode.UNREACHABLE


@pytest.mark.parametrize(("by", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_watch_that_is_ended_says_how_to_go_on(script, by, code):
    script["Subscribe"] = events
    async with (
        asyncio.timeout(60),
        fmi_process("watch", "care", "--target", script.target) as process,
    ):
        while "revision 6" not in (shown := (await process.stdout.readline()).decode()):
            assert shown, await process.stderr.read()
        process.send_signal(by)
        assert await process.wait() == code
        stderr = (await process.stderr.read()).decode()
    # An update that was not shown to its end comes again: never is one skipped.
    assert stderr.strip() in {f"go on from here with --resume {token}" for token in ("t7", "t8")}


def statuses(_request):
    answer = admin_service_pb2.ListCohortsResponse()
    care = answer.cohorts.add(cohort="care", declared=True, sites=12, packets=3456, dirty=True)
    care.quarantined, care.subscribers = 3, 4
    care.revisions["prior"] = 9
    care.released_at.FromSeconds(int(time.time()) - 125)
    answer.cohorts.add(cohort="retail/eu")
    answer.cohorts.add(cohort="spent", declared=True, dirty=True)
    answer.cohorts.add(cohort="quiet", declared=True, dirty=True)
    answer.cohorts.add(cohort="was", declared=True, dirty=True)
    return answer


def budgets(_request):
    answer = admin_service_pb2.ListPrivacyBudgetsResponse()
    spent, quiet = answer.budgets.add(cohort="spent"), answer.budgets.add(cohort="quiet")
    answer.budgets.add(cohort="was")  # it has a ledger, and is not private now
    spent.plan.epochs = quiet.plan.epochs = 3
    quiet.releases_left = 1
    return answer


def test_cohorts_lists_them(ask, script):
    script["ListCohorts"] = statuses
    script["ListPrivacyBudgets"] = budgets
    told = ask("cohorts").stdout.splitlines()
    assert told[2].split() == [
        "care",
        "12",
        "3456",
        "3",
        "rev",
        "9",
        "2",
        "min",
        "ago",
        "4",
        "dirty",
    ]
    assert told[3].split() == ["retail/eu", "0", "0", "-", "-", "0", "open"]
    assert [line.split("0 ", 3)[-1].strip() for line in told[4:]] == [
        "private, exhausted",
        "private",
        "dirty",
    ]
    data = json.loads(ask("cohorts", "--json").stdout)
    assert data["cohorts"][0]["packets"] == 3456
    script["ListCohorts"] = admin_service_pb2.ListCohortsResponse()
    assert ask("cohorts").stdout == "no cohorts yet\n"


def test_cohorts_shows_a_spec(ask, script):
    answer = registry_service_pb2.GetCohortSpecResponse(schema_hash="ab" * 32)
    answer.spec.name, answer.spec.description = "put", "A cohort called as a command"
    answer.spec.signals.add(
        name="tau",
        section=cohort_pb2.SIGNAL_SECTION_CONTROLLER,
        lower=0.1,
        upper=1,
        transform=cohort_pb2.SIGNAL_TRANSFORM_LOG,
    )
    answer.spec.signals.add(
        name="gain",
        section=cohort_pb2.SIGNAL_SECTION_METRICS,
        direction=cohort_pb2.SIGNAL_DIRECTION_HIGHER_IS_BETTER,
        guardrail=True,
    )
    answer.spec.aggregation.vote_min_sites = 4
    answer.spec.access.emit.append("site_001")
    script["GetCohortSpec"] = answer
    result = ask("cohorts", "show", "put")
    told = " ".join(result.stdout.split())
    for part in (
        "ab" * 32,
        "declared signals only",
        "tau controller 0.1 .. 1 log",
        "gain metrics higher, guardrail",
        "vote_min_sites 4",
        "emit site_001",
        "subscribe everyone",
    ):
        assert part in told
    assert script.requests["GetCohortSpec"][0].cohort == "put"
    assert json.loads(ask("cohorts", "care", "--json").stdout)["spec"]["name"] == "put"
    assert script.requests["GetCohortSpec"][1].cohort == "care"


SPEC = {"name": "care", "signals": [{"name": "tau", "section": "SIGNAL_SECTION_CONTROLLER"}]}


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_cohorts_put(ask, script, tmp_path, kind):
    script["PutCohortSpec"] = admin_service_pb2.PutCohortSpecResponse(
        schema_hash="cd" * 32, changed=True
    )
    file = tmp_path / f"care.{kind}"
    file.write_text(
        json.dumps(SPEC)
        if kind == "json"
        else "name: care\nsignals:\n- {name: tau, section: SIGNAL_SECTION_CONTROLLER}\n"
    )
    dry = ask("cohorts", "put", str(file), "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "would change" in dry.stdout
    assert "care is now as the file says" in ask("cohorts", "put", str(file), "--force").stdout
    first, second = script.requests["PutCohortSpec"]
    assert (first.dry_run, first.force, second.dry_run, second.force) == (True, False, False, True)
    assert first.spec.signals[0].section == cohort_pb2.SIGNAL_SECTION_CONTROLLER
    assert json.loads(ask("cohorts", "put", str(file), "--json").stdout)["changed"] is True


def test_cohorts_put_without_pyyaml_says_what_to_do(ask, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    file = tmp_path / "care.yaml"
    file.write_text("name: care\n")
    result = ask("cohorts", "put", str(file))
    assert result.exit_code == ExitCode.USAGE
    assert "pip install pyyaml" in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", b"{", "is not JSON"),
        ("a.json", b'{"name": "a", "name": "b"}', '"name" stands twice in one object'),
        ("a.json", b'{"name": ' + b"9" * 5000 + b"}", "is not JSON that can be read"),
        ("a.json", b"[]", "must have the fields of a CohortSpec"),
        ("a.json", b"\xff", "is not UTF-8"),
        ("a.yaml", b"a: [", "is not YAML"),
        ("a.yaml", b"name: care\na: b: c", "not allowed here at line 2, column 5"),
        ("a.yaml", b"name: a\nname: b", "line 2: name stands here twice"),
        ("a.json", b'{"name": "care", "bogus": 1}', "bogus"),
    ],
)
def test_cohorts_put_of_what_is_no_spec(ask, script, tmp_path, name, content, told):
    file = tmp_path / name
    file.write_bytes(content)
    result = ask("cohorts", "put", str(file))
    assert result.exit_code == ExitCode.REFUSED
    assert "SPEC_INVALID" in result.stderr
    assert told in " ".join(result.stderr.split())
    assert "PutCohortSpec" not in script.requests


def test_cohorts_put_tells_all_that_is_wrong_with_the_fields_once(ask, tmp_path):
    file = tmp_path / "care.json"
    file.write_text('{"nmae": "care", "signals": [{"name": "tau", "section": "kitchen"}]}')
    told = " ".join(ask("cohorts", "put", str(file)).stderr.split())
    for words in ("did you mean name?", "must be one of metrics, controller, evaluator, operators"):
        assert told.count(words) == 1, told


def test_an_unsafe_change_names_the_fields(ask, script, tmp_path):
    script["PutCohortSpec"] = RefusedError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "SPEC_CHANGE_UNSAFE",
        "the change would break sites",
        [('signals["tau"].upper', "fmi.spec.narrowed", "was 1, is 0.5")],
    )
    file = tmp_path / "care.json"
    file.write_text(json.dumps(SPEC))
    result = ask("cohorts", "put", str(file))
    assert result.exit_code == ExitCode.REFUSED
    assert "was 1, is 0.5" in result.stderr


def test_cohorts_release(ask, script):
    script["ReleaseNow"] = admin_service_pb2.ReleaseNowResponse(updates=[update()])
    assert "revision 3" in ask("cohorts", "release", "care").stdout
    script["ReleaseNow"] = admin_service_pb2.ReleaseNowResponse()
    result = ask("cohorts", "release", "care")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "nothing changed in care" in result.stderr
    assert json.loads(ask("cohorts", "release", "care", "--json").stdout) == {"updates": []}


def test_sites(ask, script):
    answer = admin_service_pb2.ListSitesResponse()
    site = answer.sites.add(cohort="care", domain_id="s1", profile_class="icu", reputation=0.75)
    site.packets["msp"], site.packets["ccs"], site.quarantined = 70, 2, 1
    site.last_seen.FromSeconds(int(time.time()) - 7205)
    script["ListSites"] = answer
    row = ask("sites").stdout.splitlines()[2].split()
    assert row == ["s1", "(icu)", "care", "70", "2", "2", "h", "ago", "0.75", "1"]
    assert "care" not in ask("sites", "care").stdout
    assert [request.cohort for request in script.requests["ListSites"]] == ["", "care"]
    assert json.loads(ask("sites", "--json").stdout)["sites"][0]["packets"]["msp"] == 70
    script["ListSites"] = admin_service_pb2.ListSitesResponse()
    assert ask("sites").stdout == "no sites yet\n"


def test_quarantine(ask, script):
    answer = admin_service_pb2.ListQuarantineResponse()
    held = answer.packets.add(reason="trust 0.1 is below 0.5")
    held.packet.header.domain_id, held.packet.header.packet_id = "s1", "p1"
    held.packet.header.cohort = "care"
    held.packet.ccs.trust = 0.1
    held.received_at.FromSeconds(int(time.time()) - 65)
    script["ListQuarantine"] = answer
    assert ask("sites", "quarantine", "care").stdout.splitlines() == [
        "s1  p1",
        "  ccs for care, 1 min ago",
        "  trust 0.1 is below 0.5",
    ]
    script["SetQuarantine"] = admin_service_pb2.SetQuarantineResponse(changed=True)
    told = ask(*["sites", "quarantine", "--release", "s1", "p1", "--reason", "seen"])
    assert told.stdout == "packet p1 of s1 is now out of quarantine\n"
    assert ask(*["sites", "quarantine", "--hold", "s1", "p1"]).exit_code == 0
    out, held_back = script.requests["SetQuarantine"]
    assert (out.domain_id, out.packet_id, out.quarantined, out.reason) == (
        "s1",
        "p1",
        False,
        "seen",
    )
    assert held_back.quarantined
    script["SetQuarantine"] = RefusedError(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "no such packet")
    assert ask(*["sites", "quarantine", "--release", "s1", "p9"]).exit_code == ExitCode.NOT_FOUND
    assert (
        ask(*["sites", "quarantine", "care", "--release", "s1", "p9"]).exit_code == ExitCode.USAGE
    )
