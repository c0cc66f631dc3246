"""The worker pod and the routers: flags, probes, security, storage, templates."""

from typing import Any

import pytest

from tandem_operator.api.pod_template import PodTemplate
from tandem_operator.api.rdma import RdmaMode
from tandem_operator.facts.observed import PoolView
from tandem_operator.manifests.fleet import build_fleet, build_owner
from tandem_operator.manifests.pod_template import merge_template
from tandem_operator.manifests.revision import revision_of
from tandem_operator.manifests.router import build_router
from tandem_operator.manifests.wiring import Wiring
from tandem_operator.manifests.worker import Blueprint, build_worker_pod
from tandem_operator.pair import Pair, Role
from tandem_operator.plan.support import find_blockers
from tandem_operator.tests.facts import ADMIN, IMAGES, make_observed, make_spec

PLAIN_VOLUMES = ["shm", "cache", "admin-token", "tandem-tmp"]
POOL = PoolView("qwen-decode", "uid-pool", 1, 1, 1)


def build(**changes: Any) -> dict[str, Any]:
    spec = make_spec(**changes)
    worker = Blueprint(Role.DECODE, "qwen-decode-abc", "r1", Wiring(RdmaMode.NONE))
    return build_worker_pod(make_observed(spec, pools=Pair(None, POOL)), spec, worker)


def flags(pod: dict[str, Any]) -> dict[str, str]:
    args = pod["spec"]["containers"][0]["args"]
    pairs = [
        arg for arg in args if arg not in ("--checksum", "--no-checksum", "--trust-remote-code")
    ]
    return dict(zip(pairs[::2], pairs[1::2], strict=True))


def env(pod: dict[str, Any]) -> dict[str, Any]:
    return {item["name"]: item for item in pod["spec"]["containers"][0]["env"]}


def test_flags_say_what_the_spec_says() -> None:
    pod = build(
        model={"uri": "hf://org/m", "name": "served", "maxModelLen": 4096, "revision": "v2"},
        engine={"pageSize": 32, "options": {"kvMemory": "1Gi", "maxWaiting": 12, "numThreads": 3}},
        kvTransfer={"checksum": False, "bootstrapPort": 9000},
    )
    given = flags(pod)
    assert given["--model"] == "hf://org/m@v2"
    assert given["--served-model-name"] == "served"
    assert given["--role"] == "decode"
    assert given["--revision"] == "r1"
    assert given["--page-size"] == "32"
    assert given["--max-model-len"] == "4096"
    assert given["--kv-memory"] == str(2**30)
    assert given["--max-waiting"] == "12"
    assert given["--bootstrap-port"] == "9000"
    assert given["--cache-dir"] == "/mnt/cache"
    assert env(pod)["OMP_NUM_THREADS"]["value"] == "3"
    assert "TANDEM_ENGINE_OPTIONS" not in env(pod)
    assert "--no-checksum" in pod["spec"]["containers"][0]["args"]
    assert pod["metadata"]["annotations"]["tandem.dev/bootstrap-port"] == "9000"


@pytest.mark.parametrize(
    ("gpus", "ranks", "blocked"),
    [("1", 1, False), ("4", 4, False), ("4", 2, True), ("0", 2, True)],
)
def test_a_worker_of_several_gpus(gpus: str, ranks: int, blocked: bool) -> None:
    limits = {} if gpus == "0" else {"nvidia.com/gpu": gpus}
    changes: dict[str, Any] = {"decode": {"tensorParallel": ranks, "resources": {"limits": limits}}}
    blockers = find_blockers(make_spec(**changes))
    assert len(blockers) == blocked
    if blocked:
        assert f"set decode.resources.limits[nvidia.com/gpu] to {ranks}" in blockers[0]
    assert flags(build(**changes)).get("--tensor-parallel") == (str(ranks) if ranks > 1 else None)


def test_several_nodes_per_worker_are_refused() -> None:
    pool = {"tensorParallel": 2, "nodesPerWorker": 2}
    (blocker,) = find_blockers(make_spec(decode=pool))
    assert "nodesPerWorker" in blocker


def test_labels_owner_and_identity() -> None:
    pod = build()
    labels = pod["metadata"]["labels"]
    assert labels["tandem.dev/service"] == "qwen"
    assert labels["tandem.dev/role"] == "decode"
    assert labels["tandem.dev/group"] == "abc"
    assert labels["tandem.dev/revision"] == "r1"
    owner = pod["metadata"]["ownerReferences"][0]
    assert (owner["kind"], owner["uid"], owner["controller"]) == ("WorkerPool", "uid-pool", True)
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert pod["spec"]["serviceAccountName"] == "qwen-worker"
    assert pod["spec"]["restartPolicy"] == "Never"
    assert pod["spec"]["terminationGracePeriodSeconds"] == 90


def test_a_plain_pod_passes_pod_security_restricted() -> None:
    pod = build()
    security = pod["spec"]["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    container = pod["spec"]["containers"][0]["securityContext"]
    assert container == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert all("hostPath" not in volume for volume in pod["spec"]["volumes"])


def test_the_token_is_mounted_and_nowhere_else() -> None:
    pod = build()
    assert flags(pod)["--admin-token-file"] == "/etc/tandem/admin/token"
    volume = {"name": "admin-token", "secret": {"secretName": ADMIN.secret_name}}
    assert volume in pod["spec"]["volumes"]
    mount = {"name": "admin-token", "mountPath": "/etc/tandem/admin", "readOnly": True}
    assert mount in pod["spec"]["containers"][0]["volumeMounts"]
    assert not [name for name in env(pod) if "TOKEN" in name]


@pytest.mark.parametrize(
    ("uri", "flag", "volume"),
    [
        ("pvc://claim/a/b", "file:///mnt/model/a/b", "persistentVolumeClaim"),
        ("file:///models/x", "file:///models/x", "hostPath"),
        ("oci://registry/image:tag", "file:///mnt/model", "image"),
    ],
)
def test_models_are_mounted(uri: str, flag: str, volume: str) -> None:
    pod = build(model={"uri": uri})
    assert flags(pod)["--model"] == flag
    assert any(volume in item for item in pod["spec"]["volumes"])


def test_the_download_secret_is_only_referred_to() -> None:
    found = env(build(model={"uri": "hf://org/m", "secretName": "hf"}))["HF_TOKEN"]
    assert found["valueFrom"]["secretKeyRef"] == {"name": "hf", "key": "HF_TOKEN", "optional": True}


def test_a_cache_claim_is_shared() -> None:
    pod = build(model={"uri": "hf://org/m", "cache": {"claimName": "models"}})
    cache = next(volume for volume in pod["spec"]["volumes"] if volume["name"] == "cache")
    assert cache["persistentVolumeClaim"] == {"claimName": "models"}
    assert pod["spec"]["securityContext"]["fsGroup"] == 65532


def test_shm_workers_meet_on_the_node() -> None:
    pod = build(kvTransfer={"backend": "Shm"})
    assert env(pod)["TANDEM_SHM_DIR"]["value"] == "/dev/shm"
    assert pod["spec"]["volumes"][0]["hostPath"]["path"] == "/dev/shm"


def test_the_users_environment_wins() -> None:
    pod = build(engine={"env": [{"name": "UCX_TLS", "value": "all"}]})
    assert env(pod)["UCX_TLS"]["value"] == "all"
    assert (
        len([item for item in pod["spec"]["containers"][0]["env"] if item["name"] == "UCX_TLS"])
        == 1
    )


def test_fabric_affinity() -> None:
    pod = build(rdma={"mode": "None", "placement": {"sameFabricKey": "fabric"}})
    terms = pod["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert terms[0]["topologyKey"] == "fabric"


def test_templates_merge_by_name() -> None:
    template = PodTemplate.model_validate(
        {
            "metadata": {"labels": {"team": "ml"}, "annotations": {"a": "b"}},
            "spec": {
                "nodeSelector": {"gpu": "h100"},
                "tolerations": [{"key": "gpu", "operator": "Exists"}],
                "volumes": [{"name": "extra", "emptyDir": {}}],
                "containers": [
                    {"name": "engine", "env": [{"name": "X", "value": "1"}], "livenessProbe": None},
                    {"name": "sidecar", "image": "side:1"},
                ],
            },
        }
    )
    pod = merge_template(build(), template)
    assert pod["metadata"]["labels"]["team"] == "ml"
    assert pod["metadata"]["labels"]["tandem.dev/service"] == "qwen"
    assert pod["spec"]["nodeSelector"] == {"gpu": "h100"}
    assert [item["name"] for item in pod["spec"]["containers"]] == ["engine", "sidecar"]
    engine = pod["spec"]["containers"][0]
    assert engine["image"] == "engine:1"
    assert "livenessProbe" not in engine
    assert {"name": "X", "value": "1"} in engine["env"]
    assert [volume["name"] for volume in pod["spec"]["volumes"]] == [*PLAIN_VOLUMES, "extra"]


def test_the_revision_covers_pods_and_nothing_else() -> None:
    base = revision_of(make_spec(), IMAGES)
    assert revision_of(make_spec(decode={"replicas": 9}), IMAGES) == base
    assert revision_of(make_spec(router={"replicas": 9}), IMAGES) == base
    for change in (
        {"engine": {"image": "other:1"}},
        {"model": {"uri": "mock://slow"}},
        {"decode": {"replicas": 2, "maxRunning": 8}},
        {"kvTransfer": {"chunkTokens": 4096}},
    ):
        assert revision_of(make_spec(**change), IMAGES) != base


def test_routers_may_read_pods_only_and_never_leave_a_gap() -> None:
    spec = make_spec(router={"apiKeysSecretName": "keys", "policy": "LeastLoaded"})
    observed = make_observed(spec)
    children = {c["kind"]: c for c in build_router(observed, spec, "r1", build_owner(observed))}
    assert children["Role"]["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    ]
    deployment = children["Deployment"]["spec"]
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    pod = deployment["template"]["spec"]
    args = pod["containers"][0]["args"]
    assert args[args.index("--service") + 1] == "qwen"
    assert args[args.index("--policy") + 1] == "LeastLoaded"
    assert args[args.index("--api-keys-file") + 1] == "/etc/tandem/api-keys"
    assert children["Service"]["metadata"]["name"] == "qwen"
    assert children["Service"]["spec"]["ports"][0]["port"] == 8000


def test_network_policies_can_be_turned_off() -> None:
    for enabled, number in ((True, 2), (False, 0)):
        spec = make_spec(networkPolicy={"enabled": enabled})
        observed = make_observed(spec)
        kinds = [c["kind"] for c in build_fleet(observed, spec, build_owner(observed))]
        assert kinds.count("NetworkPolicy") == number
        assert kinds.count("PodDisruptionBudget") == 3
