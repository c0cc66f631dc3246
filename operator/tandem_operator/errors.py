"""Errors of the operator, one tree.

OperatorError
├── SpecError (ValueError)   an object's spec can't be read or served; the user has to change it
│   └── RefusedFieldError    the API server refuses what the user wrote into pods
├── NotOwnedError            an object of that name belongs to someone else
├── UnreachableError         nothing says where the API server is, or how to log in there
├── ClusterError             the API server refused or couldn't be reached; carries the status
│   ├── MissingError         404
│   ├── ConflictError        409
│   └── NamespaceEndsError   403, because the namespace is being deleted
└── LeadershipLost           another replica holds the lease
"""

from typing import ClassVar


class OperatorError(Exception):
    """Base of every error that the operator raises on purpose. Conditions show its `reason`."""

    reason: ClassVar[str] = "StepFailed"


class SpecError(OperatorError, ValueError):
    """The spec of an object can't be served as it is."""


class RefusedFieldError(SpecError):
    """A pod can't be made with a field that the user wrote; the message has the field's path."""

    reason = "FieldRefused"


class NotOwnedError(OperatorError):
    """A child's name is taken by an object that this service doesn't own."""


class UnreachableError(OperatorError):
    """There is no usable kubeconfig, and the process runs in no pod; the message has the remedy."""


class ClusterError(OperatorError):
    """The API server answered with an error (`status`), or not at all (`status` 0)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{message} (HTTP {status})" if status else message)
        self.status = status
        self.message = message


class MissingError(ClusterError):
    """The object doesn't exist."""


class ConflictError(ClusterError):
    """The object exists already, or changed since it was read."""


class NamespaceEndsError(ClusterError):
    """Nothing can be made in the namespace any more, because it is being deleted."""


class LeadershipLost(OperatorError):
    """The lease belongs to another replica now; this process must end and start as a standby."""
