"""Host values to a device."""

from collections.abc import Sequence

import numpy as np
import torch


def upload(
    values: Sequence[int] | Sequence[float] | np.ndarray | torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """A tensor of `values` on `device`; to a GPU without waiting for what runs there.

    `torch.tensor(values, device="cuda")` waits for the whole stream.
    """
    host = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)
