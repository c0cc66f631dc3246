"""Two and four ranks on as many GPUs: precision, graphs, batches, pages, and a whole engine.

Runs with `-m gpu` where there are two GPUs; some tests need four.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem_engine.config import WorkerConfig
from tandem_engine.load.runner import load_runner
from tandem_engine.startup import Startup
from tandem_engine.step import Runner
from tandem_engine.tests import killed_rank
from tandem_engine.tests.fleet import Fleet
from tandem_engine.tests.precision import Bfloat16Error
from tandem_engine.tests.step_driver import generate, move_prompt
from tandem_engine.tests.test_cuda_runner import KV_BYTES
from tandem_engine.tests.test_model_equality import NUM_TOKENS, make_prompt
from tandem_engine.tests.tiny_checkpoints import reference_tokens, save_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
PAGE = 16
LENGTHS = [1, 2, PAGE, 41, 67, 100, 129]


@contextmanager
def opened(directory: Path, ranks: int = 2, **flags: Any) -> Iterator[Runner]:
    flags = {"dtype": "Float32", "max_running": 64, "kv_memory_bytes": KV_BYTES, **flags}
    config = WorkerConfig(
        model=f"file://{directory}",
        device="cuda",
        page_size=PAGE,
        tensor_parallel=ranks,
        max_model_len=1024,
        **flags,
    )
    runner = load_runner(config, Startup())
    try:
        yield runner
    finally:
        runner.close()


@pytest.mark.parametrize(
    "family", ["llama3", "qwen2", "qwen3", "gemma3", "qwen3_moe", "deepseek_v3"]
)
def test_two_ranks_give_transformers_tokens(family: str, tmp_path: Path) -> None:
    model = save_checkpoint(family, tmp_path)
    prompts = [make_prompt(length) for length in LENGTHS]
    expected = [reference_tokens(model, prompt, NUM_TOKENS) for prompt in prompts]
    with opened(tmp_path, max_running=8) as runner:
        for chunk, stagger in ((1 << 30, 0), (7, 2)):
            assert generate(runner, prompts, NUM_TOKENS, chunk, stagger) == expected


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_batches_of_1_to_64(graphs: bool, tmp_path: Path) -> None:
    model = save_checkpoint("qwen3", tmp_path)
    prompts = [make_prompt(1 + (n * 37) % 90, seed=n) for n in range(64)]
    expected = [reference_tokens(model, prompt, NUM_TOKENS) for prompt in prompts]
    with opened(tmp_path, cuda_graphs=graphs) as runner:
        for batch in (1, 2, 7, 9, 33, 64):
            found = generate(runner, prompts[:batch], NUM_TOKENS, chunk=23, stagger=1)
            assert found == expected[:batch], batch


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_bfloat16_is_as_exact_as_transformers(family: str, tmp_path: Path) -> None:
    bar = Bfloat16Error(save_checkpoint(family, tmp_path))
    with opened(tmp_path, dtype="BFloat16", max_running=4) as runner:
        for chunk in (1000, 33):
            bar.check(runner, chunk)


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_pages_move_between_workers_of_one_and_two_ranks(family: str, tmp_path: Path) -> None:
    model = save_checkpoint(family, tmp_path)
    prompt = make_prompt(70)
    expected = reference_tokens(model, prompt, NUM_TOKENS)
    with opened(tmp_path, max_running=4) as two, opened(tmp_path, 1, max_running=4) as one:
        assert two.kv.layout == one.kv.layout
        for source, target in ((two, one), (one, two)):
            assert move_prompt(source, target, prompt, NUM_TOKENS) == expected


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")
@pytest.mark.parametrize("family", ["llama_eight", "qwen3_moe_eight"])
def test_four_ranks_of_which_two_share_a_head(family: str, tmp_path: Path) -> None:
    model = save_checkpoint(family, tmp_path)
    prompts = [make_prompt(length) for length in LENGTHS]
    expected = [reference_tokens(model, prompt, NUM_TOKENS) for prompt in prompts]
    with opened(tmp_path, 4, max_running=8) as four:
        for chunk, stagger in ((1 << 30, 0), (7, 2)):
            assert generate(four, prompts, NUM_TOKENS, chunk, stagger) == expected
        with opened(tmp_path, 1, max_running=8) as one:
            for source, target in ((four, one), (one, four)):
                assert move_prompt(source, target, prompts[-1], NUM_TOKENS) == expected[-1]


def test_a_whole_engine(tmp_path: Path) -> None:
    """Steps planned ahead, preemption, and one GPU that samples for both."""
    model = save_checkpoint("llama3", tmp_path)
    prompts = [make_prompt(5 + (n * 53) % 120, seed=n) for n in range(40)]
    expected = [reference_tokens(model, prompt, 24) for prompt in prompts]
    streams: list[list[list[int]]] = []
    for ranks in (2, 1):
        fleet = Fleet(
            "a",
            open_runner=lambda config: load_runner(config, Startup()),
            model=f"file://{tmp_path}",
            device="cuda",
            dtype="Float32",
            page_size=PAGE,
            max_running=24,
            max_waiting=128,
            max_batched_tokens=128,
            kv_memory_bytes=100 * 16 * 3 * 2 * 2 * 8 * 4,
            tensor_parallel=ranks,
        )
        for number, prompt in enumerate(prompts):
            greedy = {"max_tokens": 24, "ignore_eos": True}
            fleet["a"].submit(f"r{number}", prompt, params=greedy)
            drawn = {"max_tokens": 24, "temperature": 0.8, "seed": number, "top_p": 0.9}
            fleet["a"].submit(f"s{number}", prompt, params=drawn)
        fleet.settle(50_000)
        found = {
            kind: [fleet["a"].streams[f"{kind}{n}"].tokens for n in range(40)] for kind in "rs"
        }
        assert found["r"] == expected
        assert fleet["a"].stats().counters["preemptions_total"] > 0
        streams.append(found["s"])
        fleet["a"].runner.close()
    assert streams[0] == streams[1]


def test_a_killed_rank_doesn_t_hold_the_other_up(tmp_path: Path) -> None:
    """Sums and NCCL kernels that wait for a killed rank end with the runner, and so does Python."""
    save_checkpoint("llama3", tmp_path)
    command = [sys.executable, "-m", killed_rank.__name__, str(tmp_path)]
    # Not `run` with a pipe, which would wait for the child's rank too if the child is killed.
    with (tmp_path / "log").open("w+") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            code = child.wait(killed_rank.SECONDS + 5)
        except subprocess.TimeoutExpired:
            child.kill()
            code = child.wait()
        log.seek(0)
        found = log.read()
    assert code == 0, found
    assert "closed\n" in found, found
