"""Latent attention by the Triton kernels, on a GPU."""

from dataclasses import replace

import torch

from tandem_engine.attention.backend import StepTensors
from tandem_engine.attention.latent_torch import TorchLatentAttention
from tandem_engine.spec.model import ModelSpec
from tandem_kernels.attention.split_plan import DecodePlan
from tandem_kernels.mla.decode_kernel import make_mla_plan, paged_mla_decode
from tandem_kernels.overlap import is_supported


class TritonLatentAttention(TorchLatentAttention):
    """`TorchLatentAttention` with split-KV decoding over the pages themselves.

    A step's `decode_tables` and `decode_lengths` must be int32 views of long-lived buffers, and
    steps of one size must share them: a size's plan is made once, and CUDA graphs keep it.
    """

    def __init__(self, spec: ModelSpec, kv_cache: torch.Tensor) -> None:
        super().__init__(spec, kv_cache)
        self._num_heads = spec.num_heads
        self._programs = torch.cuda.get_device_properties(kv_cache.device).multi_processor_count
        self._overlap = is_supported()
        self._plans: dict[int, DecodePlan] = {}

    def plan(self, step: StepTensors) -> None:
        super().plan(step)
        count = step.num_decodes
        if not count:
            return
        if count not in self._plans:
            self._plans[count] = self._make_plan(step)
        self._plans[count].refill()

    def _make_plan(self, step: StepTensors) -> DecodePlan:
        """A plan whose partial results share memory with those of a larger one."""
        plan = make_mla_plan(
            step.decode_lengths,
            step.decode_tables,
            self._num_heads,
            self._latent.rank,
            programs=self._programs,
        )
        count = plan.units.shape[0]
        for other in self._plans.values():
            if other.units.shape[0] >= count:
                out, lse = other.partial_out[:count], other.partial_lse[:count]
                return replace(plan, partial_out=out, partial_lse=lse)
        return plan

    def _attend_latents(
        self,
        step: StepTensors,
        absorbed: torch.Tensor,
        rotated: torch.Tensor,
        cache: torch.Tensor,
    ) -> torch.Tensor:
        shape = absorbed.shape
        out = torch.empty(shape, dtype=absorbed.dtype, device=absorbed.device)
        plan = self._plans[shape[0]]
        return paged_mla_decode(
            absorbed, rotated, cache, plan, out, self._scale, overlap=self._overlap
        )
