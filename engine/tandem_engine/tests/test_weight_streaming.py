"""Streaming weights to a device: the same bits as by mapping, whatever the buffers and shards."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tandem_engine.errors import ConfigError
from tandem_engine.models.parameters import Parameter, build_parameters
from tandem_engine.models.shard import WHOLE, Shard, cut_part, sharded_shape
from tandem_engine.spec.families import build_spec
from tandem_engine.spec.model import ModelSpec
from tandem_engine.tests.tiny_checkpoints import make_model, save_checkpoint
from tandem_engine.tests.tiny_gguf import write_gguf
from tandem_engine.weights.loading import WeightFiles, load_parameters
from tandem_engine.weights.random_source import RandomSource, make_random_parameters
from tandem_engine.weights.safetensors_dir import SafetensorsDirectory, find_places
from tandem_engine.weights.safetensors_header import read_header
from tandem_engine.weights.source import iterate_parameters
from tandem_engine.weights.streaming import Staging, stream_parameters
from tandem_wire.model_error import BadModelFileError
from tandem_wire.model_source import read_model_facts

CPU = torch.device("cpu")
STAGING = Staging()
Tensors = dict[str, torch.Tensor]


def spec_of(path: Path) -> ModelSpec:
    return build_spec(read_model_facts(path))


def map_all(directory: Path, dtype: torch.dtype, shard: Shard = WHOLE) -> Tensors:
    parameters = build_parameters(spec_of(directory))
    source = SafetensorsDirectory(directory)
    return dict(iterate_parameters(parameters, source, dtype, shard=shard))


def stream_all(
    directory: Path,
    dtype: torch.dtype,
    shard: Shard = WHOLE,
    staging: Staging = STAGING,
    seen: list[float] | None = None,
) -> Tensors:
    parameters = build_parameters(spec_of(directory))
    progress = None if seen is None else seen.append
    places = find_places(directory)
    return stream_parameters(parameters, places, dtype, CPU, progress, shard, staging)


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].is_contiguous()
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


def convert(directory: Path, dtype: torch.dtype) -> None:
    for path in directory.glob("*.safetensors"):
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["llama", "llama3", "gemma3"])
def test_streamed_is_mapped(
    family: str, stored: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    save_checkpoint(family, tmp_path, shard="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    convert(tmp_path, stored)
    assert_same(stream_all(tmp_path, dtype), map_all(tmp_path, dtype))


@pytest.mark.parametrize("buffer_bytes", [1, 7, 94, 1001, 1 << 20])
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("shard", [WHOLE, Shard(1, 2)])
def test_pieces_of_any_size_join_up(
    buffer_bytes: int, num_threads: int, shard: Shard, tmp_path: Path
) -> None:
    directory = save_one_layer(tmp_path)
    staging = Staging(num_threads, buffer_bytes)
    seen: list[float] = []
    found = stream_all(directory, torch.bfloat16, shard, staging, seen)
    assert_same(found, map_all(directory, torch.bfloat16, shard))
    assert seen[-1] == 1.0
    assert seen == sorted(seen)


def save_one_layer(directory: Path) -> Path:
    """A checkpoint small enough for buffers of one element."""
    save_checkpoint("qwen3", directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "vocab_size": 5, "layer_types": ["full_attention"]}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = load_file(directory / "model.safetensors")
    kept = {
        n: t for n, t in tensors.items() if not n.startswith(("model.layers.1", "model.layers.2"))
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        kept[name] = kept[name][:5].clone()
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


# --- slices ---------------------------------------------------------------------------------------


def join(parameter: Parameter, slices: list[torch.Tensor]) -> list[torch.Tensor]:
    """The parts of a parameter, joined again from the slices of all ranks."""
    world = len(slices)
    parts, at = [], 0
    for index, shape in enumerate(parameter.part_shapes):
        cuts = [cut_part(parameter, index, Shard(rank, world)) for rank in range(world)]
        dimension = cuts[0].dimension
        rows = cuts[0].size if dimension == 0 else shape[0]
        found = torch.full(shape, float("nan"), dtype=slices[0].dtype)
        for cut, tensor in zip(cuts, slices, strict=True):
            piece = tensor[at : at + rows].narrow(dimension, 0, cut.stop - cut.start)
            found.narrow(dimension, cut.start, cut.stop - cut.start).copy_(piece)
        parts.append(found)
        at += rows
    assert all(tensor.shape[0] == at for tensor in slices)
    return parts


@pytest.mark.parametrize("world", [2, 6])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "deepseek_v2", "deepseek_v3"])
def test_slices_of_all_ranks_make_the_whole(family: str, world: int, tmp_path: Path) -> None:
    """Six query heads, two KV heads, an MLP of 78 columns: of six ranks, three share a KV head."""
    model = make_model(family)
    save_mlp(model, tmp_path)
    whole = map_all(tmp_path, torch.float32)
    ranks = [stream_all(tmp_path, torch.float32, Shard(rank, world)) for rank in range(world)]
    for rank, tensors in enumerate(ranks):
        assert_same(tensors, map_all(tmp_path, torch.float32, Shard(rank, world)))
    for parameter in build_parameters(spec_of(tmp_path)):
        slices = [tensors[parameter.name] for tensors in ranks]
        shapes = {tuple(tensor.shape) for tensor in slices}
        assert shapes == {sharded_shape(parameter, Shard(0, world))}
        torch.testing.assert_close(
            torch.cat(join(parameter, slices)), whole[parameter.name], rtol=0, atol=0
        )


def save_mlp(model: PreTrainedModel, directory: Path) -> None:
    """Write a model with 78 of the 80 rows of its MLP, a number that 2 and 6 divide."""
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": 78}))
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if "down_proj.weight" in name:
            tensors[name] = tensor[:, :78].contiguous()
        elif ".gate_proj." in name or ".up_proj." in name:
            tensors[name] = tensor[:78].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_neighbouring_ranks_share_a_kv_head(tmp_path: Path) -> None:
    save_mlp(make_model("llama"), tmp_path)
    parameters = {p.name: p for p in build_parameters(spec_of(tmp_path))}
    qkv = parameters["layers.0.qkv.weight"]
    heads = [cut_part(qkv, 1, Shard(rank, 6)).start // 8 for rank in range(6)]
    assert heads == [0, 0, 0, 1, 1, 1]
    assert [cut_part(qkv, 0, Shard(rank, 6)).start // 8 for rank in range(6)] == [*range(6)]
    # A vocabulary of 199 leaves one row of padding to the second rank.
    last = stream_all(tmp_path, torch.float32, Shard(1, 2))["embedding.weight"]
    assert last.shape[0] == 100
    assert not last[99].any()
    assert last[98].any()


@pytest.mark.parametrize("world", [4, 12])
def test_heads_that_do_not_divide_are_refused(world: int, tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    with pytest.raises(ConfigError, match=rf"q_proj.*6 units.*among {world} ranks"):
        stream_all(tmp_path, torch.float32, Shard(0, world))


# --- GGUF and random weights ----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_a_gguf_file_in_slices(family: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(make_model(family), path, rope_factors=[1.0, 2.0, 3.0, 4.0])
    spec, files = spec_of(path), WeightFiles(path, "Gguf")
    seen: list[float] = []
    ranks = [
        load_parameters(
            spec, files, torch.bfloat16, tmp_path / "cache", seen.append, shard=Shard(rank, 2)
        )
        for rank in range(2)
    ]
    whole = load_parameters(spec, files, torch.bfloat16, tmp_path / "cache")
    assert torch.equal(ranks[1].pop("rope_factors"), whole["rope_factors"])
    for parameter in build_parameters(spec):
        slices = [tensors[parameter.name] for tensors in ranks]
        assert torch.equal(torch.cat(join(parameter, slices)), whole[parameter.name])
    first = seen[: seen.index(1.0) + 1]
    assert first == sorted(first)


def test_random_weights_made_on_a_device_agree(tmp_path: Path) -> None:
    save_checkpoint("gemma3", tmp_path)
    parameters = build_parameters(spec_of(tmp_path))
    whole, again = (make_random_parameters(parameters, torch.bfloat16, CPU) for _ in range(2))
    assert_same(again, whole)
    other = make_random_parameters(parameters, torch.bfloat16, CPU, seed=1)
    assert not torch.equal(other["layers.0.qkv.weight"], whole["layers.0.qkv.weight"])
    assert float(whole["final_norm.weight"].min()) == float(whole["final_norm.weight"].max()) == 1
    spread = whole["embedding.weight"].float().std()
    assert 0.019 < float(spread) < 0.021
    ranks = [
        make_random_parameters(parameters, torch.bfloat16, CPU, Shard(rank, 2)) for rank in range(2)
    ]
    for parameter in parameters:
        slices = [tensors[parameter.name] for tensors in ranks]
        assert torch.equal(torch.cat(join(parameter, slices)), whole[parameter.name])


def test_random_weights_of_the_cpu_come_in_slices(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    parameters = build_parameters(spec_of(tmp_path))
    source = RandomSource(parameters)
    whole = dict(iterate_parameters(parameters, source, torch.float32))
    files = WeightFiles(tmp_path, "Dummy")
    ranks = [
        load_parameters(spec_of(tmp_path), files, torch.float32, tmp_path, shard=Shard(rank, 2))
        for rank in range(2)
    ]
    for parameter in parameters:
        slices = [tensors[parameter.name] for tensors in ranks]
        assert torch.equal(torch.cat(join(parameter, slices)), whole[parameter.name])


# --- files that don't fit -------------------------------------------------------------------------


def test_a_shard_that_is_cut_short_is_named(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path, shard="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for length in (len(whole) - 1, 300, 7, 0):
        shard.write_bytes(whole[:length])
        with pytest.raises(BadModelFileError, match=rf"{shard.name}.*cut short"):
            stream_all(tmp_path, torch.float32)
    shard.unlink()
    with pytest.raises(BadModelFileError, match=shard.name):
        stream_all(tmp_path, torch.float32)


def test_a_file_that_shrinks_under_the_reader_is_an_error(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    places = find_places(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8192])
    parameters = build_parameters(spec_of(tmp_path))
    with pytest.raises(BadModelFileError, match="cut short while"):
        stream_parameters(parameters, places, torch.float32, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F4"}, "unsupported dtype F4"),
        ({"dtype": 3}, "unsupported dtype 3"),
        ({"shape": [47]}, r"of shape \(47,\) can't be at"),
        ({"shape": [-48]}, "can't be at"),
        ({"data_offsets": [0]}, "damaged"),
        ({"data_offsets": [8, 4]}, "can't be at"),
        ({"shape": "large"}, "damaged"),
    ],
)
def test_a_damaged_header_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    save_file({"norm": torch.zeros(48)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["norm"] |= change
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(BadModelFileError, match=message):
        read_header(path)


@pytest.mark.parametrize("text", [b"[]", b"{", b"\xff\xfe"])
def test_a_header_that_is_no_object_is_refused(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(BadModelFileError, match=r"model\.safetensors"):
        read_header(path)


def test_missing_tensors_and_other_shapes_are_named(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 81}))
    with pytest.raises(
        BadModelFileError, match=r"has shape \(80, 48\), but the config says \(81, 48\)"
    ):
        stream_all(tmp_path, torch.float32)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(BadModelFileError, match=r"lacks model\.layers\.3"):
        stream_all(tmp_path, torch.float32)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(BadModelFileError, match="has no place for"):
        stream_all(tmp_path, torch.float32)
