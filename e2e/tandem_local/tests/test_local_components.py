"""Specifications, image tables, command lines and configuration files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from ipaddress import IPv4Network
from pathlib import Path

import pytest
import yaml

from tandem_local.binaries.build import Binaries
from tandem_local.components.command_lines import MARKER, build_components, environment
from tandem_local.components.configuration import prepare
from tandem_local.components.images import default_images, merge_images, read_images, write_images
from tandem_local.errors import SpecError
from tandem_local.folders import ClusterFolder
from tandem_local.machine.process import ProcessRef
from tandem_local.nodes import network
from tandem_local.nodes.addresses import AddressPlan
from tandem_local.nodes.holder import closed_folders, holder_script, needed_paths
from tandem_local.spec import ClusterSpec, ImageEntry, NodeSpec, parse_quantity
from tandem_local.supervision.bootstrap import (
    bootstrap_objects,
    is_ready,
    missing_metadata,
    missing_resources,
)
from tandem_local.supervision.state import ClusterState, ComponentState, Phase

PLAN = AddressPlan(IPv4Network("10.210.0.0/16"))
SPEC = ClusterSpec(
    "two",
    (
        NodeSpec("node-0", {"nvidia.com/gpu": "8", "rdma/ib": "8"}, {"zone": "a"}),
        NodeSpec("node-1"),
    ),
    (ImageEntry("x:1", ("/bin/x",), {"K": "V"}, "/tmp", 65532, ("/opt/x",)),),
)
BINARIES = Binaries(Path("/b/tandem-cluster"), Path("/b/coredns"))


@pytest.fixture
def folder() -> ClusterFolder:
    # Not below tmp_path, which is too long for a Unix socket.
    return ClusterFolder(Path("/c/two"))


def test_spec_survives_json() -> None:
    assert ClusterSpec.from_json(SPEC.to_json()) == SPEC


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClusterSpec("Upper"), "cluster name 'Upper' is not valid: use 1 to 40"),
        (lambda: ClusterSpec("../up"), "cluster name '../up' is not valid: use 1 to 40"),
        (lambda: ClusterSpec("a", ()), "nodes is empty: a cluster needs at least one"),
        (
            lambda: ClusterSpec("a", (NodeSpec("n"), NodeSpec("n"))),
            "two nodes have the same name among n, n: rename one",
        ),
        (
            lambda: ClusterSpec("a", tuple(NodeSpec(f"n{i}") for i in range(101))),
            "nodes has 101 entries: a cluster has at most 100",
        ),
        (lambda: NodeSpec("node_0"), "node name 'node_0' is not valid: use 1 to 40"),
        (
            lambda: NodeSpec("n", {"gpu": "1"}),
            "node n: 'gpu' is not the name of an extended resource: put its domain in front",
        ),
    ],
)
def test_impossible_specs_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)):
        make()


def test_each_node_has_its_kubelet_proxy_and_runtime(folder: ClusterFolder) -> None:
    parts = build_components(SPEC, PLAN, folder, BINARIES)
    per_node = [(p.name, p.node) for p in parts]
    for name in ("procri", "kubelet", "kube-proxy"):
        assert [node for part, node in per_node if part == name] == ["node-0", "node-1"]
    for name in ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "coredns"):
        assert [node for part, node in per_node if part == name] == ["node-0"]
    assert len({p.key for p in parts}) == len(parts)


def test_the_runtime_serves_the_nodes_own_subnet(folder: ClusterFolder) -> None:
    parts = build_components(SPEC, PLAN, folder, BINARIES)
    [procri] = [p for p in parts if (p.name, p.node) == ("procri", "node-1")]
    assert procri.argv[:2] == ("/b/tandem-cluster", "procri")
    assert "--pod-cidr=10.210.1.0/24" in procri.argv
    assert "--socket=/c/two/n1/cri.sock" in procri.argv
    assert f"--dns={PLAN.dns}" in procri.argv
    assert "--images=/c/two/images.json" in procri.argv


def test_the_api_server_authorizes_by_node_and_rbac(folder: ClusterFolder) -> None:
    [api] = [
        p for p in build_components(SPEC, PLAN, folder, BINARIES) if p.name == "kube-apiserver"
    ]
    assert "--authorization-mode=Node,RBAC" in api.argv
    assert not any(flag.startswith("--disable-admission-plugins") for flag in api.argv)
    assert f"--service-cluster-ip-range={PLAN.services}" in api.argv


def test_prepared_files_agree_with_the_command_lines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tandem_local.components.configuration.MAX_SOCKET_PATH", 4096)
    folder = ClusterFolder(tmp_path / "two")
    folder.root.mkdir()
    prepare(SPEC, PLAN, folder)
    for part in build_components(SPEC, PLAN, folder, BINARIES):
        for flag in part.argv:
            value = flag.partition("=")[2] or flag
            if value.startswith(str(tmp_path)) and value.endswith(
                (".yaml", ".kubeconfig", ".crt", ".key", ".pub", "Corefile")
            ):
                assert Path(value).is_file(), f"{part.key}: {flag}"
    kubelet = yaml.safe_load((folder.node(1).config / "kubelet.yaml").read_text())
    assert kubelet["clusterDNS"] == [str(PLAN.dns)]
    assert kubelet["containerRuntimeEndpoint"] == f"unix://{folder.node(1).socket}"
    proxy = yaml.safe_load((folder.node(1).config / "kube-proxy.yaml").read_text())
    assert (proxy["mode"], proxy["hostnameOverride"]) == ("nftables", "node-1")
    assert f"ready {PLAN.api}:8181" in (folder.config / "Corefile").read_text()


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    folder = ClusterFolder(tmp_path / ("x" * 120))
    with pytest.raises(SpecError, match=r"Unix socket.*: set TANDEM_STATE_DIR to a shorter path"):
        prepare(SPEC, PLAN, folder)


def test_nothing_of_the_callers_environment_leaks(
    folder: ClusterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "secret")
    variables = environment(folder)
    assert "SOME_TOKEN" not in variables
    assert variables[MARKER] == "/c/two"


def test_the_holder_script_is_a_valid_shell_script(tmp_path: Path) -> None:
    script = holder_script(tmp_path / "with blank", [Path("/root"), Path("/a b")])
    assert subprocess.run(["sh", "-nc", script], check=False).returncode == 0
    assert script.endswith("exec sleep infinity")
    assert "refill '/a b' 0711" in script


def test_closed_folders_are_found_from_the_root_down(tmp_path: Path) -> None:
    inner = tmp_path / "closed" / "open" / "shut"
    inner.mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)
    inner.chmod(0o750)
    tmp_path.chmod(0o755)
    file = inner / "bin"
    file.touch()
    found = closed_folders([file, tmp_path / "closed" / "open", Path("/usr/bin/env")])
    below = [path for path in found if tmp_path in path.parents]
    assert below == [tmp_path / "closed", inner]


def test_needed_paths_are_those_of_the_interpreter_and_the_images() -> None:
    image = ImageEntry(
        "x:1", ("/opt/x/bin/x",), {"HF_HOME": "/m", "K": "v", "P": "/a:/b"}, files=("/f",)
    )
    needed = needed_paths([image])
    assert {Path(name) for name in ("/opt/x/bin/x", "/m", "/a", "/b", "/f")} <= set(needed)
    assert Path(sys.executable).resolve() in needed
    assert Path("v") not in needed


def test_link_names_fit_the_kernel_and_differ() -> None:
    names = {network.host_link(Path(path)) for path in ("/x/a", "/x/b", "/y/a")}
    assert len(names) == 3
    assert all(len(name) <= 15 for name in names)


def test_default_images_run_the_console_scripts() -> None:
    images = {image.name: image for image in default_images(Path("/v/bin"))}
    engine = images["ghcr.io/tandem-inference/tandem-engine:*"]
    assert engine.entrypoint == ("/v/bin/tandem-worker",)
    assert engine.env["PATH"].startswith("/v/bin:")
    assert engine.env["HOME"] == "/var/cache/tandem"
    assert engine.scratch == ("/var/cache/tandem",)
    assert images["ghcr.io/tandem-inference/tandem-router:*"].entrypoint == (
        "/v/bin/tandem-router",
    )
    assert images["ghcr.io/tandem-inference/tandem-operator:*"].entrypoint == (
        "/v/bin/tandem-operator",
    )
    assert images["tandem.local/shell:*"].entrypoint == ()


def test_the_image_table_is_what_the_runtime_reads(tmp_path: Path) -> None:
    path = tmp_path / "images.json"
    write_images(path, SPEC.images)
    assert json.loads(path.read_text()) == {
        "images": [
            {
                "name": "x:1",
                "entrypoint": ["/bin/x"],
                "env": {"K": "V"},
                "workingDir": "/tmp",
                "files": ["/opt/x"],
                "shared": [],
                "scratch": [],
                "hidden": [],
                "user": 65532,
            }
        ]
    }
    assert read_images(path) == SPEC.images


def test_images_of_the_same_name_are_replaced() -> None:
    old = (ImageEntry("a:1", ("/old",)), ImageEntry("b:1"))
    merged = merge_images(old, [ImageEntry("a:1", ("/new",)), ImageEntry("c:1")])
    assert {image.name: image.entrypoint for image in merged} == {
        "a:1": ("/new",),
        "b:1": (),
        "c:1": (),
    }


def node(**status: object) -> dict[str, object]:
    return {"metadata": {"labels": {"zone": "a"}}, "spec": {"podCIDR": "x"}, "status": status}


def test_resources_are_patched_until_both_parts_say_so() -> None:
    spec = SPEC.nodes[0]
    full = {"nvidia.com/gpu": "8", "rdma/ib": "8", "cpu": "2"}
    assert missing_resources(node(), spec) == dict(spec.resources)
    assert missing_resources(node(capacity=full, allocatable=full), spec) == {}
    # What a kubelet writes when it registers anew.
    zeroed = full | {"nvidia.com/gpu": "0"}
    assert missing_resources(node(capacity=zeroed, allocatable=full), spec) == {
        "nvidia.com/gpu": "8"
    }


def test_labels_and_pod_range_are_given_once() -> None:
    fresh: dict[str, object] = {"metadata": {}, "spec": {}, "status": {}}
    assert missing_metadata(fresh, SPEC.nodes[0], "10.0.0.0/24") == {
        "metadata": {"labels": {"zone": "a"}},
        "spec": {"podCIDR": "10.0.0.0/24", "podCIDRs": ["10.0.0.0/24"]},
    }
    assert missing_metadata(node(), SPEC.nodes[0], "10.0.0.0/24") is None


def test_readiness_is_the_condition() -> None:
    assert is_ready(node(conditions=[{"type": "Ready", "status": "True"}]))
    assert not is_ready(node(conditions=[{"type": "Ready", "status": "Unknown"}]))
    assert not is_ready(node())


def test_dns_answers_at_the_address_that_pods_are_told() -> None:
    [service] = [d for _, d in bootstrap_objects(PLAN) if d["kind"] == "Service"]
    [endpoints] = [d for _, d in bootstrap_objects(PLAN) if d["kind"] == "EndpointSlice"]
    assert service["spec"]["clusterIP"] == str(PLAN.dns)
    assert endpoints["endpoints"][0]["addresses"] == [str(PLAN.api)]


def test_state_survives_the_file(tmp_path: Path) -> None:
    state = ClusterState(
        supervisor=ProcessRef(10, 20),
        phase=Phase.READY,
        holders={"node-0": ProcessRef(11, 21)},
        components=[
            ComponentState("etcd", "node-0", ProcessRef(12, 22), restarts=3, exit_code=-9),
            ComponentState("kubelet", "node-0"),
        ],
    )
    state.write(tmp_path / "state.json")
    assert ClusterState.read(tmp_path / "state.json") == state
    assert ClusterState.read(tmp_path / "none.json") is None
    written = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "old.json").write_text(json.dumps(written | {"boot": "before"}))
    assert ClusterState.read(tmp_path / "old.json") is None, "its pids mean nothing now"
    assert state.processes() == [ProcessRef(12, 22), ProcessRef(11, 21)]
    found = state.find("kubelet", "node-0")
    assert found is not None
    assert found.process is None
    assert state.find("kubelet", "node-1") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [("8", 8), ("1k", 1000), ("1000", 1000), ("1Ki", 1024), ("2e3", 2000), ("2000m", 2), ("0", 0)],
)
def test_resources_are_quantities(text: str, value: int) -> None:
    assert parse_quantity(text) == value
    spec = NodeSpec("node-0", {"rdma/x": text})
    stored = {"rdma/x": "1k" if value == 1000 else str(value)}  # as the API server spells it
    assert missing_resources(node(capacity=stored, allocatable=stored), spec) == {}


@pytest.mark.parametrize("text", ["", "many", "8 ", "1kk", "500m"])
def test_resources_that_are_no_whole_pieces_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match="rdma/x"):
        NodeSpec("node-0", {"rdma/x": text})
