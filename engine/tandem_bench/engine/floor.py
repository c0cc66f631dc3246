"""The least time that a step of any model takes: from config, bandwidth and matmul rate alone."""

from dataclasses import dataclass
from math import prod

from tandem_engine.models.parameters import build_parameters
from tandem_engine.spec.model import ModelSpec


@dataclass(frozen=True, slots=True)
class StepFloor:
    """Two bytes a number; norms and biases are left out."""

    spec: ModelSpec
    shared: int
    """Weights that every token is multiplied with, without the head."""
    experts: int
    """Weights of all experts together, without the shared ones."""

    @property
    def head(self) -> int:
        """Weights of the output layer."""
        return self.spec.vocab_size * self.spec.hidden_size

    def weight_bytes(self, num_tokens: int) -> float:
        """Bytes of weights that a step reads when its tokens choose experts at random."""
        return 2 * (self.shared + self.head + self.experts * self._share_read(num_tokens))

    def operations(self, num_tokens: int, num_logits: int) -> float:
        """Multiplications and additions with weights."""
        used = self.shared + self.experts * self._share_read(1)
        return 2.0 * (used * num_tokens + self.head * num_logits)

    def _share_read(self, num_tokens: int) -> float:
        """Share of the experts that at least one token chooses."""
        moe = self.spec.moe
        return 1 - (1 - moe.top_k / moe.num_experts) ** num_tokens if moe else 0.0

    def kv_bytes(self, context: int) -> int:
        """Bytes of its cache that a sequence's decode step reads: per layer at most the window."""
        spec = self.spec
        width = 2 * spec.num_kv_heads * spec.head_dim if spec.latent is None else spec.latent.width
        seen = (min(context, layer.window or context) for layer in spec.layers)
        return 2 * width * sum(seen)

    def attention_operations(self, length: int) -> float:
        """Operations of one prompt: every query with the keys before it, or in its window."""
        spec, latent = self.spec, self.spec.latent
        sizes = 2 * spec.head_dim if latent is None else latent.query_dim + latent.value_dim
        pairs = 0.0
        for layer in spec.layers:
            window = min(length, layer.window or length)
            pairs += window * (length - window / 2)
        return 2.0 * sizes * spec.num_heads * pairs

    def decode_seconds(self, batch: int, context: int, copy: float, matmul: float) -> float:
        """Weights read or multiplied, whichever takes longer, and KV read."""
        weights = max(
            self.weight_bytes(batch) / copy,
            self.operations(batch, batch) / matmul,
        )
        return weights + batch * self.kv_bytes(context) / copy

    def prefill_operations(self, length: int) -> float:
        """Operations of one prompt, of which only the last token gets logits."""
        return self.operations(length, 1) + self.attention_operations(length)


def step_floor(spec: ModelSpec) -> StepFloor:
    """Count the weights of a model."""
    shared = experts = 0
    for parameter in build_parameters(spec):
        if len(parameter.shape) < 2 or parameter.name in ("embedding.weight", "head.weight"):
            continue
        if ".experts_" in parameter.name:
            experts += prod(parameter.shape)
        else:
            shared += prod(parameter.shape)
    return StepFloor(spec, shared, experts)
