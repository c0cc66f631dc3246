"""Greedy tokens equal those of transformers in float32, however prompts are cut and batched."""

import random
from pathlib import Path

import pytest

from tandem_engine.config import Device, WorkerConfig
from tandem_engine.load.runner import load_runner
from tandem_engine.startup import Startup
from tandem_engine.step import Batch, Runner
from tandem_engine.tests.step_driver import Blocks, Request, generate, run_sequences
from tandem_engine.tests.tiny_checkpoints import (
    FAMILIES,
    VOCAB,
    reference_tokens,
    save_checkpoint,
)

PAGE = 16
NUM_TOKENS = 12


def make_prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed * 10_007 + length).choices(range(3, VOCAB), k=length)


def open_runner(directory: Path, device: Device, page_size: int = PAGE) -> Runner:
    config = WorkerConfig(
        model=f"file://{directory}",
        device=device,
        dtype="Float32",
        page_size=page_size,
        max_running=16,
        kv_memory_bytes=32 << 20,
        cache_dir=str(directory / "cache"),
    )
    return load_runner(config, Startup())


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family: str, tmp_path: Path, device: Device) -> None:
    model = save_checkpoint(family, tmp_path)
    lengths = [1, 2, 3, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 41, 67, 100, 129, 200]
    prompts = [make_prompt(length) for length in lengths]
    expected = [reference_tokens(model, prompt, NUM_TOKENS) for prompt in prompts]
    assert len({token for tokens in expected for token in tokens}) > 20, "the model is degenerate"
    runner = open_runner(tmp_path, device)
    assert [generate(runner, [prompt], NUM_TOKENS)[0] for prompt in prompts] == expected
    for chunk, stagger in ((1 << 30, 0), (PAGE, 1), (7, 2), (50, 1)):
        assert generate(runner, prompts, NUM_TOKENS, chunk, stagger) == expected
    runner.close()


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
def test_batches_of_mixed_lengths(batch: int, tmp_path: Path, device: Device) -> None:
    model = save_checkpoint("gemma3", tmp_path)
    prompts = [make_prompt(1 + (n * 37) % 150, seed=n) for n in range(batch)]
    expected = [reference_tokens(model, prompt, NUM_TOKENS) for prompt in prompts]
    runner = open_runner(tmp_path, device)
    assert generate(runner, prompts, NUM_TOKENS, chunk=23, stagger=1) == expected
    runner.close()


@pytest.mark.parametrize("page_size", [1, 8, 64])
def test_page_sizes(page_size: int, tmp_path: Path, device: Device) -> None:
    model = save_checkpoint("mistral", tmp_path)
    prompts = [make_prompt(length) for length in (5, 64, 90)]
    expected = [reference_tokens(model, prompt, NUM_TOKENS) for prompt in prompts]
    runner = open_runner(tmp_path, device, page_size)
    assert generate(runner, prompts, NUM_TOKENS, chunk=33) == expected
    runner.close()


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3"])
def test_a_cached_prefix_and_a_copied_block_give_the_same_tokens(
    family: str, tmp_path: Path, device: Device
) -> None:
    model = save_checkpoint(family, tmp_path)
    shared = make_prompt(3 * PAGE + 5)
    runner = open_runner(tmp_path, device)
    blocks = Blocks(runner, PAGE)
    first = Request(shared, blocks.take(len(shared) + NUM_TOKENS))
    run_sequences(runner, [first], NUM_TOKENS, chunk=20)
    prompts = [shared + make_prompt(length, seed=length) for length in (1, 9, 40)]
    requests = []
    for prompt in prompts:
        own = blocks.take(len(prompt) + NUM_TOKENS - 3 * PAGE)
        # Three whole blocks are shared; the partial fourth is copied before it is written to.
        runner.execute(Batch([], copies=[(first.blocks[3], own[0])]))
        table = first.blocks[:3] + own
        requests.append(Request(prompt, table, num_computed=len(shared)))
    found = run_sequences(runner, requests, NUM_TOKENS, chunk=16, stagger=1)
    assert found == [reference_tokens(model, prompt, NUM_TOKENS) for prompt in prompts]
    runner.close()


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v2"])
def test_kv_pages_that_moved_to_another_runner_continue_there(
    family: str, tmp_path: Path, device: Device
) -> None:
    model = save_checkpoint(family, tmp_path)
    prompt = make_prompt(70)
    prefill, decode = open_runner(tmp_path, device), open_runner(tmp_path, device)
    source = Request(prompt, Blocks(prefill, PAGE, seed=1).take(len(prompt)))
    first = run_sequences(prefill, [source], 1, chunk=32)[0]
    target = Request(prompt, Blocks(decode, PAGE, seed=2).take(len(prompt) + NUM_TOKENS))
    for layers in (range(0, 2), range(2, 3)):
        packed = prefill.kv.export_blocks(source.blocks, layers)
        destination = target.blocks[: len(source.blocks)]
        decode.kv.import_blocks(destination, layers, memoryview(packed))
    target.outputs, target.num_computed = list(first), len(prompt)
    found = run_sequences(decode, [target], NUM_TOKENS, chunk=32)[0]
    assert found == reference_tokens(model, prompt, NUM_TOKENS)
    prefill.close()
    decode.close()
