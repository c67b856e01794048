"""Plots, pictures, formulas and tables as text (SVG, MathML, HTML), quick enough to be made anew at every slider move.

Letters are in `currentColor`, curves in the CSS variables --c0 … --c5 of `STYLE`, which differ between light and dark
pages. Every plot and picture has a `viewBox` and fills the width it is given, and an `aria-label` for screen readers.
"""

import base64
import io
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from html import escape

import numpy as np
import PIL.Image

COLOURS = 6
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2")  # so that curves differ for those who do not see the colours
STYLE = """<style>
.ddpm{--c0:#1a63c0;--c1:#b34a00;--c2:#157a38;--c3:#8a2be2;--c4:#be185d;--c5:#0b7285;color:var(--body-text-color,inherit);
display:flex;flex-wrap:wrap;gap:14px;font-size:14px;line-height:1.4}
.ddpm>div{flex:1 1 min(100%,320px);min-width:0;display:grid;gap:14px;align-content:start}
.dark .ddpm{--c0:#79b4ff;--c1:#ffa15c;--c2:#5fe08a;--c3:#d0a6ff;--c4:#ff92c8;--c5:#5fd6ea}
.ddpm section{border:1px solid var(--border-color-primary,#8886);border-radius:10px;padding:12px;min-width:0;
container-type:inline-size}
.ddpm h2{margin:0 0 8px;font-size:16px;font-weight:600;color:inherit}
.ddpm p{margin:6px 0}
.ddpm svg{display:block;width:100%;height:auto;overflow:visible}
.ddpm svg text{fill:currentColor;font-size:12.5px;font-family:inherit;paint-order:stroke;stroke-width:3px;
stroke:var(--background-fill-primary,#fff0);stroke-linejoin:round}
@container (max-width:320px){.ddpm svg text{font-size:15px}}
.ddpm .pictures{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:10px}
.ddpm figure{margin:0}
.ddpm figcaption{font-size:13px;margin-top:4px}
.ddpm .keys{display:flex;flex-wrap:wrap;gap:2px 14px;list-style:none;margin:6px 0 0;padding:0;font-size:13px}
.ddpm .keys li{display:flex;align-items:center;gap:5px;margin:0}
.ddpm .keys svg{width:26px;flex:none}
.ddpm table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:13px;margin:6px 0 0}
.ddpm th,.ddpm td{text-align:right;padding:3px 4px;border-top:1px solid var(--border-color-primary,#8886);
font-weight:400}
.ddpm th:first-child{text-align:left}
.ddpm thead th{font-weight:600;border-top:0}
.ddpm .formula{display:grid;grid-template-columns:30px 1fr;align-items:center;gap:8px;margin:8px 0 2px;font-size:16px}
.ddpm .formula span{display:flex;flex-wrap:wrap;align-items:center;gap:4px}
.ddpm .formula b{font-size:12px;border:1px solid;border-radius:5px;text-align:center}
.ddpm math{font-family:"Latin Modern Math","STIX Two Math","Cambria Math",math,serif}
</style>"""
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_TOKENS = re.compile(r"\\[a-z]+|[^\W\d_][̀-ͯ]*|\d+(?:\.\d+)?|\S")


def number(value: float, digits: int = 4) -> str:
    """A number for people: `digits` significant digits, and powers of ten where it is far from 1."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞" if value < 0 else "–"
    if value == 0:  # also −0
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits}g}".replace("-", "−") if abs(value) < 10**digits else f"{value:.0f}".replace("-", "−")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.replace('-', '−')}·10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def with_error(value: float, error: float) -> str:
    """A measured number and its standard error, both to the first digit of the error."""
    decimals = max(0, -math.floor(math.log10(error))) if error > 0 else 4
    return f"{value:.{decimals}f} ± {error:.{decimals}f}".replace("-", "−")


def number_from_log(log: float, digits: int = 4) -> str:
    """As `number`, of e^log; also where that is too small or too large for a float."""
    if math.isinf(log) or abs(log) < 650:
        return number(math.exp(log), digits)
    exponent = math.floor(log / math.log(10))
    mantissa = math.exp(log - exponent * math.log(10))
    return f"{mantissa:.{digits - 1}f}·10{str(exponent).translate(_SUPERSCRIPTS)}"


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """At most `count` round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(step * power for step in (1, 2, 5, 10, 20) if (high - low) / (step * power) < count)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Plot:
    """One pair of axes, drawn with bars, curves, filled bells, points and lines.

    Args:
        label: what the plot shows, for screen readers.
        x, y: the ranges of the axes; of y the decimal logarithms if `log`.
        x_label: under the axis.
        height: of the drawing, whose width is 360.
        log: whether y is on a logarithmic axis.
        y_ticks: whether the values of y are written.
    """

    WIDTH, LEFT, RIGHT, TOP, BOTTOM = 360, 40, 8, 8, 34

    def __init__(
        self,
        label: str,
        x: tuple[float, float],
        y: tuple[float, float],
        x_label: str = "",
        height: int = 210,
        log: bool = False,
        y_ticks: bool = True,
    ):
        self.label, self.x, self.y, self.x_label = label, x, y, x_label
        self.height, self.log, self.y_ticks = height, log, y_ticks
        self.inner = (self.WIDTH - self.LEFT - self.RIGHT, height - self.TOP - self.BOTTOM)
        self.parts: list[str] = []

    def _place(self, xs: Sequence[float] | np.ndarray, ys: Sequence[float] | np.ndarray) -> np.ndarray:
        """Coordinates in the drawing, (n, 2). Values far outside stay just outside: renderers dislike large ones."""
        points = np.stack([np.asarray(xs, float), np.asarray(ys, float)], axis=-1)
        if self.log:
            with np.errstate(divide="ignore"):
                points[:, 1] = np.log10(points[:, 1])
        low, high = np.array([self.x[0], self.y[0]]), np.array([self.x[1], self.y[1]])
        share = ((points - low) / (high - low)).clip(-1, 2)
        share[:, 1] = 1 - share[:, 1]
        return share * self.inner

    @staticmethod
    def _path(points: np.ndarray) -> str:
        return "M" + "L".join(["%.1f %.1f"] * len(points)) % tuple(points.ravel())

    def curve(
        self,
        xs: Sequence[float] | np.ndarray,
        ys: Sequence[float] | np.ndarray,
        colour: int,
        dash: str = "",
        width: float = 2,
        fill: bool = False,
    ) -> None:
        """A line through points; with `fill`, the area under it as well."""
        path = self._path(self._place(xs, ys))
        ink = f"var(--c{colour})"
        if fill:
            base = self.inner[1]
            ends = self._place([xs[0], xs[-1]], [1.0, 1.0])[:, 0]
            closed = f"{path}L{ends[1]:.1f} {base}L{ends[0]:.1f} {base}Z"
            self.parts.append(f'<path d="{closed}" style="fill:{ink};fill-opacity:.2"/>')
        dashes = f";stroke-dasharray:{dash}" if dash else ""
        self.parts.append(
            f'<path d="{path}" style="fill:none;stroke:{ink};stroke-width:{width};stroke-linejoin:round{dashes}"/>'
        )

    def bars(self, edges: np.ndarray, heights: np.ndarray, colour: int) -> None:
        """A histogram: filled steps."""
        path = self._path(self._place(np.repeat(edges, 2)[1:-1], np.repeat(heights, 2)))
        base, ends = self.inner[1], self._place(edges[[0, -1]], [1.0, 1.0])[:, 0]
        path += f"L{ends[1]:.1f} {base}L{ends[0]:.1f} {base}Z"
        self.parts.append(f'<path d="{path}" style="fill:var(--c{colour});fill-opacity:.35"/>')

    def points(self, xs: Sequence[float], ys: Sequence[float], colours: Sequence[int], radius: float = 4) -> None:
        """Dots, with a rim in the colour of the page, so that they stand out from their curve."""
        for (x, y), colour in zip(self._place(xs, ys).tolist(), colours, strict=True):
            self.parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" '
                f'style="fill:var(--c{colour});stroke:var(--background-fill-primary,#fff);stroke-width:1"/>'
            )

    def upright(self, x: float, text: str, row: int = 0, colour: int | None = None, dash: str = "3 3") -> None:
        """A vertical line with a letter beside it, `row` lines of text below the top."""
        at = float(self._place([x], [1.0])[0, 0])
        ink = "currentColor" if colour is None else f"var(--c{colour})"
        style = f"stroke:{ink};stroke-width:{1.2 if dash else 3}" + (f";stroke-dasharray:{dash}" if dash else "")
        self.parts.append(f'<path d="M{at:.1f} 0V{self.inner[1]}" style="{style}"/>')
        anchor, shift = ("end", -4) if at > self.inner[0] - 40 else ("start", 4)
        self.parts.append(
            f'<text x="{at + shift:.1f}" y="{12 + 14 * row}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def svg(self) -> str:
        """The finished drawing."""
        width, height = self.inner
        axes = [f'<path d="M0 0V{height}H{width}" style="fill:none;stroke:currentColor;stroke-width:1;opacity:.6"/>']
        for tick in ticks(*self.x):
            at = self._place([tick], [1.0])[0, 0]
            axes.append(f'<text x="{at:.1f}" y="{height + 15}" text-anchor="middle">{number(tick, 3)}</text>')
        for tick in ticks(*self.y, 8 if self.log else 5) if self.y_ticks else []:
            if self.log and tick != int(tick):
                continue
            at = self._place([self.x[0]], [10.0**tick if self.log else tick])[0, 1]
            text = f"10{str(int(tick)).translate(_SUPERSCRIPTS)}" if self.log else number(tick, 3)
            axes.append(
                f'<path d="M0 {at:.1f}H{width}" style="stroke:currentColor;opacity:.15"/>'
                f'<text x="-5" y="{at + 4:.1f}" text-anchor="end">{text}</text>'
            )
        axes.append(f'<text x="{width / 2}" y="{height + 30}" text-anchor="middle">{escape(self.x_label)}</text>')
        # A nested <svg> cuts off what lies outside of it, without an id that would have to be unique in the page.
        return (
            f'<svg viewBox="0 0 {self.WIDTH} {self.height}" role="img" aria-label="{escape(self.label)}">'
            f'<g transform="translate({self.LEFT} {self.TOP})">{"".join(axes)}'
            f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            f'style="width:{width}px;height:{height}px;overflow:hidden">{"".join(self.parts)}</svg></g></svg>'
        )


def keys(entries: Sequence[tuple[int, str, str]]) -> str:
    """A legend.

    Args:
        entries: colour, dash ("fill" for an area, "dots" for points) and text of each; the text is HTML.
    """
    lines = []
    for colour, dash, text in entries:
        ink = f"var(--c{colour})"
        if dash == "fill":
            sign = f'<rect x="1" y="1" width="24" height="10" style="fill:{ink};fill-opacity:.35"/>'
        elif dash == "dots":
            sign = "".join(f'<circle cx="{x}" cy="6" r="3" style="fill:{ink}"/>' for x in (5, 13, 21))
        else:
            dashes = f";stroke-dasharray:{dash}" if dash else ""
            sign = f'<path d="M1 6H25" style="stroke:{ink};stroke-width:2.5{dashes}"/>'
        lines.append(f'<li><svg viewBox="0 0 26 12" aria-hidden="true">{sign}</svg><span>{text}</span></li>')
    return f'<ul class="keys">{"".join(lines)}</ul>'


def picture(pixels: np.ndarray, label: str, caption: str = "", mark: tuple[int, int] | None = None) -> str:
    """A small picture, each pixel a square.

    Args:
        pixels: uint8 (H, W) or (H, W, 3).
        label: what it shows, for screen readers.
        caption: HTML under it.
        mark: row and column of a pixel with a frame around it.
    """
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "png", compress_level=1)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    height, width = pixels.shape[:2]
    frame = ""
    if mark is not None:
        row, column = mark
        side, thick = max(height, width) / 24, max(height, width) / 60
        frame = (
            f'<rect x="{column + 0.5 - side / 2 - 0.5:.2f}" y="{row + 0.5 - side / 2 - 0.5:.2f}" '
            f'width="{side + 1:.2f}" height="{side + 1:.2f}" '
            f'style="fill:none;stroke:#ff3b30;stroke-width:{thick:.2f}"/>'
        )
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f'<image width="{width}" height="{height}" style="image-rendering:pixelated" '
        f'href="data:image/png;base64,{data}"/>{frame}</svg><figcaption>{caption}</figcaption></figure>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of HTML cells; the first of each row is its name."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"


def card(title: str, *body: str) -> str:
    """A framed part of the page with a title."""
    return f"<section><h2>{escape(title)}</h2>{''.join(body)}</section>"


def board(*columns: Sequence[str]) -> str:
    """Columns of cards with their style; on a narrow page below each other."""
    return STYLE + '<div class="ddpm">' + "".join(f"<div>{''.join(cards)}</div>" for cards in columns) + "</div>"


def formula(name: str, *pieces: str) -> str:
    r"""A numbered formula; between its pieces a narrow page may break the line.

    Args:
        name: such as "F9".
        pieces: in the characters of the formula, with _ for an index, ^ for a power, {…} for a group, \sqrt{…} and
            \frac{…}{…}: "x_t = \sqrt{ᾱ_t} x_0".
    """
    return f'<div class="formula"><b>{escape(name)}</b><span>{"".join(map(math_text, pieces))}</span></div>'


@lru_cache(maxsize=256)
def math_text(text: str) -> str:
    """A formula as MathML; see `formula`."""
    tokens = _TOKENS.findall(text)[::-1]
    return f'<math displaystyle="true">{_group(tokens)}</math>'


def _group(tokens: list[str]) -> str:
    """MathML of the tokens (the next one last) up to the end of the group, which are used up."""
    done: list[str] = []
    while tokens and tokens[-1] != "}":
        if tokens[-1] in "_^":
            kind = "msub" if tokens.pop() == "_" else "msup"
            base = done.pop()
            done.append(f"<{kind}>{base}{_atom(tokens)}</{kind}>")
        else:
            done.append(_atom(tokens))
    if tokens:
        tokens.pop()
    return f"<mrow>{''.join(done)}</mrow>"


def _atom(tokens: list[str]) -> str:
    token = tokens.pop()
    if token == "{":
        return _group(tokens)
    if token == "\\sqrt":
        # Without a font for mathematics the root reaches into what is under it.
        return f'<msqrt><mspace width="0.3em"/>{_atom(tokens)}</msqrt>'
    if token == "\\frac":
        return f"<mfrac>{_atom(tokens)}{_atom(tokens)}</mfrac>"
    if token[0].isalpha():
        return f"<mi>{token}</mi>"
    if token[0].isdigit():
        return f"<mn>{token}</mn>"
    # In a piece of a formula an operator may come first or last, where it would be set like a sign.
    form = ' form="infix"' if token in "+−=" else ""
    return f'<mo stretchy="false"{form}>{escape(token)}</mo>'
