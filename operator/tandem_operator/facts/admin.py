"""How the operator gets into /admin of a service's workers."""

import hashlib
import hmac
from dataclasses import dataclass, field

from tandem_operator.names.objects import admin_secret_name, stable_id


@dataclass(frozen=True)
class AdminAccess:
    """The Secret that the workers of a service mount, and the token in it."""

    secret_name: str = ""
    token: str = field(default="", repr=False)


def derive_access(key: bytes, namespace: str, service: str) -> AdminAccess:
    """What an operator with this key uses for a service; the same after every restart.

    A service that is made again under its name can call the workers of its predecessor, which
    `kubectl delete --cascade=orphan` leaves alone.
    The name changes with the key, so a worker that mounts this name has this token. Neither the
    name nor another service's token tells anything about a token.
    """

    def derived(purpose: str) -> str:
        return hmac.new(
            key, f"{purpose}\0{namespace}\0{service}".encode(), hashlib.sha256
        ).hexdigest()

    return AdminAccess(
        secret_name=admin_secret_name(service, stable_id(derived("name"))),
        token=derived("token"),
    )
