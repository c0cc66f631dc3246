"""What the API server says about a pod leads to the field that the user wrote.

The messages are those of a real API server: for a create 400 and 422, for server-side apply 500.
"""

from typing import Any

import pytest

from tandem_operator.api.rdma import RdmaMode
from tandem_operator.facts.observed import PoolView
from tandem_operator.manifests.fleet import build_owner
from tandem_operator.manifests.router import build_router
from tandem_operator.manifests.user_fields import find_fields
from tandem_operator.manifests.wiring import Wiring
from tandem_operator.manifests.worker import Blueprint, build_worker_pod
from tandem_operator.pair import Pair, Role
from tandem_operator.tests.facts import make_observed, make_spec

SIDECAR: dict[str, Any] = {"name": "side", "image": "x"}
TEMPLATE: dict[str, Any] = {
    "metadata": {"labels": {"team": "-"}},
    "spec": {
        "foo": 1,
        "nodeSelector": [1],
        "tolerations": [{"operator": "Exists", "effect": "Bad"}],
        "containers": [
            {**SIDECAR, "imag": "x"},
            {"name": "engine", "ports": [{"name": "x", "containerPort": "x"}]},
            {"name": "router", "bar": 1},
            {"name": "bare"},
        ],
    },
}
STRICT = 'Pod in version "v1" cannot be handled as a Pod: strict decoding error: '
GO = 'Pod in version "v1" cannot be handled as a Pod: json: cannot unmarshal '
TYPED = "failed to create typed patch object (default/d; apps/v1, Kind=Deployment): "
POD = {
    STRICT + 'unknown field "spec.foo"': "spec.foo",
    STRICT + 'unknown field "spec.containers[1].imag"': "spec.containers[0].imag",
    'Pod "d" is invalid: spec.containers[3].image: Required value': "spec.containers[3].image",
    'Pod "d" is invalid: spec.tolerations[0].effect: Unsupported value: "Bad"': (
        "spec.tolerations[0].effect"
    ),
    'Pod "d" is invalid: metadata.labels: Invalid value: "-": a valid label': "metadata.labels",
    GO + "array into Go struct field PodSpec.spec.nodeSelector of type": "spec.nodeSelector",
    GO + "string into Go struct field ContainerPort.spec.containers.ports.containerPort of type": (
        "spec.containers.ports.containerPort"
    ),
    STRICT + 'unknown field "spec.containers[0].env[99].x"': "",
    "quantities must match, so it cannot be handled as a Pod": "",
}
DEPLOYMENT = {
    TYPED + ".spec.template.spec.foo: field not declared in schema": "spec.foo",
    TYPED + '.spec.template.spec.containers[name="router"].bar: field not declared in schema': (
        "spec.containers[2].bar"
    ),
    'Deployment.apps "d" is invalid: spec.template.spec.tolerations[0].effect: Unsupported': (
        "spec.tolerations[0].effect"
    ),
}


def sent(spec: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A decode worker and the routers' Deployment."""
    pools = Pair.build(lambda role: PoolView(f"qwen-{role}", str(role), 1, 1, 1))
    observed = make_observed(spec, pools=pools)
    blueprint = Blueprint(Role.DECODE, "qwen-decode-a", "r1", Wiring(RdmaMode.NONE))
    deployment = build_router(observed, spec, "r1", build_owner(observed))[-1]
    return build_worker_pod(observed, spec, blueprint), deployment


@pytest.mark.parametrize(("message", "path"), POD.items())
def test_a_refused_pod(message: str, path: str) -> None:
    spec = make_spec(decode={"podTemplate": TEMPLATE})
    pod, _ = sent(spec)
    where = "spec.decode.podTemplate" + (f".{path}" if path else "")
    assert find_fields(message, pod, spec) == [where]


@pytest.mark.parametrize(("message", "path"), DEPLOYMENT.items())
def test_a_refused_deployment(message: str, path: str) -> None:
    spec = make_spec(router={"podTemplate": TEMPLATE})
    _, deployment = sent(spec)
    assert find_fields(message, deployment, spec) == [f"spec.router.podTemplate.{path}"]


def test_a_source_of_a_variable() -> None:
    env = [{"name": "A", "value": "1"}, {"name": "B", "valueFrom": {"fieldReff": {}}}]
    spec = make_spec(engine={"env": env})
    pod, _ = sent(spec)
    names = [item["name"] for item in pod["spec"]["containers"][0]["env"]]
    place = f"spec.containers[0].env[{names.index('B')}].valueFrom.fieldReff"
    said = find_fields(f'{STRICT}unknown field "{place}"', pod, spec)
    assert said == ["spec.engine.env[1].valueFrom.fieldReff"]


def test_what_the_operator_wrote_is_not_the_users() -> None:
    spec = make_spec()
    pod, deployment = sent(spec)
    for message in POD:
        assert find_fields(message, pod, spec) == []
    for message in DEPLOYMENT:
        assert find_fields(message, deployment, spec) == []
