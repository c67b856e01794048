"""What training minimises (T1, T2: Algorithm 1), and the likelihood that it bounds.

Ho et al. 2020 (arXiv:2006.11239) bound −log p(x_0) by L_T + Σ L_{t−1} + L_0 (eq. 5) and then train on a simpler sum,
L_simple (eq. 14). Nichol & Dhariwal 2021 (arXiv:2102.09672) learn the variance too, with L_hybrid. All of them are
here, one value per sample.

Shapes: x_0, ε and x_t are (B, C, ...), timesteps int64 (B,) in [0, T). Losses are (B,) in at least float32.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from .scheduler import CustomDDPMScheduler

LOSS_TYPES = ("simple", "hybrid", "vlb")
LOSS_WEIGHTINGS = ("uniform", "min_snr", "p2")
VLB_WEIGHT = 0.001  # λ of L_hybrid (Nichol & Dhariwal 2021, section 3.1)
HALF_BIN = 1.0 / 255.0  # half the distance of two 8-bit pixel values in [−1, 1] (F1)


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _mean_per_sample(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(1).mean(dim=1)


# ---- L_simple: Algorithm 1 ----


def training_target(
    scheduler: CustomDDPMScheduler, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the model is to predict (T1): ε, x_0 or v, by the scheduler's `prediction_type`; shape of `noise`."""
    targets: dict[str, Callable[[], torch.Tensor]] = {
        "epsilon": lambda: noise,
        "sample": lambda: original_samples,
        "v_prediction": lambda: scheduler.get_velocity(original_samples, noise, timesteps),
    }
    return targets[scheduler.config.prediction_type]()


def loss_weights(
    scheduler: CustomDDPMScheduler, timesteps: torch.Tensor, loss_weighting: str = "uniform", snr_gamma: float = 5.0
) -> torch.Tensor:
    """What the squared error of the prediction counts at each timestep.

    min_snr and p2 are defined for one prediction type and carried to the others, so that they mean the same loss: the
    same x_t has errors in ratio |ε̂−ε|² = SNR |x̂_0−x_0|² and |v̂−v|² = (SNR+1) |x̂_0−x_0|².

    Args:
        scheduler: gives the SNR, ᾱ/(1−ᾱ), and the prediction type.
        timesteps: t, (B,).
        loss_weighting: "uniform": 1. "min_snr": min(SNR, γ) on the error of x_0 (Hang et al. 2023, arXiv:2303.09556).
            "p2": 1/(1+SNR) on the error of ε (Choi et al. 2022, arXiv:2204.00227, k = γ = 1).
        snr_gamma: γ of min_snr, > 0.

    Returns:
        float32 (B,).

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
        model_output: (B, C, ...), or (B, 2C, ...) for a learned variance, which this loss does not look at.
        original_samples: x_0.
        noise: ε.
        timesteps: t.
        loss_weighting, snr_gamma: see `loss_weights`.

    Returns:
        (B,).
    """
    prediction, _ = scheduler.split_model_output(model_output, original_samples)
    target = training_target(scheduler, original_samples, noise, timesteps)
    error = _at_least_float32(prediction) - _at_least_float32(target)
    return loss_weights(scheduler, timesteps, loss_weighting, snr_gamma) * _mean_per_sample(error.square())


# ---- the variational bound, in bits per dimension ----


def normal_kl(mean_difference: torch.Tensor, log_variance1: torch.Tensor, log_variance2: torch.Tensor) -> torch.Tensor:
    """KL(N(μ_1, σ_1²) ‖ N(μ_2, σ_2²)) in nats, elementwise; of the means it needs only μ_1 − μ_2."""
    log_ratio = log_variance1 - log_variance2
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + mean_difference.square() * (-log_variance2).exp())


def discretized_gaussian_log_likelihood(
    original_samples: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor
) -> torch.Tensor:
    """log P of 8-bit pixels under a Gaussian cut into 256 bins, elementwise in nats (Ho et al. 2020, eq. 13).

    A pixel owns the bin x ± 1/255; those of −1 and 1 reach to infinity, so that all 256 add up to 1.

    Args:
        original_samples: pixels in [−1, 1] on the grid of F1, k/127.5 − 1.
        mean: μ, same shape.
        log_variance: log σ², broadcastable to it.
    """
    inverse_std = (-0.5 * log_variance).exp()
    distance = original_samples - mean
    # Both ends of the bin reflected into the lower tail, where log Φ keeps its digits; the difference of the two Φ is
    # taken from the difference of their logarithms.
    near = torch.special.log_ndtr((HALF_BIN - distance.abs()) * inverse_std)
    far = torch.special.log_ndtr((-HALF_BIN - distance.abs()) * inverse_std)
    share = -torch.expm1(far - near)
    inside = near + share.clamp(min=torch.finfo(share.dtype).tiny).log()
    lowest = torch.special.log_ndtr((distance + HALF_BIN) * inverse_std)
    highest = torch.special.log_ndtr((HALF_BIN - distance) * inverse_std)
    likelihood = torch.where(original_samples < HALF_BIN - 1.0, lowest, inside)
    return torch.where(original_samples > 1.0 - HALF_BIN, highest, likelihood)


def vlb_term(
    scheduler: CustomDDPMScheduler,
    model_output: torch.Tensor,
    original_samples: torch.Tensor,
    noisy_samples: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    limit: bool = True,
) -> torch.Tensor:
    """One term of the variational bound (Ho et al. 2020, eq. 5), in bits per dimension.

    t > 0: KL(q(x_{t−1}|x_t, x_0) ‖ p_θ(x_{t−1}|x_t)). t = 0: −log p_θ(x_0|x_1) of 8-bit pixels. The bound on
    −log p(x_0) is the sum over all t, plus `prior_term`.

    Args:
        scheduler: gives p_θ, its variance by `variance_type`.
        model_output: (B, C, ...), or (B, 2C, ...) for a learned variance.
        original_samples: x_0, in [−1, 1].
        noisy_samples: x_t.
        timesteps: t.
        limit: clip x̂_0 as in sampling; a loss goes without, for its gradient.

    Returns:
        (B,).

    Raises:
        ValueError: variance_type "zero", under which no data has a likelihood.
    """
    if scheduler.config.variance_type == "zero":
        raise ValueError("variance_type 'zero' has no likelihood; choose one that adds noise")
    original_samples, noisy_samples = _at_least_float32(original_samples), _at_least_float32(noisy_samples)
    _, log_variance, pred_original_sample = scheduler.predict_mean_log_variance(
        model_output, timesteps, noisy_samples, limit=limit
    )
    # R4 is linear, so the difference of the means is the mean of the difference; subtracting two means that agree in
    # most of their digits is avoided.
    mean_difference, variance = scheduler.posterior_mean_variance(
        original_samples - pred_original_sample, torch.zeros_like(noisy_samples), timesteps
    )
    kl = normal_kl(mean_difference, variance.log(), log_variance)
    is_decoder = (timesteps == 0).view(-1, *[1] * (noisy_samples.ndim - 1))
    # Where the decoder is not asked it gets a harmless question: `where` alone would let its NaN gradients through.
    mean = torch.where(is_decoder, pred_original_sample, original_samples)
    nats = torch.where(is_decoder, -discretized_gaussian_log_likelihood(original_samples, mean, log_variance), kl)
    return _mean_per_sample(nats) / math.log(2.0)


def prior_term(scheduler: CustomDDPMScheduler, original_samples: torch.Tensor) -> torch.Tensor:
    """L_T = KL(q(x_T|x_0) ‖ N(0, I)), in bits per dimension (B,); there is no model in it."""
    alpha_bar = scheduler.alphas_cumprod[-1].item()
    of_variance = -alpha_bar - math.log1p(-alpha_bar)
    nats = 0.5 * (alpha_bar * _at_least_float32(original_samples).square() + of_variance)
    return _mean_per_sample(nats) / math.log(2.0)


# ---- what the training loop calls ----


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
    """The loss of each sample.

    Args:
        scheduler: gives the prediction type, the variance type and the coefficients.
        model_output: (B, C, ...), or (B, 2C, ...) for a learned variance.
        original_samples: x_0, in [−1, 1].
        noise: ε.
        noisy_samples: x_t.
        timesteps: t.
        loss_type: "simple": L_simple. "vlb": L_vlb, estimated from this one t as T times its `vlb_term` (bits per
            dimension). "hybrid": L_simple + 0.001 L_vlb, where L_vlb teaches the variance only: no gradient goes
            through the mean (Nichol & Dhariwal 2021, eq. 16).
        loss_weighting, snr_gamma: of L_simple; see `loss_weights`.

    Returns:
        (B,).

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


class ImportanceSampler(torch.nn.Module):
    """Draws t with p_t ∝ √E[L_t²], for the least variance of L_vlb (Nichol & Dhariwal 2021, section 3.3, eq. 18).

    Uniform until every t has `history_per_timestep` losses. A module for its buffers: `state_dict`,
    `load_state_dict` and `to(device)` are those of any module. Nothing in it waits for the device, and the same calls
    give the same bits.

    Args:
        num_train_timesteps: T.
        history_per_timestep: how many of the latest losses of each t are kept.
        uniform_probability: the share of draws that stay uniform, so that a t whose loss was once small is not lost;
            it bounds the weights by its inverse.
    """

    history: torch.Tensor
    counts: torch.Tensor

    def __init__(
        self, num_train_timesteps: int, history_per_timestep: int = 10, uniform_probability: float = 0.001
    ) -> None:
        super().__init__()
        self.uniform_probability = uniform_probability
        # The last column takes what is not kept; see `update`.
        self.register_buffer("history", torch.zeros(num_train_timesteps, history_per_timestep + 1))
        self.register_buffer("counts", torch.zeros(num_train_timesteps, dtype=torch.int64))

    def probabilities(self) -> torch.Tensor:
        """p_t, float32 (T,)."""
        T, history_per_timestep = len(self.history), self.history.shape[1] - 1
        root = self.history[:, :-1].square().mean(dim=1).sqrt()
        root = torch.where((self.counts >= history_per_timestep).all(), root, 1.0)
        return (1.0 - self.uniform_probability) * root / root.sum() + self.uniform_probability / T

    def sample(self, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps from uniform numbers, by the inverse of their distribution function.

        Args:
            uniforms: float32 (B,) in [0, 1), on the module's device.

        Returns:
            timesteps, int64 (B,); weights 1/(T p_t), float32 (B,), with which the mean of weight × loss estimates the
            mean over all t.
        """
        p = self.probabilities()
        # The sum may end just below 1, and a uniform number lie above it.
        timesteps = torch.searchsorted(p.cumsum(0), uniforms, right=True).clamp(max=len(p) - 1)
        return timesteps, 1.0 / (len(p) * p[timesteps])

    @torch.no_grad()
    def update(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        """Remember losses, oldest first.

        Args:
            timesteps: int64 (N,), of all processes together, in the same order on each.
            losses: (N,), unweighted.
        """
        history_per_timestep = self.history.shape[1] - 1
        same = timesteps[:, None] == timesteps[None, :]
        earlier, later = same.tril(-1).sum(1), same.triu(1).sum(1)
        slot = (self.counts[timesteps] + earlier) % history_per_timestep
        # Of more losses of one t than are kept the last ones stay; no two of those share a slot.
        slot = torch.where(later < history_per_timestep, slot, history_per_timestep)
        self.history[timesteps, slot] = losses.to(self.history.dtype)
        self.counts.index_add_(0, timesteps, torch.ones_like(timesteps))


# ---- the analytic optimal variance ----


@torch.no_grad()
def estimate_original_sample_variances(
    model: Callable[..., Any],
    scheduler: CustomDDPMScheduler,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
    *,
    num_timesteps: int = 100,
    generator: torch.Generator | None = None,
) -> list[float]:
    """E|x_0 − x̂_0(x_t)|²/d for every t: it makes variance_type "analytic" optimal (Bao et al. 2022, arXiv:2201.06503).

    Given x_0, R4 says x_s = a x_0 + b x_t + √β̃ z; the model goes to the mean a x̂_0(x_t) + b x_t. What is left,
    a (x_0 − x̂_0) + √β̃ z, has two independent parts, so its mean square is a² E|x_0 − x̂_0|²/d + β̃: the law of total
    variance where x̂_0 = E[x_0|x_t], and true of any model. The σ² that brings N(mean, σ²) nearest to q(x_s|x_t) in KL
    is that mean square. Only E|x_0 − x̂_0|²/d depends on data and model; a and β̃ depend on the steps taken, so one
    estimate serves all of them.

    Args:
        model: called as model(x_t, timesteps, class_labels), returns an object with `.sample`.
        scheduler: the model's, of any variance type. Its clipping of x̂_0 is part of what is measured.
        batches: (x_0, class labels or None), on the model's device; each is noised to every measured timestep.
        num_timesteps: how many timesteps are measured, evenly spread; the others are interpolated, log error over
            log(1−ᾱ_t), straight for power laws. Exact for data of unit variance.
        generator: for the noise.

    Returns:
        T numbers: `original_sample_variances` of the scheduler.

    Raises:
        ValueError: no batch.
    """
    T = len(scheduler)
    measured = np.unique(np.linspace(0, T - 1, min(num_timesteps, T)).round().astype(int))
    totals: list[torch.Tensor | float] = [0.0] * len(measured)
    num_samples = 0
    for original_samples, class_labels in batches:
        num_samples += len(original_samples)
        for i, t in enumerate(measured.tolist()):
            noise = randn_tensor(
                original_samples.shape,
                generator=generator,
                device=original_samples.device,
                dtype=original_samples.dtype,
            )
            timesteps = torch.full((len(original_samples),), t, device=original_samples.device)
            noisy_samples = scheduler.add_noise(original_samples, noise, timesteps)
            model_output = model(noisy_samples, timesteps, class_labels).sample
            _, _, pred_original_sample = scheduler.predict_mean_log_variance(model_output, timesteps, noisy_samples)
            error = _at_least_float32(original_samples) - _at_least_float32(pred_original_sample)
            totals[i] = totals[i] + _mean_per_sample(error.square()).sum()
    if num_samples == 0:
        raise ValueError("batches is empty; the variances are estimated from data")

    errors = np.array([float(total) for total in totals]) / num_samples
    log_beta_bar = -np.log1p(scheduler.snr(torch.arange(T)).double().numpy())
    return np.exp(np.interp(log_beta_bar, log_beta_bar[measured], np.log(np.maximum(errors, 1e-20)))).tolist()
