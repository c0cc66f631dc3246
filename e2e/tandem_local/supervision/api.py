"""The few calls that the supervisor itself makes to the API server, as administrator."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import httpx

from tandem_local.components.credentials import Pki

MERGE_PATCH = "application/merge-patch+json"


class ApiClient:
    """A small synchronous client: three verbs, with JSON in and out.

    `get`, `create` and `patch` raise httpx.HTTPError if the API server can't be reached or refuses.
    """

    def __init__(self, url: str, pki: Pki) -> None:
        admin = pki.pair("admin")
        context = ssl.create_default_context(cafile=str(pki.ca.cert))
        context.load_cert_chain(str(admin.cert), str(admin.key))
        # `trust_env=False`: the machine's proxy has no route into the cluster's network.
        self._http = httpx.Client(base_url=url, verify=context, timeout=5.0, trust_env=False)

    def __enter__(self) -> ApiClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def ready(self) -> bool:
        """Whether the API server says that it is ready."""
        try:
            return self._http.get("/readyz").status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def get(self, path: str) -> dict[str, Any] | None:
        """The object at `path`; None if there is none."""
        response = self._http.get(path)
        if response.status_code == httpx.codes.NOT_FOUND:
            return None
        response.raise_for_status()
        data: dict[str, Any] = response.json()
        return data

    def create(self, path: str, document: Mapping[str, Any]) -> None:
        """Create an object. If one of that name exists already, it is left as it is."""
        response = self._http.post(path, json=dict(document))
        if response.status_code != httpx.codes.CONFLICT:
            response.raise_for_status()

    def patch(self, path: str, document: Mapping[str, Any]) -> None:
        """Merge `document` into the object at `path`."""
        headers = {"Content-Type": MERGE_PATCH}
        self._http.patch(path, json=dict(document), headers=headers).raise_for_status()
