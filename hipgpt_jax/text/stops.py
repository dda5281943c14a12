"""Strings at which a text ends, found while it streams."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass
class StopFilter:
    """Passes text on until it holds one of the stop strings, and nothing from there on.

    The stop string that is whole first counts, of those that are whole at once the longest, so the
    result does not depend on how the text was cut into pieces. What could still become a match, and no
    more, is held back.

    Attributes:
        stops: The strings, each of at least one character.
        found: The one that ended the text, or None.

    >>> filter = StopFilter(["aab"])
    >>> [filter.push(piece) for piece in ("x", "a", "aa", "b", "y")], filter.found
    (['x', '', 'a', '', ''], 'aab')
    """

    stops: Sequence[str]
    found: str | None = None
    _held: str = ""

    def push(self, text: str) -> str:
        """Takes the next piece and returns what is certain to stand before a match."""
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
        """Returns what was held back, which no further text can complete now."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of ``stop`` that ``text`` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
