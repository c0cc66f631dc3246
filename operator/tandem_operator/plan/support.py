"""What a spec asks for but this release can't do: it is reported, not ignored.

The API server refuses such specs. One that was stored before, by another release, gets here.
"""

from tandem_operator.api import AutoscalingPolicySpec, InferenceServiceSpec
from tandem_operator.api.kv_transfer import KvTransfer
from tandem_operator.api.pool import GPU_RESOURCE
from tandem_operator.api.refusal import find_refused, refusal_of


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
    backend = spec.kv_transfer.backend
    mark = refusal_of(KvTransfer, "backend")
    if mark is not None and not mark.takes(backend):
        blockers.append(
            f"kvTransfer.backend is {backend}, but workers of this release have only"
            f" {mark.describe()}: set one of these"
        )
    return blockers


def find_unused(spec: InferenceServiceSpec) -> list[str]:
    """Fields whose values the API server would refuse now: they have no effect in this release."""
    return list(find_refused(spec))


def find_unused_in_policy(policy: AutoscalingPolicySpec) -> list[str]:
    """Fields of a policy whose values have no effect in this release."""
    return list(find_refused(policy))
