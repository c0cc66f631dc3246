"""An embedded cluster: start, find, inspect, disturb and remove it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from tandem_local.binaries.build import Binaries, find_binaries
from tandem_local.client import Commands
from tandem_local.components.configuration import prepare
from tandem_local.components.images import (
    check_images,
    merge_images,
    read_images,
    write_images,
)
from tandem_local.errors import ClusterNotFound, LocalError, SpecError, StartError
from tandem_local.folders import ClusterFolder, cache_dir, clusters_dir, locked
from tandem_local.machine.process import ProcessRef, end
from tandem_local.machine.requirements import check_machine
from tandem_local.nodes import network
from tandem_local.nodes.addresses import AddressPlan, choose_plan
from tandem_local.progress import Progress, ProgressEvent, silent
from tandem_local.spec import ClusterSpec, ImageEntry
from tandem_local.supervision import teardown
from tandem_local.supervision.state import (
    ClusterState,
    ClusterStatus,
    ComponentStatus,
    NodeStatus,
    Phase,
)

READY_TIMEOUT_S = 180.0
# The supervisor ends the kubelets, the containers and the rest: procri's grace, and a little more.
STOP_TIMEOUT_S = 30.0
LOG_TAIL_LINES = 15
# Of one component before the cluster is Ready. With the supervisor's back-off, six seconds.
MAX_RESTARTS = 5


@dataclass(frozen=True)
class ClusterAddresses:
    """The addresses of one cluster's network."""

    pods: IPv4Network
    services: IPv4Network
    dns: IPv4Address
    host: IPv4Address
    """The host as pods see it."""


class LocalCluster(Commands):
    """A running embedded cluster. Several processes may hold an object for the same cluster."""

    def __init__(self, folder: ClusterFolder) -> None:
        self._folder = folder
        self._plan = AddressPlan.from_json(folder.plan.read_text())
        self.spec = ClusterSpec.from_json(folder.spec.read_text())
        binary = str(Binaries.from_json(folder.binaries.read_text()).cluster)
        super().__init__(folder.kubeconfig, [binary, "kubectl"], [binary, "helm"])

    @classmethod
    def up(
        cls,
        spec: ClusterSpec,
        progress: Progress = silent,
        *,
        timeout_s: float = READY_TIMEOUT_S,
    ) -> LocalCluster:
        """Start the cluster and return when it is Ready.

        A live cluster with the same name and the same nodes is used as it is, and the spec's
        images are added to its table. The remains of a crashed cluster are removed first.
        Raises RequirementError, BuildError, SpecError or StartError; each says what to do.
        """
        check_machine(progress)
        check_images(spec.images, progress)
        folder = ClusterFolder.of(spec.name)
        with locked(folder.lock):
            state = ClusterState.read(folder.state)
            if state is not None and _is_live(state):
                cluster = cls(folder)
                cluster._adopt(spec)
                cluster._wait_ready(progress, timeout_s)
                return cluster
            if folder.root.exists():
                progress(ProgressEvent("start", f"removing the remains of {spec.name}"))
                _remove(folder)
            binaries = find_binaries(progress)
            progress(ProgressEvent("start", "writing certificates and configuration"))
            _prepare(spec, folder, binaries)
            _launch(folder)
            cluster = cls(folder)
            cluster._wait_ready(progress, timeout_s)
            return cluster

    @classmethod
    def find(cls, name: str) -> LocalCluster:
        """The live cluster with that name. Raises ClusterNotFound if there is none."""
        folder = ClusterFolder.of(name)
        state = ClusterState.read(folder.state)
        if state is None or not _is_live(state):
            raise ClusterNotFound(name)
        return cls(folder)

    @classmethod
    def all(cls) -> list[LocalCluster]:
        """Every live cluster of this user, sorted by name."""
        found = []
        for path in sorted(clusters_dir().glob("*/state.json")):
            state = ClusterState.read(path)
            if state is not None and _is_live(state):
                found.append(cls(ClusterFolder(path.parent)))
        return found

    @staticmethod
    def remove(name: str) -> bool:
        """Remove the cluster with that name, live or crashed; False if there was none."""
        folder = ClusterFolder.of(name)
        with locked(folder.lock):
            if not folder.root.exists():
                return False
            _remove(folder)
            return True

    def down(self) -> None:
        """End every process of the cluster and remove its files."""
        self.remove(self.name)

    def environment(self) -> dict[str, str]:
        """The environment in which to run `kubectl_argv` and `helm_argv`."""
        environment = super().environment()
        # The machine's proxy has no route into the cluster's network.
        for name in ("NO_PROXY", "no_proxy"):
            known = environment.get(name)
            environment[name] = f"{known},{self._plan.base}" if known else str(self._plan.base)
        return environment

    @property
    def name(self) -> str:
        """The cluster's name."""
        return self._folder.name

    @property
    def addresses(self) -> ClusterAddresses:
        """The ranges of pods and Services, the DNS server's address, the host as pods see it."""
        plan = self._plan
        return ClusterAddresses(plan.pods, plan.services, plan.dns, plan.host)

    @property
    def logs(self) -> Path:
        """The folder that holds one log per component."""
        return self._folder.logs

    def status(self) -> ClusterStatus:
        """The state of the cluster and of each of its processes."""
        state = self._state()
        return ClusterStatus(
            name=self.name,
            phase=state.phase,
            message=state.message,
            supervisor_pid=state.supervisor.pid,
            api_url=self._plan.api_url,
            kubeconfig=self.kubeconfig,
            nodes=tuple(
                NodeStatus(
                    node.name,
                    str(self._plan.node(index)),
                    str(self._plan.pod_subnet(index)),
                    dict(node.resources),
                )
                for index, node in enumerate(self.spec.nodes)
            ),
            components=tuple(
                ComponentStatus(
                    name=c.name,
                    node=c.node,
                    pid=c.process.pid if c.process and c.process.alive() else None,
                    restarts=c.restarts,
                    rss_bytes=c.process.rss_bytes() if c.process else 0,
                    log=self.logs / f"{c.name}-{c.node}.log",
                )
                for c in state.components
            ),
        )

    def kill(self, component: str, node: str | None = None) -> int:
        """Kill one component with SIGKILL and return its pid; the supervisor restarts it.

        Raises LocalError if there is no such component (on that node), or if it is down now.
        """
        found = self._state().find(component, node)
        if found is None:
            known = sorted({c.name for c in self._state().components})
            place = f"node {node} of cluster {self.name}" if node else f"cluster {self.name}"
            raise LocalError(f"{place} has no component {component!r}: use {', '.join(known)}")
        if found.process is None or not found.process.signal(signal.SIGKILL):
            raise LocalError(
                f"{component} on node {found.node} is not running: it is about to be restarted, "
                "try again"
            )
        return found.process.pid

    def container_pids(self, namespace: str, pod: str, container: str | None = None) -> list[int]:
        """The pids, on the host, of the first process of each running container of a pod."""
        pids = []
        for record in teardown.container_records(self._folder):
            if (record["namespace"], record["pod"]) != (namespace, pod):
                continue
            if container is not None and record["name"] != container:
                continue
            pid = record["pid"]
            if isinstance(pid, int) and pid > 0 and ProcessRef.of(pid) is not None:
                pids.append(pid)
        return pids

    def add_image(self, *images: ImageEntry) -> None:
        """Add to the image table, replacing entries of the same name; takes effect at once."""
        table = self._folder.images
        with locked(table.with_suffix(".lock")):
            write_images(table, merge_images(read_images(table), images))

    def _state(self) -> ClusterState:
        state = ClusterState.read(self._folder.state)
        if state is None:
            raise ClusterNotFound(self.name)
        return state

    def _adopt(self, spec: ClusterSpec) -> None:
        if spec.nodes != self.spec.nodes:
            raise SpecError(
                f"cluster {self.name} is already running with different nodes: "
                "remove it first with `tandem cluster down`, or choose another name"
            )
        self.add_image(*spec.images)

    def _wait_ready(self, progress: Progress, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        said = ""
        while True:
            state = ClusterState.read(self._folder.state)
            if state is not None and state.phase is Phase.READY:
                progress(ProgressEvent("start", f"cluster {self.name} is Ready"))
                return
            if state is not None and state.message != said:
                said = state.message
                progress(ProgressEvent("start", said))
            if state is not None and not state.supervisor.alive():
                raise self._start_error(state, "failed to start")
            if state is not None and (dying := find_dying(state)):
                what = f"can't start, because {' and '.join(dying)} ended again and again"
                raise self._start_error(state, what)
            if time.monotonic() > deadline:
                raise self._start_error(state, f"was not Ready after {timeout_s:.0f} s")
            time.sleep(0.05)

    def _start_error(self, state: ClusterState | None, what: str) -> StartError:
        why = state.message if state is not None else "its supervisor reported nothing"
        text = f"cluster {self.name} {what}: {why}"
        text += (
            f"\nEvery log is in {self.logs} until the next start; the likely ones end like this."
        )
        for log in self._suspects(state):
            text += f"\n\n{log}:\n" + tail(log, LOG_TAIL_LINES)
        # Nothing may keep running. The logs stay until the next `up`, for whoever looks.
        _stop(self._folder)
        return StartError(text)

    def _suspects(self, state: ClusterState | None) -> Iterable[Path]:
        """The logs worth reading: of what died or else of what is awaited, and the supervisor's."""
        names = []
        if state is not None:
            names = [f"{c.name}-{c.node}" for c in state.components if c.exit_code is not None]
            if not names and "API" in state.message:
                names = [f"kube-apiserver-{self.spec.nodes[0].name}"]
            if not names and "nodes" in state.message:
                names = [f"kubelet-{node.name}" for node in self.spec.nodes]
        logs = [self.logs / f"{name}.log" for name in (*names, "supervisor")]
        return [log for log in logs if log.exists()]


def find_dying(state: ClusterState) -> list[str]:
    """The components that were restarted too often for another time to help."""
    return [f"{c.name} on {c.node}" for c in state.components if c.restarts >= MAX_RESTARTS]


def tail(log: Path, lines: int) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _is_live(state: ClusterState) -> bool:
    return state.supervisor.alive() and state.phase in (Phase.STARTING, Phase.READY)


def _prepare(spec: ClusterSpec, folder: ClusterFolder, binaries: Binaries) -> None:
    # One at a time: two clusters that start together would otherwise take the same range.
    with locked(cache_dir() / "locks" / "addresses"):
        taken = network.host_networks()
        for path in clusters_dir().glob("*/addresses.json"):
            taken.append(AddressPlan.from_json(path.read_text()).base)
        plan = choose_plan(taken, str(folder.root))
        folder.root.mkdir(parents=True, mode=0o755)
        folder.plan.write_text(plan.to_json())
    folder.spec.write_text(spec.to_json())
    folder.binaries.write_text(binaries.to_json())
    write_images(folder.images, spec.images)
    prepare(spec, plan, folder)


def _launch(folder: ClusterFolder) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tandem_local.supervision.supervisor", str(folder.root)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        # This package may be importable only through this process's own path.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    if done.returncode != 0:
        raise StartError(f"the supervisor of cluster {folder.name} did not start:\n{done.stderr}")


def _stop(folder: ClusterFolder) -> None:
    state = ClusterState.read(folder.state)
    if state is not None:
        end([state.supervisor], grace_s=STOP_TIMEOUT_S)
        state = ClusterState.read(folder.state)
    teardown.end_processes(folder, state)


def _remove(folder: ClusterFolder) -> None:
    _stop(folder)
    teardown.remove_files(folder)
