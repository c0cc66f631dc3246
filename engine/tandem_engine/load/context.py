"""What one rank loads, and onto which device."""

from dataclasses import dataclass
from typing import Final

import torch

from tandem_engine.config import WorkerConfig
from tandem_engine.device import choose_device
from tandem_engine.errors import ConfigError
from tandem_engine.load.files import find_cache, find_format
from tandem_engine.models.collective import Collective, join_group
from tandem_engine.models.shard import Shard, shard_spec
from tandem_engine.parallel.messages import RankStart
from tandem_engine.spec.families import build_spec
from tandem_engine.spec.model import ModelSpec
from tandem_engine.startup import Startup
from tandem_engine.weights.loading import WeightFiles, load_parameters
from tandem_wire.handoff import KVLayout
from tandem_wire.model_config import ModelFacts
from tandem_wire.model_source import ModelFiles

_DTYPES: Final = {
    "BFloat16": torch.bfloat16,
    "Float16": torch.float16,
    "Float32": torch.float32,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadContext:
    """One rank's share of a model, before anything of it is loaded.

    `model` is the spec of the whole, `spec` that of the heads which this rank computes. The context
    owns `collective` until a runner is made of it; whoever gives up before that aborts it.
    """

    config: WorkerConfig
    progress: Startup
    facts: ModelFacts
    weights: WeightFiles
    model: ModelSpec
    spec: ModelSpec
    shard: Shard
    device: torch.device
    dtype: torch.dtype
    collective: Collective

    def load_parameters(self) -> dict[str, torch.Tensor]:
        """This rank's slice of every parameter, on the device, by the names of `parameters.py`.

        Raises:
            ModelSourceError: damaged, incomplete or unsupported files.
            ConfigError: the model can't be divided among this many ranks.
        """
        progress = self.progress
        progress("weights", 0.0)
        parameters = load_parameters(
            self.model,
            self.weights,
            self.dtype,
            find_cache(self.config),
            lambda fraction: progress("weights", fraction),
            device=self.device,
            shard=self.shard,
        )
        # What is mapped on the CPU hasn't been read yet.
        progress.count_weights(sum(x.nbytes for x in parameters.values() if not x.is_cpu))
        return parameters

    @property
    def kv_layout(self) -> KVLayout:
        """The form of this rank's pages."""
        spec, latent = self.spec, self.spec.latent
        return KVLayout(
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads if latent is None else 1,
            head_dim=spec.head_dim if latent is None else latent.width,
            num_planes=2 if latent is None else 1,
            page_size=self.config.page_size,
            dtype=str(self.dtype).removeprefix("torch."),
            itemsize=self.dtype.itemsize,
            windows=_windows(spec),
        )

    def fit_length(self, num_blocks: int, flag: str) -> int:
        """Tokens of the longest sequence that `num_blocks` hold.

        Raises:
            ConfigError: there is no block, or too few for --max-model-len. `flag` set their number.
        """
        wanted, page_size = self.config.max_model_len, self.config.page_size
        num_tokens = num_blocks * page_size
        if num_blocks < 1:
            raise ConfigError(
                f"{flag} leaves KV for {num_tokens} tokens, less than a page of {page_size}; "
                f"raise {flag}"
            )
        if wanted > num_tokens:
            raise ConfigError(
                f"{flag} leaves KV for {num_tokens} tokens, but --max-model-len is {wanted}; "
                f"raise {flag} or lower --max-model-len"
            )
        return wanted or min(self.spec.max_position, num_tokens)


def _windows(spec: ModelSpec) -> tuple[int, ...]:
    """By layer; empty if no layer has a window."""
    windows = tuple(layer.window or 0 for layer in spec.layers)
    return windows if any(windows) else ()


def open_context(
    start: RankStart, files: ModelFiles, facts: ModelFacts, progress: Startup
) -> LoadContext:
    """Decide what a rank loads and where, and have it meet the others.

    Raises:
        ConfigError: the configuration doesn't fit the model or the machine.
        UnsupportedModelError: there is no such family, or the model needs what is unsupported.
    """
    config = start.config
    shard = Shard(start.rank, config.tensor_parallel)
    device = choose_device(config, start.rank)
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = _DTYPES.get(config.dtype, default)
    model = build_spec(facts)
    if config.max_model_len > model.max_position:
        raise ConfigError(
            f"--max-model-len is {config.max_model_len}, but the model has only "
            f"{model.max_position} positions; lower it"
        )
    spec = shard_spec(model, shard)
    weights = WeightFiles(files.path, find_format(config, files))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return LoadContext(
        config=config,
        progress=progress,
        facts=facts,
        weights=weights,
        model=model,
        spec=spec,
        shard=shard,
        device=device,
        dtype=dtype,
        collective=join_group(shard, start.store, device, model.hidden_size, dtype),
    )
