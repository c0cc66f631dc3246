"""Steps with prompts as CUDA graphs of what lies between the layers' attentions.

Attention itself depends on how many sequences there are and how long they are, and is launched as
ever; everything else depends on the number of tokens alone, and that is padded to a few sizes.
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
"""A step of fewer tokens takes as long: that of reading the weights."""
_STEP: Final = 128
"""cuBLAS computes tiles of 128 rows anyway."""


def count_weights(spec: ModelSpec, parameters: Parameters) -> int:
    """Weights of a layer, on average, that a token is multiplied with."""
    count = 0
    for name, parameter in parameters.items():
        if name.startswith("layers."):
            used = parameter.numel()
            if spec.moe is not None and ".experts_" in name:
                used = used * spec.moe.top_k // spec.moe.num_experts
            count += used
    return count // spec.num_layers


def most_rows(layer_weights: int, budget: int) -> int:
    """Tokens of the largest step that is worth it, of at most `budget`."""
    worth = -(-_HOST_BOUND // layer_weights // _STEP) * _STEP
    return min(worth, budget) // 16 * 16


def piece_sizes(most: int) -> list[int]:
    """Numbers of tokens that steps with prompts are padded to; none for `most` 0."""
    sizes = [_SMALLEST]
    size = _STEP
    while size < most:
        sizes.append(size)
        # An eighth of the power of two that is reached.
        size += max(_STEP, (1 << size.bit_length()) // 8)
    return [size for size in sizes if size < most] + ([most] if most else [])


class Graph(Protocol):
    """What was captured."""

    def replay(self) -> None:
        """Run it."""


class Recorder(Protocol):
    """Captures a function on a device: what to replay, and what the function returned."""

    def __call__(self, run: Callable[[], Any], /) -> tuple[Graph, Any]:
        """The function's results keep their addresses; replays write to them."""


class CudaRecorder:
    """Records CUDA graphs that share one memory pool. Nothing runs meanwhile."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._stream = torch.cuda.Stream()

    def __call__(self, run: Callable[[], Any]) -> tuple[Graph, Any]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # The hand-off's threads use the device meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                found = run()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph, found


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Of one padded size: each layer's graph up to its attention, and what that reads."""

    graphs: list[Graph]
    projected: list[Projected]
    angles: list[Angles]


class PieceGraphs:
    """Graphs by padded number of tokens, captured when first needed or all at once.

    What goes from one piece to the next is in tensors that all sizes share.

    Args:
        most: tokens of the largest step; 0 for none.
        record: how to capture.
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
        """What layers add to, [most, C], after `run` without what the last layer adds."""
        self.found = rows(first.output.weight.shape[1])
        """What a layer attended to, [most, H · D]: after `run` the last one."""
        self._products = tuple(rows(width) for width in first.attention.widths)
        self._pieces: dict[int, _Pieces] = {}

    def size_for(self, count: int) -> int | None:
        """The smallest padded size that holds `count` tokens, if there is one."""
        place = bisect_left(self.sizes, count)
        return self.sizes[place] if place < len(self.sizes) else None

    def run(self, step: StepTensors, count: int) -> None:
        """A step of one of `sizes`, up to the last layer's attention; see `found` and `residual`.

        Every step of one size must have its ids, positions and slots at the same addresses.

        Args:
            count: rows from here on are padding.
        """
        size = step.token_ids.shape[0]
        self._attention.plan(step)
        found = self.found[:size]
        # What no attention writes must stay finite: experts are chosen by it.
        found[count:].zero_()
        if size in self._pieces:
            self._replay(self._pieces[size], found)
        else:
            self._run(step, found)
            self._pieces[size] = self._capture(step)

    def clear(self) -> None:
        """Forget all graphs; those that are needed again are captured again."""
        self._pieces.clear()

    def _replay(self, pieces: _Pieces, found: torch.Tensor) -> None:
        layers = zip(self._model.layers, pieces.graphs, pieces.projected, strict=True)
        for layer, graph, projected in layers:
            graph.replay()
            layer.attend(projected, pieces.angles, self._attention, found)

    def _run(self, step: StepTensors, found: torch.Tensor) -> None:
        """Compiles and loads kernels, and has libraries make their workspaces."""
        angles, projected = self._enter(step)
        self._model.layers[0].attend(projected, angles, self._attention, found)
        for number, layer in enumerate(self._model.layers[1:], 1):
            projected = self._cross(number, found, angles)
            layer.attend(projected, angles, self._attention, found)

    def _capture(self, step: StepTensors) -> _Pieces:
        size = step.token_ids.shape[0]
        found = self.found[:size]
        graph, (angles, projected) = self._record(lambda: self._enter(step))
        pieces = _Pieces([graph], [projected], angles)
        for number in range(1, len(self._model.layers)):

            def cross(number: int = number) -> Projected:
                return self._cross(number, found, angles)

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

    def _cross(self, number: int, found: torch.Tensor, angles: list[Angles]) -> Projected:
        """From the attention of the layer before to the attention of layer `number`."""
        before = self._model.layers[number - 1]
        x = before.feed_forward(found, self.residual[: found.shape[0]])
        return self._project(number, x, angles)

    def _project(self, number: int, x: torch.Tensor, angles: list[Angles]) -> Projected:
        out = tuple(product[: x.shape[0]] for product in self._products)
        return self._model.layers[number].project(x, angles, self._attention, out)
