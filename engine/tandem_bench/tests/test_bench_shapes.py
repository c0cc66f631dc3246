"""Models by name, and what kernels and steps say where there is no GPU."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tandem_bench.errors import NoGpuError, WorkloadError
from tandem_bench.gpu import require_gpu
from tandem_bench.kernel_suite import STAGES, choose_stages
from tandem_bench.shape_folder import write_shape
from tandem_bench.shapes import SHAPES, model_uri
from tandem_bench.step_suite import parse_pairs, read_config, shape_fields
from tandem_wire.model_config import read_model_facts


@pytest.mark.parametrize("name", SHAPES)
def test_short_names_are_whole_models(name: str, tmp_path: Path) -> None:
    uri = model_uri(name, tmp_path)
    facts = read_model_facts(Path(uri.removeprefix("file://")))
    assert facts.vocab_size == SHAPES[name]["vocab_size"]
    assert shape_fields(read_config(name)) == shape_fields(read_config(uri))


def test_bias_and_head_norms_follow_the_model() -> None:
    found = {name: shape_fields(read_config(name)) for name in SHAPES}
    assert [shape["qkv_bias"] for shape in found.values()] == [False, True, False]
    assert [shape["qk_norm"] for shape in found.values()] == [False, False, True]
    assert found["llama-8b"] | {"layers": 0} == {
        "layers": 0, "hidden": 4096, "heads": 32, "kv_heads": 8, "dim": 128,
        "intermediate": 14336, "vocab": 128256, "qkv_bias": False, "qk_norm": False,
    }  # fmt: skip


def test_a_shape_is_served_as_a_model(tmp_path: Path) -> None:
    uri = write_shape("qwen3-0.6b", tmp_path)
    tokenizer = Tokenizer.from_file(f"{uri.removeprefix('file://')}/tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("a Café ☕").ids) == "a Café ☕"
    assert tokenizer.get_vocab_size() == SHAPES["qwen3-0.6b"]["vocab_size"]


def test_a_step_that_nobody_wrote_is_told(tmp_path: Path) -> None:
    config = {**SHAPES["llama-8b"], "model_type": "gemma3_text"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WorkloadError, match="gemma3_text"):
        shape_fields(read_config(f"file://{tmp_path}"))
    with pytest.raises(WorkloadError, match="neither a model URI"):
        read_config("llama-9b")
    with pytest.raises(WorkloadError, match="neither a model URI"):
        model_uri("llama-9b", tmp_path)


def test_cases_and_stages_are_read() -> None:
    assert parse_pairs("1x1024,32X8192") == [(1, 1024), (32, 8192)]
    with pytest.raises(WorkloadError, match="no list of cases"):
        parse_pairs("1024")
    assert list(choose_stages("")) == list(STAGES)
    assert list(choose_stages("gemm, rows")) == ["gemm", "rows"]
    with pytest.raises(WorkloadError, match="no kernel benchmark called 'gem'"):
        choose_stages("gem")


def test_no_gpu_is_told_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NoGpuError) as caught:
        require_gpu()
    assert "nvidia-smi" in caught.value.remedy or "pip install" in caught.value.remedy
