"""The formulas in 40-digit arithmetic: a reference that is independent of the package.

Values are mpmath numbers or lists of them, computed by the textbook expressions; with 40 digits cancellation does not
matter. `floats` rounds to the nearest float64.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from mpmath import cos, exp, floor, log, mp, mpf, pi, sqrt

mp.dps = 40

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp")


def floats(values: Iterable) -> np.ndarray:
    return np.array([float(value) for value in values])


def _between(start, end, n: int) -> list:
    return [start + (end - start) * i / (n - 1) if n > 1 else start for i in range(n)]


def _alpha_bar_curve(schedule: str, u):
    if schedule == "squaredcos_cap_v2":
        return cos((u + mpf("0.008")) / mpf("1.008") * pi / 2) ** 2
    if schedule == "exp":
        return exp(-12 * u)
    # Quantile function of a Laplace density with scale 1/2 for log SNR; ᾱ = √sigmoid(log SNR).
    sign = 1 if u <= mpf("0.5") else -1
    log_snr = -sign * log(1 - 2 * abs(mpf("0.5") - u) + mpf("1e-6")) / 2
    return sqrt(exp(log_snr) / (1 + exp(log_snr)))


@lru_cache
def betas(schedule: str, T: int = 1000, start: float = 1e-4, end: float = 0.02) -> tuple:
    start, end = mpf(start), mpf(end)
    if schedule == "linear":
        return tuple(_between(start, end, T))
    if schedule == "scaled_linear":
        return tuple(root**2 for root in _between(sqrt(start), sqrt(end), T))
    if schedule == "sigmoid":
        return tuple(start + (end - start) / (1 + exp(-x)) for x in _between(mpf(-6), mpf(6), T))
    curve = [_alpha_bar_curve(schedule, mpf(i) / T) for i in range(T + 1)]
    return tuple(min(1 - later / earlier, mpf("0.999")) for earlier, later in pairwise(curve))


def zero_terminal_snr(betas: Sequence) -> list:
    """Lin et al. 2024, algorithm 1: √ᾱ shifted to end at 0 and scaled to keep its first value."""
    roots = [sqrt(a) for a in alphas_cumprod(betas)]
    moved = [(r - roots[-1]) * roots[0] / (roots[0] - roots[-1]) for r in roots]
    alphas = [moved[0] ** 2] + [(b / a) ** 2 for a, b in pairwise(moved)]
    return [1 - a for a in alphas]


def alphas_cumprod(betas: Sequence) -> list:
    """F9: ᾱ_t = ∏ (1 − β_s)."""
    products, product = [], mpf(1)
    for beta in betas:
        product *= 1 - mpf(beta)
        products.append(product)
    return products


def alpha_bar(abar: Sequence, t: int):
    return mpf(1) if t == -1 else abar[t]


def noising(abar: Sequence, t: int, s: int = -1) -> tuple:
    """F9: (coefficient of x_s, coefficient of ε) of x_t."""
    ratio = alpha_bar(abar, t) / alpha_bar(abar, s)
    return sqrt(ratio), sqrt(1 - ratio)


def posterior(abar: Sequence, t: int, s: int) -> tuple:
    """R4 with R7: (coefficient of x_0, coefficient of x_t, variance) of q(x_s | x_t, x_0)."""
    a_t, a_s = alpha_bar(abar, t), alpha_bar(abar, s)
    alpha = a_t / a_s
    beta = 1 - alpha
    return sqrt(a_s) * beta / (1 - a_t), sqrt(alpha) * (1 - a_s) / (1 - a_t), (1 - a_s) / (1 - a_t) * beta


def ddim(abar: Sequence, t: int, s: int, eta) -> tuple:
    """Song et al. 2021 (arXiv:2010.02502), eq. 12 and 16, in terms of x_0 and x_t; returns the same as `posterior`."""
    a_t, a_s = alpha_bar(abar, t), alpha_bar(abar, s)
    variance = mpf(eta) ** 2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    of_epsilon = sqrt(1 - a_s - variance)
    return sqrt(a_s) - of_epsilon * sqrt(a_t) / sqrt(1 - a_t), of_epsilon / sqrt(1 - a_t), variance


def positions(spacing: str, T: int, n: int) -> list:
    """Lin et al. 2024, table 2: descending, from 0, before rounding to timesteps; "leading" rounds down."""
    if spacing == "linspace":
        return [mpf(i) * (T - 1) / (n - 1) if n > 1 else mpf(0) for i in range(n)][::-1]
    if spacing == "leading":
        return [floor(mpf(i) * T / n) for i in range(n)][::-1]
    return [mpf(T) - mpf(i) * T / n - 1 for i in range(n)]


def timesteps(spacing: str, T: int, n: int) -> list[int]:
    return [round(float(position)) for position in positions(spacing, T, n)]
