"""The children of a service other than its workers: what to apply, hand over and remove."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.facts.observed import Observed
from tandem_operator.manifests.claims import build_claim_templates
from tandem_operator.manifests.fleet import build_fleet, build_owner, build_pool
from tandem_operator.manifests.history import build_record
from tandem_operator.manifests.router import build_router, build_scale_holder
from tandem_operator.manifests.wiring import Wiring
from tandem_operator.names.objects import (
    CLAIM_TEMPLATE,
    CONTROLLER_REVISION,
    WORKER_POOL,
    pool_name,
    record_name,
)
from tandem_operator.pair import Pair, Role
from tandem_operator.plan.rollout.revisions import RevisionStep
from tandem_operator.plan.scale.targets import PoolTarget
from tandem_operator.plan.steps import Removal

Child = dict[str, Any]


@dataclass(frozen=True)
class ChildSteps:
    """What to do with the children; the fields of `Plan` have the same names."""

    hand_over: tuple[Child, ...]
    apply: tuple[Child, ...]
    remove: tuple[Removal, ...]


def plan_children(
    observed: Observed,
    spec: InferenceServiceSpec,
    targets: Pair[PoolTarget],
    wiring: Wiring,
    step: RevisionStep,
    target: str,
) -> ChildSteps:
    """`target` is the revision of the spec."""
    owner = build_owner(observed)
    children = [
        *build_fleet(observed, spec, owner),
        *build_router(observed, spec, step.route, owner),
        *build_claim_templates(observed, spec, wiring, owner),
    ]
    served = any(pod.served and pod.revision == target for pod in observed.pods)
    if served and all(observed.pools) and not _is_recorded(observed, target):
        children.append(build_record(observed, spec, target, wiring, owner))
    holder = build_scale_holder(observed, spec) if step.follow else None
    kept = children
    if not step.follow or holder is not None:
        # Until the routers change over, their Deployment stays as the old spec made it. And while
        # their number is handed over, what is applied must not lack it yet.
        kept = [child for child in children if child["kind"] != "Deployment"]
    return ChildSteps(
        hand_over=() if holder is None else (holder,),
        apply=(*_changed_pools(observed, targets, target), *kept),
        remove=_unwanted(observed, children, target),
    )


def _is_recorded(observed: Observed, revision: str) -> bool:
    return observed.owns(CONTROLLER_REVISION, record_name(observed.name, revision))


def _unwanted(observed: Observed, children: list[Child], target: str) -> tuple[Removal, ...]:
    """The service's own children that the spec no longer asks for."""
    used = {target, *(pod.revision for pod in observed.pods)}
    if observed.router is not None:
        used.add(observed.router.revision)
    wanted = {(child["kind"], child["metadata"]["name"]) for child in children}
    wanted |= {(WORKER_POOL, pool_name(observed.name, role)) for role in Role}
    wanted |= {(CONTROLLER_REVISION, record_name(observed.name, one)) for one in used}
    wanted |= {(CLAIM_TEMPLATE, name) for name in _templates_in_use(observed)}
    return tuple(
        Removal(child.kind, child.name, child.uid)
        for child in observed.children
        if observed.uid in child.owners and (child.kind, child.name) not in wanted
    )


def _templates_in_use(observed: Observed) -> Iterator[str]:
    """The templates of claims of the pods, which new pods of an old revision need too."""
    for pod in (*observed.pods, *(one for one in observed.recorded if one is not None)):
        for claim in pod.manifest.get("spec", {}).get("resourceClaims") or ():
            if name := claim.get("resourceClaimTemplateName"):
                yield name


def _changed_pools(observed: Observed, targets: Pair[PoolTarget], revision: str) -> list[Child]:
    changed = []
    for role, target in targets.items():
        pool = observed.pools.of(role)
        wanted = (target.replicas, target.spec_replicas, target.ignored, revision)
        if pool is not None and wanted == (
            pool.replicas,
            pool.spec_replicas,
            pool.ignored_scale,
            pool.revision,
        ):
            continue
        changed.append(build_pool(observed, role, *wanted))
    return changed
