"""Norm, activation, and rotation with the KV write as shares of copy bandwidth."""

import torch

from tandem_bench.gpu.device import Ceilings
from tandem_bench.gpu.lines import Line
from tandem_bench.gpu.timing import check, seconds_per_call
from tandem_kernels.activation import kernel as activation
from tandem_kernels.activation import reference as activation_reference
from tandem_kernels.norm import kernel as norm
from tandem_kernels.norm import reference as norm_reference
from tandem_kernels.rope import kernel as rope
from tandem_kernels.rope import reference as rope_reference


def run_norm(rows: int, size: int, ceilings: Ceilings) -> list[Line]:
    """x and the residual read, both written."""
    x = torch.randn(rows, size, device="cuda", dtype=torch.bfloat16)
    residual, out = torch.randn_like(x), torch.full_like(x, float("nan"))
    weight = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    kept = residual.clone()
    norm.add_rms_norm(x, residual, weight, 1e-6, out=out)
    expected = norm_reference.add_rms_norm(x, kept, weight, 1e-6)
    error = check("add_rms_norm", out, expected, 1e-2)
    calls = [lambda: norm.add_rms_norm(x, residual, weight, 1e-6, out=out)]
    seconds = seconds_per_call(calls * 5)
    name = f"add_rms_norm {rows} x {size}"
    return [Line(name, seconds, 4 * x.nbytes / ceilings.copy, error)]


def run_activation(rows: int, size: int, ceilings: Ceilings) -> list[Line]:
    """[rows, 2 size] read, [rows, size] written."""
    x = torch.randn(rows, 2 * size, device="cuda", dtype=torch.bfloat16)
    expected = activation_reference.silu_and_multiply(x.float())
    lines = []
    for block in (1024, 2048, 4096):
        out = torch.full((rows, size), float("nan"), device="cuda", dtype=torch.bfloat16)
        activation.silu_and_multiply(x, out, block)
        error = check("silu_and_multiply", out, expected, 1e-2)

        def call(out: torch.Tensor = out, block: int = block) -> torch.Tensor:
            return activation.silu_and_multiply(x, out, block)

        seconds = seconds_per_call([call] * 5)
        name = f"silu_and_multiply {rows} x {size}"
        lines.append(Line(name, seconds, 1.5 * x.nbytes / ceilings.copy, error, f"block {block}"))
    return lines


def run_rope(num_tokens: int, ceilings: Ceilings, qk_norm: bool = False) -> list[Line]:
    """Llama's heads: QKV read, queries and pages written, angles read."""
    heads, kv_heads, dim, page = 32, 8, 128, 64
    qkv = torch.randn(num_tokens, (heads + 2 * kv_heads) * dim, device="cuda", dtype=torch.bfloat16)
    angles = torch.rand(num_tokens, dim // 2, device="cuda") * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    num_blocks = -(-num_tokens // page)
    order = torch.randperm(num_blocks, device="cuda")
    positions = torch.arange(num_tokens, device="cuda")
    blocks, offsets = order[positions // page], positions % page
    caches = torch.full(
        (2, 2, num_blocks, kv_heads, page, dim), float("nan"), device="cuda", dtype=torch.bfloat16
    )
    weight = torch.randn(dim, device="cuda", dtype=torch.bfloat16) if qk_norm else None
    out = torch.full((num_tokens, heads, dim), float("nan"), device="cuda", dtype=torch.bfloat16)
    expected = rope_reference.rope_and_write(
        qkv, heads, cos, sin, caches[1, 0], caches[1, 1], blocks, offsets, weight, weight
    )
    moved = 2 * qkv.nbytes + cos.nbytes + sin.nbytes
    lines = []
    for block_heads in (8, 16, 32):

        def call(block_heads: int = block_heads) -> torch.Tensor:
            return rope.rope_and_write(
                qkv, heads, cos, sin, caches[0, 0], caches[0, 1], blocks, offsets, weight, weight,
                out=out, block_heads=block_heads,
            )  # fmt: skip

        error = check("rope_and_write", call(), expected, 1e-2)
        check("rope_and_write pages", caches[0].nan_to_num(), caches[1].nan_to_num(), 1e-2)
        seconds = seconds_per_call([call] * 5)
        name = f"rope_and_write {num_tokens}" + (" with QK norm" if qk_norm else "")
        floor = moved / ceilings.copy
        lines.append(Line(name, seconds, floor, error, f"block_heads {block_heads}"))
    return lines
