"""A child as it is in the API server: an object, other than a worker, that a service owns."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ChildView:
    """`owners` are the uids in its owner references."""

    kind: str
    name: str
    uid: str
    owners: frozenset[str] = frozenset()
