"""Record files as HTML pages: every token coloured by its surprise, without access to the network."""

import base64
import bisect
import dataclasses
import hashlib
import html
import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hipgpt_jax.records import record

MARKER = b'<meta name="generator" content="hipgpt-inspect">'
"""Identifies a page of this package, near its beginning."""
BITS = (1, 2, 4, 6, 8, 12)
"""Bounds between the colours, in bits of surprise."""
ALTERNATIVES = 5
"""Alternatives shown per token, of those recorded."""

_STYLE, _SCRIPT = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
_GROUPS = ("run", "settings", "numerics", "versions")
_NONE = {"settings.eos_id": -1, "numerics.xla_flags": ""}
_DIGEST = re.compile(r"[0-9a-f]{40,64}")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_UNSEEN = re.compile(r"[ \x01-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]*")
_IN_SCRIPT = str.maketrans({char: f"\\u{ord(char):04x}" for char in "<>&"})

_Facts = tuple[tuple[str, str], ...]


@dataclasses.dataclass
class _Prompt:
    """HTML of a prompt.

    Attributes:
        heading: The heading and the text.
        samples: Per sample, its facts and the HTML before and after them.
    """

    heading: str
    samples: list[tuple[_Facts, str, str]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Page:
    """A page to which records are added. It keeps only their HTML.

    Attributes:
        title: Title of the page.
        samples: Number of records.
        tokens: Number of their tokens.
    """

    title: str
    samples: int = 0
    tokens: int = 0
    _prompts: dict[tuple[str, str], _Prompt] = dataclasses.field(default_factory=dict)
    _facts: dict[_Facts, _Facts] = dataclasses.field(default_factory=dict)

    @property
    def prompts(self) -> int:
        """Number of prompts; the same id with two texts counts as two."""
        return len(self._prompts)

    def add(self, sample: record.Record) -> None:
        """Adds a record to its prompt; prompts stay in the order of their first records."""
        facts = tuple(_facts(sample))
        facts = self._facts.setdefault(facts, facts)
        key = (sample.id, sample.prompt)
        if key not in self._prompts:
            self._prompts[key] = _Prompt(_prompt(sample))
        self._prompts[key].samples.append((facts, _heading(sample), _body(sample)))
        self.samples += 1
        self.tokens += len(sample.ids)

    def html(self) -> Iterator[str]:
        """Yields the page in pieces. Facts that differ between records are shown with each sample."""
        values: dict[str, list[str]] = {}
        for facts in self._facts:
            for name, value in facts:
                if value not in (known := values.setdefault(name, [])):
                    known.append(value)
        varying = {name for name, known in values.items() if len(known) > 1}
        yield _head(self.title)
        yield f"<header><h1>{escape(self.title)}</h1>"
        yield f'<p class="lede">{count(self.samples, "sample")} of {count(self.prompts, "prompt")}, '
        yield f"{count(self.tokens, 'token')}</p></header><aside>{_shared(values)}</aside><main>\n"
        for prompt in self._prompts.values():
            yield f'<section>{prompt.heading}<div class="samples">\n'
            for facts, before, after in prompt.samples:
                own = "".join(_pair(name.partition(".")[2], value) for name, value in facts if name in varying)
                yield f"<article>{before}{f'<dl class=own>{own}</dl>' if own else ''}{after}</article>\n"
            yield "</div></section>\n"
        yield '</main><div id="tip" role="tooltip" aria-live="polite" hidden></div>'
        yield f"<script>{_SCRIPT}</script></body></html>\n"


def render(records: Iterable[record.Record], title: str) -> str:
    """Returns the page of some records."""
    page = Page(title)
    for sample in records:
        page.add(sample)
    return "".join(page.html())


def _head(title: str) -> str:
    style, script = (
        f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in (_STYLE, _SCRIPT)
    )
    bounds = zip((0, *BITS), (*BITS, None), strict=True)
    legend = "".join(
        f'<li><span class="s{i}">{low}{"+" if high is None else f"–{high}"}</span></li>'
        for i, (low, high) in enumerate(bounds)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{MARKER.decode()}
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src {style}; script-src {script}; \
base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<title>{escape(title)}</title><style>{_STYLE}</style></head><body>
<nav aria-label="Legend"><span>Surprise, bits</span><ol>{legend}</ol><button type="button" id="theme"></button></nav>
"""


def _facts(sample: record.Record) -> Iterator[tuple[str, str]]:
    """Yields the facts shared by the samples of a command, as ``group.field`` and value."""
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
    """Returns the table of facts. Those that differ between records are marked, with their values if they are few."""
    groups = dict.fromkeys(_GROUPS, "")
    in_full = ""
    for name, known in values.items():
        group, _, field = name.partition(".")
        if group in groups:
            groups[group] += _pair(field, known[0]) if len(known) == 1 else _differs(field, known)
        if len(known) == 1 and (group not in groups or _DIGEST.fullmatch(known[0])):
            in_full += f"<dt>{_name(field)}</dt><dd><code>{escape(known[0])}</code></dd>"
    tables = "".join(f"<div><h2>{group.title()}</h2><dl>{pairs}</dl></div>" for group, pairs in groups.items())
    more = f"<details><summary>Command and digests in full</summary><dl>{in_full}</dl></details>" if in_full else ""
    return f'<div class="facts">{tables}</div>{more}{_READING}'


_READING = """<details><summary>How to read this page</summary><p>A token’s surprise is −log₂ of the probability that \
the model gave it: 1 bit for one in 2, 4 bits for one in 16. Probability and rank are the model’s own: at temperature \
1, before bias, bans, penalties and cuts; the sampled probability is that under the settings. Point at a token, tap \
it, or step through a focused text with ← and →. Its lead is how far logits must move apart for another candidate to \
be sampled; its cut, for the set of candidates to change so. Where one of them is small, other arithmetic may give \
another token. A dot is a token without text of its own, the first part of a character; text that \
a stop string cut off is struck through.</p></details>"""


def _name(field: str) -> str:
    return field.replace("_", " ")


def _pair(field: str, value: str) -> str:
    if _DIGEST.fullmatch(value):
        return f'<dt>{_name(field)}</dt><dd title="{value}"><code>{value[:12]}</code>…</dd>'
    return f"<dt>{_name(field)}</dt><dd>{escape(value)}</dd>"


def _differs(field: str, known: list[str]) -> str:
    few = len(known) <= 4 and not any(map(_DIGEST.fullmatch, known))
    values = escape(" | ".join(known)) if few else "differs"
    return f'<dt>{_name(field)}</dt><dd class="differs">{values}</dd>'


def _prompt(sample: record.Record) -> str:
    name = f'<code title="{escape(sample.id)}">{escape(sample.id[:40])}</code>'
    return (
        f"<h2>Prompt {name} <small>{count(len(sample.prompt_ids), 'token')}</small></h2>"
        '<div class="prompt" dir="auto" tabindex="0" role="region" aria-label="Prompt">'
        f"{escape(sample.prompt)}</div>"
    )


def _heading(sample: record.Record) -> str:
    """Returns a sample's index, seed, finish reason and totals."""
    ended = {"eos": "end token", "stop": f"stop {json.dumps(sample.stop, ensure_ascii=False)}"}
    facts = {"ended by": ended.get(sample.finish_reason, sample.finish_reason), "tokens": str(len(sample.ids))}
    if sample.prompt_dropped:
        facts["prompt tokens dropped"] = f"first {sample.prompt_dropped}"
    if sample.ids:
        total = math.fsum(sample.logprobs)
        mean = -total / len(sample.ids)
        facts["bits per token"] = f"{mean / math.log(2):z.2f}"
        facts["perplexity"] = f"{math.exp(mean):,.2f}" if mean < 700 else "∞"
        facts["log-probability"] = f"{total:z.2f}".replace("-", "−")
    pairs = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<h3>Sample {sample.sample} <small>seed {sample.seed}</small></h3><dl class="sums">{pairs}</dl>'


def _body(sample: record.Record) -> str:
    """Returns a sample's error, its tokens, and as JSON the facts that hovering shows."""
    error = "" if sample.error is None else f'<p class="error"><strong>Error</strong> {escape(sample.error)}</p>'
    if not sample.ids:
        return error or '<p class="empty">No tokens</p>'
    facts = {
        "id": sample.ids,
        "logprob": [*map(_round, sample.logprobs)],
        "rank": sample.ranks,
        "sampled": [*map(_round, sample.sampled_logprobs)],
        "kept": sample.kept,
        "lead": [*map(_distance, sample.leads)],
        "cut": [*map(_distance, sample.cuts)],
        "top": sample.top_logprobs
        and [
            [(token, _round(value), text) for token, value, text in best[:ALTERNATIVES]] for best in sample.top_logprobs
        ],
    }
    data = json.dumps(facts, separators=(",", ":"), allow_nan=False).translate(_IN_SCRIPT)
    label = f"Tokens of sample {sample.sample}; step with the left and right arrow keys"
    return (
        f'{error}<div class="text" dir="auto" tabindex="0" role="group" aria-label="{label}">{_spans(sample)}</div>'
        f'<script type="application/json">{data}</script>'
    )


def _spans(sample: record.Record) -> str:
    """Returns a span per token. Marks are CSS, so that copied text is the sample's own."""
    left = len(sample.text) if "".join(sample.tokens).startswith(sample.text) else math.inf
    last = len(sample.ids) - 1 if sample.finish_reason == "eos" else -1
    spans: list[str] = []
    for index, (token, logprob) in enumerate(zip(sample.tokens, sample.logprobs, strict=True)):
        names = f"s{bisect.bisect_right(BITS, -logprob / math.log(2))}"
        if not token:
            names += " end" if index == last else " part"
        elif token.strip(" ") and _UNSEEN.fullmatch(token):
            names += " line" if "\n" in token else " unseen"
        kept = int(min(left, len(token)))
        left -= kept
        cut = f"<s>{escape(token[kept:])}</s>" if kept < len(token) else ""
        spans.append(f'<span class="{names}">{escape(token[:kept])}{cut}</span>')
    return "".join(spans)


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def _distance(value: float) -> float | None:
    return None if value > 3e38 else _round(value)


def escape(text: str) -> str:
    """Returns ``text`` escaped for HTML and its attributes.

    HTML cannot represent two things: NUL becomes its symbol, and half of a surrogate pair U+FFFD.

    >>> escape("<b class='x'>")
    '&lt;b class=&#x27;x&#x27;&gt;'
    """
    return _SURROGATE.sub("\ufffd", html.escape(text)).replace("\0", "␀").replace("\r", "&#13;")


def count(number: int, noun: str) -> str:
    """Returns a number with its noun, such as ``3 samples``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
