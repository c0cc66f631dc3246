"""Linear layers of 2 to 256 rows on Hopper with `hopper_kernel`."""

from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tandem_kernels import gluon
from tandem_kernels.launch import Launcher
from tandem_kernels.linear.hopper_kernel import hopper_gemm_kernel
from tandem_kernels.overlap import launch_options

MOST_ROWS: Final = 256
_MOST_PARTIAL: Final = 2 * 132 * 128 * 256
"""Numbers of all programs' slots: two accumulators each as large as the registers hold."""
_MOST_TILES: Final = 8192


@dataclass(frozen=True, slots=True)
class HopperTiles:
    """A configuration. `block_m` is the rows' number, rounded up to a power of 2 from 8."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    programs: int
    ahead: int = 0
    run: int = 4

    def fits(self, gate: bool) -> bool:
        """Whether shared memory holds the stages, registers the sums, and memory the parts."""
        halves = 2 if gate else 1
        stage = (self.block_m + self.block_n * halves) * self.block_k * 2
        sums = self.block_m * self.block_n * halves
        return (
            self.stages * stage <= 226_000
            and sums // (self.warps * 32) <= 128
            and 2 * self.programs * sums <= _MOST_PARTIAL
        )

    def registers(self, gate: bool) -> int:
        """Of each thread at its launch: no more than needed, so that the next kernel fits beside.

        The computing warps take over what the four beside the copying one leave.
        """
        sums = self.block_m * self.block_n * (2 if gate else 1) // (self.warps * 32)
        wanted = min(240, 2 * sums + 72)
        warps = self.warps + 4
        return -(-(wanted * self.warps + (40 if self.ahead else 24) * 4) // (warps * 8)) * 8


@cache
def _memory(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where programs leave parts and count them. Kernels that use it must follow one another."""
    partial = torch.empty(_MOST_PARTIAL, dtype=torch.float32, device=device)
    return partial, torch.zeros(_MOST_TILES, dtype=torch.int32, device=device)


def suits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `hopper_linear` can do it on this device."""
    return (
        x.is_cuda
        and gluon.IS_KNOWN
        and 1 < x.shape[0] <= MOST_ROWS
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype == x.dtype
        and x.shape[1] % 64 == 0
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
        and torch.cuda.get_device_capability(x.device)[0] == 9
    )


_launch = Launcher(hopper_gemm_kernel)


def hopper_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    gate: bool = False,
    gelu: bool = False,
    out: torch.Tensor | None = None,
    tiles: HopperTiles,
    overlap: bool = False,
) -> torch.Tensor:
    """As `kernel.small_linear` for x [M, K] and what `suits`; M is at most `tiles.block_m`."""
    num_rows, size = x.shape
    columns = weight.shape[0] // (2 if gate else 1)
    assert num_rows <= tiles.block_m
    assert weight.is_contiguous()
    assert not (gate and bias is not None)
    if out is None:
        out = torch.empty((num_rows, columns), dtype=x.dtype, device=x.device)
    layout = gl.NVMMASharedLayout(128, 16, 2)
    box, tile = [tiles.block_m, tiles.block_k], [tiles.block_n, tiles.block_k]
    chunks = triton.cdiv(size, tiles.block_k)
    num_tiles = triton.cdiv(columns, tiles.block_n)
    assert num_tiles <= _MOST_TILES
    total = num_tiles * chunks
    _launch(
        (min(tiles.programs, total), 1, 1),
        TensorDescriptor(x, [num_rows, size], [x.stride(0), 1], box, layout),
        TensorDescriptor(weight, [weight.shape[0], size], [size, 1], tile, layout),
        weight,
        weight if bias is None else bias,
        out,
        *_memory(x.device),
        num_rows,
        columns,
        size,
        chunks,
        total,
        out.stride(0),
        BIAS=bias is not None,
        GATE=gate,
        GELU=gelu,
        STAGES=tiles.stages,
        WARPS=tiles.warps,
        PDL=overlap,
        AHEAD=tiles.ahead,
        RUN=tiles.run,
        num_warps=tiles.warps,
        maxnreg=tiles.registers(gate),
        **launch_options(overlap),
    )
    return out
