"""KV pages gathered and scattered in one launch for all layers of a group."""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_moved"])
def move_pages_kernel(
    cache,
    packed,
    blocks,
    num_moved,
    stride_side,
    stride_block,
    first_head_offset,
    run,
    PACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (piece of a run, block, layer and side); a run is a block's heads, contiguous."""
    moved = tl.program_id(1)
    side = tl.program_id(2).to(tl.int64)
    block = tl.load(blocks + moved).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < run
    page = cache + side * stride_side + block * stride_block + first_head_offset + at
    place = packed + (side * num_moved + moved) * run + at
    if PACK:
        tl.store(place, tl.load(page, mask=inside), mask=inside)
    else:
        tl.store(page, tl.load(place, mask=inside), mask=inside)


def _move(
    cache: torch.Tensor,
    packed: torch.Tensor,
    blocks: torch.Tensor,
    layers: range,
    heads: range,
    pack_pages: bool,
    piece: int,
) -> None:
    _, planes, _, _, page, dim = cache.shape
    assert cache.is_contiguous()
    assert packed.is_contiguous()
    some, run = cache[layers.start : layers.stop], len(heads) * page * dim
    block = min(piece, triton.next_power_of_2(run))
    if blocks.numel():
        move_pages_kernel[(triton.cdiv(run, block), blocks.shape[0], planes * len(layers))](
            some,
            packed,
            blocks,
            blocks.shape[0],
            cache.stride(1),
            cache.stride(2),
            heads.start * page * dim,
            run,
            PACK=pack_pages,
            BLOCK=block,
            num_warps=8,
        )


def pack(
    cache: torch.Tensor,
    blocks: torch.Tensor,
    layers: range,
    heads: range | None = None,
    out: torch.Tensor | None = None,
    *,
    piece: int = 2048,
) -> torch.Tensor:
    """What `reference.pack` computes, for a contiguous `cache` and at most 65,535 blocks."""
    heads = range(cache.shape[3]) if heads is None else heads
    shape = (len(layers), cache.shape[1], blocks.shape[0], len(heads), *cache.shape[4:])
    if out is None:
        out = torch.empty(shape, dtype=cache.dtype, device=cache.device)
    assert out.shape == shape
    _move(cache, out, blocks, layers, heads, True, piece)
    return out


def unpack(
    packed: torch.Tensor,
    cache: torch.Tensor,
    blocks: torch.Tensor,
    layers: range,
    heads: range | None = None,
    *,
    piece: int = 2048,
) -> None:
    """What `reference.unpack` does, for contiguous tensors and at most 65,535 blocks."""
    heads = range(cache.shape[3]) if heads is None else heads
    _move(cache, packed, blocks, layers, heads, False, piece)
