"""Making a runner from a worker's configuration. Imports torch only when called."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from tandem_engine.config import WorkerConfig
from tandem_engine.errors import ConfigError
from tandem_engine.startup import Startup
from tandem_engine.step import Runner
from tandem_wire.disk_cache import default_cache_dir
from tandem_wire.handoff import KVLayout
from tandem_wire.model_config import ModelFacts, read_model_facts
from tandem_wire.model_source import ModelFiles, resolve_model

if TYPE_CHECKING:
    import torch

    from tandem_engine.models.collective import Collective
    from tandem_engine.parallel.group import RankGroup
    from tandem_engine.runner.cuda_runner import CudaRunner
    from tandem_engine.spec.model import ModelSpec

_HOST_KV_BYTES: Final = 2 * 2**30
_DTYPES: Final = {"BFloat16": "bfloat16", "Float16": "float16", "Float32": "float32"}


def load_runner(
    config: WorkerConfig, progress: Startup, fail: Callable[[str], None] | None = None
) -> Runner:
    """Find the model's files, load its weights and make the KV cache.

    With `tensor_parallel` > 1 this process becomes the first rank and starts the others. `fail` is
    called when one of them dies and no call of the runner can say so; the default ends the process.

    Raises:
        ModelSourceError: the model can't be had (with a remedy).
        ConfigError: the configuration doesn't fit the model or the machine.
        RankDiedError: a rank couldn't start.
    """
    if config.tensor_parallel > 1:
        runner = _load_parallel(config, progress, fail)
    else:
        runner = load_rank(config, progress)
    progress("ready", 1.0)
    return runner


def load_rank(config: WorkerConfig, progress: Startup, rank: int = 0, store: str = "") -> Runner:
    """One rank's runner; `store` is the file by which ranks find each other. See `load_runner`."""
    files = _find_files(config, progress)
    facts = read_model_facts(files.path)
    progress("torch", 0.0)
    _limit_threads(config.tensor_parallel)
    return _load_torch(config, files, facts, progress, rank, store)


def _find_files(config: WorkerConfig, progress: Startup) -> ModelFiles:
    progress("model files", 0.0)
    return resolve_model(
        config.model,
        revision=config.revision,
        weights=config.format != "Dummy",
        cache_dir=_cache_dir(config),
        progress=lambda fraction: progress("model files", fraction),
    )


def _cache_dir(config: WorkerConfig) -> Path:
    return Path(config.cache_dir) if config.cache_dir else default_cache_dir()


def _load_parallel(
    config: WorkerConfig, progress: Startup, fail: Callable[[str], None] | None
) -> Runner:
    """The runner of all ranks."""
    from tandem_engine.parallel.group import RankGroup

    facts = read_model_facts(_find_files(config, progress).path)
    # What is to be downloaded is there now. The others import torch while this process does.
    group = RankGroup(config, fail)
    inner: Runner | None = None
    try:
        inner = load_rank(config, progress, 0, group.store)
        group.wait_ready(inner.num_blocks)
        return _join(config, facts, inner, group)
    except Exception as error:
        cause = group.cause_of(error)
        group.close(grace_seconds=0.0)
        if inner is not None:
            inner.abandon()
        raise cause from error


def _join(config: WorkerConfig, facts: ModelFacts, inner: Runner, group: "RankGroup") -> Runner:
    from tandem_engine.models.shard import Shard
    from tandem_engine.parallel.kv_store import ParallelKVStore, StepCount
    from tandem_engine.parallel.runner import ParallelRunner
    from tandem_engine.spec.families import build_spec

    spec, ranks = build_spec(facts), config.tensor_parallel
    heads = [Shard(rank, ranks).kv_heads(spec.num_kv_heads) for rank in range(ranks)]
    layout = msgspec.structs.replace(inner.kv.layout, num_kv_heads=spec.num_kv_heads)
    steps = StepCount()
    kv = ParallelKVStore(inner.kv, layout, heads, group, steps)
    return ParallelRunner(inner, kv, group, steps)


def _limit_threads(num_ranks: int) -> None:
    """Threads that wait should sleep: workers share cores, and a spinning one slows the others.

    Ranks share the cores that the worker has.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    threads = os.environ.get("TANDEM_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS")
    cores = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    torch.set_num_threads(int(threads) if threads else cores)


def _load_torch(
    config: WorkerConfig,
    files: ModelFiles,
    facts: ModelFacts,
    progress: Startup,
    rank: int,
    store: str,
) -> Runner:
    import torch

    from tandem_engine.models.collective import join_group
    from tandem_engine.models.shard import Shard, shard_spec
    from tandem_engine.spec.families import build_spec
    from tandem_engine.weights.loading import WeightFiles, load_parameters

    shard = Shard(rank, config.tensor_parallel)
    device = _choose_device(config, rank)
    default = "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, _DTYPES.get(config.dtype, default))
    whole = build_spec(facts)
    _check_length(config, whole)
    spec = shard_spec(whole, shard)
    weights = WeightFiles(files.path, _weight_format(config, files))

    def load() -> dict[str, torch.Tensor]:
        progress("weights", 0.0)
        parameters = load_parameters(
            whole,
            weights,
            dtype,
            _cache_dir(config),
            lambda fraction: progress("weights", fraction),
            device=device,
            shard=shard,
        )
        # What is mapped on the CPU hasn't been read yet.
        progress.count_weights(sum(x.nbytes for x in parameters.values() if not x.is_cpu))
        return parameters

    if device.type == "cuda":
        torch.cuda.set_device(device)
    collective = join_group(shard, store, device, whole.hidden_size, dtype)
    try:
        if device.type == "cuda":
            return _load_cuda(config, spec, facts, dtype, device, load(), progress, collective)
        return _load_host(config, spec, facts, dtype, load, progress, collective)
    except BaseException:
        if rank == 0:  # the others' processes end, this one may go on
            collective.abort()
        raise


def _choose_device(config: WorkerConfig, rank: int) -> "torch.device":
    import torch

    found = torch.cuda.device_count() if config.device != "cpu" else 0
    if config.device == "cuda" and not found:
        raise ConfigError("--device cuda: torch sees no GPU; use cpu, or check driver and torch")
    if found and found < config.tensor_parallel:
        raise ConfigError(
            f"--tensor-parallel {config.tensor_parallel}: torch sees {found} GPU(s); "
            "lower it, or give the worker more GPUs"
        )
    return torch.device("cuda", rank) if found else torch.device("cpu")


def _load_host(
    config: WorkerConfig,
    spec: "ModelSpec",
    facts: ModelFacts,
    dtype: "torch.dtype",
    load: Callable[[], "dict[str, torch.Tensor]"],
    progress: Startup,
    collective: "Collective",
) -> Runner:
    """The CPU's runner; its KV cache has the size that the configuration says."""
    from tandem_engine.attention.latent_torch import TorchLatentAttention
    from tandem_engine.attention.torch_backend import TorchAttention
    from tandem_engine.runner.kv_pages import HostKVStore
    from tandem_engine.runner.torch_runner import TorchRunner

    layout = _kv_layout(config, spec, dtype)
    wanted = (config.kv_memory_bytes or _HOST_KV_BYTES) // config.tensor_parallel
    num_blocks = wanted // layout.block_bytes
    max_model_len = _fit_length(config, spec, num_blocks, "--kv-memory")
    parameters = load()
    progress("kv cache", 0.0)
    # Peers write whole pages; a rank has a part of each.
    shared_dir = config.shm_dir if collective.is_alone else ""
    kv = HostKVStore(layout, num_blocks, dtype, shared_dir)
    backend = TorchAttention if spec.latent is None else TorchLatentAttention
    ends = facts.eos_token_ids
    return TorchRunner(spec, parameters, kv, backend, ends, max_model_len, collective)


def _load_cuda(
    config: WorkerConfig,
    spec: "ModelSpec",
    facts: ModelFacts,
    dtype: "torch.dtype",
    device: "torch.device",
    parameters: "dict[str, torch.Tensor]",
    progress: Startup,
    collective: "Collective",
) -> Runner:
    """A GPU's runner; its KV cache takes what `--gpu-memory-percent` leaves."""
    import torch

    from tandem_engine.runner.cuda_runner import CudaRunner
    from tandem_engine.runner.device_kv import DeviceKVStore
    from tandem_engine.runner.memory_profile import measure_memory

    layout = _kv_layout(config, spec, dtype)
    max_model_len = config.max_model_len or spec.max_position
    kv_memory = config.kv_memory_bytes // config.tensor_parallel  # of each rank
    budget = config.max_batched_tokens
    prompt_rows = collective.least(_prompt_rows(config, spec, parameters))

    def make(num_blocks: int, longest: int, graphs: bool) -> CudaRunner:
        return CudaRunner(
            spec,
            parameters,
            DeviceKVStore(layout, num_blocks, dtype, device),
            facts.eos_token_ids,
            longest,
            config.max_running,
            prompt_rows=prompt_rows,
            graphs=graphs,
            collective=collective,
        )

    probe = make(1, max_model_len, False)
    progress("compile", 0.0)
    _compile_kernels(probe, config)
    progress("profile", 0.0)
    plan = measure_memory(
        probe,
        device,
        percent=config.gpu_memory_percent,
        max_tokens=budget,
        max_running=config.max_running,
        graphs=config.cuda_graphs,
    )
    del probe
    least = layout.block_bytes * max(1, -(-config.max_model_len // layout.page_size))
    plan.check(max(least, kv_memory))
    num_blocks = collective.least((kv_memory or plan.kv) // layout.block_bytes)
    flag = "--kv-memory" if kv_memory else "--gpu-memory-percent"
    longest = _fit_length(config, spec, num_blocks, flag)
    torch.cuda.empty_cache()
    runner = make(num_blocks, longest, config.cuda_graphs)
    _capture_graphs(runner, config, progress)
    return runner


def _prompt_rows(
    config: WorkerConfig, spec: "ModelSpec", parameters: "dict[str, torch.Tensor]"
) -> int:
    """Tokens of the largest step with prompts that is to be made of graphs."""
    from tandem_engine.runner.piece_graphs import count_weights, most_rows

    if not config.cuda_graphs:
        return 0
    return most_rows(count_weights(spec, parameters), config.max_batched_tokens)


def _compile_kernels(probe: "CudaRunner", config: WorkerConfig) -> None:
    from tandem_engine.runner.probe_steps import prompt_batches, small_batches, worst_batch

    longest = probe.max_model_len
    worst = worst_batch(config.max_batched_tokens, config.max_running, longest, logprobs=False)
    # A mixture's kernels differ by the number of tokens.
    sizes = probe.prompt_sizes if probe.spec.moe is not None else []
    # The worst step takes the kernels that take longest to compile: they come first.
    probe.compile_steps([worst, *small_batches(), *prompt_batches(sizes)])


def _capture_graphs(runner: "CudaRunner", config: WorkerConfig, progress: Startup) -> None:
    progress("graphs", 0.0)
    runner.capture_pieces()
    if config.role != "prefill":
        # A prefill worker decodes rarely, if ever: it captures what it needs when it does.
        runner.capture_graphs(lambda fraction: progress("graphs", fraction))


def _weight_format(
    config: WorkerConfig, files: ModelFiles
) -> Literal["Safetensors", "Gguf", "Dummy"]:
    if config.format in ("Auto", files.format):
        return files.format
    if config.format == "Dummy":
        return "Dummy"
    raise ConfigError(
        f"--format {config.format}: {files.path} is {files.format}; use --format Auto"
    )


def _kv_layout(config: WorkerConfig, spec: "ModelSpec", dtype: "torch.dtype") -> KVLayout:
    latent = spec.latent
    return KVLayout(
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads if latent is None else 1,
        head_dim=spec.head_dim if latent is None else latent.width,
        num_planes=2 if latent is None else 1,
        page_size=config.page_size,
        dtype=str(dtype).removeprefix("torch."),
        itemsize=dtype.itemsize,
    )


def _check_length(config: WorkerConfig, spec: "ModelSpec") -> None:
    if config.max_model_len > spec.max_position:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} is more than the {spec.max_position} "
            "positions that the model knows; lower it"
        )


def _fit_length(config: WorkerConfig, spec: "ModelSpec", num_blocks: int, flag: str) -> int:
    """Tokens of the longest sequence that `num_blocks` hold."""
    num_tokens = num_blocks * config.page_size
    if num_blocks < 1 or config.max_model_len > num_tokens:
        raise ConfigError(
            f"{flag} leaves KV for {num_tokens} tokens, --max-model-len wants "
            f"{config.max_model_len or 'at least one block'}; raise the one or lower the other"
        )
    return config.max_model_len or min(spec.max_position, num_tokens)
