"""The client against a server that answers as the API server does."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tandem_operator.clients.cluster import Cluster
from tandem_operator.errors import ClusterError, ConflictError, MissingError, NamespaceEndsError


class Api:
    """Records requests; answers with what `answers` holds for a path."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str], str, Any]] = []
        self.answers: dict[str, tuple[int, Any]] = {}

    async def handle(self, request: web.Request) -> web.Response:
        text = await request.text()
        body = json.loads(text) if text else None
        kind = request.headers.get("Content-Type", "")
        self.requests.append((request.method, request.path, dict(request.query), kind, body))
        status, answer = self.answers.get(request.path, (200, body or {}))
        if isinstance(answer, str):
            return web.Response(text=answer, status=status)
        return web.json_response(answer, status=status)


@pytest.fixture
async def api() -> AsyncIterator[tuple[Api, Cluster]]:
    api = Api()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", api.handle)
    server = TestServer(app)
    await server.start_server()
    cluster = await Cluster.connect(str(kubeconfig(str(server.make_url("")))))
    yield api, cluster
    await cluster.close()
    await server.close()


_paths: list[Path] = []


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path) -> None:
    _paths[:] = [tmp_path]


def kubeconfig(url: str) -> Path:
    path = _paths[0] / "kubeconfig"
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": {"server": url.rstrip("/")}}],
                "users": [{"name": "u", "user": {"token": "t"}}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "x",
            }
        )
    )
    return path


async def test_apply_is_server_side_and_forced(api: tuple[Api, Cluster]) -> None:
    server, cluster = api
    body = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "d", "namespace": "ns"},
    }
    assert await cluster.apply(body) == body
    method, path, query, kind, _ = server.requests[-1]
    assert (method, path) == ("PATCH", "/apis/apps/v1/namespaces/ns/deployments/d")
    assert kind == "application/apply-patch+yaml"
    assert query["fieldManager"] == "tandem-operator"
    assert query["force"].lower() == "true"


async def test_creates_and_applies_refuse_fields_that_the_api_server_does_not_know(
    api: tuple[Api, Cluster],
) -> None:
    server, cluster = api
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "ns"}}
    await cluster.create(body)
    await cluster.apply(body)
    await cluster.apply(body, "another")
    await cluster.merge("WorkerPool", "p", "ns", {}, subresource="status")
    queries = [query for _, _, query, _, _ in server.requests]
    assert [query.get("fieldValidation") for query in queries] == ["Strict"] * 3 + [None]
    managers = [query["fieldManager"] for query in queries]
    assert managers == ["tandem-operator", "tandem-operator", "another", "tandem-operator"]


async def test_lists_fill_in_the_kind(api: tuple[Api, Cluster]) -> None:
    server, cluster = api
    server.answers["/api/v1/namespaces/ns/pods"] = (200, {"items": [{"metadata": {"name": "p"}}]})
    pods = await cluster.list("Pod", "ns", "a=b")
    assert pods == [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}}]
    assert server.requests[-1][2]["labelSelector"] == "a=b"


async def test_merge_goes_to_subresources(api: tuple[Api, Cluster]) -> None:
    server, cluster = api
    await cluster.merge("WorkerPool", "p", "ns", {"status": {}}, subresource="status")
    method, path, _, kind, body = server.requests[-1]
    assert method == "PATCH"
    assert path == "/apis/tandem.dev/v1alpha1/namespaces/ns/workerpools/p/status"
    assert kind == "application/merge-patch+json"
    assert body == {"status": {}}


async def test_delete_names_the_uid_and_forgives_absence(api: tuple[Api, Cluster]) -> None:
    server, cluster = api
    path = "/api/v1/namespaces/ns/pods/p"
    server.answers[path] = (404, {"message": "not found"})
    await cluster.delete("Pod", "p", "ns", uid="u", grace_seconds=5)
    body = server.requests[-1][4]
    assert body["preconditions"] == {"uid": "u"}
    assert body["gracePeriodSeconds"] == 5


@pytest.mark.parametrize(
    ("status", "kind"), [(404, MissingError), (409, ConflictError), (403, ClusterError)]
)
async def test_errors_are_typed(
    api: tuple[Api, Cluster], status: int, kind: type[ClusterError]
) -> None:
    server, cluster = api
    server.answers["/api/v1/nodes/n"] = (status, {"message": "because"})
    with pytest.raises(kind, match="because") as caught:
        await cluster.get("Node", "n")
    assert caught.value.status == status


async def test_a_namespace_that_is_being_deleted_is_told_from_other_refusals(
    api: tuple[Api, Cluster],
) -> None:
    """The body is one of a real API server."""
    server, cluster = api
    message = (
        'pods "p" is forbidden: unable to create new content in namespace ns because it is being'
        " terminated"
    )
    cause = {
        "reason": "NamespaceTerminating",
        "message": "namespace ns is being terminated",
        "field": "metadata.namespace",
    }
    details = {"name": "p", "kind": "pods", "causes": [cause]}
    answer = {"kind": "Status", "message": message, "reason": "Forbidden", "details": details}
    server.answers["/api/v1/namespaces/ns/pods"] = (403, answer)
    with pytest.raises(NamespaceEndsError, match="being terminated") as caught:
        await cluster.create({"kind": "Pod", "metadata": {"name": "p", "namespace": "ns"}})
    assert caught.value.status == 403


async def test_plain_text_errors_are_told(api: tuple[Api, Cluster]) -> None:
    server, cluster = api
    server.answers["/api/v1/nodes/n"] = (500, "boom")
    with pytest.raises(ClusterError, match="boom"):
        await cluster.get("Node", "n")


async def test_create_replace_and_logs(api: tuple[Api, Cluster]) -> None:
    server, cluster = api
    body = {"kind": "Lease", "metadata": {"name": "l", "namespace": "ns"}}
    await cluster.create(body)
    await cluster.replace(body)
    assert [request[0] for request in server.requests] == ["POST", "PUT"]
    server.answers["/api/v1/namespaces/ns/pods/p/log"] = (200, "last words\n")
    assert await cluster.pod_log("ns", "p", "engine", 30) == "last words"
    assert server.requests[-1][2]["tailLines"] == "30"


async def test_a_server_that_is_away_is_a_cluster_error() -> None:
    cluster = await Cluster.connect(str(kubeconfig("http://127.0.0.1:9")))
    with pytest.raises(ClusterError, match="reach the API server") as caught:
        await cluster.get("Node", "n")
    assert caught.value.status == 0
    await cluster.close()


async def test_the_last_warning_about_a_pod(api: tuple[Api, Cluster]) -> None:
    server, cluster = api
    path = "/apis/events.k8s.io/v1/namespaces/ns/events"
    assert await cluster.last_warning("ns", "p") is None
    repeated = {
        "metadata": {},
        "reason": "FailedMount",
        "eventTime": "2026-11-22T12:00:00Z",
        "series": {"lastObservedTime": "2026-11-22T12:09:00Z"},
    }
    once = {"metadata": {}, "reason": "Failed", "deprecatedLastTimestamp": "2026-11-22T12:05:00Z"}
    server.answers[path] = (200, {"items": [repeated, once]})
    assert await cluster.last_warning("ns", "p") == repeated
    selector = "regarding.kind=Pod,regarding.name=p,type=Warning"
    assert server.requests[-1][2]["fieldSelector"] == selector
