"""The mathematics of the tab Bayes: R2, R3 and R4 (R7 for larger steps) for one pixel.

Every number of a formula comes from `CustomDDPMScheduler`; the product of the bells is measured on a grid. Here t and s
count as in the formulas, 0 <= s < t <= T, and s = 0 is the picture; the scheduler counts from 0.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from .noising import T, scheduler, whole

GRIDS, POINTS = 3, 1001


class Bayes(NamedTuple):
    """R2, R3, R4 and R7 for one pixel."""

    t: int
    s: int
    x_0: float
    x_t: float
    keep: float  # √(ᾱ_t/ᾱ_s), for s = t−1 √α_t
    beta: float  # 1 − ᾱ_t/ᾱ_s
    prior_mean: float
    prior_variance: float
    evidence_mean: float
    evidence_variance: float
    A: float
    B: float
    mean: float  # of the posterior, by R4 or R7
    variance: float
    of_original: float  # the weights in that mean
    of_sample: float

    @property
    def name(self) -> str:
        """The number of the formula of its mean and variance."""
        return "R4" if self.s == self.t - 1 else "R7"

    @property
    def log_evidence(self) -> float:
        """log q(x_t | x_0)."""
        variance = self.evidence_variance
        return -((self.x_t - self.evidence_mean) ** 2) / (2 * variance) - 0.5 * math.log(2 * math.pi * variance)

    def log_product(self, x: np.ndarray) -> np.ndarray:
        """log q(x_t | x_s) + log q(x_s | x_0) at x_s = x; needs s > 0."""
        return _log_bell(self.x_t, self.keep * x, self.beta) + _log_bell(x, self.prior_mean, self.prior_variance)

    @property
    def likelihood(self) -> tuple[float, float]:
        """Centre and variance of the likelihood as a function of x_s."""
        return self.x_t / self.keep, self.beta / self.keep**2


class Measured(NamedTuple):
    """The product of prior and likelihood on a grid: nothing here is taken from R4."""

    x: np.ndarray
    height: np.ndarray  # with peak 1
    log_area: float
    mean: float
    variance: float


def _log_bell(x: Any, mean: Any, variance: float) -> Any:
    return -((x - mean) ** 2) / (2 * variance) - 0.5 * math.log(2 * math.pi * variance)


def bayes(schedule: str, t: int, s: int, x_0: float, x_t: float) -> Bayes:
    """All that R2, R3 and R4 (R7 where s < t − 1) say about x_s, for 0 <= s < t <= T."""
    noise_scheduler = scheduler(schedule)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

    def mixture(to: int, start: int) -> tuple[float, float]:
        """The factors of the picture and of the noise from `start` to `to`."""
        if to == start:
            return 1.0, 0.0
        return (
            float(noise_scheduler.add_noise(one, zero, to - 1, start - 1)),
            float(noise_scheduler.add_noise(zero, one, to - 1, start - 1)),
        )

    def posterior(original: float, sample: float) -> tuple[float, float]:
        mean, variance = noise_scheduler.posterior_mean_variance(original * one, sample * one, t - 1, s - 1)
        return float(mean), float(variance)

    (keep, add), (keep_s, add_s), (keep_t, add_t) = mixture(t, s), mixture(s, 0), mixture(t, 0)
    beta, prior_variance = add**2, add_s**2
    if s == 0:
        A = B = math.inf
    else:
        A = keep**2 / beta + 1 / prior_variance
        B = keep * x_t / beta + keep_s * x_0 / prior_variance
    mean, variance = posterior(x_0, x_t)
    weights = posterior(1.0, 0.0)[0], posterior(0.0, 1.0)[0]
    prior, evidence = (keep_s * x_0, prior_variance), (keep_t * x_0, add_t**2)
    return Bayes(t, s, x_0, x_t, keep, beta, *prior, *evidence, A, B, mean, variance, *weights)


def measured(found: Bayes) -> Measured:
    """The product on a grid, its area, mean and variance; needs s > 0.

    The product has its peak between the two centres, and is no wider than the narrower bell. The first grid reaches 8
    of its deviations beyond the centres; the next ones, finer, beyond the highest point of the last.
    """
    centre, variance = found.likelihood
    beyond = 8 * math.sqrt(min(variance, found.prior_variance))
    low, high = min(centre, found.prior_mean), max(centre, found.prior_mean)
    for _ in range(GRIDS):
        x = np.linspace(low - beyond, high + beyond, POINTS)
        log = found.log_product(x)
        peak, spacing = float(x[log.argmax()]), float(x[1] - x[0])
        low, high = peak - spacing, peak + spacing
    height = np.exp(log - log.max())
    total = height.sum()
    mean = float((height * x).sum() / total)
    spread = float((height * (x - mean) ** 2).sum() / total)
    return Measured(x, height, float(log.max() + math.log(total * spacing)), mean, spread)


def steps(t: float | None, s: float | None, follows: bool) -> tuple[int, int]:
    """The sliders' t and s as integers with 0 <= s < t <= T."""
    t = whole(t, 1, T)
    return t, t - 1 if follows else whole(s, 0, t - 1)
