"""What ``hipgpt-doctor`` finds: each finding a line, each trouble with what to do about it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: What was looked at, in a word.
        text: What was found.
        advice: What to do about it, on one line, where it is a trouble; else None.
    """

    topic: str
    text: str
    advice: str | None = None
