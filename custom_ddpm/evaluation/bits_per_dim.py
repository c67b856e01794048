"""Bits per dimension: the variational bound on −log₂ p(x_0) of held-out pictures, timestep by timestep.

The bound is L_T + Σ_{t=1}^{T−1} L_{t−1} + L_0 (Ho et al. 2020, arXiv:2006.11239, eq. 5). L_T is exact. The sums over t
are estimated from `num_timesteps` timesteps for each picture: t = 0 always, and one at random from each of equal parts
of 1 … T−1, weighted by the size of its part. With num_timesteps = T every timestep is taken.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce

from ..data.pixels import normalise
from ..likelihood import prior_term, vlb_term
from ..pipelines.pipeline_custom_ddpm import CustomDDPMPipeline
from ..scheduler import CustomDDPMScheduler
from .distances import Estimate
from .pictures import Pictures

LEARNED = ("learned", "learned_range")
PARTS = ("L_T", "L_t-1", "L_0", "total")


@dataclass(frozen=True)
class BitsPerDim:
    """The bound for one type of variance, in bits per dimension.

    Args:
        parts: "L_T", "L_t-1" (the sum of all), "L_0" and "total", each with its standard error over the pictures.
        timesteps: mean of the term of every timestep, NaN where none was drawn; (T,), t = 0 is L_0.
        timestep_errors: their standard errors, NaN where fewer than two were drawn.
        num_images: number of pictures.
    """

    parts: dict[str, Estimate]
    timesteps: np.ndarray
    timestep_errors: np.ndarray
    num_images: int


def variance_schedulers(scheduler: CustomDDPMScheduler) -> dict[str, CustomDDPMScheduler]:
    """Schedulers that differ in the variance alone: the model's own, the two fixed ones, and the analytic one.

    The analytic variance is there if the scheduler holds its estimate, see `custom-ddpm analytic-variance`.
    """
    own = scheduler.config.variance_type
    names = [own, "fixed_small", "fixed_large"]
    if scheduler.config.get("original_sample_variances") is not None:
        names.append("analytic")
    return {
        name: CustomDDPMScheduler.from_config(scheduler.config, variance_type=name)
        for name in dict.fromkeys(names)
        if name != "zero"  # it has no likelihood
    }


def draw_timesteps(num_train_timesteps: int, num_timesteps: int, uniforms: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """The timesteps of a picture and their weights in the sum over all.

    Args:
        num_train_timesteps: T.
        num_timesteps: S, 2 <= S <= T (1 for T = 1).
        uniforms: (..., S − 1) in [0, 1).

    Returns:
        Timesteps, int64 (..., S), the first of them 0; and weights (S,): for each t > 0 the number of timesteps in its
        part of 1 … T−1.
    """
    edges = torch.linspace(1, num_train_timesteps, num_timesteps, dtype=torch.float64).round().long()
    sizes = (edges[1:] - edges[:-1]).to(uniforms.device)
    drawn = edges[:-1].to(uniforms.device) + (uniforms.double() * sizes).long().clamp(max=sizes - 1)
    first = torch.zeros_like(drawn[..., :1]) if num_timesteps > 1 else drawn.new_zeros((*uniforms.shape[:-1], 1))
    return torch.cat([first, drawn], dim=-1), torch.cat([sizes.new_ones(1), sizes]).double()


class _Sums:
    """Sums over pictures and over timesteps for one scheduler, on the device; no value is read before the end."""

    def __init__(self, scheduler: CustomDDPMScheduler, device: torch.device):
        self.scheduler = scheduler
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.parts = torch.zeros(2, len(PARTS), dtype=dtype, device=device)  # sums and sums of squares
        self.timesteps = torch.zeros(3, len(scheduler), dtype=dtype, device=device)  # count, sum, sum of squares

    def add(self, terms: torch.Tensor, prior: torch.Tensor, timesteps: torch.Tensor, weights: torch.Tensor) -> None:
        """Add the terms (B, S) of B pictures at their timesteps (B, S), and L_T (B,)."""
        terms, prior = terms.to(self.parts.dtype), prior.to(self.parts.dtype)
        middle = (terms * weights.to(terms))[:, 1:].sum(1)
        parts = torch.stack([prior, middle, terms[:, 0], prior + middle + terms[:, 0]], dim=1)
        self.parts += torch.stack([parts.sum(0), parts.square().sum(0)])
        flat = terms.flatten()
        values = torch.stack([torch.ones_like(flat), flat, flat.square()])
        self.timesteps.index_add_(1, timesteps.flatten(), values)

    def result(self, num_images: int) -> BitsPerDim:
        parts, timesteps = (reduce(each, "sum").cpu().double().numpy() for each in (self.parts, self.timesteps))
        mean = parts[0] / num_images
        # With one picture there is no spread to estimate an error from.
        variance = np.maximum(parts[1] / num_images - mean**2, 0) * num_images / max(num_images - 1, 1)
        errors = np.sqrt(variance / num_images) if num_images > 1 else np.full(len(PARTS), math.nan)
        count, total, squares = timesteps
        with np.errstate(invalid="ignore", divide="ignore"):
            means = total / count
            spread = np.maximum(squares / count - means**2, 0) / (count - 1)
        return BitsPerDim(
            {name: Estimate(float(mean[i]), float(errors[i])) for i, name in enumerate(PARTS)},
            means,
            np.where(count > 1, np.sqrt(spread), math.nan),
            num_images,
        )


def _draws(
    positions: Sequence[int], shape: Sequence[int], num_timesteps: int, seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform numbers (B, S − 1) and noise (B, S, ...), for each picture by its position alone."""
    uniforms, noise = [], []
    for position in positions:
        words = np.random.SeedSequence([seed, int(position)]).generate_state(1, np.uint64)
        generator = torch.Generator(device).manual_seed(int(words[0]) >> 1)
        uniforms.append(torch.rand(num_timesteps - 1, generator=generator, device=device))
        noise.append(torch.randn(num_timesteps, *shape, generator=generator, device=device))
    return torch.stack(uniforms), torch.stack(noise)


@torch.no_grad()
def bits_per_dim(
    model: Callable[..., Any],
    schedulers: dict[str, CustomDDPMScheduler],
    batches: Iterable[tuple[Sequence[int], torch.Tensor, torch.Tensor | None]],
    *,
    num_timesteps: int = 100,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, BitsPerDim]:
    """The variational bound of pictures under a model, for several types of variance with the same draws.

    Under `accelerate launch` every process gives its own share of the pictures, and all return the same result.

    Args:
        model: called as model(x_t, timesteps, class_labels), returns an object with `.sample`.
        schedulers: name -> scheduler; all of the same noise schedule, see `variance_schedulers`.
        batches: (positions, x_0 in [−1, 1] on the model's device, class labels or None); the draws of a picture depend
            on its position and the seed only.
        num_timesteps: timesteps for each picture, clipped to [2, T].
        batch_size: noisy pictures that the model gets at once.
        seed: seed of the timesteps and the noise.

    Raises:
        ValueError: no pictures.
    """
    first = next(iter(schedulers.values()))
    num_timesteps = min(max(num_timesteps, 2), len(first))
    sums: dict[str, _Sums] = {}
    device, num_images = PartialState().device, 0
    for positions, x_0, labels in batches:
        device = x_0.device
        sums = sums or {name: _Sums(scheduler, device) for name, scheduler in schedulers.items()}
        together = max(1, batch_size // num_timesteps)
        for start in range(0, len(x_0), together):
            chosen = slice(start, start + together)
            condition = None if labels is None else labels[chosen]
            _add(model, sums, positions[chosen], x_0[chosen], condition, num_timesteps, batch_size, seed)
        num_images += len(x_0)
    sums = sums or {name: _Sums(scheduler, device) for name, scheduler in schedulers.items()}
    num_images = int(reduce(torch.tensor(num_images, device=device), "sum"))
    if num_images == 0:
        raise ValueError("there are no pictures to compute bits per dimension of")
    return {name: each.result(num_images) for name, each in sums.items()}


def _add(
    model: Callable[..., Any],
    sums: dict[str, _Sums],
    positions: Sequence[int],
    x_0: torch.Tensor,
    labels: torch.Tensor | None,
    num_timesteps: int,
    batch_size: int,
    seed: int,
) -> None:
    """Add the terms of a few pictures at all their timesteps."""
    scheduler = next(iter(sums.values())).scheduler
    uniforms, noise = _draws(positions, x_0.shape[1:], num_timesteps, seed, x_0.device)
    timesteps, weights = draw_timesteps(len(scheduler), num_timesteps, uniforms)
    flat_timesteps, flat_noise = timesteps.flatten(), noise.flatten(0, 1).to(x_0.dtype)
    repeated = x_0.repeat_interleave(num_timesteps, 0)
    condition = None if labels is None else labels.repeat_interleave(num_timesteps, 0)
    terms: dict[str, list[torch.Tensor]] = {name: [] for name in sums}
    for start in range(0, len(repeated), batch_size):
        part = slice(start, start + batch_size)
        x_t = scheduler.add_noise(repeated[part], flat_noise[part], flat_timesteps[part])
        output = model(x_t, flat_timesteps[part], None if condition is None else condition[part]).sample
        for name, each in sums.items():
            learned = each.scheduler.config.variance_type in LEARNED
            # A model with a learned variance has it in the second half of its channels.
            fitting = output if learned else output[:, : x_0.shape[1]]
            terms[name].append(vlb_term(each.scheduler, fitting, repeated[part], x_t, flat_timesteps[part]))
    for name, each in sums.items():
        found = torch.cat(terms[name]).view(len(x_0), num_timesteps)
        each.add(found, prior_term(each.scheduler, x_0), timesteps, weights)


def pipeline_bits_per_dim(
    pipeline: CustomDDPMPipeline, pictures: Pictures, *, num_timesteps: int, batch_size: int, seed: int
) -> dict[str, BitsPerDim]:
    """The variational bound of pictures under the model of a pipeline, for each of `variance_schedulers`.

    Args:
        pipeline: on its device.
        pictures: of the model's size, with labels for a class-conditional model.
        num_timesteps, batch_size, seed: see `bits_per_dim`.
    """
    scheduler, device = pipeline.scheduler, pipeline.unet.device
    if not isinstance(scheduler, CustomDDPMScheduler):
        scheduler = CustomDDPMScheduler.from_config(scheduler.config)

    def model(x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> Any:
        return pipeline.unet(x_t, t, **({} if labels is None else {"class_labels": labels}))

    batches = (
        (positions, normalise(images.to(device)), None if labels is None else labels.to(device))
        for positions, images, labels in pictures.batches(batch_size)
        if len(images)
    )
    options = {"num_timesteps": num_timesteps, "batch_size": batch_size, "seed": seed}
    return bits_per_dim(model, variance_schedulers(scheduler), batches, **options)


def as_json(found: dict[str, BitsPerDim]) -> dict[str, Any]:
    """The numbers of each type of variance, ready for JSON; None for a timestep that was not drawn."""
    return {
        name: {
            "parts": {part: each._asdict() for part, each in result.parts.items()},
            "timesteps": [None if math.isnan(value) else value for value in result.timesteps.tolist()],
            "timestep_errors": [None if math.isnan(value) else value for value in result.timestep_errors.tolist()],
            "num_images": result.num_images,
        }
        for name, result in found.items()
    }
