"""The pod's own word on whether its worker may inject faults."""

from typing import Any

from tandem_operator.names.labels import LABEL_FAULTS
from tandem_operator.names.pods import ENGINE_CONTAINER, ENV_FAULTS_ALLOWED


def permit_faults(pod: dict[str, Any]) -> None:
    """Give the worker its pod's test label, and nothing else that says it may inject faults.

    The worker reads the label itself, so a label that is taken away counts from its next start.
    """
    labelled = LABEL_FAULTS in pod["metadata"]["labels"]
    source = {"fieldRef": {"fieldPath": f"metadata.labels['{LABEL_FAULTS}']"}}
    for container in pod["spec"]["containers"]:
        if container["name"] == ENGINE_CONTAINER:
            env = [each for each in container["env"] if each["name"] != ENV_FAULTS_ALLOWED]
            permit = [{"name": ENV_FAULTS_ALLOWED, "valueFrom": source}] if labelled else []
            container["env"] = env + permit
