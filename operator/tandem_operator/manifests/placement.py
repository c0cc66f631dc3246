"""Where workers are placed relative to each other and to the fabric."""

from typing import Any

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.api.rdma import RdmaMode, RolePlacement
from tandem_operator.manifests.wiring import Wiring
from tandem_operator.names.labels import LABEL_ROLE, LABEL_SERVICE, LABEL_WORKER
from tandem_operator.pair import Role

_NODE = "kubernetes.io/hostname"
_ALWAYS = "requiredDuringSchedulingIgnoredDuringExecution"


def build_affinity(
    service: str, spec: InferenceServiceSpec, role: Role, wiring: Wiring
) -> dict[str, Any]:
    """The affinity of a worker's pod; empty if the scheduler decides alone."""
    placement = spec.rdma.placement
    # EFA can't connect two pods of one node.
    apart = placement.roles is RolePlacement.SPREAD or wiring.mode is RdmaMode.EFA
    workers = {LABEL_SERVICE: service, LABEL_WORKER: "true"}
    together = []
    if placement.same_fabric_key:
        together.append(_term(workers, placement.same_fabric_key))
    if placement.roles is RolePlacement.PACK:
        # All workers, and not only those of the other role: the first one may then go anywhere.
        together.append(_term(workers, _NODE))
    affinity: dict[str, Any] = {}
    if together:
        affinity["podAffinity"] = {_ALWAYS: together}
    if apart:
        (other,) = (each for each in Role if each is not role)
        affinity["podAntiAffinity"] = {_ALWAYS: [_term({**workers, LABEL_ROLE: str(other)}, _NODE)]}
    return affinity


def _term(labels: dict[str, str], key: str) -> dict[str, Any]:
    return {"labelSelector": {"matchLabels": labels}, "topologyKey": key}
