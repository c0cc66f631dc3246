"""One HTTP request and its answer, close to ASGI: no middleware between a token and its socket."""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping

import structlog
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from tandem_router.api.body import ACCEPTED, read_body
from tandem_router.api.context import RouterContext
from tandem_router.api.cors import answer_headers
from tandem_router.dispatch.sequence import Sequence
from tandem_router.dispatch.stream import ClientGone, TokenStream
from tandem_router.errors import (
    GenerationFailed,
    InvalidRequest,
    RequestTimeout,
    RouterError,
    Unauthorized,
    UnsupportedEncoding,
)

log = structlog.get_logger("access")

JSON_HEADERS = (b"content-type", b"application/json")
SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Exchange:
    """Reads the body once, writes one answer, knows when the client has left."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, context: RouterContext) -> None:
        self.context = context
        self.headers = Headers(scope=scope)
        self.path_params: dict[str, str] = scope.get("path_params", {})
        self.name = uuid.uuid4().hex  # ours, unique whatever the client calls its request
        self.request_id = self.headers.get("x-request-id") or self.name
        self.arrived_at = asyncio.get_running_loop().time()
        self.status = 0
        self.slo_class = ""
        self.is_generation = False
        self.notes: dict[str, object] = {}  # for the access log
        self._receive = receive
        self._send = send

    async def body(self) -> bytes:
        """The whole body, decoded; see `read_body`."""
        return await read_body(self._receive, self.headers, self.context.config)

    def watch(self, stream: TokenStream[Sequence]) -> "asyncio.Task[None]":
        """Close `stream` when the client leaves; to be called after the body was read."""

        async def wait() -> None:
            while True:
                message: Message = await self._receive()
                if message["type"] == "http.disconnect":
                    stream.close()
                    return

        return asyncio.create_task(wait())

    # --- answers ----------------------------------------------------------------------------------

    async def reply(
        self,
        body: bytes,
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        content_type: bytes = JSON_HEADERS[1],
    ) -> None:
        """A whole answer."""
        await self._start(status, [(JSON_HEADERS[0], content_type)], headers, len(body))
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def open_stream(self, headers: Mapping[str, str] | None = None) -> None:
        """Begin a stream of server-sent events."""
        await self._start(200, SSE_HEADERS, headers, None)

    async def _start(
        self,
        status: int,
        fixed: list[tuple[bytes, bytes]],
        headers: Mapping[str, str] | None,
        length: int | None,
    ) -> None:
        self.status = status
        raw = [*fixed, (b"x-request-id", self.request_id.encode("latin-1", "replace"))]
        if length is not None:
            raw.append((b"content-length", b"%d" % length))
        if self.context.config.cors_origins:
            raw += answer_headers(self.context.config.cors_origins, self.headers)
        for name, value in (headers or {}).items():
            raw.append((name.encode(), value.encode("latin-1", "replace")))
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, data: bytes) -> None:
        """More of a stream."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def close_stream(self, data: bytes = b"") -> None:
        """The rest of a stream."""
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def refuse(self, error: RouterError) -> None:
        """An error, in OpenAI's shape; inside a stream as its last event."""
        self.notes["error"] = error.message
        if self.status:
            await self.close_stream(b"data: " + error.body() + b"\n\n")
            return
        headers = {}
        if error.retry_after_seconds is not None:
            headers["retry-after"] = str(max(1, round(error.retry_after_seconds)))
        if isinstance(error, Unauthorized):
            headers["www-authenticate"] = "Bearer"
        if isinstance(error, RequestTimeout):
            headers["connection"] = "close"
        if isinstance(error, UnsupportedEncoding):
            headers["accept-encoding"] = ACCEPTED
        await self.reply(error.body(), status=error.status, headers=headers)


Handler = Callable[[Exchange], Awaitable[None]]


class Endpoint:
    """An ASGI application around one handler: keys, errors, access log, request metrics."""

    def __init__(self, handler: Handler, context: RouterContext, *, public: bool = False) -> None:
        """`public`: answered without an API key, and not logged (probes, metrics)."""
        self._handler = handler
        self._context = context
        self._public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self._context)
        started = time.perf_counter()
        logged = 0
        try:
            try:
                if not self._public:
                    self._authenticate(exchange)
                await self._handler(exchange)
            except RouterError as error:
                await exchange.refuse(error)
                logged = error.status
            except ClientGone:
                logged = 499
            except Exception:  # a bug of ours: in full in the log, in brief to the client
                log.exception("a handler failed", request_id=exchange.request_id)
                logged = 500
                await exchange.refuse(GenerationFailed("the router failed; its log says why"))
        finally:
            self._account(scope, exchange, logged or exchange.status or 500, started)

    def _authenticate(self, exchange: Exchange) -> None:
        if not self._context.keys.required:
            return
        header = exchange.headers.get("authorization", "")
        scheme, _, key = header.partition(" ")
        # As the bytes that were sent: starlette reads headers as Latin-1.
        given = key.strip().encode("latin-1")
        if not self._context.keys.accept(given) or scheme.lower() != "bearer":
            raise Unauthorized(
                "the API key is missing or unknown: send one as 'Authorization: Bearer KEY'"
            )

    def _account(self, scope: Scope, exchange: Exchange, code: int, started: float) -> None:
        seconds = time.perf_counter() - started
        if exchange.is_generation:
            self._context.metrics.request_done(exchange.slo_class, code, seconds)
        if self._public:
            return
        client = scope.get("client")
        log.info(
            "request",
            method=scope["method"],
            path=scope["path"],
            status=code,
            seconds=round(seconds, 6),
            request_id=exchange.request_id,
            client=client[0] if client else "",
            **exchange.notes,
        )


def require_body(body: bytes) -> bytes:
    """Raise InvalidRequest for an empty body: a clearer message than the parser's."""
    if not body:
        raise InvalidRequest("the request needs a JSON body", code="invalid_json")
    return body
