"""From token ids to text while they arrive, never splitting a character.

Where a tokenizer's decoder maps each token to bytes on its own (byte-level BPE, SentencePiece with
byte fallback), the text is the UTF-8 decoding of the concatenated bytes: one table look-up and one
incremental decode per token. Other decoders (WordPiece and the like) look at neighbours; for these
the prefix-offset method decodes a short window twice and takes the difference, as in vLLM and TGI.
"""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
_NEW_UTF8_DECODER = codecs.getincrementaldecoder("utf-8")


class Detokenizer(ABC):
    """One sequence's text. `feed` returns what became certain; `flush` what is left at the end."""

    @abstractmethod
    def feed(self, tokens: Sequence[int]) -> str:
        """Text that these tokens complete; bytes of an unfinished character are held back."""

    @abstractmethod
    def flush(self) -> str:
        """The held-back rest; an unfinished character becomes U+FFFD."""


class BytesDetokenizer(Detokenizer):
    """For decoders that turn each token into bytes independently of its neighbours."""

    __slots__ = ("_decode", "_piece")

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        self._piece = piece
        self._decode = _NEW_UTF8_DECODER("replace").decode

    def feed(self, tokens: Sequence[int]) -> str:
        if len(tokens) == 1:
            return self._decode(self._piece(tokens[0]))
        return self._decode(b"".join(map(self._piece, tokens)))

    def flush(self) -> str:
        return self._decode(b"", True)


class WindowDetokenizer(Detokenizer):
    """Prefix-offset method over any decode function; amortised constant work per token."""

    __slots__ = ("_decode", "_prefix", "_read", "_tokens")

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        """`context` are the last prompt tokens: they settle spaces at the seam."""
        self._decode = decode
        self._tokens = list(context)
        self._prefix = 0
        self._read = len(self._tokens)

    def feed(self, tokens: Sequence[int]) -> str:
        self._tokens += tokens
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        # Forget what no longer matters: the window starts at the previous reading position.
        self._tokens = self._tokens[self._read :]
        self._prefix, self._read = 0, len(self._tokens)
        return text

    def flush(self) -> str:
        text = self._new_text()
        self._prefix = self._read = len(self._tokens)
        return text

    def _new_text(self) -> str:
        before = self._decode(self._tokens[self._prefix : self._read])
        return self._decode(self._tokens[self._prefix :])[len(before) :]
