"""How a mixture of experts turns a token's router logits into experts and weights."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Routing:
    """One model's rule. A token's weights are those of the experts it chose, in that order.

    Mixtral has a renormalised softmax, which is the softmax over the chosen logits; so has
    Qwen3-MoE if its config says `norm_topk_prob`. DeepSeek-V2 (arXiv 2405.04434) has a softmax, and
    judges groups by their best expert. DeepSeek-V3 (arXiv 2412.19437) has a sigmoid, with a bias
    that counts for the choice only, judges groups by the sum of their two best experts, and
    renormalises.
    """

    top_k: int
    """Experts per token."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """Scores of the experts, in float32."""
    renormalise: bool = False
    """Divide a token's weights by their sum."""
    num_groups: int = 1
    """The number of groups, of equal size, that the experts are in."""
    top_groups: int = 1
    """The number of groups from which a token may choose experts."""
    group_score: Literal["max", "top2"] = "max"
    """What a group is judged by: its best score, or the sum of its two best."""
    scale: float = 1.0
    """Factor on the weights, after renormalising."""
