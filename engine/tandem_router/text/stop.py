"""Stop strings across token boundaries."""

from collections.abc import Collection, Sequence


class StopMatcher:
    """Passes text on until a stop string appears; holds back what may be the start of one.

    `feed` returns (text that is safe to show, True once a stop string was found). What comes after
    the stop string is never returned, the stop string itself only if it is among those `shown`.
    """

    __slots__ = ("_held", "_num_exempt", "_shown", "_stops")

    def __init__(self, stops: Sequence[str], shown: Collection[str] = ()) -> None:
        assert all(stops), "empty stop strings are refused at the API"
        self._stops = tuple(stops)
        self._shown = frozenset(shown)
        self._held = ""
        self._num_exempt = 0  # held characters that came while the matcher wasn't armed

    def feed(self, text: str, *, armed: bool = True) -> tuple[str, bool]:
        """Take new text; once True was returned, the matcher must not be fed any more.

        A stop string whose last character comes while the matcher isn't `armed` is plain text.
        """
        text = self._held + text
        if armed:
            found = [
                (at, len(stop), stop) for stop in self._stops if (at := self._find(text, stop)) >= 0
            ]
            if found:
                at, length, stop = min(found)
                self._held = ""
                return text[: at + length if stop in self._shown else at], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        self._num_exempt = max(0, self._num_exempt - cut) if armed else keep
        return text[:cut], False

    def _find(self, text: str, stop: str) -> int:
        return text.find(stop, max(0, self._num_exempt - len(stop) + 1))

    def flush(self) -> str:
        """The held-back text, when generation ended for another reason."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper start of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
