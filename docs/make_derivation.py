"""Generate the derivation with its code, numbers and figures, in English and Chinese, as pages and as notebooks.

    python docs/make_derivation.py                   check every formula, and write pages and notebooks
    python docs/make_derivation.py --figures         also draw the figures that need no trained model
    python docs/make_derivation.py --model FOLDER    also draw all figures, one of them with this trained pipeline
    python docs/make_derivation.py --check           check every formula, and that pages and notebooks are up to date

It writes docs/derivation.md, .zh.md, .ipynb and .zh.ipynb, from templates (docs/templates/) in which a line {{F3}} is
replaced by links to the functions that implement formula F3, a code snippet and its output. First, every snippet is run
at several t, and the values it computes with the package are compared with the formula evaluated here in float64
NumPy; then all are run in one session, and must print the same. The script ends with a one-line message if anything
differs. It needs the test extra of the package (for mpmath), and a Chinese font for the figures.
"""

import argparse
import contextlib
import inspect
import io
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import combinations, pairwise
from math import erf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from derivation_notebook import notebook
from numpy import exp, log, sqrt

from custom_ddpm import CustomDDPMPipeline, CustomDDPMScheduler
from custom_ddpm.data import normalise
from custom_ddpm.messages import one_line
from custom_ddpm.objective import diffusion_loss, simple_loss, training_target
from custom_ddpm.schedules import (
    log_alphas_cumprod,
    make_betas,
    optimal_timesteps,
    resample_betas,
    rescale_zero_terminal_snr,
)
from custom_ddpm.training.loop import training_steps
from custom_ddpm.training.randomness import draw

DOCS = Path(__file__).resolve().parent
PAGES = {  # name -> what stands before the links to the code, and the link to the notebook and from it
    "derivation": ("In code: ", "[as a notebook](derivation.ipynb)", "[as a page](derivation.md)"),
    "derivation.zh": ("代码：", "[笔记本（notebook）版](derivation.zh.ipynb)", "[网页版](derivation.zh.md)"),
}
CHECKED_TIMESTEPS = (1, 2, 10, 998, 999)  # in addition to the t shown on the page
TOLERANCES = {"float64": (1e-9, 1e-12), "float32": (1e-6, 1e-7)}  # relative, absolute

# ---- β, α and ᾱ as the derivation defines them, t = 0 … T−1, ᾱ = 1 at −1 ----

T = 1000


def beta(t: int) -> float:
    """β_t of the linear schedule."""
    return 1e-4 + (0.02 - 1e-4) * t / (T - 1)


def alpha(t: int) -> float:
    """α_t = 1 − β_t."""
    return 1 - beta(t)


@cache
def alpha_bar(t: int) -> float:
    """ᾱ_t, the product of α_0 … α_t."""
    return float(np.prod([alpha(s) for s in range(t + 1)]))


def log_normal(x: Any, variance: float) -> Any:
    """Logarithm of the density of N(0, variance)."""
    return -(x**2) / (2 * variance) - log(2 * np.pi * variance) / 2


# ---- the formulas ----

Values = dict[str, Any]


@dataclass(frozen=True)
class Formula:
    """A formula of the page: its implementation, a snippet, and the expected values.

    Attributes:
        code: functions that implement it; (function, text) links to the line of the function that contains the text.
        snippet: code shown on the page, executed after `SETUP`.
        by_hand: maps the variables of the snippet to the expected values of some of them: a value, or (value,
            tolerance).
        any_t: whether the snippet is valid for every t.
    """

    code: tuple
    snippet: str
    by_hand: Callable[[Any], Values]
    any_t: bool = True


SETUP = """
import torch
from custom_ddpm import CustomDDPMScheduler


def show(*numbers):
    print(*(f"{float(number):.6g}" for number in numbers))


scheduler = CustomDDPMScheduler(clip_sample=False)  # T = 1000, β from 1e-4 to 0.02
t = 250  # code counts from 0: this is t = 251 of the formulas, and −1 is the picture
# One pixel: at first, at some earlier time s, now; and two noises.
x_0, x_s, x_t, noise, noise_2 = torch.tensor([0.6, 0.5, -0.3, -1.1, 0.8], dtype=torch.float64).split(1)
zero, one = torch.tensor([0.0, 1.0], dtype=torch.float64).split(1)
"""


def R2_by_hand(v: Any) -> Values:
    """Bayes' theorem on a grid."""
    x = np.linspace(-3, 3, 200_001)
    likelihood = log_normal(v.x_t - sqrt(alpha(v.t)) * x, beta(v.t))
    prior = log_normal(x - sqrt(alpha_bar(v.t - 1)) * v.x_0, 1 - alpha_bar(v.t - 1))
    product = exp(likelihood + prior - (likelihood + prior).max())  # scaled, to avoid underflow in float64
    q = product / product.sum()
    mean = (q * x).sum()
    variance = (q * (x - mean) ** 2).sum()
    return {"mean": mean, "variance": variance, "bayes_mean": mean, "bayes_variance": variance}


def R4_by_hand(v: Any) -> Values:
    """The posterior of one step."""
    t, a_t, a_before = v.t, alpha_bar(v.t), alpha_bar(v.t - 1)
    return {
        "variance": (1 - a_before) / (1 - a_t) * beta(t),
        "mean": sqrt(a_before) * beta(t) / (1 - a_t) * v.x_0 + sqrt(alpha(t)) * (1 - a_before) / (1 - a_t) * v.x_t,
    }


def R7_by_hand(v: Any) -> Values:
    """The posterior of a step from t to s."""
    a_t, a_s = alpha_bar(v.t), alpha_bar(v.s)
    alpha_ts = a_t / a_s
    return {
        "variance": (1 - a_s) / (1 - a_t) * (1 - alpha_ts),
        "mean": sqrt(a_s) * (1 - alpha_ts) / (1 - a_t) * v.x_0 + sqrt(alpha_ts) * (1 - a_s) / (1 - a_t) * v.x_t,
    }


def T2_loop_by_hand(v: Any) -> Values:
    """The optimal weights for Gaussian data."""
    left = np.array([alpha_bar(100 * t + 99) for t in range(10)])
    return {"weight": (sqrt(1 - left) / (0.25 * left + 1 - left), 0.05)}


def S1_by_hand(v: Any) -> Values:
    """One sampling step, with both fixed variances and at the last step."""

    def mean(t: int) -> Any:
        return (v.x_t - beta(t) / sqrt(1 - alpha_bar(t)) * v.noise) / sqrt(alpha(t))

    sigma = sqrt((1 - alpha_bar(v.t - 1)) / (1 - alpha_bar(v.t)) * beta(v.t))
    return {
        "small": mean(v.t) + sigma * v.noise_2,
        "large": mean(v.t) + sqrt(beta(v.t)) * v.noise_2,
        "last": mean(0),
    }


def S1_chain_by_hand(v: Any) -> Values:
    """The chain is linear with Gaussian noise, so mean and variance of x_t follow a recursion."""
    mean, variance = 0.0, 1.0
    for t in reversed(range(T)):
        beta_bar = 1 - alpha_bar(t)
        total = 0.25 * alpha_bar(t) + beta_bar
        # ε̂ = (x_t − 0.3 √ᾱ_t) √(1−ᾱ_t)/total, put into S1.
        slope = (1 - beta(t) / total) / sqrt(alpha(t))
        mean = slope * mean + beta(t) * 0.3 * sqrt(alpha_bar(t)) / total / sqrt(alpha(t))
        variance = slope**2 * variance + (1 - alpha_bar(t - 1)) / beta_bar * beta(t)
    n = len(v.x)
    return {"mean": (mean, 5 * sqrt(variance / n)), "std": (sqrt(variance), 5 * sqrt(variance / 2 / n))}


def eta_by_hand(v: Any) -> Values:
    """DDIM (Song et al. 2021), eq. 12 and 16."""
    a_t, a_s = alpha_bar(v.t), alpha_bar(v.s)
    epsilon = (v.x_t - sqrt(a_t) * v.x_0) / sqrt(1 - a_t)
    means, variances = [], []
    for eta in (0.0, 0.5, 1.0):
        sigma = eta * sqrt((1 - a_s) / (1 - a_t)) * sqrt(1 - a_t / a_s)
        means.append(sqrt(a_s) * v.x_0 + sqrt(1 - a_s - sigma**2) * epsilon)
        variances.append(sigma**2)
    return {"means": means, "variances": variances}


def learned_by_hand(v: Any) -> Values:
    """Interpolation between log β̃ and log β (Nichol & Dhariwal 2021, eq. 15)."""
    small, large = log(R4_by_hand(v)["variance"]), log(beta(v.t))
    return {"log_variances": [(1 + u) / 2 * large + (1 - u) / 2 * small for u in (-1.0, 0.0, 1.0)]}


def zero_snr_by_hand(v: Any) -> Values:
    """Lin et al. 2024, algorithm 1."""
    root = np.array([sqrt(alpha_bar(t)) for t in range(T)])
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return {
        "betas": 1 - np.concatenate([root[:1] ** 2, (root[1:] / root[:-1]) ** 2]),
        "alphas_cumprod": root**2,
        "at_the_end": -v.noise,
    }


def log_snr(t: int) -> float:
    """λ_t, the logarithm of √ᾱ/√(1−ᾱ)."""
    return log(alpha_bar(t) / (1 - alpha_bar(t))) / 2


def S2_by_hand(v: Any) -> Values:
    """A step in λ, with x̂_0 constant in it: for η = 1 and for η = 0."""
    h = log_snr(v.s) - log_snr(v.t)
    noise_t, noise_s = sqrt(1 - alpha_bar(v.t)), sqrt(1 - alpha_bar(v.s))
    means = [
        noise_s / noise_t * exp(-(k - 1) * h) * v.x_t + sqrt(alpha_bar(v.s)) * (1 - exp(-k * h)) * v.x_0
        for k in (2.0, 1.0)
    ]
    return {"means": means, "variance": noise_s**2 * (1 - exp(-2 * h))}


def S3_by_hand(v: Any) -> Values:
    """The weights as solutions of Σ w_j u_j^i = mean of u^i, with the means by Gauss-Legendre quadrature."""
    times, x, xs = [900, 700, 500, 300], v.x_t, []
    nodes, weights = np.polynomial.legendre.leggauss(40)
    for i, (t, s) in enumerate(pairwise(times)):
        h = log_snr(s) - log_snr(t)
        u, density = (nodes + 1) * h / 2, weights * exp((nodes - 1) * h / 2)
        known = range(i, max(-1, i - 3), -1)
        powers = np.array([[(log_snr(times[j]) - log_snr(t)) ** n for j in known] for n in range(len(known))])
        means = np.array([(density * u**n).sum() / density.sum() for n in range(len(known))])
        average = np.linalg.solve(powers, means) @ [v.told[j] for j in known]
        x = sqrt((1 - alpha_bar(s)) / (1 - alpha_bar(t))) * x + sqrt(alpha_bar(s)) * (1 - exp(-h)) * average
        xs.append(x)
    return {"xs": xs}


def S4_by_hand(v: Any) -> Values:
    """All choices of four timesteps, with the first at the end, by their cost."""
    bars = np.cumprod(1 - v.betas)
    signal_to_noise = np.append(np.sqrt(bars / (1 - bars)), np.inf)  # e^λ; the last is the picture
    errors = np.append(0.25 * (1 - bars) / (0.25 * bars + 1 - bars), 0.0)

    def cost(path: tuple) -> float:
        return sum(
            (1 - signal_to_noise[t] / signal_to_noise[s]) ** 2 * (errors[t] - errors[s]) for t, s in pairwise(path)
        )

    best = min(((19, *reversed(rest), -1) for rest in combinations(range(19), 3)), key=cost)
    return {"best": list(best[:-1])}


FORMULAS: dict[str, Formula] = {
    "F1": Formula(
        (normalise,),
        """
from custom_ddpm.data import denormalise, normalise

pixels = torch.tensor([0, 51, 128, 255], dtype=torch.uint8)
x = normalise(pixels)
show(*x)
back = denormalise(x)
show(*back)
""",
        lambda v: {"x": 2 * v.pixels.astype(float) / 255 - 1, "back": v.pixels},
        any_t=False,
    ),
    "F2": Formula(
        (draw,),
        """
from custom_ddpm.training.randomness import draw

# The noise of step 0 of a run with seed 0, for 64 pictures of 16x16.
images = draw(seed=0, step=0, positions=range(64), shape=(1, 16, 16), device=torch.device("cpu")).noise
mean, variance, within_one = images.mean(), images.var(), (images.abs() < 1).double().mean()
print(tuple(images.shape), f"{mean:.3f} {variance:.3f} {within_one:.3f}")
""",
        lambda v: {
            "mean": (0.0, 5 / sqrt(v.images.size)),
            "variance": (1.0, 5 * sqrt(2 / v.images.size)),
            "within_one": (erf(sqrt(0.5)), 5 * sqrt(0.683 * 0.317 / v.images.size)),
        },
        any_t=False,
    ),
    "F3": Formula(
        (CustomDDPMScheduler.forward_step,),
        """
x_next = scheduler.forward_step(x_s, t, noise)  # here x_s is x_{t−1}
show(x_next)
""",
        lambda v: {"x_next": sqrt(1 - beta(v.t)) * v.x_s + sqrt(beta(v.t)) * v.noise},
    ),
    "F4": Formula(
        (make_betas, resample_betas),
        """
from custom_ddpm.schedules import make_betas, resample_betas

betas = make_betas("linear", 1000, beta_start=1e-4, beta_end=0.02)
show(betas[0], betas[499], betas[999])
# What is left of the picture at the end, ᾱ_T: T = 1000, the same range over T = 200, the same shape at T = 200.
short, resampled = make_betas("linear", 200), resample_betas(betas, 200)
show((1 - betas).prod(), (1 - short).prod(), (1 - resampled).prod())
""",
        lambda v: {
            "betas": [beta(t) for t in range(T)],
            "short": [1e-4 + (0.02 - 1e-4) * t / 199 for t in range(200)],
            "resampled": [1 - alpha_bar(5 * t + 4) / alpha_bar(5 * t - 1) for t in range(200)],
        },
        any_t=False,
    ),
    "F5": Formula(
        (CustomDDPMScheduler.forward_step,),
        """
keep, add = scheduler.forward_step(one, t, zero), scheduler.forward_step(zero, t, one)
show(keep, add, keep**2 + add**2)
""",
        lambda v: {"keep": sqrt(alpha(v.t)), "add": sqrt(1 - alpha(v.t))},
    ),
    "F6": Formula(
        (CustomDDPMScheduler.forward_step,),
        """
x_between = scheduler.forward_step(x_s, t - 1, noise)  # here x_s is x_{t−2}
x_twice = scheduler.forward_step(x_between, t, noise_2)
show(x_twice)
""",
        lambda v: {
            "x_twice": sqrt(alpha(v.t) * alpha(v.t - 1)) * v.x_s
            + sqrt(alpha(v.t) * (1 - alpha(v.t - 1))) * v.noise
            + sqrt(1 - alpha(v.t)) * v.noise_2
        },
    ),
    "F7": Formula(
        (CustomDDPMScheduler.add_noise,),
        """
import numpy as np


def density(x, variance):
    return np.exp(-(x**2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)


x, dx = np.linspace(-8, 8, 4001, retstep=True)
h = np.convolve(density(x, 0.36), density(x, 0.64), mode="same") * dx  # ∫ f(x−τ) g(τ) dτ
show(h.sum() * dx, (x**2 * h).sum() * dx)  # its integral and its variance, 0.36 + 0.64
show(h[2500], density(x[2500], 1.0))  # it is the bell of that variance: both at x = 2
scaled = density(x / 0.6, 1.0) / 0.6  # the density of 0.6 · N(0, 1) …
show((x**2 * scaled).sum() * dx)  # … has variance 0.6²
merged = scheduler.add_noise(zero, one, t, t - 2) ** 2  # variance of the one noise in the place of two
show(merged)
""",
        lambda v: {
            "h": exp(log_normal(v.x, 1.0)),
            "scaled": exp(log_normal(v.x, 0.36)),
            "merged": alpha(v.t) * (1 - alpha(v.t - 1)) + (1 - alpha(v.t)),
        },
    ),
    "F8": Formula(
        (CustomDDPMScheduler.add_noise,),
        """
x_merged = scheduler.add_noise(x_s, noise, t, prev_timesteps=t - 2)  # here x_s is x_{t−2}
show(x_merged)
""",
        lambda v: {
            "x_merged": sqrt(alpha(v.t) * alpha(v.t - 1)) * v.x_s + sqrt(1 - alpha(v.t) * alpha(v.t - 1)) * v.noise
        },
    ),
    "F9": Formula(
        (CustomDDPMScheduler.add_noise, log_alphas_cumprod),
        """
x_direct = scheduler.add_noise(x_0, noise, t)
s = t // 2
x_later = scheduler.add_noise(x_s, noise, t, prev_timesteps=s)
show(x_direct, x_later)

# The induction, run: mean and variance pushed through every single step, against the closed form.
mean, variance = x_0, zero
for step in range(t + 1):
    mean = scheduler.forward_step(mean, step, zero)
    keep, add = scheduler.forward_step(one, step, zero), scheduler.forward_step(zero, step, one)
    variance = keep**2 * variance + add**2
show(mean, variance)
show(scheduler.add_noise(x_0, zero, t), scheduler.add_noise(zero, one, t) ** 2)
""",
        lambda v: {
            "x_direct": sqrt(alpha_bar(v.t)) * v.x_0 + sqrt(1 - alpha_bar(v.t)) * v.noise,
            "x_later": sqrt(alpha_bar(v.t) / alpha_bar(v.s)) * v.x_s
            + sqrt(1 - alpha_bar(v.t) / alpha_bar(v.s)) * v.noise,
            "mean": sqrt(alpha_bar(v.t)) * v.x_0,
            "variance": 1 - alpha_bar(v.t),
        },
    ),
    "R1": Formula(
        (CustomDDPMScheduler.add_noise,),
        """
from torch.distributions import Normal

# A: the pixel was ink (+1) or paper (−1). B: now it is x_t.
ink_paper = torch.tensor([1.0, -1.0], dtype=torch.float64)
prior = torch.tensor([0.2, 0.8], dtype=torch.float64)
likelihood = Normal(scheduler.add_noise(ink_paper, 0 * ink_paper, t), scheduler.add_noise(zero, one, t))
log_product = likelihood.log_prob(x_t) + prior.log()
posterior = log_product.softmax(0)  # the product, divided by P(B)
show(*posterior)
""",
        # The same with the squares multiplied out: the odds are those of the prior times exp(2 √ᾱ x_t/(1−ᾱ)).
        lambda v: {
            "posterior": [
                1 / (1 + 4 * exp(-2 * sqrt(alpha_bar(v.t)) * v.x_t / (1 - alpha_bar(v.t)))),
                1 / (1 + exp(2 * sqrt(alpha_bar(v.t)) * v.x_t / (1 - alpha_bar(v.t))) / 4),
            ]
        },
    ),
    "R2": Formula(
        (CustomDDPMScheduler.posterior_mean_variance,),
        """
from torch.distributions import Normal

x = torch.linspace(-3, 3, 200_001, dtype=torch.float64)  # all that x_{t−1} may have been
likelihood = Normal(scheduler.forward_step(x, t, 0 * x), scheduler.forward_step(zero, t, one))  # q(x_t|x_{t−1})
prior = Normal(scheduler.add_noise(x_0, zero, t - 1), scheduler.add_noise(zero, one, t - 1))  # q(x_{t−1}|x_0)
log_product = likelihood.log_prob(x_t) + prior.log_prob(x)
posterior = log_product.softmax(0)  # dividing by q(x_t|x_0) makes the sum 1
bayes_mean = (posterior * x).sum()
bayes_variance = (posterior * (x - bayes_mean) ** 2).sum()
show(bayes_mean, bayes_variance)

mean, variance = scheduler.posterior_mean_variance(x_0, x_t, t)
show(mean, variance)
""",
        R2_by_hand,
    ),
    "R3": Formula(
        (CustomDDPMScheduler.forward_step, CustomDDPMScheduler.add_noise),
        """
likelihood = scheduler.forward_step(x_s, t, zero), scheduler.forward_step(zero, t, one) ** 2  # x_s is x_{t−1}
prior = scheduler.add_noise(x_0, zero, t - 1), scheduler.add_noise(zero, one, t - 1) ** 2
evidence = scheduler.add_noise(x_0, zero, t), scheduler.add_noise(zero, one, t) ** 2
for mean, variance in (likelihood, prior, evidence):
    show(mean, variance)
""",
        lambda v: {
            "likelihood": [sqrt(alpha(v.t)) * v.x_s, 1 - alpha(v.t)],
            "prior": [sqrt(alpha_bar(v.t - 1)) * v.x_0, 1 - alpha_bar(v.t - 1)],
            "evidence": [sqrt(alpha_bar(v.t)) * v.x_0, 1 - alpha_bar(v.t)],
        },
    ),
    "R4": Formula(
        (CustomDDPMScheduler.posterior_mean_variance,),
        """
mean, variance = scheduler.posterior_mean_variance(x_0, x_t, t)
show(mean, variance)
""",
        R4_by_hand,
    ),
    "R5": Formula(
        (CustomDDPMScheduler.predict_original_sample,),
        """
original = scheduler.predict_original_sample(noise, t, x_t)
show(original, scheduler.add_noise(original, noise, t))  # noised again, it is x_t
""",
        lambda v: {"original": (v.x_t - sqrt(1 - alpha_bar(v.t)) * v.noise) / sqrt(alpha_bar(v.t))},
    ),
    "R6": Formula(
        (CustomDDPMScheduler.predict_mean_log_variance,),
        """
mean, log_variance, original = scheduler.predict_mean_log_variance(noise, t, x_t)
show(mean)
""",
        lambda v: {"mean": (v.x_t - beta(v.t) / sqrt(1 - alpha_bar(v.t)) * v.noise) / sqrt(alpha(v.t))},
    ),
    "R7": Formula(
        (CustomDDPMScheduler.posterior_mean_variance,),
        """
s = t // 2
mean, variance = scheduler.posterior_mean_variance(x_0, x_t, t, prev_timesteps=s)
show(mean, variance)
""",
        R7_by_hand,
    ),
    "T1": Formula(
        (training_target, CustomDDPMScheduler.predict_epsilon),
        """
from custom_ddpm.objective import training_target

noisy = scheduler.add_noise(x_0, noise, t)
targets, epsilons = [], []
for prediction_type in ("epsilon", "sample", "v_prediction"):
    target = training_target(CustomDDPMScheduler(prediction_type=prediction_type), x_0, noise, t)
    epsilon = scheduler.predict_epsilon(target, t, noisy, prediction_type)  # whichever is told, ε follows
    targets.append(target)
    epsilons.append(epsilon)
    show(target, epsilon)
""",
        lambda v: {
            "targets": [v.noise, v.x_0, sqrt(alpha_bar(v.t)) * v.noise - sqrt(1 - alpha_bar(v.t)) * v.x_0],
            "epsilons": [v.noise] * 3,
        },
    ),
    "T2": Formula(
        (simple_loss, diffusion_loss, training_steps),
        """
from custom_ddpm.objective import simple_loss

noisy = scheduler.add_noise(x_0, noise, t)
prediction = 0.9 * noisy  # what a network might say
loss = simple_loss(scheduler, prediction[None], x_0[None], noise[None], t)  # (B, C) = (1, 1)
show(loss)
""",
        lambda v: {"loss": (v.noise - 0.9 * (sqrt(alpha_bar(v.t)) * v.x_0 + sqrt(1 - alpha_bar(v.t)) * v.noise)) ** 2},
    ),
    "T2-loop": Formula(
        (),
        """
from custom_ddpm.objective import simple_loss
from custom_ddpm.schedules import make_betas, resample_betas

# Data: pictures of one pixel, drawn from N(0, 0.5²). Network: ε_θ(x_t, t) = weight_t · x_t, a number for each of ten t.
ten = CustomDDPMScheduler(10, trained_betas=resample_betas(make_betas("linear", 1000), 10))
weight = torch.zeros(10, requires_grad=True)
optimizer = torch.optim.Adagrad([weight], lr=0.1)
generator = torch.Generator().manual_seed(0)
for _ in range(500):
    pixels = 0.5 * torch.randn(1024, 1, generator=generator)
    times = torch.randint(10, (1024,), generator=generator)
    noises = torch.randn(1024, 1, generator=generator)
    noisy = ten.add_noise(pixels, noises, times)
    loss = simple_loss(ten, weight[times, None] * noisy, pixels, noises, times).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# The best that any network can do is known in this world: E[ε|x_t] = x_t √(1−ᾱ_t)/(0.25 ᾱ_t + 1−ᾱ_t).
alpha_bar = ten.alphas_cumprod
best = (1 - alpha_bar).sqrt() / (0.25 * alpha_bar + 1 - alpha_bar)
for i in (0, 1, 2, 9):
    print(f"t = {i}: learned {weight[i].item():.2f}, best {best[i].item():.2f}")
""",
        T2_loop_by_hand,
        any_t=False,
    ),
    "S1": Formula(
        (CustomDDPMScheduler.step,),
        """
# noise: what the network says of x_t; noise_2: z.
small = scheduler.step(noise, t, x_t, variance_noise=noise_2).prev_sample
with_beta = CustomDDPMScheduler(clip_sample=False, variance_type="fixed_large")
large = with_beta.step(noise, t, x_t, variance_noise=noise_2).prev_sample
last = scheduler.step(noise, 0, x_t, variance_noise=noise_2).prev_sample  # arrives at x_0: no z
show(small, large, last)
""",
        S1_by_hand,
    ),
    "S1-chain": Formula(
        (CustomDDPMPipeline._denoise,),
        """
# Pictures of one pixel, drawn from N(0.3, 0.5²): the best network is known there.
generator = torch.Generator().manual_seed(1)
x = torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
for time in scheduler.timesteps:  # T−1 … 0
    alpha_bar = scheduler.alphas_cumprod[time].double()
    epsilon = (x - 0.3 * alpha_bar.sqrt()) * (1 - alpha_bar).sqrt() / (0.25 * alpha_bar + 1 - alpha_bar)
    x = scheduler.step(epsilon, time, x, generator=generator).prev_sample
mean, std = x.mean(), x.std()
print(f"{mean:.3f} ± {std / 20_000**0.5:.3f}, {std:.3f}")
""",
        S1_chain_by_hand,
        any_t=False,
    ),
    "eta": Formula(
        (CustomDDPMScheduler.posterior_mean_variance, CustomDDPMScheduler.step),
        """
s = t // 2
means, variances = [], []
for eta in (0.0, 0.5, 1.0):
    mean, variance = scheduler.posterior_mean_variance(x_0, x_t, t, s, eta=eta)
    means.append(mean)
    variances.append(variance)
    show(eta, mean, variance)
""",
        eta_by_hand,
    ),
    "learned": Formula(
        (CustomDDPMScheduler.predict_mean_log_variance, diffusion_loss),
        """
learning = CustomDDPMScheduler(variance_type="learned_range")
log_variances = []
for u in (-1.0, 0.0, 1.0):
    model_output = torch.stack([noise, u * one], dim=1)  # (B, 2C): the second half of the channels is u
    _, log_variance, _ = learning.predict_mean_log_variance(model_output, t, x_t[:, None])
    log_variances.append(log_variance)
    show(u, log_variance.exp())
""",
        learned_by_hand,
    ),
    "zero-snr": Formula(
        (rescale_zero_terminal_snr, CustomDDPMScheduler.predict_original_sample),
        """
v = CustomDDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
betas, alphas_cumprod = v.betas, v.alphas_cumprod
show(betas[0], betas[-1], alphas_cumprod[0], alphas_cumprod[-1])
at_the_end = v.predict_original_sample(noise, 999, x_t)
show(at_the_end)  # x_0 = −v where ᾱ = 0

try:
    CustomDDPMScheduler(prediction_type="epsilon", rescale_betas_zero_snr=True)
except ValueError as error:
    print(error)
""",
        zero_snr_by_hand,
        any_t=False,
    ),
    "S2": Formula(
        (CustomDDPMScheduler.posterior_mean_variance,),
        """
s = t // 2
mean, variance = scheduler.posterior_mean_variance(x_0, x_t, t, s)  # η = 1
deterministic, _ = scheduler.posterior_mean_variance(x_0, x_t, t, s, eta=0)
means = [mean, deterministic]
show(mean, variance, deterministic)
""",
        S2_by_hand,
    ),
    "S3": Formula(
        (CustomDDPMScheduler._multistep_weights, CustomDDPMScheduler.step),
        """
third = CustomDDPMScheduler(clip_sample=False, prediction_type="sample", solver_order=3)
third.set_timesteps(timesteps=[900, 700, 500, 300, 100])
told = [x_0, x_s, noise]  # what a network might say x_0 is at 900, 700 and 500
x, xs = x_t, []
for time, original in zip(third.timesteps, told):
    x = third.step(original, time, x, eta=0.0).prev_sample  # with one, two, three points
    xs.append(x)
show(*xs)
""",
        S3_by_hand,
        any_t=False,
    ),
    "S4": Formula(
        (optimal_timesteps,),
        """
from custom_ddpm.schedules import log_alphas_cumprod, optimal_timesteps, resample_betas

betas = resample_betas(scheduler.betas.double(), 20)  # the same schedule in 20 steps
bars = log_alphas_cumprod(betas).exp()
errors = 0.25 * (1 - bars) / (0.25 * bars + 1 - bars)  # of the best network, for pictures of variance 0.25
best = torch.tensor(optimal_timesteps(bars.log(), errors.tolist(), 4))
show(*best)
""",
        S4_by_hand,
        any_t=False,
    ),
}

# ---- running and comparing ----


def set_up() -> Values:
    """The variables of a session in which only `SETUP` was executed."""
    variables: Values = {}
    exec(SETUP, variables)
    return variables


def execute(snippet: str, variables: Values) -> str:
    """Execute a snippet in a session; returns its output."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(snippet, variables)
    return printed.getvalue()


def run(snippet: str, t: int | None = None) -> tuple[Values, str]:
    """Execute a snippet in a new session; returns the session's variables and the output."""
    variables = set_up() if t is None else set_up() | {"t": t}
    return variables, execute(snippet, variables)


def run_in_one_session(outputs: dict[str, str]) -> None:
    """Execute all snippets in one session; exit with a message if one prints something else than in `outputs`."""
    variables = set_up()
    given = {name: repr(value) for name, value in variables.items() if not name.startswith("__")}
    for name, formula in FORMULAS.items():
        try:
            output = execute(formula.snippet, variables)
        except Exception as error:
            raise SystemExit(f"{name}: fails after the snippets before it: {one_line(error)}") from error
        changed = [key for key, value in given.items() if repr(variables[key]) != value]
        if changed:
            raise SystemExit(f"{name}: changes {', '.join(changed)} of the set-up, which later snippets need")
        if output != outputs[name]:
            raise SystemExit(f"{name}: prints something else after the snippets before it than alone")


def flat(value: Any) -> np.ndarray:
    """A number, tensor, array or nested list of them as a 1-D array."""
    if isinstance(value, list | tuple):
        return np.concatenate([flat(part) for part in value])
    return np.ravel(value.detach().numpy() if isinstance(value, torch.Tensor) else value)


def compare(name: str, formula: Formula, variables: Values) -> None:
    """Exit with a message if the variables of a snippet differ from the formula."""
    arrays = {key: flat(value) if isinstance(value, torch.Tensor) else value for key, value in variables.items()}
    with np.errstate(over="ignore", under="ignore"):
        by_hand = formula.by_hand(SimpleNamespace(**arrays))
    for variable, expected in by_hand.items():
        got = flat(variables[variable])
        if isinstance(expected, tuple):
            expected, tolerance = expected
            close = np.abs(got - flat(expected)) <= tolerance
        else:
            relative, absolute = TOLERANCES.get(got.dtype.name, (0, 0))
            close = np.isclose(got, flat(expected), rtol=relative, atol=absolute)
        if not close.all():
            worst = int(np.argmin(close))
            at = f" at t = {variables['t']}" if formula.any_t else ""
            raise SystemExit(
                f"{name}: {variable} is {got[worst]:.10g} in code and {flat(expected)[worst]:.10g} by the formula{at}"
            )


def check_formulas() -> dict[str, str]:
    """Compare every formula with its code, alone and in one session; returns the output of every snippet."""
    outputs = {}
    for name, formula in FORMULAS.items():
        variables, outputs[name] = run(formula.snippet)
        compare(name, formula, variables)
        for t in CHECKED_TIMESTEPS if formula.any_t else ():
            compare(name, formula, run(formula.snippet, t)[0])
    run_in_one_session(outputs)
    return outputs


# ---- the pages ----


def link(code: Any) -> str:
    """Markdown link to the definition of a function, or to the line in it that contains a text."""
    function, text = code if isinstance(code, tuple) else (code, "def ")
    function = inspect.unwrap(function)
    lines, first = inspect.getsourcelines(function)
    found = [i for i, line in enumerate(lines) if text in line]
    if not found:
        raise SystemExit(f"{function.__qualname__} has no line with {text!r} to link to")
    path = Path(inspect.getfile(function)).resolve().relative_to(DOCS.parent)
    return f"[`{function.__qualname__}`](../{path.as_posix()}#L{first + found[0]})"


def fenced(language: str, text: str) -> str:
    """A Markdown code block."""
    return f"```{language}\n{text.strip()}\n```"


def precision_table() -> str:
    """Markdown table of the largest relative errors, as measured by benchmarks/precision.py."""
    sys.path.insert(0, str(DOCS.parent / "benchmarks"))
    import precision

    columns = {}
    for schedule in precision.reference.SCHEDULES:
        exact = precision.exact(schedule)
        columns[schedule] = [
            precision.errors(value, truth)[1]
            for value, truth in zip(precision.ours(schedule), exact.values(), strict=True)
        ]
    names = [" ".join(name.split()) for name in exact]
    head = "| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns)
    rows = [
        f"| {name} | " + " | ".join(f"{errors[i]:.1e}" for errors in columns.values()) + " |"
        for i, name in enumerate(names)
    ]
    return "\n".join([head, *rows])


Part = str | tuple[str, str]  # Markdown, or code and what it prints


def page_parts(page: str, blocks: dict[str, list[Part]]) -> list[Part]:
    """The parts of a page in order: the text of its template, and its blocks in their places."""
    template = (DOCS / "templates" / f"{page}.md").read_text(encoding="utf-8")
    first, *rest = re.split(r"^\{\{(.+)\}\}$", template, flags=re.MULTILINE)
    asked = rest[::2]
    if sorted(asked) != sorted(blocks):
        differing = sorted(set(asked) ^ set(blocks)) or sorted(n for n in asked if asked.count(n) > 1)
        raise SystemExit(f"templates/{page}.md must contain each block once; check {', '.join(differing)}")
    parts: list[Part] = [first]
    for name, text in zip(asked, rest[1::2], strict=True):
        parts += [*blocks[name], text]
    return parts


def markdown(parts: list[Part]) -> str:
    """The parts as one Markdown text: code and output are fenced blocks."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part.strip())
        else:
            texts += [fenced("python", part[0])] + ([fenced("text", part[1])] if part[1] else [])
    return "\n\n".join(text for text in texts if text) + "\n"


def pages() -> dict[str, str]:
    """Generate all pages and notebooks: file name -> text."""
    outputs, precision = check_formulas(), precision_table()
    result = {}
    for page, (label, to_notebook, to_page) in PAGES.items():
        blocks: dict[str, list[Part]] = {"setup": [(SETUP, "")], "precision": [precision]}
        for name, formula in FORMULAS.items():
            links = [label + ", ".join(map(link, formula.code))] if formula.code else []
            blocks[name] = [*links, (formula.snippet, outputs[name])]
        parts = page_parts(page, blocks)
        result[f"{page}.md"] = markdown(parts).replace("{{other}}", to_notebook)
        result[f"{page}.ipynb"] = notebook(parts).replace("{{other}}", to_page)
    return result


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Check the derivation against the code and generate its pages.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="write nothing; fail if a page is not up to date")
    what.add_argument("--figures", action="store_true", help="also draw the figures that need no trained model")
    what.add_argument("--model", help="also draw all figures, with a pipeline of examples/configs/digits_epsilon.yaml")
    options = parser.parse_args(arguments)
    for page, text in pages().items():
        path = DOCS / page
        if not options.check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            raise SystemExit(f"docs/{page} is not up to date: run python docs/make_derivation.py")
    if options.figures or options.model is not None:
        from derivation_figures import draw_figures

        draw_figures(DOCS / "figures", options.model)


if __name__ == "__main__":
    main()
