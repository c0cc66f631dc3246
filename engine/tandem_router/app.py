"""The routes, and the application that serves them with OpenAI-shaped 404s and 405s."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tandem_router.api import endpoints, service_endpoints
from tandem_router.api.context import RouterContext
from tandem_router.api.exchange import Endpoint, Handler
from tandem_router.errors import MethodNotAllowed, NotFound, RouterError


@dataclass(frozen=True, slots=True)
class RouteSpec:
    """A method and a path, and what answers there."""

    method: str
    path: str
    handler: Handler
    public: bool = False
    """Answered without an API key, and not logged."""
    direct: bool = False
    """It generates: its requests don't pass through Starlette."""


ROUTES: Final = (
    RouteSpec("POST", "/v1/chat/completions", endpoints.create_chat_completion, direct=True),
    RouteSpec("POST", "/v1/completions", endpoints.create_completion, direct=True),
    RouteSpec("POST", "/generate", endpoints.generate, direct=True),
    RouteSpec("GET", "/v1/models", service_endpoints.list_models),
    RouteSpec("GET", "/v1/models/{model_id:path}", service_endpoints.get_model),
    RouteSpec("POST", "/tokenize", service_endpoints.tokenize),
    RouteSpec("POST", "/detokenize", service_endpoints.detokenize),
    RouteSpec("GET", "/health", service_endpoints.health, public=True),
    RouteSpec("GET", "/ready", service_endpoints.ready, public=True),
    RouteSpec("GET", "/metrics", service_endpoints.metrics, public=True),
    RouteSpec("GET", "/state", service_endpoints.state, public=True),
)
"""Everything that a router answers."""


class Application:
    """Generation goes straight to its endpoint, everything else through Starlette.

    Starlette's middleware wraps every `send` twice; a stream calls it once per token.
    """

    def __init__(self, starlette: Starlette, direct: Mapping[tuple[str, str], ASGIApp]) -> None:
        """`direct`: endpoints by method and exact path."""
        self._starlette = starlette
        self._direct = direct

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._direct.get((scope.get("method", ""), scope.get("path", "")))
        await (endpoint or self._starlette)(scope, receive, send)


def build_app(context: RouterContext) -> ASGIApp:
    """The application of one router; `router.running_router` starts and ends its parts."""
    answers = {
        (spec.method, spec.path): Endpoint(spec.handler, context, public=spec.public)
        for spec in ROUTES
    }
    starlette = Starlette(
        routes=[
            Route(path, answer, methods=[method]) for (method, path), answer in answers.items()
        ],
        exception_handlers={HTTPException: _explain},
    )
    direct = {
        (spec.method, spec.path): answers[spec.method, spec.path] for spec in ROUTES if spec.direct
    }
    return Application(starlette, direct)


async def _explain(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for this class alone"
    answer: RouterError = NotFound(f"the path {request.url.path} does not exist")
    if error.status_code == 405:
        answer = MethodNotAllowed(f"{request.method} is not allowed for {request.url.path}")
    return Response(
        answer.body(),
        status_code=error.status_code,
        headers=error.headers,
        media_type="application/json",
    )
