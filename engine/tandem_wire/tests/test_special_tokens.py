"""Where a generation ends and begins, whichever of a model's files says so."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tandem_wire.model_config import ModelFacts, read_model_facts
from tandem_wire.model_error import BadModelFileError

TURN = {"id": 9, "content": "<|turn_end|>", "special": True}
TOKENIZER = {"added_tokens": [TURN], "model": {"vocab": {"<s>": 1, "</s>": 2, "<start>": 7}}}


def facts_of(folder: Path, **files: Any) -> ModelFacts:
    """Facts of a Llama whose config names no token, with these JSON files beside it."""
    for name, content in {"config": {"model_type": "llama"}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return read_model_facts(folder)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer": TOKENIZER, "tokenizer_config": {"eos_token": "<|turn_end|>"}},
        {"tokenizer": TOKENIZER, "special_tokens_map": {"eos_token": {"content": "<|turn_end|>"}}},
        {
            "tokenizer_config": {
                "eos_token": {"content": "<|turn_end|>"},
                "added_tokens_decoder": {"9": {"content": "<|turn_end|>"}},
            }
        },
        {"added_tokens": {"<|turn_end|>": 9}, "tokenizer_config": {"eos_token": "<|turn_end|>"}},
        {"generation_config": {"eos_token_id": [9]}},
        {
            "tokenizer": {"model": {"vocab": [[f"<{n}>", 0.0] for n in range(12)]}},
            "tokenizer_config": {"eos_token": "<9>"},
        },
    ],
    ids=["tokenizer_config", "map", "decoder", "added_tokens", "generation_config", "unigram"],
)
def test_an_end_that_one_file_alone_knows_is_an_end(files: Any, tmp_path: Path) -> None:
    assert facts_of(tmp_path, **files).eos_token_ids == (9,)


def test_ends_of_several_files_add_up(tmp_path: Path) -> None:
    facts = facts_of(
        tmp_path,
        config={"model_type": "llama", "eos_token_id": 2},
        generation_config={"eos_token_id": [2, 5]},
        tokenizer=TOKENIZER,
        tokenizer_config={"eos_token": "<|turn_end|>"},
    )
    assert facts.eos_token_ids == (2, 5, 9)


def test_only_where_no_file_speaks_the_default_ends(tmp_path: Path) -> None:
    assert facts_of(tmp_path).eos_token_ids == (2,)  # LlamaConfig's
    silent = {"model_type": "llama", "eos_token_id": None}
    assert facts_of(tmp_path, config=silent).eos_token_ids == ()


def test_the_multimodal_whole_may_know_the_end(tmp_path: Path) -> None:
    config = {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": {"hidden_size": 64}}
    assert facts_of(tmp_path, config=config).eos_token_ids == (1, 106)


def test_the_beginning_comes_from_the_tokenizer_then_from_the_config(tmp_path: Path) -> None:
    config = {"model_type": "llama", "bos_token_id": 7}
    by_id = facts_of(tmp_path, config=config, tokenizer=TOKENIZER).special_tokens
    assert (by_id.texts["bos_token"], by_id.ids["bos_token"]) == ("<start>", 7)
    told = facts_of(tmp_path, tokenizer_config={"bos_token": "<s>"}).special_tokens
    assert (told.texts["bos_token"], told.ids["bos_token"]) == ("<s>", 1)
    mapped = facts_of(tmp_path, special_tokens_map={"bos_token": "</s>"}).special_tokens
    assert mapped.texts["bos_token"] == "</s>"  # as in transformers, the older file wins


def test_a_tokenizer_that_says_null_has_no_beginning(tmp_path: Path) -> None:
    config = {"model_type": "qwen2", "bos_token_id": 7}
    facts = facts_of(
        tmp_path, config=config, tokenizer=TOKENIZER, tokenizer_config={"bos_token": None}
    )
    assert "bos_token" not in facts.special_tokens.texts


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadModelFileError, match=r"tokenizer\.json is not a tokenizer"):
        facts_of(tmp_path, tokenizer=[], tokenizer_config={"eos_token": "</s>"})
    with pytest.raises(BadModelFileError, match=r"special_tokens_map\.json"):
        facts_of(tmp_path, special_tokens_map=[])


def write_vocabulary(path: Path, tokens: list[str], types: list[int], **ids: int) -> Path:
    """A GGUF file of a Qwen with these tokens."""
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, number in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}", number)
    writer.add_tensor("token_embd.weight", np.ones((len(tokens), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_ends_at_what_its_metadata_and_its_token_types_say(tmp_path: Path) -> None:
    tokens = ["a", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<eos>", "<turn>"]
    types = [1, 3, 3, 3, 1, 3]  # the text "<eos>" is no control token here
    path = write_vocabulary(tmp_path / "a.gguf", tokens, types, eos_token_id=1, bos_token_id=2)
    facts = read_model_facts(path)
    assert facts.eos_token_ids == (1, 3)
    assert facts.special_tokens.texts == {"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"}
    path = write_vocabulary(tmp_path / "b.gguf", tokens, types, eos_token_id=1, eot_token_id=5)
    assert read_model_facts(path).eos_token_ids == (1, 5, 3)
