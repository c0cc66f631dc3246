"""An InferenceService under test: apply, wait, read, delete, all through the real kubectl."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from deadlines import patience

from tests.waiting import wait_for


def mock_manifest(
    name: str, prefill: int = 1, decode: int = 2, profile: str = "tiny", **spec: Any
) -> dict[str, Any]:
    """A service of mock workers, small and quick to start."""
    manifest: dict[str, Any] = {
        "apiVersion": "tandem.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": f"mock://{profile}", "name": name},
            "prefill": {"replicas": prefill},
            "decode": {"replicas": decode},
            "router": {"replicas": 1},
            # The test cluster's RDMA devices are no more than a number on a node.
            "rdma": {"mode": "None"},
            "kvTransfer": {
                "localPrefillTokens": 0,
                "verify": {"mode": "Required", "minMegabytesPerSecond": 1},
            },
            "rollout": {"drainSeconds": 60},
        },
    }
    for key, value in spec.items():
        if isinstance(value, dict) and isinstance(manifest["spec"].get(key), dict):
            manifest["spec"][key] = {**manifest["spec"][key], **value}
        else:
            manifest["spec"][key] = value
    return without_fabric(manifest)


def without_fabric(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest, whose Ready doesn't wait for RDMA: no test cluster has a real device."""
    transfer = manifest["spec"].setdefault("kvTransfer", {})
    if manifest["spec"].get("rdma", {}).get("mode", "Auto") != "None":
        transfer.setdefault("verify", {})["mode"] = "Report"
    return manifest


@dataclass
class Service:
    """One InferenceService in a cluster (`LocalCluster` or `ExternalCluster`)."""

    cluster: Any
    name: str
    namespace: str = "default"

    @classmethod
    def apply(cls, cluster: Any, manifest: dict[str, Any], namespace: str = "default") -> "Service":
        """kubectl apply. Raises AssertionError with kubectl's message if it is refused."""
        service = cls(cluster, manifest["metadata"]["name"], namespace)
        done = cluster.kubectl(
            "apply", "-n", namespace, "-f", "-", input=json.dumps(manifest), check=False
        )
        assert done.returncode == 0, done.stderr
        return service

    @classmethod
    @contextmanager
    def running(
        cls, cluster: Any, manifest: dict[str, Any], seconds: float = 240
    ) -> "Iterator[Service]":
        """A service that is Ready; deleted at the end, even if it never became Ready.

        Nobody waits for the end of the deletion: that it leaves nothing is a test of its own.
        """
        service = cls.apply(cluster, manifest)
        try:
            yield service.wait_ready(seconds)
        finally:
            service.kubectl("delete", "tisvc", service.name, "--wait=false")

    def kubectl(self, *arguments: str, check: bool = True, timeout: float = 60) -> str:
        """The standard output of kubectl, run in the service's namespace."""
        done = self.cluster.kubectl("-n", self.namespace, *arguments, check=check, timeout=timeout)
        output: str = done.stdout
        return output

    def get(self, kind: str = "tisvc", name: str = "") -> dict[str, Any]:
        """An object as a dict; {} if it doesn't exist."""
        text = self.kubectl("get", kind, name or self.name, "-o", "json", "--ignore-not-found")
        found: dict[str, Any] = json.loads(text) if text.strip() else {}
        return found

    def condition(self, kind: str) -> dict[str, Any]:
        """A condition of the service by its type; {} if it is not set yet."""
        conditions = self.get().get("status", {}).get("conditions", [])
        return next((c for c in conditions if c["type"] == kind), {})

    def pool(self, role: str) -> dict[str, Any]:
        """The pool's entry in status (role `Prefill` or `Decode`)."""
        pools = self.get().get("status", {}).get("pools", [])
        return next((p for p in pools if p["role"] == role), {})

    def wait_ready(self, seconds: float = 180) -> "Service":
        """Wait until Ready is True for the current generation; show the status if it never is.

        Where the transport is only reported, wait for that report too.
        """

        def ready() -> bool:
            seen = self.get()
            status = seen.get("status", {})
            found = {c["type"]: c["status"] for c in status.get("conditions", [])}
            silent = seen["spec"]["kvTransfer"]["verify"]["mode"] != "Report"
            return (
                status.get("observedGeneration") == seen["metadata"]["generation"]
                and found.get("Ready") == "True"
                and (silent or found["TransportVerified"] != "Unknown")
            )

        try:
            wait_for(f"{self.name} is Ready", ready, seconds)
        except AssertionError as error:
            status = json.dumps(self.get().get("status", {}), indent=1)
            pods = self.kubectl("get", "pods", "-o", "wide")
            raise AssertionError(f"{error}\n{status}\n{pods}") from None
        return self

    def wait_pool(self, role: str, ready: int, seconds: float = 120) -> None:
        """Wait until the pool has exactly `ready` Ready workers, and none starting or draining."""

        def settled() -> bool:
            pods = self.pods(role.lower())
            return len(pods) == ready and all(is_ready(pod) for pod in pods)

        wait_for(f"{self.name} {role} has {ready} ready workers", settled, seconds)

    def pods(self, role: str = "") -> list[dict[str, Any]]:
        """The live pods of a role (`prefill`, `decode`, `router`; all if empty)."""
        selector = f"tandem.dev/service={self.name}" + (f",tandem.dev/role={role}" if role else "")
        items: list[dict[str, Any]] = json.loads(
            self.kubectl("get", "pods", "-l", selector, "-o", "json")
        )["items"]
        return items

    def pod_names(self, role: str) -> list[str]:
        """The names of a role's pods, sorted."""
        return sorted(pod["metadata"]["name"] for pod in self.pods(role))

    @property
    def url(self) -> str:
        """The router's address as seen from here (the ClusterIP of the embedded cluster)."""
        spec = self.get("service")["spec"]
        return f"http://{spec['clusterIP']}:{spec['ports'][0]['port']}"

    def worker_state(self, pod: dict[str, Any]) -> dict[str, Any]:
        """`GET /state` of a worker."""
        port = pod["metadata"]["annotations"]["tandem.dev/http-port"]
        reply = httpx.get(f"http://{pod['status']['podIP']}:{port}/state", timeout=patience(10))
        state: dict[str, Any] = reply.json()
        return state

    def router_metrics(self) -> str:
        """The metrics of all routers, from the port that is not for clients."""
        pages = [
            httpx.get(f"http://{pod['status']['podIP']}:8001/metrics", timeout=patience(10)).text
            for pod in self.pods("router")
            if is_ready(pod)
        ]
        return "\n".join(pages)

    def leaked_blocks(self) -> dict[str, int]:
        """The leaked blocks of each worker, from its own ledger."""
        workers = [p for p in self.pods() if p["metadata"]["labels"]["tandem.dev/role"] != "router"]
        return {
            p["metadata"]["name"]: self.worker_state(p)["ledger"]["leaked"]
            for p in workers
            if is_ready(p)
        }

    def delete(self, seconds: float = 90) -> None:
        """kubectl delete, and wait until every pod is gone."""
        self.kubectl(
            "delete", "tisvc", self.name, "--ignore-not-found", f"--timeout={seconds:.0f}s",
            timeout=seconds + 10,
        )  # fmt: skip
        # After an API server's death the garbage collector needs time to recover.
        wait_for(f"{self.name} leaves no pods", lambda: not self.pods(), seconds)


def is_ready(pod: dict[str, Any]) -> bool:
    """Whether a pod's Ready condition is True and it isn't being deleted."""
    if pod["metadata"].get("deletionTimestamp"):
        return False
    conditions = pod.get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
