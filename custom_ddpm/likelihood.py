"""The variational bound on −log p(x_0), and what is estimated from it.

Ho et al. 2020 (arXiv:2006.11239), eq. 5, bound −log p(x_0) by L_T + Σ L_{t−1} + L_0. `vlb_term` is L_{t−1} or L_0 and
`prior_term` is L_T. `ImportanceSampler` draws timesteps by the size of their terms (Nichol & Dhariwal 2021,
arXiv:2102.09672). `estimate_original_sample_variances` measures what the analytic variance needs (Bao et al. 2022,
arXiv:2201.06503).

Shapes: x_0, ε and x_t are (B, C, ...), timesteps int64 (B,) in [0, T). Terms are (B,) in at least float32.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from .scheduler import CustomDDPMScheduler

HALF_BIN = 1.0 / 255.0  # half the distance between two 8-bit pixel values in [−1, 1] (F1)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or in its own dtype if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def mean_per_sample(values: torch.Tensor) -> torch.Tensor:
    """Mean over all dimensions but the first: (B, ...) -> (B,)."""
    return values.flatten(1).mean(dim=1)


# ---- the variational bound, in bits per dimension ----


def normal_kl(mean_difference: torch.Tensor, log_variance1: torch.Tensor, log_variance2: torch.Tensor) -> torch.Tensor:
    """KL divergence of two Gaussians, KL(N(μ_1, σ_1²) ‖ N(μ_2, σ_2²)), elementwise in nats.

    Args:
        mean_difference: μ_1 − μ_2, any shape.
        log_variance1: log σ_1², broadcastable to it.
        log_variance2: log σ_2², broadcastable to it.
    """
    log_ratio = log_variance1 - log_variance2
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + mean_difference.square() * (-log_variance2).exp())


def discretized_gaussian_log_likelihood(
    original_samples: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor
) -> torch.Tensor:
    """Log-probability of 8-bit pixels under a Gaussian discretised into 256 bins (Ho et al. 2020, eq. 13).

    The bin of pixel value x is x ± 1/255. The bins of −1 and 1 extend to infinity, so the 256 probabilities sum to 1.

    Args:
        original_samples: pixels in [−1, 1] on the grid of F1, k/127.5 − 1.
        mean: μ, same shape.
        log_variance: log σ², broadcastable to `mean`.

    Returns:
        Elementwise log-probability in nats, shape of `original_samples`.
    """
    inverse_std = (-0.5 * log_variance).exp()
    distance = original_samples - mean
    # Both edges of the bin are reflected into the lower tail, where log Φ is accurate; the difference of the two Φ is
    # computed from the difference of their logarithms.
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

    For t > 0: L_{t−1} = KL(q(x_{t−1}|x_t, x_0) ‖ p_θ(x_{t−1}|x_t)). For t = 0: L_0 = −log p_θ(x_0|x_1) of 8-bit
    pixels. The bound on −log p(x_0) is the sum over all t, plus `prior_term`.

    Args:
        scheduler: defines p_θ; its variance follows `variance_type`.
        model_output: (B, C, ...), or (B, 2C, ...) for a learned variance.
        original_samples: x_0, in [−1, 1].
        noisy_samples: x_t.
        timesteps: t.
        limit: whether to clip x̂_0 as in sampling; a training loss passes False, since clipping has zero gradient.

    Returns:
        Tensor of shape (B,).

    Raises:
        ValueError: variance_type "zero", for which the likelihood is not defined.
    """
    if scheduler.config.variance_type == "zero":
        raise ValueError("variance_type 'zero' has no likelihood; choose one that adds noise")
    original_samples, noisy_samples = at_least_float32(original_samples), at_least_float32(noisy_samples)
    _, log_variance, pred_original_sample = scheduler.predict_mean_log_variance(
        model_output, timesteps, noisy_samples, limit=limit
    )
    # R4 is linear, so the difference of the means is the posterior mean of the difference. This avoids the cancellation
    # of subtracting two nearly equal means.
    mean_difference, variance = scheduler.posterior_mean_variance(
        original_samples - pred_original_sample, torch.zeros_like(noisy_samples), timesteps
    )
    kl = normal_kl(mean_difference, variance.log(), log_variance)
    is_decoder = (timesteps == 0).view(-1, *[1] * (noisy_samples.ndim - 1))
    # For t > 0 the decoder gets a harmless input: `where` on the result alone would let its NaN gradients through.
    mean = torch.where(is_decoder, pred_original_sample, original_samples)
    nats = torch.where(is_decoder, -discretized_gaussian_log_likelihood(original_samples, mean, log_variance), kl)
    return mean_per_sample(nats) / math.log(2.0)


def prior_term(scheduler: CustomDDPMScheduler, original_samples: torch.Tensor) -> torch.Tensor:
    """L_T = KL(q(x_T|x_0) ‖ N(0, I)), the part of the bound that does not depend on the model.

    Args:
        scheduler: gives ᾱ_T.
        original_samples: x_0, in [−1, 1].

    Returns:
        Bits per dimension, (B,).
    """
    alpha_bar = scheduler.alphas_cumprod[-1].item()
    of_variance = -alpha_bar - math.log1p(-alpha_bar)
    nats = 0.5 * (alpha_bar * at_least_float32(original_samples).square() + of_variance)
    return mean_per_sample(nats) / math.log(2.0)


# ---- importance sampling of t ----


class ImportanceSampler(torch.nn.Module):
    """Importance sampling of timesteps for L_vlb: p_t ∝ √E[L_t²] (Nichol & Dhariwal 2021, section 3.3, eq. 18).

    Sampling is uniform until every timestep has `history_per_timestep` losses. The class is an `nn.Module` for its
    buffers (`state_dict`, `load_state_dict`, `to`). No method synchronises with the device, and the same calls give
    bitwise the same results.

    Args:
        num_train_timesteps: T.
        history_per_timestep: number of most recent losses kept for each timestep.
        uniform_probability: fraction of draws that remain uniform, so that a timestep with a small loss is still
            sampled; the weights are at most its inverse.
    """

    history: torch.Tensor
    counts: torch.Tensor

    def __init__(
        self, num_train_timesteps: int, history_per_timestep: int = 10, uniform_probability: float = 0.001
    ) -> None:
        super().__init__()
        self.uniform_probability = uniform_probability
        # The last column is scratch space for losses that are not kept; see `update`.
        self.register_buffer("history", torch.zeros(num_train_timesteps, history_per_timestep + 1))
        self.register_buffer("counts", torch.zeros(num_train_timesteps, dtype=torch.int64))

    def probabilities(self) -> torch.Tensor:
        """The distribution over timesteps, p_t: float32 (T,)."""
        T, history_per_timestep = len(self.history), self.history.shape[1] - 1
        root = self.history[:, :-1].square().mean(dim=1).sqrt()
        root = torch.where((self.counts >= history_per_timestep).all(), root, 1.0)
        return (1.0 - self.uniform_probability) * root / root.sum() + self.uniform_probability / T

    def sample(self, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample timesteps from uniform random numbers, by the inverse of the distribution function.

        Args:
            uniforms: float32 (B,) in [0, 1), on the module's device.

        Returns:
            timesteps: int64 (B,).
            weights: 1/(T p_t), float32 (B,); the mean of weight × loss is an unbiased estimate of the mean over all t.
        """
        p = self.probabilities()
        # Rounding can leave the last cumulative sum slightly below 1 and below a uniform number.
        timesteps = torch.searchsorted(p.cumsum(0), uniforms, right=True).clamp(max=len(p) - 1)
        return timesteps, 1.0 / (len(p) * p[timesteps])

    @torch.no_grad()
    def update(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        """Add losses to the history, oldest first.

        Args:
            timesteps: int64 (N,), gathered from all processes, in the same order on each of them.
            losses: (N,), unweighted.
        """
        history_per_timestep = self.history.shape[1] - 1
        same = timesteps[:, None] == timesteps[None, :]
        earlier, later = same.tril(-1).sum(1), same.triu(1).sum(1)
        slot = (self.counts[timesteps] + earlier) % history_per_timestep
        # If one call has more losses of a timestep than the history holds, only the last are kept, since writing two
        # values to one index has no defined result.
        slot = torch.where(later < history_per_timestep, slot, history_per_timestep)
        self.history[timesteps, slot] = losses.to(self.history.dtype)
        self.counts.index_add_(0, timesteps, torch.ones_like(timesteps))


# ---- the analytic variance ----


@torch.no_grad()
def estimate_original_sample_variances(
    model: Callable[..., Any],
    scheduler: CustomDDPMScheduler,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
    *,
    num_timesteps: int = 100,
    generator: torch.Generator | None = None,
) -> list[float]:
    """Mean squared error per dimension of x̂_0, E|x_0 − x̂_0(x_t)|²/d, for every t.

    It is what variance_type "analytic" needs to be optimal (Bao et al. 2022, arXiv:2201.06503). Given x_0, R4 says
    x_s = a x_0 + b x_t + √β̃ z, and the model's mean is a x̂_0(x_t) + b x_t. The remainder, a (x_0 − x̂_0) + √β̃ z, is the
    sum of two independent terms with mean square a² E|x_0 − x̂_0|²/d + β̃. This is the σ² for which N(mean, σ²) is
    closest to q(x_s|x_t) in KL divergence, for any model. Only E|x_0 − x̂_0|²/d depends on data and model; a and β̃
    depend on the steps taken, so one estimate serves every choice of steps.

    Args:
        model: called as model(x_t, timesteps, class_labels), returns an object with `.sample`.
        scheduler: the model's, with any variance type. Its clipping of x̂_0 is included in the estimate.
        batches: (x_0, class labels or None), on the model's device; each is noised to every measured timestep.
        num_timesteps: number of timesteps measured, evenly spaced. The others are interpolated, log error linearly in
            log(1−ᾱ_t): exact for power laws, and for data of unit variance.
        generator: for the noise.

    Returns:
        T numbers: the scheduler's `original_sample_variances`.

    Raises:
        ValueError: `batches` is empty.
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
            error = at_least_float32(original_samples) - at_least_float32(pred_original_sample)
            totals[i] = totals[i] + mean_per_sample(error.square()).sum()
    if num_samples == 0:
        raise ValueError("batches is empty; the variances are estimated from at least one batch")

    errors = np.array([float(total) for total in totals]) / num_samples
    log_beta_bar = -np.log1p(scheduler.snr(torch.arange(T)).double().numpy())
    return np.exp(np.interp(log_beta_bar, log_beta_bar[measured], np.log(np.maximum(errors, 1e-20)))).tolist()
