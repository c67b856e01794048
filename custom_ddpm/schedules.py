"""β schedules (F4) and the choice of timesteps (S4), as pure functions in float64.

A schedule is a vector β_1 … β_T with 0 < β_t < 1; ᾱ, the posterior and the SNR follow from it. There are two families.
linear, scaled_linear and sigmoid define β between `beta_start` and `beta_end`, so ᾱ_T depends on T. squaredcos_cap_v2,
laplace and exp define the curve ᾱ(u) for u ∈ [0, 1] and derive β from it, so its shape does not depend on T.
`resample_betas` changes T at a fixed ᾱ curve for any schedule.

This file imports nothing of the package: it is saved beside `scheduler.py` in every model repository.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch


def _laplace_alpha_bar(u: float) -> float:
    # As in diffusers, for compatible configurations: √ of the paper's ᾱ, and 1e-6 inside the logarithm.
    log_snr = -math.copysign(0.5, 0.5 - u) * math.log(1.0 - 2.0 * abs(0.5 - u) + 1e-6)
    return math.sqrt(1.0 / (1.0 + math.exp(-log_snr)))


ALPHA_BAR_CURVES: dict[str, Callable[[float], float]] = {
    # Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17, without the constant factor, which cancels in β.
    "squaredcos_cap_v2": lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2.0) ** 2,
    # Hang et al. 2024 (arXiv:2407.03297), Laplace density of log-SNR, μ = 0, b = 1/2.
    "laplace": _laplace_alpha_bar,
    "exp": lambda u: math.exp(-12.0 * u),
}
BETA_RANGES: dict[str, Callable[[float, float, int], torch.Tensor]] = {
    # Ho et al. 2020 (arXiv:2006.11239), section 4.
    "linear": lambda start, end, n: torch.linspace(start, end, n, dtype=torch.float64),
    # Rombach et al. 2022 (arXiv:2112.10752): linear in √β.
    "scaled_linear": lambda start, end, n: torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64) ** 2,
    # Xu et al. 2022, GeoDiff (arXiv:2203.02923).
    "sigmoid": lambda start, end, n: (
        torch.sigmoid(torch.linspace(-6.0, 6.0, n, dtype=torch.float64)) * (end - start) + start
    ),
}
BETA_SCHEDULES = (*BETA_RANGES, *ALPHA_BAR_CURVES)
MAX_BETA = 0.999


def make_betas(
    beta_schedule: str = "linear",
    num_train_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
) -> torch.Tensor:
    """β_1 … β_T of a named schedule (F4).

    Args:
        beta_schedule: one of `BETA_SCHEDULES`.
        num_train_timesteps: T >= 1.
        beta_start: β_1, in (0, 1); used by linear, scaled_linear and sigmoid only.
        beta_end: β_T, in (0, 1); used by linear, scaled_linear and sigmoid only.

    Returns:
        float64 tensor of shape (T,).

    Raises:
        NotImplementedError: unknown `beta_schedule` (the same exception as in diffusers).
    """
    if beta_schedule in BETA_RANGES:
        return BETA_RANGES[beta_schedule](beta_start, beta_end, num_train_timesteps)
    if beta_schedule not in ALPHA_BAR_CURVES:
        raise NotImplementedError(
            f"beta_schedule {beta_schedule!r} is not implemented; choose one of {', '.join(BETA_SCHEDULES)}"
        )
    alpha_bar = ALPHA_BAR_CURVES[beta_schedule]
    curve = torch.tensor(
        [alpha_bar(i / num_train_timesteps) for i in range(num_train_timesteps + 1)], dtype=torch.float64
    )
    return (1.0 - curve[1:] / curve[:-1]).clamp(max=MAX_BETA)


def log_alphas_cumprod(betas: torch.Tensor) -> torch.Tensor:
    """log ᾱ_t = Σ_{s<=t} log(1−β_s) (F9).

    The logarithm is stored because every difference in the derivation follows from it without cancellation:
    1−ᾱ_t = −expm1(log ᾱ_t) and 1−ᾱ_t/ᾱ_s = −expm1(log ᾱ_t − log ᾱ_s).

    Args:
        betas: (T,), each in (0, 1].

    Returns:
        float64 (T,); −inf where ᾱ_t = 0.
    """
    return torch.log1p(-betas.double()).cumsum(0)


def rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Shift and scale √ᾱ so that ᾱ_T = 0 and ᾱ_1 is unchanged (Lin et al. 2024, arXiv:2305.08891, algorithm 1).

    Args:
        betas: (T,), T >= 2, each in (0, 1].

    Returns:
        float64 (T,); its last value is exactly 1.
    """
    root = (0.5 * log_alphas_cumprod(betas)).exp()
    shifted = root - root[-1]  # the scale factor that restores the first value cancels in every ratio
    return torch.cat([betas[:1].double(), 1.0 - (shifted[1:] / shifted[:-1]) ** 2])


def resample_betas(betas: torch.Tensor, num_train_timesteps: int) -> torch.Tensor:
    """Resample a schedule to another number of steps with the same ᾱ curve.

    `make_betas("linear", 200)` ends at ᾱ_T = 0.13: β is still 1e-4 … 0.02 but there are fewer steps, so x_T is not pure
    noise. `resample_betas(make_betas("linear", 1000), 200)` ends at the ᾱ_T of the 1000 steps. log ᾱ is interpolated
    linearly at u = t/T; where T divides the given number of steps, the new ᾱ are a subset of the given ones. Pass the
    result to the scheduler as `trained_betas`.

    Args:
        betas: the given schedule, each value in (0, 1).
        num_train_timesteps: the new T >= 1.

    Returns:
        float64 (T,).
    """
    logs = torch.cat([torch.zeros(1, dtype=torch.float64), log_alphas_cumprod(betas)])
    position = torch.arange(num_train_timesteps + 1, dtype=torch.float64) * (len(betas) / num_train_timesteps)
    left = position.floor().long().clamp(max=len(betas) - 1)
    logs = torch.lerp(logs[left], logs[left + 1], position - left)
    return -torch.expm1(logs.diff())


def optimal_timesteps(log_alphas_cumprod: torch.Tensor, errors: Sequence[float], num_steps: int) -> np.ndarray:
    """The timesteps with the least sum of what their steps leave out (S4), by dynamic programming.

    A step from t to s takes x̂_0 as constant and gives it the share 1 − e^{−h} of the picture in x_s, h = λ_s − λ_t. In
    the step x̂_0 changes by E_t − E_s in mean square, where E_t is its mean squared error. The cost of the step is
    (1 − e^{−h})² times that. The search is that of Watson et al. 2021 (arXiv:2106.03802), whose cost is the bound.

    Args:
        log_alphas_cumprod: log ᾱ, float64 (T,).
        errors: E|x_0 − x̂_0(x_t)|²/d for every t, as from `likelihood.estimate_original_sample_variances`.
        num_steps: number of steps, 1 … T.

    Returns:
        int64 (num_steps,), descending from T−1.
    """
    if num_steps == len(log_alphas_cumprod):
        return np.arange(num_steps)[::-1].copy()
    return _optimal_timesteps(tuple(log_alphas_cumprod.tolist()), tuple(errors), num_steps).copy()


@lru_cache(maxsize=32)
def _optimal_timesteps(log_alphas_cumprod: tuple[float, ...], errors: tuple[float, ...], num_steps: int) -> np.ndarray:
    log = np.concatenate([[0.0], log_alphas_cumprod])  # index t+1, as in all that follows
    T = len(log) - 1
    # x̂_0 is better the less noise there is; where the measurement says otherwise, it is the measurement.
    error = np.concatenate([[0.0], np.maximum.accumulate(np.asarray(errors, dtype=np.float64))])
    with np.errstate(divide="ignore", invalid="ignore"):
        log_noise_to_signal = np.log(-np.expm1(log)) - log  # −2λ
        kept = np.exp(0.5 * (log_noise_to_signal[None, :] - log_noise_to_signal[:, None]))  # e^{−h}; row t, column s
        cost = (1.0 - kept) ** 2 * (error[:, None] - error[None, :])
    cost = np.where(np.tri(T + 1, k=-1, dtype=bool), cost, np.inf)
    best = np.full(T + 1, np.inf)  # the least cost from each timestep to x_0, in so many steps
    best[0] = 0.0
    next_steps = []
    for _ in range(num_steps):
        total = cost + best
        next_steps.append(total.argmin(axis=1))
        best = np.take_along_axis(total, next_steps[-1][:, None], axis=1)[:, 0]
    path = [T]
    for chosen in next_steps[:0:-1]:
        path.append(int(chosen[path[-1]]))
    return np.array(path) - 1
