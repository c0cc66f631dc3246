"""Made-up steps, and the abridged model that kernels are compiled with."""

from pathlib import Path

import pytest

from tandem_engine.config import WorkerConfig
from tandem_engine.load.runner import load_runner
from tandem_engine.models.decoder import Decoder
from tandem_engine.runner.probe_steps import small_batches, worst_batch
from tandem_engine.runner.torch_runner import TorchRunner
from tandem_engine.startup import Startup
from tandem_engine.tests.tiny_checkpoints import save_checkpoint


def load_decoder(family: str, directory: Path) -> Decoder:
    save_checkpoint(family, directory)
    config = WorkerConfig(model=f"file://{directory}", device="cpu", kv_memory_bytes=1 << 22)
    runner = load_runner(config, Startup())
    assert isinstance(runner, TorchRunner)
    return runner._model


@pytest.mark.parametrize(
    ("family", "kinds"), [("llama", 1), ("gemma3", 2), ("deepseek_v3", 2), ("qwen3_moe", 1)]
)
def test_an_abridged_model_has_a_layer_of_each_kind(
    family: str, kinds: int, tmp_path: Path
) -> None:
    whole = load_decoder(family, tmp_path)
    short = whole.abridged()
    numbers = [layer.number for layer in short.layers]
    assert len(numbers) == kinds < whole.spec.num_layers == len(whole.layers)
    assert numbers == sorted(numbers)
    assert numbers[-1] == whole.spec.num_layers - 1
    spec = whole.spec
    assert len({(spec.layers[n], spec.is_sparse(n)) for n in range(spec.num_layers)}) == kinds


def test_the_worst_step_is_as_large_as_allowed() -> None:
    for max_tokens, max_running, max_len in [(8192, 256, 4096), (64, 256, 8), (3, 1, 100)]:
        items = worst_batch(max_tokens, max_running, max_len).items
        assert max_tokens - 1 <= sum(len(item.tokens) for item in items) <= max_tokens
        assert all(len(item.tokens) <= max_len for item in items)
        assert sum(len(item.tokens) == 1 for item in items) <= max_running
        assert {item.params.logprobs for item in items} == {5}


def test_steps_to_compile_with_ask_for_no_logprobs() -> None:
    batches = [*small_batches(), worst_batch(64, 8, 100, logprobs=False)]
    assert {item.params.logprobs for batch in batches for item in batch.items} == {None}
    assert all(item.sample for batch in batches for item in batch.items)
