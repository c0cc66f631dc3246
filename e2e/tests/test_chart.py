"""The chart, rendered and judged by the real helm and a real API server."""

import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem_operator.facts.observed import PoolView
from tandem_operator.names.annotations import ANNOTATION_HTTP_PORT
from tandem_operator.names.labels import LABEL_ROLE, LABEL_SERVICE, ROUTER, common_labels
from tandem_operator.names.pods import PORT_NAME_HTTP, PORT_NAME_METRICS
from tandem_operator.pair import Pair, Role
from tandem_operator.plan.service import reconcile
from tandem_operator.tests.facts import NOW, make_observed, make_spec
from tests.pod_targets import scraped

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

CHART = Path(__file__).resolve().parents[2] / "charts/tandem"
CI_VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
values = pytest.mark.parametrize("path", CI_VALUES, ids=lambda path: path.name)


def render(tandem: Any, *arguments: str) -> list[dict[str, Any]]:
    text = tandem.helm("template", "tandem", str(CHART), "-n", "tandem-system", *arguments).stdout
    return [document for document in yaml.safe_load_all(text) if document]


@values
def test_lint(tandem: Any, path: Path) -> None:
    tandem.helm("lint", "--strict", str(CHART), "-f", str(path))


@values
def test_the_api_server_takes_what_is_rendered(tandem: Any, path: Path) -> None:
    documents = render(tandem, "-f", str(path))
    # The CRDs of other projects, and those that the installed release owns.
    skipped = {"ServiceMonitor", "PodMonitor", "PrometheusRule", "CustomResourceDefinition"}
    known = [document for document in documents if document["kind"] not in skipped]
    for document in known:
        document["metadata"]["namespace"] = "default"
        document["metadata"]["name"] = "chart-test"
    tandem.kubectl(
        "create", "--dry-run=server", "-f", "-", input=yaml.safe_dump_all(known)
    )  # names of rules, selectors and probes are checked without anything being written


def test_namespaced_installs_hold_no_cluster_rights(tandem: Any) -> None:
    documents = render(tandem, "-f", str(CHART / "ci/namespaced-values.yaml"))
    kinds = {document["kind"] for document in documents}
    assert not {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"} & kinds
    roles = {d["metadata"]["namespace"] for d in documents if d["kind"] == "Role"}
    assert roles == {"team-a", "team-b", "tandem-system"}


def test_the_pod_passes_the_restricted_standard(tandem: Any) -> None:
    name = f"chart-restricted-{uuid.uuid4().hex[:8]}"
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": name,
            "labels": {"pod-security.kubernetes.io/warn": "restricted"},
        },
    }
    tandem.kubectl("apply", "-f", "-", input=yaml.safe_dump(namespace))
    try:
        (deployment,) = [d for d in render(tandem) if d["kind"] == "Deployment"]
        deployment["metadata"]["namespace"] = name
        done = tandem.kubectl(
            "create", "--dry-run=server", "-f", "-", input=yaml.safe_dump(deployment)
        )
        assert "would violate PodSecurity" not in done.stderr
    finally:
        tandem.kubectl("delete", "namespace", name, "--wait=false")


@pytest.mark.parametrize("namespaces", [[], ["team-a", "team-b"]])
def test_the_pod_monitor_selects_routers_and_workers(tandem: Any, namespaces: list[str]) -> None:
    values = ["--set", "metrics.podMonitor.enabled=true"]
    values += ["--set", f"watchNamespaces={{{','.join(namespaces)}}}"] if namespaces else []
    (monitor,) = [d for d in render(tandem, *values) if d["kind"] == "PodMonitor"]
    spec = monitor["spec"]
    wanted = {"matchNames": namespaces} if namespaces else {"any": True}
    assert spec["namespaceSelector"] == wanted
    ports = [endpoint.get("port") for endpoint in spec["podMetricsEndpoints"]]
    assert ports == [PORT_NAME_METRICS, PORT_NAME_HTTP, None]
    labels = common_labels("qwen", Role.DECODE)
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    assert [rule["key"] for rule in spec["selector"]["matchExpressions"]] == [LABEL_SERVICE]
    (rule,) = spec["podMetricsEndpoints"][1]["relabelings"]
    label = LABEL_ROLE.replace(".", "_").replace("/", "_")
    assert rule["sourceLabels"] == [f"__meta_kubernetes_pod_label_{label}"]
    assert (rule["regex"], rule["action"]) == (ROUTER, "drop")


@pytest.mark.parametrize("ip", ["10.0.0.7", "fd00::7"])
def test_the_pod_monitor_scrapes_each_worker_and_router_once(tandem: Any, ip: str) -> None:
    values = ["--set", "metrics.podMonitor.enabled=true"]
    (monitor,) = [d for d in render(tandem, *values) if d["kind"] == "PodMonitor"]
    host = f"[{ip}]" if ":" in ip else ip
    extra = {"containers": [{"name": "engine", "ports": [{"containerPort": 9999}]}]}
    for shape in ({}, {"hostNetwork": True}, {"hostNetwork": True, **extra}, extra):
        pool = {"replicas": 1, "podTemplate": {"spec": shape}}
        spec = make_spec(prefill=pool, decode=pool, router={"podTemplate": {"spec": shape}})
        pools = Pair.build(lambda role: PoolView(f"qwen-{role}", str(role), 1, 1, 1))
        plan = reconcile(make_observed(spec, pools=pools), NOW)
        (deployment,) = [child for child in plan.apply if child["kind"] == "Deployment"]
        router = deployment["spec"]["template"]
        numbers = {
            port["name"]: port["containerPort"]
            for port in router["spec"]["containers"][0]["ports"]
            if "name" in port
        }
        node = ip if "hostNetwork" in shape else "192.0.2.1"
        status = {"podIP": ip, "hostIP": node}
        assert scraped(monitor, annotated({**router, "status": status})) == [
            f"{host}:{numbers[PORT_NAME_METRICS]}"
        ]
        for pod in plan.create:
            port = pod["metadata"]["annotations"][ANNOTATION_HTTP_PORT]
            assert scraped(monitor, {**pod, "status": status}) == [f"{host}:{port}"], shape


def annotated(pod: dict[str, Any]) -> dict[str, Any]:
    return {**pod, "metadata": {"annotations": {}, **pod["metadata"]}}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("replicaz=2", "additional properties 'replicaz' not allowed"),
        ("metrics.service.enabled=false,metrics.serviceMonitor.enabled=true", "needs metrics"),
        ("serviceAccount.create=false", "serviceAccount.name is required"),
    ],
)
def test_contradictory_values_are_refused(tandem: Any, setting: str, words: str) -> None:
    done = tandem.helm("template", "tandem", str(CHART), "--set", setting, check=False)
    assert done.returncode != 0
    assert words in done.stderr


def test_digests_and_pull_policies_reach_every_image(tandem: Any) -> None:
    digest = "sha256:" + "0f" * 32
    places = ("image", "images.router", "images.engine")
    settings = [f"{place}.digest={digest}" for place in places]
    policies = ("image.pullPolicy=Always", "images.router.pullPolicy=Never")
    chosen = [word for setting in (*settings, *policies) for word in ("--set", setting)]
    (deployment,) = [d for d in render(tandem, *chosen) if d["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    prefix = "ghcr.io/tandem-inference/tandem-"
    assert container["image"] == f"{prefix}operator@{digest}"
    assert container["imagePullPolicy"] == "Always"
    told = [word for word in container["args"] if "image" in word or "pull" in word]
    assert told == [
        f"--router-image={prefix}router@{digest}",
        f"--engine-image={prefix}engine@{digest}",
        "--router-pull-policy=Never",
    ]
