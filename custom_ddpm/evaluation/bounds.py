"""Two losses to hold a model's loss against, at each noise level (docs/evaluation.md derives both).

The *linear* curve is the loss of the best linear denoiser, in closed form from the mean and covariance of the pictures:
a model above it has learnt less than a Gaussian. The *memorised* curve is the loss of the best denoiser of the training
set itself, the posterior mean over its pictures, by Monte Carlo: a model near it reproduces the training pictures. For
pictures of any distribution: memorised <= best possible <= linear, in expectation over the training set.

Everything is computed as the mean squared error of x_0 per dimension, which depends on the SNR alone, and converted to
the loss that the model is trained on by the ratios of `objective.loss_weights`.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.base import ImageData, fingerprint
from ..data.pixels import normalise
from ..objective import loss_weights
from ..scheduler import CustomDDPMScheduler
from .records import BOUNDS_FILE, LEVELS, read_json, write_json

VERSION = 1  # of the numbers in the file
MAX_DIMENSIONS = 4096  # above it the eigenvalues are those of the Gram matrix
# Multiplications of each of the three computations: some seconds on two cores.
BUDGET = 1e11
MAX_PICTURES = 50_000
MAX_MEMORISED = 10_000
QUERIES = 64  # noised pictures at each noise level
BOUND_SETTINGS = ("loss_type", "loss_weighting", "snr_gamma", "random_flip")  # of a run, arguments of `cached_bounds`
BATCH_NUMBERS = 2**23  # pixel values at once


# ---- the best linear denoiser ----


def covariance_eigenvalues(batches: Iterator[torch.Tensor], num_dimensions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and eigenvalues of the covariance (divided by n) of the pictures, in float64.

    With more than `MAX_DIMENSIONS` dimensions they are the eigenvalues of the Gram matrix, which are the same: at most
    n − 1 are not zero.

    Args:
        batches: pictures (B, d), read once.
        num_dimensions: d.

    Returns:
        The mean (d,), and the eigenvalues, ascending, at least 0; those that are left out are 0.
    """
    if num_dimensions > MAX_DIMENSIONS:
        pictures = torch.cat([batch.float() for batch in batches])
        mean = pictures.mean(0, dtype=torch.float64)
        gram = torch.zeros(len(pictures), len(pictures), dtype=torch.float64)
        for columns, means in zip(pictures.split(1024, dim=1), mean.split(1024), strict=True):
            part = columns.double() - means
            gram.addmm_(part, part.T)
        return mean, torch.linalg.eigvalsh(gram / len(pictures)).clamp(min=0)
    count, total = 0, torch.zeros(num_dimensions, dtype=torch.float64)
    products = torch.zeros(num_dimensions, num_dimensions, dtype=torch.float64)
    for batch in batches:
        pictures = batch.double()
        count += len(pictures)
        total += pictures.sum(0)
        products.addmm_(pictures.T, pictures)
    mean = total / count
    return mean, torch.linalg.eigvalsh(products / count - torch.outer(mean, mean)).clamp(min=0)


def linear_errors(eigenvalues: torch.Tensor, num_dimensions: int, snr: torch.Tensor) -> torch.Tensor:
    """E|x_0 − x̂_0|²/d of the best linear denoiser: (1/d) Σ λ_i/(1 + SNR λ_i).

    Args:
        eigenvalues: λ_i of the covariance, (K,), K <= d; the others are 0.
        num_dimensions: d.
        snr: ᾱ/(1−ᾱ), (Q,).

    Returns:
        float64 (Q,).
    """
    values = eigenvalues.double()
    return (values / (1 + snr.double()[:, None] * values)).sum(1) / num_dimensions


# ---- the best denoiser of the training set ----


def memorised_errors(
    pictures: torch.Tensor,
    chosen: torch.Tensor,
    noise: torch.Tensor,
    snr: torch.Tensor,
    labels: torch.Tensor | None = None,
    batch_size: int | None = None,
) -> torch.Tensor:
    """|x_0 − E[x_0|x_t]|²/d for x_0 drawn from the pictures, all of them equally probable.

    The posterior weight of picture i is softmax_i(−SNR |x_0 − x_i|²/2 + √SNR ε·(x_i − x_0)). The softmax runs over
    batches of pictures with a running maximum, in float64: at low noise the exponents reach 10⁷.

    Args:
        pictures: training pictures, uint8 (N, C, H, W).
        chosen: index of x_0 of each query, (Q,).
        noise: ε of each query, (Q, d).
        snr: ᾱ/(1−ᾱ) of each query, (Q,).
        labels: classes (N,): the denoiser is told that of x_0. None: it is not.
        batch_size: pictures at once; what fits into 64 MiB if None.

    Returns:
        float64 (Q,).
    """
    x_0, noise, snr = _flat(pictures[chosen]), noise.double(), snr.double()[:, None]
    batch_size = batch_size or _batch_size(noise.shape[1])
    squares, along = x_0.square().sum(1, keepdim=True), (noise * x_0).sum(1, keepdim=True)
    peak = torch.full_like(squares, -math.inf)
    total, weighted = torch.zeros_like(squares), torch.zeros_like(x_0)
    for start in range(0, len(pictures), batch_size):
        x_i = _flat(pictures[start : start + batch_size])
        distance = squares + x_i.square().sum(1) - 2 * x_0 @ x_i.T
        logits = -0.5 * snr * distance + snr.sqrt() * (noise @ x_i.T - along)
        if labels is not None:
            # Finite, so that a batch without the class gives no 0/0; its weight vanishes beside x_0's own, 0.
            same = labels[chosen][:, None] == labels[start : start + batch_size]
            logits = torch.where(same, logits, -1e30)
        highest = torch.maximum(peak, logits.max(1, keepdim=True).values)
        kept, weights = (peak - highest).exp(), (logits - highest).exp()
        total = total * kept + weights.sum(1, keepdim=True)
        weighted = weighted * kept + weights @ x_i
        peak = highest
    return (x_0 - weighted / total).square().mean(1)


def _batch_size(num_dimensions: int) -> int:
    return max(1, BATCH_NUMBERS // num_dimensions)


def _flat(images: torch.Tensor) -> torch.Tensor:
    return normalise(images).flatten(1).double()


# ---- both, in the units of the loss, at the noise levels ----


def loss_factors(
    scheduler: CustomDDPMScheduler, timesteps: torch.Tensor, loss_weighting: str = "uniform", snr_gamma: float = 5.0
) -> torch.Tensor:
    """Loss of the training divided by the squared error of x_0, float64 (B,): |ε̂−ε|² = SNR |x̂_0−x_0|², ….

    It is 0 for ε where ᾱ = 0.
    """
    snr = scheduler.snr(timesteps).double()
    ratios = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1.0}
    weights = loss_weights(scheduler, timesteps, loss_weighting, snr_gamma).double()
    return ratios[scheduler.config.prediction_type] * weights


def _level_means(values: np.ndarray, timesteps: np.ndarray, num_train_timesteps: int) -> list[float | None]:
    """Mean of the values at each noise level; None where it has no timestep."""
    levels = timesteps * LEVELS // num_train_timesteps
    return [float(values[levels == level].mean()) if (levels == level).any() else None for level in range(LEVELS)]


def compute_bounds(
    data: ImageData,
    scheduler: CustomDDPMScheduler,
    *,
    loss_weighting: str = "uniform",
    snr_gamma: float = 5.0,
    random_flip: bool = False,
) -> dict[str, Any]:
    """Both curves at the noise levels of `metrics.jsonl`, and statistics of the pictures.

    Args:
        data: the training pictures, not a stream. A random subset is read where all are too many for `BUDGET`.
        scheduler: gives the SNR and the prediction type.
        loss_weighting, snr_gamma: of the training loss, L_simple.
        random_flip: whether the model is trained on mirrored pictures too: both curves then count each with its mirror
            image.

    Returns:
        `linear`, `memorised`, `memorised_error` (standard error) and `constant` (the loss of the best prediction that
        does not depend on x_t): a number for each noise level, None where there is no timestep. `linear_pictures` and
        `memorised_pictures`: how many were used of `num_images`. `conditional`: whether the memorised denoiser is told
        the class. `pictures`: see `picture_statistics`.
    """
    assert data.num_images is not None, "a stream has no end to compute the bounds of"
    d, copies = data.channels * data.height * data.width, 1 + random_flip
    # Multiplications: n d² of the covariance, n² d of the Gram matrix; three products with each query.
    most = min(MAX_PICTURES, BUDGET / d**2) if d <= MAX_DIMENSIONS else min(MAX_DIMENSIONS, math.sqrt(BUDGET / d))
    num_linear = max(1, int(min(data.num_images, most / copies)))
    most = min(MAX_MEMORISED, BUDGET / (3 * LEVELS * QUERIES * d))
    num_memorised = max(1, int(min(num_linear, most / copies)))

    eigenvalues, images, labels = _read(data, num_linear, num_memorised, random_flip)
    statistics = picture_statistics(images[:num_memorised])
    everywhere = torch.arange(len(scheduler))
    factors = loss_factors(scheduler, everywhere, loss_weighting, snr_gamma)
    linear = factors * linear_errors(eigenvalues, d, scheduler.snr(everywhere))
    memorised, error = _memorised_levels(images, labels, scheduler, factors)
    constant = factors * _constant_errors(scheduler, everywhere, float(eigenvalues.sum()) / d)
    return {
        "num_images": data.num_images,
        "num_dimensions": d,
        "linear_pictures": num_linear,
        "memorised_pictures": num_memorised,
        "conditional": labels is not None,
        "linear": _level_means(linear.numpy(), everywhere.numpy(), len(scheduler)),
        "memorised": memorised,
        "memorised_error": error,
        "constant": _level_means(constant.numpy(), everywhere.numpy(), len(scheduler)),
        "pictures": statistics,
    }


def _read(
    data: ImageData, num_linear: int, num_memorised: int, random_flip: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Eigenvalues of the first `num_linear` pictures; the first `num_memorised` pictures and labels, then mirrored."""
    kept: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def flat_batches() -> Iterator[torch.Tensor]:
        count = 0
        for images, labels in _first_batches(data, num_linear):
            if count < num_memorised:
                kept.append((images, labels))
            count += len(images)
            flat = normalise(images).flatten(1)
            yield torch.cat([flat, normalise(images.flip(-1)).flatten(1)]) if random_flip else flat

    _, eigenvalues = covariance_eigenvalues(flat_batches(), data.channels * data.height * data.width)
    images = torch.cat([images for images, _ in kept])[:num_memorised]
    known = [labels for _, labels in kept if labels is not None]
    labels = torch.cat(known)[:num_memorised] if known else None
    if random_flip:
        images, labels = torch.cat([images, images.flip(-1)]), None if labels is None else labels.repeat(2)
    return eigenvalues, images, labels


def _first_batches(data: ImageData, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The first pictures in the order of the first epoch, which is random: each at most once."""
    size = _batch_size(data.channels * data.height * data.width)
    batches = data.batches(range(start, min(start + size, count)) for start in range(0, count, size))
    try:
        yield from batches
    finally:
        batches.close()


def _constant_errors(scheduler: CustomDDPMScheduler, timesteps: torch.Tensor, variance: float) -> torch.Tensor:
    """Squared error of the best constant prediction, divided by that of x_0's factor, see `loss_factors`."""
    snr = scheduler.snr(timesteps).double()
    errors = {
        "epsilon": 1 / snr.clamp(min=1e-300),  # the variance of ε is 1
        "sample": torch.full_like(snr, variance),
        "v_prediction": (snr + variance) / (1 + snr).square(),  # ᾱ + (1−ᾱ) Var x_0
    }
    return errors[scheduler.config.prediction_type]


def _memorised_levels(
    images: torch.Tensor, labels: torch.Tensor | None, scheduler: CustomDDPMScheduler, factors: torch.Tensor
) -> tuple[list[float | None], list[float | None]]:
    """Mean loss of the denoiser that remembers, at each noise level, and its standard error."""
    T = len(scheduler)
    generator = torch.Generator().manual_seed(0)
    levels = torch.arange(T) * LEVELS // T
    present = levels.unique().tolist()
    of_query = [torch.nonzero(levels == level)[:, 0] for level in present]
    spread = (torch.arange(QUERIES) + 0.5) / QUERIES
    t = torch.cat([inside[(spread * len(inside)).long()] for inside in of_query])
    chosen = torch.randint(len(images), t.shape, generator=generator)
    found = []
    # As many queries as possible at once: each group converts all pictures anew.
    for part in torch.arange(len(t)).split(max(QUERIES, BATCH_NUMBERS // (2 * images[0].numel()))):
        noise = torch.randn(len(part), images[0].numel(), generator=generator)
        found.append(memorised_errors(images, chosen[part], noise, scheduler.snr(t[part]), labels))
    losses = (factors[t] * torch.cat(found)).view(len(present), QUERIES)
    means: list[float | None] = [None] * LEVELS
    errors: list[float | None] = [None] * LEVELS
    for level, mean, std in zip(present, losses.mean(1).tolist(), losses.std(1).tolist(), strict=True):
        means[level], errors[level] = mean, std / math.sqrt(QUERIES)
    return means, errors


def picture_statistics(images: torch.Tensor) -> dict[str, Any]:
    """Simple statistics of pictures, uint8 (N, C, H, W), in units of pixel values.

    Returns:
        `minimum`, `maximum`, `mean`, `std` of each channel; `picture_std`: median over the pictures of the standard
        deviation inside one; `mean_std`: standard deviation of the pictures' means; `roughness`: mean absolute
        difference of neighbours in a row; `gray`: whether all three channels are equal.
    """
    pixels = images.double()
    channels = pixels.transpose(0, 1).flatten(1)
    return {
        "minimum": channels.min(1).values.tolist(),
        "maximum": channels.max(1).values.tolist(),
        "mean": channels.mean(1).tolist(),
        "std": channels.std(1, correction=0).tolist(),
        "picture_std": float(pixels.flatten(1).std(1, correction=0).median()),
        "mean_std": float(pixels.flatten(1).mean(1).std(correction=0)),
        "roughness": float(pixels.diff(dim=-1).abs().mean()) if images.shape[-1] > 1 else 0.0,
        "gray": images.shape[1] == 3 and bool((images[:, :1] == images).all()),
    }


# ---- once per run ----


def cached_bounds(
    folder: Path,
    data: ImageData,
    scheduler: CustomDDPMScheduler,
    *,
    loss_type: str = "simple",
    **options: Any,
) -> dict[str, Any] | None:
    """The bounds of a run, from `loss_bounds.json` in its folder if they are of these pictures and this schedule.

    Args:
        folder: output folder of the run; the file is written there.
        data, scheduler: see `compute_bounds`.
        loss_type: of the run; the bounds are those of L_simple, and others have none.
        **options: further arguments of `compute_bounds`.

    Returns:
        See `compute_bounds`; None where there is no bound (see `no_bounds`).
    """
    if no_bounds(data, loss_type) is not None:
        return None
    schedule = scheduler.snr(torch.arange(len(scheduler))).tolist()
    key = fingerprint(VERSION, data.fingerprint, schedule, scheduler.config.prediction_type, sorted(options.items()))
    saved = read_json(folder / BOUNDS_FILE)
    if saved is not None and saved.get("key") == key:
        return saved
    bounds = {"key": key, **compute_bounds(data, scheduler, **options)}
    write_json(folder / BOUNDS_FILE, bounds)
    return bounds


def no_bounds(data: ImageData, loss_type: str) -> str | None:
    """Why there are no bounds for these pictures and this loss; None if there are."""
    if data.num_images is None:
        return "the loss is not held against its bounds: they need all pictures, and --streaming reads a stream"
    if loss_type != "simple":
        return f"the loss is not held against its bounds: they are those of --loss_type simple, this is {loss_type}"
    return None
