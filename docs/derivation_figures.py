"""Figures of the derivation, computed with the functions of the package. Called by make_derivation.py.

A figure with words is drawn in English and in Chinese. The Chinese one needs the font named by `CHINESE_FONT`.
"""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from custom_ddpm import CustomDDPMPipeline, CustomDDPMScheduler
from custom_ddpm.data import normalise, open_images
from custom_ddpm.schedules import BETA_SCHEDULES, make_betas, resample_betas

DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits"
BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666",
)  # fmt: skip
STYLE = {
    "figure.dpi": 120,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
CHINESE_FONT, CHINESE_FONT_FILE, CHINESE_FONT_PACKAGE = "WenQuanYi Micro Hei", "wqy-microhei.ttc", "fonts-wqy-microhei"
CHINESE = {
    "pixel": "像素值",
    "60 pixels, two noises each": "60 个像素，各加两次噪声",
    "two steps (F6)": "走两步（F6）",
    "merged step (F8)": "合成一步（F8）",
    "200,000 pixels": "200,000 个像素",
    r"$f(x-\tau)$ at $x=1$": r"$x=1$ 处的 $f(x-\tau)$",
    "product: area $h(1)$": "乘积：面积为 $h(1)$",
    r"formula: $\mathcal{N}(0,\ 1)$": r"公式：$\mathcal{N}(0,\ 1)$",
    "numeric $f * g$": "数值卷积 $f * g$",
    r"prior $q(x_{t-1}|x_0)$": r"先验 $q(x_{t-1}|x_0)$",
    r"likelihood $q(x_t|x_{t-1})$": r"似然 $q(x_t|x_{t-1})$",
    "product, normalised": "乘积，归一化",
    "of $x_0$": "$x_0$ 的权重",
    "of $x_t$": "$x_t$ 的权重",
    "$t$  ($T = 1000$, linear)": "$t$（$T = 1000$，线性调度）",
    r"weights in $\tilde\mu_t$": r"$\tilde\mu_t$ 中的权重",
    r"SNR $= \bar\alpha_t/(1-\bar\alpha_t)$": r"信噪比 $\bar\alpha_t/(1-\bar\alpha_t)$",
    r"$\bar\alpha_t$, linear": r"$\bar\alpha_t$，线性调度",
    "$T = 200$, same range": "$T = 200$，范围不变",
    "$T = 200$, resample_betas": "$T = 200$，重采样",
}
Say = Callable[[str], str]  # a label in the language of the figure
ZERO, ONE = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)


def density(x: np.ndarray, mean: float, variance: float) -> np.ndarray:
    """Density of a Gaussian."""
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)


def show_picture(axes: Axes, picture: torch.Tensor) -> None:
    """Show a gray image (1, H, W) with values in [−1, 1]; values outside are clipped."""
    axes.imshow(picture[0].clamp(-1, 1), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_axis_off()


def noise_levels() -> Figure:
    """F9 on one image, and the distribution over all pixels of the digits dataset."""
    scheduler = CustomDDPMScheduler()
    x_0 = normalise(open_images(dataset_name=str(DIGITS), resolution=16).take(1797)[0])
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    timesteps = [-1, 49, 99, 199, 399, 699, 999]
    figure, rows = plt.subplots(2, len(timesteps), figsize=(10, 3.5), height_ratios=[1.25, 1])
    values = np.linspace(-3, 3, 200)
    for above, below, t in zip(*rows, timesteps, strict=True):
        x_t = x_0 if t < 0 else scheduler.add_noise(x_0, noise, t)
        show_picture(above, x_t[3])
        above.set_title(f"$t = {t + 1}$")
        below.hist(x_t.flatten().numpy(), bins=60, range=(-3, 3), density=True, color=SKY)
        below.plot(values, density(values, 0, 1), color=ORANGE, linewidth=1.2)
        below.set(ylim=(0, 1), yticks=[], xticks=[-2, 0, 2])
        below.spines["left"].set_visible(False)
    return figure


def two_steps(say: Say) -> Figure:
    """F6 compared with F8, for the last two steps of the linear schedule."""
    scheduler, t, n = CustomDDPMScheduler(), 999, 200_000
    generator = torch.Generator().manual_seed(0)
    x = torch.full((n,), 0.6)
    between = scheduler.forward_step(x, t - 1, torch.randn(n, generator=generator))
    twice = scheduler.forward_step(between, t, torch.randn(n, generator=generator))
    merged = scheduler.add_noise(x, torch.randn(n, generator=generator), t, prev_timesteps=t - 2)

    figure, (paths, histogram) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=[1, 1.4])
    ends = np.stack([x[:60].numpy(), between[:60].numpy(), twice[:60].numpy()])
    paths.plot(ends, color=BLUE, alpha=0.25, linewidth=1)
    paths.plot(ends[:, 0], color=ORANGE, marker="o")
    paths.set(
        xticks=range(3),
        xticklabels=["$x_{t-2}$", "$x_{t-1}$", "$x_t$"],
        ylabel=say("pixel"),
        title=say("60 pixels, two noises each"),
    )

    options = {"bins": 100, "range": (-0.3, 1.5), "density": True}
    histogram.hist(twice.numpy(), color=SKY, label=say("two steps (F6)"), **options)
    options["label"] = say("merged step (F8)")
    histogram.hist(merged.numpy(), histtype="step", color=BLUE, linewidth=1.4, **options)
    mean, variance = scheduler.add_noise(0.6 * ONE, ZERO, t, t - 2), scheduler.add_noise(ZERO, ONE, t, t - 2) ** 2
    values = np.linspace(-0.3, 1.5, 300)
    law = r"$\mathcal{N}(\sqrt{\alpha_t\alpha_{t-1}}\,x_{t-2},\ 1-\alpha_t\alpha_{t-1})$"
    histogram.plot(values, density(values, mean.item(), variance.item()), color=ORANGE, label=law)
    histogram.set(xlabel="$x_t$", yticks=[], ylim=(0, 3), title=say("200,000 pixels"))
    histogram.legend(loc="upper left", fontsize=9.5)
    return figure


def convolution(say: Say) -> Figure:
    """F7: the integrand at one x, and the integral as a function of x."""
    x = np.linspace(-4, 4, 1601)
    dx = x[1] - x[0]
    f, g = density(x, 0, 0.36), density(x, 0, 0.64)
    h = np.convolve(f, g, mode="same") * dx

    figure, (at_one, everywhere) = plt.subplots(1, 2, figsize=(9, 3.4))
    shifted = density(1 - x, 0, 0.36)
    at_one.plot(x, shifted, color=BLUE, label=say(r"$f(x-\tau)$ at $x=1$"))
    at_one.plot(x, g, color=GREEN, label=r"$g(\tau)$")
    at_one.fill_between(x, shifted * g, color=ORANGE, alpha=0.5, label=say("product: area $h(1)$"))
    at_one.set(xlabel=r"$\tau$", xlim=(-3, 3), ylim=(0, 0.95))
    at_one.legend(loc="upper left", fontsize=9.5)

    everywhere.plot(x, f, color=BLUE, alpha=0.45, label=r"$f = \mathcal{N}(0,\ 0.6^2)$")
    everywhere.plot(x, g, color=GREEN, alpha=0.45, label=r"$g = \mathcal{N}(0,\ 0.8^2)$")
    everywhere.plot(x, density(x, 0, 1.0), color=ORANGE, label=say(r"formula: $\mathcal{N}(0,\ 1)$"))
    everywhere.plot(x[::50], h[::50], "o", color="black", markersize=3.5, label=say("numeric $f * g$"))
    everywhere.set(xlabel="$x$", xlim=(-3, 3), ylim=(0, 0.95))
    everywhere.legend(loc="upper left", fontsize=9.5)
    return figure


def posterior(say: Say) -> Figure:
    """R2–R4: prior × likelihood on a grid compared with `posterior_mean_variance`; the weights of μ̃ over t."""
    coarse = CustomDDPMScheduler(10, trained_betas=resample_betas(make_betas(), 10).tolist())
    t, x_0, x_t = 3, 0.9 * ONE, -0.8 * ONE
    x = torch.linspace(-2.5, 2.5, 2001, dtype=torch.float64)
    keep, add = coarse.forward_step(x, t, 0 * x).numpy(), coarse.forward_step(ZERO, t, ONE).item()
    likelihood = density(x_t.item(), keep, add**2)
    x = x.numpy()
    prior = density(x, coarse.add_noise(x_0, ZERO, t - 1).item(), coarse.add_noise(ZERO, ONE, t - 1).item() ** 2)
    product = prior * likelihood / (prior * likelihood).sum() / (x[1] - x[0])
    mean, variance = coarse.posterior_mean_variance(x_0, x_t, t)

    figure, (bells, weights) = plt.subplots(1, 2, figsize=(9, 3.6))
    bells.fill_between(x, prior, color=BLUE, alpha=0.25, label=say(r"prior $q(x_{t-1}|x_0)$"))
    bells.fill_between(x, likelihood, color=GREEN, alpha=0.25, label=say(r"likelihood $q(x_t|x_{t-1})$"))
    bells.plot(
        x, density(x, mean.item(), variance.item()), color=ORANGE, label=r"$\mathcal{N}(\tilde\mu_t,\ \tilde\beta_t)$"
    )
    bells.plot(x[::40], product[::40], "o", color="black", markersize=3.5, label=say("product, normalised"))
    bells.set(xlabel="$x_{t-1}$", ylim=(0, 0.9), yticks=[], xlim=(-2.5, 2.5))
    bells.legend(loc="upper left", fontsize=9.5, ncols=2)

    scheduler = CustomDDPMScheduler()
    all_t = torch.arange(1000)
    ones, zeros = torch.ones(1000), torch.zeros(1000)
    of_x_0 = scheduler.posterior_mean_variance(ones, zeros, all_t)[0]
    of_x_t = scheduler.posterior_mean_variance(zeros, ones, all_t)[0]
    weights.semilogx(all_t + 1, of_x_0, color=BLUE, label=say("of $x_0$"))
    weights.semilogx(all_t + 1, of_x_t, color=GREEN, label=say("of $x_t$"))
    weights.set(xlabel=say("$t$  ($T = 1000$, linear)"), title=say(r"weights in $\tilde\mu_t$"))
    weights.legend()
    return figure


def schedules(say: Say) -> Figure:
    """ᾱ and SNR of every schedule at T = 1000; the linear schedule at T = 200, with and without resampling."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.9))
    time = np.arange(1, 1001) / 1000
    styles = zip(BETA_SCHEDULES, (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY), strict=True)
    for name, color in styles:
        scheduler = CustomDDPMScheduler(beta_schedule=name)
        left.plot(time, scheduler.alphas_cumprod, color=color, label=name)
        middle.semilogy(time, scheduler.snr(torch.arange(1000)), color=color)
    left.set(xlabel="$t/T$", title=r"$\bar\alpha_t$")
    figure.legend(loc="outside lower left", ncols=6, fontsize=9.5)
    middle.set(xlabel="$t/T$", title=say(r"SNR $= \bar\alpha_t/(1-\bar\alpha_t)$"))
    middle.axhline(1, color=GREY, linewidth=0.8)

    right.plot(time, CustomDDPMScheduler().alphas_cumprod, color=BLUE, linewidth=5, alpha=0.3, label="$T = 1000$")
    variants = {"same range": make_betas("linear", 200), "resample_betas": resample_betas(make_betas(), 200)}
    for (name, betas), color, line in zip(variants.items(), (ORANGE, "black"), ("-", "--"), strict=True):
        scheduler = CustomDDPMScheduler(200, trained_betas=betas.tolist())
        right.plot(time[4::5], scheduler.alphas_cumprod, color=color, linestyle=line, label=say(f"$T = 200$, {name}"))
    right.set(xlabel="$t/T$", title=say(r"$\bar\alpha_t$, linear"))
    right.legend(fontsize=8.5, loc="upper right")
    return figure


@torch.no_grad()
def reverse_chain(model: str) -> Figure:
    """S1 with a trained model of gray images: x_t and x̂_0 at several timesteps."""
    pipeline = CustomDDPMPipeline.from_pretrained(model)
    unet, scheduler = pipeline.unet.eval(), pipeline.scheduler
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size, generator=generator)
    conditions = {"class_labels": torch.tensor([3, 6])} if unet.config.num_class_embeds else {}
    shown = [999, 799, 599, 399, 299, 199, 99, 49, 0]
    figure, rows = plt.subplots(4, len(shown), figsize=(10, 4.9))
    for t in scheduler.timesteps.tolist():
        output = scheduler.step(unet(x, t, **conditions).sample, t, x, generator=generator)
        if t in shown:
            column = shown.index(t)
            for i in range(2):
                show_picture(rows[2 * i, column], x[i])
                show_picture(rows[2 * i + 1, column], output.pred_original_sample[i])
            rows[0, column].set_title(f"$t = {t + 1}$")
        x = output.prev_sample
    for row, label in zip(rows, ["$x_t$", r"$\hat{x}_0$"] * 2, strict=True):
        row[0].text(-0.18, 0.5, label, transform=row[0].transAxes, ha="right", va="center", fontsize=14)
    return figure


def add_chinese_font() -> None:
    """Make `CHINESE_FONT` known to matplotlib; exit with a message if it is not installed."""
    for file in font_manager.findSystemFonts():
        if Path(file).name == CHINESE_FONT_FILE:
            return font_manager.fontManager.addfont(file)
    raise SystemExit(
        f"the Chinese figures need the font {CHINESE_FONT} ({CHINESE_FONT_FILE}), which is not installed: on Debian "
        f"and Ubuntu, apt install {CHINESE_FONT_PACKAGE}"
    )


def draw_figures(folder: Path, model: str | None) -> None:
    """Save the figures in `folder`; `reverse_chain` only if there is a trained pipeline `model`."""
    add_chinese_font()
    folder.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        _save(noise_levels(), folder / "noise_levels.png")
        if model is not None:
            _save(reverse_chain(model), folder / "reverse_chain.png")
        for draw in (two_steps, convolution, posterior, schedules):
            _save(draw(str), folder / f"{draw.__name__}.png")
            # First in the list, as labels with formulas look nowhere else for the characters around the formula.
            with plt.rc_context({"font.family": [CHINESE_FONT, "DejaVu Sans"]}):
                _save(draw(CHINESE.__getitem__), folder / f"{draw.__name__}.zh.png")


def _refuse(record: logging.LogRecord) -> bool:
    if "does not have a glyph" in record.getMessage():
        raise SystemExit(record.getMessage())
    return True


def _save(figure: Figure, path: Path) -> None:
    # A character that no font has would be drawn as a box: plain text warns of it, labels with formulas log it.
    mathtext = logging.getLogger("matplotlib.mathtext")
    mathtext.addFilter(_refuse)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph .* missing from")
        # Without matplotlib's version in the metadata, the file is reproducible byte for byte.
        figure.savefig(path, dpi=120, metadata={"Software": None})
    mathtext.removeFilter(_refuse)
    plt.close(figure)
