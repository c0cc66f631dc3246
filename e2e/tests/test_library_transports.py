"""KV over the real NIXL and the real Mooncake between pods, on a machine without RDMA."""

import sys
from typing import Any

import httpx
import pytest
from deadlines import patience

from tests.service import Service, mock_manifest
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

LIBRARIES = [
    "Nixl",
    pytest.param(
        "Mooncake",
        marks=pytest.mark.skipif(sys.version_info >= (3, 14), reason="mooncake has no wheel"),
    ),
]


@pytest.mark.parametrize("backend", LIBRARIES)
def test_a_service_moves_its_kv_over_a_library(tandem: Any, backend: str) -> None:
    name = backend.lower()
    out = f'kv_transfer_bytes_total{{backend="{name}",direction="out"}}'
    manifest = mock_manifest(name, decode=1, kvTransfer={"backend": backend})
    with Service.running(tandem, manifest) as service:
        transport = service.get()["status"]["transport"]
        assert (transport["backend"], transport["passedOver"]) == (backend, "")
        (prefill,) = service.pods("prefill")
        reply = httpx.post(
            f"{service.url}/v1/completions",
            json={"model": service.name, "prompt": "one two three " * 50, "max_tokens": 8},
            timeout=patience(60),
        )
        assert reply.status_code == 200, reply.text
        answer = reply.json()
        assert answer["usage"]["completion_tokens"] == 8
        facts = answer["tandem"]
        by = (facts["prefill_worker"], facts["failovers"])
        assert by == (prefill["metadata"]["name"], 0), facts
        assert facts["kv_bytes"] > 0, facts

        def has_counted() -> bool:
            counters = service.worker_state(prefill)["counters"]
            return bool(counters.get(out, 0) >= facts["kv_bytes"])

        wait_for(f"the prefill worker counts what it moved over {name}", has_counted)
        assert not any(service.leaked_blocks().values())
