"""The GPU's runner: precision, graphs, batches, and a whole engine on it. Runs with `-m gpu`."""

from pathlib import Path
from typing import Any

import pytest

from tandem_engine.config import WorkerConfig
from tandem_engine.load.runner import load_runner
from tandem_engine.startup import Startup
from tandem_engine.step import Runner
from tandem_engine.tests.fleet import Fleet
from tandem_engine.tests.precision import Bfloat16Error
from tandem_engine.tests.step_driver import generate
from tandem_engine.tests.test_model_equality import NUM_TOKENS, make_prompt
from tandem_engine.tests.tiny_checkpoints import (
    FAMILIES,
    reference_tokens,
    save_checkpoint,
)

pytestmark = pytest.mark.gpu
KV_BYTES = 64 << 20
FILTERS: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}]
ADJUSTMENTS: list[dict[str, Any]] = [{}, {"presence_penalty": 0.7}, {"min_tokens": 20}]


def open_cuda(directory: Path, **flags: Any) -> Runner:
    flags.setdefault("dtype", "Float32")
    flags.setdefault("max_running", 64)
    flags.setdefault("kv_memory_bytes", KV_BYTES)
    config = WorkerConfig(model=f"file://{directory}", device="cuda", page_size=16, **flags)
    return load_runner(config, Startup())


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_exact_as_transformers(family: str, tmp_path: Path) -> None:
    bar = Bfloat16Error(save_checkpoint(family, tmp_path))
    for graphs in (True, False):
        runner = open_cuda(tmp_path, dtype="BFloat16", cuda_graphs=graphs)
        for chunk in (1000, 33):
            bar.check(runner, chunk)
        runner.close()


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_batches_of_1_to_64(graphs: bool, tmp_path: Path) -> None:
    model = save_checkpoint("qwen3", tmp_path)
    prompts = [make_prompt(1 + (n * 37) % 90, seed=n) for n in range(64)]
    expected = [reference_tokens(model, prompt, NUM_TOKENS) for prompt in prompts]
    runner = open_cuda(tmp_path, cuda_graphs=graphs)
    for batch in (1, 2, 3, 7, 8, 9, 33, 64):
        found = generate(runner, prompts[:batch], NUM_TOKENS, chunk=23, stagger=1)
        assert found == expected[:batch], batch
    runner.close()


@pytest.mark.parametrize("family", ["llama3", "gemma3", "qwen3_moe", "deepseek_v3"])
def test_prompts_of_1_to_1100(family: str, tmp_path: Path) -> None:
    """Padded steps of pieces, and steps too long for that; alone, and beside decodes."""
    model = save_checkpoint(family, tmp_path)
    lengths = [1, 2, 17, 64, 65, 128, 129, 300, 514, 1000, 1024, 1025, 1100]
    prompts = [make_prompt(length) for length in lengths]
    expected = [reference_tokens(model, prompt, NUM_TOKENS) for prompt in prompts]
    for graphs in (True, False):
        runner = open_cuda(tmp_path, cuda_graphs=graphs, max_running=16)
        assert [generate(runner, [prompt], NUM_TOKENS)[0] for prompt in prompts] == expected
        for chunk, stagger in ((1 << 30, 1), (1024, 0), (90, 2)):
            assert generate(runner, prompts, NUM_TOKENS, chunk, stagger) == expected
        runner.close()


def test_more_single_tokens_than_rows_for_decodes(tmp_path: Path) -> None:
    model = save_checkpoint("llama3", tmp_path)
    prompts = [make_prompt(1, seed=n) for n in range(20)]
    expected = [reference_tokens(model, prompt, NUM_TOKENS) for prompt in prompts]
    runner = open_cuda(tmp_path, max_running=8)
    assert generate(runner, prompts, NUM_TOKENS) == expected
    runner.close()


def test_a_whole_engine_with_hand_off(tmp_path: Path) -> None:
    """Two cores, more requests than places, preemption, and KV that moves between two caches.

    A prefill worker captures a graph when it first needs its size, with steps planned ahead.
    """
    model = save_checkpoint("llama3", tmp_path)
    prompts = [make_prompt(5 + (n * 53) % 120, seed=n) for n in range(40)]
    expected = [reference_tokens(model, prompt, 24) for prompt in prompts]

    def open_small(config: WorkerConfig) -> Runner:
        return load_runner(config, Startup())

    for peers, role in (((), "both"), (("b",), "both"), ((), "prefill")):
        fleet = Fleet(
            "a",
            "b",
            role=role,
            open_runner=open_small,
            model=f"file://{tmp_path}",
            device="cuda",
            dtype="Float32",
            page_size=16,
            max_running=24,
            max_waiting=64,
            max_batched_tokens=128,
            kv_memory_bytes=100 * 16 * 3 * 2 * 2 * 8 * 4,
            local_prefill_tokens=16,
        )
        for number, prompt in enumerate(prompts):
            params = {"max_tokens": 24, "ignore_eos": True}
            fleet["a"].submit(f"r{number}", prompt, peers=peers, params=params)
        fleet.settle(50_000)
        found = [fleet["a"].streams[f"r{number}"].tokens for number in range(len(prompts))]
        assert found == expected
        counters = fleet["a"].stats().counters
        assert counters["preemptions_total"] > 0
        assert bool(counters.get("transfers_total")) == bool(peers)
        for worker in fleet.workers.values():
            worker.runner.close()


def test_sampling_draws_what_the_cpu_draws(tmp_path: Path) -> None:
    save_checkpoint("llama3", tmp_path)
    prompts = [make_prompt(20 + n, seed=n) for n in range(12)]
    streams = []
    for device in ("cpu", "cuda"):
        fleet = Fleet(
            "a",
            open_runner=lambda config: load_runner(config, Startup()),
            model=f"file://{tmp_path}",
            device=device,
            dtype="Float32",
            page_size=16,
            kv_memory_bytes=KV_BYTES,
        )
        for number, prompt in enumerate(prompts):
            params: dict[str, Any] = {"max_tokens": 30, "temperature": 0.8, "seed": number}
            params |= FILTERS[number % len(FILTERS)] | ADJUSTMENTS[number % len(ADJUSTMENTS)]
            params |= {"logprobs": 3} if number % 5 == 0 else {}
            fleet["a"].submit(f"r{number}", prompt, params=params)
        fleet.settle(50_000)
        streams.append([fleet["a"].streams[f"r{n}"].tokens for n in range(len(prompts))])
        fleet["a"].runner.close()
    assert streams[0] == streams[1]
