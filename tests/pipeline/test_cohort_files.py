"""Cohort files: how they may be written, and that all that is wrong with all of them is told at once."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st

from fmi.v1 import cohort_pb2
from fmi_server.cohort_files import (
    CohortFile,
    CohortFilesError,
    check_changes,
    read_cohort_folder,
)
from fmi_server.cohorts import CohortRegistry
from fmi_server.config import SettingsError
from fmi_server.contracts import FMIContractRegistry
from fmi_server.spec_checks import spec_violations

CONTRACT = FMIContractRegistry()

SHORT = """
name: care
signals:
  - {name: tau, section: controller, lower: 0.001, transform: log}
  - {name: loss, section: metrics, direction: lower_is_better, guardrail: true}
free_signals: null
release: {min_interval: 0.5, max_interval: "90s"}
ingest: {max_age: 3600, max_clock_skew: 0.00001, schema_mismatch: refuse}
policy: {window: 60, quantum: {tau: 0.1, window: 5, section: 2}}
retention: {siteTtl: 7200}
"""
LONG = {
    "name": "care",
    "signals": [
        {
            "name": "tau",
            "section": "SIGNAL_SECTION_CONTROLLER",
            "lower": 0.001,
            "transform": "SIGNAL_TRANSFORM_LOG",
        },
        {
            "name": "loss",
            "section": "SIGNAL_SECTION_METRICS",
            "direction": "SIGNAL_DIRECTION_LOWER_IS_BETTER",
            "guardrail": True,
        },
    ],
    "release": {"minInterval": "0.5s", "maxInterval": "90s"},
    "ingest": {
        "maxAge": "3600s",
        "maxClockSkew": "0.00001s",
        "schemaMismatch": "SCHEMA_MISMATCH_REFUSE",
    },
    "policy": {"window": "60s", "quantum": {"tau": 0.1, "window": 5, "section": 2}},
    "retention": {"siteTtl": "7200s"},
}


def written(folder: Path, text: str, name: str = "care.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path) -> list[CohortFile]:
    return read_cohort_folder(folder, CONTRACT)


def problems(folder: Path) -> list[str]:
    """The lines of what is wrong, without the folder's path."""
    with pytest.raises(CohortFilesError) as caught:
        read(folder)
    _, *lines = str(caught.value).splitlines()
    assert lines == [str(problem) for problem in caught.value.problems]
    return [line.removeprefix(f"{folder}/") for line in lines]


# How they may be written


def test_a_cohort_file_may_be_written_short(tmp_path):
    written(tmp_path, SHORT)
    ((spec,),) = [[file.spec for file in read(tmp_path)]]
    assert spec == json_format.ParseDict(LONG, cohort_pb2.CohortSpec())
    assert CohortRegistry(CONTRACT).compile(spec).min_interval_s == 0.5


def test_proto_json_is_a_cohort_file_too(tmp_path):
    spec = json_format.ParseDict(LONG, cohort_pb2.CohortSpec())
    path = written(tmp_path, json_format.MessageToJson(spec), "care.json")
    assert read(tmp_path) == [CohortFile(path, spec)]


def test_a_folder_is_read_whole(tmp_path):
    written(tmp_path, "name: b", "b.yml")
    written(tmp_path, "not a cohort file", "README.md")
    (tmp_path / "eu").mkdir()
    written(tmp_path / "eu", '{"name": "eu/a"}', "a.json")
    (tmp_path / "folder.yaml").mkdir()
    assert [file.spec.name for file in read(tmp_path)] == ["b", "eu/a"]
    with pytest.raises(SettingsError, match=r"cohorts: .*nowhere is not a folder"):
        read(tmp_path / "nowhere")


def test_a_mounted_config_map_is_read_once(tmp_path):
    """Kubernetes shows each file by a link through `..data`, to a folder that it replaces as a whole."""
    data = tmp_path / "..2026_01_02"
    (data / "eu").mkdir(parents=True)
    written(data, "name: care")
    written(data / "eu", "name: eu/care")
    (tmp_path / "..data").symlink_to(data.name)
    (tmp_path / "care.yaml").symlink_to("..data/care.yaml")
    (tmp_path / "eu").symlink_to("..data/eu")
    assert [(str(file.path.relative_to(tmp_path)), file.spec.name) for file in read(tmp_path)] == [
        ("care.yaml", "care"),
        ("eu/care.yaml", "eu/care"),
    ]


def test_what_is_hidden_is_not_read_and_a_link_back_is_not_followed(tmp_path):
    written(tmp_path, "name: care")
    written(tmp_path, "name: [", ".care.yaml")
    (tmp_path / ".#care.yaml").symlink_to("someone@host.1")
    (tmp_path / "again").symlink_to(tmp_path)
    assert [file.path.name for file in read(tmp_path)] == ["care.yaml"]


def test_links_that_lead_nowhere_and_what_is_no_file_are_told(tmp_path):
    (tmp_path / "gone.yaml").symlink_to("nowhere")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    assert problems(tmp_path) == [
        "gone.yaml: cannot be read: No such file or directory",
        "loop.yaml: cannot be read: Too many levels of symbolic links",
        "pipe.yaml: is no file with text in it",
    ]


# What is wrong with them

FIELDS = "name, description, signals, free_signals, aggregation, release, ingest, policy, privacy, "
SIGNAL = "name: care\nsignals: [{{name: tau, section: metrics, {}}}]"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: [", "is not YAML: "),
        ("name: \t- x", "is not YAML: "),
        ("name: 2024-13-45", "is not YAML: "),
        ("a: " + "[" * 5000, "is not YAML: "),
        ("name: " + "9" * 5000, "is not YAML: "),
        ("name: !!python/object:os.system {}", "is not YAML: "),
        ("name: !!timestamp soon", "is not YAML: a value is not of the kind that its !! tag says"),
        ("name: !!bool si", "is not YAML: a value is not of the kind that its !! tag says"),
        ("name: !!int ''", "is not YAML: a value is not of the kind that its !! tag says"),
        ("name: !!float ''", "is not YAML: a value is not of the kind that its !! tag says"),
        ("", "must have the fields of a CohortSpec by name"),
        ("- name: care", "must have the fields of a CohortSpec by name"),
        ("care", "must have the fields of a CohortSpec by name"),
        ("name: 5", "name: must be text, not 5"),
        ("name: care\nnonsense: 1", f"nonsense: is no field; the fields here are {FIELDS}"),
        ("name: care\nsignal: []", "signal: is no field; did you mean signals or free_signals?"),
        ('name: care\n"a\\nb": 1', "a\\nb: is no field; "),
        (f"name: care\n{'x' * 900}: 1", f"{'x' * 57}...: is no field; "),
        ("name: care\nfreeSignals: true\nfree_signals: no", "free_signals: stands here twice"),
        ("name: care\nfree_signals: maybe", 'free_signals: must be true or false, not "maybe"'),
        ("name: care\nsignals: 5", "signals: must be a list, not 5"),
        ("name: care\nsignals: &x [*x]", "signals[0]: must have fields by name, not be a list"),
        ("name: care\nsignals: [null]", "signals[0]: must have fields by name, not be nothing"),
        ("name: care\naggregation: [1]", "aggregation: must have fields by name, not be a list"),
        (
            "name: care\naggregation: {vote_min_sites: -1}",
            "aggregation.vote_min_sites: must be a whole number from 0 to 4294967295, not -1",
        ),
        (SIGNAL.format("lower: low"), 'signals[0].lower: must be a number, not "low"'),
        (
            "name: care\nsignals: [{name: a, section: cellar}]",
            "signals[0].section: must be one of metrics, controller, evaluator, operators, not",
        ),
        (
            SIGNAL.format("transform: 9"),
            "signals[0].transform: must be one of linear, log, logit, not 9",
        ),
        (
            SIGNAL.format("direction: yes"),
            "signals[0].direction: must be one of higher_is_better, lower_is_better, not true",
        ),
        (
            "name: care\ningest: {schemaMismatch: ignore}",
            'ingest.schema_mismatch: must be one of warn, refuse, not "ignore"',
        ),
        (
            "name: care\nrelease: {min_interval: .inf}",
            "release.min_interval: must be a duration in seconds, for example 1.5 or",
        ),
        (
            "name: care\npolicy: {quantum: {tau: wide}}",
            'policy.quantum["tau"]: must be a number, not "wide"',
        ),
        (
            "name: care\npolicy: {quantum: [1]}",
            "policy.quantum: must have values by name, not be a",
        ),
        ("name: care\naccess: {emit: [{}]}", "access.emit[0]: must be text, not a mapping"),
        (SIGNAL.format("lower: 2, upper: 1"), "signals[0]: lower must be less than upper"),
        (SIGNAL.format("guardrail: true"), "signals[0].guardrail: a guardrail needs a direction"),
        ("name: care\nname: cure", "line 2: name stands here twice, first in line 1; leave one of"),
        (
            "name: care\nsignals: []\nsignals: [7]",
            "line 3: signals stands here twice, first in line 2",
        ),
        (
            '{"name": "care",\n"release": {"a": 1,\n"a": 1}}',
            "line 3: a stands here twice, first in",
        ),
        (f"name: care\n{'x' * 90}: 1\n{'x' * 90}: 1", f"line 3: {'x' * 57}... stands here twice"),
        (f"name: *{'x' * 900}", "is not YAML: "),
        (
            "name: care\npolicy: {quantum: {1: 2, '1': 3}}",
            'policy.quantum["1"]: stands here twice, once not as text',
        ),
        (
            f"name: care\nrelease: {{min_interval: 0x{'f' * 9000}}}",
            'release.min_interval: must be a duration in seconds, for example 1.5 or "1.5s", not int',
        ),
        ("name: care\nsignals: !!set {a, b}", "signals: must be a list, not {"),
        ("name: care\nrelease: {maxInterval: soon}", "release.max_interval: must be a duration in"),
        (
            "name: care\nrelease: {minInterval: soon, maxInterval: 0.1}",
            "release.min_interval: must be",
        ),
        (
            SIGNAL.format("lower: .nan, transform: log"),
            "signals[0].lower: must be a number, not nan",
        ),
        (
            "name: care\nsignals: [{name: loss, direction: higher_is_better}]",
            "signals[0].section: value is required",
        ),
        ("name: care\nprivacy: {dp_delta: 1e-6}", "privacy.dp_epsilon: is not set, and neither is"),
        (
            "name: care\naccess: {emit: []}",
            "access: cannot be kept: this server authenticates nobody",
        ),
    ],
)
def test_a_wrong_file_is_told_in_one_line(tmp_path, text, said):
    """With the field, what is wrong and what is allowed; a wrong value is not told once more as a missing."""
    written(tmp_path, text)
    (line,) = problems(tmp_path)
    assert line.startswith(f"care.yaml: {said}")
    assert len(line) < 300


def test_everything_wrong_with_every_file_is_told_at_once(tmp_path):
    written(
        tmp_path,
        """
        nmae: care
        signals:
          - {name: tau, section: kitchen, direction: up, guardrail: true}
          - {name: rho, section: controller, lower: 2, upper: 1, colour: red}
        release: {max_interval: 0.01}
        privacy: {dp_epsilon: 1, dp_delta: 0.00001}
        """,
        "a.yaml",
    )
    written(tmp_path, "name: [", "b.yaml")
    written(tmp_path, "name: good", "c.yaml")
    written(tmp_path, "name: good", "d.yaml")
    told = [line.partition(": ") for line in problems(tmp_path)]
    assert [(file, rest.partition(": ")[0]) for file, _, rest in told] == [
        ("a.yaml", "nmae"),
        ("a.yaml", "signals[0].section"),
        ("a.yaml", "signals[0].direction"),
        ("a.yaml", "signals[1].colour"),
        ("a.yaml", "name"),
        ("a.yaml", "signals[1]"),
        ("a.yaml", "signals[0].lower"),
        ("a.yaml", "release.max_interval"),
        ("a.yaml", "privacy.dp_epochs"),
        ("b.yaml", "is not YAML"),
        ("d.yaml", "name"),
    ]
    assert told[-1][2] == (
        f"name: cohort 'good' is declared in {tmp_path / 'c.yaml'} already; a cohort has one file"
    )


@pytest.mark.parametrize(
    ("written_as", "seconds"),
    [
        ("2030-01-31T00:00:00Z", 1_896_048_000),
        ("'2030-01-31T00:00:00Z'", 1_896_048_000),
        ("2030-01-31", 1_896_048_000),
        ("2030-01-31 01:00:00", 1_896_051_600),
        ("2030-01-31T00:00:00+01:00", 1_896_044_400),
        ("5", None),
        ("soon", None),
        ("{seconds: 5}", None),
        ("[]", None),
    ],
)
def test_a_time_is_written_as_people_write_it(tmp_path, written_as, seconds):
    written(
        tmp_path,
        f"""
        name: care
        signals: [{{name: tau, section: controller, lower: 0, upper: 1}}]
        privacy: {{dp_epsilon: 1, dp_delta: 1e-6, dp_epochs: 5, first_release_at: {written_as}}}
        """,
        "a.yaml",
    )
    if seconds is None:
        (problem,) = problems(tmp_path)
        assert "privacy.first_release_at: must be a time as in 2030-01-31T00:00:00Z" in problem
    else:
        (file,) = read_cohort_folder(tmp_path, CONTRACT)
        assert file.spec.privacy.first_release_at.seconds == seconds


@pytest.mark.parametrize(
    ("signal", "fields"),
    [
        ("{name: tau, transform: log}", ["section", "lower"]),
        ("{name: tau, section: bogus, transform: logit, guardrail: true}", ["section", "lower", "guardrail"]),
        ("{name: tau, section: metrics, lower: low, guardrail: true}", ["lower", "guardrail"]),
        ("{name: tau, section: metrics, unit: 7, transform: log}", ["unit", "lower"]),
        ("{name: tau, section: metrics, transform: nosuch, lower: -1}", ["transform"]),
        ("{name: tau, section: controller, direction: nosuch}", ["direction"]),
    ],
)  # fmt: skip
def test_a_rule_waits_only_for_the_fields_that_it_is_about(tmp_path, signal, fields):
    """Whoever mends what is told shall not be told the next thing after it."""
    written(tmp_path, f"name: care\nsignals: [{signal}]")
    assert [line.split(": ")[1] for line in problems(tmp_path)] == [
        f"signals[0].{name}" for name in fields
    ]


def test_a_name_that_cannot_be_read_is_not_declared_twice(tmp_path):
    written(tmp_path, "{name: care, signals: [{section: metrics}, {section: metrics}]}")
    assert problems(tmp_path) == [
        f"care.yaml: signals[{index}].name: value is required" for index in (0, 1)
    ]


BOMB = "".join(
    [
        "x0: &a0 [care, care, care, care, care, care, care, care, care, care]\n",
        *(f"x{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)),
    ]
)
MERGES = "".join(
    [
        "x0: &a0 {a: 1, b: 2, c: 3}\n",
        *(f"x{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 30)),
    ]
)


@pytest.mark.parametrize(
    "field",
    [
        "name: {}",
        "free_signals: {}",
        "signals: {}",
        "signals: [{{name: tau, section: {}}}]",
        "aggregation: {{weight_cap: {}}}",
        "aggregation: {{vote_min_sites: {}}}",
        "release: {{min_interval: {}}}",
        "policy: {{quantum: {{tau: {}}}}}",
        "policy: {{quantum: {}}}",
        "access: {{emit: {}}}",
    ],
)
@pytest.mark.parametrize("bomb", [BOMB, MERGES], ids=["lists", "merges"])
@pytest.mark.timeout(20)
def test_aliases_do_not_multiply_what_is_told(tmp_path, bomb, field):
    """Written out, the last one has 10^30 values."""
    written(tmp_path, bomb + field.format("*a29"))
    assert all(len(line) < 300 for line in problems(tmp_path))


def test_no_more_is_told_of_a_file_than_a_person_reads(tmp_path):
    written(tmp_path, "name: care\n" + "".join(f"x{i}: 1\n" for i in range(1200)), "a.yaml")
    written(tmp_path, "name: [", "b.yaml")
    with pytest.raises(CohortFilesError) as caught:
        read(tmp_path)
    assert len(caught.value.problems) == 1201
    first, *lines = str(caught.value).splitlines()
    assert first == "cohorts: 1201 problems in 2 cohort files"
    assert len(lines) == 52
    assert lines[50] == f"{tmp_path / 'a.yaml'}: and 1150 more problems"
    assert lines[51].startswith(f"{tmp_path / 'b.yaml'}: is not YAML")


def test_many_problems_take_no_more_time_each_than_a_few():
    def seconds(signals: int) -> float:
        unread = [f"signals[{index}].unit" for index in range(signals)]
        spec = cohort_pb2.CohortSpec(name="care")
        for index in range(signals):
            section = cohort_pb2.SIGNAL_SECTION_METRICS
            spec.signals.add(name=f"s{index}", section=section, guardrail=True)
        begun = time.process_time()
        assert len(spec_violations(spec, CONTRACT, unreadable=unread)) == signals
        return time.process_time() - begun

    seconds(1)  # compiles the rules
    # The best of three: a collection of garbage falls into one of them.
    few, many = (min(seconds(signals) for _ in range(3)) for signals in (400, 4000))
    assert many < 30 * few


def test_a_path_that_is_long_is_cut(tmp_path):
    written(tmp_path, json.dumps({"name": "care", "policy": {"quantum": {"-" * 9000: 1}}}))
    (line,) = problems(tmp_path)
    assert len(line) < 400


@pytest.mark.parametrize(
    ("texts", "counted"),
    [
        (["name: 5\ncolour: red", "name: ["], "cohorts: 3 problems in 2 cohort files"),
        (["care"], "cohorts: 1 problem in 1 cohort file"),
    ],
)
def test_the_first_line_says_how_much_is_wrong(tmp_path, texts, counted):
    for index, text in enumerate(texts):
        written(tmp_path, text, f"{index}.yaml")
    with pytest.raises(CohortFilesError) as caught:
        read(tmp_path)
    assert str(caught.value).splitlines()[0] == counted


def test_a_field_that_cannot_be_read_hides_no_other_signal(tmp_path):
    written(
        tmp_path,
        """
        name: care
        signals:
          - 7
          - {name: tau, section: metrics, guardrail: true}
          - 8
        """,
    )
    assert [line.split(": ")[1] for line in problems(tmp_path)] == [
        "signals[0]",
        "signals[2]",
        "signals[1].guardrail",
    ]


@settings(max_examples=150)
@given(
    content=st.binary(max_size=40)
    | st.text(max_size=40).map(lambda t: t.encode("utf-8", "replace"))
)
def test_whatever_stands_in_a_file_is_a_spec_or_a_typed_error(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    (folder / "any.yaml").write_bytes(content)
    with contextlib.suppress(CohortFilesError):
        read(folder)


def test_a_file_that_is_no_text_is_told(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff\xfe\xfa")
    (line,) = problems(tmp_path)
    assert line.startswith("latin.yaml: is not YAML: ")


# What they change


def test_every_unsafe_change_of_every_file_is_told_with_file_cohort_and_flag(tmp_path):
    cohorts = CohortRegistry(CONTRACT)
    for name in ("a", "b", "c"):
        written(tmp_path, f"{{name: {name}, free_signals: true}}", f"{name}.yaml")
    for file in read(tmp_path):
        cohorts.declare(file.spec)
    check_changes(read(tmp_path), cohorts, cohorts.unsafe_changes)
    for name in ("a", "b"):
        written(tmp_path, f"{{name: {name}, free_signals: false}}", f"{name}.yaml")
    with pytest.raises(CohortFilesError) as caught:
        check_changes(read(tmp_path), cohorts, cohorts.unsafe_changes)
    first, second = caught.value.problems
    assert str(first) == (
        f"{tmp_path / 'a.yaml'}: free_signals: of cohort a is closed, so undeclared signals are "
        "refused; change it in another way, or start with --force-cohorts to do it all the same"
    )
    assert (second.path.name, second.field) == ("b.yaml", "free_signals")
