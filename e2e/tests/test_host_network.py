"""Workers on their nodes' networks: four on two nodes, each with ports of its own."""

from collections import Counter

import httpx
import pytest
from deadlines import patience

from tandem_local import LocalCluster
from tests.service import Service, is_ready, mock_manifest

pytestmark = pytest.mark.cluster


def test_four_workers_on_two_nodes_serve(tandem: LocalCluster) -> None:
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"tandem.dev/service": "on-nodes"}},
    }
    template = {"spec": {"hostNetwork": True, "topologySpreadConstraints": [spread]}}
    pool = {"replicas": 2, "podTemplate": template}
    manifest = mock_manifest("on-nodes")
    manifest["spec"] |= {"prefill": pool, "decode": pool}
    with Service.running(tandem, manifest) as service:
        workers = [*service.pods("prefill"), *service.pods("decode")]
        assert [is_ready(pod) for pod in workers] == [True] * 4
        nodes = Counter(pod["spec"]["nodeName"] for pod in workers)
        assert len(nodes) == 2
        assert max(nodes.values()) >= 2, "no node has two workers"
        for pod in workers:
            assert pod["status"]["podIP"] == pod["status"]["hostIP"]
            assert pod["spec"]["dnsPolicy"] == "ClusterFirstWithHostNet"
        answer = httpx.post(
            f"{service.url}/v1/completions",
            json={"model": "on-nodes", "prompt": "hello there", "max_tokens": 4},
            timeout=patience(60),
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 4
        states = [service.worker_state(pod) for pod in workers]
        assert {state["worker_id"] for state in states} == {
            pod["metadata"]["name"] for pod in workers
        }
