"""A directory of safetensors files in the Hugging Face form."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tandem_engine.weights.safetensors_header import TensorPlace, read_header
from tandem_engine.weights.source import TensorSource
from tandem_wire.model_error import BadModelFileError

_TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.lm_head.")


def _plain_name(name: str) -> str:
    """The name of the tensor in a text-only checkpoint."""
    for prefix in _TEXT_PREFIXES:
        if name.startswith(prefix):
            kind = "lm_head." if prefix.endswith("lm_head.") else "model."
            return kind + name.removeprefix(prefix)
    return name


def find_shards(directory: Path) -> list[Path]:
    """One model.safetensors, or the shards that the index names.

    Raises:
        BadModelFileError: the directory has no weights.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
    if not names:
        raise BadModelFileError(
            f"{directory} has no .safetensors file",
            "download the model again, or use --format Dummy for random weights",
        )
    return [directory / name for name in names]


def find_places(directory: Path) -> dict[str, TensorPlace]:
    """The place of each tensor of the checkpoint.

    Raises:
        BadModelFileError: the directory has no weights, or a shard is missing or damaged.
    """
    return {
        _plain_name(name): place
        for path in find_shards(directory)
        for name, place in read_header(path).items()
    }


class SafetensorsDirectory(TensorSource):
    """Mapped shards, so that a tensor is read when it is used.

    Raises:
        BadModelFileError: the directory has no weights, or a shard is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self._open: dict[Path, Any] = {}
        self._place: dict[str, tuple[Path, str]] = {}
        for path in find_shards(directory):
            try:
                self._open[path] = safe_open(str(path), framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise BadModelFileError(f"{path}: {error}", "download the model again") from error
            for key in self._open[path].keys():  # noqa: SIM118
                self._place[_plain_name(key)] = (path, key)

    def names(self) -> Iterable[str]:
        return self._place

    def load(self, name: str) -> torch.Tensor:
        path, key = self._place[name]
        tensor: torch.Tensor = self._open[path].get_tensor(key)
        return tensor
