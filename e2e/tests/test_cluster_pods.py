"""What a pod on the embedded cluster can do: run, be read, be entered, be reached."""

from __future__ import annotations

import json
import re
import subprocess
from functools import partial
from pathlib import Path

import httpx
import pytest
from deadlines import patience

from tandem_local import ImageEntry, LocalCluster

from .manifest import eventually, http_server, pod, service

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def wait_ready(cluster: LocalCluster, namespace: str, name: str) -> None:
    cluster.kubectl(
        "wait", "-n", namespace, f"pod/{name}", "--for=condition=Ready", "--timeout=60s", timeout=90
    )


def pod_field(cluster: LocalCluster, namespace: str, name: str, path: str) -> str:
    return cluster.kubectl("get", "pod", "-n", namespace, name, "-o", f"jsonpath={{{path}}}").stdout


def test_every_node_is_ready(local_cluster: LocalCluster) -> None:
    nodes = json.loads(local_cluster.kubectl("get", "nodes", "-o", "json").stdout)["items"]
    assert [n["metadata"]["name"] for n in nodes] == ["node-0", "node-1"]
    for node in nodes:
        conditions = {c["type"]: c["status"] for c in node["status"]["conditions"]}
        assert conditions["Ready"] == "True"
    assert nodes[0]["status"]["allocatable"]["nvidia.com/gpu"] == "16"
    assert "nvidia.com/gpu" not in nodes[1]["status"]["allocatable"]


def test_a_volume_does_not_hide_what_an_image_consists_of(
    local_cluster: LocalCluster, namespace: str, tmp_path: Path
) -> None:
    program = tmp_path / "app" / "run"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\ntouch /tmp/mine && ls /tmp && exec sleep 600\n")
    program.chmod(0o755)
    covering = f"/{tmp_path.parts[1]}"
    image = ImageEntry("tandem.local/app:1", (str(program),), files=(str(program.parent),))
    local_cluster.add_image(image)
    container = {
        **{"image": image.name, "command": None},
        "volumeMounts": [{"name": "empty", "mountPath": path} for path in {covering, "/tmp"}],
    }
    volumes = [{"name": "empty", "emptyDir": {}}]
    manifest = pod("app", "", container=container, volumes=volumes)
    local_cluster.kubectl("apply", "-n", namespace, "-f", "-", input=manifest)
    wait_ready(local_cluster, namespace, "app")
    seen = local_cluster.kubectl("logs", "-n", namespace, "app").stdout.split()
    assert "mine" in seen
    assert not (Path("/tmp") / "mine").exists()


def test_logs_exec_and_port_forward(local_cluster: LocalCluster, namespace: str) -> None:
    cluster = local_cluster
    cluster.kubectl(
        "apply", "-n", namespace, "-f", "-", input=pod("web", f"echo hello; {http_server(8080)}")
    )
    wait_ready(cluster, namespace, "web")
    assert "hello" in cluster.kubectl("logs", "-n", namespace, "web").stdout
    inside = ["exec", "-n", namespace, "web", "--"]
    assert cluster.kubectl(*inside, "hostname").stdout.strip() == "web"
    failed = cluster.kubectl(*inside, "sh", "-c", "exit 7", check=False)
    assert failed.returncode == 7
    piped = cluster.kubectl("exec", "-i", "-n", namespace, "web", "--", "cat", input="through")
    assert piped.stdout == "through"
    [pid] = cluster.container_pids(namespace, "web")
    assert pid > 1

    with subprocess.Popen(
        cluster.kubectl_argv("port-forward", "-n", namespace, "pod/web", ":8080"),
        env=cluster.environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as forward:
        assert forward.stdout is not None
        found = re.search(r"127\.0\.0\.1:(\d+)", forward.stdout.readline())
        assert found is not None
        for _ in range(3):
            answer = httpx.get(
                f"http://127.0.0.1:{found[1]}/", trust_env=False, timeout=patience(10)
            )
            assert answer.text.strip() == "web"
        forward.terminate()


def test_a_service_answers_by_name_from_the_other_node(
    local_cluster: LocalCluster, namespace: str
) -> None:
    cluster = local_cluster
    cluster.kubectl(
        "apply", "-n", namespace, "-f", "-", input=pod("web", http_server(80), nodeName="node-0")
    )
    cluster.kubectl("apply", "-n", namespace, "-f", "-", input=service("web", 80))
    cluster.kubectl(
        "apply", "-n", namespace, "-f", "-", input=pod("client", "sleep 600", nodeName="node-1")
    )
    wait_ready(cluster, namespace, "web")
    wait_ready(cluster, namespace, "client")
    assert pod_field(cluster, namespace, "web", ".status.hostIP") != pod_field(
        cluster, namespace, "client", ".status.hostIP"
    )

    def fetch(url: str) -> bool:
        code = f"import urllib.request as u; print(u.urlopen('{url}', timeout=5).read().decode())"
        done = cluster.kubectl(
            "exec", "-n", namespace, "client", "--", "python3", "-c", code, check=False
        )
        return done.stdout.strip() == "web"

    address = pod_field(cluster, namespace, "web", ".status.podIP")
    eventually("pod to pod across nodes", lambda: fetch(f"http://{address}/"))
    for name in ("web", f"web.{namespace}", f"web.{namespace}.svc.cluster.local"):
        eventually(f"{name} resolves and answers", partial(fetch, f"http://{name}/"))


def test_the_host_reaches_pods_and_services(local_cluster: LocalCluster, namespace: str) -> None:
    cluster = local_cluster
    for node in ("node-0", "node-1"):
        name = f"web-{node}"
        cluster.kubectl(
            "apply", "-n", namespace, "-f", "-", input=pod(name, http_server(80), nodeName=node)
        )
        cluster.kubectl("apply", "-n", namespace, "-f", "-", input=service(name, 80))
    for node in ("node-0", "node-1"):
        name = f"web-{node}"
        wait_ready(cluster, namespace, name)
        pod_ip = pod_field(cluster, namespace, name, ".status.podIP")
        cluster_ip = cluster.kubectl(
            "get", "service", "-n", namespace, name, "-o", "jsonpath={.spec.clusterIP}"
        ).stdout

        def answers(address: str, name: str = name) -> bool:
            try:
                return (
                    httpx.get(
                        f"http://{address}/", trust_env=False, timeout=patience(5)
                    ).text.strip()
                    == name
                )
            except httpx.HTTPError:
                return False

        eventually(f"{name} at {pod_ip}", partial(answers, pod_ip))
        eventually(f"{name} at {cluster_ip}", partial(answers, cluster_ip))


def test_extended_resources_are_scheduled(local_cluster: LocalCluster, namespace: str) -> None:
    cluster = local_cluster

    def wanting(name: str, gpus: int) -> str:
        amount = {"nvidia.com/gpu": str(gpus)}
        return pod(name, "sleep 600", container={"resources": {"limits": amount}})

    cluster.kubectl("apply", "-n", namespace, "-f", "-", input=wanting("most", 14))
    wait_ready(cluster, namespace, "most")
    assert pod_field(cluster, namespace, "most", ".spec.nodeName") == "node-0"
    cluster.kubectl("apply", "-n", namespace, "-f", "-", input=wanting("more", 4))
    eventually(
        "four of two is unschedulable",
        lambda: (
            "Insufficient nvidia.com/gpu"
            in pod_field(cluster, namespace, "more", ".status.conditions[0].message")
        ),
    )
    cluster.kubectl("delete", "pod", "-n", namespace, "most", "--wait=false")
    wait_ready(cluster, namespace, "more")


def test_unknown_images_and_new_ones(local_cluster: LocalCluster, namespace: str) -> None:
    cluster = local_cluster
    unknown = json.loads(pod("unknown", "sleep 600"))
    unknown["spec"]["containers"][0] = {"name": "main", "image": f"example.org/{namespace}:1"}
    cluster.kubectl("apply", "-n", namespace, "-f", "-", input=json.dumps(unknown))
    eventually(
        "an unknown image is not pulled",
        lambda: (
            pod_field(
                cluster, namespace, "unknown", ".status.containerStatuses[0].state.waiting.reason"
            )
            in ("ErrImagePull", "ImagePullBackOff")
        ),
    )
    cluster.add_image(ImageEntry(f"example.org/{namespace}:*", ("sleep", "600")))
    wait_ready(cluster, namespace, "unknown")


def test_rbac_and_pod_security_are_enforced(local_cluster: LocalCluster, namespace: str) -> None:
    cluster = local_cluster
    user = f"system:serviceaccount:{namespace}:default"
    may = cluster.kubectl("auth", "can-i", "list", "secrets", f"--as={user}", check=False)
    assert may.stdout.strip() == "no"
    cluster.kubectl(
        "label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted"
    )
    refused = cluster.kubectl(
        "apply", "-n", namespace, "-f", "-", input=pod("root", "sleep 1"), check=False
    )
    assert refused.returncode != 0
    assert "violates PodSecurity" in refused.stderr


def test_a_restricted_pod_runs_the_projects_python(
    local_cluster: LocalCluster, namespace: str
) -> None:
    """As the chart runs the operator: not root, nothing to write to, its own token to read."""
    cluster = local_cluster
    cluster.kubectl(
        "label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted"
    )
    token = "/var/run/secrets/kubernetes.io/serviceaccount/token"
    script = (
        f"import os, tandem_wire; open('{token}').read(); print('uid', os.getuid())\n"
        "try: open('/tmp/x', 'w')\n"
        "except OSError as e: print(e.strerror)\n"
        "import time; print('end', flush=True); time.sleep(600)\n"
    )
    container = {
        "command": ["python", "-c", script],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    user = {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "fsGroup": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    manifest = pod("restricted", "", container=container, securityContext=user)
    cluster.kubectl("apply", "-n", namespace, "-f", "-", input=manifest)

    def log() -> str:
        return cluster.kubectl("logs", "-n", namespace, "restricted", check=False).stdout

    eventually("the pod has written its log", lambda: "end" in log())
    assert log().splitlines() == ["uid 65532", "Read-only file system", "end"]
