"""Checkpoint tensors by name, and their assembly into a model's parameters."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import torch

from tandem_engine.models.parameters import Parameter
from tandem_engine.models.shard import WHOLE, Shard, cut_part
from tandem_wire.model_error import BadModelFileError

Progress = Callable[[float], None]
"""Called with the fraction of the bytes that are loaded, 0 to 1."""

_IGNORED: Final = (
    "rotary_emb.inv_freq",  # a constant that old checkpoints carry along
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
_MAX_NAMED: Final = 5


class TensorSource(ABC):
    """Tensors of a checkpoint, under their Hugging Face names.

    It owns the files. The caller owns the tensors that it returns, which may be views of mapped
    files and must not be written to. `norms_are_final`: norm weights already include what a family
    adds to them (as Gemma's do in GGUF files).
    """

    norms_are_final: bool = False

    @abstractmethod
    def names(self) -> Iterable[str]:
        """Names of all tensors."""

    @abstractmethod
    def load(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in the dtype of the file (float32 for quantised ones)."""


def check_names(parameters: Sequence[Parameter], names: Iterable[str]) -> None:
    """Raise BadModelFileError unless the checkpoint has exactly the model's tensors."""
    wanted = {part for parameter in parameters for part in parameter.parts}
    found = set(names)
    unknown = sorted(name for name in found - wanted if not any(part in name for part in _IGNORED))
    # A checkpoint may repeat a tied head.
    unknown = [name for name in unknown if name != "lm_head.weight"]
    if missing := sorted(wanted - found):
        raise BadModelFileError(
            f"the checkpoint lacks {_list(missing)}", "download the model again"
        )
    if unknown:
        raise BadModelFileError(
            f"the checkpoint has {_list(unknown)}, which the config has no place for",
            "check that config and weights belong together",
        )


def _list(names: list[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raise BadModelFileError unless a tensor of the checkpoint has the `wanted` shape."""
    if found != wanted:
        raise BadModelFileError(
            f"tensor {name} has shape {found}, but the config says {wanted}",
            "check that config and weights belong together",
        )


def iterate_parameters(
    parameters: Sequence[Parameter],
    source: TensorSource,
    dtype: torch.dtype,
    progress: Progress | None = None,
    shard: Shard = WHOLE,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each parameter by name in order: a rank's slice, joined, offset and in its dtype.

    A parameter that needs none of that stays a view of the mapped file.

    Raises:
        BadModelFileError: tensors are missing, unknown or of another shape.
    """
    check_names(parameters, source.names())
    total = sum(torch.Size(parameter.shape).numel() for parameter in parameters)
    done = 0
    for parameter in parameters:
        parts = [
            _load_part(parameter, index, source, shard) for index in range(len(parameter.parts))
        ]
        offset = 0.0 if source.norms_are_final else parameter.offset
        if offset:
            parts = [part.float() + offset for part in parts]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        yield parameter.name, tensor.to(parameter.dtype_in(dtype))
        done += torch.Size(parameter.shape).numel()
        if progress is not None:
            progress(done / total)


def _load_part(
    parameter: Parameter, index: int, source: TensorSource, shard: Shard
) -> torch.Tensor:
    name = parameter.parts[index]
    tensor = source.load(name)
    check_shape(name, tuple(tensor.shape), parameter.part_shapes[index])
    cut = cut_part(parameter, index, shard)
    found = tensor.narrow(cut.dimension, cut.start, cut.stop - cut.start)
    if (missing := cut.size - found.shape[cut.dimension]) > 0:
        found = torch.cat([found, found.new_zeros(missing, *found.shape[1:])])
    return found.contiguous()
