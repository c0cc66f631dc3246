"""Manifests of the embedded cluster's own tests, and a wait with a deadline."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from deadlines import patience

SHELL = "tandem.local/shell:1"


def pod(name: str, script: str, **spec: Any) -> str:
    """A pod that runs a shell script; further arguments go into the pod's spec."""
    container = {
        "name": "main",
        "image": SHELL,
        "command": ["sh", "-c", script],
        **spec.pop("container", {}),
    }
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": {"app": name}},
            "spec": {"containers": [container], "terminationGracePeriodSeconds": 1, **spec},
        }
    )


def http_server(port: int) -> str:
    """A script that answers GET with the pod's host name."""
    return (
        "cd $(mktemp -d) && hostname > index.html && "
        f"exec python3 -c \"import http.server as h; h.ThreadingHTTPServer(('', {port}), "
        'h.SimpleHTTPRequestHandler).serve_forever()"'
    )


def service(name: str, port: int) -> str:
    """A Service for the pods that carry its name as a label."""
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {"selector": {"app": name}, "ports": [{"port": port}]},
        }
    )


def eventually(what: str, condition: Callable[[], bool], *, timeout_s: float = 60) -> None:
    """Wait until `condition` holds. Raises AssertionError with `what` when the time is up."""
    limit = patience(timeout_s)
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"not true after {limit:.0f} s: {what}"
        time.sleep(0.1)
