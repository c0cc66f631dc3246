"""The Starlette application: routes to handlers, and OpenAI-shaped 404s and 405s."""

from collections.abc import Mapping
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

NUM_DIRECT: Final = 3  # the first routes: those that generate


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

    def route(method: str, path: str, handler: Handler, *, public: bool = False) -> Route:
        return Route(path, Endpoint(handler, context, public=public), methods=[method])

    routes = [
        route("POST", "/v1/chat/completions", endpoints.create_chat_completion),
        route("POST", "/v1/completions", endpoints.create_completion),
        route("POST", "/generate", endpoints.generate),
        route("GET", "/v1/models", service_endpoints.list_models),
        route("GET", "/v1/models/{model_id:path}", service_endpoints.get_model),
        route("POST", "/tokenize", service_endpoints.tokenize),
        route("POST", "/detokenize", service_endpoints.detokenize),
        route("GET", "/health", service_endpoints.health, public=True),
        route("GET", "/ready", service_endpoints.ready, public=True),
        route("GET", "/metrics", service_endpoints.metrics, public=True),
        route("GET", "/state", service_endpoints.state, public=True),
    ]
    starlette = Starlette(routes=routes, exception_handlers={HTTPException: _explain})
    direct = {("POST", entry.path): entry.app for entry in routes[:NUM_DIRECT]}
    return Application(starlette, direct)


async def _explain(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for this class alone"
    answer: RouterError = NotFound(f"there is no {request.url.path} here")
    if error.status_code == 405:
        answer = MethodNotAllowed(f"{request.method} is not allowed for {request.url.path}")
    return Response(
        answer.body(),
        status_code=error.status_code,
        headers=error.headers,
        media_type="application/json",
    )
