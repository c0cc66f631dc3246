"""What a container needs beside its image: when it is pulled, and where it can write."""

from dataclasses import replace
from typing import Any

import pytest

from tandem_operator.api.rdma import RdmaMode
from tandem_operator.facts.observed import Images, PoolView
from tandem_operator.manifests.fleet import build_owner
from tandem_operator.manifests.revision import revision_of
from tandem_operator.manifests.router import build_router
from tandem_operator.manifests.wiring import Wiring
from tandem_operator.manifests.worker import Blueprint, build_worker_pod
from tandem_operator.pair import Pair, Role
from tandem_operator.tests.facts import IMAGES, make_observed, make_spec

POOL = PoolView("qwen-decode", "uid-pool", 1, 1, 1)
# What torch, Triton, the CUDA driver, huggingface_hub and we ourselves ask for a place to write.
ROUTER_CACHES = {"HOME", "XDG_CACHE_HOME", "HF_HOME", "TANDEM_CACHE_DIR"}
WORKER_CACHES = {
    *ROUTER_CACHES,
    *("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH"),
}
PULLED = Images("router:1", "engine@sha256:1", "Never", "Always")
RDMA = Wiring(RdmaMode.DEVICE_PLUGIN, resource="rdma/ib")


def build(
    wiring: Wiring | None = None, images: Images = IMAGES, **changes: Any
) -> list[dict[str, Any]]:
    """The specs of a worker's and a router's pod."""
    spec = make_spec(**changes)
    observed = replace(make_observed(spec, pools=Pair(None, POOL)), images=images)
    worker = Blueprint(Role.DECODE, "qwen-decode-abc", "r1", wiring or Wiring(RdmaMode.NONE))
    pod = build_worker_pod(observed, spec, worker)
    router = build_router(observed, spec, "r1", build_owner(observed))[-1]
    return [pod["spec"], router["spec"]["template"]["spec"]]


def values(pod: dict[str, Any]) -> dict[str, str]:
    return {item["name"]: item.get("value", "") for item in pod["containers"][0]["env"]}


@pytest.mark.parametrize("uri", ["package://some-gguf", "mock://fast", "file:///m/x.gguf"])
@pytest.mark.parametrize("wiring", [None, RDMA], ids=["user", "root"])
def test_every_cache_is_on_a_volume(uri: str, wiring: Wiring | None) -> None:
    worker, router = build(wiring, model={"uri": uri})
    assert "--cache-dir" in worker["containers"][0]["args"]
    for pod, names in ((worker, WORKER_CACHES), (router, ROUTER_CACHES)):
        volume = next(item for item in pod["volumes"] if item["name"] == "cache")
        assert volume == {"name": "cache", "emptyDir": {}}
        container = pod["containers"][0]
        path = next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == "cache")
        told = values(pod)
        assert names <= set(told)
        assert {told[name].startswith(path) for name in names} == {True}


@pytest.mark.parametrize(("uri", "shared"), [("package://some-gguf", False), ("hf://o/m", True)])
def test_routers_share_the_claim_for_what_is_downloaded(uri: str, shared: bool) -> None:
    pods = build(model={"uri": uri, "cache": {"claimName": "models"}})
    claim = {"name": "cache", "persistentVolumeClaim": {"claimName": "models"}}
    assert [claim in pod["volumes"] for pod in pods] == [True, shared]
    assert ["fsGroup" in pod["securityContext"] for pod in pods] == [True, shared]


def test_a_users_cache_wins() -> None:
    worker, _ = build(engine={"env": [{"name": "HF_HOME", "value": "/models"}]})
    assert [e for e in worker["containers"][0]["env"] if e["name"] == "HF_HOME"] == [
        {"name": "HF_HOME", "value": "/models"}
    ]


def test_pull_policies_reach_the_containers() -> None:
    worker, router = build(RDMA, PULLED)
    pulled = [*worker["containers"], *worker["initContainers"]]
    assert [(c["image"], c["imagePullPolicy"]) for c in pulled] == [
        ("engine@sha256:1", "Always")
    ] * 2
    assert router["containers"][0]["imagePullPolicy"] == "Never"


def test_the_choice_is_kubernetes_own_without_a_pull_policy() -> None:
    for pod in build():
        assert "imagePullPolicy" not in pod["containers"][0]


def test_a_services_own_image_keeps_its_own_pull_policy() -> None:
    worker, _ = build(images=PULLED, engine={"image": "mine:1"})
    assert worker["containers"][0]["image"] == "mine:1"
    assert "imagePullPolicy" not in worker["containers"][0]


def test_a_pull_policy_replaces_no_worker() -> None:
    spec = make_spec()
    assert revision_of(spec, IMAGES) == revision_of(
        spec, replace(IMAGES, engine_pull_policy="Always")
    )
