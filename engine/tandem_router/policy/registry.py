"""Policies by the name that the API gives them."""

from tandem_router.config import PolicyName
from tandem_router.policy.base import Policy
from tandem_router.policy.kv_aware import KvAware
from tandem_router.policy.least_loaded import LeastLoaded
from tandem_router.policy.round_robin import RoundRobin

POLICIES: dict[PolicyName, type[Policy]] = {
    "KvAware": KvAware,
    "LeastLoaded": LeastLoaded,
    "RoundRobin": RoundRobin,
}


def build_policy(name: PolicyName) -> Policy:
    """A fresh policy object."""
    return POLICIES[name]()
