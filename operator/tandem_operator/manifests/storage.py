"""Volumes and environment that give a container the model, for workers and for routers."""

from dataclasses import dataclass, field
from typing import Any

from tandem_operator.api.model import Model
from tandem_operator.api.model_uri import ModelScheme

MODEL_PATH = "/mnt/model"
CACHE_PATH = "/mnt/cache"
_SECRET_KEYS = {
    ModelScheme.HF: ("HF_TOKEN",),
    ModelScheme.S3: ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
}
"""What a download needs from model.secretName; only these schemes download anything."""


@dataclass(frozen=True)
class ModelStorage:
    """How one container reads the model: the URI to give it, and what must be mounted."""

    uri: str
    cache_dir: str = ""
    volumes: tuple[dict[str, Any], ...] = ()
    mounts: tuple[dict[str, Any], ...] = ()
    env: tuple[dict[str, Any], ...] = field(default=())
    writes_claim: bool = False


def build_storage(model: Model, *, weights: bool = True) -> ModelStorage:
    """The storage of a model. The download secret is only referred to, never read.

    Without `weights`, for a router: it reads the model's config and tokenizer, and keeps nothing
    in the cache but what it downloads.
    """
    source = model.source
    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []
    env: list[dict[str, Any]] = []
    uri, cache_dir = model.uri, ""
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
    downloaded = source.scheme in _SECRET_KEYS
    caches = downloaded or bool(weights and claim)
    if caches:
        cache_dir = CACHE_PATH
        volumes.append(
            {"name": "cache", "persistentVolumeClaim": {"claimName": claim}}
            if claim
            else {"name": "cache", "emptyDir": {}}
        )
        mounts.append({"name": "cache", "mountPath": CACHE_PATH})
        env.append({"name": "HF_HOME", "value": f"{CACHE_PATH}/huggingface"})
    if model.secret_name:
        keys = _SECRET_KEYS.get(source.scheme, ())
        env.extend(_from_secret(model.secret_name, key) for key in keys)
    writes_claim = caches and bool(claim)
    return ModelStorage(uri, cache_dir, tuple(volumes), tuple(mounts), tuple(env), writes_claim)


def _from_secret(secret: str, key: str) -> dict[str, Any]:
    reference = {"name": secret, "key": key, "optional": True}
    return {"name": key, "valueFrom": {"secretKeyRef": reference}}
