"""Attention by the reference ops in torch: the CPU's backend, which all others must agree with."""

import torch

from tandem_engine.attention.backend import AttentionBackend, HeadNorms, StepTensors
from tandem_engine.spec.model import ModelSpec
from tandem_kernels.attention import decode_attention, extend_attention
from tandem_kernels.rope import rope_and_write


class TorchAttention(AttentionBackend):
    """Gathers pages by block table and calls torch's fused attention on them.

    Args:
        kv_cache: [layers, 2, N, K, P, D].
    """

    def __init__(self, spec: ModelSpec, kv_cache: torch.Tensor) -> None:
        self._spec = spec
        self._caches = [(layer[0], layer[1]) for layer in kv_cache]
        self._page = kv_cache.shape[4]
        self._windows = [layer.window for layer in spec.layers]
        self._step: StepTensors | None = None
        self._decode: dict[int | None, tuple[torch.Tensor, torch.Tensor]] = {}

    def plan(self, step: StepTensors) -> None:
        self._step = step
        if step.num_decodes:
            self._decode = {
                window: self._plan_decode(step, window) for window in set(self._windows)
            }

    def _plan_decode(
        self, step: StepTensors, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Block tables [B, M'] and mask [B, M' · P] of the pages that a window reaches."""
        tables, lengths = step.decode_tables, step.decode_lengths[:, None]
        width = tables.shape[1]
        first = torch.zeros_like(lengths)  # the first block within reach
        if window is not None:
            first = (lengths - window).clamp(min=0) // self._page
            reach = (window + self._page - 2) // self._page + 1
            if reach < width:
                # Past a short sequence's end the table repeats its last block; the mask hides it.
                columns = first + torch.arange(reach, device=tables.device)
                tables = tables.gather(1, columns.clamp(max=width - 1))
                width = reach
            else:
                first = torch.zeros_like(lengths)
        places = torch.arange(width * self._page, device=tables.device)
        positions = first * self._page + places
        mask = positions < lengths
        if window is not None:
            mask &= positions >= lengths - window
        return tables, mask

    def store(
        self,
        layer: int,
        qkv: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        norms: HeadNorms | None,
    ) -> torch.Tensor:
        step = self._step
        assert step is not None, "plan() comes before store()"
        return rotate_and_store(self._spec, qkv, angles, norms, self._caches[layer], step)

    def attend(
        self, layer: int, query: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        step = self._step
        assert step is not None, "plan() comes before attend()"
        keys, values = self._caches[layer]
        scale, softcap = self._spec.attention_scale, self._spec.attention_softcap
        window = self._windows[layer]
        outputs = []  # each [*, H, D]
        if step.num_decodes:
            tables, mask = self._decode[window]
            rows = query[: step.num_decodes]
            outputs.append(decode_attention(rows, keys, values, tables, mask, scale, softcap))
        for chunk, table in zip(step.chunks, step.chunk_tables, strict=True):
            rows = query[chunk.row : chunk.row + chunk.num_tokens]
            outputs.append(
                extend_attention(
                    rows,
                    keys,
                    values,
                    table,
                    chunk.start,
                    scale,
                    window,
                    softcap,
                )
            )
        return join_outputs(outputs, out)


def join_outputs(outputs: list[torch.Tensor], out: torch.Tensor | None) -> torch.Tensor:
    """Outputs [*, H, D] one after the other: attn_output [T, H · D], in `out` where it is given."""
    if out is not None and not outputs:
        return out
    attn_output = (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).flatten(1)
    if out is None:
        return attn_output
    out[: attn_output.shape[0]] = attn_output
    return out


def rotate_and_store(
    spec: ModelSpec,
    qkv: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    norms: HeadNorms | None,
    cache: tuple[torch.Tensor, torch.Tensor],
    step: StepTensors,
) -> torch.Tensor:
    """QKV [T, (H + 2 K) · D] → queries [T, H, D]. Keys and values go to `cache`, [N, K, P, D] each.

    Of the step only the slots are read.
    """
    slots = (step.slot_blocks, step.slot_offsets)
    weights = () if norms is None else (norms.query, norms.key, norms.epsilon, norms.in_float32)
    return rope_and_write(qkv, spec.num_heads, *angles, *cache, *slots, *weights)
