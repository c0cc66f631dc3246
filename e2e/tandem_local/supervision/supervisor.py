"""The process that keeps a cluster running.

``python -m tandem_local.supervision.supervisor FOLDER`` starts it. It detaches from its caller,
makes the nodes' namespaces, starts the components in order, restarts those that die, keeps the
extended resources on the nodes, and writes what it knows to ``state.json``. SIGTERM ends the
cluster; so does the removal of its folder.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import httpx

from tandem_local.binaries.build import Binaries
from tandem_local.components.command_lines import Component, build_components, environment
from tandem_local.components.configuration import DNS_READY_PORT
from tandem_local.components.credentials import Pki
from tandem_local.errors import LocalError, StartError
from tandem_local.folders import ClusterFolder
from tandem_local.machine.process import ProcessRef
from tandem_local.nodes import network
from tandem_local.nodes.addresses import AddressPlan
from tandem_local.nodes.holder import closed_folders, enter, needed_paths, start_holder
from tandem_local.spec import ClusterSpec
from tandem_local.supervision import teardown
from tandem_local.supervision.api import ApiClient
from tandem_local.supervision.bootstrap import bootstrap_objects, reconcile_node
from tandem_local.supervision.state import ClusterState, ComponentState, Phase

TICK_S = 0.1
NODE_CHECK_S = 1.0
# The back-off of a component that keeps dying.
FIRST_DELAY_S, LONGEST_DELAY_S, STEADY_S = 0.2, 5.0, 30.0


class Stop(Exception):
    """The supervisor has been told to end the cluster."""


class Watched:
    """One component: its process, and when it may be restarted."""

    def __init__(self, component: Component, state: ComponentState, prefix: list[str]) -> None:
        self.component = component
        self.state = state
        self._prefix = prefix
        self._child: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._delay = FIRST_DELAY_S
        self._not_before = 0.0

    def start(self, folder: ClusterFolder) -> None:
        """Start the process; its output is appended to the component's log."""
        log = folder.logs / f"{self.component.key}.log"
        with log.open("ab") as output:
            self._child = subprocess.Popen(
                [*self._prefix, *self.component.argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(folder),
                cwd="/",
                start_new_session=True,
            )
        self._started = time.monotonic()
        self.state.process = ProcessRef.of(self._child.pid)

    def tend(self, folder: ClusterFolder) -> bool:
        """Notice that the process has ended, and restart it when its back-off is over.

        Returns whether anything changed.
        """
        now = time.monotonic()
        if self._child is not None:
            code = self._child.poll()
            if code is None:
                return False
            if now - self._started > STEADY_S:
                self._delay = FIRST_DELAY_S
            self._not_before = now + self._delay
            self._delay = min(self._delay * 2, LONGEST_DELAY_S)
            self._child = None
            self.state.process, self.state.exit_code = None, code
            return True
        if now >= self._not_before:
            self.state.restarts += 1
            self.start(folder)
            return True
        return False


class Supervisor:
    """Runs one cluster from the folder that `LocalCluster.up` has prepared."""

    def __init__(self, folder: ClusterFolder) -> None:
        self.folder = folder
        self.spec = ClusterSpec.from_json(folder.spec.read_text())
        self.plan = AddressPlan.from_json(folder.plan.read_text())
        self._components = build_components(
            self.spec, self.plan, folder, Binaries.from_json(folder.binaries.read_text())
        )
        me = ProcessRef.of(os.getpid())
        assert me is not None, "this very process is alive"
        self.state = ClusterState(supervisor=me)
        self._watched: list[Watched] = []
        self._api = ApiClient(self.plan.api_url, Pki(folder.pki))
        self._stopping = False
        self._wake = os.pipe()

    def run(self) -> int:
        """Run until told to stop; returns the exit status."""
        self._catch_signals()
        self._say("creating the nodes' namespaces")
        status = 0
        try:
            self._make_nodes()
            self._boot()
            self._say("", Phase.READY)
            self._watch()
        except Stop:
            self._say("ending the cluster", Phase.STOPPING)
        except (LocalError, httpx.HTTPError, OSError) as error:
            traceback.print_exc()
            self._say(str(error), Phase.FAILED)
            status = 1
        teardown.end_processes(self.folder, self.state)
        return status

    def _make_nodes(self) -> None:
        closed = closed_folders(needed_paths(self.spec.images))
        for index, node in enumerate(self.spec.nodes):
            self.state.holders[node.name] = start_holder(
                self.folder.node(index).root,
                closed,
                environment(self.folder),
                self.folder.logs / f"holder-{node.name}.log",
            )
            self._write()
        holders = [self.state.holders[node.name].pid for node in self.spec.nodes]
        network.connect(self.folder.root, self.plan, holders)

    def _boot(self) -> None:
        self._start("etcd", "kube-apiserver", "procri")
        self._wait("the API server", self._api.ready)
        sockets = [self.folder.node(i).socket for i in range(len(self.spec.nodes))]
        self._wait("procri", lambda: all(socket.exists() for socket in sockets))
        self._start("kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")
        for path, document in bootstrap_objects(self.plan):
            self._api.create(path, document)
        self._start("coredns")
        self._wait("the nodes", self._reconcile_nodes)
        account = "/api/v1/namespaces/default/serviceaccounts/default"
        self._wait("the default service account", lambda: self._api.get(account) is not None)
        self._wait("CoreDNS", self._dns_ready)

    def _watch(self) -> None:
        next_check = 0.0
        while True:
            self._tick(NODE_CHECK_S)
            if time.monotonic() < next_check:
                continue
            try:
                self._reconcile_nodes()
            except httpx.HTTPError as error:
                # The API server is restarting or slow, and the next check comes soon.
                print(f"the nodes could not be checked: {error}", file=sys.stderr, flush=True)
            next_check = time.monotonic() + NODE_CHECK_S

    def _reconcile_nodes(self) -> bool:
        ready = True
        for index, node in enumerate(self.spec.nodes):
            subnet = str(self.plan.pod_subnet(index))
            ready = reconcile_node(self._api, node, subnet) and ready
        return ready

    def _dns_ready(self) -> bool:
        try:
            url = f"http://{self.plan.api}:{DNS_READY_PORT}/ready"
            return httpx.get(url, timeout=2.0, trust_env=False).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def _start(self, *names: str) -> None:
        for component in self._components:
            if component.name not in names:
                continue
            state = ComponentState(component.name, component.node)
            holder = self.state.holders[component.node].pid
            watched = Watched(component, state, enter(holder))
            watched.start(self.folder)
            self._watched.append(watched)
            self.state.components.append(state)
        self._write()

    def _wait(self, what: str, condition: Callable[[], bool]) -> None:
        """Tick until `condition` holds, however long it takes: the time limit is `up`'s."""
        self._say(f"waiting for {what}")
        while not self._holds(condition):
            self._tick(TICK_S)

    def _holds(self, condition: Callable[[], bool]) -> bool:
        try:
            return condition()
        except httpx.HTTPError as error:
            print(f"still waiting: {error}", file=sys.stderr, flush=True)
            return False

    def _tick(self, wait_s: float) -> None:
        """Sleep until something happens, for at most `wait_s`, and tend every component.

        Raises Stop when the cluster is to end, and StartError when a node's holder has died.
        """
        pause = TICK_S if any(w.state.process is None for w in self._watched) else wait_s
        readable, _, _ = select.select([self._wake[0]], [], [], pause)
        if readable:
            os.read(self._wake[0], 4096)
        if self._stopping or not self.folder.root.exists():
            raise Stop
        for node, holder in self.state.holders.items():
            if not holder.alive():
                raise StartError(
                    f"the process that held the namespaces of {node} has died: "
                    "start the cluster again"
                )
        changes = [watched.tend(self.folder) for watched in self._watched]
        if any(changes):
            self._write()

    def _say(self, message: str, phase: Phase | None = None) -> None:
        self.state.message = message
        self.state.phase = phase or self.state.phase
        print(f"{self.state.phase}: {message}", file=sys.stderr, flush=True)
        self._write()

    def _write(self) -> None:
        if self.folder.root.exists():
            self.state.write(self.folder.state)

    def _catch_signals(self) -> None:
        def stop(number: int, frame: FrameType | None) -> None:
            self._stopping = True

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for end in self._wake:
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._wake[1], warn_on_full_buffer=False)


def detach(log: Path) -> None:
    """Leave the caller's session and terminal; from now on, output goes to `log`.

    After two forks the survivor is neither the caller's child nor a session leader, so it can
    neither become a zombie of a caller that never waits nor acquire a terminal again.
    """
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    # Whatever the caller's: pods of any user read what the components write for them.
    os.umask(0o022)
    null = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)


def main() -> None:
    """Run the supervisor of the cluster in the folder that the command line names."""
    folder = ClusterFolder(Path(sys.argv[1]))
    folder.logs.mkdir(parents=True, exist_ok=True)
    detach(folder.logs / "supervisor.log")
    sys.exit(Supervisor(folder).run())


if __name__ == "__main__":
    main()
