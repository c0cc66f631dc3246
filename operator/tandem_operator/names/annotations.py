"""The table of annotations: on worker pods, on WorkerPools, and those of others on nodes."""

from typing import Final

from tandem_operator.names.objects import GROUP

ANNOTATION_DRAINING: Final = f"{GROUP}/draining"
"""On a worker pod: when its drain began. Routers send no more work to a pod that has it."""
ANNOTATION_MOVING: Final = f"{GROUP}/moving-streams"
"""On a draining worker pod: `true` once it was asked to give its streams to other workers."""
ANNOTATION_HTTP_PORT: Final = f"{GROUP}/http-port"
"""On a worker pod: the port of its health, its metrics and /admin/*."""
ANNOTATION_WIRE_PORT: Final = f"{GROUP}/wire-port"
"""On a worker pod: the port at which routers connect."""
ANNOTATION_BOOTSTRAP_PORT: Final = f"{GROUP}/bootstrap-port"
"""On a worker pod: the port at which it shakes hands before KV moves."""
ANNOTATION_COST: Final = f"{GROUP}/cost"
"""On a worker pod: what losing it costs, set by a user; the cheapest worker is drained first."""
ANNOTATION_RESTARTS: Final = f"{GROUP}/restarts"
"""On a worker pod: how many workers in a row failed in its place before it."""
ANNOTATION_SERVED: Final = f"{GROUP}/served"
"""On a worker pod: `true` if it was made like a worker of a revision that served before."""
ANNOTATION_MODEL: Final = f"{GROUP}/model-id"
"""On a worker pod and on the routers' Deployment: the id of what routers know of the model. A
router sends requests to the workers that have its own."""
GKE_NETWORK_STATUS: Final = "networking.gke.io/network-status"
"""On a node, by GKE: the networks that it is on, as JSON."""
ANNOTATION_SPEC_REPLICAS: Final = f"{GROUP}/spec-replicas"
"""On a WorkerPool: the number in the service's spec that was last copied to the pool."""
ANNOTATION_IGNORED_SCALE: Final = f"{GROUP}/ignored-scale"
"""On a WorkerPool: which write to its scale has no effect, and why."""
