"""The routes, and the application that serves them with OpenAI-shaped 404s and 405s."""

from collections.abc import Mapping
from functools import cache
from typing import Final

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tandem_router.api import cors, endpoints, reference, schema, service_endpoints
from tandem_router.api.context import RouterContext
from tandem_router.api.exchange import Endpoint, Exchange
from tandem_router.api.reference import RouteSpec
from tandem_router.errors import MethodNotAllowed, NotFound, RouterError


async def openapi(exchange: Exchange) -> None:
    """GET /openapi.json: this API for programs."""
    await exchange.reply(msgspec.json.encode(_document()))


async def docs(exchange: Exchange) -> None:
    """GET /docs: this API as a page."""
    page = reference.build_page(_document()).encode()
    await exchange.reply(page, content_type=b"text/html; charset=utf-8")


ROUTES: Final = (
    RouteSpec(
        "POST",
        "/v1/chat/completions",
        endpoints.create_chat_completion,
        schema.ChatRequest,
        direct=True,
    ),
    RouteSpec(
        "POST",
        "/v1/completions",
        endpoints.create_completion,
        schema.CompletionRequest,
        direct=True,
    ),
    RouteSpec("POST", "/generate", endpoints.generate, schema.GenerateRequest, direct=True),
    RouteSpec("GET", "/v1/models", service_endpoints.list_models),
    RouteSpec("GET", "/v1/models/{model_id:path}", service_endpoints.get_model),
    RouteSpec("POST", "/tokenize", service_endpoints.tokenize, schema.TokenizeRequest),
    RouteSpec("POST", "/detokenize", service_endpoints.detokenize, schema.DetokenizeRequest),
    RouteSpec("GET", "/health", service_endpoints.health, public=True),
    RouteSpec("GET", "/ready", service_endpoints.ready, public=True),
    RouteSpec("GET", "/version", service_endpoints.version, public=True),
    RouteSpec("GET", "/openapi.json", openapi, public=True),
    RouteSpec("GET", "/docs", docs, public=True),
)
"""Everything that a router answers to clients."""

METRICS_ROUTES: Final = (
    RouteSpec("GET", "/metrics", service_endpoints.metrics, public=True),
    RouteSpec("GET", "/state", service_endpoints.state, public=True),
)
"""What it answers on a port of its own to Prometheus, the operator and whoever looks into it."""


@cache
def _document() -> dict[str, object]:
    return reference.build_document(ROUTES)


class Application:
    """Generation goes straight to its endpoint, everything else through Starlette.

    Starlette's middleware wraps every `send` twice; a stream calls it once per token. A slash at
    the end of a path makes no difference.
    """

    def __init__(
        self,
        starlette: Starlette,
        direct: Mapping[tuple[str, str], ASGIApp],
        cors_origins: tuple[str, ...],
    ) -> None:
        """`direct`: endpoints by method and exact path."""
        self._starlette = starlette
        self._direct = direct
        self._cors_origins = cors_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if len(path) > 1 and path.endswith("/"):
            path = scope["path"] = path.rstrip("/") or "/"
        endpoint = self._direct.get((method, path))
        if endpoint is None and self._cors_origins:
            headers = Headers(scope=scope)
            if cors.is_preflight(method, headers):
                answer = Response(status_code=204)
                answer.raw_headers += cors.preflight_headers(self._cors_origins, headers)
                endpoint = answer
        await (endpoint or self._starlette)(scope, receive, send)


def build_app(context: RouterContext) -> ASGIApp:
    """The application of one router; `router.running_router` starts and ends its parts."""
    origins = context.config.cors_origins

    async def explain(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "registered for this class alone"
        answer = _explain(request, error)
        answer.raw_headers += cors.answer_headers(origins, request.headers)
        return answer

    served = {route: Endpoint(route.handler, context, public=route.public) for route in ROUTES}
    starlette = Starlette(
        routes=[
            Route(route.path, endpoint, methods=[route.method])
            for route, endpoint in served.items()
        ],
        exception_handlers={HTTPException: explain},
    )
    direct = {
        (route.method, route.path): endpoint for route, endpoint in served.items() if route.direct
    }
    return Application(starlette, direct, origins)


def build_metrics_app(context: RouterContext) -> ASGIApp:
    """The application of the port for metrics, which no client needs to reach."""

    async def explain(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "registered for this class alone"
        paths = " and ".join(route.path for route in METRICS_ROUTES)
        return _explain(request, error, f"this port has {paths}")

    return Starlette(
        routes=[
            Route(route.path, Endpoint(route.handler, context, public=True), methods=[route.method])
            for route in METRICS_ROUTES
        ],
        exception_handlers={HTTPException: explain},
    )


def _explain(
    request: Request, error: HTTPException, there: str = "/docs lists those that do"
) -> Response:
    """`there` says which paths there are."""
    path = request.url.path
    answer: RouterError = NotFound(f"the path {path} does not exist: {there}")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        answer = MethodNotAllowed(f"{request.method} is not allowed for {path}: use {allowed}")
    return Response(
        answer.body(),
        status_code=error.status_code,
        headers=error.headers,
        media_type="application/json",
    )
