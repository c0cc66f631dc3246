"""Tokenizers behind one interface: Hugging Face's `tokenizers`, and plain bytes for mock models."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import tokenizers

from tandem_router.text.detokenizer import (
    BytesDetokenizer,
    Detokenizer,
    FallbackDetokenizer,
    WindowDetokenizer,
)

_CONTEXT_TOKENS = 6


class TextTokenizer(ABC):
    """Text to token ids and back for one model. Its ids are below `vocab_size`.

    `adds_bos`: whether the model wants its begin-of-sequence token before a plain prompt.
    """

    vocab_size: int
    bos_token_id: int | None
    adds_bos: bool

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written out in it are recognised, none is added."""

    @abstractmethod
    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence."""

    @abstractmethod
    def piece(self, token: int) -> bytes:
        """The bytes that one token stands for; special tokens are spelled out."""

    @abstractmethod
    def detokenizer(
        self, *, skip_special_tokens: bool = True, context: Sequence[int] = ()
    ) -> Detokenizer:
        """A fresh incremental detokenizer; `context` are the last prompt tokens."""

    def token_text(self, token: int) -> str:
        """One token for display in logprobs; undecodable bytes become U+FFFD."""
        return self.piece(token).decode("utf-8", "replace")

    def encode_prompt(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a plain prompt; the begin-of-sequence token once, where the model wants it."""
        tokens = self.encode(text)
        bos = self.bos_token_id
        if add_special_tokens and self.adds_bos and bos is not None and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        return tokens


class ByteTokenizer(TextTokenizer):
    """Bytes as tokens, for mock models: 0..255 bytes, 256 begin, 257 end, the rest unused."""

    def __init__(self) -> None:
        self.vocab_size = 512
        self.bos_token_id = 256
        self.adds_bos = False
        self._pieces = [bytes([value]) for value in range(256)]
        self._plain = [*self._pieces, *([b""] * (self.vocab_size - 256))]

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if skip_special_tokens:
            tokens = [token for token in tokens if token < 256]
        return b"".join(map(self.piece, tokens)).decode("utf-8", "replace")

    def piece(self, token: int) -> bytes:
        if token < 256:
            return self._pieces[token]
        return {256: b"<bos>", 257: b"<eos>"}.get(token, b"<%d>" % token)

    def detokenizer(
        self, *, skip_special_tokens: bool = True, context: Sequence[int] = ()
    ) -> Detokenizer:
        return BytesDetokenizer(self._plain.__getitem__ if skip_special_tokens else self.piece)


class HFTokenizer(TextTokenizer):
    """A `tokenizer.json`, loaded by the `tokenizers` library."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        adds_bos: bool | None = None,
    ) -> None:
        """`adds_bos` None: what the file's own post-processor does."""
        self._backend = backend
        # Ids may have holes, as when a token was given an id beyond the others.
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_token_id = backend.token_to_id(bos_token) if bos_token else None
        if adds_bos is None:
            with_special = backend.encode("a", add_special_tokens=True).ids
            adds_bos = self.bos_token_id is not None and with_special[:1] == [self.bos_token_id]
        self.adds_bos = adds_bos
        added = backend.get_added_tokens_decoder()
        self._special = {token for token, entry in added.items() if entry.special}
        self._added = {token: entry.content for token, entry in added.items()}
        self._style = _decoder_style(backend)
        self._byte_of = _byte_tokens(backend) if self._style == "sentencepiece" else {}
        self._pieces: dict[int, bytes] = {}
        self._shown: dict[int, bytes] = dict.fromkeys(self._special, b"")

    def encode(self, text: str) -> list[int]:
        # Only the batch call lets other threads run meanwhile; that matters for long texts.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return list(encoding.ids)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text = self._backend.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        assert isinstance(text, str)
        return text

    def piece(self, token: int) -> bytes:
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._build_piece(token)
        return found

    def _shown_piece(self, token: int) -> bytes:
        found = self._shown.get(token)
        if found is None:
            found = self._shown[token] = self.piece(token)
        return found

    def _build_piece(self, token: int) -> bytes:
        text = self._backend.id_to_token(token)
        if text is None:
            return b""
        if self._style == "bytelevel":
            table = _byte_level_alphabet()
            if all(character in table for character in text):
                return bytes(table[character] for character in text)
            return str(text).encode()
        if self._style == "sentencepiece":
            value = self._byte_of.get(token)
            if value is not None:
                return bytes([value])
            return str(text).replace("\u2581", " ").encode()
        return self.decode([token], skip_special_tokens=False).encode()

    def detokenizer(
        self, *, skip_special_tokens: bool = True, context: Sequence[int] = ()
    ) -> Detokenizer:
        if self._style == "sentencepiece":
            piece = self._shown_piece if skip_special_tokens else self.piece
            return FallbackDetokenizer(lambda token: piece(token).decode(), self._byte_of)
        if self._style == "bytelevel":
            return BytesDetokenizer(self._shown_piece if skip_special_tokens else self.piece)

        def decode(tokens: Sequence[int]) -> str:
            return self.decode(tokens, skip_special_tokens=skip_special_tokens)

        return WindowDetokenizer(decode, context[-_CONTEXT_TOKENS:])


def _decoder_style(backend: tokenizers.Tokenizer) -> str:
    """How the decoder treats tokens: "bytelevel", "sentencepiece", or "other" (needs context)."""
    if backend.decoder is None:
        return "other"
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        return "bytelevel"
    replaces_blank = all(
        step["pattern"] == {"String": "\u2581"} and step["content"] == " "
        for step in steps
        if step["type"] == "Replace"
    )
    # Strip only trims the very start of a text; what follows a prompt isn't one.
    is_fallback = (
        {"Replace", "ByteFallback"} <= kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"}
    )
    return "sentencepiece" if is_fallback and replaces_blank else "other"


def _byte_tokens(backend: tokenizers.Tokenizer) -> dict[int, int]:
    """The values of the tokens that SentencePiece falls back to for unknown characters."""
    names = {f"<0x{value:02X}>": value for value in range(256)}
    ids = {backend.token_to_id(name): value for name, value in names.items()}
    return {token: value for token, value in ids.items() if token is not None}


_ALPHABET: dict[str, int] = {}


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 as itself, the rest from U+0100."""
    if not _ALPHABET:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        _ALPHABET.update({chr(value): value for value in printable})
        hidden = [value for value in range(256) if value not in set(printable)]
        _ALPHABET.update({chr(0x100 + index): value for index, value in enumerate(hidden)})
    return _ALPHABET
