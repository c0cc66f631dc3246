"""A GGUF file as a checkpoint whose tensors are dequantised on demand."""

from collections.abc import Iterable

import gguf
import numpy as np
import torch

from tandem_engine.spec.model import ModelSpec
from tandem_engine.weights.gguf_names import ROPE_FACTORS, hugging_face_name, restore_halves
from tandem_engine.weights.source import TensorSource
from tandem_wire.gguf_file import GgufFile, GgufTensor
from tandem_wire.model_error import BadModelFileError, UnsupportedModelError


class GgufSource(TensorSource):
    """Tensors of a GGUF file, split or not, in float32 whatever their quantisation."""

    norms_are_final = True

    def __init__(self, file: GgufFile, spec: ModelSpec) -> None:
        self._spec = spec
        self._data = {
            path: np.memmap(path, dtype=np.uint8, mode="r")
            for path in {file.path, *(tensor.path for tensor in file.tensors)}
        }
        self._interleaved = file.text("general.architecture") in ("llama", "mistral")
        self._tensors = {
            hugging_face_name(tensor.name, spec.family): tensor
            for tensor in file.tensors
            if tensor.name != ROPE_FACTORS
        }
        self._rope_factors = next((t for t in file.tensors if t.name == ROPE_FACTORS), None)

    def names(self) -> Iterable[str]:
        return self._tensors

    def load(self, name: str) -> torch.Tensor:
        weight = self._dequantise(self._tensors[name])
        if self._interleaved and ".self_attn.q_proj." in name:
            return restore_halves(weight, self._spec.num_heads)
        if self._interleaved and ".self_attn.k_proj." in name:
            return restore_halves(weight, self._spec.num_kv_heads)
        return weight

    def rope_factors(self) -> torch.Tensor | None:
        """Divisors of the rope's frequencies [head_dim / 2], if the file has them."""
        return None if self._rope_factors is None else self._dequantise(self._rope_factors)

    def _dequantise(self, tensor: GgufTensor) -> torch.Tensor:
        try:
            kind = gguf.GGMLQuantizationType(tensor.ggml_type)
            block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            *rows, columns = tensor.shape
            row_bytes = columns // block_size * block_bytes
            size = int(np.prod(rows, dtype=np.int64)) * row_bytes
            raw = self._data[tensor.path][tensor.offset : tensor.offset + size]
            if raw.size != size or columns % block_size:
                raise BadModelFileError(
                    f"tensor {tensor.name} is cut short", "download the file again"
                )
            values = gguf.quants.dequantize(raw.reshape(*rows, row_bytes), kind)
        except (ValueError, KeyError, NotImplementedError) as error:
            # The gguf package raises NotImplementedError for a type that it can't dequantise.
            if isinstance(error, BadModelFileError):
                raise
            raise UnsupportedModelError(
                f"tensor {tensor.name} has the unsupported GGML type {tensor.ggml_type}: {error}",
                "use a file of another quantisation, such as Q4_K_M or Q8_0",
            ) from error
        return torch.from_numpy(np.array(values, dtype=np.float32).reshape(tensor.shape))
