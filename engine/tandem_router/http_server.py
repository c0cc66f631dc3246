"""uvicorn, set up for long streams and for the router's own drain."""

import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

SHUTDOWN_SECONDS = 5
KEEP_ALIVE_SECONDS = 75
"""Longer than clients' pools keep idle connections, so that clients close first."""


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: the drain comes first, and the exit code is 0."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                access_log=False,  # the router's own log says more
                log_config=None,
                lifespan="off",
                http="httptools",
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
                server_header=False,
                date_header=False,
                backlog=4096,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to whoever runs the server."""
        yield


def open_listener(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    return listener
