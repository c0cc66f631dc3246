"""A mixture of experts, as data: who chooses, what is chosen, and what a checkpoint calls it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Checkpoint names below `model.layers.N.`; the defaults are Qwen's and DeepSeek's."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_expert"


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """The experts of a model's sparse layers, which are all alike.

    `sparse` says for each layer whether it has experts; the others keep the dense MLP. The fields
    from `scoring` to `scale` are those of `tandem_kernels.moe.Routing`.
    """

    num_experts: int
    intermediate_size: int
    """Size of one expert's hidden layer."""
    top_k: int
    sparse: tuple[bool, ...]
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    scale: float = 1.0
    score_bias: bool = False
    """Whether the router adds a bias to the scores for the choice (DeepSeek-V3)."""
    shared_size: int = 0
    """Intermediate size of the experts that every token uses, summed; 0: there are none."""
    shared_gate: bool = False
    """Whether a sigmoid of the token scales the shared experts' output (Qwen2-MoE)."""
    names: ExpertNames = ExpertNames()
