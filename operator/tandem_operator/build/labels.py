"""Labels and annotations that only the operator uses."""

from typing import Final

from tandem_operator.api.names import GROUP

LABEL_WORKER: Final = f"{GROUP}/worker"
"""`true` on the worker pods of both pools; a role label alone would name only one of them."""
ANNOTATION_RESTARTS: Final = f"{GROUP}/restarts"
"""How often in a row the workers before this one failed."""
ANNOTATION_SPEC_REPLICAS: Final = f"{GROUP}/spec-replicas"
"""On a WorkerPool: the service's number that was last carried over."""
ANNOTATION_MOVING: Final = f"{GROUP}/moving-streams"
"""On a draining worker: it was asked to give its streams to other workers."""
