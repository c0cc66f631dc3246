"""Every container that the operator makes: few rights, read-only root, resources, no secrets."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.manifests.container import ROUTER_DEFAULTS, build_resources
from tandem_operator.manifests.fleet import build_admin_secret
from tandem_operator.tests.api.field_effects import manifests
from tandem_operator.tests.api.field_samples import BASE, SAMPLES, put
from tandem_operator.tests.facts import ADMIN, make_observed, make_spec

CHART = Path(__file__).resolve().parents[4] / "charts/tandem"
OURS = {"engine", "router", "memlock"}
QUOTA = ("cpu", "memory")
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|KEY|CREDENTIAL", re.IGNORECASE)


def all_manifests() -> Iterator[dict[str, Any]]:
    """For every field of a service, what is made with and without it."""
    for base, value in SAMPLES.values():
        for fields in (put(BASE, base), put(put(BASE, base), value)):
            yield from manifests(InferenceServiceSpec.model_validate(fields))


def pod_specs(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    spec = manifest.get("spec", {})
    if manifest["kind"] == "Pod":
        yield spec
    elif "template" in spec:
        yield spec["template"]["spec"]


def containers(pod: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of all containers, those that are not from a podTemplate."""
    for container in (*pod.get("initContainers", ()), *pod["containers"]):
        if container["name"] in OURS:
            yield container


def has_quota(resources: dict[str, Any], *kinds: str) -> bool:
    return all(name in resources.get(kind, {}) for kind in kinds for name in QUOTA)


def test_every_container_has_few_rights_a_read_only_root_and_resources() -> None:
    seen = set()
    for pod in (pod for manifest in all_manifests() for pod in pod_specs(manifest)):
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(pod):
            name = container["name"]
            seen.add(name)
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True, name
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["capabilities"]["drop"] == ["ALL"], name
            assert not security.get("privileged"), name
            resources = container["resources"]
            # A limit alone is the request too, for Kubernetes.
            mentioned = {**resources.get("limits", {}), **resources.get("requests", {})}
            assert set(QUOTA) <= set(mentioned), (name, resources)
    assert seen == OURS


def test_routers_and_the_memlock_check_fit_a_namespace_with_a_quota() -> None:
    """A ResourceQuota on requests or limits refuses each container that doesn't say them."""
    spec = make_spec(rdma={"mode": "DevicePlugin"})
    found = {
        container["name"]: container
        for manifest in manifests(spec)
        for pod in pod_specs(manifest)
        for container in containers(pod)
    }
    assert set(found) == OURS
    for name in ("router", "memlock"):
        assert has_quota(found[name]["resources"], "requests", "limits"), name
    check = found["memlock"]["resources"]
    assert check["requests"] == check["limits"], "else no pod could be Guaranteed"


def test_the_users_resources_win_and_the_others_stay() -> None:
    spec = make_spec(router={"resources": {"requests": {"cpu": "8"}, "limits": {"x/y": 1}}})
    resources = build_resources(ROUTER_DEFAULTS, spec.router.resources)
    # No limit of 4 CPUs beside a request of 8, which the API server refuses.
    assert resources["requests"] == {"cpu": "8", "memory": "256Mi"}
    assert resources["limits"] == {"x/y": "1", "memory": "4Gi"}


def test_what_is_written_has_a_volume() -> None:
    """Caches and temporary files of a read-only root."""
    for pod in (pod for manifest in all_manifests() for pod in pod_specs(manifest)):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in containers(pod):
            mounts = {m["mountPath"]: m["name"] for m in container.get("volumeMounts", ())}
            assert set(mounts.values()) <= set(volumes)
            if container["name"] == "memlock":
                continue  # it writes the termination log, which is the runtime's own
            assert volumes[mounts["/tmp"]]["emptyDir"] == {}
            for env in container["env"]:
                if env["name"] == "HOME" or env["name"].endswith(("_HOME", "_DIR", "_PATH")):
                    inside = [path for path in mounts if f"{env['value']}/".startswith(f"{path}/")]
                    assert inside, f"{env['name']}={env['value']} can't be written"


def test_the_operators_own_container() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    security = values["securityContext"]
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert values["podSecurityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert has_quota(values["resources"], "requests", "limits")


def test_no_manifest_shows_a_secret() -> None:
    """Not in the environment, in arguments, labels or annotations, which all who may view see."""
    for manifest in all_manifests():
        assert manifest["kind"] != "Secret", "Secrets are made once, beside these"
        text = json.dumps(manifest)
        assert f'"{ADMIN.token}"' not in text
        for pod in pod_specs(manifest):
            for container in containers(pod):
                for env in container.get("env", ()):
                    literal = "value" in env and _SECRET_NAME.search(env["name"])
                    assert not literal, env["name"]


def test_the_admin_token_is_only_in_its_secret() -> None:
    observed = make_observed()
    secret = build_admin_secret(observed)
    assert base64.b64decode(secret["data"]["token"]).decode() == ADMIN.token
    assert secret["immutable"] is True
    assert ADMIN.token not in json.dumps(secret["metadata"])
