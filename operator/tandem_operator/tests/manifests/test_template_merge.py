"""A podTemplate adds to what the operator wrote, and takes away only what it says."""

from typing import Any

import pytest

from tandem_operator.api.rdma import RdmaMode
from tandem_operator.facts.observed import PoolView
from tandem_operator.manifests.wiring import Wiring
from tandem_operator.manifests.worker import Blueprint, build_worker_pod
from tandem_operator.pair import Pair, Role
from tandem_operator.tests.facts import make_observed, make_spec

REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"


def build(spec: dict[str, Any], mode: RdmaMode = RdmaMode.NONE, **changes: Any) -> dict[str, Any]:
    """The pod spec of a decode worker whose template has `spec`."""
    service = make_spec(decode={"podTemplate": {"spec": spec}}, **changes)
    observed = make_observed(service, pools=Pair(None, PoolView("qwen-decode", "u", 1, 1, 1)))
    worker = Blueprint(Role.DECODE, "qwen-decode-a", "r1", Wiring(mode))
    made: dict[str, Any] = build_worker_pod(observed, service, worker)["spec"]
    return made


def engine(pod: dict[str, Any]) -> dict[str, Any]:
    return next(item for item in pod["containers"] if item["name"] == "engine")


def test_the_users_affinity_is_added_to_ours() -> None:
    term = {"labelSelector": {"matchLabels": {"a": "b"}}, "topologyKey": "zone"}
    nodes = {"nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}]}
    theirs: dict[str, Any] = {
        "podAffinity": {REQUIRED: [term], PREFERRED: [{"weight": 1, "podAffinityTerm": term}]},
        "podAntiAffinity": {REQUIRED: [term]},
        "nodeAffinity": {REQUIRED: nodes},
    }
    fabric = {"mode": "None", "placement": {"sameFabricKey": "fabric"}}
    made = build({"affinity": theirs}, rdma=fabric)["affinity"]
    keys = [item["topologyKey"] for item in made["podAffinity"][REQUIRED]]
    assert keys == ["fabric", "zone"]
    assert made["podAffinity"][PREFERRED] == theirs["podAffinity"][PREFERRED]
    assert made["podAntiAffinity"] == theirs["podAntiAffinity"]
    assert made["nodeAffinity"] == theirs["nodeAffinity"]


def test_the_users_capabilities_are_added_to_ours() -> None:
    added = {"capabilities": {"add": ["SYS_PTRACE"]}}
    template = {"containers": [{"name": "engine", "securityContext": added}]}
    rdma = {"mode": "HostPath"}
    made = engine(build(template, RdmaMode.HOST_PATH, rdma=rdma))["securityContext"]
    assert made["capabilities"]["add"] == ["IPC_LOCK", "SYS_RESOURCE", "SYS_PTRACE"]
    assert made["capabilities"]["drop"] == ["ALL"]


@pytest.mark.parametrize("nothing", [None, {"$patch": "delete"}], ids=["null", "directive"])
def test_what_a_template_takes_away(nothing: Any) -> None:
    template = {
        "securityContext": {"seccompProfile": nothing},
        "containers": [{"name": "engine", "livenessProbe": nothing, "resources": nothing}],
    }
    plain, made = build({}), build(template)
    assert "livenessProbe" in engine(plain)
    assert "livenessProbe" not in engine(made)
    assert "resources" not in engine(made)
    assert made["securityContext"].keys() == plain["securityContext"].keys() - {"seccompProfile"}


def test_directives_in_lists_and_objects() -> None:
    template = {
        "securityContext": {"$patch": "replace", "runAsUser": 7},
        "volumes": [{"name": "shm", "$patch": "delete"}, {"name": "none", "$patch": "delete"}],
        "containers": [
            {"name": "engine", "volumeMounts": [{"mountPath": "/dev/shm", "$patch": "delete"}]},
            {"name": "side", "image": "x", "livenessProbe": {"$patch": "replace", "exec": {}}},
        ],
    }
    made = build(template)
    assert made["securityContext"] == {"runAsUser": 7}
    assert "shm" not in {volume["name"] for volume in made["volumes"]}
    assert "/dev/shm" not in {mount["mountPath"] for mount in engine(made)["volumeMounts"]}
    assert made["containers"][1]["livenessProbe"] == {"exec": {}}
    assert "$patch" not in str(made)


def test_a_volume_a_probe_and_a_variable_have_one_source() -> None:
    template = {
        "volumes": [{"name": "shm", "hostPath": {"path": "/big"}}],
        "containers": [
            {
                "name": "engine",
                "livenessProbe": {"tcpSocket": {"port": "http"}},
                "readinessProbe": {"httpGet": {"path": "/other"}},
                "env": [{"name": "POD_NAME", "valueFrom": {"secretKeyRef": {}}}],
            }
        ],
    }
    plain, made = build({}), build(template)
    shm = [volume for volume in made["volumes"] if volume["name"] == "shm"]
    assert shm == [{"name": "shm", "hostPath": {"path": "/big"}}]
    probe = engine(made)["livenessProbe"]
    assert "httpGet" not in probe
    assert probe["periodSeconds"] == engine(plain)["livenessProbe"]["periodSeconds"]
    assert engine(made)["readinessProbe"]["httpGet"] == {"path": "/other", "port": "http"}
    token = next(v for v in engine(made)["env"] if v["name"] == "POD_NAME")
    assert token == {"name": "POD_NAME", "valueFrom": {"secretKeyRef": {}}}
