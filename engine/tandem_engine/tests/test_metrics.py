"""Every metric is in one table, and what counts and what exports agree with it."""

import ast
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import tandem_engine
from tandem_engine.config import WorkerConfig
from tandem_engine.frames import CoreStats
from tandem_engine.metrics import METRICS, PREFIX
from tandem_engine.server.metrics import WorkerMetrics
from tandem_engine.server.status import WorkerStatus
from tandem_engine.tests.fleet import Fleet, prompt
from tandem_wire.messages import WorkerState

HANDOFF = Path(tandem_engine.__file__).parent / "handoff"


def labelled(name: str) -> str:
    """A name as the core reports it, with a value for each of its labels."""
    labels = ",".join(f'{label}="x"' for label in METRICS[name].labels)
    return f"{name}{{{labels}}}" if labels else name


def export(stats: CoreStats) -> dict[str, set[str]]:
    """Labels by name of everything at /metrics."""
    metrics = WorkerMetrics(WorkerStatus(WorkerConfig(model="mock://tiny")))
    metrics.update(stats)
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        family.name: set().union(*(sample.labels for sample in family.samples)) - {"le"}
        for family in families
    }


def test_every_metric_of_the_table_is_exported_with_its_labels() -> None:
    by_kind: dict[str, list[str]] = {"counter": [], "gauge": [], "histogram": []}
    for name, metric in METRICS.items():
        by_kind[metric.kind].append(name)
    exported = export(
        CoreStats(
            state=WorkerState(role="both"),
            counters={labelled(name): 1.0 for name in by_kind["counter"]},
            gauges={labelled(n): 1.0 for n in by_kind["gauge"] if not n.startswith("worker_")},
            observations={name: [1.0] for name in by_kind["histogram"]},
        )
    )
    for name, metric in METRICS.items():
        base = name.removesuffix("_total") if metric.kind == "counter" else name
        assert exported[PREFIX + base] == set(metric.labels), name


def test_an_unknown_name_is_not_exported_in_silence() -> None:
    with pytest.raises(KeyError, match="nonsense_total"):
        export(CoreStats(state=WorkerState(role="both"), counters={"nonsense_total": 1.0}))


def test_what_a_busy_worker_reports_is_in_the_table() -> None:
    fleet = Fleet("d", "p")
    fleet["d"].submit("fetched", prompt(100), peers=("p",))
    fleet["d"].submit("refused", [])
    fleet.settle()
    for name in "dp":
        fleet[name].stats()  # checks the names
    assert fleet["d"].stats().counters["refused_invalid_total"] == 1


def counted_by_the_handoff() -> dict[str, set[str]]:
    """Labels by name of every `….add("name", …, label=…)`."""
    found: dict[str, set[str]] = {}
    for path in sorted(HANDOFF.rglob("*.py")):
        if "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            first = node.args[0] if node.args else None
            if node.func.attr == "add" and isinstance(first, ast.Constant):
                labels = {keyword.arg for keyword in node.keywords if keyword.arg != "amount"}
                found.setdefault(str(first.value), set()).update(str(label) for label in labels)
    return found


def test_the_hand_off_counts_by_the_table() -> None:
    counted = counted_by_the_handoff()
    assert len(counted) > 10
    for name, labels in counted.items():
        assert METRICS[name].kind == "counter"
        assert set(METRICS[name].labels) == labels, name
