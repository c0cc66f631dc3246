"""The status of an InferenceService: what runs, how well, and what went wrong."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from tandem_operator.api.api_object import ATOMIC, ApiObject, keyed_by
from tandem_operator.api.conditions import Conditions
from tandem_operator.api.kv_transfer import TransferBackend
from tandem_operator.api.rdma import RdmaMode
from tandem_operator.api.worker_pool import ApiRole

MAX_DECISIONS = 10
MAX_FAILURES = 5
MAX_PAIRS = 32
MAX_REASONS = 1024
"""Characters of a list of reasons."""
MAX_OPERATOR = 63 + 1 + 253
Count = Annotated[int, Field(ge=0, le=4096)]
Amount = Annotated[int, Field(ge=0, le=2**53)]


class ScaledBy(StrEnum):
    """Who owns the number of workers."""

    USER = "User"
    POLICY = "Policy"
    EXTERNAL = "External"


class ScalingStep(StrEnum):
    """How a decision was carried out."""

    START = "Start"
    DRAIN = "Drain"
    ROLE_CHANGE = "RoleChange"
    ADVISED = "Advised"


class PoolStatus(ApiObject):
    """The state of one pool."""

    role: ApiRole
    """The role of the pool."""
    replicas: Count = 0
    """Workers that exist."""
    ready: Count = 0
    """Workers that take work."""
    updated: Count = 0
    """Workers of the current revision."""
    draining: Count = 0
    """Workers that finish their streams before they are deleted."""
    pending: Count = 0
    """Workers that are not scheduled or not started yet."""
    desired: Count = 0
    """Workers that the operator is working towards."""
    scaled_by: ScaledBy = ScaledBy.USER
    """Who set desired: the user in the spec, the policy, or whoever wrote the pool's scale."""
    ignored_replicas: Count | None = None
    """A number written to the pool's scale that has no effect while a policy is active."""


class RouterStatus(ApiObject):
    """The routers."""

    replicas: Count = 0
    """Routers that exist."""
    ready: Count = 0
    """Routers that take requests."""


class SloClassStatus(ApiObject):
    """What the routers measured recently for one SLO class."""

    name: Annotated[str, Field(min_length=1, max_length=63)]
    """Name of the class."""
    ttft_milliseconds: Amount | None = None
    """Time to first token at the class's percentile, in milliseconds."""
    tbt_milliseconds: Amount | None = None
    """Time between tokens at the class's percentile, in milliseconds."""
    attainment_percent: Annotated[int, Field(ge=0, le=100)] | None = None
    """Share of requests that met their objectives: the lower of the shares for TTFT and TBT."""


class SloStatus(ApiObject):
    """What the routers measured recently: of the default SLO class, and of each class."""

    ttft_milliseconds: Amount | None = None
    """Time to first token at the percentile of the policy or else of the class, in milliseconds."""
    tbt_milliseconds: Amount | None = None
    """Time between tokens at the percentile of the policy or else of the class, in milliseconds."""
    attainment_percent: Annotated[int, Field(ge=0, le=100)] | None = None
    """Share of requests that met their objectives: the lower of the shares for TTFT and TBT."""
    requests_per_second: Amount | None = None
    """Requests per second over all routers, rounded."""
    classes: Annotated[
        tuple[SloClassStatus, ...], Field(max_length=16, json_schema_extra=keyed_by("name"))
    ] = ()
    """Each class at its own percentile; a class without requests keeps its last figures."""


class ProbedPair(ApiObject):
    """What the last probe between two nodes showed."""

    prefill_node: Annotated[str, Field(max_length=253)] = ""
    """Node of the worker that sent."""
    decode_node: Annotated[str, Field(max_length=253)] = ""
    """Node of the worker that received."""
    prefill: Annotated[str, Field(max_length=253)]
    """The worker that sent."""
    decode: Annotated[str, Field(max_length=253)]
    """The worker that received."""
    backend: TransferBackend | None = None
    """The backend that the two agreed on."""
    fell_back_from: TransferBackend | None = None
    """A better backend that workers on these nodes used before, in this revision."""
    passed_over: Annotated[str, Field(max_length=MAX_REASONS)] = ""
    """The better backends that they could not use, each with its reason."""
    megabytes_per_second: Amount | None = None
    """Speed in MB/s."""
    latency_microseconds: Amount | None = None
    """Time from asking for one block to having it."""
    at: datetime
    """When the probe was made."""
    error: Annotated[str, Field(max_length=MAX_REASONS)] = ""
    """Why KV did not move."""


class UnusedPair(ApiObject):
    """A prefill worker that a decode worker does not use, because KV came damaged or not at all."""

    prefill: Annotated[str, Field(max_length=253)]
    """The worker that sends."""
    decode: Annotated[str, Field(max_length=253)]
    """The worker that does not ask it any more, until a check has passed."""
    because: Annotated[str, Field(max_length=MAX_REASONS)]
    """The last fault."""


class TransportStatus(ApiObject):
    """How KV moves, as seen by probes and by the decode workers."""

    backend: TransferBackend | None = None
    """The backend that workers agreed on; of several pairs of nodes, the worst one's."""
    passed_over: Annotated[str, Field(max_length=MAX_REASONS)] = ""
    """The better backends that those two workers could not use, each with its reason."""
    wiring: RdmaMode | None = None
    """How RDMA devices get into the pods; None: KV moves over the plain network."""
    megabytes_per_second: Amount | None = None
    """Speed that the probe measured, in MB/s; of several pairs of nodes, the worst one's."""
    verified_at: datetime | None = None
    """When KV was last seen to move."""
    pairs: Annotated[
        tuple[ProbedPair, ...], Field(max_length=MAX_PAIRS, json_schema_extra=ATOMIC)
    ] = ()
    """The last probe of each pair of nodes. Where there are more pairs than fit, each node is in
    some."""
    out_of_use: Annotated[
        tuple[UnusedPair, ...], Field(max_length=MAX_PAIRS, json_schema_extra=ATOMIC)
    ] = ()
    """Pairs of workers that lose or change KV and are not used until a check has passed."""


class ScalingDecision(ApiObject):
    """One decision about one pool."""

    at: datetime
    """When the decision was made."""
    pool: ApiRole
    """The pool that the decision is about."""
    from_: Annotated[Count, Field(alias="from")]
    """Workers before the decision."""
    to: Count
    """Workers that the decision wants."""
    how: ScalingStep
    """How the decision was carried out; Advised: it was only published."""
    because: Annotated[str, Field(max_length=1024)]
    """Why the decision was made, in one sentence."""


class Failure(ApiObject):
    """Evidence of a crash, kept before the pod is replaced."""

    pod: Annotated[str, Field(max_length=253)]
    """Name of the pod."""
    node: Annotated[str, Field(max_length=253)] = ""
    """Node on which it ran."""
    exit_code: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = None
    """Exit code of the container, if it had one."""
    reason: Annotated[str, Field(max_length=256)] = ""
    """Reason as Kubernetes gives it, like OOMKilled."""
    at: datetime
    """When the container ended."""
    log: Annotated[str, Field(max_length=4096)] = ""
    """The last lines of the container's log."""


class InferenceServiceStatus(ApiObject):
    """What runs, how well, and what went wrong."""

    observed_generation: Amount = 0
    """The metadata.generation that this describes."""
    revision: Annotated[str, Field(max_length=63)] | None = None
    """The revision that serves."""
    updated_revision: Annotated[str, Field(max_length=63)] | None = None
    """The revision that a roll-out moves to, while it runs."""
    url: Annotated[str, Field(max_length=512)] | None = None
    """Where clients inside the cluster reach the service."""
    model: Annotated[str, Field(max_length=128)] | None = None
    """The served name of the model."""
    pools: Annotated[
        tuple[PoolStatus, ...], Field(max_length=2, json_schema_extra=keyed_by("role"))
    ] = ()
    """Both pools."""
    router: RouterStatus | None = None
    """The routers."""
    ratio: Annotated[str, Field(max_length=16)] | None = None
    """Ready prefill to ready decode workers, like 1:2."""
    slo: SloStatus | None = None
    """What the routers measured recently: of the default SLO class, and of each class."""
    transport: TransportStatus | None = None
    """How KV moves, as seen by the probe."""
    scaling: Annotated[
        tuple[ScalingDecision, ...], Field(max_length=MAX_DECISIONS, json_schema_extra=ATOMIC)
    ] = ()
    """The last decisions, newest first."""
    failures: Annotated[
        tuple[Failure, ...], Field(max_length=MAX_FAILURES, json_schema_extra=ATOMIC)
    ] = ()
    """Crash evidence, newest first."""
    operator: Annotated[str, Field(max_length=MAX_OPERATOR)] | None = None
    """The operator that serves this, by the namespace and name of its Lease; no other one does."""
    conditions: Conditions = ()
    """What holds for this service; there is no phase."""
