"""What reaches a terminal: safe, within 80 columns, nothing lost."""

from __future__ import annotations

import json
import unicodedata

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from fmi.v1 import admin_service_pb2, interchange_service_pb2, update_pb2
from fmi_client._counts import counted
from fmi_client.commands.output import age, message_data, number, safe
from fmi_client.commands.updates import update_view

HOSTILE = "a\x1b[31m[red]b[/red]\x07\r\n:smile:\u202ec\u200bd\x9b2J"


@given(st.text())
def test_safe_text_has_only_visible_characters_and_keeps_them(told):
    shown = safe(told)
    for char in shown:
        assert unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    harmless = [c for c in told if unicodedata.category(c)[0] in "LMNPS"]
    assert [c for c in harmless if c not in shown] == []


@given(st.text(st.characters(categories=["L", "N", "P"])))
def test_safe_leaves_ordinary_text_alone(told):
    assert safe(told) == told


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_lose_at_most_their_fourth_digit(value):
    assert float(number(value)) == pytest.approx(value, rel=5.1e-4)


def test_numbers_read_well():
    assert [number(v) for v in (0.9, 12345.678, 1e-7, 3.0)] == ["0.9", "12345.7", "1e-07", "3"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (59, "59 s"), (60, "1 min"), (7199, "1 h"), (90_000, "1 d"), (-5, "0 s")],
)
def test_ages(seconds, shown):
    assert age(Timestamp(seconds=1_000_000), 1_000_000 + seconds) == f"{shown} ago"
    assert age(Timestamp(), 1_000_000) == "-"


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 packets"), (1, "1 packet"), (2, "2 packets"), (21, "21 packets")]
)
def test_one_thing_is_not_in_the_plural(count, shown):
    assert counted(count, "packet") == shown


def test_the_lineage_of_one_packet_is_in_the_singular():
    update = update_pb2.Update(cohort="care", kind=update_pb2.UPDATE_KIND_PRIOR)
    update.prior_update.lineage.sites = 1
    update.prior_update.lineage.packets = 1
    update.prior_update.lineage.trimmed = 1
    told = [str(part) for part in update_view(update)]
    assert "1 site, 1 packet, confidence 0.00, 1 value trimmed" in told


def test_json_is_protojson_with_whole_numbers():
    update = update_pb2.Update(cohort="care", revision=2**60, sequence=7)
    update.warm_start.profiles.add(profile_class="x").lineage.packets = 9
    data = message_data(update)
    assert (data["revision"], data["sequence"]) == (2**60, 7)
    assert data["warm_start"]["profiles"][0]["lineage"]["packets"] == 9
    from google.protobuf import json_format  # noqa: PLC0415

    assert json_format.ParseDict(data, update_pb2.Update()) == update


def hostile_prior(_request=None):
    update = update_pb2.Update(cohort=HOSTILE, kind=update_pb2.UPDATE_KIND_PRIOR, revision=3)
    prior = update.prior_update
    prior.prior[HOSTILE] = 1.5
    prior.estimates[HOSTILE].value = 1.5
    prior.estimates[HOSTILE].section = HOSTILE
    prior.estimates["none"].reason = HOSTILE
    prior.contexts.add(regime=HOSTILE).settings[HOSTILE] = 1
    prior.lineage.estimator = HOSTILE
    return interchange_service_pb2.GetUpdateResponse(update=update)


def hostile_hint(_request=None):
    update = update_pb2.Update(cohort=HOSTILE, kind=update_pb2.UPDATE_KIND_POLICY_HINT, revision=3)
    hint = update.policy_hint
    hint.hint_id = hint.reason = HOSTILE
    hint.bundle[HOSTILE].text = HOSTILE
    return interchange_service_pb2.GetUpdateResponse(update=update)


def hostile_consensus(_request=None):
    update = update_pb2.Update(
        cohort=HOSTILE, kind=update_pb2.UPDATE_KIND_CAUSAL_CONSENSUS, revision=3
    )
    update.causal_consensus.edges.add(source=HOSTILE, target=HOSTILE, type=HOSTILE, weight=1)
    update.causal_consensus.cycles.add(
        nodes=[HOSTILE, "b"], weakest_source=HOSTILE, weakest_target="b"
    )
    update.causal_consensus.unpooled[HOSTILE] = 1
    return interchange_service_pb2.GetUpdateResponse(update=update)


def hostile_warm_start(_request=None):
    answer = interchange_service_pb2.GetWarmStartResponse()
    answer.profile.profile_class = answer.profile.context_selector.regime = HOSTILE
    answer.profile.context_selector.shared_concepts.append(HOSTILE)
    answer.profile.init[HOSTILE] = 1
    return answer


def hostile_sites(_request=None):
    answer = admin_service_pb2.ListSitesResponse()
    answer.sites.add(cohort=HOSTILE, domain_id=HOSTILE, profile_class=HOSTILE)
    return answer


def hostile_quarantine(_request=None):
    answer = admin_service_pb2.ListQuarantineResponse()
    held = answer.packets.add(reason=HOSTILE)
    held.packet.header.domain_id = held.packet.header.packet_id = HOSTILE
    held.packet.header.cohort = HOSTILE
    return answer


def hostile_stream(_request=None):
    answers = (hostile_prior(), hostile_hint(), hostile_consensus())
    return [
        interchange_service_pb2.SubscribeResponse(update=answer.update, resume_token=HOSTILE)
        for answer in answers
    ]


@pytest.mark.parametrize("colour", [False, True], ids=["piped", "terminal"])
@pytest.mark.parametrize(
    ("method", "answer", "line"),
    [
        ("GetUpdate", hostile_prior, ["get", "care"]),
        ("GetUpdate", hostile_hint, ["get", "care", "--kind", "policy_hint"]),
        ("GetUpdate", hostile_consensus, ["get", "care", "--kind", "causal_consensus"]),
        ("GetWarmStart", hostile_warm_start, ["get", "care", "--regime", "r"]),
        ("ListSites", hostile_sites, ["sites"]),
        ("ListQuarantine", hostile_quarantine, ["sites", "quarantine"]),
        ("Subscribe", hostile_stream, ["watch", "*", "--count", "3"]),
    ],
)
def test_names_of_other_sites_cannot_drive_the_terminal(
    ask, script, method, answer, line, colour, monkeypatch
):
    if colour:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
    script[method] = answer
    result = ask(*line)
    assert result.exit_code == 0, result.output
    shown = result.output
    if colour:
        import re  # noqa: PLC0415

        shown = re.sub(r"\x1b\[[0-9;]*m", "", shown)  # ours: colours, and nothing else
        assert "\x1b" not in shown
    else:
        assert "\x1b" not in shown
    joined = "".join(shown.split())
    assert (
        "a\\x1b[31m[red]b[/red]\\x07\\r\\n:smile:\\u202ec\\u200bd\\x9b2J".replace(" ", "") in joined
    )
    for char in ("\x07", "\r", "\u202e", "\u200b", "\x9b"):
        assert char not in shown
    in_json = ask(*line, "--json").stdout
    assert in_json.isascii()
    assert "\x1b" not in in_json
    for document in in_json.splitlines() if line[0] == "watch" else [in_json]:
        json.loads(document)


@pytest.mark.parametrize("width", [80, 120])
def test_tables_keep_to_the_width_and_lose_nothing(ask, script, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    names = [f"a_signal_with_a_name_that_is_as_long_as_allowed_{i}.{'x' * 70}" for i in range(3)]

    def answer(_request):
        update = update_pb2.Update(cohort="care", kind=1, revision=1)
        for name in names:
            estimate = update.prior_update.estimates[name]
            estimate.section, estimate.value = "controller", -123456.789
            estimate.lower, estimate.upper = -234567.891, -100000.123
            estimate.sites = estimate.trimmed = 100_000
            update.prior_update.prior[name] = estimate.value
        return interchange_service_pb2.GetUpdateResponse(update=update)

    script["GetUpdate"] = answer
    result = ask("get", "care")
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)
    columns = "".join(line[: line.find("  ", 3)] if line[:1] == " " else line for line in lines)
    for name in names:
        assert name[:20] in columns
    assert result.stdout.count("-123457") == 3
    assert result.stdout.count("-234568 .. -100000") == 3
    assert "…" not in result.stdout


def test_watch_breaks_lines_between_values_and_never_in_one(ask, script):
    def answer(_request):
        update = update_pb2.Update(cohort="care", kind=1, revision=1)
        prior = update.prior_update
        for index in range(8):
            name = f"signal_{index}"
            prior.prior[name] = 0.123456
            prior.estimates[name].value = 0.123456
            prior.estimates[name].lower, prior.estimates[name].upper = 0.1, 0.2
        for name in ("gain", "loss"):
            prior.estimates[name].reason = "below_quorum"
        for index in range(4):
            prior.estimates[f"a_rather_long_name_{index}"].reason = "of its own"
        return [interchange_service_pb2.SubscribeResponse(update=update)]

    script["Subscribe"] = answer
    lines = ask("watch", "care", "--count", "1").stdout.splitlines()
    value = "0.1235 [0.1 .. 0.2]"
    assert lines[1:] == [
        f"  signal_0 {value}, signal_1 {value},",
        f"  signal_2 {value}, signal_3 {value},",
        f"  signal_4 {value}, signal_5 {value} and 2 more",
        "  0 sites, confidence 0.00",
        "  no value yet: a_rather_long_name_0, a_rather_long_name_1,",
        "    a_rather_long_name_2, a_rather_long_name_3 (of its own)",
        "  no value yet: gain, loss (too few sites)",
    ]
    assert max(map(len, lines)) <= 80


def test_piped_lines_are_not_broken(ask, script):
    node = "a_rather_long_name_of_a_node_that_has_no_place_to_break"

    def answer(_request):
        update = update_pb2.Update(cohort="care", kind=4, revision=1)
        update.causal_consensus.edges.add(source=node, target=f"{node}_too", weight=0.5)
        return [interchange_service_pb2.SubscribeResponse(update=update)]

    script["Subscribe"] = answer
    result = ask("watch", "care", "--count", "1")
    assert result.stdout.splitlines()[1] == f"  {node} -> {node}_too 0.5"
