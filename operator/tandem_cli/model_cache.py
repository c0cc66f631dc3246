"""A volume of the embedded cluster in which pods keep what they make of models' files.

Without one, every pod downloads and converts a model by itself, again after each restart. On a real
cluster, that volume is a PersistentVolumeClaim of the user's own.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any, Final

CACHE_NAME: Final = "tandem-cache"
_SIZE: Final = "1Ti"  # a folder of the machine has no size of its own


def build_cache(namespace: str, folder: Path) -> list[dict[str, Any]]:
    """A volume over a folder of the machine, and the claim to it in a namespace."""
    access = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    volume = f"{CACHE_NAME}-{namespace}"
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": volume},
            "spec": {
                **access,
                "capacity": {"storage": _SIZE},
                "persistentVolumeReclaimPolicy": "Retain",
                "hostPath": {"path": str(folder), "type": "Directory"},
                "claimRef": {"namespace": namespace, "name": CACHE_NAME},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": CACHE_NAME, "namespace": namespace},
            "spec": {
                **access,
                "volumeName": volume,
                "resources": {"requests": {"storage": _SIZE}},
            },
        },
    ]


def use_cache(documents: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The documents of a manifest with the cache for each service that has a model and no claim.

    Pods of any user write to `folder`, which is like /tmp.
    """
    caches: dict[str, list[dict[str, Any]]] = {}
    found = deepcopy(documents)
    for document in found:
        if document.get("kind") != "InferenceService":
            continue
        model = document.get("spec", {}).get("model", {})
        named = (model.get("cache") or {}).get("claimName")
        if named or str(model.get("uri", "mock://")).startswith("mock://"):
            continue
        namespace = document["metadata"].get("namespace", "default")
        caches[namespace] = build_cache(namespace, folder)
        model["cache"] = {"claimName": CACHE_NAME}
    if caches:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o1777)
    return [*(item for cache in caches.values() for item in cache), *found]
