"""Kubeconfig files for the administrator and for every component."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import yaml

from tandem_local.certs import Pair


def write_kubeconfig(path: Path, *, cluster: str, server: str, ca: Path, client: Pair) -> None:
    """Write a kubeconfig with everything embedded, so that the file can be copied anywhere."""
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": cluster,
                "cluster": {"server": server, "certificate-authority-data": _encode(ca)},
            }
        ],
        "users": [
            {
                "name": cluster,
                "user": {
                    "client-certificate-data": _encode(client.cert),
                    "client-key-data": _encode(client.key),
                },
            }
        ],
        "contexts": [{"name": cluster, "context": {"cluster": cluster, "user": cluster}}],
        "current-context": cluster,
    }
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        yaml.safe_dump(document, file, sort_keys=False)


def _encode(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
