"""Passes over a service that claims its NICs: what is read, written and removed."""

from typing import Any

import pytest

from tandem_operator.errors import ClusterError, MissingError
from tandem_operator.names.objects import CLAIM_TEMPLATE
from tandem_operator.tests.memory_cluster import MemoryCluster
from tandem_operator.tests.test_operator_passes import KEY, Bench, condition

RAILS = {"mode": "Dra", "claim": {"rails": "SameAcrossRoles"}}


@pytest.fixture
def bench() -> Bench:
    made = Bench()
    made.cluster.put({"kind": "DeviceClass", "metadata": {"name": "dranet"}})
    made.cluster.put(
        {
            "kind": "ResourceSlice",
            "metadata": {"name": "slice"},
            "spec": {
                "nodeName": "node-0",
                "driver": "dra.net",
                "devices": [{"name": "nic", "attributes": {"ifName": {"string": "gpu0rdma0"}}}],
            },
        }
    )
    return made


def templates(bench: Bench) -> dict[str, dict[str, Any]]:
    objects = bench.cluster.objects.items()
    return {name: body for (kind, _, name), body in objects if kind == CLAIM_TEMPLATE}


async def test_templates_come_before_pods_and_go_after_them(bench: Bench) -> None:
    bench.put_service(rdma=RAILS)
    await bench.settle()
    made = templates(bench)
    assert len(made) == 2
    assert "gpu0rdma0" in str(made)
    wrote = [(method, kind) for method, kind, _ in bench.cluster.calls]
    assert wrote.index(("apply", CLAIM_TEMPLATE)) < wrote.index(("create", "Pod"))
    bench.cluster.calls.clear()
    await bench.controller.work(KEY)
    assert CLAIM_TEMPLATE not in {kind for _, kind, _ in bench.cluster.calls}
    bench.service["spec"]["rdma"] = {"mode": "None"}
    bench.service["metadata"]["generation"] = 2
    await bench.controller.work(KEY)
    assert templates(bench) == made, "pods that need them are still there"
    bench.kubelet()
    await bench.settle()
    pods = [(key, body) for key, body in bench.cluster.objects.items() if key[0] == "Pod"]
    old = [key for key, body in pods if "resourceClaims" in body["spec"]]
    assert old, "workers that drain need them too"
    assert templates(bench) == made
    for key in old:
        del bench.cluster.objects[key]
    await bench.settle(2)  # the first brings the last new worker
    assert not templates(bench)


@pytest.mark.parametrize("error", [MissingError(404, "no such kind"), ClusterError(403, "no")])
async def test_claims_that_cannot_be_read_are_a_condition(
    bench: Bench, error: ClusterError, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.put_service(rdma=RAILS)

    async def fail(kind: str, *args: Any) -> list[dict[str, Any]]:
        if kind in ("ResourceSlice", "DeviceClass"):
            raise error
        return await MemoryCluster.list(bench.cluster, kind, *args)

    monkeypatch.setattr(bench.cluster, "list", fail)
    await bench.settle()
    assert condition(bench, "CapacityUnavailable")["reason"] == "FabricUnavailable"
    assert "Pod" not in bench.kinds()
