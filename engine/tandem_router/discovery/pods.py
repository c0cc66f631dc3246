"""Workers as the pods of a service, by list and watch at the Kubernetes API server."""

import asyncio
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, Literal

import aiohttp
import msgspec
import structlog
from kubernetes.aio import client, config

from tandem_router.discovery.source import Discovery, OnWorkers
from tandem_router.workers.link import WorkerAddress

SERVICE_LABEL: Final = "tandem.dev/service"
REVISION_LABEL: Final = "tandem.dev/revision"
ROLE_LABEL: Final = "tandem.dev/role"
DRAINING_ANNOTATION: Final = "tandem.dev/draining"
WIRE_PORT_ANNOTATION: Final = "tandem.dev/wire-port"
MODEL_ANNOTATION: Final = "tandem.dev/model-id"
DEFAULT_WIRE_PORT: Final = 8101
WATCH_SECONDS: Final = 240
SILENCE_SECONDS: Final = WATCH_SECONDS + 20.0
MAX_BACKOFF_SECONDS: Final = 5.0
_NAMESPACE_FILE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

log = structlog.get_logger(__name__)


class _Metadata(msgspec.Struct, rename="camel"):
    name: str = ""
    uid: str = ""
    resource_version: str = ""
    deletion_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class _PodStatus(msgspec.Struct):
    phase: str = ""
    pod_ip: str = msgspec.field(default="", name="podIP")


class _Pod(msgspec.Struct):
    metadata: _Metadata
    status: _PodStatus = msgspec.field(default_factory=_PodStatus)


class _PodList(msgspec.Struct):
    metadata: _Metadata
    items: list[_Pod] = []


class _Event(msgspec.Struct):
    type: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR"]
    object: msgspec.Raw


class _Status(msgspec.Struct):
    code: int = 0
    message: str = ""


class WatchExpired(Exception):
    """The API server no longer has the changes since our version (410): list again."""


class DiscoveryError(Exception):
    """The API server answered with an error; the workers known so far are kept."""


def wire_port(pod_annotations: dict[str, str]) -> int:
    """The pod's own wire port (host networking), else 8101."""
    text = pod_annotations.get(WIRE_PORT_ANNOTATION, "")
    return int(text) if text.isdecimal() else DEFAULT_WIRE_PORT


def read_pod(pod: _Pod) -> WorkerAddress | None:
    """The worker in a pod; None for routers, pods without an address, and pods that ended."""
    metadata, status = pod.metadata, pod.status
    labels, annotations = metadata.labels or {}, metadata.annotations or {}
    if labels.get(ROLE_LABEL) not in ("prefill", "decode", "both"):
        return None
    if not status.pod_ip or status.phase in ("Succeeded", "Failed"):
        return None
    return WorkerAddress(
        name=metadata.name,
        host=status.pod_ip,
        port=wire_port(annotations),
        incarnation=metadata.uid,
        marked_draining=(
            metadata.deletion_timestamp is not None
            or annotations.get(DRAINING_ANNOTATION, "false").lower() not in ("", "false")
        ),
    )


def own_namespace() -> str:
    """The namespace of this pod; "default" outside a cluster."""
    if _NAMESPACE_FILE.exists():
        return _NAMESPACE_FILE.read_text().strip()
    return os.environ.get("POD_NAMESPACE", "default")


class PodDiscovery(Discovery):
    """List, then watch; list again after 410; keep the last list while the server is away."""

    def __init__(
        self,
        service: str,
        namespace: str = "",
        *,
        revision: str = "",
        model_id: str = "",
        api: client.CoreV1Api | None = None,
    ) -> None:
        """Which pods are workers that this router can use.

        `revision`: only those of that one. `model_id`: only those whose model is this router's, of
        whatever revision. Empty: all of them.

        `api` is for tests; else the pod's service account is used.
        """
        self._selector = f"{SERVICE_LABEL}={service}"
        if revision:
            self._selector += f",{REVISION_LABEL}={revision}"
        self._model_id = model_id
        self._namespace = namespace or own_namespace()
        self._api = api
        self._pods: dict[str, _Pod] = {}

    async def run(self, on_workers: OnWorkers) -> None:
        api = self._api
        if api is None:
            config.load_incluster_config()
            api = client.CoreV1Api(client.ApiClient())
        backoff = 0.1
        try:
            while True:
                try:
                    version = await self._list(api, on_workers)
                    backoff = 0.1
                    while True:
                        version = await self._watch(api, version, on_workers)
                except WatchExpired:
                    log.info("pod watch expired, listing again")
                except (
                    aiohttp.ClientError,
                    client.ApiException,
                    msgspec.MsgspecError,
                    DiscoveryError,
                    OSError,
                    TimeoutError,
                ) as error:
                    log.warning(
                        "pods can't be watched, known workers are kept",
                        error=f"{type(error).__name__}: {error}"[:300],
                        workers=len(self._pods),
                    )
                await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
                backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)
        finally:
            await api.api_client.close()

    async def _call(self, api: client.CoreV1Api, **arguments: Any) -> aiohttp.ClientResponse:
        response = await api.list_namespaced_pod_without_preload_content(
            self._namespace, label_selector=self._selector, **arguments
        )
        raw: aiohttp.ClientResponse = getattr(response, "response", response)
        if raw.status == 410:
            raw.release()
            raise WatchExpired
        if raw.status != 200:
            text = await raw.text()
            raise DiscoveryError(f"the API server answered {raw.status}: {text[:200]}")
        return raw

    async def _list(self, api: client.CoreV1Api, on_workers: OnWorkers) -> str:
        response = await self._call(api, _request_timeout=10.0)
        pods = msgspec.json.decode(await response.read(), type=_PodList)
        self._pods = {pod.metadata.name: pod for pod in pods.items}
        self._publish(on_workers)
        return pods.metadata.resource_version

    async def _watch(self, api: client.CoreV1Api, version: str, on_workers: OnWorkers) -> str:
        """Follow changes until the server ends the watch; the version to go on from."""
        response = await self._call(
            api,
            watch=True,
            resource_version=version,
            allow_watch_bookmarks=True,
            timeout_seconds=WATCH_SECONDS,
            _request_timeout=SILENCE_SECONDS,
        )
        try:
            async for line in _lines(response):
                version = self._apply(msgspec.json.decode(line, type=_Event)) or version
                self._publish(on_workers)
        finally:
            response.close()
        return version

    def _apply(self, event: _Event) -> str:
        """Take one change over; the version it brings. Raises WatchExpired, DiscoveryError."""
        if event.type == "ERROR":
            status = msgspec.json.decode(event.object, type=_Status)
            if status.code == 410:
                raise WatchExpired
            raise DiscoveryError(f"the watch ended with {status.code}: {status.message}")
        pod = msgspec.json.decode(event.object, type=_Pod)
        if event.type == "DELETED":
            self._pods.pop(pod.metadata.name, None)
        elif event.type != "BOOKMARK":
            self._pods[pod.metadata.name] = pod
        return pod.metadata.resource_version

    def _has_model(self, pod: _Pod) -> bool:
        named = (pod.metadata.annotations or {}).get(MODEL_ANNOTATION)
        return not self._model_id or named == self._model_id

    def _publish(self, on_workers: OnWorkers) -> None:
        workers = (read_pod(pod) for pod in self._pods.values() if self._has_model(pod))
        on_workers([worker for worker in workers if worker is not None])


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Lines of any length; aiohttp's own reader refuses long ones."""
    rest = b""
    async for data in response.content.iter_any():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.strip():
                yield line
