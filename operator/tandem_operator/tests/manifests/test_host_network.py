"""Pods on their nodes' networks: no two of them want the same port of a node."""

from dataclasses import replace
from typing import Any

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.facts.observed import PoolView
from tandem_operator.facts.worker import WorkerPorts
from tandem_operator.manifests.fleet import build_owner
from tandem_operator.manifests.host_network import choose_ports, used_ports
from tandem_operator.manifests.router import build_router
from tandem_operator.manifests.worker import build_worker_like
from tandem_operator.observe.pod import read_pod, read_router_pod
from tandem_operator.pair import Pair, Role
from tandem_operator.plan.service import reconcile
from tandem_operator.tests.facts import NOW, make_observed, make_spec

POOLS = Pair.build(lambda role: PoolView(f"qwen-{role}", str(role), 2, 2, 2))
ON_NODES: dict[str, Any] = {"podTemplate": {"spec": {"hostNetwork": True}}}


def on_nodes(**changes: Any) -> InferenceServiceSpec:
    pool = {"replicas": 2, **ON_NODES}
    return make_spec(**{"prefill": pool, "decode": pool, **changes})


def new_pods(spec: InferenceServiceSpec) -> list[dict[str, Any]]:
    return list(reconcile(make_observed(spec, pools=POOLS), NOW).create)


def engine(pod: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = pod["spec"]["containers"][0]
    return container


def flag(container: dict[str, Any], name: str) -> int:
    args = container["args"]
    assert args.count(name) == 1
    return int(args[args.index(name) + 1])


def test_four_workers_fit_on_one_node() -> None:
    pods = new_pods(on_nodes())
    assert len(pods) == 4
    assert len(frozenset().union(*map(used_ports, pods))) == 12
    for pod in pods:
        # A declared container port would be a host port, by which the scheduler keeps pods apart.
        assert engine(pod)["ports"] == []
        assert pod["spec"]["dnsPolicy"] == "ClusterFirstWithHostNet"


def test_everyone_is_told_the_same_ports() -> None:
    for pod in new_pods(on_nodes()):
        container, notes = engine(pod), pod["metadata"]["annotations"]
        seen = read_pod({**pod, "metadata": {**pod["metadata"], "uid": "u"}})
        assert seen is not None
        ports = seen.ports
        for name, port in (
            ("http", ports.http),
            ("wire", ports.wire),
            ("bootstrap", ports.bootstrap),
        ):
            assert (
                flag(container, f"--{name}-port") == port == int(notes[f"tandem.dev/{name}-port"])
            )
        probed = {
            container[name]["httpGet"]["port"]
            for name in ("startupProbe", "readinessProbe", "livenessProbe")
        }
        assert probed == {ports.http}


def test_pods_with_a_network_of_their_own_keep_the_known_ports() -> None:
    for pod in new_pods(make_spec()):
        declared = {port["name"]: port["containerPort"] for port in engine(pod)["ports"]}
        assert declared == {"http": 8100, "wire": 8101, "bootstrap": 8998}
        assert used_ports(pod) == WorkerPorts().numbers
        assert "dnsPolicy" not in pod["spec"]


def test_taken_ports_are_left_out() -> None:
    first = choose_ports("default", "qwen-decode-a", ())
    again = choose_ports("default", "qwen-decode-a", ())
    assert first == again
    for taken in first.numbers:
        assert not first.numbers & choose_ports("default", "qwen-decode-a", {taken}).numbers


def test_ports_are_outside_what_nodes_give_to_others() -> None:
    for number in range(200):
        ports = choose_ports("default", f"qwen-decode-{number}", ()).numbers
        assert all(20000 <= port < 28000 for port in ports)


def test_a_worker_like_another_gets_ports_of_its_own() -> None:
    spec = on_nodes()
    pod = new_pods(spec)[0]
    seen = read_pod({**pod, "metadata": {**pod["metadata"], "uid": "u"}})
    assert seen is not None
    observed = make_observed(spec, pools=POOLS)
    copy = build_worker_like(observed, seen, "qwen-decode-z", 1, seen.ports.numbers)
    assert not used_ports(copy) & used_ports(pod)
    assert flag(engine(copy), "--http-port") in used_ports(copy)
    assert engine(copy)["readinessProbe"]["httpGet"]["port"] in used_ports(copy)


def test_a_worker_like_one_of_an_older_release() -> None:
    """Before, workers told only their bootstrap port, and had the known ports on nodes too."""
    spec = on_nodes()
    for old in (*new_pods(spec)[:1], *new_pods(make_spec())[:1]):
        for name in ("http", "wire"):
            del old["metadata"]["annotations"][f"tandem.dev/{name}-port"]
        seen = read_pod({**old, "metadata": {**old["metadata"], "uid": "u"}})
        assert seen is not None
        assert (seen.ports.http, seen.ports.wire) == (8100, 8101)
        observed = make_observed(spec, pools=POOLS)
        copy = build_worker_like(observed, seen, "qwen-decode-z", 1)
        assert len(used_ports(copy)) == (3 if copy["spec"].get("hostNetwork") else 1)


def test_a_users_own_dns_policy_and_ports_stay() -> None:
    template = {
        "spec": {
            "hostNetwork": True,
            "dnsPolicy": "Default",
            "containers": [
                {"name": "engine", "ports": [{"name": "debug", "containerPort": 5678}]},
                {"name": "proxy", "image": "proxy:1", "ports": [{"containerPort": 9}]},
            ],
        }
    }
    pool = {"replicas": 1, "podTemplate": template}
    pod = new_pods(on_nodes(prefill=pool, decode=pool))[0]
    assert pod["spec"]["dnsPolicy"] == "Default"
    assert [port["name"] for port in engine(pod)["ports"]] == ["debug"]
    assert pod["spec"]["containers"][1]["ports"] == [{"containerPort": 9}]


def router_pod(spec: InferenceServiceSpec) -> dict[str, Any]:
    observed = make_observed(spec)
    children = build_router(observed, spec, "r1", build_owner(observed))
    deployment = next(child for child in children if child["kind"] == "Deployment")
    template: dict[str, Any] = deployment["spec"]["template"]
    return template


def test_routers_of_two_roll_outs_fit_on_one_node() -> None:
    ports: list[int] = []
    for image in ("router:1", "router:2"):
        container = {"name": "router", "image": image}
        template = {"spec": {"hostNetwork": True, "containers": [container]}}
        pod = router_pod(on_nodes(router={"podTemplate": template}))
        assert pod["spec"]["dnsPolicy"] == "ClusterFirstWithHostNet"
        declared = {p["name"]: p["containerPort"] for p in pod["spec"]["containers"][0]["ports"]}
        assert declared.keys() == {"http", "metrics"}
        assert flag(pod["spec"]["containers"][0], "--port") == declared["http"]
        assert flag(pod["spec"]["containers"][0], "--metrics-port") == declared["metrics"]
        assert {*declared.values()} <= {*range(28000, 30000)}
        ready = {"type": "Ready", "status": "True"}
        address = read_router_pod(
            {
                "metadata": {**pod["metadata"], "uid": "u"},
                "spec": pod["spec"],
                "status": {"podIP": "10.0.0.1", "conditions": [ready]},
            }
        )
        assert address is not None
        assert address.port == declared["metrics"]
        ports += declared.values()
    assert len(set(ports)) == 4


def test_failed_workers_keep_their_ports_until_they_are_gone() -> None:
    spec = on_nodes()
    pods = new_pods(spec)
    seen = tuple(
        replace(pod, ready=False)
        for item in pods
        if (
            pod := read_pod(
                {**item, "metadata": {**item["metadata"], "uid": item["metadata"]["name"]}}
            )
        )
    )
    grown = on_nodes(decode={"replicas": 4, **ON_NODES})
    pools = POOLS.put(Role.DECODE, PoolView("qwen-decode", "decode", 4, 4, 4))
    more = reconcile(make_observed(grown, pools=pools, pods=seen), NOW).create
    assert more
    taken = frozenset().union(*map(used_ports, pods))
    assert not taken & frozenset().union(*map(used_ports, more))
