"""Making a runner from a worker's configuration. Imports torch only when called."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from tandem_engine.config import WorkerConfig
from tandem_engine.errors import ConfigError
from tandem_engine.runner.base import Runner
from tandem_engine.startup import Startup
from tandem_wire.disk_cache import default_cache_dir
from tandem_wire.handoff import KVLayout
from tandem_wire.model_config import ModelFacts, read_model_facts
from tandem_wire.model_source import ModelFiles, resolve_model

if TYPE_CHECKING:
    import torch

    from tandem_engine.models.spec import ModelSpec

_DTYPES: Final = {"BFloat16": "bfloat16", "Float16": "float16", "Float32": "float32"}


def load_runner(config: WorkerConfig, progress: Startup) -> Runner:
    """Find the model's files, load its weights and make the KV cache.

    Raises:
        ModelSourceError: the model can't be had (with a remedy).
        ConfigError: the configuration doesn't fit the model or the machine.
    """
    cache_dir = Path(config.cache_dir) if config.cache_dir else default_cache_dir()
    progress("model files", 0.0)
    files = resolve_model(
        config.model,
        revision=config.revision,
        weights=config.format != "Dummy",
        cache_dir=cache_dir,
        progress=lambda fraction: progress("model files", fraction),
    )
    facts = read_model_facts(files.path)
    progress("torch", 0.0)
    _limit_threads()
    torch_ready = _load_torch(config, files, facts, cache_dir, progress)
    progress("ready", 1.0)
    return torch_ready


def _limit_threads() -> None:
    """Threads that wait should sleep: workers share cores, and a spinning one slows the others."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    threads = os.environ.get("TANDEM_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(int(threads) if threads else len(os.sched_getaffinity(0)))


@dataclass(frozen=True, slots=True)
class _Room:
    """What the KV cache holds."""

    layout: KVLayout
    num_blocks: int
    max_model_len: int


def _load_torch(
    config: WorkerConfig,
    files: ModelFiles,
    facts: ModelFacts,
    cache_dir: Path,
    progress: Startup,
) -> Runner:
    import torch

    from tandem_engine.attention.torch_backend import TorchAttention
    from tandem_engine.models.spec import build_spec
    from tandem_engine.runner.kv_pages import HostKVStore
    from tandem_engine.runner.torch_runner import TorchRunner
    from tandem_engine.weights.loading import WeightFiles, load_parameters

    if config.device == "cuda":
        raise ConfigError("--device cuda: this engine runs on the CPU only; use auto or cpu")
    dtype: torch.dtype = getattr(torch, _DTYPES.get(config.dtype, "float32"))
    spec = build_spec(facts)
    room = _plan_room(config, spec, dtype)
    weights = WeightFiles(files.path, _weight_format(config, files))
    progress("weights", 0.0)
    parameters = load_parameters(
        spec, weights, dtype, cache_dir, lambda fraction: progress("weights", fraction)
    )
    progress.count_weights(sum(tensor.nbytes for tensor in parameters.values()))
    progress("kv cache", 0.0)
    kv = HostKVStore(room.layout, room.num_blocks, dtype, config.shm_dir)
    return TorchRunner(
        spec, parameters, kv, TorchAttention, facts.eos_token_ids, room.max_model_len
    )


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


def _plan_room(config: WorkerConfig, spec: "ModelSpec", dtype: "torch.dtype") -> _Room:
    """How many blocks fit, and the longest sequence."""
    layout = KVLayout(
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        page_size=config.page_size,
        dtype=str(dtype).removeprefix("torch."),
        itemsize=dtype.itemsize,
    )
    num_blocks = config.kv_memory_bytes // layout.block_bytes
    num_tokens = num_blocks * config.page_size
    if config.max_model_len > spec.max_position:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} is more than the {spec.max_position} "
            "positions that the model knows; lower it"
        )
    if num_blocks < 1 or config.max_model_len > num_tokens:
        raise ConfigError(
            f"--kv-memory holds {num_tokens} tokens of {layout.block_bytes // config.page_size} "
            f"bytes, --max-model-len wants {config.max_model_len or 'at least one block'}; "
            "raise the one or lower the other"
        )
    return _Room(layout, num_blocks, config.max_model_len or min(spec.max_position, num_tokens))
