"""Configuration, health, metrics, kopf's settings and triggers."""

import importlib.metadata
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import kopf
import pytest
from aiohttp.test_utils import unused_port

from tandem_operator.clients.children import Children
from tandem_operator.clients.cluster import KINDS
from tandem_operator.config import read_config
from tandem_operator.main import main
from tandem_operator.plan import Plan
from tandem_operator.runtime.health import HealthServer
from tandem_operator.runtime.metrics import Metrics
from tandem_operator.runtime.serving import WATCHED
from tandem_operator.runtime.watch import Patient, build_registry, build_settings
from tandem_operator.tests.facts import Fleet, make_spec


def test_flags_win_over_the_environment() -> None:
    env = {"POD_NAME": "op-1", "POD_NAMESPACE": "tandem", "TANDEM_NAMESPACE": "a,b"}
    config = read_config([], env)
    assert (config.identity, config.own_namespace) == ("op-1", "tandem")
    assert config.namespaces == ("a", "b")
    config = read_config(["--namespace=c", "--engine-image=e:1", "--no-leader-election"], env)
    assert config.namespaces == ("c",)
    assert config.engine_image == "e:1"
    assert not config.leader_election
    assert read_config([], {"POD_NAME": "x"}).namespaces == ()
    assert config.engine_pull_policy == ""
    assert read_config(["--router-pull-policy=Never"], {}).router_pull_policy == "Never"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "there is no such file"),
        ("a: b\n", "current-context"),
        ("just a word", "name a kubeconfig file"),
        ("[", "name a kubeconfig file"),
    ],
    ids=["missing", "incomplete", "text", "not YAML"],
)
def test_a_useless_kubeconfig_ends_in_one_line(
    text: str | None, complaint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main([f"--kubeconfig={path}"])
    line = str(ended.value)
    assert line.startswith(f"tandem-operator: --kubeconfig {path} can't be used")
    assert complaint in line
    assert "\n" not in line
    assert capfd.readouterr().out == ""


def test_no_cluster_at_all_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as ended:
        main([])
    line = str(ended.value)
    assert line.startswith("tandem-operator: there is no cluster to work in")
    assert line.endswith("or name a file with --kubeconfig")
    assert "\n" not in line


def test_an_unknown_flag_ends_with_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_config(["--bogus"], {})
    assert "--bogus" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "remedy"),
    [
        (["--log-level=loud"], "use one of debug, info, warning, error"),
        (["--health-port=0"], "use 1 to 65535"),
        (["--metrics-port=65536"], "use 1 to 65535"),
        (["--concurrency=0"], "use 1 or more"),
        (["--resync-seconds=0"], "use a number above 0"),
        (["--resync-seconds=nan"], "use a number above 0"),
        (["--lease=short"], "--lease=short"),
    ],
)
def test_a_wrong_flag_ends_with_its_remedy(
    argv: list[str], remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read_config(argv, {})
    told = capsys.readouterr().err
    assert remedy in told
    assert argv[0].partition("=")[0] in told


def test_a_wrong_log_level_of_the_environment_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert read_config([], {"TANDEM_LOG_LEVEL": "Warning"}).log_level == "warning"
    with pytest.raises(SystemExit):
        read_config([], {"TANDEM_LOG_LEVEL": "loud"})
    assert "--log-level: 'loud' is no log level" in capsys.readouterr().err


def test_the_default_images_are_of_the_installed_version() -> None:
    version = importlib.metadata.version("tandem-inference")
    config = read_config([], {})
    assert config.router_image.endswith(f"/tandem-router:{version}")
    assert config.engine_image.endswith(f"/tandem-engine:{version}")


async def test_health_and_metrics_are_served() -> None:
    metrics = Metrics()
    ports = unused_port(), unused_port()
    problems: dict[str, str] = {}
    server = HealthServer(metrics.registry, *ports, problems)
    await server.start()
    async with httpx.AsyncClient(trust_env=False) as client:
        assert (await client.get(f"http://127.0.0.1:{ports[0]}/healthz")).status_code == 200
        assert (await client.get(f"http://127.0.0.1:{ports[0]}/readyz")).status_code == 200
        problems["team-a"] = "Pod: pods is forbidden (HTTP 403)"
        told = await client.get(f"http://127.0.0.1:{ports[0]}/readyz")
        assert (told.status_code, told.text) == (503, f"not served: team-a: {problems['team-a']}\n")
        assert (await client.get(f"http://127.0.0.1:{ports[0]}/healthz")).status_code == 200
        text = (await client.get(f"http://127.0.0.1:{ports[1]}/metrics")).text
    await server.stop()
    assert "tandem_operator_leading" in text


def test_metrics_follow_a_service_and_forget_it() -> None:
    fleet, metrics = Fleet(make_spec()), Metrics()
    for _ in range(4):
        observed = fleet.observe()
        metrics.record(observed, fleet.step())
    labels = {"namespace": "default", "service": "qwen"}
    value = metrics.registry.get_sample_value
    decode = {**labels, "role": "decode", "state": "ready"}
    assert value("tandem_operator_replicas", decode) == 2
    assert value("tandem_operator_rollout_progress", labels) == 1.0
    created = value("tandem_operator_decisions_total", {**labels, "step": "create"})
    assert created == 3
    ready = {**labels, "type": "Ready"}
    assert value("tandem_operator_condition", ready) == 1.0
    assert value("tandem_operator_condition", {**labels, "type": "Degraded"}) == 0.0
    metrics.forget("default", "qwen")
    assert value("tandem_operator_replicas", decode) is None
    assert value("tandem_operator_rollout_progress", labels) is None
    assert value("tandem_operator_condition", ready) is None


def test_a_condition_that_is_unknown_has_no_value() -> None:
    metrics, observed = Metrics(), Fleet(make_spec()).observe()
    labels = {"namespace": "default", "service": "qwen", "type": "TransportVerified"}
    for status, shown in (("Unknown", None), ("True", 1.0), ("False", 0.0), ("Unknown", None)):
        condition = {"type": "TransportVerified", "status": status}
        metrics.record(observed, Plan(status={"conditions": [condition]}))
        assert metrics.registry.get_sample_value("tandem_operator_condition", labels) == shown


def test_kopf_writes_nothing() -> None:
    settings = build_settings()
    assert not settings.posting.enabled
    # It would kill the process some time after the watches of one namespace ended.
    assert settings.process.ultimate_exiting_timeout is None


def test_watches_are_patient() -> None:
    seen: list[None] = []
    patient = Patient(lambda: seen.append(None))
    assert list(islice(patient, 6)) == [0.2, 0.5, 1, 2, 3, 3]
    assert len(seen) == 6


class Recorder:
    def __init__(self) -> None:
        self.keys: list[tuple[str, str]] = []

    def trigger(self, key: tuple[str, str]) -> None:
        self.keys.append(key)

    def known(self) -> list[tuple[str, str]]:
        return [("ns", "one"), ("other", "two")]


def handlers(recorder: Recorder, children: Children | None = None) -> dict[str, Any]:
    registry = build_registry(recorder, children or Children())  # type: ignore[arg-type]
    found: list[Any] = [handler.fn for handler in registry._watching._handlers]
    return {handler.__name__: handler for handler in found}


def test_a_namespace_is_served_only_when_every_watched_kind_can_be_read() -> None:
    registry = build_registry(Recorder(), lambda *_: None)  # type: ignore[arg-type]
    found: list[Any] = list(registry._watching._handlers)
    assert {handler.selector.any_name for handler in found} == {KINDS[k].plural for k in WATCHED}


def body(**metadata: Any) -> kopf.Body:
    raw: Any = {"kind": "Pod", "metadata": {"namespace": "ns", "uid": "u", **metadata}}
    return kopf.Body(raw)


async def test_own_status_writes_are_no_news() -> None:
    recorder = Recorder()
    on_service = handlers(recorder)["on_service"]
    await on_service(type="MODIFIED", body=body(name="one", generation=1))
    await on_service(type="MODIFIED", body=body(name="one", generation=1))
    assert recorder.keys == [("ns", "one")]
    await on_service(type="MODIFIED", body=body(name="one", generation=2))
    await on_service(type="DELETED", body=body(name="one", generation=2))
    assert len(recorder.keys) == 3


async def test_pods_lead_to_their_service() -> None:
    recorder = Recorder()
    labels = {"tandem.dev/service": "one"}
    await handlers(recorder)["on_pod"](body=body(name="pod", labels=labels))
    assert recorder.keys == [("ns", "one")]


async def test_children_lead_to_their_service() -> None:
    recorder, children = Recorder(), Children()
    on_child = handlers(recorder, children)["on_child"]

    async def see(event: str, kind: str, version: int, **meta: Any) -> int:
        """How many times the service was triggered."""
        recorder.keys.clear()
        seen = body(name="x", resourceVersion=str(version), **meta)
        await on_child(type=event, body=seen, param=kind)
        assert set(recorder.keys) <= {("ns", "one")}
        return len(recorder.keys)

    ours = {"tandem.dev/service": "one"}
    assert await see("ADDED", "Service", 1) == 0, "without a label it is nobody's"
    assert children.content("Service", "ns", "x") == ""
    assert await see("ADDED", "Service", 2, labels=ours) == 1
    assert await see("MODIFIED", "Service", 3, labels=ours) == 0, "only its status changed"
    assert await see("MODIFIED", "Service", 4, labels=ours | {"a": "b"}) == 1
    assert await see("MODIFIED", "Service", 5) == 1, "somebody took its label away"
    assert [child.name for child in children.of_service("ns", "one")] == ["x"]
    assert await see("DELETED", "Service", 6, labels=ours) == 1
    assert children.of_service("ns", "one") == ()
    assert await see("ADDED", "Deployment", 7, labels=ours) == 1
    assert await see("MODIFIED", "Deployment", 8, labels=ours) == 1, "its status says who is ready"


async def test_a_policy_wakes_the_services_of_its_namespace() -> None:
    recorder = Recorder()
    await handlers(recorder)["on_policy"](namespace="ns")
    assert recorder.keys == [("ns", "one")]
