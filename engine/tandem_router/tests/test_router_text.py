"""Tokenizers, detokenizing, stop strings, templates."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from tandem_router.errors import InvalidRequest, ModelLoadError
from tandem_router.text.chat_template import ChatTemplate
from tandem_router.text.detokenizer import WindowDetokenizer
from tandem_router.text.loading import load_directory, load_text_model
from tandem_router.text.model import OFFLOAD_CHARACTERS, TextModel
from tandem_router.text.stop import StopMatcher
from tandem_router.text.tokenizer import ByteTokenizer, HFTokenizer, TextTokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. ",
    "Grüße aus 東京 😀! ",
    "def f(x): return x",
]
TEXT = "The dog's naïve 東京 trip 😀👩‍👩‍👧 cost  3.50 €\n\n\tdone."


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    letters = sorted(set("▁".join(CORPUS).replace(" ", "▁")) - set("東😀"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), *letters]
    tokens += ["▁T", "he", "▁The", "▁d", "og"]
    merges = [("▁", "T"), ("h", "e"), ("▁T", "he"), ("▁", "d"), ("o", "g")]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def word_piece() -> Tokenizer:
    words = ["[UNK]", "the", "dog", "##s", "run", "##ning", ".", "!"]
    tokenizer = Tokenizer(
        models.WordPiece(vocab={word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


@pytest.mark.parametrize("build", [byte_level, sentencepiece])
def test_detokenizing_equals_decoding(build: Callable[[], Tokenizer]) -> None:
    tokenizer = HFTokenizer(build(), bos_token="<s>")
    tokens = tokenizer.encode(TEXT)
    detokenizer = tokenizer.detokenizer()
    text = "".join(detokenizer.feed([token]) for token in tokens) + detokenizer.flush()
    assert text == tokenizer.decode(tokens) == TEXT
    assert b"".join(map(tokenizer.piece, tokens)).decode() == TEXT


@pytest.mark.parametrize("build", [byte_level, sentencepiece])
def test_random_tokens_detokenize_alike_however_they_are_cut(
    build: Callable[[], Tokenizer],
) -> None:
    tokenizer = HFTokenizer(build(), bos_token="<s>")
    chance = random.Random(1)
    for _ in range(50):
        tokens = [chance.randrange(tokenizer.vocab_size) for _ in range(30)]
        one = tokenizer.detokenizer()
        single = "".join(one.feed([token]) for token in tokens) + one.flush()
        whole = tokenizer.detokenizer()
        assert whole.feed(tokens) + whole.flush() == single
        if build is byte_level:
            assert single == tokenizer.decode(tokens)


def test_special_tokens_are_hidden_or_shown() -> None:
    tokenizer = HFTokenizer(byte_level(), bos_token="<s>")
    assert tokenizer.bos_token_id is not None
    tokens = [tokenizer.bos_token_id, *tokenizer.encode("hi<think>")]
    assert tokenizer.detokenizer().feed(tokens) == "hi<think>"
    assert tokenizer.detokenizer(skip_special_tokens=False).feed(tokens) == "<s>hi<think>"
    assert tokenizer.piece(10**6) == b""


def test_neighbour_dependent_decoders_take_the_window_method() -> None:
    tokenizer = HFTokenizer(word_piece())
    tokens = tokenizer.encode("the dogs running. the dog!")
    detokenizer = tokenizer.detokenizer(context=[1])
    text = "".join(detokenizer.feed([token]) for token in tokens) + detokenizer.flush()
    assert "the" + text == tokenizer.decode([1, *tokens])
    assert tokenizer.token_text(2) == "dog"


def test_window_detokenizer_holds_back_half_characters() -> None:
    raw = ByteTokenizer()
    detokenizer = WindowDetokenizer(raw.decode)
    fed = [detokenizer.feed([byte]) for byte in "a€b".encode()]
    assert fed == ["a", "", "", "€", "b"]
    detokenizer.feed([0xE2])
    assert detokenizer.flush() == "\ufffd"


@given(st.text(max_size=40), st.integers(1, 5))
def test_bytes_round_trip(text: str, size: int) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    detokenizer = tokenizer.detokenizer()
    parts = [detokenizer.feed(tokens[at : at + size]) for at in range(0, len(tokens), size)]
    assert "".join(parts) + detokenizer.flush() == text == tokenizer.decode(tokens)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1))
def test_stop_matcher_against_plain_search(text: str, stops: list[str]) -> None:
    check_matcher(StopMatcher(stops), text, stops)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1))
def test_a_shown_stop_is_the_end_of_the_text(text: str, stops: list[str]) -> None:
    """Alike but for the stop string itself, of those that are complete the one that began first."""
    hiding, showing = StopMatcher(stops), StopMatcher(stops, stops)
    for character in text:
        hidden, stopped = hiding.feed(character)
        shown, also = showing.feed(character)
        assert also == stopped
        if stopped:
            assert shown.startswith(hidden)
            assert shown[len(hidden) :] in stops
            return
        assert shown == hidden


def check_matcher(matcher: StopMatcher, text: str, stops: list[str]) -> None:
    shown = ""
    stopped = False
    for character in text:
        new, stopped = matcher.feed(character)
        shown += new
        if stopped:
            break
    if not stopped:
        shown += matcher.flush()
    # The first stop string to be complete decides, the earliest of those that are.
    for end in range(1, len(text) + 1):
        places = [at for stop in stops if (at := text[:end].find(stop)) >= 0]
        if places:
            assert stopped
            assert shown == text[: min(places)]
            return
    assert not stopped
    assert shown == text


def test_begin_of_sequence_is_added_once() -> None:
    backend = byte_level()
    tokenizer = HFTokenizer(backend, bos_token="<s>", adds_bos=True)
    bos = tokenizer.bos_token_id
    assert tokenizer.encode_prompt("hi")[:1] == [bos]
    assert tokenizer.encode_prompt("<s>hi") == tokenizer.encode_prompt("hi")
    assert tokenizer.encode_prompt("hi", add_special_tokens=False)[:1] != [bos]
    assert HFTokenizer(backend, bos_token="<s>").adds_bos is False
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    assert HFTokenizer(backend, bos_token="<s>").adds_bos is True


def test_templates() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ x }}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>"})
    messages = [{"role": "user", "content": "hi"}]
    assert template.render(messages, variables={"x": 1}) == "<s>[user]hi1"
    tools = ChatTemplate("{{ messages | tojson }}{{ strftime_now('%Y') }}", {})
    assert tools.render(messages).startswith('[{"role": "user"')
    refusing = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        refusing.render(messages)
    with pytest.raises(InvalidRequest):
        ChatTemplate("{{ messages.__class__.__mro__ }}", {}).render(messages)
    with pytest.raises(ModelLoadError):
        ChatTemplate("{% if %}", {})
    plain = ChatTemplate(None, {})
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "bye"},
    ]
    assert plain.render(conversation) == (
        "Be brief.\n\nUser: hi\nAssistant: yes?\nUser: bye\nAssistant:"
    )


async def test_long_texts_are_tokenized_in_a_thread() -> None:
    text = TextModel(ByteTokenizer(), ChatTemplate(None, {}))
    long = "x" * (OFFLOAD_CHARACTERS + 1)
    assert len(await text.encode_text(long)) == len(long)
    assert len(await text.encode_chat([{"role": "user", "content": long}])) > len(long)
    assert text.default_chat_stops == ("\nUser:",)


def write_model(path: Path, **config: object) -> None:
    byte_level().save(str(path / "tokenizer.json"))
    (path / "config.json").write_text('{"model_type": "llama", "vocab_size": 500}')
    (path / "tokenizer_config.json").write_text(json.dumps(config))


async def test_a_directory_with_a_template_of_its_own(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    write_model(
        tmp_path,
        bos_token={"content": "<s>"},
        eos_token="</s>",
        add_bos_token=True,
        chat_template=[{"name": "default", "template": template}],
    )
    text = load_text_model(f"file://{tmp_path}")
    assert text.tokenizer.adds_bos
    bos = text.tokenizer.bos_token_id
    assert text.vocab_size == 500
    chat = await text.encode_chat([{"role": "user", "content": "hi"}])
    assert chat == await text.encode_text("hi")
    assert [token for token in chat if token == bos] == [bos]
    assert text.default_chat_stops == ()
    (tmp_path / "chat_template.jinja").write_text("from the file")
    again = load_directory(tmp_path)
    assert again.template.render([]) == "from the file"


def test_models_without_what_is_needed_say_so(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="doesn't exist"):
        load_text_model("file:///nowhere/at/all")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        load_text_model(f"file://{tmp_path}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"config\.json lacks 'model_type'"):
        load_text_model(f"file://{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelLoadError, match="can't be read as a tokenizer"):
        load_text_model(f"file://{tmp_path}")
    write_model(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ModelLoadError, match="JSON"):
        load_text_model(f"file://{tmp_path}")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelLoadError, match="JSON object"):
        load_text_model(f"file://{tmp_path}")
    broken = tmp_path / "x.gguf"
    broken.write_bytes(b"nope")
    with pytest.raises(ModelLoadError, match="magic"):
        load_text_model(f"file://{broken}")


def test_byte_tokenizer_facts() -> None:
    tokenizer: TextTokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.bos_token_id) == (512, 256)
    assert tokenizer.decode([256, 65, 257, 400], skip_special_tokens=False) == "<bos>A<eos><400>"
    assert tokenizer.decode([256, 65, 257, 400]) == "A"
    assert tokenizer.token_text(0xC3) == "\ufffd"
