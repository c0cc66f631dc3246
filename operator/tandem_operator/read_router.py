"""Reads the router Deployment."""

from tandem_operator.api.names import LABEL_REVISION
from tandem_operator.client import JsonObject
from tandem_operator.observed import RouterView


def read_router(deployment: JsonObject) -> RouterView:
    """The state of the routers. Changed over means: no pod of an older template is left."""
    meta, spec = deployment["metadata"], deployment.get("spec", {})
    status = deployment.get("status") or {}
    wanted = int(spec.get("replicas", 1))
    replicas = int(status.get("replicas", 0))
    rolled_out = (
        int(status.get("observedGeneration", 0)) >= int(meta.get("generation", 0))
        and int(status.get("updatedReplicas", 0)) == wanted == replicas
        and int(status.get("availableReplicas", 0)) >= wanted
        and int(status.get("terminatingReplicas") or 0) == 0
    )
    message = next(
        (
            item.get("message", "")
            for item in status.get("conditions", [])
            if item.get("type") in ("ReplicaFailure", "Progressing")
            and (item.get("type") == "ReplicaFailure") == (item.get("status") == "True")
        ),
        "",
    )
    return RouterView(
        revision=meta.get("labels", {}).get(LABEL_REVISION, ""),
        replicas=replicas,
        ready=int(status.get("readyReplicas", 0)),
        rolled_out=rolled_out,
        message=message,
    )
