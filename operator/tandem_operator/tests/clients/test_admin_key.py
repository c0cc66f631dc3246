"""The operator's own key: made once, read once, the same for all replicas."""

import asyncio
import base64

import pytest

from tandem_operator.clients.admin_key import AdminKey
from tandem_operator.errors import ClusterError
from tandem_operator.facts.admin import derive_access
from tandem_operator.tests.memory_cluster import MemoryCluster

SECRET = ("Secret", "system", "tandem-operator-admin-key")


def key_in(cluster: MemoryCluster) -> AdminKey:
    return AdminKey(cluster, "system", "tandem-operator-admin-key")  # type: ignore[arg-type]


async def test_it_is_made_once_and_survives_a_restart() -> None:
    cluster = MemoryCluster()
    first = key_in(cluster)
    keys = await asyncio.gather(*(first.read() for _ in range(3)))
    restarted = await key_in(cluster).read()
    assert len({*keys, restarted}) == 1
    assert len(restarted) == 32
    made = cluster.objects[SECRET]
    assert made["immutable"] is True
    assert [method for method, _, _ in cluster.calls] == ["get", "create", "get"]


async def test_two_replicas_that_start_together_have_one_key() -> None:
    class Slow(MemoryCluster):
        async def get(self, kind: str, name: str, namespace: str | None = None) -> dict[str, str]:
            try:
                return await super().get(kind, name, namespace)
            finally:
                await asyncio.sleep(0)

    cluster = Slow()
    one, two = await asyncio.gather(key_in(cluster).read(), key_in(cluster).read())
    assert one == two


@pytest.mark.parametrize("data", [None, {}, {"key": "?"}, {"key": ""}, {"key": "c2hvcnQ="}])
async def test_a_key_that_is_none_is_refused(data: dict[str, str] | None) -> None:
    cluster = MemoryCluster()
    meta = {"name": SECRET[2], "namespace": SECRET[1]}
    cluster.put({"kind": "Secret", "metadata": meta, "data": data})
    with pytest.raises(ClusterError, match="delete the Secret"):
        await key_in(cluster).read()


def test_tokens_depend_on_key_and_service_and_tell_nothing() -> None:
    access = derive_access(b"k" * 32, "default", "qwen")
    assert access == derive_access(b"k" * 32, "default", "qwen")
    assert len(base64.b16decode(access.token.upper())) == 32
    others = [
        derive_access(b"l" * 32, "default", "qwen"),
        derive_access(b"k" * 32, "other", "qwen"),
    ]
    for other in others:
        assert other.token != access.token
        assert other.secret_name != access.secret_name
    assert access.secret_name.startswith("qwen-admin-")
    assert access.secret_name.removeprefix("qwen-admin-") not in access.token
    assert access.token not in repr(access)
