"""Linear layers of few rows on Hopper with `hopper_kernel`."""

from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tandem_kernels.launch import KNOWS_GLUON, Launcher
from tandem_kernels.linear.hopper_kernel import hopper_gemm_kernel
from tandem_kernels.overlap import launch_options

_MOST_PARTIAL: Final = 2 * 132 * 64 * 128
_MOST_TILES: Final = 8192


@dataclass(frozen=True, slots=True)
class HopperTiles:
    """A configuration; `block_m` is a power of 2, at least 8 and at least the number of rows."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    programs: int

    def fits(self) -> bool:
        """Whether the stages fit shared memory, the sums the registers, the parts their memory."""
        sums = self.block_m * self.block_n
        return (
            self.block_n % (16 * self.warps) == 0
            and self.stages * (self.block_m + self.block_n) * self.block_k * 2 <= 226_000
            and sums // (self.warps * 32) <= 128
            and 2 * self.programs * sums <= _MOST_PARTIAL
        )

    def registers(self) -> int:
        """The registers of each thread at launch: few, so that the next kernel fits beside it.

        The computing warps take over the registers that the four warps of the copying one give up.
        """
        wanted = min(240, 2 * self.block_m * self.block_n // (self.warps * 32) + 72)
        return -(-(wanted * self.warps + 24 * 4) // ((self.warps + 4) * 8)) * 8


@cache
def _memory(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The memory in which programs leave parts and count them: 8.7 MB.

    All launches share it, so on one device they must be in one stream, or wait for each other.
    Overlap does no harm: no program touches it before earlier launches have ended.
    """
    partial = torch.empty(_MOST_PARTIAL, dtype=torch.float32, device=device)
    return partial, torch.zeros(_MOST_TILES, dtype=torch.int32, device=device)


def suits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `hopper_linear` can be used on this device."""
    return (
        x.is_cuda
        and KNOWS_GLUON
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
    out: torch.Tensor | None = None,
    tiles: HopperTiles,
    overlap: bool = False,
) -> torch.Tensor:
    """x Wᵀ + b, for tensors that `suits` accepts.

    The first call on a device must not be inside a CUDA graph: it allocates memory that stays.

    Args:
        x: [M, K], K contiguous.
        weight: [N, K] contiguous.
        bias: [N].
        out: [M, N], N contiguous, in x's dtype or in float32, which is the dtype of the sums.
        overlap: start before the kernel that writes x has ended, as `overlap.py` explains.
    """
    num_rows, size = x.shape
    columns = weight.shape[0]
    assert num_rows <= tiles.block_m
    assert tiles.fits()
    assert weight.is_contiguous()
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
        TensorDescriptor(weight, [columns, size], [size, 1], tile, layout),
        weight if bias is None else bias,
        out,
        *_memory(x.device),
        num_rows,
        columns,
        chunks,
        total,
        out.stride(0),
        BIAS=bias is not None,
        STAGES=tiles.stages,
        WARPS=tiles.warps,
        PDL=overlap,
        num_warps=tiles.warps,
        maxnreg=tiles.registers(),
        **launch_options(overlap),
    )
    return out
