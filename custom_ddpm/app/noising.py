"""The mathematics of the tab Forward: noise is added to a picture (F3, F9), and to one pixel in two steps (F6-F8).

Every coefficient comes from `CustomDDPMScheduler`. Here t counts 1 … T as in the formulas; the scheduler counts from 0.
"""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data.pixels import denormalise, normalise
from ..scheduler import CustomDDPMScheduler

T = 1000
BLOCK = 20  # steps of the chain between two states that are kept
DRAWS = 10_000  # of the comparison of two steps with one
START = 0.6  # x_{t−2} in that comparison
RANGE, BINS = (-4.0, 4.0), 64  # of the histogram
EDGES = np.linspace(*RANGE, BINS + 1)


class Coefficients(NamedTuple):
    """What the formulas have at one t: F3 and F5 (one step), F9 (from x_0), and the signal-to-noise ratio."""

    keep_step: float  # √α_t
    add_step: float  # √β_t
    keep: float  # √ᾱ_t
    add: float  # √(1−ᾱ_t)
    snr: float


class TwoSteps(NamedTuple):
    """F6 and F8 at one t: exact, and the draws of both."""

    keep_twice: float  # √α_t √α_{t−1}
    first_variance: float  # α_t (1−α_{t−1})
    second_variance: float  # 1−α_t
    keep_merged: float
    merged_variance: float  # 1−α_t α_{t−1}
    twice: np.ndarray
    merged: np.ndarray


@cache
def scheduler(schedule: str) -> CustomDDPMScheduler:
    """The scheduler of a β schedule with T = 1000 and the paper's range of β."""
    return CustomDDPMScheduler(num_train_timesteps=T, beta_schedule=schedule)


def whole(value: Any, low: int, high: int) -> int:
    """A slider's value as an integer in its range; the lowest where its field was emptied."""
    return low if value is None else min(max(round(value), low), high)


def as_sample(picture: np.ndarray) -> torch.Tensor:
    """x_0, float32 (1, C, H, W) in [−1, 1], of uint8 pixels (H, W) or (H, W, C) (F1)."""
    pixels = torch.from_numpy(np.atleast_3d(picture).transpose(2, 0, 1).copy())
    return normalise(pixels)[None]


def as_picture(sample: torch.Tensor) -> np.ndarray:
    """The inverse of `as_sample`; values outside [−1, 1] are clipped."""
    pixels = denormalise(sample[0]).permute(1, 2, 0).numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


@lru_cache(maxsize=8192)
def coefficients(schedule: str, t: int) -> Coefficients:
    """The mixture's coefficients at t in 1 … T."""
    noise_scheduler, k = scheduler(schedule), t - 1
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    values = (
        noise_scheduler.forward_step(one, k, zero),
        noise_scheduler.forward_step(zero, k, one),
        noise_scheduler.add_noise(one, zero, k),
        noise_scheduler.add_noise(zero, one, k),
        noise_scheduler.snr(k),
    )
    return Coefficients(*(float(value) for value in values))


def _walk(x: torch.Tensor, schedule: str, seed: int, start: int, end: int) -> torch.Tensor:
    """The chain F3 from x at t = `start` to t = `end`, with a noise of its own for each step."""
    for t in range(start + 1, end + 1):
        noise = torch.from_numpy(np.random.default_rng([seed, t]).standard_normal(tuple(x.shape), np.float32))
        x = scheduler(schedule).forward_step(x, t - 1, noise)
    return x


@lru_cache(maxsize=16 * T // BLOCK)
def _kept(pixels: bytes, shape: tuple[int, ...], schedule: str, seed: int, block: int) -> torch.Tensor:
    """x at t = block · BLOCK, kept so that a slider's move costs less than a block of steps."""
    if block == 0:
        return as_sample(np.frombuffer(pixels, np.uint8).reshape(shape))
    before = _kept(pixels, shape, schedule, seed, block - 1)
    return _walk(before, schedule, seed, (block - 1) * BLOCK, block * BLOCK)


def chain(picture: np.ndarray, t: int, schedule: str, seed: int) -> torch.Tensor:
    """x_t, (1, C, H, W), after t steps of F3."""
    kept = _kept(picture.tobytes(), picture.shape, schedule, seed, t // BLOCK)
    return _walk(kept, schedule, seed, t - t % BLOCK, t)


def closed_form(picture: np.ndarray, t: int, schedule: str, seed: int) -> torch.Tensor:
    """x_t, (1, C, H, W), in one step (F9) with one noise, which stays the same while t moves."""
    x = as_sample(picture)
    noise = np.random.default_rng([seed, 0]).standard_normal(tuple(x.shape), np.float32)
    return scheduler(schedule).add_noise(x, torch.from_numpy(noise), t - 1)


def noise_in(picture: np.ndarray, x_t: torch.Tensor, t: int, schedule: str) -> tuple[float, float]:
    """Mean and variance of the noise in x_t by F9, (x_t − √ᾱ_t x_0)/√(1−ᾱ_t), over the pixels."""
    noise = scheduler(schedule).predict_epsilon(as_sample(picture), t - 1, x_t, "sample")
    return float(noise.mean()), float(noise.var())


def histogram(x_t: torch.Tensor) -> np.ndarray:
    """How often the pixels fall into each bin of `EDGES`, as a density."""
    return np.histogram(x_t.numpy(), BINS, RANGE)[0] / (x_t.numel() * (EDGES[1] - EDGES[0]))


def expected_density(picture: np.ndarray, t: int, schedule: str) -> np.ndarray:
    """The mean over the bins `EDGES` of the density of x_t's pixels, whatever the noise (F9)."""
    found = coefficients(schedule, t)
    counts = np.bincount(picture.ravel(), minlength=256)
    shares = torch.from_numpy(counts / picture.size)
    values = normalise(torch.arange(256, dtype=torch.uint8)).double()
    below = torch.special.ndtr((torch.from_numpy(EDGES)[:, None] - found.keep * values) / found.add)
    return ((below @ shares).diff() / (EDGES[1] - EDGES[0])).numpy()


@lru_cache(maxsize=8)
def _draws(seed: int) -> tuple[torch.Tensor, ...]:
    draws = np.random.default_rng([seed, T + 1]).standard_normal((3, DRAWS), np.float32)
    return torch.from_numpy(draws).unbind(0)


def two_steps(schedule: str, t: int, seed: int = 0) -> TwoSteps:
    """Two steps (F6) and the merged one (F8) to t in 2 … T, from x_{t−2} = `START`."""
    noise_scheduler, k = scheduler(schedule), t - 1
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

    def twice(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return noise_scheduler.forward_step(noise_scheduler.forward_step(x, k - 1, first), k, second)

    def merged(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return noise_scheduler.add_noise(x, noise, k, prev_timesteps=k - 2)

    first, second, third = _draws(seed)
    start = torch.full_like(first, START)
    return TwoSteps(
        float(twice(one, zero, zero)),
        float(twice(zero, one, zero)) ** 2,
        float(twice(zero, zero, one)) ** 2,
        float(merged(one, zero)),
        float(merged(zero, one)) ** 2,
        twice(start[:, None], first[:, None], second[:, None])[:, 0].numpy(),
        merged(start[:, None], third[:, None])[:, 0].numpy(),
    )


def bell(x: np.ndarray, mean: float, variance: float) -> np.ndarray:
    """The density of N(mean, variance)."""
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
