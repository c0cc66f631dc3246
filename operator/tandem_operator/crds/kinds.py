"""The three kinds as CustomResourceDefinitions: names, columns, subresources, schemas."""

from dataclasses import dataclass, field
from typing import Any

from tandem_operator.api.api_object import ApiObject, Rule
from tandem_operator.api.autoscaling_policy import AutoscalingPolicySpec, AutoscalingPolicyStatus
from tandem_operator.api.inference_service import ROOT_RULES, InferenceServiceSpec
from tandem_operator.api.status import InferenceServiceStatus
from tandem_operator.api.worker_pool import WorkerPoolSpec, WorkerPoolStatus
from tandem_operator.crds.refusals import refuse
from tandem_operator.crds.structural import structural_schema
from tandem_operator.names import labels, objects


@dataclass(frozen=True)
class Column:
    """One column of `kubectl get`."""

    name: str
    type: str
    json_path: str
    description: str
    priority: int = 0

    def to_manifest(self) -> dict[str, Any]:
        """The entry of additionalPrinterColumns."""
        entry: dict[str, Any] = {
            "name": self.name,
            "type": self.type,
            "jsonPath": self.json_path,
            "description": self.description,
        }
        if self.priority:
            entry["priority"] = self.priority
        return entry


@dataclass(frozen=True)
class Kind:
    """One kind of the API."""

    kind: str
    plural: str
    short_name: str
    description: str
    spec: type[ApiObject]
    status: type[ApiObject]
    columns: tuple[Column, ...]
    root_rules: tuple[Rule, ...] = ()
    subresources: dict[str, Any] = field(default_factory=lambda: {"status": {}})

    @property
    def crd_name(self) -> str:
        """Name of the CRD, and base name of its file."""
        return f"{self.plural}.{objects.GROUP}"

    def object_schema(self) -> dict[str, Any]:
        """Schema of the whole object, as it is in the CRD."""
        return refuse(self.marked_schema())

    def marked_schema(self) -> dict[str, Any]:
        """Schema of the whole object in which refusals are still marks, not rules."""
        schema: dict[str, Any] = {
            "description": self.description,
            "type": "object",
            "required": ["spec"],
            "properties": {
                "apiVersion": {"description": "Group and version.", "type": "string"},
                "kind": {"description": "Kind of the object.", "type": "string"},
                "metadata": {"type": "object"},
                "spec": structural_schema(self.spec),
                "status": structural_schema(self.status),
            },
        }
        if self.root_rules:
            schema["x-kubernetes-validations"] = [rule.to_schema() for rule in self.root_rules]
        return schema

    def to_manifest(self) -> dict[str, Any]:
        """The CustomResourceDefinition."""
        return {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {
                "name": self.crd_name,
                "labels": {labels.LABEL_NAME: "tandem", labels.LABEL_COMPONENT: "crds"},
            },
            "spec": {
                "group": objects.GROUP,
                "scope": "Namespaced",
                "names": {
                    "kind": self.kind,
                    "listKind": f"{self.kind}List",
                    "plural": self.plural,
                    "singular": self.kind.lower(),
                    "shortNames": [self.short_name],
                    "categories": ["tandem"],
                },
                "versions": [
                    {
                        "name": objects.VERSION,
                        "served": True,
                        "storage": True,
                        "subresources": self.subresources,
                        "additionalPrinterColumns": [c.to_manifest() for c in self.columns],
                        "schema": {"openAPIV3Schema": self.object_schema()},
                    }
                ],
            },
        }


_AGE = Column("Age", "date", ".metadata.creationTimestamp", "Time since the object was created.")
_READY = Column(
    "Ready", "string", '.status.conditions[?(@.type=="Ready")].status', "The condition Ready."
)

INFERENCE_SERVICE = Kind(
    kind=objects.INFERENCE_SERVICE,
    plural=objects.INFERENCE_SERVICES,
    short_name="tisvc",
    description=(
        "InferenceService is one disaggregated fleet: a model served by a pool of prefill workers,"
        " a pool of decode workers and the routers in front of them."
    ),
    spec=InferenceServiceSpec,
    status=InferenceServiceStatus,
    columns=(
        Column("Model", "string", ".status.model", "Served name of the model."),
        Column(
            "Prefill",
            "integer",
            '.status.pools[?(@.role=="Prefill")].ready',
            "Prefill workers that take work.",
        ),
        Column(
            "Decode",
            "integer",
            '.status.pools[?(@.role=="Decode")].ready',
            "Decode workers that take work.",
        ),
        Column("Ratio", "string", ".status.ratio", "Ready prefill to ready decode workers."),
        Column(
            "TTFT", "integer", ".status.slo.ttftMilliseconds", "Time to first token, milliseconds."
        ),
        Column("TBT", "integer", ".status.slo.tbtMilliseconds", "Time between tokens, ms."),
        Column("Transport", "string", ".status.transport.backend", "What moves KV."),
        Column(
            "Link",
            "string",
            '.status.conditions[?(@.type=="TransportVerified")].reason',
            "Whether KV moves as it should: KvMoved, or what is wrong.",
        ),
        _READY,
        _AGE,
        Column("URL", "string", ".status.url", "Where clients reach the service.", priority=1),
        Column("Revision", "string", ".status.revision", "Revision that serves.", priority=1),
        Column("Operator", "string", ".status.operator", "Lease of who serves this.", priority=1),
    ),
    root_rules=ROOT_RULES,
)

WORKER_POOL = Kind(
    kind=objects.WORKER_POOL,
    plural=objects.WORKER_POOLS,
    short_name="tpool",
    description=(
        "WorkerPool is one role of an InferenceService. The operator writes it; users, HPA and KEDA"
        " scale it."
    ),
    spec=WorkerPoolSpec,
    status=WorkerPoolStatus,
    columns=(
        Column("Service", "string", ".spec.serviceName", "InferenceService of the pool."),
        Column("Role", "string", ".spec.role", "Role of the workers."),
        Column("Wanted", "integer", ".spec.replicas", "Workers written to the scale."),
        Column("Desired", "integer", ".status.desiredReplicas", "Workers being worked towards."),
        Column("Current", "integer", ".status.replicas", "Workers that exist."),
        Column("Ready", "integer", ".status.readyReplicas", "Workers that take work."),
        Column("Revision", "string", ".spec.revision", "Revision of the workers.", priority=1),
        _AGE,
    ),
    subresources={
        "status": {},
        "scale": {
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        },
    },
)

AUTOSCALING_POLICY = Kind(
    kind=objects.AUTOSCALING_POLICY,
    plural=objects.AUTOSCALING_POLICIES,
    short_name="tpolicy",
    description=(
        "AutoscalingPolicy says how both pools of the InferenceServices that name it follow the"
        " load."
    ),
    spec=AutoscalingPolicySpec,
    status=AutoscalingPolicyStatus,
    columns=(
        Column("Mode", "string", ".spec.mode", "Whether decisions are carried out."),
        Column("Prefill-Max", "integer", ".spec.pools.prefill.max", "Most prefill workers."),
        Column("Decode-Max", "integer", ".spec.pools.decode.max", "Most decode workers."),
        Column("GPU-Budget", "integer", ".spec.coordination.gpuBudget", "Most GPUs; 0: no limit."),
        Column("Targets", "string", ".status.targets[*].name", "Services that it scales."),
        _AGE,
    ),
)

KINDS = (INFERENCE_SERVICE, WORKER_POOL, AUTOSCALING_POLICY)
