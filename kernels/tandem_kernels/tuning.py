"""Configurations found by `tandem bench tune-…`, shipped as JSON; nothing is tuned at run time.

One file per device in `tuned/`, with the Triton version it was made with. Shapes that nobody tuned
get the kernels' defaults.
"""

import json
from functools import cache
from importlib import resources
from typing import Any, Final

import torch


def device_file(name: str) -> str:
    """File name for a device name as CUDA reports it."""
    return "".join(c if c.isalnum() else "_" for c in name.lower()) + ".json"


_NEAREST: Final = {(9, 0): "NVIDIA H100 80GB HBM3"}
"""Whose file serves other devices of a compute capability, for shapes that their own lacks."""


def _read(name: str) -> dict[str, Any]:
    path = resources.files("tandem_kernels") / "tuned" / device_file(name)
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@cache
def _shapes(op: str) -> dict[str, dict[str, Any]]:
    """By shape, what was tuned for an operation on the current device or the nearest to it."""
    if not torch.cuda.is_available():
        return {}
    nearest = _NEAREST.get(torch.cuda.get_device_capability())
    found: dict[str, dict[str, Any]] = {}
    for name in (nearest, torch.cuda.get_device_name()):
        if name is not None:
            found |= _read(name).get(op, {})
    return found


def tuned_gemm(rows: int, columns: int, size: int, gate: bool) -> list[int] | None:
    """The fields of GemmTiles for the nearest row count at or above, or None; prefetch may lack.

    An empty list says that cuBLAS was faster.
    """
    shapes = _shapes("gemm").get(f"{columns}x{size}" + (" gate" if gate else ""), {})
    for at in sorted(map(int, shapes)):
        if at >= rows:
            found: list[int] = shapes[str(at)]
            return found
    return None


def tuned_hopper_gemm(rows: int, columns: int, size: int) -> list[int] | None:
    """The fields of HopperTiles for the nearest row count at or above, or None.

    None, or an empty list in the file, says that `tuned_gemm` knows what is faster.
    """
    shapes = _shapes("hopper gemm").get(f"{columns}x{size}", {})
    at = next((at for at in sorted(map(int, shapes)) if at >= rows), None)
    return None if at is None else shapes[str(at)] or None


def tuned_decode(batch: int, num_heads: int, num_kv_heads: int, head_dim: int) -> list[int] | None:
    """[programs, stages, whether fused] of decode attention, nearest batch at or above, or None."""
    shapes = _shapes("decode attention").get(f"{num_heads}/{num_kv_heads}x{head_dim}", {})
    if not shapes:
        return None
    batches = sorted(map(int, shapes))
    found: list[int] = shapes[str(next((at for at in batches if at >= batch), batches[-1]))]
    return found


def tuned_moe(
    tokens: int, num_experts: int, top_k: int, intermediate: int, hidden: int
) -> dict[str, list[int]] | None:
    """The configuration of the nearest token count at or above (else the largest), or None.

    Keys: "vector" (the fields of VectorTiles) for one token, else "block_m", "gate_up" and "down"
    (the fields of ProductTiles).
    """
    shapes = _shapes("moe").get(f"{num_experts}x{intermediate}x{hidden} top {top_k}", {})
    if not shapes:
        return None
    counts = sorted(map(int, shapes))
    at = next((count for count in counts if count >= tokens), counts[-1])
    found: dict[str, list[int]] = shapes[str(at)]
    return found
