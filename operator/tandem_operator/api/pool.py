"""One pool of workers: how many, how large, where."""

from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import Field

from tandem_operator.api.api_object import ApiObject, Rule, keyed_by
from tandem_operator.api.pod_template import PodTemplate
from tandem_operator.api.quantity import Quantity, parse_quantity
from tandem_operator.api.refusal import refused_unless

GPU_RESOURCE = "nvidia.com/gpu"
ResourceList = Annotated[dict[str, Quantity], Field(max_length=16)]
_GPUS = f"quantity(string(self.resources.limits['{GPU_RESOURCE}']))"
_HAS_GPUS = f"'{GPU_RESOURCE}' in self.resources.limits"


class ResourceClaimUse(ApiObject):
    """One claim of the pod that the container uses."""

    name: Annotated[str, Field(min_length=1, max_length=63)]
    """Name of an entry of podTemplate.spec.resourceClaims."""
    request: Annotated[str, Field(max_length=63)] | None = None
    """One request of that claim; default: all of it."""


class ContainerResources(ApiObject):
    """The resources of a container, as in a pod."""

    limits: ResourceList = Field(default={})
    """The most that the container may use; GPUs are requested here."""
    requests: ResourceList = Field(default={})
    """What the scheduler reserves for the container; default: the limits."""
    claims: Annotated[
        tuple[ResourceClaimUse, ...], Field(max_length=16, json_schema_extra=keyed_by("name"))
    ] = ()
    """Dynamic resource claims that the container uses."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"!('{GPU_RESOURCE}' in self.requests) || ('{GPU_RESOURCE}' in self.limits &&"
            f" string(self.requests['{GPU_RESOURCE}']) == string(self.limits['{GPU_RESOURCE}']))",
            "resources.requests[nvidia.com/gpu] must equal resources.limits[nvidia.com/gpu]:"
            " remove it from requests and keep the limit",
            ".requests",
        ),
    )


class Pool(ApiObject):
    """One pool of workers, prefill or decode."""

    replicas: Annotated[int, Field(ge=0, le=1024)] = 1
    """Workers in the pool, unless a policy or an external scaler owns the number."""
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """GPUs over which each worker splits the model."""
    nodes_per_worker: Annotated[
        int, Field(ge=1, le=16), refused_unless(1, because="a worker is one pod")
    ] = 1
    """Pods per worker, each on a node of its own; more than one make a group that lives and dies
    together."""
    max_batched_tokens: Annotated[int, Field(ge=16, le=1_048_576)] = 8192
    """Token budget of one step: decode tokens plus prefill chunks."""
    max_running: Annotated[int, Field(ge=1, le=65_536)] = 256
    """Requests that may run in a worker at the same time."""
    gpu_memory_percent: Annotated[int, Field(ge=1, le=99)] = 90
    """Share of the GPU's memory for weights and KV cache together."""
    resources: ContainerResources = ContainerResources()
    """Resources of the engine container of each pod; a worker has nodesPerWorker such pods. Of
    those that are not mentioned: requests of 100m CPU and 256Mi of memory, and no limits."""
    pod_template: PodTemplate = PodTemplate()
    """Metadata and spec merged into the worker pods: node selector, tolerations, sidecars and so
    on."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"!({_HAS_GPUS}) || ({_GPUS}.isInteger() && {_GPUS}.asInteger() >= 1)",
            "resources.limits[nvidia.com/gpu] must be a whole number of GPUs: write 1 or more, or"
            " remove the entry to run without a GPU",
            ".resources.limits",
        ),
        Rule(
            f"!({_HAS_GPUS}) || !{_GPUS}.isInteger() || {_GPUS}.asInteger() * self.nodesPerWorker"
            " == self.tensorParallel",
            "tensorParallel must be the number of GPUs of a worker,"
            " resources.limits[nvidia.com/gpu] times nodesPerWorker, because the model is split"
            " over all of them: set both to the same number",
            ".tensorParallel",
        ),
        Rule(
            f"({_HAS_GPUS}) || self.tensorParallel == 1",
            "tensorParallel splits the model over GPUs, but resources.limits has no nvidia.com/gpu:"
            " set that limit to tensorParallel, or remove tensorParallel",
            ".tensorParallel",
        ),
        Rule(
            "self.tensorParallel % self.nodesPerWorker == 0",
            "tensorParallel must be a multiple of nodesPerWorker, so that all pods run the same"
            " number of ranks: raise tensorParallel or set nodesPerWorker: 1",
            ".nodesPerWorker",
        ),
    )

    @property
    def gpus_per_pod(self) -> int:
        """GPUs that one pod of a worker requests; 0 on CPU."""
        return int(parse_quantity(self.resources.limits.get(GPU_RESOURCE, "0")))


_NO_ROLE_CHANGE = "workers keep their roles, and pools change only by new pods"


class RoleChangeMode(StrEnum):
    """Whether workers may change role."""

    NONE = "None"
    WARM = "Warm"


class RoleChange(ApiObject):
    """Moving running workers between the pools while their weights stay loaded."""

    mode: Annotated[
        RoleChangeMode, refused_unless(RoleChangeMode.NONE, because=_NO_ROLE_CHANGE)
    ] = RoleChangeMode.NONE
    """Warm: a drained worker may change its role in place; None: pools change only by new pods."""
    min_prefill: Annotated[
        int, Field(ge=0, le=1024), refused_unless(1, because=_NO_ROLE_CHANGE)
    ] = 1
    """The fewest prefill workers that a role change may leave."""
    min_decode: Annotated[int, Field(ge=0, le=1024), refused_unless(1, because=_NO_ROLE_CHANGE)] = 1
    """The fewest decode workers that a role change may leave."""
