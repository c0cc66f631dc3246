"""The device that a worker computes on: which one it is, and how values get there and back."""

from collections.abc import Sequence

import numpy as np
import torch

from tandem_engine.config import WorkerConfig
from tandem_engine.errors import ConfigError


def choose_device(config: WorkerConfig, rank: int) -> torch.device:
    """A rank's device: the GPU with its number, or the CPU without GPUs or with `--device cpu`.

    Raises:
        ConfigError: torch sees no GPU, or fewer than there are ranks.
    """
    found = torch.cuda.device_count() if config.device != "cpu" else 0
    if config.device == "cuda" and not found:
        raise ConfigError(
            "--device is cuda, but torch sees no GPU; use --device cpu, or check driver and torch"
        )
    if found and found < config.tensor_parallel:
        raise ConfigError(
            f"--tensor-parallel is {config.tensor_parallel}, but torch sees {found} GPU(s); "
            "lower it, or give the worker more GPUs"
        )
    return torch.device("cuda", rank) if found else torch.device("cpu")


def upload(
    values: Sequence[int] | Sequence[float] | np.ndarray | torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """A tensor of `values` on `device`, made without waiting for what runs on a GPU.

    `torch.tensor(values, device="cuda")` would wait for the whole stream.
    """
    host = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


def download(tensor: torch.Tensor) -> torch.Tensor:
    """A GPU's tensor in pinned host memory, complete once the current stream has come this far."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
