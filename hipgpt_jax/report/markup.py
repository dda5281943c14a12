"""A sample of a record file as HTML: its sums, its tokens, and the facts that a hover shows."""

import bisect
import html
import json
import math
import re
from collections.abc import Iterable

from hipgpt_jax.records import record

BITS = (1, 2, 4, 6, 8, 12)
"""Where one colour ends and the next begins, in bits of surprise."""
ALTERNATIVES = 5
"""Alternatives shown of each token, of those recorded."""

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_UNSEEN = re.compile(r"[ \x01-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]*")
_IN_SCRIPT = str.maketrans({char: f"\\u{ord(char):04x}" for char in "<>&"})


def escape(text: str) -> str:
    """Returns ``text`` for any place in HTML, attributes too, so that it is read back as it was.

    Two things HTML cannot hold: NUL becomes its symbol, half of a surrogate pair U+FFFD.

    >>> escape("<b class='x'>")
    '&lt;b class=&#x27;x&#x27;&gt;'
    """
    return _SURROGATE.sub("\ufffd", html.escape(text)).replace("\0", "␀").replace("\r", "&#13;")


def heading(sample: record.Record) -> str:
    """A sample's index and seed, how it ended and its sums."""
    ended = {"eos": "end token", "stop": f"stop {json.dumps(sample.stop, ensure_ascii=False)}"}
    facts = {"ended by": ended.get(sample.finish_reason, sample.finish_reason), "tokens": str(len(sample.ids))}
    if sample.prompt_dropped:
        facts["of the prompt not read"] = f"first {sample.prompt_dropped}"
    if sample.ids:
        total = math.fsum(sample.logprobs)
        mean = -total / len(sample.ids)
        facts["bits a token"] = f"{mean / math.log(2):z.2f}"
        facts["perplexity"] = f"{math.exp(mean):,.2f}" if mean < 700 else "∞"
        facts["log-probability"] = f"{total:z.2f}".replace("-", "−")
    pairs = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<h3>Sample {sample.sample} <small>seed {sample.seed}</small></h3><dl class="sums">{pairs}</dl>'


def body(sample: record.Record) -> str:
    """A sample's error, its tokens, and what a hover needs of them as JSON that nothing can close early."""
    error = "" if sample.error is None else f'<p class="error"><strong>Error</strong> {escape(sample.error)}</p>'
    if not sample.ids:
        return error or '<p class="empty">No tokens</p>'
    facts = {
        "id": sample.ids,
        "logprob": _short(sample.logprobs),
        "rank": sample.ranks,
        "margin": _short(sample.margins),
        "gap": _short(sample.gaps),
        "top": None if sample.top_logprobs is None else [_best(best) for best in sample.top_logprobs],
    }
    data = json.dumps(facts, separators=(",", ":"), allow_nan=False).translate(_IN_SCRIPT)
    label = f"Tokens of sample {sample.sample}; step with the left and right arrow keys"
    return (
        f'{error}<div class="text" dir="auto" tabindex="0" role="group" aria-label="{label}">{_spans(sample)}</div>'
        f'<script type="application/json">{data}</script>'
    )


def _spans(sample: record.Record) -> str:
    """A span for each token. Marks are CSS, so that copied text is the sample's own."""
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


def _best(tokens: tuple[tuple[int, float, str], ...]) -> list[tuple[int, float, str]]:
    return [(token, _round(logprob), text) for token, logprob, text in tokens[:ALTERNATIVES]]


def _short(values: Iterable[float]) -> list[float]:
    return [_round(value) for value in values]


def _round(value: float) -> float:
    return float(f"{value:.5g}")
