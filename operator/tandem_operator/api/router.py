"""The routers in front of the pools."""

from enum import StrEnum
from typing import Annotated, Final

from pydantic import Field

from tandem_operator.api.api_object import SET, ApiObject
from tandem_operator.api.pod_template import PodTemplate
from tandem_operator.api.pool import ContainerResources
from tandem_operator.api.refusal import refused_unless
from tandem_operator.names.pods import PORT_ROUTER_HTTP

FIRST_ROUTERS: Final = 2
"""The routers of a new service whose spec leaves their number to a scaler."""


class RouterPolicy(StrEnum):
    """How a router chooses workers."""

    KV_AWARE = "KvAware"
    LEAST_LOADED = "LeastLoaded"
    ROUND_ROBIN = "RoundRobin"


class AdmissionMode(StrEnum):
    """When a router refuses requests."""

    PREDICT = "Predict"
    LOAD = "Load"
    OFF = "Off"


class ServiceType(StrEnum):
    """The type of the service's Service."""

    CLUSTER_IP = "ClusterIP"
    NODE_PORT = "NodePort"
    LOAD_BALANCER = "LoadBalancer"


class RouterAdmission(ApiObject):
    """When a router answers 429 instead of queueing."""

    mode: Annotated[
        AdmissionMode,
        refused_unless(AdmissionMode.LOAD, because="routers refuse only when queues are full"),
    ] = AdmissionMode.LOAD
    """Predict: refuse requests that would miss the objectives of their SLO class; Load: refuse when
    queues are full; Off: queue everything."""


class RouterService(ApiObject):
    """The Service that clients talk to; it has the InferenceService's name."""

    type: ServiceType = ServiceType.CLUSTER_IP
    """Type of the Service."""
    port: Annotated[int, Field(ge=1, le=65535)] = PORT_ROUTER_HTTP
    """Port of the Service."""


class Router(ApiObject):
    """The routers: OpenAI API, tokenizing, choice of workers, fail-over."""

    replicas: Annotated[int, Field(ge=1, le=64)] | None = None
    """How many routers run. Left out: two at first, and from then on as many as an HPA or `kubectl
    scale` writes to the Deployment NAME-router."""
    resources: ContainerResources = ContainerResources()
    """Resources of the router container. Of those that are not mentioned: requests of 100m CPU and
    256Mi of memory, limits of 4 CPUs and 4Gi."""
    policy: RouterPolicy = RouterPolicy.KV_AWARE
    """How a router chooses workers."""
    admission: RouterAdmission = RouterAdmission()
    """When a router answers 429 instead of queueing."""
    service: RouterService = RouterService()
    """The Service that clients talk to."""
    api_keys_secret_name: Annotated[
        str, Field(max_length=253, pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$")
    ] = ""
    """A Secret whose values are API keys, mounted into the routers. If it is set, requests need one
    of the keys; empty: no key is needed."""
    cors_origins: Annotated[
        tuple[Annotated[str, Field(max_length=253, pattern=r"^(\*|https?://[^/?#@ ]+)$")], ...],
        Field(max_length=32, json_schema_extra=SET),
    ] = ()
    """Origins whose pages may call the routers from a browser, such as https://app.example; `*`:
    all; empty: none."""
    inference_pool: Annotated[
        bool, refused_unless(False, because="the operator writes no InferencePool")
    ] = False
    """Whether the operator also writes a Gateway API InferencePool."""
    pod_template: PodTemplate = PodTemplate()
    """Metadata and spec merged into the router pods."""
