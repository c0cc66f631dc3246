"""x Wᵀ for few rows on Hopper, in Gluon: one wave of programs that all read the same amount.

The operands are swapped: in the tensor cores' products a tile of W is on the left and x on the
right, so that few rows of x are little work. The tiles' K is cut into pieces of BLOCK_K, the pieces
of all tiles are lined up, and each program takes one run of them (stream-K, Osama et al., 2023).
The partial sums of a tile's programs go through memory: the last program to arrive adds them up in
the order of K, so the result does not depend on which one was last.

One warp makes the copy engine fill a ring of stages. Weights don't depend on the kernel before, so
with PDL the ring is already full of them when x is there.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@gluon.jit
def _produce(
    x, weight, xs, ws, ready, free, begin, end, chunks,
    BLOCK_K: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """The copying warp: pieces [begin, end) of weights and rows of x."""
    stage_bytes: gl.constexpr = BLOCK_K * (BLOCK_N + x.block_shape[0]) * 2
    for ahead in gl.static_range(STAGES):
        unit = begin + ahead
        real = unit < end
        column = unit // chunks * BLOCK_N
        k = unit % chunks * BLOCK_K
        bar = ready.index(ahead)
        mbarrier.expect(bar, stage_bytes, pred=real)
        tma.async_copy_global_to_shared(weight, [column, k], bar, ws.index(ahead), pred=real)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for ahead in gl.static_range(STAGES):
        unit = begin + ahead
        tma.async_copy_global_to_shared(
            x, [0, unit % chunks * BLOCK_K], ready.index(ahead), xs.index(ahead), pred=unit < end
        )
    for unit in range(begin + STAGES, end):
        count = unit - begin
        stage = count % STAGES
        column = unit // chunks * BLOCK_N
        k = unit % chunks * BLOCK_K
        bar = ready.index(stage)
        mbarrier.wait(free.index(stage), (count // STAGES + 1) & 1)
        mbarrier.expect(bar, stage_bytes)
        tma.async_copy_global_to_shared(weight, [column, k], bar, ws.index(stage))
        tma.async_copy_global_to_shared(x, [0, k], bar, xs.index(stage))


@gluon.jit
def _multiply(
    xs, ws, ready, free, count, pieces,
    STAGES: gl.constexpr,
    FOUND: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_M: gl.constexpr,
):  # fmt: skip
    """Sums over `pieces` stages, the first of which is the ring's `count`-th."""
    acc = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, FOUND)
    for piece in range(pieces):
        at = count + piece
        stage = at % STAGES
        mbarrier.wait(ready.index(stage), (at // STAGES) & 1)
        acc = warpgroup_mma(ws.index(stage), xs.index(stage).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        # The products of the stage before have ended.
        mbarrier.arrive(free.index((at + STAGES - 1) % STAGES), count=1, pred=piece > 0)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(free.index((count + pieces - 1) % STAGES), count=1)
    return acc


@gluon.jit
def _sum_parts(cells, first, last, SIZE: gl.constexpr):
    """What programs `first` to `last` have left of one tile, in that order."""
    acc = gl.load(cells + (first * 2 + 1) * SIZE, cache_modifier=".cg")
    for each in range(first + 1, last + 1):
        acc += gl.load(cells + each * 2 * SIZE, cache_modifier=".cg")
    return acc


@gluon.jit
def _consume(
    xs, ws, ready, free, begin, end, total, chunks, bias, out, partial, arrivals, M, N, stride_out,
    BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """The computing warps: tile after tile of the run, of which both ends may be parts."""
    FOUND: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    SIZE: gl.constexpr = BLOCK_N * BLOCK_M
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    places = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, FOUND))
    rows = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, FOUND))
    cells = partial + (places[:, None] * BLOCK_M + rows[None, :])
    if PDL:
        gdc_wait()
    unit = begin
    while unit < end:
        tile = unit // chunks
        stop = gl.minimum(end, (tile + 1) * chunks)
        acc = _multiply(
            xs, ws, ready, free, unit - begin, stop - unit, STAGES, FOUND, BLOCK_N, BLOCK_M
        )
        finishes = True
        if stop - unit < chunks:
            # A program's first piece may be a tile's end, its last a tile's beginning.
            slot = program * 2 + gl.where(unit == tile * chunks, 1, 0)
            gl.store(cells + slot * SIZE, acc)
            # The barrier orders every thread's stores before the one thread's release.
            gl.thread_barrier()
            arrived = gl.atomic_add(arrivals + tile, 1, sem="acq_rel")
            first = ((tile * chunks + 1) * programs - 1) // total
            last = ((tile + 1) * chunks * programs - 1) // total
            finishes = arrived == last - first
            if finishes:
                gl.store(arrivals + tile, 0)
                if last - first == 1:
                    # Of two, either order gives the same: add what the other one has left.
                    slot = gl.where(unit == tile * chunks, last * 2, first * 2 + 1)
                    acc += gl.load(cells + slot * SIZE, cache_modifier=".cg")
                else:
                    acc = _sum_parts(cells, first, last, SIZE)
        if finishes:
            columns = tile * BLOCK_N + places
            if BIAS:
                inside = columns < N
                acc += gl.load(bias + columns, mask=inside, other=0.0).to(gl.float32)[:, None]
            at = out + rows[None, :] * stride_out + columns[:, None]
            real = (rows < M)[None, :] & (columns < N)[:, None]
            gl.store(at, acc.to(out.dtype.element_ty), mask=real)
        unit = stop


@gluon.jit(do_not_specialize=["M", "N", "chunks", "total", "stride_out"])
def hopper_gemm_kernel(
    x,
    weight,
    bias,
    out,
    partial,
    arrivals,
    M,
    N,
    chunks,
    total,
    stride_out,
    BIAS: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    PDL: gl.constexpr,
):
    """A program takes an equal run of the `total` = tiles · `chunks` pieces, at least one.

    Args:
        x: descriptor of rows [M, K] in boxes [BLOCK_M, BLOCK_K]; rows past the end become zeros.
        weight: descriptor of rows [N, K] in boxes [BLOCK_N, BLOCK_K].
        partial: float32, two slots of a tile for each program.
        arrivals: [tiles] int32, zero, and left so.
    """
    BLOCK_M: gl.constexpr = x.block_shape[0]
    BLOCK_N: gl.constexpr = weight.block_shape[0]
    BLOCK_K: gl.constexpr = weight.block_shape[1]
    xs = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, BLOCK_K], x.layout)
    ws = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_N, BLOCK_K], weight.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    begin = gl.program_id(0) * total // gl.num_programs(0)
    end = (gl.program_id(0) + 1) * total // gl.num_programs(0)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    xs, ws, ready, free, begin, end, total, chunks, bias, out, partial, arrivals,
                    M, N, stride_out, BIAS, BLOCK_M, BLOCK_N, STAGES, WARPS, PDL,
                ),
            ),
            (
                _produce,
                (
                    x, weight, xs, ws, ready, free, begin, end, chunks, BLOCK_K, BLOCK_N, STAGES,
                    PDL,
                ),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip
