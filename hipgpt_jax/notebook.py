"""Display of runs and records in notebooks."""

import functools
import html
import importlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import SupportsIndex, overload

from hipgpt_jax.records import record

_SECONDS_BETWEEN_UPDATES = 0.5
_MAX_SHOWN = 200  # samples of one page


class Records(list[record.Record]):
    """A list of records that a notebook shows as the page of ``hipgpt-inspect``."""

    @overload
    def __getitem__(self, index: SupportsIndex) -> record.Record: ...

    @overload
    def __getitem__(self, index: slice) -> "Records": ...

    def __getitem__(self, index: SupportsIndex | slice) -> "record.Record | Records":
        """Returns a record, or those of a slice, which are shown as a page too."""
        return Records(super().__getitem__(index)) if isinstance(index, slice) else super().__getitem__(index)

    def _repr_html_(self) -> str:
        from hipgpt_jax.report import page

        title = f"{page.count(len(self), 'record')}"
        if len(self) > _MAX_SHOWN:
            title = f"The first {_MAX_SHOWN} of {title}"
        # The page has a style, a script and a security policy of its own, which apply only to a document of its own.
        document = html.escape(page.render(self[:_MAX_SHOWN], title))
        style = "width: 100%; height: 32rem; border: 1px solid #8888"
        return f'<iframe srcdoc="{document}" style="{style}" title="{title}"></iframe>'


def table(facts: Mapping[str, object]) -> str:
    """Returns facts as an HTML table."""
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(fact))}</td></tr>" for name, fact in facts.items()
    )
    return f"<table>{rows}</table>"


def progress(records: Iterable[record.Record], *, compiles: bool) -> Iterator[record.Record]:
    """Yields records; in a notebook, shows their number and the speed below the cell unless they take no time.

    Args:
        records: The records.
        compiles: Whether the first one takes long.
    """
    if "ipykernel" not in sys.modules:
        yield from records
        return
    display = functools.partial(importlib.import_module("IPython.display").display, raw=True, display_id=True)
    shown = display(_plain("compiling")) if compiles else None
    started = updated = time.monotonic()
    number = tokens = 0
    for each in records:
        yield each
        number, tokens, now = number + 1, tokens + len(each.ids), time.monotonic()
        if now - updated >= _SECONDS_BETWEEN_UPDATES:
            updated = now
            shown = shown or display(_plain(""))
            shown.update(_plain(f"{number} samples, {tokens / (now - started):.0f} tokens/s"), raw=True)
    if shown:
        shown.update(_plain(f"{number} samples, {tokens} tokens in {time.monotonic() - started:.1f} s"), raw=True)


def _plain(text: str) -> dict[str, str]:
    return {"text/plain": text}
