"""Stop strings in a text that comes in pieces."""

import hypothesis
import pytest
from hypothesis import strategies as st

from hipgpt_jax.text import stops

LETTERS = st.text("ab\n", max_size=12)


def by_definition(text: str, strings: list[str]) -> tuple[str, str | None]:
    """Reads character by character until the text ends with a stop string; the longest of those that it ends with."""
    for end in range(1, len(text) + 1):
        ending = [string for string in strings if text[:end].endswith(string)]
        if ending:
            found = max(ending, key=len)
            return text[: end - len(found)], found
    return text, None


@hypothesis.given(st.lists(LETTERS, max_size=8), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
@hypothesis.settings(max_examples=500, deadline=None, derandomize=True, database=None)
def test_the_first_complete_match_ends_the_text_in_any_pieces(pieces: list[str], strings: list[str]) -> None:
    passing = stops.StopFilter(strings)
    got = "".join(map(passing.push, pieces)) + passing.finish()
    assert (got, passing.found) == by_definition("".join(pieces), strings)


@hypothesis.given(LETTERS, st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
@hypothesis.settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_only_a_possible_match_is_held_back(text: str, strings: list[str]) -> None:
    passing = stops.StopFilter(strings)
    passed = passing.push(text)
    hypothesis.assume(passing.found is None)
    held = text[len(passed) :]
    assert held == max(
        (string[:n] for string in strings for n in range(len(string)) if text.endswith(string[:n])), key=len
    )


@pytest.mark.parametrize(
    ("pieces", "strings", "text", "found"),
    [
        (["aaab"], ["aab"], "a", "aab"),
        (["a", "a", "a", "b", "c"], ["aab"], "a", "aab"),
        (["abc"], ["abc", "b"], "a", "b"),
        (["xyz"], ["z", "yz"], "x", "yz"),
        (["no", "ne"], ["nothing"], "none", None),
        (["e", "n", "d"], ["end"], "", "end"),
    ],
)
def test_examples(pieces: list[str], strings: list[str], text: str, found: str | None) -> None:
    passing = stops.StopFilter(strings)
    assert "".join(map(passing.push, pieces)) + passing.finish() == text
    assert passing.found == found
    assert passing.push("more") == ("" if found else "more")
