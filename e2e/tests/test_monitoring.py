"""Alerts and dashboards of the chart, held against the metrics that the programs really export."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem_engine.cache.ledger import BlockLedger
from tandem_operator.api.conditions import ConditionType
from tandem_operator.pair import Role
from tandem_operator.runtime.metrics import Metrics
from tandem_operator.tests.facts import Fleet, make_spec
from tests.exported import exported_metrics, series
from tests.promql import QueryError, Selector, read

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/tandem"
PAGE = (ROOT / "docs/monitoring.md").read_text()
DASHBOARDS = sorted((CHART / "dashboards").glob("*.yaml"))
SERIES = series()
ALERTS: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((CHART / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]


@dataclass(frozen=True)
class Query:
    """A query with the labels that the text beside it shows."""

    where: str
    text: str
    shown: frozenset[str]


def queries_of(path: Path) -> Iterator[Query]:
    content = yaml.safe_load(path.read_text())
    for variable in content["variables"]:
        where = f"{path.name}: ${variable['name']}"
        yield Query(where, variable["of"], frozenset({variable["label"]}))
    for panel in content["panels"]:
        for query in panel["queries"]:
            shown = frozenset(re.findall(r"{{(\w+)}}", query["legend"]))
            yield Query(f"{path.name}: {panel['title']}", query["expr"], shown)


def alert_queries() -> Iterator[Query]:
    for rule in ALERTS:
        shown = frozenset(re.findall(r"{{ \$labels\.(\w+) }}", rule["summary"]))
        yield Query(f"alert {rule['alert']}", rule["expr"], shown)


def faults(query: Query) -> Iterator[str]:
    """What is wrong with a query."""
    selectors = read(query.text)
    if not selectors:
        yield f"{query.where}: there is no metric in {query.text}"
    for selector in selectors:
        yield from (f"{query.where}: {fault}" for fault in faults_of(selector))
    for selector in selectors[:1]:
        kept = selector.kept
        if kept is None:
            kept = labels_of(selector)
        for label in sorted(query.shown - kept):
            yield f"{query.where}: shows {label}, which {selector.metric} doesn't have here"


def labels_of(selector: Selector) -> frozenset[str]:
    exporters = [labels for _, labels in SERIES.get(selector.metric, [])]
    return frozenset().union(*exporters)


def faults_of(selector: Selector) -> Iterator[str]:
    name = selector.metric
    exporters = SERIES.get(name, [])
    if not exporters:
        yield f"nobody exports {name}"
        return
    able = [metric.program for metric, labels in exporters if selector.labels <= labels]
    if not able:
        unknown = selector.labels - labels_of(selector)
        yield f"{name} has no label {', '.join(sorted(unknown)) or 'of all that are named'}"
    if len(able) > 1:
        yield f"{' and '.join(able)} export {name}: name a label that only one of them has"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_asks_for_what_is_exported(path: Path) -> None:
    assert [fault for query in queries_of(path) for fault in faults(query)] == []


def test_alerts_ask_for_what_is_exported() -> None:
    assert [fault for query in alert_queries() for fault in faults(query)] == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("sum(tandem_nonsense_total)", "nobody exports tandem_nonsense_total"),
        ("sum by (pod, role) (tandem_prefilling)", "tandem_prefilling has no label role"),
        ('tandem_inflight{pool="decode"}', "tandem_inflight has no label pool"),
        ("sum(tandem_requests_total)", "router and worker export tandem_requests_total"),
        ("tandem_leases == on (namespace, name) tandem_pushing", "tandem_leases has no label name"),
        ("sum by (pod) (tandem_leases)", "shows class"),
    ],
)
def test_a_wrong_query_is_found(text: str, fault: str) -> None:
    assert fault in "; ".join(faults(Query("here", text, frozenset({"class"}))))


@pytest.mark.parametrize(
    "text",
    ["rate(tandem_leases[5m]", "irate(tandem_leases[5m])", "tandem_leases{pod}", "sum(a) by (b)"],
)
def test_a_query_that_the_reader_does_not_understand_is_an_error(text: str) -> None:
    with pytest.raises(QueryError):
        list(faults(Query("here", text, frozenset())))


def test_the_values_that_queries_compare_with_are_real() -> None:
    fleet, metrics = Fleet(make_spec()), Metrics()
    for _ in range(4):
        metrics.record(fleet.observe(), fleet.step())
    real: dict[str, set[str]] = {
        "type": {str(kind) for kind in ConditionType},
        "use": set(BlockLedger(4, 16).counts()),
        "tandem_dev_role": {str(role) for role in Role},
        "state": set(),
        "role": set(),
    }
    for family in metrics.registry.collect():
        for sample in family.samples:
            for label in ("state", "role"):
                real[label] |= {value for name, value in sample.labels.items() if name == label}
    seen: dict[str, set[str]] = {label: set() for label in real}
    everything = [*alert_queries(), *(q for path in DASHBOARDS for q in queries_of(path))]
    for selector in (each for query in everything for each in read(query.text)):
        for label, (_, text) in selector.matchers.items():
            if label in real:
                seen[label] |= set(text.split("|"))
    assert all(seen.values())
    assert {
        label: values - real[label] for label, values in seen.items() if values - real[label]
    } == {}


def test_every_alert_has_a_severity_and_a_duration() -> None:
    names = [rule["alert"] for rule in ALERTS]
    assert len(set(names)) == len(names)
    for rule in ALERTS:
        assert set(rule) == {"alert", "severity", "for", "expr", "summary"}, rule["alert"]
        assert rule["severity"] in ("critical", "warning")
        assert re.fullmatch(r"\d+[mh]", rule["for"])


def test_the_page_has_a_section_for_each_alert() -> None:
    sections = re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]
    found = {text.split("\n", 1)[0]: text for text in sections if text.startswith("Tandem")}
    assert list(found) == [rule["alert"] for rule in ALERTS]
    for name, text in found.items():
        assert "**Do:**" in text, name


def test_the_page_lists_every_metric_with_its_labels() -> None:
    rows = re.findall(r"^\| `(tandem_\w+)` \| (\w+) \| ([^|]*) \|", PAGE, flags=re.MULTILINE)
    listed = sorted(
        (name, kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows
    )
    assert listed == sorted((each.name, each.kind, each.labels) for each in exported_metrics())
