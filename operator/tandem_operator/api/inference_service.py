"""InferenceService: what users write, one object per fleet."""

from typing import Annotated, ClassVar

from pydantic import Field

from tandem_operator.api.api_object import ApiObject, Rule, keyed_by
from tandem_operator.api.autoscaling_policy import Autoscaling
from tandem_operator.api.engine import Engine
from tandem_operator.api.kv_cache import KvCache
from tandem_operator.api.kv_transfer import KvTransfer
from tandem_operator.api.model import Model
from tandem_operator.api.pool import GPU_RESOURCE, Pool, RoleChange
from tandem_operator.api.ratio import Ratio
from tandem_operator.api.rdma import SHARED_MEMORY, Rdma
from tandem_operator.api.rollout import Rollout
from tandem_operator.api.router import Router
from tandem_operator.api.slo import Slo
from tandem_operator.names.labels import LABEL_FAULTS
from tandem_operator.names.objects import MAX_SERVICE_NAME
from tandem_operator.names.pods import ENV_FAULTS
from tandem_operator.pair import Pair, Role

_PAIR = "!has(self.prefill) || !has(self.decode)"
_SCALED = "has(self.autoscaling)"
_POOLS = "self.autoscaling.inline.pools"
_FP, _FD = "self.ratio.fixed.prefill", "self.ratio.fixed.decode"
_LOW_P = f"(({_POOLS}.prefill.min + {_FP} - 1) / {_FP})"
_LOW_D = f"(({_POOLS}.decode.min + {_FD} - 1) / {_FD})"
_HIGH_P = f"({_POOLS}.prefill.max / {_FP})"
_HIGH_D = f"({_POOLS}.decode.max / {_FD})"


def _infiniband_mounted(pool: str) -> str:
    volumes = f"self.{pool}.podTemplate.spec.volumes"
    return (
        f"(has(self.{pool}) && {volumes}.exists(v,"
        " has(v.hostPath) && v.hostPath.path.startsWith('/dev/infiniband')))"
    )


def _on_nodes(part: str) -> str:
    """Whether the pods of a part use their nodes' network."""
    return f"(has(self.{part}) && self.{part}.podTemplate.spec.hostNetwork)"


def _is_labelled(pool: str) -> str:
    """Whether the pods of a pool may inject faults."""
    labels = f"self.{pool}.podTemplate.metadata.labels"
    return f"('{LABEL_FAULTS}' in {labels} && {labels}['{LABEL_FAULTS}'] == 'true')"


def _gpu_limit(pool: str) -> str:
    return f"(has(self.{pool}) && '{GPU_RESOURCE}' in self.{pool}.resources.limits)"


ROOT_RULES = (
    Rule(
        f"size(self.metadata.name) <= {MAX_SERVICE_NAME}",
        f"metadata.name is longer than {MAX_SERVICE_NAME} characters, which leaves no room for the"
        " names of pods: choose a shorter name",
    ),
    Rule(
        "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
        "metadata.name is not a valid name for a Service: start it with a letter and use only"
        " lower-case letters, digits and hyphens",
    ),
)

_PRESENCE_RULES = (
    Rule(
        "has(self.model)",
        "spec.model is missing: add what to serve, like model: {uri: hf://org/name}",
    ),
    Rule(
        "has(self.prefill)",
        "spec.prefill is missing, and a fleet needs both pools: add prefill: {replicas: 1}",
    ),
    Rule(
        "has(self.decode)",
        "spec.decode is missing, and a fleet needs both pools: add decode: {replicas: 1}",
    ),
)

_RATIO_RULES = (
    Rule(
        f"{_PAIR} || {_SCALED} || self.ratio.mode != 'Fixed' || !has(self.ratio.fixed) ||"
        f" self.prefill.replicas * {_FD} == self.decode.replicas * {_FP}",
        "prefill.replicas and decode.replicas don't have the ratio of ratio.fixed: change one of"
        " them, or change ratio.fixed",
        ".decode.replicas",
    ),
    Rule(
        f"{_PAIR} || {_SCALED} || self.ratio.mode != 'Bounded' || !has(self.ratio.min) ||"
        " self.prefill.replicas * self.ratio.min.decode >="
        " self.decode.replicas * self.ratio.min.prefill",
        "prefill.replicas is too small for decode.replicas under ratio.min: raise prefill.replicas,"
        " lower decode.replicas or lower ratio.min",
        ".prefill.replicas",
    ),
    Rule(
        f"{_PAIR} || {_SCALED} || self.ratio.mode != 'Bounded' || !has(self.ratio.max) ||"
        " self.prefill.replicas * self.ratio.max.decode <="
        " self.decode.replicas * self.ratio.max.prefill",
        "prefill.replicas is too large for decode.replicas under ratio.max: lower prefill.replicas,"
        " raise decode.replicas or raise ratio.max",
        ".prefill.replicas",
    ),
    Rule(
        f"!{_SCALED} || !has(self.autoscaling.inline) || self.ratio.mode != 'Fixed' ||"
        f" !has(self.ratio.fixed) || ({_HIGH_P} >= 1 && {_HIGH_D} >= 1 && {_LOW_P} <= {_HIGH_P} &&"
        f" {_LOW_P} <= {_HIGH_D} && {_LOW_D} <= {_HIGH_P} && {_LOW_D} <= {_HIGH_D})",
        "autoscaling.inline.pools allows no sizes that have the ratio of ratio.fixed: widen min and"
        " max of both pools to multiples of ratio.fixed, or set ratio.mode: Bounded",
        ".autoscaling.inline.pools",
    ),
    Rule(
        f"!{_SCALED} || !has(self.autoscaling.inline) ||"
        " self.autoscaling.inline.coordination.mode != 'Ratio' || self.ratio.mode != 'Free'",
        "autoscaling.inline.coordination.mode is Ratio, but there is no ratio to keep: set"
        " ratio.mode to Bounded or Fixed, or coordination.mode to Bottleneck",
        ".ratio.mode",
    ),
)

_WIRING_RULES = (
    Rule(
        f"{_PAIR} || !self.networkPolicy.enabled ||"
        f" {_on_nodes('prefill')} == {_on_nodes('decode')}",
        "only one of prefill and decode has podTemplate.spec.hostNetwork, and the NetworkPolicy"
        " can't admit pods on nodes' networks: set it for both, or set networkPolicy.enabled:"
        " false",
        ".decode.podTemplate.spec.hostNetwork",
    ),
    Rule(
        f"{_PAIR} || !self.networkPolicy.enabled || !{_on_nodes('router')} ||"
        f" ({_on_nodes('prefill')} && {_on_nodes('decode')})",
        "router.podTemplate.spec.hostNetwork is true, but the workers' NetworkPolicy can't admit"
        " pods on nodes' networks: set it for prefill and decode too, or set networkPolicy.enabled:"
        " false",
        ".router.podTemplate.spec.hostNetwork",
    ),
    Rule(
        "self.kvTransfer.backend != 'Shm' || quantity(string(self.rdma.sharedMemory))"
        f".compareTo(quantity('{SHARED_MEMORY}')) == 0",
        "rdma.sharedMemory has no effect with kvTransfer.backend Shm, whose workers use the node's"
        " own /dev/shm: remove sharedMemory or set backend: Auto",
        ".rdma.sharedMemory",
    ),
    Rule(
        "self.kvTransfer.bootstrapPort != self.router.service.port",
        "kvTransfer.bootstrapPort equals router.service.port: give the bootstrap port another"
        " number, like 8998",
        ".kvTransfer.bootstrapPort",
    ),
    Rule(
        "self.rdma.mode != 'Efa' || self.kvTransfer.backend != 'Mooncake'",
        "kvTransfer.backend Mooncake can't use rdma.mode Efa, which speaks libfabric: set backend:"
        " Nixl",
        ".kvTransfer.backend",
    ),
    Rule(
        "!(self.rdma.mode in ['DevicePlugin', 'Multus', 'Efa', 'Gke', 'Dra']) ||"
        f" !({_infiniband_mounted('prefill')} || {_infiniband_mounted('decode')})",
        "podTemplate.spec.volumes mounts /dev/infiniband from the host, which can't be combined"
        " with an rdma.mode that gives pods devices of their own: remove the volume or set"
        " rdma.mode: HostPath",
        ".rdma.mode",
    ),
    Rule(
        f"{_PAIR} || !(self.rdma.mode in ['Multus', 'Gke']) ||"
        f" !({_on_nodes('prefill')} || {_on_nodes('decode')})",
        "rdma.mode Multus and Gke attach networks to pods, but podTemplate.spec.hostNetwork puts"
        " pods on their nodes' network: remove hostNetwork or set rdma.mode: HostPath",
        ".rdma.mode",
    ),
    Rule(
        "self.rdma.mode != 'Efa' || !(self.kvTransfer.backend in ['Shm', 'CudaIpc'])",
        "kvTransfer.backend Shm and CudaIpc work only between pods of one node, and rdma.mode Efa"
        " keeps prefill and decode workers apart: set backend: Auto",
        ".kvTransfer.backend",
    ),
    Rule(
        "!(self.kvTransfer.backend in ['Shm', 'CudaIpc']) || self.rdma.placement.roles != 'Spread'",
        "kvTransfer.backend Shm and CudaIpc work only between pods of one node, but"
        " rdma.placement.roles is Spread: set placement.roles: Pack or backend: Auto",
        ".kvTransfer.backend",
    ),
    Rule(
        f"{_PAIR} || self.kvTransfer.backend != 'CudaIpc' ||"
        f" ({_gpu_limit('prefill')} && {_gpu_limit('decode')})",
        "kvTransfer.backend CudaIpc needs GPUs in both pools: set nvidia.com/gpu in"
        " resources.limits of prefill and decode, or set backend: Auto",
        ".kvTransfer.backend",
    ),
    Rule(
        f"{_PAIR} || !self.engine.env.exists(e, e.name == '{ENV_FAULTS}') ||"
        f" ({_is_labelled('prefill')} && {_is_labelled('decode')})",
        f"engine.env sets {ENV_FAULTS}, which only test workers may have: add {LABEL_FAULTS}:"
        ' "true" to podTemplate.metadata.labels of prefill and decode, or remove the variable',
        ".engine.env",
    ),
    Rule(
        "self.kvTransfer.chunkTokens % self.engine.pageSize == 0",
        "kvTransfer.chunkTokens must be a multiple of engine.pageSize, because whole pages are"
        " pushed: set it to 2048 or another multiple",
        ".kvTransfer.chunkTokens",
    ),
    Rule(
        f"{_PAIR} || self.prefill.tensorParallel % self.decode.tensorParallel == 0 ||"
        " self.decode.tensorParallel % self.prefill.tensorParallel == 0",
        "prefill.tensorParallel and decode.tensorParallel must divide each other, because KV heads"
        " are sliced between them: make one a multiple of the other",
        ".decode.tensorParallel",
    ),
)


class PullSecret(ApiObject):
    """A Secret with the credentials of image registries."""

    name: Annotated[str, Field(min_length=1, max_length=253)]
    """Name of the Secret, which is in the service's namespace."""


class NetworkPolicySettings(ApiObject):
    """NetworkPolicies for routers and workers."""

    enabled: bool = True
    """Whether the operator writes NetworkPolicies. With them, clients reach only the routers, and
    only routers, other workers and the operator reach the workers."""


class InferenceServiceSpec(ApiObject):
    """A fleet: a model, a pool of prefill workers, a pool of decode workers, routers."""

    model: Model
    """The model that the fleet serves."""
    engine: Engine = Engine()
    """The engine that every worker runs."""
    image_pull_secrets: Annotated[
        tuple[PullSecret, ...], Field(max_length=16, json_schema_extra=keyed_by("name"))
    ] = ()
    """Secrets with which nodes pull the images of all workers and routers. Those of the namespace's
    default ServiceAccount don't hold for them, because they have accounts of their own."""
    prefill: Pool
    """The pool that turns prompts into KV."""
    decode: Pool
    """The pool that turns KV into tokens."""
    ratio: Ratio = Ratio()
    """The ratio of prefill to decode workers."""
    role_change: RoleChange = RoleChange()
    """Moving running workers between the pools."""
    kv_transfer: KvTransfer = KvTransfer()
    """How KV pages get from prefill to decode workers."""
    rdma: Rdma = Rdma()
    """How workers get access to RDMA devices."""
    kv_cache: KvCache = KvCache()
    """The tiers of the KV cache behind GPU memory."""
    router: Router = Router()
    """The routers in front of the pools."""
    slo: Slo = Slo()
    """Service level objectives."""
    autoscaling: Autoscaling | None = None
    """The policy that scales both pools; without it, replicas or an external scaler decides."""
    rollout: Rollout = Rollout()
    """How a new revision replaces the old one."""
    network_policy: NetworkPolicySettings = NetworkPolicySettings()
    """NetworkPolicies for routers and workers."""
    revision_history_limit: Annotated[int, Field(ge=0, le=100)] = 5
    """How many old revisions are kept for rolling back."""

    rules: ClassVar[tuple[Rule, ...]] = _PRESENCE_RULES + _RATIO_RULES + _WIRING_RULES
    ruled_presence: ClassVar[frozenset[str]] = frozenset({"model", "prefill", "decode"})

    @property
    def pools(self) -> Pair[Pool]:
        """Both pools."""
        return Pair(self.prefill, self.decode)

    def pool(self, role: Role) -> Pool:
        """The pool of one role."""
        return self.pools.of(role)
