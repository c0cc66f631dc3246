"""The process as a whole: it leads, watches, and ends when it is told to."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import kopf
import pytest
from aiohttp.test_utils import unused_port
from deadlines import patience

from tandem_operator import main
from tandem_operator.clients.cluster import Cluster
from tandem_operator.config import read_config
from tandem_operator.tests.memory_cluster import MemoryCluster


class ClosableCluster(MemoryCluster):
    async def close(self) -> None:
        """Nothing to close."""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> ClosableCluster:
    cluster = ClosableCluster()

    async def connect(kubeconfig: str | None = None) -> Any:
        return cluster

    monkeypatch.setattr(Cluster, "connect", connect)
    return cluster


def arguments(*more: str) -> list[str]:
    ports = [f"--health-port={unused_port()}", f"--metrics-port={unused_port()}"]
    return ["--identity=op-1", "--own-namespace=ns", *ports, *more]


async def test_it_leads_watches_and_stops_on_a_signal(
    cluster: ClosableCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: dict[str, Any] = {}

    # The names of kopf's own parameters, so that a wrong one fails here and not in a cluster.
    async def spawn_tasks(
        *,
        registry: Any,
        settings: Any,
        standalone: bool,
        identity: str,
        stop_flag: asyncio.Event,
        clusterwide: bool = False,
        namespaces: Any = (),
    ) -> list[asyncio.Task[Any]]:
        started.update(identity=identity, clusterwide=clusterwide, namespaces=namespaces)
        # As kopf does: it takes the signals for itself, and they have to be taken back.
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, lambda: started.update(taken=True))
        loop.call_later(0.05, os.kill, os.getpid(), signal.SIGTERM)
        return [asyncio.create_task(stop_flag.wait())]

    monkeypatch.setattr(kopf, "spawn_tasks", spawn_tasks)
    config = read_config(arguments(), {})
    async with asyncio.timeout(patience(10)):
        assert await main.run(config) == 0
    assert started == {"identity": "op-1", "clusterwide": True, "namespaces": ()}
    lease = cluster.objects[("Lease", "ns", "tandem-operator")]
    assert lease["spec"]["holderIdentity"] == ""


async def test_a_watch_that_ends_with_an_error_ends_the_process(
    cluster: ClosableCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> None:
        raise RuntimeError("watch")

    async def spawn_tasks(**_: Any) -> list[asyncio.Task[Any]]:
        return [asyncio.create_task(fail())]

    monkeypatch.setattr(kopf, "spawn_tasks", spawn_tasks)
    config = read_config(arguments("--namespace=a", "--no-leader-election"), {})
    async with asyncio.timeout(patience(10)):
        assert await main.run(config) == 1
    assert ("list", "WorkerPool", "") in cluster.calls


def test_the_entry_point_reads_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    async def run(config: Any) -> int:
        seen.append(config)
        return 3

    monkeypatch.setattr(main, "run", run)
    monkeypatch.setenv("KUBECONFIG", "")
    with pytest.raises(SystemExit) as ended:
        main.main(["--kubeconfig", str(tmp_path / "k"), "--log-level=Info"])
    assert ended.value.code == 3
    assert os.environ["KUBECONFIG"] == str(tmp_path / "k")
    assert seen[0].identity
