"""Just enough of a Kubernetes API server to list and watch pods, and to misbehave."""

import asyncio
import json
from typing import Any

from aiohttp import web
from kubernetes.aio import client


def pod(
    name: str,
    *,
    role: str = "decode",
    ip: str = "127.0.0.1",
    port: int = 8101,
    uid: str = "u1",
    phase: str = "Running",
    draining: str | None = None,
    deleted: bool = False,
) -> dict[str, Any]:
    """A pod as the API server gives it, cut down."""
    annotations = {"tandem.dev/wire-port": str(port)}
    if draining is not None:
        annotations["tandem.dev/draining"] = draining
    metadata: dict[str, Any] = {
        "name": name,
        "uid": uid,
        "labels": {"tandem.dev/service": "svc", "tandem.dev/role": role},
        "annotations": annotations,
    }
    if deleted:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    return {"metadata": metadata, "spec": {}, "status": {"phase": phase, "podIP": ip}}


class FakeApiServer:
    """Pods by name; every change goes to all open watches."""

    def __init__(self) -> None:
        self.pods: dict[str, dict[str, Any]] = {}
        self.version = 1
        self.num_lists = 0
        self.num_watches = 0
        self.num_refused = 0
        self.fail_with: int | None = None
        self.selectors: set[str] = set()
        self._history: list[tuple[int, dict[str, Any]]] = []
        self._watches: list[asyncio.Queue[dict[str, Any] | None]] = []
        self._runner: web.AppRunner | None = None
        self.port = 0

    async def start(self) -> "FakeApiServer":
        app = web.Application()
        app.router.add_get("/api/v1/namespaces/ns/pods", self._pods)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def stop(self) -> None:
        self.close_watches()
        assert self._runner is not None
        await self._runner.cleanup()

    def api(self) -> client.CoreV1Api:
        configuration = client.Configuration()
        configuration.host = f"http://127.0.0.1:{self.port}"
        return client.CoreV1Api(client.ApiClient(configuration))

    def put(self, entry: dict[str, Any]) -> None:
        name = entry["metadata"]["name"]
        kind = "MODIFIED" if name in self.pods else "ADDED"
        self._change(kind, entry)
        self.pods[name] = entry

    def delete(self, name: str) -> None:
        self._change("DELETED", self.pods.pop(name))

    def _change(self, kind: str, entry: dict[str, Any]) -> None:
        self.version += 1
        entry["metadata"]["resourceVersion"] = str(self.version)
        event = {"type": kind, "object": entry}
        self._history.append((self.version, event))
        self.send(event)

    def send(self, event: dict[str, Any]) -> None:
        """Any event, to all watches."""
        for queue in self._watches:
            queue.put_nowait(event)

    def close_watches(self) -> None:
        for queue in self._watches:
            queue.put_nowait(None)

    async def _pods(self, request: web.Request) -> web.StreamResponse:
        self.selectors.add(request.query.get("labelSelector", ""))
        if self.fail_with is not None:
            self.num_refused += 1
            return web.json_response({"message": "go away"}, status=self.fail_with)
        if request.query.get("watch") not in ("true", "True"):
            self.num_lists += 1
            return web.json_response(
                {"metadata": {"resourceVersion": str(self.version)}, "items": [*self.pods.values()]}
            )
        self.num_watches += 1
        response = web.StreamResponse()
        await response.prepare(request)
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        # What changed since the list that this watch continues.
        since = int(request.query.get("resourceVersion") or self.version)
        for version, missed in self._history:
            if version > since:
                queue.put_nowait(missed)
        self._watches.append(queue)
        try:
            while (event := await queue.get()) is not None:
                # In two halves: lines don't come whole.
                data = json.dumps(event).encode() + b"\n"
                await response.write(data[:7])
                await response.write(data[7:])
        finally:
            self._watches.remove(queue)
        return response
