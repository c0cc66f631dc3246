"""The API that users write: pydantic models from which the CRDs and docs/api.md are generated.

One module per noun. `inference_service`, `worker_pool` and `autoscaling_policy` hold the three
kinds; the rest are their parts. Cross-field rules are CEL (`Rule`) and run in the API server;
the models check types, ranges, patterns and unknown fields again when the operator reads.
"""

from tandem_operator.api.autoscaling_policy import AutoscalingPolicySpec, AutoscalingPolicyStatus
from tandem_operator.api.inference_service import InferenceServiceSpec
from tandem_operator.api.status import InferenceServiceStatus
from tandem_operator.api.worker_pool import WorkerPoolSpec, WorkerPoolStatus

__all__ = [
    "AutoscalingPolicySpec",
    "AutoscalingPolicyStatus",
    "InferenceServiceSpec",
    "InferenceServiceStatus",
    "WorkerPoolSpec",
    "WorkerPoolStatus",
]
