"""Stop strings, matched while a text streams."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass
class StopFilter:
    """Streaming filter that ends a text before the first match of a stop string.

    The first match is the one that is complete first; of several that end at one character, the longest. The result
    therefore does not depend on how the text is divided into pieces. Text is held back only if it may become a match.

    Attributes:
        stops: Stop strings, each of at least one character.
        found: The stop string that ended the text, or None.

    >>> filter = StopFilter(["aab"])
    >>> [filter.push(piece) for piece in ("x", "a", "aa", "b", "y")], filter.found
    (['x', '', 'a', '', ''], 'aab')
    """

    stops: Sequence[str]
    found: str | None = None
    _held: str = ""

    def push(self, text: str) -> str:
        """Takes the next piece and returns the text that cannot be part of a match."""
        if self.found is not None:
            return ""
        if not self.stops:
            return text
        text = self._held + text
        matches = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self.stops if stop in text]
        if matches:
            end, _, self.found = min(matches)
            self._held = ""
            return text[: end - len(self.found)]
        keep = max(_overlap(text, stop) for stop in self.stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Returns the text that was held back, at the end of the text."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest proper prefix of ``stop`` that is a suffix of ``text``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
