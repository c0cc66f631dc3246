"""Text that arrives token by token is what transformers decodes in one piece."""

import functools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tandem_router.tests.test_router_gguf_vocabulary import DEMO
from tandem_router.tests.test_router_text import byte_level, sentencepiece, word_piece
from tandem_router.text.loading import load_text_model
from tandem_router.text.tokenizer import HFTokenizer


def with_added_tokens() -> Tokenizer:
    """A byte-level BPE with added tokens whose letters aren't its alphabet's."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("naïve é", special=False), AddedToken("Ġx y", special=False)])
    tokenizer.add_special_tokens(["<é>", "<|end|>"])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = sentencepiece()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def gemma() -> Tokenizer:
    """The real one, of the demo package."""
    tokenizer = load_text_model(DEMO).tokenizer
    assert isinstance(tokenizer, HFTokenizer)
    return tokenizer._backend


@functools.cache
def pair(build: Callable[[], Tokenizer]) -> tuple[HFTokenizer, PreTrainedTokenizerFast]:
    backend = build()
    return HFTokenizer(backend), PreTrainedTokenizerFast(tokenizer_object=backend)


@settings(deadline=None)
@given(data=st.data())
def check(build: Callable[[], Tokenizer], data: st.DataObject) -> None:
    """Random ids, many of them bytes, in random cuts."""
    tokenizer, reference = pair(build)
    every = st.integers(0, tokenizer.vocab_size + 5)  # and some that are no token
    low = st.integers(0, min(tokenizer.vocab_size, 520))  # where the bytes are
    tokens = data.draw(st.lists(st.one_of(every, low, low), max_size=24))
    size, skip = data.draw(st.integers(1, 5)), data.draw(st.booleans())
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    parts = [detokenizer.feed(tokens[at : at + size]) for at in range(0, len(tokens), size)]
    expected = reference.decode(tokens, skip_special_tokens=skip)
    assert "".join(parts) + detokenizer.flush() == expected
    assert tokenizer.decode(tokens, skip_special_tokens=skip) == expected


@pytest.mark.parametrize(
    "build", [byte_level, with_added_tokens, sentencepiece, word_piece, metaspace]
)
def test_a_stream_is_what_transformers_decodes(build: Callable[[], Tokenizer]) -> None:
    check(build)


@pytest.mark.slow
def test_a_stream_of_gemma_is_what_transformers_decodes() -> None:
    check(gemma)


def test_bytes_that_are_no_text_together_are_shown_as_such() -> None:
    tokenizer, reference = pair(sentencepiece)
    tokens = [tokenizer.encode("€"), tokenizer.encode("😀")[:3], tokenizer.encode("g")]
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.feed(ids) for ids in tokens] == ["", "", "\ufffd" * 6 + "g"]
    assert reference.decode([token for ids in tokens for token in ids]) == "\ufffd" * 6 + "g"


def test_a_vocabulary_with_holes_reaches_to_its_last_id() -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 7}, merges=[]))
    assert HFTokenizer(backend).vocab_size == 8
