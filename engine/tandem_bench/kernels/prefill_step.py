"""A whole prefill of one prompt in chunks, with random weights, against the matmul rate."""

from dataclasses import replace
from functools import partial

import torch
from torch.nn import functional

from tandem_bench.gpu.device import Ceilings
from tandem_bench.gpu.lines import Line
from tandem_bench.gpu.timing import check, seconds_eager
from tandem_bench.kernels.decode_step import EPSILON, Shape, Weights
from tandem_kernels.activation import kernel as activation
from tandem_kernels.attention import extend_attention
from tandem_kernels.norm import kernel as norm
from tandem_kernels.rope import kernel as rope

PAGE = 64


def prefill(shape: Shape, weights: Weights, tokens: torch.Tensor, chunk: int) -> torch.Tensor:
    """Logits [1, V] of the token after the prompt."""
    length = tokens.shape[0]
    num_blocks = -(-length // PAGE)
    cache = torch.empty(
        shape.layers, 2, num_blocks, shape.kv_heads, PAGE, shape.dim,
        device="cuda", dtype=torch.bfloat16,
    )  # fmt: skip
    table = torch.arange(num_blocks, device="cuda").flip(0).contiguous()
    positions = torch.arange(length, device="cuda")
    inverse = 500000.0 ** -(torch.arange(0, shape.dim, 2, device="cuda") / shape.dim)
    angles = positions[:, None] * inverse
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    blocks, offsets = table[positions // PAGE], positions % PAGE
    residual = tokens.new_empty(0)
    for start in range(0, length, chunk):
        some = slice(start, min(start + chunk, length))
        residual = functional.embedding(tokens[some], weights.embedding)
        x = norm.rms_norm(residual, weights.norms[0], EPSILON)
        for layer in range(shape.layers):
            keys, values = cache[layer]
            qkv = functional.linear(x, weights.qkv[layer], weights.qkv_bias[layer])
            query = rope.rope_and_write(
                qkv, shape.heads, cos[some], sin[some], keys, values, blocks[some], offsets[some],
                weights.query_norms[layer], weights.key_norms[layer], EPSILON,
            )  # fmt: skip
            found = extend_attention(query, keys, values, table, start, shape.dim**-0.5)
            x = functional.linear(found.flatten(1), weights.output[layer])
            x = norm.add_rms_norm(x, residual, weights.norms[2 * layer + 1], EPSILON, out=x)
            gate_up = functional.linear(x, weights.gate_up[layer])
            x = functional.linear(activation.silu_and_multiply(gate_up), weights.down[layer])
            x = norm.add_rms_norm(x, residual, weights.norms[2 * layer + 2], EPSILON, out=x)
        residual = x
    return functional.linear(residual[-1:], weights.head)


def check_prefill(shape: Shape) -> float:
    """The largest relative error between chunk sizes, over two layers of the shape."""
    small = replace(shape, layers=2)
    weights = Weights(small)
    tokens = torch.randint(small.vocab, (3000,), device="cuda")
    whole = prefill(small, weights, tokens, 4096)
    return max(
        check(f"chunks of {chunk}", prefill(small, weights, tokens, chunk), whole, 2e-2)
        for chunk in (100, 700, 1024)
    )


def prefill_line(
    shape: Shape, weights: Weights, case: tuple[int, int], ceilings: Ceilings, error: float
) -> Line:
    """The time of one (prompt, chunk) beside that of its multiplications at the matmul rate."""
    length, chunk = case
    tokens = torch.randint(shape.vocab, (length,), device="cuda")
    prefill(shape, weights, tokens, chunk)
    seconds = seconds_eager(partial(prefill, shape, weights, tokens, chunk), 3)
    torch.cuda.empty_cache()
    flops = 2 * (shape.weight_elements - shape.vocab * shape.hidden) * length
    flops += 2 * shape.layers * shape.heads * shape.dim * length**2
    note = f"{flops / seconds / 1e12:.0f} TFLOP/s"
    name = f"prefill {length} in chunks of {chunk}"
    return Line(name, seconds, flops / ceilings.matmul, error, note)
