"""The chart: its values, and what Helm's own engine makes of it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import yaml
from deployment_files import (
    CASES,
    CHART,
    HAS_HELM,
    HAS_SCHEMAS,
    REFUSED,
    ROOT,
    check_command,
    last,
    load_yaml,
    port,
    rendered,
    template_settings,
    version,
)

from fmi.descriptors import SERVICE_NAMES
from fmi_server.config import ServerSettings, load_settings

helm = pytest.mark.skipif(not HAS_HELM, reason="`make check-deploy` has Helm's engine")


def test_the_chart_is_of_this_version() -> None:
    chart = load_yaml(CHART / "Chart.yaml")
    assert (chart["version"], chart["appVersion"]) == (version(), version())


def test_the_chart_knows_every_setting_and_no_other() -> None:
    text = (CHART / "values.schema.json").read_text(encoding="utf-8")
    tool = runpy.run_path(str(ROOT / "tools" / "generate_settings.py"))
    assert tool["generated_schema"](text) == text, "run `python tools/generate_settings.py`"
    free = set(json.loads(text)["properties"]["settings"]["propertyNames"]["enum"])
    known = set(ServerSettings.model_fields)
    assert template_settings() <= known
    # `insecure` is said by people, and by the chart where metrics are to be read.
    assert free == known - template_settings() | {"insecure"}
    assert set(load_yaml(CHART / "values.yaml")["settings"]) <= free


def test_the_chart_has_a_rule_for_every_value() -> None:
    schema = load_yaml(CHART / "values.schema.json")
    values = load_yaml(CHART / "values.yaml")
    assert set(schema["properties"]) == {*values, "global"}
    for name, value in values.items():
        if schema["properties"][name].get("additionalProperties") is False:
            assert set(schema["properties"][name]["properties"]) == set(value), name


@helm
@pytest.mark.parametrize("case", CASES)
def test_the_rendered_settings_are_the_servers(case: str, tmp_path: Path) -> None:
    values = CASES[case]
    objects = rendered(values)
    (text,) = [c["data"]["fmi.yaml"] for c in objects["ConfigMap"] if "fmi.yaml" in c["data"]]
    file = tmp_path / "fmi.yaml"
    file.write_text(text)
    settings = load_settings({}, config_file=file)
    assert settings.health_listen == "0.0.0.0:50060"
    for name, value in values.get("settings", {}).items():
        assert getattr(settings, name) == value
    if values.get("mode") == "cluster":
        assert settings.store == values["brokers"]["url"]
        assert settings.store_replicas == values["brokers"].get("replicas", 3)
    else:
        assert settings.store == "sqlite"
    assert settings.authenticated == ("tls" in values)
    assert settings.insecure == (case in ("open", "cluster with all"))


@helm
@pytest.mark.parametrize("case", CASES)
def test_the_pods_have_what_their_settings_name(case: str, tmp_path: Path) -> None:
    objects = rendered(CASES[case])
    (stateful,) = objects["StatefulSet"]
    pod = stateful["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (text,) = [c["data"]["fmi.yaml"] for c in objects["ConfigMap"] if "fmi.yaml" in c["data"]]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {v["name"] for v in pod["volumes"]}
    volumes |= {v["metadata"]["name"] for v in stateful["spec"]["volumeClaimTemplates"]}
    assert set(mounts.values()) == volumes
    for name, value in yaml.safe_load(text).items():
        if isinstance(value, str) and value.startswith("/"):
            assert any(value == p or value.startswith(f"{p}/") for p in mounts), name
    given = check_command(container["args"])
    assert str(given["config"]) in mounts
    ports = {found["name"]: found["containerPort"] for found in container["ports"]}
    (tmp_path / "fmi.yaml").write_text(text)
    settings = load_settings({}, config_file=tmp_path / "fmi.yaml")
    assert ports["grpc"] == port(settings.listen)
    assert settings.health_listen is not None
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["grpc"]
        assert asked["port"] == ports["health"] == port(settings.health_listen)
        assert asked.get("service", "") in ("", *SERVICE_NAMES)
    assert (settings.metrics_listen is not None) == ("metrics" in ports)
    assert pod["terminationGracePeriodSeconds"] >= settings.drain_s + 50
    guarded = container["securityContext"]
    assert guarded["readOnlyRootFilesystem"]
    assert guarded["capabilities"] == {"drop": ["ALL"]}
    user, _, _ = last("USER").rest.partition(":")
    assert pod["securityContext"]["runAsUser"] == int(user)


@helm
@pytest.mark.parametrize("case", CASES)
def test_services_and_budgets_select_the_pods(case: str) -> None:
    objects = rendered(CASES[case])
    (stateful,) = objects["StatefulSet"]
    labels = stateful["spec"]["template"]["metadata"]["labels"]
    selectors = [stateful["spec"]["selector"]["matchLabels"]]
    selectors += [service["spec"]["selector"] for service in objects["Service"]]
    for kind, key in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        selectors += [f["spec"][key]["matchLabels"] for f in objects.get(kind, [])]
    spread = stateful["spec"]["template"]["spec"].get("topologySpreadConstraints", [])
    selectors += [found["labelSelector"]["matchLabels"] for found in spread]
    for selector in selectors:
        assert selector.items() <= labels.items()
    (headless,) = [s for s in objects["Service"] if s["spec"].get("clusterIP") == "None"]
    assert stateful["spec"]["serviceName"] == headless["metadata"]["name"] == "fmi-servers"
    clustered = CASES[case].get("mode") == "cluster"
    assert stateful["spec"]["replicas"] == (CASES[case].get("replicas", 3) if clustered else 1)
    assert bool(spread) is ("PodDisruptionBudget" in objects) is clustered


@helm
@pytest.mark.skipif(not HAS_SCHEMAS, reason="`make check-deploy` has the schemas of Kubernetes")
@pytest.mark.parametrize("kubernetes", ["1.27", "1.31", "1.37"])
@pytest.mark.parametrize("case", CASES)
def test_kubernetes_takes_what_is_rendered(case: str, kubernetes: str) -> None:
    import kubernetes_validate  # noqa: PLC0415 - it is not installed everywhere

    for objects in rendered(CASES[case]).values():
        for found in objects:
            kubernetes_validate.validate(found, kubernetes, strict=True)


@helm
@pytest.mark.parametrize("case", REFUSED)
def test_the_chart_refuses_what_would_not_work(case: str) -> None:
    import helm_python  # noqa: PLC0415 - it is not installed everywhere

    values, told = REFUSED[case]
    with helm_python.Chart.load(CHART) as chart:
        with pytest.raises(helm_python.HelmError) as refused:
            chart.validate_schema(chart.merge_values(values))
        assert told in str(refused.value)


@helm
def test_helm_lint_finds_nothing_but_the_missing_icon() -> None:
    import helm_python  # noqa: PLC0415 - it is not installed everywhere

    for values in CASES.values():
        report = helm_python.lint(CHART, values, strict=True)
        told = [message["error"] for message in report["messages"]]
        assert (report["errors"], told) == ([], ["icon is recommended"])
