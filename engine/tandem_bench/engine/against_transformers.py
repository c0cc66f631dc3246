"""Tokens per second of the runner and of transformers, alternating in one run on the CPU.

Both run Gemma 3 270M in float32 on the same dequantised weights and the same number of threads
(`TANDEM_NUM_THREADS`, default: all). Each figure is the best of several rounds, which is what the
machine can do when its other tenants let it. Tokens are compared before anything is timed. Needs a
checkout: the reference belongs to the engine's tests, which a wheel leaves out.
"""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from tandem_bench.errors import CheckFailedError
from tandem_bench.options import option
from tandem_engine.config import WorkerConfig
from tandem_engine.load.runner import load_runner
from tandem_engine.startup import Startup
from tandem_engine.step import Runner
from tandem_engine.tests.real_gemma import MODEL, prompt_of, transformers_gemma
from tandem_engine.tests.step_driver import Blocks, Request, generate, run_sequences

STEPS = 8
CASES = ((64, 1), (64, 8), (512, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Tokens per second of the runner and of transformers, alternating in one run on the CPU."""

    rounds: int = option(5, "Rounds of each case; the best counts.", minimum=1)


def time_runner(runner: Runner, length: int, batch: int) -> tuple[float, float]:
    """Seconds of the prefill, and of one decode step."""
    blocks = Blocks(runner, runner.kv.layout.page_size)
    prompts = [prompt_of(length, start=number) for number in range(batch)]
    requests = [Request(prompt, blocks.take(length + STEPS + 1)) for prompt in prompts]
    start = time.perf_counter()
    run_sequences(runner, requests, 1, chunk=1 << 30)
    middle = time.perf_counter()
    run_sequences(runner, requests, 1 + STEPS, chunk=1 << 30)
    return middle - start, (time.perf_counter() - middle) / STEPS


@torch.inference_mode()
def time_transformers(model: PreTrainedModel, length: int, batch: int) -> tuple[float, float]:
    """Seconds of the prefill and of one decode step, with its own cache and no loop around it."""
    ids = torch.tensor([prompt_of(length, start=number) for number in range(batch)])
    start = time.perf_counter()
    found = model(ids, use_cache=True, logits_to_keep=1)
    middle = time.perf_counter()
    for _ in range(STEPS):
        tokens = found.logits[:, -1].argmax(-1)[:, None]
        found = model(tokens, past_key_values=found.past_key_values, logits_to_keep=1)
    return middle - start, (time.perf_counter() - middle) / STEPS


def best_of(
    measure: Callable[[], tuple[float, float]], best: tuple[float, float]
) -> tuple[float, float]:
    prefill, decode = measure()
    return min(best[0], prefill), min(best[1], decode)


def run(options: Options) -> None:
    """Compare tokens, then time both by turns."""
    began = time.perf_counter()
    config = WorkerConfig(model=MODEL, kv_memory_bytes=512 << 20)
    runner = load_runner(config, Startup())
    print(f"loaded in {time.perf_counter() - began:.1f} s")
    model = transformers_gemma()
    prompt = prompt_of(40)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
    if generate(runner, [prompt], 8)[0] != expected[0, 40:].tolist():
        raise CheckFailedError("the runner's tokens differ from those of transformers")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, ", end="")
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, ", end="")
    print(f"torch {torch.__version__}, transformers {transformers_version}")
    for length, batch in CASES:
        ours, theirs = (float("inf"),) * 2, (float("inf"),) * 2
        for _ in range(options.rounds):
            ours = best_of(partial(time_runner, runner, length, batch), ours)
            theirs = best_of(partial(time_transformers, model, length, batch), theirs)
        for kind, index, tokens in (("prefill", 0, length * batch), ("decode", 1, batch)):
            ratio = theirs[index] / ours[index]
            print(
                f"{kind:8} prompt {length:4} batch {batch}: {tokens / ours[index]:7.1f} tokens/s,"
                f" transformers {tokens / theirs[index]:7.1f}, ratio {ratio:.2f}"
            )
    runner.close()
