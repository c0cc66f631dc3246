"""The CPU's runner: one forward pass per step."""

from collections.abc import Sequence

import torch

from tandem_engine.attention.latent_torch import TorchLatentAttention
from tandem_engine.attention.torch_backend import TorchAttention
from tandem_engine.device import upload
from tandem_engine.models.collective import ALONE, Collective
from tandem_engine.models.decoder import Decoder
from tandem_engine.models.layer_attention import Backend
from tandem_engine.runner.host_kv import HostKVStore
from tandem_engine.runner.step_input import build_step
from tandem_engine.sampling.prompt_scores import flat_rows, score_prompts
from tandem_engine.sampling.sampler import Sampler
from tandem_engine.spec.model import ModelSpec
from tandem_engine.step import Batch, Runner, SampledTokens


class TorchRunner(Runner):
    """Runs a decoder over paged KV, one step at a time.

    Args:
        parameters: by the names of `models/parameters.py`; never written to.
        kv: owned by the runner from here on.
        collective: owned by the runner too. Every rank is given the same batches; the first one
            samples, and the others have no results.
    """

    kv: HostKVStore

    def __init__(
        self,
        spec: ModelSpec,
        parameters: dict[str, torch.Tensor],
        kv: HostKVStore,
        *,
        eos_token_ids: Sequence[int],
        max_model_len: int,
        collective: Collective = ALONE,
    ) -> None:
        self.vocab_size = spec.vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self.max_model_len = max_model_len
        self.num_blocks = kv.cache.shape[2]
        self.kv = kv
        self._collective = collective
        self._model = Decoder(spec, parameters, collective)
        backend = TorchAttention if spec.latent is None else TorchLatentAttention
        self._attention: Backend = backend(spec, kv.cache)
        self._sampler = Sampler(self.eos_token_ids)
        self._device = kv.cache.device

    @torch.inference_mode()
    def execute(self, batch: Batch) -> list[SampledTokens | None]:
        for source, destination in batch.copies:
            self.kv.copy_block(source, destination)
        results: list[SampledTokens | None] = [None] * len(batch.items)
        if not batch.items:
            return results
        step = build_step(batch.items, self.kv.layout.page_size, self._device)
        sampled = [index for index, item in enumerate(batch.items) if item.sample]
        wanted = [step.last_rows[index] for index in sampled]
        if batch.scored:
            wanted += flat_rows(batch, step.last_rows)
        rows = upload(wanted, torch.int64, self._device)
        hidden = self._model.forward(step.tensors, self._attention, rows)  # [R, C]
        if sampled:
            logits = self._model.logits(hidden[: len(sampled)])  # [R, V]
            if self._collective.is_first:
                tokens = self._sampler.sample(logits, [batch.items[index] for index in sampled])
                for index, token in zip(sampled, tokens, strict=True):
                    results[index] = token
        if batch.scored:
            is_first = self._collective.is_first
            scores = score_prompts(
                self._model.logits, hidden[len(sampled) :], batch, is_first=is_first
            )
            if scores is not None:
                scores.put_into(results, batch)
        return results

    def close(self) -> None:
        self._collective.close()

    def abandon(self) -> None:
        self._collective.abort()
