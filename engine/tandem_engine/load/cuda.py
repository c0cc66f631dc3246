"""A rank on a GPU: kernels are compiled, memory is measured, and graphs are captured.

The KV cache takes what `--gpu-memory-percent` leaves, which a probe finds out: a runner with one
block and no graphs.
"""

from dataclasses import replace
from pathlib import Path

import torch
from triton import knobs

from tandem_engine.config import WorkerConfig
from tandem_engine.load.compiler import check_compiler
from tandem_engine.load.context import LoadContext
from tandem_engine.runner.cuda_runner import CudaOptions, CudaRunner
from tandem_engine.runner.device_kv import DeviceKVStore
from tandem_engine.runner.memory_profile import MemoryPlan, measure_memory
from tandem_engine.runner.piece_graphs import count_weights, most_rows
from tandem_engine.runner.probe_steps import prompt_batches, small_batches, worst_batch


def load_cuda(context: LoadContext) -> CudaRunner:
    """The runner that a context describes.

    Raises:
        ModelSourceError: damaged, incomplete or unsupported files.
        ConfigError: the GPU's memory doesn't hold what was asked for, or nothing can compile the
            kernels.
    """
    check_compiler(Path(knobs.cache.dir))
    config, progress, layout = context.config, context.progress, context.kv_layout
    parameters = context.load_parameters()
    options = CudaOptions(
        eos_token_ids=context.facts.eos_token_ids,
        max_model_len=config.max_model_len or context.spec.max_position,
        max_running=config.max_running,
        prompt_rows=context.collective.least(_count_prompt_rows(context, parameters)),
        graphs=False,
    )

    def make(num_blocks: int, options: CudaOptions) -> CudaRunner:
        kv = DeviceKVStore(
            layout, num_blocks, context.dtype, context.device, shared=_is_shared(config)
        )
        return CudaRunner(context.spec, parameters, kv, options, context.collective)

    probe = make(1, options)
    progress("compile", 0.0)
    _compile_kernels(probe, config)
    progress("profile", 0.0)
    plan = measure_memory(
        probe,
        percent=config.gpu_memory_percent,
        max_tokens=config.max_batched_tokens,
        graphs=config.cuda_graphs,
    )
    del probe
    num_blocks = _count_blocks(context, plan)
    flag = "--kv-memory" if config.kv_memory_bytes else "--gpu-memory-percent"
    longest = context.fit_length(num_blocks, flag)
    torch.cuda.empty_cache()
    runner = make(num_blocks, replace(options, max_model_len=longest, graphs=config.cuda_graphs))
    _capture_graphs(runner, context)
    return runner


def _is_shared(config: WorkerConfig) -> bool:
    """Whether a worker of this host may write its pages into our cache."""
    wanted = config.transfer in ("Auto", "CudaIpc")
    return wanted and bool(config.shm_dir) and config.tensor_parallel == 1


def _count_prompt_rows(context: LoadContext, parameters: dict[str, torch.Tensor]) -> int:
    """Tokens of the largest step with prompts that is made of graphs."""
    if not context.config.cuda_graphs:
        return 0
    weights = count_weights(context.spec, parameters)
    return most_rows(weights, context.config.max_batched_tokens)


def _compile_kernels(probe: CudaRunner, config: WorkerConfig) -> None:
    longest = probe.max_model_len
    worst = worst_batch(config.max_batched_tokens, config.max_running, longest, logprobs=False)
    # A mixture's kernels differ by the number of tokens.
    sizes = probe.prompt_sizes if probe.spec.moe is not None else []
    # The worst step takes the kernels that take longest to compile: they come first.
    probe.compile_steps([worst, *small_batches(), *prompt_batches(sizes)])


def _count_blocks(context: LoadContext, plan: MemoryPlan) -> int:
    """Blocks of the KV cache: the same number on every rank.

    Raises:
        ConfigError: the GPU's memory doesn't hold what was asked for.
    """
    config, layout = context.config, context.kv_layout
    wanted = config.kv_memory_bytes // config.tensor_parallel  # of each rank
    least = layout.block_bytes * max(1, -(-config.max_model_len // layout.page_size))
    plan.check(max(least, wanted))
    return context.collective.least((wanted or plan.kv) // layout.block_bytes)


def _capture_graphs(runner: CudaRunner, context: LoadContext) -> None:
    progress = context.progress
    progress("graphs", 0.0)
    runner.capture_pieces()
    if context.config.role != "prefill":
        # A prefill worker decodes rarely, if ever: it captures what it needs when it does.
        runner.capture_graphs(lambda fraction: progress("graphs", fraction))
