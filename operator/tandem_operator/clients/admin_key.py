"""The operator's own key, from which it derives the admin tokens of all services."""

import asyncio
import base64
import binascii
import secrets
from typing import Final

from tandem_operator.clients.cluster import Cluster
from tandem_operator.errors import ClusterError, ConflictError, MissingError

KEY_BYTES: Final = 32
_ENTRY: Final = "key"


class AdminKey:
    """A Secret in the operator's own namespace, made once and read once.

    It is the only Secret that the operator reads, so that after a restart it knows the tokens of
    workers that have been running for long.
    """

    def __init__(self, cluster: Cluster, namespace: str, name: str) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._name = name
        self._lock = asyncio.Lock()
        self._key = b""

    async def read(self) -> bytes:
        """The key. Raises ClusterError when there is none and none can be made."""
        async with self._lock:
            if not self._key:
                self._key = await self._load()
            return self._key

    async def _load(self) -> bytes:
        try:
            found = await self._cluster.get("Secret", self._name, self._namespace)
        except MissingError:
            return await self._make()
        try:
            key = base64.b64decode(found["data"][_ENTRY], validate=True)
        except (KeyError, TypeError, binascii.Error):
            key = b""
        if len(key) < KEY_BYTES:
            raise ClusterError(
                0,
                f"the Secret {self._namespace}/{self._name} has no entry {_ENTRY!r} of"
                f" {KEY_BYTES} bytes: delete the Secret, and the operator makes a new one",
            )
        return key

    async def _make(self) -> bytes:
        key = secrets.token_bytes(KEY_BYTES)
        body = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": self._name, "namespace": self._namespace},
            "type": "Opaque",
            "immutable": True,
            "data": {_ENTRY: base64.b64encode(key).decode()},
        }
        try:
            await self._cluster.create(body)
        except ConflictError:
            return await self._load()  # another replica was faster
        return key
