"""Draws the first sample of a record file as the page of hipgpt-inspect shows it, as SVG for light and dark screens.

The README's picture is made so:

  python docs/examples/quickstart.py
  python scripts/draw_page.py quickstart.jsonl docs/page

It has the records and the colours of the page, but not its fonts: an SVG does not know how wide a proportional font is.
"""

import bisect
import math
import re
import sys
from pathlib import Path

from hipgpt_jax.records import record
from hipgpt_jax.report import page

_WIDTH, _MARGIN, _CHAR, _LINE = 860, 24, 8.43, 27
_TOKEN_WIDTH = 360
_COLUMNS = int((_WIDTH - 3 * _MARGIN - _TOKEN_WIDTH) / _CHAR)
_FONT = 'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace"'
_CSS = Path(page.__file__).with_name("page.css").read_text(encoding="utf-8")
_COLOR = r"oklch\(([\d.]+) ([\d.]+) ([\d.]+)\)"


def _rgb(lightness: float, chroma: float, hue: float) -> str:
    """Converts a colour from OKLCH to sRGB.

    References: Björn Ottosson, A perceptual color space for image processing, 2020,
    https://bottosson.github.io/posts/oklab/
    """
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    gamma = (12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055 for x in linear)
    return "#" + "".join(f"{round(255 * min(1.0, max(0.0, x))):02x}" for x in gamma)


def _colors(text: str, is_dark: bool) -> list[str]:
    """Returns the colours of a CSS rule: of each ``light-dark(a, b)`` the one of the scheme, and single colours."""
    found = re.finditer(rf"light-dark\({_COLOR}, {_COLOR}\)|{_COLOR}", text)
    groups = [match.groups() for match in found]
    return [_rgb(*map(float, g[6:] if g[6] else g[3:6] if is_dark else g[:3])) for g in groups]


class _Drawing:
    """An SVG of one colour scheme, from the top down."""

    def __init__(self, is_dark: bool) -> None:
        self._parts: list[str] = []
        names = ("page", "card", "line", "ink", "quiet", "accent")
        rules = {name: re.search(rf"--{name}: (.*);", _CSS) for name in names}
        self.colors = {name: _colors(rule[1], is_dark)[0] for name, rule in rules.items() if rule}
        scale = {int(number): _colors(rule, is_dark) for number, rule in re.findall(r"^\.s(\d) \{(.*)\}$", _CSS, re.M)}
        # Background and ink of each level of surprisal; the first has no background.
        self.scale = [(scale.get(i, [""])[0], (*scale.get(i, [""]), self.colors["ink"])[1]) for i in range(7)]

    def box(self, x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", r: int = 3) -> None:
        size = f'width="{width:.1f}" height="{height:.1f}"'
        self._parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" {size} rx="{r}" fill="{fill}" stroke="{stroke}"/>')

    def text(self, x: float, y: float, text: str, color: str, size: int = 14, more: str = "") -> float:
        """Draws text in one line and returns its end."""
        length = len(text) * _CHAR * size / 14
        fit = f'textLength="{length:.1f}" lengthAdjust="spacingAndGlyphs"'
        at = f'x="{x:.1f}" y="{y:.1f}"'
        self._parts.append(f'<text {at} {fit} font-size="{size}" fill="{color}" {more}>{page.escape(text)}</text>')
        return x + length

    def svg(self, height: float) -> str:
        title = "<title>A sample with its tokens coloured by their surprisal</title>"
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" {_FONT} xml:space="preserve">'
        )
        ground = (
            f'<rect width="100%" height="100%" rx="8" fill="{self.colors["card"]}" stroke="{self.colors["line"]}"/>'
        )
        return "\n".join([head, title, ground, *self._parts, "</svg>", ""])


def draw(sample: record.Record, *, is_dark: bool) -> str:
    """Returns the SVG of a record."""
    drawing = _Drawing(is_dark)
    quiet, ink = drawing.colors["quiet"], drawing.colors["ink"]
    x = drawing.text(_MARGIN, 36, "Surprise, bits", quiet, 12) + 14
    for level, (low, high) in enumerate(zip((0, *page.BITS), (*page.BITS, None), strict=True)):
        background, color = drawing.scale[level]
        drawing.box(x, 22, 46, 20, background or drawing.colors["card"], drawing.colors["line"], 0)
        drawing.text(x + 8, 36, f"{low}+" if high is None else f"{low}–{high}", color, 12)
        x += 46
    bits = [-value / math.log(2) for value in sample.logprobs]
    x = drawing.text(_MARGIN, 78, f"Sample {sample.sample}", ink, 14, 'font-weight="600"')
    sums = f"seed {sample.seed}   {len(bits)} tokens   {sum(bits) / len(bits):.2f} bits per token"
    drawing.text(x + 16, 78, sums, quiet, 12)
    y = _draw_text(drawing, sample, bits, 118)
    listed = [index for index, rank in enumerate(sample.ranks) if rank <= page.ALTERNATIVES]
    if sample.top_logprobs and listed:
        y = max(y, _draw_token(drawing, sample, max(listed, key=bits.__getitem__), 102))
    return drawing.svg(y + _MARGIN)


def _draw_text(drawing: _Drawing, sample: record.Record, bits: list[float], y: float) -> float:
    """Draws the tokens on lines, breaking long ones, and returns the bottom."""
    column = 0
    for token, surprisal in zip(sample.tokens, bits, strict=True):
        background, color = drawing.scale[bisect.bisect_right(page.BITS, surprisal)]
        for piece in re.findall(r"\n|[^\n]+", token):
            shown = "⏎" if piece == "\n" else piece
            if column + len(shown) > _COLUMNS:
                column, y = 0, y + _LINE
            if background:
                drawing.box(_MARGIN + column * _CHAR, y - 16, len(shown) * _CHAR, 22, background)
            drawing.text(_MARGIN + column * _CHAR, y, shown, color)
            column, y = (0, y + _LINE) if piece == "\n" else (column + len(shown), y)
    return y + 10


def _draw_token(drawing: _Drawing, sample: record.Record, index: int, y: float) -> float:
    """Draws what the page shows when one points at a token, and returns the bottom."""
    quiet, ink, accent = (drawing.colors[name] for name in ("quiet", "ink", "accent"))
    best = (sample.top_logprobs or ())[index][: page.ALTERNATIVES]
    x, height = _WIDTH - _MARGIN - _TOKEN_WIDTH, 66 + 22 * len(best)
    drawing.box(x, y, _TOKEN_WIDTH, height, drawing.colors["page"], drawing.colors["line"], 8)
    x += 14
    drawing.text(x, y + 26, repr(sample.tokens[index]), ink, 14, 'font-weight="600"')
    share = math.exp(sample.logprobs[index])
    facts = f"rank {sample.ranks[index]}   probability {100 * share:.2g} %   {-math.log2(share):.2f} bits"
    drawing.text(x, y + 46, facts, quiet, 12)
    for row, (token, logprob, text) in enumerate(best):
        color, top = (accent if token == sample.ids[index] else ink), y + 70 + 22 * row
        drawing.text(x, top, repr(text), color, 12)
        drawing.box(x + 110, top - 9, 140 * math.exp(logprob), 8, color if color == accent else quiet, r=2)
        drawing.text(x + 266, top, f"{100 * math.exp(logprob):6.2f} %", quiet, 12)
    return y + height


def main() -> None:
    """Writes ``PREFIX-light.svg`` and ``PREFIX-dark.svg``."""
    if len(sys.argv) != 3:
        sys.exit("draw_page: error: give a record file and the beginning of the pictures' names")
    sample = next(record.read(Path(sys.argv[1])))
    for scheme in ("light", "dark"):
        Path(f"{sys.argv[2]}-{scheme}.svg").write_text(draw(sample, is_dark=scheme == "dark"), encoding="utf-8")


if __name__ == "__main__":
    main()
