"""The one Kubernetes client of the process: typed errors, plain dictionaries, no discovery.

Every kind that the operator touches is listed in `KINDS`, so that what it can do is visible here
and in the chart's rules, and start-up needs no discovery request.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import yaml
from kubernetes.aio import client as kube
from kubernetes.aio import config as kube_config
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.dynamic import DynamicClient
from kubernetes.aio.dynamic.resource import Resource

from tandem_operator.errors import (
    ClusterError,
    ConflictError,
    MissingError,
    NamespaceEndsError,
    UnreachableError,
)
from tandem_operator.names.objects import (
    AUTOSCALING_POLICIES,
    AUTOSCALING_POLICY,
    CLAIM_TEMPLATE,
    CONTROLLER_REVISION,
    GROUP,
    INFERENCE_SERVICE,
    INFERENCE_SERVICES,
    OPERATOR,
    VERSION,
    WORKER_POOL,
    WORKER_POOLS,
)

REQUEST_SECONDS: Final = 30.0
_STRICT: Final = (("fieldValidation", "Strict"),)
"""For what users have a part in: an unknown field is refused instead of dropped. A status is not
strict: while older CRDs are installed, it is written without the fields that they lack."""
_NAMESPACE_ENDS: Final = "NamespaceTerminating"
"""The cause in a refusal to make something in a namespace that is being deleted."""
# What the loader raises for files that are missing, or that are no kubeconfig.
_UNREADABLE: Final = (
    *(kube_config.ConfigException, OSError, yaml.YAMLError),
    *(TypeError, AttributeError, LookupError, ValueError),
)
JsonObject = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """Where a kind lives in the API; `group` is empty for the core group."""

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


KINDS: Final[Mapping[str, Kind]] = {
    kind.kind: kind
    for kind in (
        Kind(GROUP, VERSION, INFERENCE_SERVICE, INFERENCE_SERVICES),
        Kind(GROUP, VERSION, WORKER_POOL, WORKER_POOLS),
        Kind(GROUP, VERSION, AUTOSCALING_POLICY, AUTOSCALING_POLICIES),
        Kind("", "v1", "Pod", "pods"),
        Kind("", "v1", "Service", "services"),
        Kind("", "v1", "ServiceAccount", "serviceaccounts"),
        Kind("", "v1", "Secret", "secrets"),
        Kind("", "v1", "Node", "nodes", namespaced=False),
        Kind("apps", "v1", "Deployment", "deployments"),
        Kind("apps", "v1", CONTROLLER_REVISION, "controllerrevisions"),
        Kind("rbac.authorization.k8s.io", "v1", "Role", "roles"),
        Kind("rbac.authorization.k8s.io", "v1", "RoleBinding", "rolebindings"),
        Kind("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies"),
        Kind("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets"),
        Kind("events.k8s.io", "v1", "Event", "events"),
        Kind("coordination.k8s.io", "v1", "Lease", "leases"),
        Kind("resource.k8s.io", "v1", CLAIM_TEMPLATE, "resourceclaimtemplates"),
        Kind("resource.k8s.io", "v1", "ResourceSlice", "resourceslices", namespaced=False),
        Kind("resource.k8s.io", "v1", "DeviceClass", "deviceclasses", namespaced=False),
    )
}


class Cluster:
    """Reads and writes objects as dictionaries. One per process; close it at the end."""

    def __init__(self, api: kube.ApiClient) -> None:
        self._api = api
        self._dynamic = DynamicClient(api)
        self._resources = {name: _resource(kind, self._dynamic) for name, kind in KINDS.items()}

    @classmethod
    async def connect(cls, kubeconfig: str | None = None, context: str | None = None) -> "Cluster":
        """Open the client: `kubeconfig` if given, else the pod's own service account.

        Raises UnreachableError when that can't be read.
        """
        configuration = kube.Configuration()
        try:
            if kubeconfig:
                _check_exists(kubeconfig)
                await kube_config.load_kube_config(
                    config_file=kubeconfig, context=context, client_configuration=configuration
                )
            else:
                kube_config.load_incluster_config(client_configuration=configuration)
        except _UNREADABLE as error:
            raise UnreachableError(_no_cluster(kubeconfig, error)) from error
        # aiohttp's own retries hide how long a call really takes; the queue repeats whole passes.
        configuration.retries = None
        return cls(kube.ApiClient(configuration))

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()

    async def get(self, kind: str, name: str, namespace: str | None = None) -> JsonObject:
        """One object. Raises MissingError when there is none."""
        return await self._request("get", self._path(kind, name, namespace))

    async def list(
        self, kind: str, namespace: str | None = None, label_selector: str | None = None
    ) -> list[JsonObject]:
        """All objects of a kind that match, each with its apiVersion and kind filled in."""
        answer = await self._request(
            "get", self._path(kind, None, namespace), label_selector=label_selector
        )
        shape = KINDS[kind]
        return [
            {"apiVersion": shape.api_version, "kind": shape.kind, **item}
            for item in answer.get("items", [])
        ]

    async def create(self, body: JsonObject) -> JsonObject:
        """Create an object. Raises ConflictError when the name is taken."""
        path = self._path(body["kind"], None, body["metadata"].get("namespace"))
        return await self._request(
            "post", path, body=body, field_manager=OPERATOR, query_params=[*_STRICT]
        )

    async def apply(self, body: JsonObject, manager: str = OPERATOR) -> JsonObject:
        """Server-side apply of a child: `manager` then owns every field in it."""
        meta = body["metadata"]
        return await self._request(
            "patch",
            self._path(body["kind"], meta["name"], meta.get("namespace")),
            body=body,
            content_type="application/apply-patch+yaml",
            field_manager=manager,
            force_conflicts=True,
            query_params=[*_STRICT],
        )

    async def merge(
        self, kind: str, name: str, namespace: str | None, body: JsonObject, subresource: str = ""
    ) -> JsonObject:
        """JSON merge patch of an object or of one of its subresources."""
        return await self._request(
            "patch",
            self._path(kind, name, namespace) + (f"/{subresource}" if subresource else ""),
            body=body,
            content_type="application/merge-patch+json",
            field_manager=OPERATOR,
        )

    async def replace(self, body: JsonObject) -> JsonObject:
        """Put an object with its resourceVersion. Raises ConflictError when it changed since."""
        meta = body["metadata"]
        path = self._path(body["kind"], meta["name"], meta.get("namespace"))
        return await self._request("put", path, body=body, field_manager=OPERATOR)

    async def delete(
        self,
        kind: str,
        name: str,
        namespace: str | None = None,
        *,
        uid: str | None = None,
        grace_seconds: int | None = None,
    ) -> None:
        """Delete an object, only the one with `uid` if given. A missing object is not an error."""
        body: JsonObject = {"propagationPolicy": "Background"}
        if uid:
            body["preconditions"] = {"uid": uid}
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        try:
            await self._request("delete", self._path(kind, name, namespace), body=body)
        except MissingError:
            return

    async def pod_log(self, namespace: str, pod: str, container: str, num_lines: int) -> str:
        """The last lines that a container wrote. Raises ClusterError when there are none."""
        query: list[tuple[str, Any]] = [
            ("container", container),
            ("tailLines", num_lines),
            ("limitBytes", 16384),
        ]
        path = self._path("Pod", pod, namespace) + "/log"
        response = await self._call("get", path, query_params=query)
        return (await response.text()).rstrip()

    async def last_warning(self, namespace: str, pod: str) -> JsonObject | None:
        """The newest warning among the events about a pod, or None."""
        selector = f"regarding.kind=Pod,regarding.name={pod},type=Warning"
        path = self._path("Event", None, namespace)
        answer = await self._request("get", path, query_params=[("fieldSelector", selector)])
        return max(answer.get("items", []), key=_event_time, default=None)

    def _path(self, kind: str, name: str | None, namespace: str | None) -> str:
        return str(self._resources[kind].path(name=name, namespace=namespace))

    async def _request(self, method: str, path: str, **params: Any) -> JsonObject:
        response = await self._call(method, path, **params)
        answer: JsonObject = await response.json()
        return answer

    async def _call(self, method: str, path: str, **params: Any) -> aiohttp.ClientResponse:
        # The dynamic client's defaults for these two are shared mutable objects.
        params.setdefault("query_params", [])
        params.setdefault("header_params", {})
        try:
            response: aiohttp.ClientResponse = await self._dynamic.request(
                method, path, serialize=False, _request_timeout=REQUEST_SECONDS, **params
            )
        except ApiException as error:
            raise _typed(error) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ClusterError(0, f"can't reach the API server: {error!r}") from error
        return response


def _check_exists(kubeconfig: str) -> None:
    # The loader itself prints the names of missing files, and goes on.
    if not any(Path(name).expanduser().exists() for name in kubeconfig.split(os.pathsep)):
        raise FileNotFoundError("there is no such file")


def _no_cluster(kubeconfig: str | None, error: Exception) -> str:
    detail = " ".join(str(error).split())
    if kubeconfig:
        return f"--kubeconfig {kubeconfig} can't be used ({detail}): name a kubeconfig file"
    return (
        f"there is no cluster to work in ({detail}): run it in a pod with a service account, "
        "or name a file with --kubeconfig"
    )


def _resource(kind: Kind, dynamic: DynamicClient) -> Resource:
    return Resource(
        prefix="apis" if kind.group else "api",
        group=kind.group,
        api_version=kind.version,
        kind=kind.kind,
        namespaced=kind.namespaced,
        name=kind.plural,
        client=dynamic,
    )


def _event_time(event: JsonObject) -> str:
    series = event.get("series") or {}
    return str(
        series.get("lastObservedTime")
        or event.get("deprecatedLastTimestamp")
        or event.get("eventTime")
        or event["metadata"].get("creationTimestamp")
    )


def _typed(error: ApiException) -> ClusterError:
    status = int(error.status or 0)
    kinds = {404: MissingError, 409: ConflictError}
    told = _status_object(error)
    causes = (told.get("details") or {}).get("causes") or ()
    ends = any(cause.get("reason") == _NAMESPACE_ENDS for cause in causes)
    kind = NamespaceEndsError if ends else kinds.get(status, ClusterError)
    return kind(status, str(told.get("message") or error.reason))


def _status_object(error: ApiException) -> JsonObject:
    """The API server's Status; of an answer that isn't one, an object with the text as message."""
    body = error.body
    if isinstance(body, bytes):
        body = body.decode(errors="replace")
    try:
        parsed = json.loads(body or "")
    except ValueError:
        return {"message": body}
    return parsed if isinstance(parsed, dict) else {}
