"""What a spec asks for that this release can't do, said instead of ignored."""

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.api.model import KvCacheDtype, Quantization
from tandem_operator.api.quantity import parse_quantity


def find_blockers(spec: InferenceServiceSpec) -> list[str]:
    """Reasons why no worker of this spec can run."""
    blockers = []
    for name, pool in (("prefill", spec.prefill), ("decode", spec.decode)):
        if pool.nodes_per_worker > 1:
            blockers.append(f"{name}.nodesPerWorker above 1 is not supported by this release")
        if pool.tensor_parallel > 1:
            blockers.append(f"{name}.tensorParallel above 1 is not supported by this release")
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
