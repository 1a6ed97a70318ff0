"""Settings: those of the overview, and where the server's come from; a wrong one is one clear line."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmi_server import config
from fmi_server.config import (
    ESTIMATORS,
    AggregationConfig,
    RouterConfig,
    ServerSettings,
    SettingsError,
    load_settings,
    unknown_variables,
)
from fmi_server.privacy.budget import BudgetError, PrivacySettings
from fmi_server.quotas import Quota


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch):
    for name in ServerSettings.model_fields:
        monkeypatch.delenv(f"FMI_{name.upper()}", raising=False)


# AggregationConfig

OVERVIEW = {
    "metrics_trim_alpha": 0.1,
    "vote_min_sites": 3,
    "metrics_aggregation": "trimmed_mean",
    "dp_noise_sigma": 0.0,
    "dp_epsilon": 0.0,
    "dp_delta": 0.0,
    "dp_sensitivity": 1.0,
}


def test_the_fields_of_the_overview_come_first_with_its_defaults():
    fields = [(field.name, field.default) for field in dataclasses.fields(AggregationConfig)]
    assert fields[: len(OVERVIEW)] == list(OVERVIEW.items())
    assert AggregationConfig(*OVERVIEW.values()) == AggregationConfig()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"dp_noise_sigma": 1.0}, "dp_delta"),
        ({"dp_epsilon": 0.1}, "dp_delta"),
        ({"dp_delta": 1e-9}, "dp_delta"),
        ({"dp_sensitivity": 0.5}, "dp_sensitivity"),
        ({"dp_epsilon": 1.0, "dp_delta": 1.0}, "dp_delta"),
        ({"dp_epsilon": 1.0, "dp_delta": 1e-6, "dp_epochs": 0}, "dp_epochs"),
        ({"dp_clip_norm": 1.0}, "dp_clip_norm"),
        ({"dp_epsilon": 1.0, "dp_delta": 1e-6, "dp_clip_norm": 0.001}, "dp_clip_norm"),
        ({"dp_epsilon": 1.0, "dp_delta": 1e-6, "dp_clip_norm": -1.0}, "dp_clip_norm"),
        ({"dp_epsilon": 1.0, "dp_delta": 1e-6, "dp_sensitivity": 0.5}, "dp_sensitivity"),
        ({"dp_epsilon": 1.0, "dp_delta": 1e-6, "dp_noise_sigma": 0.1}, "dp_noise_sigma"),
        (
            {"dp_epsilon": 1.0, "dp_delta": 1e-6, "metrics_aggregation": "median"},
            "metrics_aggregation",
        ),
        ({"dp_epsilon": 1.0, "dp_delta": 1e-6, "max_byzantine": 1}, "max_byzantine"),
    ],
)
def test_each_contradiction_of_privacy_is_refused_with_what_to_change(settings, named):
    with pytest.raises(BudgetError) as caught:
        AggregationConfig(**settings)
    assert caught.value.setting == named
    assert len(caught.value.advice) > 40


def test_privacy_is_asked_for_under_the_names_of_the_overview():
    config = AggregationConfig(dp_epsilon=2.0, dp_delta=1e-6)
    assert config.privacy == PrivacySettings(2.0, 1e-6, dp_epochs=1)
    noisy = AggregationConfig(dp_noise_sigma=8.0, dp_delta=1e-6, dp_sensitivity=3.0, dp_epochs=9)
    assert noisy.privacy == PrivacySettings(0.0, 1e-6, 8.0, 3.0, 9)
    assert not AggregationConfig().privacy.private


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("metrics_trim_alpha", -0.01),
        ("metrics_trim_alpha", 0.5),
        ("metrics_trim_alpha", math.nan),
        ("vote_min_sites", 0),
        ("vote_min_sites", 2.5),
        ("vote_min_sites", 2**32),
        ("metrics_aggregation", "TRIMMED_MEAN"),
        ("metrics_aggregation", ""),
        ("max_byzantine", -1),
        ("max_byzantine", 0.5),
        ("max_byzantine", math.nan),
        ("weight_cap", 0.0),
        ("weight_cap", 1.01),
        ("weight_cap", math.nan),
        ("dp_epsilon", math.nan),
    ],
)
def test_a_setting_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        AggregationConfig(**{name: value})


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_is_taken(estimator):
    assert AggregationConfig(metrics_aggregation=estimator).metrics_aggregation == estimator


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("queue_packets", 0),
        ("max_subscribers", 0),
        ("page_updates", 0),
        ("progress_interval_s", 0.0),
        ("progress_interval_s", math.nan),
    ],
)
def test_router_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        RouterConfig(**{name: value})


# ServerSettings


def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "server.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_setting_has_a_default_and_a_description():
    settings = load_settings({})
    assert settings.model_dump() == ServerSettings().model_dump()
    assert settings.listen.startswith("127.0.0.1:")
    assert all(field.description for field in ServerSettings.model_fields.values())


def test_flags_go_before_the_environment_before_the_file(tmp_path, monkeypatch):
    path = file(
        tmp_path, "listen: '127.0.0.1:1'\nmax_inflight: 1\nmax_cohorts: 1\ndata_dir: /tmp/file\n"
    )
    monkeypatch.setenv("FMI_LISTEN", "127.0.0.1:2")
    monkeypatch.setenv("FMI_MAX_INFLIGHT", "2")
    settings = load_settings({"listen": "127.0.0.1:3"}, config_file=path)
    assert (settings.listen, settings.max_inflight, settings.max_cohorts) == ("127.0.0.1:3", 2, 1)
    assert settings.data_dir == Path("/tmp/file")  # noqa: S108 - a name, nothing is written
    assert load_settings({}).max_cohorts == 10_000, "a file is of one call only"


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}"])
def test_an_empty_file_says_nothing(tmp_path, text):
    settings = load_settings({}, config_file=file(tmp_path, text))
    assert settings.model_dump() == ServerSettings().model_dump()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"nonsense": 1}, r"nonsense: is no setting$"),
        ({"max_inflght": 1}, r"max_inflght: is no setting; did you mean max_inflight\?$"),
        ({"dp_epsilon": 1.0}, r"dp_epsilon: .*in a cohort file, under `privacy`"),
        ({"dp_sensitivity": "1"}, r"dp_sensitivity: .*in a cohort file, under `privacy`"),
        ({"listen": "50061"}, r"listen: must be HOST:PORT.*, not '50061'"),
        ({"listen": ":50061"}, r"listen: must be HOST:PORT"),
        ({"listen": "127.0.0.1:70000"}, r"listen: must be HOST:PORT"),
        ({"listen": "127.0.0.1:x"}, r"listen: must be HOST:PORT"),
        ({"metrics_listen": "9090"}, r"metrics_listen: must be HOST:PORT"),
        (
            {"store": "postgres"},
            r"store: must be sqlite, memory, or the URL of brokers.*, not 'postgres'",
        ),
        ({"store": "nats://u:p@a"}, r"store: must have no user and password"),
        ({"store_replicas": 2}, r"store_replicas: must be 1, 3 or 5"),
        ({"store_login": "x"}, r"settings: store_login is about brokers"),
        ({"log_level": "loud"}, r"log_level: "),
        ({"max_message_bytes": 1}, r"max_message_bytes: .*65536, not 1"),
        ({"max_batch_packets": 0}, r"max_batch_packets: "),
        ({"max_batch_bytes": 2**31}, r"max_batch_bytes: "),
        ({"max_inflight": "many"}, r"max_inflight: .*, not 'many'"),
        ({"progress_interval_s": 31}, r"progress_interval_s: "),
        ({"drain_s": -1}, r"drain_s: "),
        ({"open_cohorts": "maybe"}, r"open_cohorts: "),
        ({"quota_packets_per_s": -1}, r"quota_packets_per_s: .*, not -1$"),
        ({"quota_calls_per_s": "nan"}, r"quota_calls_per_s: .*finite"),
        ({"quota_bytes_per_s": 10**400}, r"quota_bytes_per_s: "),
        ({"quota_streams": 1.5}, r"quota_streams: .*, not 1.5$"),
        ({"quotas": "{"}, r"quotas: must be quotas by principal, as JSON, not '\{'"),
        ({"quotas": '{"a": {}, "a": {}}'}, r"quotas: 'a' stands twice in one object"),
        ({"quotas": '{"a": {"streams": 1, "streams": 2}}'}, r"quotas: 'streams' stands twice"),
        ({"quotas": {"10.0.0.7": {"packets": 5}}}, r"quotas.10.0.0.7.packets: is no quota; there"),
        ({"quotas": {"10.0.0.7": {"streams": -1}}}, r"quotas.10.0.0.7: streams must be .* not -1"),
        ({"quotas": {"10.0.0.7": {"calls_per_s": 10**400}}}, r"quotas.10.0.0.7.calls_per_s: "),
        ({"quotas": {"10.0.0.7": {"calls_per_s": ".inf"}}}, r"quotas.10.0.0.7"),
        ({"quotas": {"10.0.0.7": None}}, r"quotas.10.0.0.7: "),
        ({"quotas": {7: {"streams": 1}}}, r"quotas.7"),
        ({"quotas": {"north": {"streams": 1}}}, r"each is an address, and 'north' is none"),
        ({"quotas": {"::1": {"streams": 1}}}, r"quotas: '::1' must be written as '::/64'"),
        (
            {"tokens": "t", "operators": "boss", "quotas": {"boss": {"streams": 1}}},
            r"quotas: 'boss' is an operator, and operators have no quotas",
        ),
    ],
)
def test_a_wrong_setting_is_one_clear_line(flags, line):
    with pytest.raises(SettingsError, match=line) as caught:
        load_settings(flags)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_quotas_of_single_callers_are_taken_from_every_source(tmp_path, monkeypatch):
    file = tmp_path / "fmi.yaml"
    file.write_text("quotas:\n  2001:db8::/64: {packets_per_s: 5, streams: 0}\n")
    found = load_settings({}, config_file=file)
    assert found.quotas == {"2001:db8::/64": Quota(packets_per_s=5.0, streams=0)}
    monkeypatch.setenv("FMI_QUOTAS", '{"10.0.0.7": {"calls_per_s": 1e300}}')
    assert load_settings({}).quotas == {"10.0.0.7": Quota(calls_per_s=1e300)}
    given = load_settings({"tokens": "t", "quotas": '{"north": {"cohorts": 3}}'})
    assert given.quotas == {"north": Quota(cohorts=3)}


def test_a_variable_that_asks_for_privacy_is_refused_and_never_ignored(monkeypatch):
    for name in config.PRIVACY_SETTINGS:
        with monkeypatch.context() as patch:
            patch.setenv(f"FMI_{name.upper()}", "0.5")
            with pytest.raises(SettingsError, match=f"{name}: .*in a cohort file"):
                load_settings({})
    load_settings({})


def test_variables_that_look_like_settings_and_are_none_are_told():
    platform = [
        "FMI_PORT", "FMI_PORT_50061_TCP_ADDR", "FMI_SERVICE_HOST", "FMI_SERVER_SERVICE_PORT_GRPC",
    ]  # fmt: skip
    client = ["FMI_TARGET", "FMI_TOKEN", "FMI_DOMAIN_ID", "FMI_DEBUG"]
    settings = [f"FMI_{name.upper()}" for name in ServerSettings.model_fields]
    others = ["PATH", "FMI", "XFMI_LISTN", "fmi_listen"]
    assert unknown_variables([*platform, *client, *settings, *others]) == []
    assert unknown_variables(["FMI_MAX_INFLGHT", "FMI_QQQQ", "PATH"]) == [
        "FMI_MAX_INFLGHT is set, but there is no such setting; did you mean FMI_MAX_INFLIGHT?",
        "FMI_QQQQ is set, but there is no such setting",
    ]


def test_every_wrong_setting_is_told_at_once():
    with pytest.raises(SettingsError) as caught:
        load_settings({"listen": "x", "store": "y", "nonsense": 1})
    assert {part.split(":")[0] for part in str(caught.value).split("; ")} == {
        "listen", "store", "nonsense",
    }  # fmt: skip


def test_a_wrong_variable_is_told_by_the_name_of_its_setting(monkeypatch):
    monkeypatch.setenv("FMI_MAX_COHORTS", "a\nb")
    with pytest.raises(SettingsError, match=r"max_cohorts: .*, not 'a\\nb'") as caught:
        load_settings({})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense: 1", "nonsense: is no setting"),
        ("dp_epochs: 3", "dp_epochs: .*in a cohort file"),
        ("listen:", "listen: .*not None"),
        ("listen: {a: 1}", "listen: "),
        ("- listen", "must have settings by name, not a list"),
        ("just text", "must have settings by name, not a str"),
        ("1: x", "must have settings by name; 1 is none"),
        ("listen: [", "is not YAML"),
        ("listen: 2024-13-45", "is not YAML"),
        ("a: " + "[" * 5000, "is not YAML"),
        (
            "drain_s: 1\nlisten: a:1\ndrain_s: 2",
            "line 3: drain_s stands here twice, first in line 1",
        ),
        (
            f"max_batch_packets: 0x{'f' * 9000}",
            "max_batch_packets: .*, not a number that is too long",
        ),
        (f"store: {'x' * 9000}", "store: .*, not 'x+\\.\\.\\.x+'"),
        (f"? 0x{'f' * 9000}\n: 1", "a number that is too long is none"),
        ("listen: [[[[[[[[[[1]]]]]]]]]]", "listen: "),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path, text, said):
    with pytest.raises(SettingsError, match=said) as caught:
        load_settings({}, config_file=file(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.timeout(20)
def test_aliases_do_not_multiply_what_is_told(tmp_path):
    levels = [f"- &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    text = "\n".join(["listen:", "- &a0 [1, 1]", *levels])
    with pytest.raises(SettingsError, match="listen: ") as caught:
        load_settings({}, config_file=file(tmp_path, text))
    assert len(str(caught.value)) < 1000


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        load_settings({}, config_file=tmp_path / "nowhere.yaml")
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        load_settings({}, config_file=tmp_path)
    (tmp_path / "latin").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(SettingsError, match="is not YAML"):
        load_settings({}, config_file=tmp_path / "latin")


@given(st.text(max_size=30))
def test_whatever_is_said_to_listen_on_is_taken_or_told(text):
    try:
        settings = load_settings({"listen": text})
    except SettingsError as error:
        assert str(error).startswith("listen: ")  # noqa: PT017 - taken or told, both are good
    else:
        assert re.fullmatch(r"(?s).+:\d{1,}", settings.listen)


def test_settings_cannot_be_changed():
    with pytest.raises(Exception, match="frozen"):
        ServerSettings().listen = "x"


def test_public_names():
    assert all(hasattr(config, name) for name in config.__all__)
