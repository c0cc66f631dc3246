"""x Wᵀ for at most 128 rows: every weight is read once, in long pipelined strides along K.

cuBLAS picks tiles for large M and reaches 2.3–2.8 of 3.1 TB/s here. A program owns BLOCK_N output
columns and all of K, so nothing is reduced across programs and the result does not depend on a
schedule. With GATE it owns the same columns of the gate and the up half, and applies the
activation before it writes.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from tandem_kernels.activation.kernel import activate
from tandem_kernels.overlap import launch_options, prefetch_lines, wait_for_inputs
from tandem_kernels.tuning import tuned_gemm


@triton.jit
def prefetch_weights(
    weight, columns, N, K, GATE: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr
):  # fmt: skip
    """Ask for the first lines of these columns: weights are there before the inputs are."""
    if PDL:
        lines = tl.arange(0, PREFETCH) * 64
        ahead = weight + columns[:, None] * K + tl.minimum(lines, K - 1)[None, :]
        prefetch_lines(ahead)
        if GATE:
            prefetch_lines(ahead + N.to(tl.int64) * K)


@triton.jit(do_not_specialize=["M"])
def small_gemm_kernel(
    x,
    weight,
    bias,
    scale,
    out,
    M,
    N,
    K,
    stride_x,
    stride_out,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    GATE: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Program: BLOCK_N columns. columns past the end repeat the last."""
    rows = tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    read_columns = tl.minimum(columns, N - 1).to(tl.int64)
    steps = tl.arange(0, BLOCK_K)
    prefetch_weights(weight, read_columns, N, K, GATE, PDL, PREFETCH)
    wait_for_inputs(PDL)
    x_at = x + rows[:, None] * stride_x + steps[None, :]
    # Padding rows are not read: one row repeated would load a single slice of the L2.
    real = (rows < M)[:, None]
    w_at = weight + read_columns[:, None] * K + steps[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    other = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            a = tl.load(x_at + start, mask=real, other=0.0, eviction_policy="evict_last")
            w = tl.load(w_at + start, eviction_policy="evict_first")
        else:
            inside = (start + steps < K)[None, :]
            a = tl.load(x_at + start, mask=real & inside, other=0.0)
            w = tl.load(w_at + start, mask=inside, other=0.0)
        acc = tl.dot(a, tl.trans(w.to(a.dtype)), acc, input_precision="ieee")
        if GATE:
            up_at = w_at + N.to(tl.int64) * K + start
            if EVEN_K:
                u = tl.load(up_at, eviction_policy="evict_first")
            else:
                u = tl.load(up_at, mask=(start + steps < K)[None, :], other=0.0)
            other = tl.dot(a, tl.trans(u.to(a.dtype)), other, input_precision="ieee")
    if SCALE:
        acc = acc * tl.load(scale + read_columns)[None, :]
        if GATE:
            other = other * tl.load(scale + N + read_columns)[None, :]
    if BIAS:
        acc += tl.load(bias + read_columns).to(tl.float32)[None, :]
    if GATE:
        acc = activate(acc, GELU) * other
    at = out + rows[:, None] * stride_out + columns[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=real & (columns < N)[None, :])


@triton.jit
def gemv_kernel(
    x,
    weight,
    bias,
    scale,
    out,
    N,
    K,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    GATE: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """One row of x: products stay in registers and are summed once, at the end."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    read_columns = tl.minimum(columns, N - 1).to(tl.int64)
    steps = tl.arange(0, BLOCK_K)
    prefetch_weights(weight, read_columns, N, K, GATE, PDL, PREFETCH)
    wait_for_inputs(PDL)
    w_at = weight + read_columns[:, None] * K + steps[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    other = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            a = tl.load(x + start + steps, eviction_policy="evict_last").to(tl.float32)
            w = tl.load(w_at + start, eviction_policy="evict_first")
        else:
            inside = start + steps < K
            a = tl.load(x + start + steps, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(w_at + start, mask=inside[None, :], other=0.0)
        acc += w.to(tl.float32) * a[None, :]
        if GATE:
            up_at = w_at + N.to(tl.int64) * K + start
            if EVEN_K:
                u = tl.load(up_at, eviction_policy="evict_first")
            else:
                u = tl.load(up_at, mask=(start + steps < K)[None, :], other=0.0)
            other += u.to(tl.float32) * a[None, :]
    found = tl.sum(acc, axis=1)
    up = tl.sum(other, axis=1)
    if SCALE:
        found = found * tl.load(scale + read_columns)
        if GATE:
            up = up * tl.load(scale + N + read_columns)
    if BIAS:
        found += tl.load(bias + read_columns).to(tl.float32)
    if GATE:
        found = activate(found, GELU) * up
    tl.store(out + columns, found.to(out.dtype.element_ty), mask=columns < N)


@dataclass(frozen=True, slots=True)
class GemmTiles:
    """A configuration; block_m 0 is the kernel for one row."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    prefetch: int = 16
    """With overlap: 64-element pieces of each row to ask the L2 for while waiting; a power of 2."""


def default_tiles(rows: int, columns: int) -> GemmTiles:
    """What does well for most shapes where nothing was tuned."""
    if rows == 1:
        return GemmTiles(0, 8 if columns < 16_384 else 16, 512, 4, 2)
    wide = columns >= 16_384
    return GemmTiles(max(16, triton.next_power_of_2(rows)), 64 if wide else 32, 128, 4, 4)


def with_prefetch(tiles: GemmTiles, rows: int) -> GemmTiles:
    """With what does well for most shapes.

    Many rows leave the multiprocessors no time to ask for more than the next weights.
    """
    return replace(tiles, prefetch=8 if rows == 1 else 1)


def choose_tiles(rows: int, columns: int, size: int, gate: bool) -> GemmTiles | None:
    """The tuned configuration for x [rows, size] and `columns` outputs; None: cuBLAS is faster."""
    tuned = tuned_gemm(rows, columns, size, gate)
    if tuned is None:
        return default_tiles(rows, columns) if rows <= 64 else None
    if not tuned:
        return None
    tiles = GemmTiles(*tuned)
    return tiles if len(tuned) > 5 else with_prefetch(tiles, rows)


def small_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    gate: bool = False,
    gelu: bool = False,
    out: torch.Tensor | None = None,
    tiles: GemmTiles | None = None,
    overlap: bool = False,
) -> torch.Tensor:
    """x Wᵀ + b, or with `gate` act(x Gᵀ) · (x Uᵀ), for at most 128 rows; see the reference.

    Args:
        x: [..., K], K contiguous.
        weight: [N, K] contiguous ([2 N, K] with `gate`); with `scale` int8 or float8_e4m3fn.
        bias: [N], not with `gate`.
        out: [..., N], of x's dtype or float32, the dtype of the sums.
        overlap: start before the kernel that writes x has ended; see `overlap.py`.
    """
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    num_rows, columns = rows.shape[0], weight.shape[0] // (2 if gate else 1)
    assert num_rows <= 128
    assert weight.is_contiguous()
    assert not (gate and bias is not None)
    if out is None:
        out = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    outs = out.view(-1, columns)
    tiles = tiles or default_tiles(num_rows, columns)
    tensors = (
        rows,
        weight,
        weight if bias is None else bias,
        weight if scale is None else scale,
        outs,
    )
    options = {
        "BIAS": bias is not None,
        "SCALE": scale is not None,
        "GATE": gate,
        "GELU": gelu,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "EVEN_K": size % tiles.block_k == 0,
        "STAGES": tiles.stages,
        "PDL": overlap,
        "PREFETCH": tiles.prefetch,
        "num_warps": tiles.warps,
        **launch_options(overlap),
    }
    grid = (triton.cdiv(columns, tiles.block_n),)
    if tiles.block_m == 0:
        gemv_kernel[grid](*tensors, columns, size, **options)
    else:
        strides = (rows.stride(0), outs.stride(0))
        small_gemm_kernel[grid](
            *tensors, num_rows, columns, size, *strides, BLOCK_M=tiles.block_m, **options
        )
    return out
