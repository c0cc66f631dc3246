"""The operator's own settings: flags first, then the environment, then the defaults."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tandem_operator.names.objects import OPERATOR

PULL_POLICIES = ("Always", "IfNotPresent", "Never")
IMAGE_PREFIX = "ghcr.io/tandem-inference"
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class Config:
    """How this process runs."""

    namespaces: tuple[str, ...]  # watch these only; empty: the whole cluster
    own_namespace: str  # where the lease lives
    identity: str
    router_image: str
    router_pull_policy: str  # "": Kubernetes chooses
    engine_image: str
    engine_pull_policy: str
    kubeconfig: str  # "": the pod's service account
    health_port: int
    metrics_port: int
    lease_name: str
    leader_election: bool
    concurrency: int
    resync_seconds: float
    log_level: str

    @property
    def operator(self) -> str:
        """Who this operator is in `status.operator` of what it serves: its Lease."""
        return f"{self.own_namespace}/{self.lease_name}"


def read_config(argv: list[str] | None = None, env: Mapping[str, str] | None = None) -> Config:
    """Parse flags and environment. Exits with a message for a flag that isn't known."""
    env = os.environ if env is None else env
    version = env.get("TANDEM_VERSION", "0.1.0")
    parser = argparse.ArgumentParser(
        prog="tandem-operator", description="Runs InferenceServices: pods, roll-outs, scaling."
    )
    add = parser.add_argument
    add("--namespace", action="append", help="watch only this namespace; may be repeated")
    add(
        "--own-namespace",
        default=env.get("POD_NAMESPACE", "") or _namespace_of_pod(),
        help="namespace of the lease",
    )
    add("--identity", default=env.get("POD_NAME", "") or _identity(), help="name in the lease")
    add(
        "--router-image",
        default=env.get("TANDEM_ROUTER_IMAGE", f"{IMAGE_PREFIX}/tandem-router:{version}"),
        help="image of the routers",
    )
    add(
        "--engine-image",
        default=env.get("TANDEM_ENGINE_IMAGE", f"{IMAGE_PREFIX}/tandem-engine:{version}"),
        help="image of workers whose service names none",
    )
    for part in ("router", "engine"):
        add(
            f"--{part}-pull-policy",
            default="",
            choices=("", *PULL_POLICIES),
            help=f"when the kubelet pulls --{part}-image; default: as Kubernetes chooses",
        )
    add("--kubeconfig", default=env.get("KUBECONFIG", ""), help="default: the pod's own account")
    add("--health-port", type=int, default=8080, help="/healthz and /readyz")
    add("--metrics-port", type=int, default=9090, help="/metrics")
    add("--lease-name", default=OPERATOR, help="name of the lease")
    add(
        "--leader-election", action=argparse.BooleanOptionalAction, default=True, help="use a lease"
    )
    add("--concurrency", type=int, default=8, help="services worked on at once")
    add("--resync-seconds", type=float, default=60.0, help="period of the full resync")
    add("--log-level", default=env.get("TANDEM_LOG_LEVEL", "info"), help="debug, info, warning")
    values = vars(parser.parse_args(argv))
    named = values.pop("namespace") or env.get("TANDEM_NAMESPACE", "").split(",")
    return Config(namespaces=tuple(name for name in named if name), **values)


def _identity() -> str:
    return f"{os.uname().nodename}-{os.getpid()}"


def _namespace_of_pod() -> str:
    try:
        return _NAMESPACE_FILE.read_text().strip()
    except OSError:
        return "default"
