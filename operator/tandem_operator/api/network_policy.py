"""Whether the operator fences the fleet's network."""

from tandem_operator.api.api_object import ApiObject


class NetworkPolicySettings(ApiObject):
    """NetworkPolicies for routers and workers."""

    enabled: bool = True
    """Whether NetworkPolicies are written that let in clients at the router only, and router, peers
    and operator at the workers."""
