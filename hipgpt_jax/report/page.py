"""A record file as one page: every token coloured by its surprise, and no way to the network."""

import base64
import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hipgpt_jax.records import record
from hipgpt_jax.report import markup

_STYLE, _SCRIPT = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
MARKER = b'<meta name="generator" content="hipgpt-inspect">'
"""Identifies a page of this package, near its beginning."""
_GROUPS = ("run", "settings", "numerics", "versions")
_NONE = {"settings.eos_id": -1, "numerics.xla_flags": ""}
_DIGEST = re.compile(r"[0-9a-f]{40,64}")

_Facts = tuple[tuple[str, str], ...]


@dataclasses.dataclass
class _Prompt:
    """A prompt's heading and, of each of its samples, the facts and the HTML before and after them."""

    heading: str
    samples: list[tuple[_Facts, str, str]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Page:
    """A page that grows by a record at a time and holds each as its HTML alone.

    Attributes:
        title: What the page is called.
        samples: How many records were added.
        tokens: How many tokens they have.
    """

    title: str
    samples: int = 0
    tokens: int = 0
    _prompts: dict[tuple[str, str], _Prompt] = dataclasses.field(default_factory=dict)
    _facts: dict[_Facts, _Facts] = dataclasses.field(default_factory=dict)

    @property
    def prompts(self) -> int:
        """How many prompts the records are of; an id that two texts share is two."""
        return len(self._prompts)

    def add(self, sample: record.Record) -> None:
        """Adds a record after those of the same prompt, a new prompt after the others."""
        facts = tuple(_facts(sample))
        facts = self._facts.setdefault(facts, facts)
        key = (sample.id, sample.prompt)
        if key not in self._prompts:
            self._prompts[key] = _Prompt(_prompt(sample))
        self._prompts[key].samples.append((facts, markup.heading(sample), markup.body(sample)))
        self.samples += 1
        self.tokens += len(sample.ids)

    def html(self) -> Iterator[str]:
        """Yields the page in pieces. Facts that differ between the records stand on each sample."""
        values: dict[str, list[str]] = {}
        for facts in self._facts:
            for name, value in facts:
                if value not in (known := values.setdefault(name, [])):
                    known.append(value)
        varying = {name for name, known in values.items() if len(known) > 1}
        yield _head(self.title)
        yield f"<header><h1>{markup.escape(self.title)}</h1>"
        yield f'<p class="lede">{count(self.samples, "sample")} of {count(self.prompts, "prompt")}, '
        yield f"{count(self.tokens, 'token')}</p>{_shared(values)}</header><main>\n"
        for prompt in self._prompts.values():
            yield f'<section>{prompt.heading}<div class="samples">\n'
            for facts, before, after in prompt.samples:
                own = "".join(_pair(name.partition(".")[2], value) for name, value in facts if name in varying)
                yield f"<article>{before}{f'<dl class=own>{own}</dl>' if own else ''}{after}</article>\n"
            yield "</div></section>\n"
        yield '</main><div id="tip" role="tooltip" aria-live="polite" hidden></div>'
        yield f"<script>{_SCRIPT}</script></body></html>\n"


def render(records: Iterable[record.Record], title: str) -> str:
    """Returns the whole page of some records."""
    page = Page(title)
    for sample in records:
        page.add(sample)
    return "".join(page.html())


def _head(title: str) -> str:
    style, script = (
        f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in (_STYLE, _SCRIPT)
    )
    bounds = zip((0, *markup.BITS), (*markup.BITS, None), strict=True)
    legend = "".join(
        f'<li><span class="s{i}">{low}{"+" if high is None else f"–{high}"}</span></li>'
        for i, (low, high) in enumerate(bounds)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{MARKER.decode()}
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src {style}; script-src {script}; \
base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<title>{markup.escape(title)}</title><style>{_STYLE}</style></head><body>
<nav aria-label="Legend"><span>Surprise, bits</span><ol>{legend}</ol><button type="button" id="theme"></button></nav>
"""


def _facts(sample: record.Record) -> Iterator[tuple[str, str]]:
    """Name, as ``group.field``, and value of every fact that the samples of one command share."""
    for group in _GROUPS:
        part = getattr(sample, group)
        for field in dataclasses.fields(part):
            name = f"{group}.{field.name}"
            yield name, _value(getattr(part, field.name), none=_NONE.get(name))
    yield "command.started", sample.started
    yield "command.argv", shlex.join(sample.argv) or "from Python"


def _value(value: Any, none: Any) -> str:
    if value is None or value == none or value == ():
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(json.dumps(item, ensure_ascii=False) for item in value) if isinstance(value, tuple) else str(value)


def _shared(values: dict[str, list[str]]) -> str:
    """The table of what all records share; what differs is named, with the values it takes where they are few."""
    groups = dict.fromkeys(_GROUPS, "")
    in_full = ""
    for name, known in values.items():
        group, _, field = name.partition(".")
        if group in groups:
            groups[group] += _pair(field, known[0]) if len(known) == 1 else _differs(field, known)
        if len(known) == 1 and (group not in groups or _DIGEST.fullmatch(known[0])):
            in_full += f"<dt>{_name(field)}</dt><dd><code>{markup.escape(known[0])}</code></dd>"
    tables = "".join(f"<div><h2>{group.title()}</h2><dl>{pairs}</dl></div>" for group, pairs in groups.items())
    more = f"<details><summary>Command and digests in full</summary><dl>{in_full}</dl></details>" if in_full else ""
    return f'<div class="facts">{tables}</div>{more}{_READING}'


_READING = """<details><summary>How to read this page</summary><p>A token’s surprise is −log₂ of the probability that \
the model gave it: 1 bit for one in 2, 4 bits for one in 16. Probability and rank are the model’s own: at temperature \
1, before the repetition penalty, top-k and top-p. Point at a token, tap it, or step through a focused text with ← and \
→. Its margin is how far the random number was from one that draws another token (at temperature 0, the gap of the two \
best logits); its gap is how far its logit was from its neighbour’s. Where both are small, other arithmetic may give \
another token. A dot is a token without text of its own, the first part of a character; what a stop string cut off \
is struck through.</p></details>"""


def _name(field: str) -> str:
    return field.replace("_", " ")


def _pair(field: str, value: str) -> str:
    if _DIGEST.fullmatch(value):
        return f'<dt>{_name(field)}</dt><dd title="{value}"><code>{value[:12]}</code>…</dd>'
    return f"<dt>{_name(field)}</dt><dd>{markup.escape(value)}</dd>"


def _differs(field: str, known: list[str]) -> str:
    few = len(known) <= 4 and not any(map(_DIGEST.fullmatch, known))
    values = markup.escape(" | ".join(known)) if few else "differs"
    return f'<dt>{_name(field)}</dt><dd class="differs">{values}</dd>'


def _prompt(sample: record.Record) -> str:
    name = f'<code title="{markup.escape(sample.id)}">{markup.escape(sample.id[:40])}</code>'
    return (
        f"<h2>Prompt {name} <small>{count(len(sample.prompt_ids), 'token')}</small></h2>"
        '<div class="prompt" dir="auto" tabindex="0" role="region" aria-label="Prompt">'
        f"{markup.escape(sample.prompt)}</div>"
    )


def count(number: int, noun: str) -> str:
    """Returns a number of things in words, ``3 samples``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
