"""Weights from every form of file, and the errors for files that don't fit."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from deadlines import patience
from safetensors.torch import load_file, save_file

from tandem_engine.config import WorkerConfig
from tandem_engine.errors import ConfigError
from tandem_engine.load.runner import load_runner
from tandem_engine.models.parameters import build_parameters
from tandem_engine.spec.families import build_spec
from tandem_engine.spec.rope import RopeSpec
from tandem_engine.startup import Startup
from tandem_engine.step import Runner
from tandem_engine.tests.step_driver import generate
from tandem_engine.tests.tiny_checkpoints import (
    VOCAB,
    make_model,
    reference_tokens,
    save_checkpoint,
)
from tandem_engine.tests.tiny_gguf import round_like, write_gguf
from tandem_engine.weights.loading import WeightFiles, load_parameters
from tandem_wire.model_error import BadModelFileError, UnsupportedModelError
from tandem_wire.model_source import read_model_facts

PROMPTS = [[5], [7, 8, 9, 11, 30, 2], list(range(3, 60)), [13] * 33]
Q8 = gguf.GGMLQuantizationType.Q8_0


def open_runner(path: Path, **options: Any) -> Runner:
    options = {"kv_memory_bytes": 16 << 20, "cache_dir": str(path.parent / "cache"), **options}
    config = WorkerConfig(model=f"file://{path}", page_size=16, **options)
    return load_runner(config, Startup())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("quantisation", [gguf.GGMLQuantizationType.F32, Q8])
def test_a_gguf_file_gives_the_tokens_of_the_model_it_was_made_from(
    family: str, quantisation: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    model = make_model(family)
    write_gguf(model, tmp_path / "tiny.gguf", quantisation)
    round_like(model, quantisation)
    runner = open_runner(tmp_path / "tiny.gguf")
    assert runner.eos_token_ids == (2, 7)
    expected = [reference_tokens(model, prompt, 8) for prompt in PROMPTS]
    assert generate(runner, PROMPTS, 8) == expected
    runner.close()


def test_a_gguf_file_of_gemma_keeps_its_norms(tmp_path: Path) -> None:
    model = make_model("gemma3")
    # GGUF has no field for the scale: llama.cpp scales queries by the head's dimension.
    scale = model.config.head_dim**-0.5
    model.config.query_pre_attn_scalar = model.config.head_dim
    for layer in model.model.layers:
        layer.self_attn.scaling = scale
    write_gguf(model, tmp_path / "tiny.gguf")
    runner = open_runner(tmp_path / "tiny.gguf")
    expected = [reference_tokens(model, prompt, 8) for prompt in PROMPTS]
    assert generate(runner, PROMPTS, 8) == expected
    runner.close()


def test_rope_factors_of_a_gguf_file_stand_for_llama3_scaling(tmp_path: Path) -> None:
    model = make_model("llama3")
    rope = RopeSpec(500.0, "llama3", 8.0, 1.0, 4.0, 64)
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    frequencies = [500.0 ** -(index / head_dim) for index in range(0, head_dim, 2)]
    factors = [rope.divisor(frequency, head_dim) for frequency in frequencies]
    assert len(set(factors)) > 2
    write_gguf(model, tmp_path / "tiny.gguf", rope_factors=factors)
    prompts = [*PROMPTS, [4, 9] * 100]
    runner = open_runner(tmp_path / "tiny.gguf")
    expected = [reference_tokens(model, prompt, 8) for prompt in prompts]
    assert generate(runner, prompts, 8) == expected
    runner.close()


def test_a_worker_knows_an_end_that_only_the_tokenizer_names(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path / "model")
    turn = {"added_tokens_decoder": {"9": {"content": "<end>"}}, "eos_token": "<end>"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(turn))
    runner = open_runner(tmp_path / "model")
    assert runner.eos_token_ids == (2, 9)
    runner.close()


def test_a_gguf_file_keeps_its_yarn_scaling(tmp_path: Path) -> None:
    model = make_model("qwen2_yarn")
    write_gguf(model, tmp_path / "tiny.gguf")
    prompts = [*PROMPTS, [4, 9] * 100]
    runner = open_runner(tmp_path / "tiny.gguf")
    assert generate(runner, prompts, 8) == [reference_tokens(model, ids, 8) for ids in prompts]
    runner.close()


def test_a_split_gguf_file_is_one_model(tmp_path: Path) -> None:
    model = make_model("qwen2")
    write_gguf(model, tmp_path / "tiny.gguf", split=9)
    parts = sorted(tmp_path.glob("tiny-*.gguf"))
    assert len(parts) > 2
    expected = [reference_tokens(model, prompt, 8) for prompt in PROMPTS]
    for path in (parts[0], parts[1], tmp_path):  # any part, or their folder
        runner = open_runner(path, cache_dir=str(tmp_path / "cache"))
        assert generate(runner, PROMPTS, 8) == expected
        runner.close()
    assert len(list((tmp_path / "cache" / "weights").glob("*.safetensors"))) == 1
    parts[1].touch()
    open_runner(parts[0]).close()
    assert len(list((tmp_path / "cache" / "weights").glob("*.safetensors"))) == 2
    parts[2].rename(tmp_path / "aside")
    with pytest.raises(BadModelFileError, match=rf"{parts[2].name} is missing"):
        open_runner(parts[0])


def _load(path: str, cache: str) -> None:
    config = WorkerConfig(model=f"file://{path}", kv_memory_bytes=16 << 20, cache_dir=cache)
    load_runner(config, Startup()).close()


def test_workers_that_start_together_dequantise_once(tmp_path: Path) -> None:
    write_gguf(make_model("llama"), tmp_path / "tiny.gguf", Q8)
    spawn = multiprocessing.get_context("spawn")
    arguments = (str(tmp_path / "tiny.gguf"), str(tmp_path / "cache"))
    workers = [spawn.Process(target=_load, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(patience(120))
        assert worker.exitcode == 0
    made = list((tmp_path / "cache" / "weights").glob("*.safetensors"))
    assert len(made) == 1
    before = made[0].stat()
    _load(*arguments)
    assert made[0].stat().st_ino == before.st_ino
    (tmp_path / "tiny.gguf").touch()
    _load(*arguments)
    assert len(list((tmp_path / "cache" / "weights").glob("*.safetensors"))) == 2


def test_shards_with_an_index(tmp_path: Path) -> None:
    model = save_checkpoint("qwen3", tmp_path / "model", shard="60KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    runner = open_runner(tmp_path / "model")
    expected = [reference_tokens(model, prompt, 8) for prompt in PROMPTS]
    assert generate(runner, PROMPTS, 8) == expected
    runner.close()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_checkpoint("qwen3", tmp_path / "model", shard="60KB")
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(BadModelFileError, match=shard.name):
        open_runner(tmp_path / "model")


def _edit(directory: Path, remove: str = "", add: str = "") -> None:
    tensors = load_file(directory / "model.safetensors")
    if remove:
        del tensors[remove]
    if add:
        tensors[add] = torch.zeros(3)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_missing_and_unknown_tensors_are_named(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path / "model")
    _edit(tmp_path / "model", remove="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(BadModelFileError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        open_runner(tmp_path / "model")
    save_checkpoint("llama", tmp_path / "model")
    _edit(tmp_path / "model", add="model.layers.0.self_attn.gate.weight")
    with pytest.raises(BadModelFileError, match=r"self_attn\.gate\.weight.*no place"):
        open_runner(tmp_path / "model")
    save_checkpoint("llama", tmp_path / "model")
    _edit(tmp_path / "model", add="model.layers.0.self_attn.rotary_emb.inv_freq")
    open_runner(tmp_path / "model").close()


def test_a_config_of_another_size_is_refused(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 81}))
    with pytest.raises(
        BadModelFileError, match=r"has shape \(80, 48\), but the config says \(81, 48\)"
    ):
        open_runner(tmp_path)


def test_gguf_files_that_do_not_fit(tmp_path: Path) -> None:
    model = make_model("llama")
    write_gguf(model, tmp_path / "a.gguf", skip="blk.2.ffn_up.weight")
    with pytest.raises(BadModelFileError, match=r"lacks model\.layers\.2\.mlp\.up_proj\.weight"):
        open_runner(tmp_path / "a.gguf")
    write_gguf(model, tmp_path / "b.gguf", extra="blk.0.mystery.weight")
    with pytest.raises(BadModelFileError, match=r"blk\.0\.mystery\.weight"):
        open_runner(tmp_path / "b.gguf")
    write_gguf(model, tmp_path / "c.gguf")
    whole = (tmp_path / "c.gguf").read_bytes()
    (tmp_path / "c.gguf").write_bytes(whole[:-4096])
    with pytest.raises(BadModelFileError, match="cut short"):
        open_runner(tmp_path / "c.gguf")
    assert not list((tmp_path / "cache" / "weights").glob("*.safetensors"))


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "mamba", "vocab_size": 9, "max_position_embeddings": 9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"'mamba' .*; use a model of type deepseek_v2"):
        open_runner(tmp_path)


def test_an_unknown_rope_scaling_is_refused(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="'longrope'"):
        open_runner(tmp_path)


def test_quantised_safetensors_are_refused(tmp_path: Path) -> None:
    """DeepSeek-V3 is published so. Read as plain numbers, its weights would answer nonsense."""
    save_checkpoint("deepseek_v3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="quantised"):
        open_runner(tmp_path)


def test_latent_attention_with_biases_is_refused(tmp_path: Path) -> None:
    save_checkpoint("deepseek_v3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    with pytest.raises(UnsupportedModelError, match="attention_bias"):
        open_runner(tmp_path)


def test_old_configs_mean_the_same(tmp_path: Path) -> None:
    """transformers 4 wrote rope_theta, rope_scaling and sliding_window_pattern."""
    for family in ("gemma3_linear", "llama3", "deepseek_v3"):
        save_checkpoint(family, tmp_path / family)
        path = tmp_path / family / "config.json"
        config = json.loads(path.read_text())
        new = build_spec(read_model_facts(tmp_path / family))
        ropes = config.pop("rope_parameters")
        full = ropes.get("full_attention", ropes)
        config |= {"rope_theta": full["rope_theta"], "rope_scaling": full}
        if family == "gemma3_linear":
            config["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
            config.pop("layer_types")
            config["sliding_window_pattern"] = 6
        path.write_text(json.dumps(config))
        assert build_spec(read_model_facts(tmp_path / family)) == new


def test_random_weights_are_the_same_on_every_worker(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    first, second = (open_runner(tmp_path / "model", format="Dummy") for _ in range(2))
    tokens = generate(first, PROMPTS, 8)
    assert tokens == generate(second, PROMPTS, 8)
    assert all(0 <= token < VOCAB for row in tokens for token in row)
    with pytest.raises(ConfigError, match="--format is Gguf"):
        open_runner(tmp_path / "model", format="Gguf")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_parameter_is_there_in_the_dtype_asked_for(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    write_gguf(make_model("gemma3"), tmp_path / "tiny.gguf")
    spec = build_spec(read_model_facts(tmp_path / "tiny.gguf"))
    seen: list[float] = []
    files = WeightFiles(tmp_path / "tiny.gguf", "Gguf")
    found = load_parameters(spec, files, dtype, tmp_path / "cache", seen.append)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        parameter.name: parameter.shape for parameter in build_parameters(spec)
    }
    norms = {name: tensor.dtype for name, tensor in found.items() if "norm" in name}
    assert set(norms.values()) == {torch.float32}
    assert {found[name].dtype for name in found.keys() - norms.keys()} == {dtype}
    assert seen[-1] == 1.0
    assert seen == sorted(seen)


def test_limits_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    with pytest.raises(ConfigError, match="--max-model-len is 5000, but the model has only 4096"):
        open_runner(tmp_path, max_model_len=5000)
    with pytest.raises(ConfigError, match="--kv-memory leaves KV for"):
        open_runner(tmp_path, max_model_len=4096, kv_memory_bytes=1 << 16)
    with pytest.raises(ConfigError, match="--device is cuda"):
        open_runner(tmp_path, device="cuda")
    runner = open_runner(tmp_path, kv_memory_bytes=1 << 18)
    assert runner.max_model_len == runner.num_blocks * 16 < 4096
    runner.close()
