"""One change per field of the API, and what must be set beside it for the field to matter.

Each entry is (what is set before too, what is changed). `NAMED` are fields whose effect takes more
than one look: the test that shows it.
"""

from copy import deepcopy
from typing import Any

Tree = dict[str, Any]
Change = tuple[Tree, Tree]

BASE: Tree = {
    "model": {"uri": "hf://org/name"},
    "prefill": {},
    "decode": {},
    "rdma": {"mode": "None"},
}
POLICY_BASE: Tree = {"pools": {"prefill": {"max": 9}, "decode": {"max": 9}}}


def put(tree: Tree, change: Tree) -> Tree:
    """`tree` with `change` merged into it; neither is changed."""
    merged = deepcopy(tree)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = put(merged[key], value) if both else deepcopy(value)
    return merged


GPUS: Tree = put(
    BASE,
    {pool: {"resources": {"limits": {"nvidia.com/gpu": 1}}} for pool in ("prefill", "decode")},
)


def at(path: str, value: Any) -> Tree:
    """The tree that has only this value at this dotted path."""
    name, _, rest = path.partition(".")
    return {name: at(rest, value) if rest else value}


def alone(values: Tree) -> dict[str, Change]:
    """Changes that need nothing beside them."""
    return {path: ({}, at(path.replace("[]", ""), value)) for path, value in values.items()}


def listed(path: str, base: Tree, changes: Tree, beside: Tree | None = None) -> dict[str, Change]:
    """Changes of the fields of the one entry of a list."""
    return {
        f"{path}[].{name}": (
            put(beside or {}, at(path, [base])),
            at(path, [put(base, at(name, value))]),
        )
        for name, value in changes.items()
    }


TEMPLATE: Tree = {
    "metadata.labels": {"team": "x"},
    "metadata.annotations": {"a/b": "x"},
    "spec.hostNetwork": True,
}
RESOURCES: Tree = {"limits": {"cpu": 2}, "requests": {"cpu": 1}}


def _pod_fields(pool: str) -> dict[str, Change]:
    template, resources = f"{pool}.podTemplate", f"{pool}.resources"
    return {
        **alone({f"{template}.{name}": value for name, value in TEMPLATE.items()}),
        **listed(
            f"{template}.spec.volumes",
            {"name": "v", "hostPath": {"path": "/a"}},
            {"name": "w", "hostPath.path": "/b"},
        ),
        **alone({f"{resources}.{name}": value for name, value in RESOURCES.items()}),
        **listed(f"{resources}.claims", {"name": "c"}, {"name": "d", "request": "r"}),
    }


def _pool(pool: str) -> dict[str, Change]:
    return {
        **_pod_fields(pool),
        **alone(
            {
                f"{pool}.tensorParallel": 2,
                f"{pool}.maxBatchedTokens": 512,
                f"{pool}.maxRunning": 8,
                f"{pool}.gpuMemoryPercent": 50,
            }
        ),
    }


FABRIC: Tree = {"rdma": {"mode": "DevicePlugin", "resource": {"name": "rdma/ib"}}}
CLAIM: Tree = put(GPUS, {"rdma": {"mode": "Dra", "claim": {"deviceClass": "dranet"}}})
SLO: Tree = {"name": "chat", "ttftMilliseconds": 1, "tbtMilliseconds": 1}
SAMPLES: dict[str, Change] = {
    **_pool("prefill"),
    **_pool("decode"),
    **_pod_fields("router"),
    **alone(
        {
            "model.uri": "hf://org/other",
            "model.name": "chat",
            "model.revision": "v2",
            "model.format": "Dummy",
            "model.dtype": "Float32",
            "model.maxModelLen": 64,
            "model.secretName": "hf",
            "model.cache.claimName": "models",
            "engine.image": "other:1",
            "engine.pageSize": 16,
            "engine.options.kvMemory": "2Gi",
            "engine.options.numThreads": 3,
            "engine.options.maxWaiting": 9,
            "kvTransfer.backend": "Tcp",
            "kvTransfer.bootstrapPort": 9000,
            "kvTransfer.chunkTokens": 4096,
            "kvTransfer.localPrefillTokens": 1,
            "kvTransfer.leaseSeconds": 3,
            "kvTransfer.checksum": False,
            "rdma.mode": "HostPath",
            "rdma.sharedMemory": "1Gi",
            "rdma.placement.sameFabricKey": "example.com/fabric",
            "rdma.placement.roles": "Spread",
            "router.replicas": 5,
            "router.policy": "RoundRobin",
            "router.service.type": "NodePort",
            "router.service.port": 80,
            "router.apiKeysSecretName": "keys",
            "router.corsOrigins": ["https://app.example"],
            "rollout.drainSeconds": 5,
            "networkPolicy.enabled": False,
            "revisionHistoryLimit": 1,
        }
    ),
    "rdma.resource.name": (FABRIC, at("rdma.resource.name", "rdma/other")),
    "rdma.resource.count": (FABRIC, at("rdma.resource.count", "3")),
    **listed(
        "rdma.networks",
        {"name": "rail0"},
        {"name": "rail1", "namespace": "net"},
        {"rdma": {"mode": "Multus"}},
    ),
    "rdma.claim.deviceClass": (CLAIM, at("rdma.claim.deviceClass", "rdma")),
    "rdma.claim.gpuDeviceClass": (CLAIM, at("rdma.claim.gpuDeviceClass", "gpu.example.com")),
    "rdma.claim.alignWith": (CLAIM, at("rdma.claim.alignWith", "None")),
    "rdma.claim.rails": (CLAIM, at("rdma.claim.rails", "SameAcrossRoles")),
    "rdma.claim.railAttribute": (
        put(CLAIM, at("rdma.claim.rails", "SameAcrossRoles")),
        at("rdma.claim.railAttribute", "dra.net/cloudNetwork"),
    ),
    "rdma.devices.map": (FABRIC, at("rdma.devices.map", "All")),
    "rdma.devices.include": (FABRIC, at("rdma.devices.include", ["mlx5_0"])),
    "rdma.devices.exclude": (FABRIC, at("rdma.devices.exclude", ["mlx5_0"])),
    "rdma.devices.gidIndex": (FABRIC, at("rdma.devices.gidIndex", "3")),
    **listed("imagePullSecrets", {"name": "registry"}, {"name": "other"}),
    **listed("engine.env", {"name": "A", "value": "1"}, {"name": "B", "value": "2"}),
    **listed(
        "engine.env", {"name": "A"}, {"valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}
    ),
    **listed(
        "slo.classes",
        SLO,
        {
            "name": "other",
            "default": True,
            "ttftMilliseconds": 2,
            "tbtMilliseconds": 2,
            "priority": 3,
        },
    ),
}

POLICY_SAMPLES: dict[str, Change] = alone(
    {
        "mode": "Advisory",
        "objectives.ttftMilliseconds": 9000,
        "objectives.tbtMilliseconds": 200,
        "signals.staleSeconds": 60,
        "pools.prefill.min": 2,
        "pools.prefill.max": 3,
        "pools.prefill.maxStepUp": 1,
        "pools.decode.min": 3,
        "pools.decode.max": 2,
        "pools.decode.maxStepUp": 1,
        "pools.decode.kvCeilingPercent": 40,
        "coordination.mode": "Independent",
        "coordination.gpuBudget": 5,
        "scaleIn.hold": "Fixed",
        "scaleIn.minHoldSeconds": 300,
        "startup.pendingDeadlineSeconds": 2000,
        "startup.onDeadline": "Keep",
        "burst.standby.prefill": 2,
        "burst.standby.decode": 2,
        "scaleToZero.enabled": True,
    }
)
POLICY_SAMPLES["scaleToZero.idleSeconds"] = (
    at("scaleToZero.enabled", True),
    at("scaleToZero.idleSeconds", 4000),
)

NAMED: dict[str, str] = {
    "prefill.replicas": "plan.test_scale_targets::test_the_spec_rules_until_someone_scales",
    "decode.replicas": "plan.test_scale_targets::test_the_spec_rules_until_someone_scales",
    "ratio.mode": "plan.test_scale_ratio::test_free_changes_nothing",
    "ratio.fixed.prefill": "plan.test_scale_ratio::test_fixed_is_kept_and_is_stable",
    "ratio.fixed.decode": "plan.test_scale_ratio::test_fixed_is_kept_and_is_stable",
    "ratio.min.prefill": "plan.test_scale_ratio::test_bounded_is_kept_and_is_stable",
    "ratio.min.decode": "plan.test_scale_ratio::test_bounded_is_kept_and_is_stable",
    "ratio.max.prefill": "plan.test_scale_ratio::test_bounded_is_kept_and_is_stable",
    "ratio.max.decode": "plan.test_scale_ratio::test_bounded_is_kept_and_is_stable",
    "slo.classes[].percentile": (
        "observe.test_collector_signals::test_each_class_is_measured_at_its_percentile"
    ),
    "kvTransfer.verify.mode": "plan.test_transport_verified::test_off_makes_no_probe",
    "kvTransfer.verify.minMegabytesPerSecond": "plan.test_transport_verified::test_what_was_seen",
    "rollout.maxSurge": "plan.test_rolling::test_a_surge_is_what_the_field_says",
    "rollout.maxUnavailable": "plan.test_rolling::test_what_may_be_missing_is_what_the_field_says",
    "rollout.paused": "plan.test_rollout_steps::test_a_paused_spec_waits_and_goes_on",
    "rollout.progressDeadlineSeconds": (
        "plan.test_rollout_steps::test_a_failing_revision_stops_and_says_so"
    ),
    "autoscaling.policyName": "test_scaling_passes::test_a_named_policy_is_read_and_told",
    **dict.fromkeys(
        ("slo.classes[].percentile", "objectives.percentile"),
        "test_scaling_passes::"
        "test_the_percentile_of_the_policy_or_of_the_default_class_is_measured",
    ),
    "signals.onStale": "api.test_every_field_works::test_stale_metrics_hold_both_pools",
    "WorkerPool.serviceName": "api.test_every_field_works::test_the_operator_writes_its_pools",
    "WorkerPool.role": "api.test_every_field_works::test_the_operator_writes_its_pools",
    "WorkerPool.replicas": "plan.test_scale_targets::test_a_scale_write_wins_until_the_next_edit",
    "WorkerPool.revision": "api.test_every_field_works::test_the_operator_writes_its_pools",
}
