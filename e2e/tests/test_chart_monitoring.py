"""What the chart makes for Prometheus and Grafana, as the real helm renders it."""

import json
from itertools import combinations
from typing import Any

import pytest
import yaml

from tests.chart import CHART, Document, refusal, render
from tests.exported import POD_TARGET_LABELS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

ALL = {
    f"metrics.{part}.enabled": True
    for part in ("serviceMonitor", "podMonitor", "prometheusRule", "dashboards")
}


@pytest.fixture(scope="module")
def made() -> list[Document]:
    return render(ALL)


def of_kind(documents: list[Document], kind: str) -> Document:
    (found,) = (each for each in documents if each["kind"] == kind)
    return found


def test_nothing_is_made_for_others_unless_it_is_asked_for() -> None:
    kinds = {each["kind"] for each in render()}
    assert not {"ServiceMonitor", "PodMonitor", "PrometheusRule", "ConfigMap"} & kinds


def test_the_rule_has_every_alert_of_the_file(made: list[Document]) -> None:
    written = yaml.safe_load((CHART / "alerts.yaml").read_text())["groups"]
    groups = of_kind(made, "PrometheusRule")["spec"]["groups"]
    assert [group["name"] for group in groups] == [group["name"] for group in written]
    for group, short in zip(groups, written, strict=True):
        for rule, source in zip(group["rules"], short["rules"], strict=True):
            assert rule["expr"] == source["expr"]
            assert rule["for"] == source["for"]
            assert rule["labels"] == {"severity": source["severity"]}
            assert rule["annotations"]["summary"] == source["summary"]
            page = f"docs/monitoring.md#{source['alert'].lower()}"
            assert rule["annotations"]["runbook_url"].endswith(page)


def dashboards(documents: list[Document]) -> dict[str, Any]:
    found = {}
    for document in documents:
        if document["kind"] == "ConfigMap":
            ((file, text),) = document["data"].items()
            found[file.removeprefix("tandem-").removesuffix(".json")] = json.loads(text)
    return found


def test_a_dashboard_has_every_panel_of_its_file(made: list[Document]) -> None:
    written = {path.stem: path for path in (CHART / "dashboards").glob("*.yaml")}
    assert set(dashboards(made)) == set(written) == {
        "fleet", "service", "worker", "transport", "scaling",
    }  # fmt: skip
    for name, dashboard in dashboards(made).items():
        short = yaml.safe_load(written[name].read_text())
        assert (dashboard["uid"], dashboard["title"]) == (f"tandem-{name}", short["title"])
        variables = [each["name"] for each in dashboard["templating"]["list"]]
        assert variables == ["datasource", *(each["name"] for each in short["variables"])]
        for panel, source in zip(dashboard["panels"], short["panels"], strict=True):
            assert panel["title"] == source["title"]
            asked = [(each["expr"], each["legendFormat"]) for each in panel["targets"]]
            assert asked == [(each["expr"], each["legend"]) for each in source["queries"]]


def test_queries_use_only_the_variables_of_their_dashboard(made: list[Document]) -> None:
    for dashboard in dashboards(made).values():
        known = {each["name"] for each in dashboard["templating"]["list"]} | {"__rate_interval"}
        text = json.dumps(dashboard).replace("${datasource}", "")
        used = {word.split('"')[0].split("\\")[0].split("]")[0] for word in text.split("$")[1:]}
        assert used <= known


def test_panels_do_not_overlap(made: list[Document]) -> None:
    for name, dashboard in dashboards(made).items():
        panels = dashboard["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        for one, other in combinations((panel["gridPos"] for panel in panels), 2):
            assert one["x"] + one["w"] <= 24
            beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
            below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
            assert beside or below, f"{name}: {one} and {other}"


def test_series_get_the_labels_that_queries_name(made: list[Document]) -> None:
    assert tuple(of_kind(made, "PodMonitor")["spec"]["podTargetLabels"]) == POD_TARGET_LABELS
    (endpoint,) = of_kind(made, "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["honorLabels"] is True, "`namespace` is the InferenceService's"


@pytest.mark.parametrize("part", ["podMonitor", "prometheusRule", "dashboards"])
def test_a_label_of_the_chart_s_own_is_refused(part: str) -> None:
    path = f"metrics.{part}.labels"
    said = refusal({f"metrics.{part}.enabled": True, path: {"helm.sh/chart": "x"}})
    assert f'{path} has "helm.sh/chart"' in said
    assert "leave it out" in said
