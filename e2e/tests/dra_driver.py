"""DRA drivers for tests: real processes beside the kubelets, whose devices are only names."""

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from deadlines import patience

from tandem_local import LocalCluster
from tandem_local.binaries.build import Binaries
from tandem_local.folders import ClusterFolder
from tests.waiting import wait_for

Devices = Mapping[str, Mapping[str, str | bool]]
"""Attributes by the device's name."""


@contextmanager
def dra_drivers(
    cluster: LocalCluster, nodes: tuple[str, ...], offers: Mapping[str, Devices]
) -> Iterator[None]:
    """Each driver of `offers` on each node, with the same devices everywhere; their slices go at
    the end."""
    running = []
    try:
        for index, node in enumerate(nodes):
            for driver, devices in offers.items():
                running.append(_start(cluster, index, node, driver, devices))
        wanted = {(node, driver) for node in nodes for driver in offers}
        wait_for("every driver has its slice", lambda: wanted <= _published(cluster), 60)
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(patience(20))
        for driver in offers:
            cluster.kubectl(
                "delete", "resourceslices", f"--field-selector=spec.driver={driver}", check=False
            )


def _start(
    cluster: LocalCluster, index: int, node: str, driver: str, devices: Devices
) -> "subprocess.Popen[bytes]":
    folder = ClusterFolder.of(cluster.name)
    files = folder.node(index)
    listed = files.root / f"{driver}.json"
    listed.write_text(json.dumps([_device(name, told) for name, told in devices.items()]))
    program = Binaries.from_json(folder.binaries.read_text()).cluster
    with (folder.logs / f"dra-{driver}-{node}.log").open("wb") as log:
        return subprocess.Popen(
            [
                *(program, "dra-driver", "--kubeconfig", folder.kubeconfig, "--node", node),
                *("--kubelet", files.kubelet, "--driver", driver, "--cdi", files.cdi),
                *("--devices", listed),
            ],
            stdout=log,
            stderr=log,
        )


def _device(name: str, attributes: Mapping[str, str | bool]) -> dict[str, Any]:
    typed = {
        key: {"bool" if isinstance(value, bool) else "string": value}
        for key, value in attributes.items()
    }
    return {"name": name, "attributes": typed}


def _published(cluster: LocalCluster) -> set[tuple[str, str]]:
    found = json.loads(cluster.kubectl("get", "resourceslices", "-o", "json").stdout)["items"]
    return {
        (item["spec"]["nodeName"], item["spec"]["driver"])
        for item in found
        if item["spec"].get("devices")
    }
