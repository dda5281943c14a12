"""The page of a record file: its contents, and that no text can break its markup."""

import base64
import dataclasses
import fcntl
import hashlib
import html.parser
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import programs
import pytest
import records
from hypothesis import strategies as st

from hipgpt_jax.records import provenance, record
from hipgpt_jax.report import page

NASTY = [
    "</script><script>alert(1)</script>",
    "<!--",
    "<![CDATA[",
    "</style>",
    "\"' onmouseover=alert(1) x='",
    "&lt;&amp;&#0;",
    "\u2028\u2029\r\n\t\0",
    "\ufeff\u202e",
    "]]>",
    "😀é",
]


class Reader(html.parser.HTMLParser):
    """Parser of a page: elements, the text of the spans of each sample, and their facts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: dict[str, int] = {}
        self.attributes: set[str] = set()
        self.urls: list[str] = []
        self.samples: list[list[str]] = []
        self.facts: list[dict[str, Any]] = []
        self.headings: list[str] = []
        self._inside: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] = self.elements.get(tag, 0) + 1
        found = dict(attrs)
        self.attributes |= found.keys()
        self.urls += [value for name, value in attrs if name in ("src", "href", "srcset", "action") and value]
        if found.get("class") == "text":
            self.samples.append([])
        elif tag == "span" and "text" in self._inside:
            self.samples[-1].append("")
        if tag not in ("meta", "link", "br"):
            kind = "json" if found.get("type") == "application/json" else found.get("class") or tag
            self._inside.append(kind if tag != "span" else "span")

    def handle_endtag(self, tag: str) -> None:
        self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            return
        if self._inside[-1] == "json":
            self.facts.append(json.loads(data))
        if "text" in self._inside and "span" in self._inside:
            self.samples[-1][-1] += data
        if self._inside[-1] == "prompt":
            self.headings.append(data)


def read(*made: record.Record) -> Reader:
    return Reader(page.render(made, "a.jsonl"))


def shown(text: str) -> str:
    """Returns text with replacements for what HTML cannot represent."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text).replace("\0", "␀")


def test_a_token_is_a_span_with_facts() -> None:
    made = [
        records.babble(30, 1),
        records.with_tokens("a", "", "é", sample=1),
        records.make_record(id="q", prompt="No"),
    ]
    found = read(*made)
    assert [len(spans) for spans in found.samples] == [30, 3, 2]
    for spans, facts, one in zip(found.samples, found.facts, made, strict=True):
        assert spans == list(one.tokens)
        assert tuple(facts["id"]) == one.ids
        assert tuple(facts["rank"]) == one.ranks
        for name, values in (("logprob", one.logprobs), ("lead", one.leads), ("cut", one.cuts)):
            distances = [None if value == records.LARGEST else pytest.approx(value, rel=1e-4) for value in values]
            assert facts[name] == distances
        assert (facts["top"] is None) == (one.top_logprobs is None)
    assert [len(best) for best in found.facts[1]["top"]] == [5, 5, 5]
    assert found.headings == ["To be", "No"]


def test_the_best_five_alternatives_are_on_the_page() -> None:
    best = tuple(tuple((i, -0.5 - i, f"w{i}") for i in range(20)) for _ in range(2))
    (facts,) = read(records.make_record(top_logprobs=best)).facts
    assert facts["top"] == [[[i, -0.5 - i, f"w{i}"] for i in range(5)]] * 2


def test_sums_are_those_of_the_tokens() -> None:
    """Three bits per token: a perplexity of 8."""
    text = page.render([records.with_tokens(*"abcd")], "t")
    for name, value in (
        ("bits per token", "3.00"),
        ("perplexity", "8.00"),
        ("log-probability", "−8.32"),
        ("tokens", "4"),
    ):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in text
    assert 4 * math.log(8) == pytest.approx(8.32, abs=5e-3)


def test_colours_go_by_surprise() -> None:
    bits = (0.0, 0.9, 1.1, 3, 5, 7, 9, 13)
    made = records.with_tokens(*"abcdefgh", logprobs=tuple(-bit * math.log(2) for bit in bits))
    assert re.findall(r'<span class="s(\d)">[a-h]<', page.render([made], "t")) == [
        "0",
        "0",
        "1",
        "2",
        "3",
        "4",
        "5",
        "6",
    ]


def test_shared_facts_are_beside_the_text_and_others_with_the_samples() -> None:
    warm = dataclasses.replace(records.SETTINGS, temperature=1.5)
    text = page.render([records.make_record(), records.make_record(sample=1, settings=warm)], "t")
    head, body = text.split("</aside>")
    for value in ("shakespeare", "abababababab", "ab" * 32, "0.10.2", "hipgpt-generate --prompt"):
        assert value in head
    assert "<dt>temperature</dt><dd>1.0</dd>" not in head
    assert body.count("<dt>temperature</dt>") == 2
    assert "<dt>temperature</dt><dd>1.5</dd>" in body
    assert "<dt>top k</dt>" in head
    assert "<dt>top k</dt>" not in body


def test_all_facts_are_beside_the_text() -> None:
    head = page.render([records.make_record()], "t").partition("</aside>")[0]
    parts = (record.Run, record.Settings, record.Numerics, provenance.Versions)
    names = [field.name.replace("_", " ") for part in parts for field in dataclasses.fields(part)]
    assert [name for name in names if f"<dt>{name}</dt>" not in head] == []
    for name, value in (("eos id", "none"), ("plugin", "none"), ("git dirty", "no"), ("xla flags", "none")):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in head


def test_samples_are_grouped_by_prompt_in_file_order() -> None:
    """The same id over another text is another prompt."""
    order = [("b", "B", 1), ("a", "A", 0), ("b", "B", 0), ("b", "other", 5)]
    text = page.render([records.make_record(id=i, prompt=prompt, sample=n) for i, prompt, n in order], "t")
    found = re.findall(r"<h3>Sample \d|Prompt\">\w+<", text)
    assert " ".join(word[-1] if word[0] == "<" else word[8:-1] for word in found) == "B 1 0 A 0 other 5"
    assert "4 samples of 3 prompts, 8 tokens" in text


@pytest.mark.parametrize(
    ("token", "mark"),
    [("", "part"), ("\n", "line"), (" \n\n", "line"), ("\x1b", "unseen"), ("\0", ""), (" ", ""), ("a\n", "")],
)
def test_a_token_that_cannot_be_seen_has_a_mark(token: str, mark: str) -> None:
    text = page.render([records.with_tokens(token, "x", logprobs=(-2.0, -2.0))], "t")
    assert re.findall(r'<span class="(s2[ a-z]*)">', text)[-2:] == [f"s2 {mark}".strip(), "s2"]


def test_the_end_token_has_a_mark_of_its_own() -> None:
    text = page.render([records.with_tokens("", "x", "", finish_reason="eos")], "t")
    assert (text.count(' part">'), text.count(' end">')) == (1, 1)


@pytest.mark.parametrize("logprob", [-0.0, -1e-4])
def test_a_certain_sample_has_no_negative_zero(logprob: float) -> None:
    text = page.render([records.make_record(logprobs=(logprob, logprob))], "t")
    assert "<dd>0.00</dd></div><div><dt>perplexity</dt><dd>1.00</dd></div><div><dt>log-probability</dt><dd>0.00" in text


def test_dropped_prompt_tokens_are_shown() -> None:
    assert "<dd>first 4</dd>" in page.render([records.make_record(prompt_dropped=4)], "t")
    assert "<dd>first" not in page.render([records.make_record()], "t")


def test_text_cut_off_by_a_stop_string_is_struck_through() -> None:
    made = records.with_tokens("one", " two", " three", text="one t", finish_reason="stop", stop="wo")
    text = page.render([made], "t")
    assert "one</span>" in text
    assert " t<s>wo</s></span>" in text
    assert "<s> three</s></span>" in text
    assert "stop &quot;wo&quot;" in text


def test_an_error_is_shown() -> None:
    empty: dict[str, Any] = dict.fromkeys(("ids", "tokens", *record.STATISTICS[:-1]), ())
    made = records.make_record(text="", finish_reason="error", error="<no> good", **empty)
    text = page.render([made], "t")
    assert "&lt;no&gt; good" in text
    assert read(made).samples == []


TEXTS = st.text(max_size=6) | st.sampled_from(NASTY)


@hypothesis.given(st.lists(TEXTS, min_size=1, max_size=5), TEXTS, TEXTS, TEXTS.filter(bool))
@hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_no_text_breaks_the_markup(tokens: list[str], prompt: str, name: str, stop: str) -> None:
    """The elements and attributes are those of a page of plain words, and each text is read back as it was."""
    best = tuple(((1, -0.5, token),) for token in tokens)
    run = dataclasses.replace(records.RUN, name=name)
    changes: dict[str, Any] = {"finish_reason": "stop", "stop": stop, "top_logprobs": best, "argv": (name,), "run": run}
    found = read(records.with_tokens(*tokens, prompt=prompt, id=stop, error=name, **changes))
    plain = read(
        records.with_tokens(
            *(["x"] * len(tokens)),
            prompt="x",
            id="x",
            error="x",
            **{**changes, "stop": "x", "argv": ("x",), "run": run},
        )
    )
    assert found.elements == plain.elements
    assert found.attributes == plain.attributes
    assert found.samples == [[shown(token) for token in tokens]]
    assert [one[0][2] for one in found.facts[0]["top"]] == tokens
    assert found.headings == ([shown(prompt)] if prompt else [])


def test_nothing_reaches_the_network() -> None:
    text = page.render([records.babble(20, 3)], "t")
    assert read(records.babble(20, 3)).urls == []
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|import\(", text)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy[1]
    for tag in ("style", "script"):
        (part,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy[1]


def test_a_page_needs_no_jax() -> None:
    """It opens at once, and where no JAX runs."""
    code = "import sys, hipgpt_jax.cli.inspect; sys.exit(len({'jax', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture
def inspect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., programs.Result]:
    """Runs ``hipgpt-inspect`` in this process, in a directory with record files."""
    monkeypatch.chdir(tmp_path)
    made = [records.make_record(sample=i).to_json() + "\n" for i in range(3)]
    Path("a.jsonl").write_text("".join(made))
    Path("torn.jsonl").write_text("".join(made)[:-20])
    Path("empty.jsonl").write_text("")
    Path("other.jsonl").write_text("{}\n")
    return lambda *arguments: programs.call("inspect", *arguments, monkeypatch=monkeypatch, capsys=capsys)


def test_the_program_writes_the_page(inspect: Callable[..., programs.Result]) -> None:
    result = inspect("a.jsonl", "--html", "a.html", "--title", "My <samples>")
    assert (result.code, result.out) == (0, "")
    assert re.fullmatch(r"a\.html: 3 samples of 1 prompt, \d\d kB\n", result.err)
    assert "<title>My &lt;samples&gt;</title>" in Path("a.html").read_text()
    torn = inspect("--records", "torn.jsonl", "--html", "a.html")
    assert "torn.jsonl: skipped an incomplete last line" in torn.err
    assert "2 samples of 1 prompt" in torn.err


def test_a_page_replaces_an_older_page_and_nothing_else(inspect: Callable[..., programs.Result]) -> None:
    Path("a.html").touch()
    assert inspect("a.jsonl", "--html", "a.html").code == 0
    Path("link").symlink_to("a.html")
    assert inspect("a.jsonl", "--html", "link", "--title", "Other").code == 0
    assert Path("link").is_symlink()
    assert "<title>Other</title>" in Path("a.html").read_text()
    for content in ("thesis", "<!doctype html>\n<html><p>hipgpt-inspect</p>", Path("a.jsonl").read_text()):
        Path("a.html").write_text(content)
        for name in ("a.html", "link"):
            result = inspect("a.jsonl", "--html", name)
            assert result.code == 1
            assert f"--html {name} exists and is not a page of hipgpt-inspect: give another name" in result.err
            assert Path("a.html").read_text() == content
    os.link("a.jsonl", "hard.html")
    assert "--html hard.html is an input of this command" in inspect("a.jsonl", "--html", "hard.html").err


def test_a_page_goes_to_a_pipe(inspect: Callable[..., programs.Result]) -> None:
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 2**20)
    assert inspect("a.jsonl", "--html", "pipe").code == 0
    content = os.read(reader, 2**20)
    os.close(reader)
    assert content.startswith(b"<!doctype html>")
    assert content.endswith(b"</html>\n")
    assert "/dev/full cannot be written: No space left on device" in inspect("a.jsonl", "--html", "/dev/full").err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--html", "b.html"), "--records is required"),
        (("a.jsonl",), "--html is required"),
        (("none.jsonl", "--html", "b.html"), "record file not found: none.jsonl"),
        (("empty.jsonl", "--html", "b.html"), "empty.jsonl has no complete record"),
        (("other.jsonl", "--html", "b.html"), "other.jsonl line 1 is not a record"),
        (("a.jsonl", "--html", "a.jsonl"), "--html a.jsonl is an input of this command"),
        (("a.jsonl", "--html", "none/b.html"), "there is no directory none"),
        (("a.jsonl", "--html", "."), "is a directory"),
        (("a.jsonl", "b.jsonl", "--html", "b.html"), "unexpected argument 'b.jsonl'"),
        (("a.jsonl", "--frob", "--html", "b.html"), "unknown flag --frob: "),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_page(
    inspect: Callable[..., programs.Result], arguments: tuple[str, ...], message: str
) -> None:
    result = inspect(*arguments)
    assert (result.code, result.out) == (1, "")
    assert re.fullmatch(f"inspect: error: .*{message}.*\n", result.err)
    assert not Path("b.html").exists()
