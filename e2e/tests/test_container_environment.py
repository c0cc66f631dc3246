"""What the project's images give a container on the embedded cluster: what the Dockerfile says.

What a pod gets by accident from the machine, a real image would not have.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tandem_local import LocalCluster
from tandem_local.components.images import ENGINE_ENVIRONMENT, ENVIRONMENT, HOME, REGISTRY

from .manifest import eventually, pod

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SCRIPT = """if True:
    import json, os, pathlib, shutil, sys
    home = pathlib.Path.home()
    def tried(path):
        try:
            (path / "new").touch()
        except OSError as error:
            return error.strerror
        return ""
    print(json.dumps({
        "uid": os.getuid(), "env": dict(os.environ), "home": str(home),
        "before": os.listdir(home) + os.listdir("/srv"),
        "written": [tried(pathlib.Path(folder)) for folder in (home, "/tmp", "/", sys.prefix)],
        "compiler": shutil.which("gcc") or shutil.which("cc") or shutil.which("clang"),
        "machine": os.path.exists(sys.argv[1]),
    }))
"""
# What the kubelet and the runtime add to every container.
ADDED = ("KUBERNETES_", "HOSTNAME", "PATH", "PYTHONPYCACHEPREFIX")


def look(
    cluster: LocalCluster, namespace: str, image: str, secret: str, **changes: Any
) -> dict[str, Any]:
    """What a container of an image sees, as it tells it itself."""
    container = {
        "image": f"{REGISTRY}/{image}:1",
        "command": ["python", "-c", SCRIPT, secret],
        **changes,
    }
    manifest = pod(image, "", container=container, restartPolicy="Never")
    cluster.kubectl("apply", "-n", namespace, "-f", "-", input=manifest)

    def log() -> str:
        return cluster.kubectl("logs", "-n", namespace, image, check=False).stdout

    eventually("the pod has written its log", lambda: log().endswith("}\n"))
    told: dict[str, Any] = json.loads(log())
    return told


@pytest.mark.parametrize(
    ("image", "environment"),
    [
        ("tandem-operator", ENVIRONMENT),
        ("tandem-router", ENVIRONMENT),
        ("tandem-engine", ENGINE_ENVIRONMENT),
    ],
)
def test_a_container_has_what_its_image_has_and_no_more(
    local_cluster: LocalCluster,
    namespace: str,
    image: str,
    environment: dict[str, str],
    tmp_path: os.PathLike[str],
) -> None:
    told = look(local_cluster, namespace, image, str(tmp_path))
    assert {k: v for k, v in told["env"].items() if not k.startswith(ADDED)} == environment
    assert (told["uid"], told["home"]) == (65532, HOME)
    assert told["before"] == []
    assert told["written"][:2] == ["", ""]
    assert all(told["written"][2:])
    assert not told["machine"]
    if image != "tandem-engine":
        assert told["compiler"] is None


def test_a_read_only_root_is_read_only_in_the_home_too(
    local_cluster: LocalCluster, namespace: str, tmp_path: os.PathLike[str]
) -> None:
    changes = {"securityContext": {"readOnlyRootFilesystem": True}}
    told = look(local_cluster, namespace, "tandem-engine", str(tmp_path), **changes)
    assert told["written"][:2] == ["Read-only file system"] * 2
