"""What a spec asks for but this release can't do: it is reported, not ignored."""

from tandem_operator.api import AutoscalingPolicySpec, InferenceServiceSpec
from tandem_operator.api.autoscaling_policy import (
    CoordinationMode,
    Forecast,
    SignalSource,
    Startup,
    VictimMode,
)
from tandem_operator.api.model import KvCacheDtype, Quantization
from tandem_operator.api.pool import GPU_RESOURCE
from tandem_operator.api.quantity import parse_quantity


def find_blockers(spec: InferenceServiceSpec) -> list[str]:
    """Reasons why no worker of this spec can run."""
    blockers = []
    for name, pool in spec.pools.items():
        if pool.nodes_per_worker > 1:
            blockers.append(
                f"{name}.nodesPerWorker is {pool.nodes_per_worker}, but this release supports only"
                " 1: set it to 1"
            )
        ranks = pool.tensor_parallel
        if pool.nodes_per_worker == 1 and ranks > 1 and pool.gpus_per_pod != ranks:
            blockers.append(
                f"{name}.tensorParallel is {ranks}, but each pod has {pool.gpus_per_pod} GPUs: set"
                f" {name}.resources.limits[{GPU_RESOURCE}] to {ranks}"
            )
    return blockers


def find_unused(spec: InferenceServiceSpec) -> list[str]:
    """Fields that are set but have no effect in this release."""
    unused = {
        "model.quantization": spec.model.quantization is not Quantization.NONE,
        "model.kvCacheDtype": spec.model.kv_cache_dtype is not KvCacheDtype.AUTO,
        "model.adapters": bool(spec.model.adapters),
        "kvCache.hostMemory": parse_quantity(spec.kv_cache.host_memory) > 0,
        "kvCache.disk": parse_quantity(spec.kv_cache.disk.size) > 0,
        "router.inferencePool": spec.router.inference_pool,
    }
    return [name for name, is_set in unused.items() if is_set]


def find_unused_in_policy(policy: AutoscalingPolicySpec) -> list[str]:
    """Fields of a policy that are set but have no effect in this release."""
    ignored = Startup().warmup_samples_ignored
    unused = {
        "signals.source Prometheus": policy.signals.source is not SignalSource.ROUTER,
        "forecast": policy.forecast != Forecast(),
        "coordination.mode Ratio": policy.coordination.mode is CoordinationMode.RATIO,
        "scaleIn.victim Newest": policy.scale_in.victim is not VictimMode.LEAST_CACHED,
        "startup.warmupSamplesIgnored": policy.startup.warmup_samples_ignored != ignored,
        "burst.shed": not policy.burst.shed,
    }
    return [name for name, is_set in unused.items() if is_set]
