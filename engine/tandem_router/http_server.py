"""uvicorn, set up for long streams, for the router's own drain, and for bounded heads."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from tandem_router.config import RouterConfig
from tandem_router.errors import (
    HeadTooLarge,
    InvalidRequest,
    PortError,
    RequestTimeout,
    RouterError,
)

SHUTDOWN_SECONDS = 5
LINGER_SECONDS = 2.0
"""How long a refused client may go on sending before its connection is closed."""
KEEP_ALIVE_SECONDS = 75
"""Longer than clients' pools keep idle connections, so that clients close first."""


class HttpConfig(uvicorn.Config):
    """uvicorn's settings with the router's own beside them."""

    def __init__(self, app: ASGIApp, router: RouterConfig) -> None:
        self.router = router
        super().__init__(
            app,
            access_log=False,  # the router's own log says more
            log_config=None,
            lifespan="off",
            http=HttpProtocol,
            ws="none",
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            server_header=False,
            backlog=4096,
        )


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with bounds on a request's head; it ignores upgrades.

    httptools reports a field when all of it has arrived, and buffers it until then. So there are
    two counts: of what was reported, and of the bytes fed since the last report.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(config, HttpConfig), "only HttpServer uses this protocol"
        self._limits = config.router
        self._in_head = False
        self._head_bytes = 0
        self._head_lines = 0
        self._silent_bytes = 0  # fed since the parser's last callback
        self._called_back = False
        self._timer: asyncio.TimerHandle | None = None
        self._refused = False

    # --- the connection ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return  # read and dropped: with data unread, closing would reset the connection
        self._unset_keepalive_if_required()
        if self._timer is None and not self._is_answering():
            self._arm()
        self._called_back = False
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(
                cause
                if isinstance(cause, RouterError)
                else InvalidRequest("the request is not valid HTTP")
            )
            return
        self._silent_bytes = 0 if self._called_back else self._silent_bytes + len(data)
        if self._silent_bytes > self._limits.max_head_bytes:
            self._refuse(self._too_large())

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                # The parser has ended the message behind its head and left the body unread.
                data = data[upgrade.args[0] :]
                self._begin_without_upgrade()

    def _begin_without_upgrade(self) -> None:
        """Feed the head again without its `Upgrade` field: HTTP lets a server ignore that."""
        method, version = self.parser.get_method(), self.parser.get_http_version()
        if method == b"CONNECT":
            raise httptools.HttpParserError("CONNECT")
        head = [method, b" ", self.url, b" HTTP/", version.encode(), b"\r\n"]
        for name, value in self.headers:
            if name != b"upgrade":
                head += [name, b": ", value, b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.parser.feed_data(b"".join([*head, b"\r\n"]))

    def _should_upgrade(self) -> bool:
        """True: uvicorn leaves the message alone, and `_begin_without_upgrade` feeds it again."""
        return True

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # --- the parser's calls -----------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._in_head = self._called_back = True
        self._head_bytes = self._head_lines = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_lines += 1
        self._count(len(name) + len(value) + 4)
        if self._in_head:  # trailers after a chunked body are only counted
            super().on_header(name, value)

    def _count(self, num_bytes: int) -> None:
        self._called_back = True
        self._head_bytes += num_bytes
        limits = self._limits
        if self._head_bytes > limits.max_head_bytes or self._head_lines > limits.max_head_lines:
            raise self._too_large()

    def on_headers_complete(self) -> None:
        self._called_back = True
        self._in_head = False
        self._disarm()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._called_back = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._called_back = True
        super().on_message_complete()

    # --- refusals ---------------------------------------------------------------------------------

    def _too_large(self) -> HeadTooLarge:
        limits = self._limits
        return HeadTooLarge(
            f"the request's head is too large: send at most {limits.max_head_lines} header fields "
            f"and {limits.max_head_bytes} bytes"
        )

    def _arm(self) -> None:
        self._timer = self.loop.call_later(self._limits.head_seconds, self._on_slow_head)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_slow_head(self) -> None:
        self._timer = None
        if self._is_answering():
            self._arm()  # this is the head of a next request, sent early
        elif self._in_head:
            seconds = self._limits.head_seconds
            self._refuse(RequestTimeout(f"the request's head took longer than {seconds:g} seconds"))
        else:
            self.transport.close()

    def _refuse(self, error: RouterError) -> None:
        """Answer a request that could not be read, and close the connection."""
        self._refused = True
        self._disarm()
        if self._is_answering():
            self.transport.close()  # in the middle of another answer
            return
        body = error.body()
        head = [STATUS_LINE[error.status]]
        for name, value in self.server_state.default_headers:
            head += [name, b": ", value, b"\r\n"]
        head.append(b"content-type: application/json\r\nconnection: close\r\n")
        head.append(b"content-length: %d\r\n\r\n" % len(body))
        self.transport.write(b"".join([*head, body]))
        self.transport.write_eof()
        self.flow.resume_reading()
        self._timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: the drain comes first, and the exit code is 0."""

    def __init__(self, app: ASGIApp, config: RouterConfig) -> None:
        super().__init__(HttpConfig(app, config))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to whoever runs the server."""
        yield


def open_listener(host: str, port: int, flag: str) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises PortError, which names the flag."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise PortError(f"{flag} {port} can't be opened: {reason}; use a free port, or 0") from None
    return listener
