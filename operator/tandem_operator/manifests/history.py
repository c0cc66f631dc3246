"""The record of a revision that has served: a ControllerRevision with a worker pod of each role.

A roll-out keeps the old revision at its numbers until the routers change over, and by then the spec
no longer describes it. Its workers are made like each other, or like this record if none is left.
"""

from typing import Any

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.facts.observed import Observed
from tandem_operator.manifests.wiring import Wiring
from tandem_operator.manifests.worker import Blueprint, build_worker_pod
from tandem_operator.names.labels import LABEL_REVISION, WORKER, common_labels
from tandem_operator.names.objects import CONTROLLER_REVISION, record_name, worker_pod_name
from tandem_operator.pair import Role

_GROUP = "record"
"""Stands in the place of the worker's id."""


def build_record(
    observed: Observed,
    spec: InferenceServiceSpec,
    revision: str,
    wiring: Wiring,
    owner: dict[str, Any],
) -> dict[str, Any]:
    """The record of the revision that `spec` describes; both WorkerPools must exist."""
    return {
        "apiVersion": "apps/v1",
        "kind": CONTROLLER_REVISION,
        "metadata": {
            "name": record_name(observed.name, revision),
            "namespace": observed.namespace,
            "labels": common_labels(observed.name, WORKER) | {LABEL_REVISION: revision},
            "ownerReferences": [owner],
        },
        "revision": observed.generation,
        "data": {
            str(role): build_worker_pod(
                observed,
                spec,
                Blueprint(role, worker_pod_name(observed.name, role, _GROUP), revision, wiring),
            )
            for role in Role
        },
    }
