"""Accuracy of every table and coefficient, compared with diffusers: `python benchmarks/precision.py`.

The reference values are the formulas in 40-digit arithmetic (tests/reference.py). Each column is the largest error over
all timesteps, in float32 units in the last place (ulp) and relative. Values are read through the public methods of both
schedulers, in float32, with inputs of ones and zeros.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from custom_ddpm.scheduler import CustomDDPMScheduler

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import reference

T = 1000
Table = dict[str, torch.Tensor]


def exact(schedule: str) -> dict[str, np.ndarray]:
    """Reference values of every table for a β schedule: name -> float64 (T,)."""
    betas = reference.betas(schedule, T)
    products = reference.alphas_cumprod(betas)
    posterior = [reference.posterior(products, t, t - 1) for t in range(T)]
    values = {
        "β": betas,
        "α": [1 - b for b in betas],
        "ᾱ": products,
        "√ᾱ        (F9, add_noise)": [reference.sqrt(a) for a in products],
        "√(1−ᾱ)    (F9, add_noise)": [reference.sqrt(1 - a) for a in products],
        "SNR": [a / (1 - a) for a in products],
        "μ̃, of x_0 (R4)": [p[0] for p in posterior],
        "μ̃, of x_t (R4)": [p[1] for p in posterior],
        "β̃         (R4)": [p[2] for p in posterior],
    }
    return {name: reference.floats(value) for name, value in values.items()}


def ours(schedule: str) -> list[torch.Tensor]:
    """The same tables as `exact`, in its order, from `CustomDDPMScheduler`."""
    scheduler = CustomDDPMScheduler(T, beta_schedule=schedule)
    ones, zeros, t = torch.ones(T, 1), torch.zeros(T, 1), torch.arange(T)
    of_original, variance = scheduler.posterior_mean_variance(ones, zeros, t)
    return [
        scheduler.betas,
        scheduler.alphas,
        scheduler.alphas_cumprod,
        scheduler.add_noise(ones, zeros, t),
        scheduler.add_noise(zeros, ones, t),
        scheduler.snr(t),
        of_original,
        scheduler.posterior_mean_variance(zeros, ones, t)[0],
        variance,
    ]


def diffusers_own(schedule: str) -> list[torch.Tensor]:
    """The same tables as `exact`, in its order, from diffusers' `DDPMScheduler`."""
    # With a learned variance of 0 and x̂_0 as the prediction, `step` returns exactly the posterior mean.
    scheduler = DDPMScheduler(
        T, beta_schedule=schedule, variance_type="learned", prediction_type="sample", clip_sample=False
    )
    ones, zeros, t = torch.ones(T, 1), torch.zeros(T, 1), torch.arange(T)
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)

    def means(x_0: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
        return torch.cat([scheduler.step(torch.cat([x_0, zero], dim=1), i, x_t).prev_sample for i in range(T)])

    return [
        scheduler.betas,
        scheduler.alphas,
        scheduler.alphas_cumprod,
        scheduler.add_noise(ones, zeros, t),
        scheduler.add_noise(zeros, ones, t),
        compute_snr(scheduler, t),
        means(one, zero),
        means(zero, one),
        torch.stack([scheduler._get_variance(i, variance_type="fixed_small") for i in range(T)]),
    ]


def errors(value: torch.Tensor, truth: np.ndarray) -> tuple[float, float]:
    """Largest error where the reference is positive: (in ulp of float32, relative)."""
    value, truth = value.double().flatten().numpy()[truth > 0], truth[truth > 0]
    difference = np.abs(value - truth)
    return (difference / np.spacing(truth.astype(np.float32)).astype(float)).max(), (difference / truth).max()


def main() -> None:
    """Print one table of errors for each β schedule."""
    print(f"largest error over all t, T = {T}\n")
    for schedule in reference.SCHEDULES:
        peers = [ours(schedule)]
        if schedule != "exp":  # diffusers has no DDPMScheduler of that name
            peers.append(diffusers_own(schedule))
        print(f"{schedule:<28}{'custom_ddpm':>22}{'diffusers':>26}")
        for i, (name, truth) in enumerate(exact(schedule).items()):
            width = 28 + sum(character == "\u0303" or character == "\u0304" for character in name)
            columns = [errors(peer[i], truth) for peer in peers]
            print(f"  {name:<{width - 2}}" + "".join(f"{ulp:12.1f} ulp {relative:.1e}  " for ulp, relative in columns))
        print()


if __name__ == "__main__":
    main()
