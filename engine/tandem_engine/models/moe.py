"""The mixture of experts, in a sparse layer in place of the dense MLP."""

import torch

from tandem_engine.models.collective import Collective
from tandem_engine.models.layers import GatedMlp, Linear, Parameters
from tandem_engine.spec.model import ModelSpec
from tandem_engine.spec.moe import MoeSpec
from tandem_kernels.linear import linear
from tandem_kernels.moe import Routing, fused_moe


class MoeMlp:
    """The sum over a token's experts, plus the experts that every token uses.

    A rank has a part of every expert, so its result is a part of that sum.

    Legend: E experts, C hidden size, I an expert's intermediate size.
    """

    def __init__(
        self,
        spec: ModelSpec,
        moe: MoeSpec,
        parameters: Parameters,
        prefix: str,
        collective: Collective,
    ) -> None:
        shape = (moe.num_experts, -1, spec.hidden_size)
        self.router = parameters[f"{prefix}.router.weight"]  # [E, C]
        self.bias = parameters.get(f"{prefix}.router.bias")  # [E], for the choice alone
        self.gate_up = parameters[f"{prefix}.experts_gate_up.weight"].view(shape)  # [E, 2 I, C]
        down = parameters[f"{prefix}.experts_down.weight"]
        self.down = down.view(moe.num_experts, spec.hidden_size, -1)  # [E, C, I]
        self.routing = build_routing(moe)
        self.gelu = spec.activation == "gelu_tanh"
        self.shared: GatedMlp | None = None
        if moe.shared_size:
            self.shared = GatedMlp(spec, parameters, f"{prefix}.shared", collective)
        self.shared_gate = Linear(parameters, f"{prefix}.shared_gate") if moe.shared_gate else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, C] → a rank's part of [T, C]."""
        logits = linear(x, self.router)  # [T, E]
        routed = fused_moe(x, logits, self.gate_up, self.down, self.routing, self.bias, self.gelu)
        if self.shared is None:
            return routed
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = torch.sigmoid(self.shared_gate(x)) * shared
        return routed + shared


def build_routing(moe: MoeSpec) -> Routing:
    """The routing rule in the kernels' form."""
    return Routing(
        moe.top_k,
        moe.scoring,
        moe.renormalise,
        moe.num_groups,
        moe.top_groups,
        moe.group_score,
        moe.scale,
    )
