"""The tab Forward of the page: noise is added to a picture, by the chain (F3) and by the closed form (F9)."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ..schedules import BETA_SCHEDULES
from . import noising, svg
from .examples import example, picture_input, slider
from .limits import Limits
from .noising import DRAWS, EDGES, START, T, whole

TEXTS = {
    "en": {
        "t": "t (1 … T = 1000)",
        "schedule": "β schedule (F4)",
        "again": "Other noise",
        "pictures": "The same picture, noised in two ways",
        "original": "x<sub>0</sub>, the picture (F1)",
        "chain": "x<sub>t</sub> by the chain F3: t = {t}, a noise for each step",
        "closed": "x<sub>t</sub> by the closed form F9: one noise",
        "labels": "the picture x_0|x_t at t = {t} by the chain|x_t at t = {t} by the closed form",
        "residual": "The noises differ, so the pictures do; their distribution is the same. The noise in each,",
        "of": "(mean, variance)",
        "expected": "expected",
        "coefficients": "The mixture at t = {t}",
        "factor": "factor of",
        "picture share": "of the picture, ᾱ<sub>t</sub>",
        "noise share": "of the noise, 1 − ᾱ<sub>t</sub>",
        "shares label": "shares of variance: {0} of the picture, {1} of the noise",
        "histogram": "The pixels of xₜ and the bell",
        "pixel": "value of a pixel of xₜ",
        "by F3": "pixels by F3",
        "by F9": "pixels by F9",
        "normal": "N(0, 1)",
        "mixture": "mean of the bells N(√ᾱ<sub>t</sub> x<sub>0</sub>, 1 − ᾱ<sub>t</sub>) of all pixels",
        "alpha bar": "ᾱₜ of every schedule: what is left of the picture",
        "snr": "Signal-to-noise ratio ᾱₜ / (1 − ᾱₜ) of every schedule",
        "two": "Two steps, or one: t − 2 → t at t = {t}",
        "two at 2": "t = 1 has no two steps behind it; these are the steps to t = 2.",
        "noises": "two noises, F6",
        "noise": "one noise, F8",
        "factor of": "factor of x<sub>t−2</sub>",
        "variance": "variance of the noise",
        "drawn mean": "mean of {n} draws",
        "drawn variance": "their variance",
        "bell": "the bell of F7 and F8",
        "two label": "draws of x_t after two steps and after one, and the bell of variance {0}",
        "two sum": "F7: variances add up: α<sub>t</sub>(1 − α<sub>t−1</sub>) + (1 − α<sub>t</sub>) = {0} + {1} = {2}",
        "from": "xₜ from xₜ₋₂ = 0.6",
        "standard error": "After ±: standard errors.",
    },
    "zh": {
        "t": "t（1 … T = 1000）",
        "schedule": "β 方案（F4）",
        "again": "换一份噪声",
        "pictures": "同一张图片，用两种方式加噪",
        "original": "x<sub>0</sub>，图片（F1）",
        "chain": "x<sub>t</sub>，沿链 F3：t = {t}，每步一次噪声",
        "closed": "x<sub>t</sub>，闭式 F9：一次噪声",
        "labels": "图片 x_0|t = {t} 时沿链得到的 x_t|t = {t} 时由闭式得到的 x_t",
        "residual": "两份噪声不同，所以图片不同，但分布相同。各自所含的噪声",
        "of": "（均值，方差）",
        "expected": "理论值",
        "coefficients": "t = {t} 时的混合系数",
        "factor": "系数：",
        "picture share": "图片，ᾱ<sub>t</sub>",
        "noise share": "噪声，1 − ᾱ<sub>t</sub>",
        "shares label": "方差的份额：图片 {0}，噪声 {1}",
        "histogram": "xₜ 的像素与钟形曲线",
        "pixel": "xₜ 的像素值",
        "by F3": "F3 得到的像素",
        "by F9": "F9 得到的像素",
        "normal": "N(0, 1)",
        "mixture": "x<sub>0</sub> 所有像素的钟形 N(√ᾱ<sub>t</sub> x<sub>0</sub>, 1 − ᾱ<sub>t</sub>) 的平均",
        "alpha bar": "各方案的 ᾱₜ：图片还剩多少",
        "snr": "各方案的信噪比 ᾱₜ / (1 − ᾱₜ)",
        "two": "两步，或一步：t − 2 → t，t = {t}",
        "two at 2": "t = 1 之前没有两步；这里是到 t = 2 的两步。",
        "noises": "两次噪声，F6",
        "noise": "一次噪声，F8",
        "factor of": "x<sub>t−2</sub> 的系数",
        "variance": "噪声的方差",
        "drawn mean": "{n} 次抽样的均值",
        "drawn variance": "其方差",
        "bell": "F7、F8 的钟形",
        "two label": "两步后与一步后 x_t 的抽样，以及方差为 {0} 的钟形",
        "two sum": "F7：方差相加：α<sub>t</sub>(1 − α<sub>t−1</sub>) + (1 − α<sub>t</sub>) = {0} + {1} = {2}",
        "from": "由 xₜ₋₂ = 0.6 得到的 xₜ",
        "standard error": "± 之后是标准误差。",
    },
}


def _pictures_card(
    words: dict[str, str], picture: np.ndarray, noised: tuple[torch.Tensor, torch.Tensor], t: int, schedule: str
) -> str:
    by_chain, closed = noised
    labels = words["labels"].format(t=t).split("|")
    pictures = (
        svg.picture(picture, labels[0], words["original"]),
        svg.picture(noising.as_picture(by_chain), labels[1], words["chain"].format(t=t)),
        svg.picture(noising.as_picture(closed), labels[2], words["closed"].format(t=t)),
    )
    (mean_3, variance_3), (mean_9, variance_9) = (noising.noise_in(picture, x, t, schedule) for x in (by_chain, closed))
    residual = svg.math_text(r"(x_t − \sqrt{ᾱ_t} x_0) / \sqrt{1 − ᾱ_t}")
    rows = [
        ("F3", f"{mean_3:.3f}".replace("-", "−"), f"{variance_3:.3f}"),
        ("F9", f"{mean_9:.3f}".replace("-", "−"), f"{variance_9:.3f}"),
        (words["expected"], "0", "1"),
    ]
    lines = "; ".join(f"{name}: {mean}, {variance}" for name, mean, variance in rows)
    return svg.card(
        words["pictures"],
        f'<div class="pictures">{"".join(pictures)}</div>',
        svg.formula("F3", r"x_t = \sqrt{1 − β_t} x_{t−1} + \sqrt{β_t} ε_t"),
        svg.formula("F9", r"x_t = \sqrt{ᾱ_t} x_0 + \sqrt{1 − ᾱ_t} ε"),
        f"<p>{words['residual']} {residual} {words['of']}: {lines}.</p>",
    )


def _coefficients_card(words: dict[str, str], t: int, schedule: str) -> str:
    found = noising.coefficients(schedule, t)
    show, factor = svg.number, words["factor"]
    picture, noise = found.keep**2, found.add**2
    label = words["shares label"].format(f"{picture:.3f}", f"{noise:.3f}")
    parts = [
        f'<rect x="{x:.1f}" width="{360 * share:.1f}" height="24" style="fill:var(--c{colour});fill-opacity:.35"/>'
        for x, share, colour in ((0.0, picture, 0), (360 * picture, noise, 1))
    ]
    bar = f'<svg viewBox="0 0 360 24" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    rows = [
        (f"F3 · {factor} x<sub>t−1</sub>, √(1 − β<sub>t</sub>) = √α<sub>t</sub>", show(found.keep_step, 5)),
        (f"F3 · {factor} ε<sub>t</sub>, √β<sub>t</sub> = √(1 − α<sub>t</sub>)", show(found.add_step, 5)),
        (f"F9 · {factor} x<sub>0</sub>, √ᾱ<sub>t</sub>", show(found.keep, 5)),
        (f"F9 · {factor} ε, √(1 − ᾱ<sub>t</sub>)", show(found.add, 5)),
        ("F4 · β<sub>t</sub>", show(found.add_step**2, 5)),
        ("F9 · ᾱ<sub>t</sub>", show(picture, 5)),
        ("SNR, ᾱ<sub>t</sub> / (1 − ᾱ<sub>t</sub>)", show(found.snr, 5)),
    ]
    names = svg.keys(
        [
            (0, "fill", f"{words['picture share']} = {show(picture)}"),
            (1, "fill", f"{words['noise share']} = {show(noise)}"),
        ]
    )
    return svg.card(words["coefficients"].format(t=t), bar, names, svg.table(("", ""), rows))


def _histogram_card(
    words: dict[str, str], picture: np.ndarray, noised: tuple[torch.Tensor, torch.Tensor], t: int, schedule: str
) -> str:
    heights = [noising.histogram(x) for x in noised]
    expected = noising.expected_density(picture, t, schedule)
    centres = (EDGES[1:] + EDGES[:-1]) / 2
    top = 1.05 * max(*(part.max() for part in heights), expected.max(), 0.4)
    plot = svg.Plot(f"{words['histogram']}, t = {t}", (-4, 4), (0, top), words["pixel"])
    plot.bars(EDGES, heights[1], 0)
    plot.curve(np.repeat(EDGES, 2)[1:-1], np.repeat(heights[0], 2), 1, width=1.2)
    fine = np.linspace(-4, 4, 161)
    plot.curve(fine, noising.bell(fine, 0, 1), 3, dash="7 3")
    plot.curve(centres, expected, 2)
    names = svg.keys(
        [
            (0, "fill", words["by F9"]),
            (1, "", words["by F3"]),
            (3, "7 3", words["normal"]),
            (2, "", words["mixture"]),
        ]
    )
    return svg.card(words["histogram"], plot.svg(), names)


@lru_cache(maxsize=32)
def _curves(title: str, schedule: str) -> tuple[svg.Plot, list[str]]:
    """A plot with the curves of every schedule, and the parts of its drawing, kept because only the points move."""
    log = title == "snr"
    plot = svg.Plot("", (0, T), (-9.0, 5.0) if log else (0.0, 1.0), "t", log=log)
    t = np.r_[1:20:3, 20 : T - 20 : 20, T - 20 : T + 1 : 4]
    for i, name in enumerate(BETA_SCHEDULES):
        found = noising.scheduler(name)
        k = torch.from_numpy(t - 1)
        values = found.snr(k) if log else found.alphas_cumprod[k]
        plot.curve(t, values.numpy(), i, svg.DASHES[i], 3 if name == schedule else 1.5)
    return plot, list(plot.parts)


def _schedule_card(words: dict[str, str], title: str, t: int, schedule: str) -> str:
    here = [noising.coefficients(name, t) for name in BETA_SCHEDULES]
    points = [found.snr if title == "snr" else found.keep**2 for found in here]
    kept, curves = _curves(title, schedule)
    plot = svg.Plot(f"{words[title]}, t = {t}", kept.x, kept.y, "t", log=kept.log)
    plot.parts += curves
    plot.upright(t, "", dash="1 3")
    plot.points([t] * len(points), points, range(len(points)), 4.5)
    names = [f"{name} {svg.number(value)}" for name, value in zip(BETA_SCHEDULES, points, strict=True)]
    names = [f"<strong>{name}</strong>" if name.split()[0] == schedule else name for name in names]
    legend = svg.keys([(i, svg.DASHES[i], name) for i, name in enumerate(names)])
    return svg.card(words[title], plot.svg(), legend)


def _two_steps_card(words: dict[str, str], t: int, schedule: str, seed: int) -> str:
    note = f"<p>{words['two at 2']}</p>" if t < 2 else ""
    t = max(t, 2)
    found, show = noising.two_steps(schedule, t, seed), svg.number
    mean, variance = found.keep_merged * START, found.merged_variance
    x = np.linspace(mean - 4 * variance**0.5, mean + 4 * variance**0.5, 49)
    density = noising.bell(x, mean, variance)
    plot = svg.Plot(
        words["two label"].format(show(variance)),
        (x[0], x[-1]),
        (0, 1.12 * density.max()),
        words["from"],
        y_ticks=False,
    )
    twice, merged = (np.histogram(draws, 48, (x[0], x[-1]), density=True)[0] for draws in (found.twice, found.merged))
    plot.bars(x, twice, 0)
    plot.curve(np.repeat(x, 2)[1:-1], np.repeat(merged, 2), 1, width=1.2)
    plot.curve(x, density, 2)
    legend = svg.keys([(0, "fill", words["noises"]), (1, "", words["noise"]), (2, "", words["bell"])])
    total = found.first_variance + found.second_variance
    added = [show(value, 6) for value in (found.first_variance, found.second_variance, total)]
    errors = (variance / DRAWS) ** 0.5, variance * (2 / DRAWS) ** 0.5
    means = [svg.with_error(draws.mean(dtype=float), errors[0]) for draws in (found.twice, found.merged)]
    variances = [svg.with_error(draws.var(dtype=float), errors[1]) for draws in (found.twice, found.merged)]
    rows = [
        (words["factor of"], show(found.keep_twice, 6), show(found.keep_merged, 6)),
        (words["variance"], show(total, 6), show(variance, 6)),
        (words["drawn mean"].format(n=f"{DRAWS:,}"), *means),
        (words["drawn variance"], *variances),
    ]
    return svg.card(
        words["two"].format(t=t),
        note,
        svg.formula(
            "F6", r"x_t = \sqrt{α_t α_{t−1}} x_{t−2}", r"+ \sqrt{α_t (1 − α_{t−1})} ε_{t−1}", r"+ \sqrt{1 − α_t} ε_t"
        ),
        svg.formula("F8", r"x_t = \sqrt{α_t α_{t−1}} x_{t−2}", r"+ \sqrt{1 − α_t α_{t−1}} ε"),
        f"<p>{words['two sum'].format(*added)}</p>",
        plot.svg(),
        legend,
        svg.table(("", words["noises"], words["noise"]), rows),
        f"<p>{words['standard error']}</p>",
    )


def page(language: str, picture: np.ndarray, t: float | None, schedule: str, seed: int) -> str:
    """All that the tab shows, as HTML."""
    words, t = TEXTS[language], whole(t, 1, T)
    noised = noising.chain(picture, t, schedule, seed), noising.closed_form(picture, t, schedule, seed)
    return svg.board(
        (
            _pictures_card(words, picture, noised, t, schedule),
            _coefficients_card(words, t, schedule),
            _schedule_card(words, "alpha bar", t, schedule),
        ),
        (
            _histogram_card(words, picture, noised, t, schedule),
            _schedule_card(words, "snr", t, schedule),
            _two_steps_card(words, t, schedule, seed),
        ),
    )


def tab(language: str, limits: Limits) -> None:
    """Build the tab's controls and what they show, inside `with gr.Tab(…)`."""
    import gradio as gr

    words = TEXTS[language]
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            t = slider(1, T, 200, 1, words["t"])
            schedule = gr.Dropdown(list(BETA_SCHEDULES), value="linear", label=words["schedule"])
            again = gr.Button(words["again"])
            picture = picture_input(language, limits)
        with gr.Column(scale=3, min_width=320):
            shown = gr.HTML(page(language, example(0), 200, "linear", 0), apply_default_css=False)
    seed = gr.State(0)

    def draw(picture: np.ndarray, t: float | None, schedule: str, seed: int) -> str:
        return page(language, picture, t, schedule, seed)

    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    again.click(lambda seed: seed + 1, seed, seed, **quick)
    for control in (t, schedule, picture, seed):
        control.change(draw, [picture, t, schedule, seed], shown, trigger_mode="always_last", **quick)
