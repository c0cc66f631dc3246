"""The revision of a service: what its workers run, as one short id."""

import json

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.api.pool import Pool
from tandem_operator.facts.observed import Images
from tandem_operator.names.objects import stable_id

_POOL_FIELDS_WITHOUT_PODS = {"replicas"}


def revision_of(spec: InferenceServiceSpec, images: Images) -> str:
    """The id of everything that worker pods are made of.

    KV never crosses a revision, so it covers the model, the engine and the transfer; replicas,
    routers, SLOs, policies and roll-out settings may change without replacing a single worker.
    """
    image = spec.engine.image or images.engine
    parts = {
        "image": image,
        "model": spec.model.to_manifest(),
        "engine": spec.engine.to_manifest(),
        "transfer": spec.kv_transfer.model_dump(mode="json", by_alias=True, exclude={"verify"}),
        "rdma": spec.rdma.to_manifest(),
        "cache": spec.kv_cache.to_manifest(),
        **{str(role): _pool(pool) for role, pool in spec.pools.items()},
    }
    return stable_id(json.dumps(parts, sort_keys=True))


def model_id_of(spec: InferenceServiceSpec) -> str:
    """The id of what routers know of the model: how text becomes tokens, and how long it may be.

    A router works with one model at a time. Revisions that share it share the routers.
    """
    known = {"uri", "name", "revision", "format", "max_model_len", "adapters"}
    parts = spec.model.model_dump(mode="json", by_alias=True, include=known)
    return stable_id(json.dumps(parts, sort_keys=True))


def _pool(pool: Pool) -> dict[str, object]:
    return pool.model_dump(mode="json", by_alias=True, exclude=_POOL_FIELDS_WITHOUT_PODS)
