"""The tab Bayes of the page: prior, likelihood, product and posterior of x_s as bells (R2, R3, R4, R7)."""

import math
from typing import Any

import numpy as np
import PIL.Image

from ..schedules import BETA_SCHEDULES
from . import noising, svg
from .examples import example, picture_input, slider
from .limits import Limits
from .noising import T, whole
from .posterior import Bayes, bayes, measured, steps

VIEW = (-3.5, 3.5)
PRIOR, LIKELIHOOD, PRODUCT, POSTERIOR = 0, 1, 2, 3  # colours
TEXTS = {
    "en": {
        "t": "t (1 … T = 1000)",
        "s": "s (0 … t − 1)",
        "follows": "s = t − 1: one step back (R2–R4)",
        "x_0": "x₀, the picture’s pixel",
        "x_t": "xₜ, the noised pixel",
        "zoom": "Zoom to the bells",
        "schedule": "β schedule (F4)",
        "row": "Pixel, from the top (%)",
        "column": "Pixel, from the left (%)",
        "again": "Other noise",
        "bells": "Which xₛ led to xₜ? t = {t}, s = {s}",
        "real": "The same for a pixel of a picture",
        "plot": "bells of prior, likelihood, product and posterior; the posterior has mean {0} and variance {1}",
        "axis": "xₛ",
        "prior": "prior",
        "likelihood": "likelihood",
        "product": "product",
        "posterior": "posterior",
        "as of": "in x<sub>s</sub>",
        "same height": "Each bell is drawn to the same height, 1.",
        "mean": "mean",
        "variance": "variance",
        "square": "Multiply, complete the square ({0})",
        "is": "number",
        "A": "A, from x<sub>s</sub><sup>2</sup>",
        "B": "B, from x<sub>s</sub>",
        "measured": "on a grid",
        "evidence": "q(x<sub>t</sub> | x<sub>0</sub>), by R3 and as the product’s area",
        "weight": "weight of",
        "by": "by",
        "point": "s = 0: x<sub>s</sub> is x<sub>0</sub>. Prior and posterior are that one point; A and B are infinite.",
        "formulas": "The formulas",
        "clipped": "s was set to {s}: it must be less than t.",
        "pictures": "Picture, noised picture, mean of the posterior",
        "original": "x<sub>0</sub>, here {0}",
        "noised": "x<sub>t</sub> by F9, here {0}",
        "posterior mean": "μ̃<sub>t</sub>, here {0}",
        "labels": "the picture x_0|x_t|the posterior mean of every pixel",
        "gray": "Pictures are gray here. Framed: the pixel whose bells these are (row {row}, column {column}).",
    },
    "zh": {
        "t": "t（1 … T = 1000）",
        "s": "s（0 … t − 1）",
        "follows": "s = t − 1：退回一步（R2–R4）",
        "x_0": "x₀，图片的像素",
        "x_t": "xₜ，加噪后的像素",
        "zoom": "放大到钟形",
        "schedule": "β 方案（F4）",
        "row": "像素，距上边（%）",
        "column": "像素，距左边（%）",
        "again": "换一份噪声",
        "bells": "xₜ 从哪个 xₛ 来？t = {t}，s = {s}",
        "real": "对图片的一个像素做同样的事",
        "plot": "先验、似然、乘积与后验的钟形；后验均值 {0}，方差 {1}",
        "axis": "xₛ",
        "prior": "先验",
        "likelihood": "似然",
        "product": "乘积",
        "posterior": "后验",
        "as of": "作为 x<sub>s</sub> 的函数",
        "same height": "每个钟形都画成同样的高度 1。",
        "mean": "均值",
        "variance": "方差",
        "square": "相乘，配方（{0}）",
        "is": "数值",
        "A": "A，来自 x<sub>s</sub><sup>2</sup>",
        "B": "B，来自 x<sub>s</sub>",
        "measured": "在网格上",
        "evidence": "q(x<sub>t</sub> | x<sub>0</sub>)：由 R3，以及乘积的面积",
        "weight": "权重：",
        "by": "由",
        "point": "s = 0：x<sub>s</sub> 就是 x<sub>0</sub>。先验与后验都是这一个点；A 与 B 为无穷大。",
        "formulas": "公式",
        "clipped": "s 取为 {s}：它必须小于 t。",
        "pictures": "图片、加噪的图片、后验的均值",
        "original": "x<sub>0</sub>，此处 {0}",
        "noised": "x<sub>t</sub>，由 F9，此处 {0}",
        "posterior mean": "μ̃<sub>t</sub>，此处 {0}",
        "labels": "图片 x_0|x_t|每个像素的后验均值",
        "gray": "这里的图片是灰度的。方框是第 {row} 行第 {column} 列的像素，钟形就是它的。",
    },
}


def view(found: Bayes, zoom: bool) -> tuple[float, float]:
    """The range of x_s that is drawn; zoomed, all bells with 4 deviations, as far as they lie within ±8."""
    if not zoom:
        return VIEW
    bells = [(found.prior_mean, found.prior_variance), found.likelihood, (found.mean, found.variance)]
    low = min(mean - 4 * math.sqrt(variance) for mean, variance in bells)
    high = max(mean + 4 * math.sqrt(variance) for mean, variance in bells)
    return max(low, -8.0), min(high, 8.0)


def bells_plot(words: dict[str, str], found: Bayes, zoom: bool) -> str:
    """The four bells as SVG, each to the height 1."""
    low, high = view(found, zoom)
    show = svg.number
    label = words["plot"].format(show(found.mean), show(found.variance))
    plot = svg.Plot(label, (low, high), (0, 1.5), words["axis"], height=250, y_ticks=False)

    def bell(mean: float, variance: float, colour: int, dash: str = "", fill: bool = True) -> None:
        if variance == 0:
            return plot.upright(mean, "", colour=colour, dash=dash and "6 6")
        near = mean + math.sqrt(variance) * np.linspace(-4, 4, 49)
        x = np.union1d(np.linspace(low, high, 61), near[(near >= low) & (near <= high)])
        plot.curve(x, np.exp(-((x - mean) ** 2) / (2 * variance)), colour, dash, fill=fill)

    bell(found.prior_mean, found.prior_variance, PRIOR)
    bell(*found.likelihood, LIKELIHOOD)
    bell(found.mean, found.variance, POSTERIOR, "7 3")
    if found.s > 0:
        product = measured(found)
        inside = (product.height > 0.003) & (product.x >= low) & (product.x <= high)
        chosen = np.flatnonzero(inside)[:: max(1, int(inside.sum()) // 14)]
        plot.points(product.x[chosen].tolist(), product.height[chosen].tolist(), [PRODUCT] * len(chosen), 3)
    plot.upright(found.x_0, "x₀")
    plot.upright(found.x_t, "xₜ", row=1)
    plot.upright(found.mean, "μ̃", row=2, colour=POSTERIOR)
    return plot.svg()


def _legend(words: dict[str, str]) -> str:
    return svg.keys(
        [
            (PRIOR, "fill", f"{words['prior']} q(x<sub>s</sub> | x<sub>0</sub>)"),
            (LIKELIHOOD, "fill", f"{words['likelihood']} q(x<sub>t</sub> | x<sub>s</sub>), {words['as of']}"),
            (PRODUCT, "dots", f"{words['product']}, {words['measured']}"),
            (POSTERIOR, "7 3", f"{words['posterior']} q(x<sub>s</sub> | x<sub>t</sub>, x<sub>0</sub>)"),
        ]
    )


def bells_card(words: dict[str, str], title: str, found: Bayes, zoom: bool, note: str = "") -> str:
    """The bells, and mean and variance of each."""
    show = svg.number
    product = (found.x_0, 0.0) if found.s == 0 else measured(found)[3:]
    rows = [
        ("prior", "R3", found.prior_mean, found.prior_variance),
        ("likelihood", "R3", *found.likelihood),
        ("product", words["measured"], *product),
        ("posterior", found.name, found.mean, found.variance),
    ]
    lines = [(f"{words[name]} ({by})", show(mean, 5), show(variance, 5)) for name, by, mean, variance in rows]
    if found.s == 0:
        note += f"<p>{words['point']}</p>"
    numbers = svg.table(("", words["mean"], words["variance"]), lines)
    return svg.card(
        title, note, bells_plot(words, found, zoom), _legend(words), f"<p>{words['same height']}</p>", numbers
    )


def square_card(words: dict[str, str], found: Bayes) -> str:
    """A and B of the completed square, what follows from them, and the function's numbers beside the grid's."""
    show = svg.number
    exact = found.s > 0
    inverse, quotient = (1 / found.A, found.B / found.A) if exact else (0.0, found.x_0)
    product = measured(found) if exact else None
    area = svg.number_from_log(product.log_area, 5) if product else "–"
    rows = [
        (words["A"], show(found.A, 6), ""),
        (words["B"], show(found.B, 6), ""),
        ("1/A", show(inverse, 6), ""),
        (
            f"β̃<sub>t</sub>, {words['by']} {found.name}",
            show(found.variance, 6),
            show(product.variance, 6) if product else "–",
        ),
        ("B/A", show(quotient, 6), ""),
        (f"μ̃<sub>t</sub>, {words['by']} {found.name}", show(found.mean, 6), show(product.mean, 6) if product else "–"),
        (f"{words['weight']} x<sub>0</sub>", show(found.of_original, 5), ""),
        (f"{words['weight']} x<sub>t</sub>", show(found.of_sample, 5), ""),
        (words["evidence"], svg.number_from_log(found.log_evidence, 5), area),
    ]
    return svg.card(words["square"].format(found.name), svg.table(("", words["is"], words["measured"]), rows))


def formulas_card(words: dict[str, str], number: str) -> str:
    """R2 to R4 in the paper's symbols; with those of R7 if the number of the last two is "R7"."""
    s, a, b = ("{t−1}", "α_t", "β_t") if number == "R4" else ("s", "α", "β")
    larger = () if number == "R4" else (svg.formula("R7", r"α = \frac{ᾱ_t}{ᾱ_s}, β = 1 − α"),)
    return svg.card(
        words["formulas"],
        svg.formula("R2", rf"q(x_{s}|x_t,x_0) =", rf"\frac{{q(x_t|x_{s}) q(x_{s}|x_0)}}{{q(x_t|x_0)}}"),
        *larger,
        svg.formula("R3", rf"q(x_t|x_{s}) =", rf"N(x_t; \sqrt{{{a}}} x_{s}, {b})"),
        svg.formula("R3", rf"q(x_{s}|x_0) =", rf"N(x_{s}; \sqrt{{ᾱ_{s}}} x_0, 1 − ᾱ_{s})"),
        svg.formula("R3", r"q(x_t|x_0) =", r"N(x_t; \sqrt{ᾱ_t} x_0, 1 − ᾱ_t)"),
        svg.formula(
            number,
            rf"A = \frac{{{a}}}{{{b}}} + \frac{{1}}{{1 − ᾱ_{s}}},",
            rf"B = \frac{{\sqrt{{{a}}} x_t}}{{{b}}} + \frac{{\sqrt{{ᾱ_{s}}} x_0}}{{1 − ᾱ_{s}}}",
        ),
        svg.formula(number, rf"β̃_t = \frac{{1}}{{A}} = \frac{{1 − ᾱ_{s}}}{{1 − ᾱ_t}} {b}"),
        svg.formula(
            number,
            rf"μ̃_t = \frac{{B}}{{A}} = \frac{{\sqrt{{ᾱ_{s}}} {b}}}{{1 − ᾱ_t}} x_0",
            rf"+ \frac{{\sqrt{{{a}}} (1 − ᾱ_{s})}}{{1 − ᾱ_t}} x_t",
        ),
    )


def page(
    language: str,
    t: float | None,
    s: float | None,
    follows: bool,
    x_0: float | None,
    x_t: float | None,
    zoom: bool,
    schedule: str,
) -> str:
    """The upper part of the tab, as HTML: one pixel whose x_0 and x_t are given."""
    words = TEXTS[language]
    t, s_used = steps(t, s, follows)
    found = bayes(schedule, t, s_used, min(max(x_0 or 0.0, -1.0), 1.0), min(max(x_t or 0.0, -3.0), 3.0))
    clipped = not follows and s is not None and round(s) > s_used
    note = f"<p>{words['clipped'].format(s=s_used)}</p>" if clipped else ""
    bells = bells_card(words, words["bells"].format(t=t, s=s_used), found, zoom, note)
    return svg.board((bells,), (square_card(words, found), formulas_card(words, found.name)))


def as_gray(picture: np.ndarray) -> np.ndarray:
    """The picture with one channel, uint8 (H, W)."""
    return picture if picture.ndim == 2 else np.asarray(PIL.Image.fromarray(picture).convert("L"))


def pixel_page(
    language: str,
    t: float | None,
    s: float | None,
    follows: bool,
    zoom: bool,
    schedule: str,
    picture: np.ndarray,
    from_top: float | None,
    from_left: float | None,
    seed: int,
) -> str:
    """The lower part of the tab, as HTML: a picture, its noised version, and the bells of one of its pixels.

    `from_top` and `from_left` are per cent of the picture's height and width.
    """
    words = TEXTS[language]
    t, s = steps(t, s, follows)
    picture = as_gray(picture)
    height, width = picture.shape
    mark = row, column = (
        round(whole(from_top, 0, 100) / 100 * (height - 1)),
        round(whole(from_left, 0, 100) / 100 * (width - 1)),
    )
    x_0, x_t = noising.as_sample(picture), noising.closed_form(picture, t, schedule, seed)
    mean, _ = noising.scheduler(schedule).posterior_mean_variance(x_0, x_t, t - 1, s - 1)
    values = [float(x[0, 0, row, column]) for x in (x_0, x_t, mean)]
    names = ("original", "noised", "posterior mean")
    captions = [words[name].format(svg.number(v)) for name, v in zip(names, values, strict=True)]
    pictures = "".join(
        svg.picture(noising.as_picture(x), label, caption, mark)
        for x, label, caption in zip((x_0, x_t, mean), words["labels"].split("|"), captions, strict=True)
    )
    found = bayes(schedule, t, s, *values[:2])
    shown = svg.card(
        words["pictures"],
        f'<div class="pictures">{pictures}</div>',
        f"<p>{words['gray'].format(row=row + 1, column=column + 1)}</p>",
    )
    bells = bells_card(words, words["bells"].format(t=t, s=s), found, zoom)
    return svg.board((shown, square_card(words, found)), (bells,))


def tab(language: str, limits: Limits) -> None:
    """Build the tab's controls and what they show, inside `with gr.Tab(…)`."""
    import gradio as gr

    words = TEXTS[language]
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            t = slider(1, T, 300, 1, words["t"])
            s = slider(0, T - 1, 150, 1, words["s"])
            follows = gr.Checkbox(False, label=words["follows"])
            x_0 = slider(-1, 1, 0.6, 0.01, words["x_0"])
            x_t = slider(-3, 3, -0.8, 0.01, words["x_t"])
            zoom = gr.Checkbox(False, label=words["zoom"])
            schedule = gr.Dropdown(list(BETA_SCHEDULES), value="linear", label=words["schedule"])
        with gr.Column(scale=3, min_width=320):
            shown = gr.HTML(page(language, 300, 150, False, 0.6, -0.8, False, "linear"), apply_default_css=False)
    gr.Markdown(f"## {words['real']}")
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            row = slider(0, 100, 50, 1, words["row"])
            column = slider(0, 100, 30, 1, words["column"])
            again = gr.Button(words["again"])
            picture = picture_input(language, limits)
        with gr.Column(scale=3, min_width=320):
            pixel = gr.HTML(
                pixel_page(language, 300, 150, False, False, "linear", example(0), 50, 30, 0), apply_default_css=False
            )
    seed = gr.State(0)

    def draw(t: Any, s: Any, follows: bool, x_0: Any, x_t: Any, zoom: bool, schedule: str) -> str:
        return page(language, t, s, follows, x_0, x_t, zoom, schedule)

    def draw_pixel(t: Any, s: Any, follows: bool, zoom: bool, schedule: str, *which: Any) -> str:
        return pixel_page(language, t, s, follows, zoom, schedule, *which)

    def draw_both(
        t: Any, s: Any, follows: bool, zoom: bool, schedule: str, x_0: Any, x_t: Any, *which: Any
    ) -> tuple[str, str]:
        return draw(t, s, follows, x_0, x_t, zoom, schedule), draw_pixel(t, s, follows, zoom, schedule, *which)

    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    again.click(lambda seed: seed + 1, seed, seed, **quick)
    shared, values, which = [t, s, follows, zoom, schedule], [x_0, x_t], [picture, row, column, seed]
    for controls, function, inputs, outputs in (
        (shared, draw_both, [*shared, *values, *which], [shown, pixel]),
        (values, draw, [t, s, follows, *values, zoom, schedule], [shown]),
        (which, draw_pixel, [*shared, *which], [pixel]),
    ):
        for control in controls:
            control.change(function, inputs, outputs, trigger_mode="always_last", **quick)
