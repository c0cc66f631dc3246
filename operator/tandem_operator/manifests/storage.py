"""Volumes and environment that give a container the model, for workers and for routers.

Every container has a cache volume, and the environment names a folder in it for each library that
keeps files: an image's own folders may belong to another user, or be read-only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tandem_operator.api.model import Model
from tandem_operator.api.model_uri import ModelScheme
from tandem_operator.names.pods import ENV_CACHE_DIR

MODEL_PATH = "/mnt/model"
CACHE_PATH = "/mnt/cache"
ROUTER_CACHES: Final[Mapping[str, str]] = {
    "HOME": "",
    ENV_CACHE_DIR: "",
    "XDG_CACHE_HOME": "xdg",
    "HF_HOME": "huggingface",
}
"""Variables that name a place to write, and the folder of the cache volume that each gets."""
WORKER_CACHES: Final[Mapping[str, str]] = {
    **ROUTER_CACHES,
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
}
_SECRET_KEYS = {
    ModelScheme.HF: ("HF_TOKEN",),
    ModelScheme.S3: ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
}
"""What a download needs from model.secretName; only these schemes download anything."""


@dataclass(frozen=True)
class ModelStorage:
    """How one container reads the model: the URI to give it, and what must be mounted."""

    uri: str
    cache_dir: str = CACHE_PATH
    volumes: tuple[dict[str, Any], ...] = ()
    mounts: tuple[dict[str, Any], ...] = ()
    env: tuple[dict[str, Any], ...] = field(default=())
    writes_claim: bool = False


def build_storage(model: Model, *, weights: bool = True) -> ModelStorage:
    """The storage of a model. The download secret is only referred to, never read.

    Without `weights`, for a router: it reads the model's config and tokenizer, and shares nothing
    with others but what it downloads.
    """
    source = model.source
    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []
    env: list[dict[str, Any]] = []
    uri = model.uri
    if source.scheme is ModelScheme.PVC:
        uri = f"file://{MODEL_PATH}/{source.path}".rstrip("/")
        volumes.append(
            {
                "name": "model",
                "persistentVolumeClaim": {"claimName": source.authority, "readOnly": True},
            }
        )
        mounts.append({"name": "model", "mountPath": MODEL_PATH, "readOnly": True})
    elif source.scheme is ModelScheme.FILE:
        volumes.append({"name": "model", "hostPath": {"path": source.path, "type": ""}})
        mounts.append({"name": "model", "mountPath": source.path, "readOnly": True})
    elif source.scheme is ModelScheme.OCI:
        uri = f"file://{MODEL_PATH}"
        volumes.append({"name": "model", "image": {"reference": source.authority}})
        mounts.append({"name": "model", "mountPath": MODEL_PATH, "readOnly": True})
    elif source.scheme is ModelScheme.HF:
        # --revision is the fleet's revision, so the hub's must be in the URI.
        uri = f"{uri}@{model.revision}"
    claim = model.cache.claim_name
    shares = bool(claim) and (weights or source.scheme in _SECRET_KEYS)
    volumes.append(
        {"name": "cache", "persistentVolumeClaim": {"claimName": claim}}
        if shares
        else {"name": "cache", "emptyDir": {}}
    )
    mounts.append({"name": "cache", "mountPath": CACHE_PATH})
    if model.secret_name:
        keys = _SECRET_KEYS.get(source.scheme, ())
        env.extend(_from_secret(model.secret_name, key) for key in keys)
    return ModelStorage(uri, CACHE_PATH, tuple(volumes), tuple(mounts), tuple(env), shares)


def cache_env(caches: Mapping[str, str]) -> dict[str, str]:
    """The value of each variable: a folder of the cache volume."""
    return {name: f"{CACHE_PATH}/{folder}".rstrip("/") for name, folder in caches.items()}


def _from_secret(secret: str, key: str) -> dict[str, Any]:
    reference = {"name": secret, "key": key, "optional": True}
    return {"name": key, "valueFrom": {"secretKeyRef": reference}}
