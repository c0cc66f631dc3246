"""Models by name, and the errors of kernels and steps where there is no GPU."""

from math import prod
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tandem_bench.engine.floor import step_floor
from tandem_bench.engine.step import read_config, shape_fields
from tandem_bench.errors import NoGpuError, WorkloadError
from tandem_bench.gpu.device import Ceilings, require_gpu
from tandem_bench.kernels.decode_step import Shape
from tandem_bench.kernels.suite import STAGES, choose_stages
from tandem_bench.options import parse_pairs
from tandem_bench.shapes import SHAPES, model_uri, write_shape
from tandem_engine.models.parameters import build_parameters
from tandem_engine.spec.families import build_spec
from tandem_engine.spec.model import ModelSpec
from tandem_wire.model_config import read_model_facts


@pytest.mark.parametrize("name", SHAPES)
def test_short_names_are_whole_models(name: str, tmp_path: Path) -> None:
    uri = model_uri(name, tmp_path)
    facts = read_model_facts(Path(uri.removeprefix("file://")))
    assert facts.vocab_size == SHAPES[name]["vocab_size"]
    assert shape_fields(read_config(name)) == shape_fields(read_config(uri))


def test_bias_and_head_norms_follow_the_model() -> None:
    dense = {name: shape_fields(read_config(name)) for name in SHAPES}
    found = {name: fields for name, fields in dense.items() if fields is not None}
    assert list(found) == ["llama-8b", "qwen2.5-7b", "qwen3-0.6b"]
    assert [shape["qkv_bias"] for shape in found.values()] == [False, True, False]
    assert [shape["qk_norm"] for shape in found.values()] == [False, False, True]
    assert found["llama-8b"] | {"layers": 0} == {
        "layers": 0, "hidden": 4096, "heads": 32, "kv_heads": 8, "dim": 128,
        "intermediate": 14336, "vocab": 128256, "qkv_bias": False, "qk_norm": False,
    }  # fmt: skip


def spec_of(name: str, folder: Path) -> ModelSpec:
    uri = model_uri(name, folder)
    return build_spec(read_model_facts(Path(uri.removeprefix("file://"))))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("llama-8b", 8_030_261_248),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
        ("gemma3-4b", 3_880_263_168),
        ("qwen3-moe-30b", 30_532_122_624),
        ("deepseek-v2-lite", 15_706_484_224),
    ],
)
def test_shapes_have_the_models_own_number_of_parameters(
    name: str, size: int, tmp_path: Path
) -> None:
    assert sum(prod(each.shape) for each in build_parameters(spec_of(name, tmp_path))) == size


def test_floors_count_what_a_step_must_read_and_multiply(tmp_path: Path) -> None:
    dense = step_floor(spec_of("llama-8b", tmp_path))
    shape = Shape(**(shape_fields(read_config("llama-8b")) or {}))
    assert dense.weight_bytes(1) == dense.weight_bytes(64) == 2 * shape.weight_elements
    ceilings = Ceilings("some", 3e12, 7e14)
    for batch, context in ((1, 1024), (256, 1024), (32, 8192)):
        found = dense.decode_seconds(batch, context, ceilings.copy, ceilings.matmul)
        assert found == pytest.approx(shape.floor(batch, context, ceilings))
    sparse = step_floor(spec_of("qwen3-moe-30b", tmp_path))
    assert sparse.operations(1, 1) / 2 == pytest.approx(3.0e9, rel=0.02)  # "A3B"
    assert sparse.weight_bytes(1) == pytest.approx(sparse.operations(1, 1))
    assert sparse.weight_bytes(1 << 20) == pytest.approx(2 * 30.2e9, rel=0.01)
    latent = step_floor(spec_of("deepseek-v2-lite", tmp_path))
    assert latent.kv_bytes(1000) == 27 * 1000 * 576 * 2
    windows = step_floor(spec_of("gemma3-4b", tmp_path))
    assert windows.kv_bytes(2048) == 4 * 4 * 256 * (5 * 2048 + 29 * 1024)
    assert windows.attention_operations(1024) == 34 * 8 * 2 * 256 * 1024**2


def test_a_shape_is_served_as_a_model(tmp_path: Path) -> None:
    uri = write_shape("qwen3-0.6b", tmp_path)
    tokenizer = Tokenizer.from_file(f"{uri.removeprefix('file://')}/tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("a Café ☕").ids) == "a Café ☕"
    assert tokenizer.get_vocab_size() == SHAPES["qwen3-0.6b"]["vocab_size"]


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="neither a model URI"):
        read_config("llama-9b")
    with pytest.raises(WorkloadError, match="neither a model URI"):
        model_uri("llama-9b", tmp_path)


def test_cases_and_stages_are_read() -> None:
    assert parse_pairs("1x1024,32X8192", "--cases") == [(1, 1024), (32, 8192)]
    with pytest.raises(WorkloadError, match="--cases '1024' is not a list of cases"):
        parse_pairs("1024", "--cases")
    assert list(choose_stages("")) == list(STAGES)
    assert list(choose_stages("gemm, rows")) == ["gemm", "rows"]
    with pytest.raises(WorkloadError, match="no kernel benchmark called 'gem'"):
        choose_stages("gem")


def test_a_missing_gpu_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NoGpuError) as caught:
        require_gpu()
    assert "nvidia-smi" in caught.value.remedy or "pip install" in caught.value.remedy
