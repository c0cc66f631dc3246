"""Streaming weights to a GPU, with pinned buffers, own streams and conversions on the device."""

import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem_engine.models.parameters import build_parameters
from tandem_engine.models.shard import WHOLE, Shard
from tandem_engine.spec.families import build_spec
from tandem_engine.tests.tiny_checkpoints import save_checkpoint
from tandem_engine.weights.loading import WeightFiles, load_parameters
from tandem_engine.weights.safetensors_dir import SafetensorsDirectory, find_places
from tandem_engine.weights.source import iterate_parameters
from tandem_engine.weights.streaming import Staging, stream_parameters
from tandem_wire.model_config import read_model_facts

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.mark.parametrize("buffer_bytes", [333, 16 << 20])
@pytest.mark.parametrize("shard", [WHOLE, Shard(1, 2)])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_streamed_to_a_gpu_is_mapped(
    stored: torch.dtype, shard: Shard, buffer_bytes: int, tmp_path: Path
) -> None:
    save_checkpoint("gemma3", tmp_path, shard="60KB")
    for path in tmp_path.glob("*.safetensors"):
        tensors = {name: tensor.to(stored) for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    parameters = build_parameters(build_spec(read_model_facts(tmp_path)))
    source = SafetensorsDirectory(tmp_path)
    expected = dict(iterate_parameters(parameters, source, torch.bfloat16, shard=shard))
    gc.collect()  # or what earlier tests left may be freed while weights are loaded
    before = torch.cuda.memory_allocated()
    found = stream_parameters(
        parameters,
        find_places(tmp_path),
        torch.bfloat16,
        GPU,
        shard=shard,
        staging=Staging(3, buffer_bytes),
    )
    room = sum(-(-tensor.nbytes // 512) * 512 for tensor in found.values())
    assert torch.cuda.memory_allocated() - before == room
    for name, tensor in expected.items():
        assert found[name].is_cuda
        assert torch.equal(found[name].cpu(), tensor), name


def test_random_weights_of_two_workers_agree(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    spec = build_spec(read_model_facts(tmp_path))
    files = WeightFiles(tmp_path, "Dummy")
    first, second = (
        load_parameters(spec, files, torch.bfloat16, tmp_path, device=GPU) for _ in range(2)
    )
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
    assert 0.019 < float(first["embedding.weight"].float().std()) < 0.021
