"""Writes children: applies one only when it differs from what was applied, removes the unwanted."""

import hashlib
import json

import structlog

from tandem_operator.clients.children import ChildKey, Children
from tandem_operator.clients.cluster import Cluster, JsonObject
from tandem_operator.errors import (
    ClusterError,
    ConflictError,
    MissingError,
    NotOwnedError,
    OperatorError,
    RefusedFieldError,
)
from tandem_operator.facts.observed import Observed
from tandem_operator.manifests.user_fields import find_fields
from tandem_operator.names.labels import was_made_for
from tandem_operator.names.objects import CONTROLLER_REVISION, INFERENCE_SERVICE, OPERATOR
from tandem_operator.plan.steps import Removal

log = structlog.get_logger("tandem.execute")


class ChildWriter:
    """Keeps what it last applied, and what the API server made of it.

    A child whose manifest and whose state in `children` are still the same costs no request. One
    that somebody changed is applied again, and a new process applies each child once. What is kept
    about a child goes with it.
    """

    def __init__(self, cluster: Cluster, children: Children) -> None:
        self._cluster = cluster
        self._children = children
        self._applied: dict[ChildKey, tuple[str, str]] = {}
        self._created: dict[ChildKey, str] = {}
        """By owner: the name of what was created for it."""
        children.on_gone = self._forget

    def _forget(self, child: ChildKey) -> None:
        self._applied.pop(child, None)
        self._created.pop(child, None)

    async def apply(self, child: JsonObject, observed: Observed, manager: str = OPERATOR) -> None:
        """Bring a child into being as it should be.

        Raises NotOwnedError when an object of this name belongs to someone else, and
        RefusedFieldError when the API server refuses what the user wrote into it.
        """
        meta = child["metadata"]
        key = (child["kind"], meta["namespace"], meta["name"])
        text = json.dumps([manager, child], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if self._applied.get(key) == (digest, self._children.content(*key)):
            return
        before = await self._refuse_foreign(child, observed)
        owned = before is not None and before["metadata"].get("ownerReferences")
        if before is not None and owned and child["kind"] == CONTROLLER_REVISION:
            # It can't be changed: the first one stands.
            self._children.put(child["kind"], before)
            return
        try:
            found = await self._apply(child, manager)
        except ClusterError as error:
            raise explain(error, child, observed) from error
        self._children.put(child["kind"], found)
        if manager == OPERATOR:
            self._applied[key] = (digest, self._children.content(*key))

    async def create_once(self, child: JsonObject, *, again: bool) -> None:
        """Create a child that the operator may neither read nor change, if it is missing.

        Only a try shows whether it is: the first time in this process, and then if `again`. It
        belongs to another child, whose uid is filled in here; without that one nothing is done.
        """
        meta = child["metadata"]
        (owner,) = meta["ownerReferences"]
        key = (owner["kind"], meta["namespace"], owner["name"])
        uid = self._children.uid(*key)
        if not uid or (self._created.get(key) == meta["name"] and not again):
            return
        owned = {**child, "metadata": {**meta, "ownerReferences": [{**owner, "uid": uid}]}}
        try:
            await self._cluster.create(owned)
        except ConflictError:
            log.debug("exists already", kind=child["kind"], name=meta["name"])
        self._created[key] = meta["name"]

    async def remove(self, item: Removal, observed: Observed) -> None:
        """Delete a child that isn't wanted any more, if it is still the same one."""
        try:
            await self._cluster.delete(item.kind, item.name, observed.namespace, uid=item.uid)
        except ConflictError:
            log.info("child to delete was replaced", kind=item.kind, name=item.name)
        self._children.drop(item.kind, observed.namespace, item.name)

    async def _apply(self, child: JsonObject, manager: str) -> JsonObject:
        try:
            return await self._cluster.apply(child, manager)
        except MissingError:
            # The API server answers so now and then when it creates by apply; the second try works.
            return await self._cluster.apply(child, manager)

    async def _refuse_foreign(self, child: JsonObject, observed: Observed) -> JsonObject | None:
        """The object as it is, or None if there is none."""
        meta = child["metadata"]
        try:
            found = await self._cluster.get(child["kind"], meta["name"], meta["namespace"])
        except MissingError:
            return None
        owners = found["metadata"].get("ownerReferences") or []
        if any(owner["uid"] == observed.uid for owner in owners):
            return found
        if not owners and was_made_for(observed.name, found["metadata"]):
            # Its service was deleted with --cascade=orphan. Applying makes this one its owner.
            await self._require_living(observed)
            return found
        if any(_is_predecessor(owner, observed) for owner in owners):
            # The service was deleted and created again before its old children were collected.
            uid = found["metadata"]["uid"]
            await self._cluster.delete(child["kind"], meta["name"], meta["namespace"], uid=uid)
            return None
        raise NotOwnedError(
            f"{child['kind']} {meta['name']} exists and does not belong to {observed.name}:"
            " remove or rename it"
        )

    async def _require_living(self, observed: Observed) -> None:
        """Raise MissingError if the service is going: what it owned then would go with it."""
        name = observed.name
        meta = (await self._cluster.get(INFERENCE_SERVICE, name, observed.namespace))["metadata"]
        if meta["uid"] != observed.uid or meta.get("deletionTimestamp"):
            raise MissingError(404, f"{INFERENCE_SERVICE} {name} is being deleted")


def explain(error: ClusterError, sent: JsonObject, observed: Observed) -> OperatorError:
    """The error to tell: one that names the user's fields, if the refusal is about them."""
    spec, has_pods = observed.spec, sent["kind"] in ("Pod", "Deployment")
    # Server-side apply answers 500 where a create answers 400.
    if spec is None or not has_pods or error.status not in (400, 422, 500):
        return error
    fields = find_fields(error.message, sent, spec)
    if not fields:
        return error
    return RefusedFieldError(
        f"{', '.join(fields)}: the API server refuses this ({error.message}): correct or remove it"
    )


def _is_predecessor(owner: JsonObject, observed: Observed) -> bool:
    return owner.get("kind") == INFERENCE_SERVICE and owner.get("name") == observed.name
