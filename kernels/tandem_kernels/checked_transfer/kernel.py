"""KV pages packed or unpacked with their checksum, in one pass over the bytes.

The words that are moved are the words that are summed: what a checksum vouches for is what went
into the packed piece, or into the cache. Values are those of `checksum` over the packed words.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from tandem_kernels.checksum.kernel import mixed
from tandem_kernels.checksum.reference import signed


@triton.jit(do_not_specialize=["num_moved", "seed_low", "seed_high"])
def move_checked_kernel(
    cache,
    packed,
    blocks,
    parts,
    num_moved,
    stride_side,
    stride_block,
    run,
    seed_low,
    seed_high,
    PACK: tl.constexpr,
    CHECK: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (block, layer and side); a run is a block's heads as words of 64 bits, contiguous."""
    moved = tl.program_id(0)
    side = tl.program_id(1).to(tl.int64)
    page = cache + side * stride_side + tl.load(blocks + moved).to(tl.int64) * stride_block
    first = (side * num_moved + moved) * run
    seed = (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)
    total = tl.zeros([BLOCK], dtype=tl.int64)
    for piece in range(PIECES):
        at = piece * BLOCK + tl.arange(0, BLOCK)
        inside = at < run
        if PACK:
            word = tl.load(page + at, mask=inside, other=0)
            tl.store(packed + first + at, word, mask=inside)
        else:
            word = tl.load(packed + first + at, mask=inside, other=0)
            tl.store(page + at, word, mask=inside)
        if CHECK:
            total += tl.where(inside, mixed(word, first + at, seed), 0)
    if CHECK:
        tl.store(parts + side * num_moved + moved, tl.sum(total, axis=0))


class CheckedMover:
    """Packs and unpacks pages of one cache by one launch, and with little work of the host.

    Triton's own way to a launch takes 150 to 400 microseconds in a thread that has slept, and so do
    torch's streams and copies around it: as long as 300 MB take on an H200. So compiled code is
    found by a short key, and the stream is named. Used by any thread, with the device set.
    """

    def __init__(self, cache: torch.Tensor, piece: int = 4096) -> None:
        """`cache`: contiguous, pages of a multiple of 8 bytes. `piece`: words moved at a time."""
        assert cache.is_contiguous()
        num_layers, self._planes, num_blocks = cache.shape[:3]
        words = cache.view(-1).view(torch.int64).view(num_layers, self._planes, num_blocks, -1)
        self.page_words = words.shape[3]
        self._layers = [words[layer:] for layer in range(num_layers)]
        block = min(piece, triton.next_power_of_2(self.page_words))
        self._numbers = words.stride(1), words.stride(2), self.page_words
        self._constants = triton.cdiv(self.page_words, block), block
        self._known: dict[tuple[Any, ...], Any] = {}

    def prepare(self) -> None:
        """Compile what `move` launches, on a page that is packed and put back unchanged."""
        device = self._layers[0].device
        packed = torch.empty(self._planes * self.page_words, dtype=torch.int64, device=device)
        blocks = torch.zeros(1, dtype=torch.int64, device=device)
        parts = torch.empty(self._planes, dtype=torch.int64, device=device)
        for seed in (None, 0):
            for pack in (True, False):
                self.move(packed, blocks, 1, range(1), parts, seed, pack=pack)

    def num_parts(self, num_blocks: int, layers: range) -> int:
        """The number of the checksum's parts: one for each page."""
        return self._planes * len(layers) * num_blocks

    def move(
        self,
        packed: torch.Tensor,
        blocks: torch.Tensor,
        num_blocks: int,
        layers: range,
        parts: torch.Tensor,
        seed: int | None,
        *,
        pack: bool,
        stream: int | None = None,
    ) -> None:
        """Launch; in the current stream, or in one of this address.

        Args:
            packed: [words or more] int64.
            blocks: [num_blocks or more] int64, on the device or in pinned memory of the host.
            parts: [num_parts or more] int64, likewise; not written without a seed.
            layers: with K and V apart, at most 65,535 layers and planes.
        """
        if not num_blocks:
            return
        grid = num_blocks, self._planes * len(layers), 1
        tensors = self._layers[layers.start], packed, blocks, parts
        constants = pack, seed is not None, *self._constants
        numbers = num_blocks, *self._numbers, *_halves(seed or 0)
        key = (*constants, *[tensor.data_ptr() % 16 for tensor in tensors])
        code = self._known.get(key)
        if code is not None:
            code[grid](*tensors, *numbers, *constants, stream=stream)
            return
        names = dict(zip(("PACK", "CHECK", "PIECES", "BLOCK"), constants, strict=True))
        with _in_stream(stream):
            code = move_checked_kernel[grid](*tensors, *numbers, **names, num_warps=16)
        if isinstance(move_checked_kernel, triton.runtime.JITFunction):  # not when interpreted
            self._known[key] = code


def _halves(seed: int) -> tuple[int, int]:
    """Lower and upper half, each with a sign: code for one seed then takes every other one.

    Triton gives a number the type of its value, and compiled code refuses a larger one.
    """
    value = signed(seed)
    low = value & 0xFFFFFFFF
    return low - ((low >> 31) << 32), value >> 32


def _in_stream(stream: int | None) -> AbstractContextManager[Any]:
    if stream is None:
        return nullcontext()
    return torch.cuda.stream(torch.cuda.ExternalStream(stream))
