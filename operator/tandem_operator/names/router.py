"""The table of what the operator relies on in `tandem-router`: flags, routes, metrics.

The operator imports nothing of the router. `e2e/tests/test_contracts.py` holds this table against
the router's own definitions.
"""

from typing import Final

FLAG_MODEL_NAME: Final = "model-name"
FLAG_MODEL: Final = "model"
FLAG_MODEL_ID: Final = "model-id"
FLAG_HOST: Final = "host"
FLAG_PORT: Final = "port"
FLAG_METRICS_PORT: Final = "metrics-port"
FLAG_SERVICE: Final = "service"
FLAG_NAMESPACE: Final = "namespace"
FLAG_POLICY: Final = "policy"
FLAG_SLO_CLASSES: Final = "slo-classes"
FLAG_DRAIN_SECONDS: Final = "drain-seconds"
FLAG_API_KEYS_FILE: Final = "api-keys-file"
FLAG_CORS_ORIGIN: Final = "cors-origin"

ROUTE_HEALTH: Final = "/health"
ROUTE_READY: Final = "/ready"
ROUTE_METRICS: Final = "/metrics"

METRIC_TTFT: Final = "tandem_ttft_seconds"
METRIC_TBT: Final = "tandem_tbt_seconds"
METRIC_REQUESTS: Final = "tandem_requests_total"
METRIC_INFLIGHT: Final = "tandem_inflight"
METRIC_ATTAINED: Final = "tandem_slo_attained_total"
METRIC_MISSED: Final = "tandem_slo_missed_total"
METRIC_LABEL_CLASS: Final = "class"
METRIC_LABEL_OBJECTIVE: Final = "objective"
OBJECTIVES: Final = ("ttft", "tbt")
"""Values of the label `objective`."""
