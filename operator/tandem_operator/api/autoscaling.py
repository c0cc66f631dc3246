"""Which policy scales a service."""

from typing import ClassVar

from tandem_operator.api.api_object import ApiObject, Rule
from tandem_operator.api.autoscaling_policy import AutoscalingPolicySpec
from tandem_operator.api.model import ResourceName


class Autoscaling(ApiObject):
    """The policy that scales both pools: one by name, or one written here."""

    policy_name: ResourceName | None = None
    """An AutoscalingPolicy in the namespace."""
    inline: AutoscalingPolicySpec | None = None
    """The same spec as an AutoscalingPolicy's, for this service only."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.policyName) != has(self.inline)",
            "autoscaling needs exactly one of policyName and inline: keep one, or remove"
            " autoscaling to scale by hand",
        ),
    )
