"""What users may change in a pod: metadata and spec that are merged into the operator's."""

from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from tandem_operator.api.api_object import ApiObject, Rule, keyed_by
from tandem_operator.names.labels import LABEL_FAULTS, LABEL_PREFIXES
from tandem_operator.names.objects import GROUP

_OPEN: dict[str, Any] = {"x-kubernetes-preserve-unknown-fields": True}
LabelMap = Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=64)]
AnnotationMap = Annotated[dict[str, Annotated[str, Field(max_length=65536)]], Field(max_length=64)]


def _free(prefixes: tuple[str, ...]) -> str:
    return " && ".join(f"!k.startsWith('{prefix}')" for prefix in prefixes)


class PodTemplateMetadata(ApiObject):
    """Labels and annotations added to the pods."""

    labels: LabelMap = Field(default={})
    """Labels added to the pods; the operator's labels can't be replaced."""
    annotations: AnnotationMap = Field(default={})
    """Annotations added to the pods."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"self.labels.all(k, k == '{LABEL_FAULTS}' || ({_free(LABEL_PREFIXES)}))",
            "podTemplate.metadata.labels must not set tandem.dev/* or app.kubernetes.io/* labels,"
            " by which the operator finds its pods: choose another prefix",
            ".labels",
        ),
        Rule(
            f"self.annotations.all(k, {_free((f'{GROUP}/',))})",
            "podTemplate.metadata.annotations must not set tandem.dev/* annotations, which the"
            " operator writes: choose another prefix",
            ".annotations",
        ),
    )


class HostPathVolume(ApiObject):
    """The node path of a volume."""

    model_config = ConfigDict(extra="allow")
    schema_extra: ClassVar[dict[str, Any]] = _OPEN

    path: Annotated[str, Field(max_length=4096)] = ""
    """Path on the node."""


class PodVolume(ApiObject):
    """A volume; any field of a pod's volume may be set."""

    model_config = ConfigDict(extra="allow")
    schema_extra: ClassVar[dict[str, Any]] = _OPEN

    name: Annotated[str, Field(min_length=1, max_length=63)]
    """Name of the volume in the pod."""
    host_path: HostPathVolume | None = None
    """A path on the node."""


class PodTemplateSpec(ApiObject):
    """A partial pod spec; any field of a pod's spec may be set."""

    model_config = ConfigDict(extra="allow")
    schema_extra: ClassVar[dict[str, Any]] = _OPEN

    host_network: bool = False
    """Whether the pods use the node's network. Each worker then has three ports of its own, which
    its annotations name; routers have one port, so a node takes one router of a service.
    NetworkPolicies don't hold for such pods."""
    volumes: Annotated[
        tuple[PodVolume, ...], Field(max_length=64, json_schema_extra=keyed_by("name"))
    ] = ()
    """Volumes added to the pods."""


class PodTemplate(ApiObject):
    """Metadata and spec merged into the pods: node selector, tolerations, sidecars and so on."""

    metadata: PodTemplateMetadata = PodTemplateMetadata()
    """Labels and annotations added to the pods."""
    spec: PodTemplateSpec = PodTemplateSpec()
    """A partial pod spec merged into the pods. Lists with names merge by name: a container called
    `engine` (in routers `router`) changes the operator's container, others are sidecars.
    Tolerations, the terms of an affinity and capabilities are added to the operator's. To take
    something of the operator's away write `$patch: delete` in its place, like
    `livenessProbe: {$patch: delete}`, because `kubectl apply` sends no nulls; `$patch: replace` in
    an object puts it in the place of the operator's. A field that a pod doesn't have is told in the
    condition Degraded."""
