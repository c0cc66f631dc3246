"""KV over the real NIXL between pods, over what UCX finds on a machine without RDMA."""

from typing import Any

import httpx
import pytest
from deadlines import patience

from tests.service import Service, mock_manifest
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NIXL_BYTES = 'kv_transfer_bytes_total{backend="nixl",direction="out"}'


def test_a_service_moves_its_kv_over_nixl(tandem: Any) -> None:
    manifest = mock_manifest("nixl", decode=1, kvTransfer={"backend": "Nixl"})
    with Service.running(tandem, manifest) as service:
        transport = service.get()["status"]["transport"]
        assert (transport["backend"], transport["passedOver"]) == ("Nixl", "")
        (prefill,) = service.pods("prefill")
        reply = httpx.post(
            f"{service.url}/v1/completions",
            json={"model": service.name, "prompt": "one two three " * 50, "max_tokens": 8},
            timeout=patience(60),
        )
        assert reply.status_code == 200, reply.text
        assert reply.json()["usage"]["completion_tokens"] == 8

        def pushed() -> bool:
            counters = service.worker_state(prefill)["counters"]
            return bool(counters.get(NIXL_BYTES, 0) > 0)

        wait_for("the prefill worker has counted what it pushed over nixl", pushed, 60)
