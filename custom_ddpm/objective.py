"""The training loss (T1, T2: Algorithm 1).

Ho et al. 2020 (arXiv:2006.11239) train on L_simple (eq. 14), a reweighted variational bound. Nichol & Dhariwal 2021
(arXiv:2102.09672) also learn the variance, with L_hybrid = L_simple + λ L_vlb. Every loss here is one value per sample.

Shapes: x_0, ε and x_t are (B, C, ...), timesteps int64 (B,) in [0, T). Losses are (B,) in at least float32.
"""

from collections.abc import Callable

import torch

from .likelihood import at_least_float32, mean_per_sample, vlb_term
from .scheduler import CustomDDPMScheduler

LOSS_TYPES = ("simple", "hybrid", "vlb")
LOSS_WEIGHTINGS = ("uniform", "min_snr", "p2")
VLB_WEIGHT = 0.001  # λ of L_hybrid (Nichol & Dhariwal 2021, section 3.1)


def training_target(
    scheduler: CustomDDPMScheduler, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """The regression target of the model (T1): ε, x_0 or v, by the scheduler's `prediction_type`; shape of `noise`."""
    targets: dict[str, Callable[[], torch.Tensor]] = {
        "epsilon": lambda: noise,
        "sample": lambda: original_samples,
        "v_prediction": lambda: scheduler.get_velocity(original_samples, noise, timesteps),
    }
    return targets[scheduler.config.prediction_type]()


def loss_weights(
    scheduler: CustomDDPMScheduler, timesteps: torch.Tensor, loss_weighting: str = "uniform", snr_gamma: float = 5.0
) -> torch.Tensor:
    """Weight of the squared error at each timestep.

    min_snr and p2 are each defined for one prediction type and converted for the others, so that the loss is the same
    for all: at given x_t, |ε̂−ε|² = SNR |x̂_0−x_0|² and |v̂−v|² = (SNR+1) |x̂_0−x_0|².

    Args:
        scheduler: gives the SNR, ᾱ/(1−ᾱ), and the prediction type.
        timesteps: t, (B,).
        loss_weighting: "uniform": 1. "min_snr": min(SNR, γ) on the error of x_0 (Hang et al. 2023, arXiv:2303.09556).
            "p2": 1/(1+SNR) on the error of ε (Choi et al. 2022, arXiv:2204.00227, k = γ = 1).
        snr_gamma: γ of min_snr, > 0.

    Returns:
        Weights, float32 (B,).

    Raises:
        ValueError: unknown `loss_weighting`.
    """
    snr = scheduler.snr(timesteps)
    if loss_weighting == "uniform":
        return torch.ones_like(snr)
    if loss_weighting == "min_snr":
        of_original_sample = snr.clamp(max=snr_gamma)
    elif loss_weighting == "p2":
        of_original_sample = snr / (1.0 + snr)
    else:
        raise ValueError(f"loss_weighting is {loss_weighting!r}; it must be one of {', '.join(LOSS_WEIGHTINGS)}")
    ratios = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1.0}
    return of_original_sample / ratios[scheduler.config.prediction_type]


def simple_loss(
    scheduler: CustomDDPMScheduler,
    model_output: torch.Tensor,
    original_samples: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    loss_weighting: str = "uniform",
    snr_gamma: float = 5.0,
) -> torch.Tensor:
    """L_simple (T2; Ho et al. 2020, eq. 14): mean squared error of the prediction, weighted by `loss_weights`.

    Args:
        scheduler: gives the prediction type and the SNR.
        model_output: (B, C, ...), or (B, 2C, ...) for a learned variance, whose second half is not used.
        original_samples: x_0.
        noise: ε.
        timesteps: t.
        loss_weighting, snr_gamma: see `loss_weights`.

    Returns:
        Loss of each sample, (B,).
    """
    prediction, _ = scheduler.split_model_output(model_output, original_samples)
    target = training_target(scheduler, original_samples, noise, timesteps)
    error = at_least_float32(prediction) - at_least_float32(target)
    return loss_weights(scheduler, timesteps, loss_weighting, snr_gamma) * mean_per_sample(error.square())


def diffusion_loss(
    scheduler: CustomDDPMScheduler,
    model_output: torch.Tensor,
    original_samples: torch.Tensor,
    noise: torch.Tensor,
    noisy_samples: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    loss_type: str = "simple",
    loss_weighting: str = "uniform",
    snr_gamma: float = 5.0,
) -> torch.Tensor:
    """Training loss of each sample: L_simple, L_vlb or L_hybrid.

    Args:
        scheduler: gives the prediction type, the variance type and the coefficients.
        model_output: (B, C, ...), or (B, 2C, ...) for a learned variance.
        original_samples: x_0, in [−1, 1].
        noise: ε.
        noisy_samples: x_t.
        timesteps: t.
        loss_type: "simple": L_simple. "vlb": L_vlb in bits per dimension, estimated from one timestep as
            T × `vlb_term`. "hybrid": L_simple + 0.001 L_vlb, where L_vlb has no gradient through the mean and so trains
            only the variance (Nichol & Dhariwal 2021, eq. 16).
        loss_weighting, snr_gamma: of L_simple; see `loss_weights`.

    Returns:
        Loss of each sample, (B,).

    Raises:
        ValueError: unknown `loss_type`; "hybrid" without a learned variance.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type is {loss_type!r}; it must be one of {', '.join(LOSS_TYPES)}")
    if loss_type == "vlb":
        return len(scheduler) * vlb_term(
            scheduler, model_output, original_samples, noisy_samples, timesteps, limit=False
        )
    loss = simple_loss(
        scheduler,
        model_output,
        original_samples,
        noise,
        timesteps,
        loss_weighting=loss_weighting,
        snr_gamma=snr_gamma,
    )
    if loss_type == "simple":
        return loss
    prediction, predicted_variance = scheduler.split_model_output(model_output, original_samples)
    if predicted_variance is None:
        raise ValueError(
            f"loss_type 'hybrid' trains a learned variance; variance_type is {scheduler.config.variance_type!r}, it "
            "must be 'learned' or 'learned_range'"
        )
    frozen = torch.cat([prediction.detach(), predicted_variance], dim=1)
    vlb = vlb_term(scheduler, frozen, original_samples, noisy_samples, timesteps, limit=False)
    return loss + VLB_WEIGHT * len(scheduler) * vlb
