"""Steps with prompts as CUDA graphs of what lies between the layers' attentions.

Attention depends on how many sequences there are and how long they are, and is launched without a
graph. Everything else depends on the number of tokens alone, which is padded to a few sizes.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from tandem_engine.attention.backend import StepTensors
from tandem_engine.models.decoder import Decoder
from tandem_engine.models.layer_attention import Angles, Backend, Projected
from tandem_engine.models.layers import Parameters
from tandem_engine.spec.model import ModelSpec

log = logging.getLogger(__name__)

_HOST_BOUND: Final = 2 * 10**11
"""Tokens times weights of a layer up to which the host takes longer to launch a layer (0.85 ms on
the benchmarks' machine) than an H100 takes to compute it."""
_SMALLEST: Final = 64
"""Tokens. Fewer take just as long, which is the time to read the weights."""
ROW_TILE: Final = 128
"""Tokens between sizes: cuBLAS computes tiles of 128 rows anyway."""


def count_weights(spec: ModelSpec, parameters: Parameters) -> int:
    """Weights that a token is multiplied with in a layer, on average."""
    count = 0
    for name, parameter in parameters.items():
        if name.startswith("layers."):
            used = parameter.numel()
            if spec.moe is not None and ".experts_" in name:
                used = used * spec.moe.top_k // spec.moe.num_experts
            count += used
    return count // spec.num_layers


def most_rows(layer_weights: int, budget: int) -> int:
    """Tokens of the largest step for which graphs are worth it, at most `budget`."""
    worth = -(-_HOST_BOUND // layer_weights // ROW_TILE) * ROW_TILE
    return min(worth, budget) // 16 * 16


def piece_sizes(most: int) -> list[int]:
    """Numbers of tokens that steps with prompts are padded to, up to `most`; none if that is 0."""
    sizes = [_SMALLEST]
    size = ROW_TILE
    while size < most:
        sizes.append(size)
        # An eighth of the next power of two.
        size += max(ROW_TILE, (1 << size.bit_length()) // 8)
    return [size for size in sizes if size < most] + ([most] if most else [])


class Graph(Protocol):
    """A captured function."""

    def replay(self) -> None:
        """Run it again, on the same memory."""


class Recorder(Protocol):
    """Captures functions on a device."""

    def __call__(self, run: Callable[[], Any], /) -> tuple[Graph, Any]:
        """The graph, and what `run` returned: tensors that every replay writes to."""


class CudaRecorder:
    """Records CUDA graphs that share one memory pool. Recording runs nothing."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._stream = torch.cuda.Stream()

    def __call__(self, run: Callable[[], Any]) -> tuple[Graph, Any]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # The hand-off's threads use the device at the same time.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                found = run()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph, found


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Of one padded size: each layer's graph up to its attention, and what attention reads."""

    graphs: list[Graph]
    projected: list[Projected]
    angles: list[Angles]


class PieceGraphs:
    """Graphs by padded number of tokens, captured when first needed or all at once.

    What passes from one piece to the next is in tensors that all sizes share.

    Args:
        most: tokens of the largest step; 0: there are no graphs.
        record: captures a piece.
    """

    def __init__(self, model: Decoder, attention: Backend, most: int, record: Recorder) -> None:
        self.sizes = piece_sizes(most)
        self._model = model
        self._attention = attention
        self._record = record
        device, first = model.embedding.weight.device, model.layers[0]

        def rows(width: int, dtype: torch.dtype = model.dtype) -> torch.Tensor:
            return torch.zeros((most, width), dtype=dtype, device=device)

        self.residual = rows(model.spec.hidden_size, model.residual_dtype)
        """The sum that layers add to, [most, C]: after `run` without the last layer's part."""
        self.attn_output = rows(first.output.weight.shape[1])
        """A layer's attention, [most, H · D]: after `run` that of the last layer."""
        self._products = tuple(rows(width) for width in first.attention.widths)
        self._pieces: dict[int, _Pieces] = {}

    def size_for(self, count: int) -> int | None:
        """The smallest padded size that holds `count` tokens, if there is one."""
        place = bisect_left(self.sizes, count)
        return self.sizes[place] if place < len(self.sizes) else None

    def run(self, step: StepTensors, count: int) -> None:
        """A step of one of `sizes` up to the last layer's attention: `attn_output`, `residual`.

        Every step of one size must have its ids, positions and slots at the same addresses.

        Args:
            count: rows from here on are padding.
        """
        size = step.token_ids.shape[0]
        self._attention.plan(step)
        attn_output = self.attn_output[:size]
        # Attention leaves the padding alone, which must stay finite: experts are chosen by it.
        attn_output[count:].zero_()
        if size in self._pieces:
            self._replay(self._pieces[size], attn_output)
        else:
            self._run(step, attn_output)
            self._pieces[size] = self._capture(step)

    def clear(self) -> None:
        """Forget all graphs; a size that is needed again is captured again."""
        self._pieces.clear()

    def _replay(self, pieces: _Pieces, attn_output: torch.Tensor) -> None:
        layers = zip(self._model.layers, pieces.graphs, pieces.projected, strict=True)
        for layer, graph, projected in layers:
            graph.replay()
            layer.attend(projected, pieces.angles, self._attention, attn_output)

    def _run(self, step: StepTensors, attn_output: torch.Tensor) -> None:
        """The step without graphs, in which kernels are loaded and libraries make workspaces."""
        angles, projected = self._enter(step)
        self._model.layers[0].attend(projected, angles, self._attention, attn_output)
        for number, layer in enumerate(self._model.layers[1:], 1):
            projected = self._cross(number, attn_output, angles)
            layer.attend(projected, angles, self._attention, attn_output)

    def _capture(self, step: StepTensors) -> _Pieces:
        size = step.token_ids.shape[0]
        attn_output = self.attn_output[:size]
        graph, (angles, projected) = self._record(lambda: self._enter(step))
        pieces = _Pieces([graph], [projected], angles)
        for number in range(1, len(self._model.layers)):

            def cross(number: int = number) -> Projected:
                return self._cross(number, attn_output, angles)

            graph, projected = self._record(cross)
            pieces.graphs.append(graph)
            pieces.projected.append(projected)
        log.debug("captured the pieces of steps of %d tokens", size)
        return pieces

    def _enter(self, step: StepTensors) -> tuple[list[Angles], Projected]:
        """The first piece: up to the first layer's attention."""
        size = step.token_ids.shape[0]
        made, angles = self._model.enter(step.token_ids, step.positions)
        residual = self.residual[:size].copy_(made)
        return angles, self._project(0, self._model.start(residual), angles)

    def _cross(self, number: int, attn_output: torch.Tensor, angles: list[Angles]) -> Projected:
        """From the attention of the layer before to the attention of layer `number`."""
        before = self._model.layers[number - 1]
        x = before.feed_forward(attn_output, self.residual[: attn_output.shape[0]])
        return self._project(number, x, angles)

    def _project(self, number: int, x: torch.Tensor, angles: list[Angles]) -> Projected:
        out = tuple(product[: x.shape[0]] for product in self._products)
        return self._model.layers[number].project(x, angles, self._attention, out)
