"""From token ids to text while they arrive, never splitting a character.

Where a tokenizer's decoder maps each token to bytes on its own (byte-level BPE), the text is the
UTF-8 decoding of the concatenated bytes: one table look-up and one incremental decode per token.
With SentencePiece's byte fallback a token is text, or one byte of a run. Other decoders (WordPiece
and the like) look at neighbours; for these the prefix-offset method decodes a short window twice
and takes the difference, as in vLLM and TGI.
"""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

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


class FallbackDetokenizer(Detokenizer):
    """For SentencePiece with byte fallback, where most tokens are text and some a single byte.

    Consecutive bytes are a text together or, if they aren't UTF-8 as a whole, U+FFFD each. So they
    are held back until the next token that is text.
    """

    __slots__ = ("_byte_of", "_run", "_text_of")

    def __init__(self, text_of: Callable[[int], str], byte_of: Mapping[int, int]) -> None:
        """`byte_of`: the value of each token that stands for a byte; others have a text."""
        self._text_of = text_of
        self._byte_of = byte_of
        self._run = bytearray()

    def feed(self, tokens: Sequence[int]) -> str:
        shown = ""
        for token in tokens:
            value = self._byte_of.get(token)
            if value is not None:
                self._run.append(value)
            elif text := self._text_of(token):
                shown += self.flush() + text if self._run else text
        return shown

    def flush(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)


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
