"""A model whose only tokenizer file is SentencePiece's tokenizer.model."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from tandem_router.errors import ModelLoadError
from tandem_router.text.loading import load_directory, load_text_model
from tandem_wire.model_config import read_model_facts

PIECES = ["▁", "h", "e", "l", "o", "w", "r", "d", "he", "ll", "hell", "▁hell", "▁w", "or", "ld"]
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), *PIECES]
SCORES = [0.0] * 259 + [-float(index) for index in range(len(PIECES))]
TYPES = [2, 3, 3] + [6] * 256 + [1] * len(PIECES)
TEXTS = ["hello world", " lead", "hello  world held", "wörld 😀", "hell</s> world</s>he", "a<x> he"]


def _field(number: int, value: int | bytes) -> bytes:
    """One field of a protocol buffer."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value % (1 << 64))
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def write_model(folder: Path, *, kind: int = 2, prefix: int = 1, **config: Any) -> None:
    """A Llama with a tokenizer.model as SentencePiece writes it."""
    pieces = b"".join(
        _field(1, _field(1, token.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, type_))
        for token, score, type_ in zip(TOKENS, SCORES, TYPES, strict=True)
    )
    trainer = _field(3, kind) + _field(41, 1) + _field(42, 2) + _field(43, -1)
    content = pieces + _field(2, trainer) + _field(3, _field(3, prefix) + _field(4, 0))
    (folder / "tokenizer.model").write_bytes(content)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("legacy", [False, True])
def test_tokens_are_those_of_transformers(legacy: bool, tmp_path: Path) -> None:
    added = {"274": {"content": "<x>", "special": False, "normalized": False}}
    write_model(tmp_path, legacy=legacy, added_tokens_decoder=added)
    text = load_directory(tmp_path)
    vocab = {token: number for number, token in enumerate(TOKENS)}
    scores = dict(zip(TOKENS, SCORES, strict=True))
    merges = generate_merges(vocab, vocab_scores=scores)
    reference = LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy)
    reference.add_tokens(["<x>"])
    for content in TEXTS:
        tokens = text.tokenizer.encode(content)
        assert tokens == reference.encode(content, add_special_tokens=False), content
        shown = text.tokenizer.decode(tokens, skip_special_tokens=False)
        assert shown == reference.decode(tokens)
    begun = text.tokenizer.encode_prompt("he")
    assert begun == [1, *reference.encode("he", add_special_tokens=False)]


def test_its_ends_are_known_to_router_and_worker(tmp_path: Path) -> None:
    write_model(tmp_path, eos_token="<end>")
    (tmp_path / "added_tokens.json").write_text('{"<end>": 274}')
    facts = read_model_facts(tmp_path)
    assert facts.eos_token_ids == (274,)
    assert facts.special_tokens.texts == {"bos_token": "<s>", "eos_token": "<end>"}
    assert load_directory(tmp_path).tokenizer.bos_token_id == 1
    write_model(tmp_path)
    assert read_model_facts(tmp_path).special_tokens.ids == {"bos_token": 1, "eos_token": 2}


def test_what_can_not_be_read_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, kind=1)
    with pytest.raises(ModelLoadError, match="another type than BPE"):
        load_text_model(f"file://{tmp_path}")
    write_model(tmp_path, added_tokens_decoder={"900": {"content": "<x>"}})
    with pytest.raises(ModelLoadError, match="'<x>' has the id 900"):
        load_text_model(f"file://{tmp_path}")
    write_model(tmp_path)
    whole = (tmp_path / "tokenizer.model").read_bytes()
    for content in (whole[:-5], b"", b"\xff" * 30, b"\x0b", b"\x08\x01"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ModelLoadError, match=r"tokenizer\.model (is not a|has no pieces)"):
            load_text_model(f"file://{tmp_path}")
