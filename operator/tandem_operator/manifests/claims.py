"""ResourceClaimTemplates: the NICs, and with them the GPUs, that each worker of a role claims."""

import json
from collections.abc import Iterator
from typing import Any

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.facts.observed import Observed
from tandem_operator.manifests.wiring import Wiring
from tandem_operator.names.labels import common_labels
from tandem_operator.names.objects import CLAIM_TEMPLATE, claim_template_name, stable_id
from tandem_operator.pair import Role

PCIE_ROOT = "resource.kubernetes.io/pcieRoot"
"""The attribute by which drivers of all vendors name a device's PCIe root."""


def build_claim_templates(
    observed: Observed, spec: InferenceServiceSpec, wiring: Wiring, owner: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """A template for each role, if the wiring makes claims."""
    if wiring.claim is None:
        return
    for role, pool in spec.pools.items():
        yield {
            "apiVersion": "resource.k8s.io/v1",
            "kind": CLAIM_TEMPLATE,
            "metadata": {
                "name": template_name(observed.name, role, wiring, pool.gpus_per_pod),
                "namespace": observed.namespace,
                "labels": common_labels(observed.name, role),
                "ownerReferences": [owner],
            },
            "spec": {
                "metadata": {"labels": common_labels(observed.name, role)},
                "spec": build_claim(wiring, pool.gpus_per_pod),
            },
        }


def template_name(service: str, role: Role, wiring: Wiring, num_gpus: int) -> str:
    """A name that changes with what is claimed, because a template can't be changed."""
    content = json.dumps(build_claim(wiring, num_gpus), sort_keys=True)
    return claim_template_name(service, role, stable_id(content))


def build_claim(wiring: Wiring, num_gpus: int) -> dict[str, Any]:
    """The spec of one pod's claim: a NIC for each GPU, or one NIC for a pod without GPUs."""
    claim = wiring.claim
    assert claim is not None, "only a wiring with a claim has templates"
    requests, constraints = [], []
    for number in range(max(1, num_gpus)):
        rail = wiring.rails[number] if wiring.rails else None
        requests.append(_request(f"nic-{number}", claim.device_class, claim.rail_attribute, rail))
        if wiring.claims_gpus(num_gpus):
            requests.append(_request(f"gpu-{number}", claim.gpu_device_class))
            pair = [f"gpu-{number}", f"nic-{number}"]
            constraints.append({"requests": pair, "matchAttribute": PCIE_ROOT})
    devices: dict[str, Any] = {"requests": requests}
    if constraints:
        devices["constraints"] = constraints
    return {"devices": devices}


def _request(
    name: str, device_class: str, attribute: str = "", value: str | int | bool | None = None
) -> dict[str, Any]:
    exactly: dict[str, Any] = {
        "deviceClassName": device_class,
        "allocationMode": "ExactCount",
        "count": 1,
    }
    if value is not None:
        domain, _, field = attribute.partition("/")
        place = f'device.attributes["{domain}"].{field}'
        # A device without the attribute would make the whole allocation fail.
        expression = f"has({place}) && {place} == {json.dumps(value)}"
        exactly["selectors"] = [{"cel": {"expression": expression}}]
    return {"name": name, "exactly": exactly}
