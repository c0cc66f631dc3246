"""KV over Mooncake's own transfer engine between pods, over TCP."""

import sys
from typing import Any

import httpx
import pytest
from deadlines import patience

from tests.service import Service, mock_manifest
from tests.waiting import wait_for

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.version_info >= (3, 14), reason="mooncake has no wheel"),
]

OUT = 'kv_transfer_bytes_total{backend="mooncake",direction="out"}'


def test_a_service_moves_its_kv_over_mooncake(tandem: Any) -> None:
    manifest = mock_manifest("mooncake", kvTransfer={"backend": "Mooncake"})
    with Service.running(tandem, manifest) as service:
        transport = service.get()["status"]["transport"]
        assert (transport["backend"], transport["passedOver"]) == ("Mooncake", "")
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
        assert (facts["prefill_worker"], facts["failovers"]) == (prefill["metadata"]["name"], 0), (
            facts
        )
        assert facts["kv_bytes"] > 0, facts

        def has_counted() -> bool:
            counters = service.worker_state(prefill)["counters"]
            return bool(counters.get(OUT, 0) >= facts["kv_bytes"])

        wait_for("the prefill worker counts what it moved over mooncake", has_counted)
        assert not any(service.leaked_blocks().values())
