"""Distances between two sets of pictures, computed from their features.

`Moments` holds the count, mean and covariance of a set, and merges exactly those of its parts (Chan, Golub & LeVeque
1983). `frechet_distance` compares two `Moments` (Heusel et al. 2017, arXiv:1706.08500). `kernel_distance` is KID
(Bińkowski et al. 2018, arXiv:1801.01401), and `neighbourhoods` gives precision and recall (Kynkäänniemi et al. 2019,
arXiv:1904.06991), density and coverage (Naeem et al. 2020, arXiv:2002.09797).

Features are (N, D) of any floating-point type, all arithmetic is in float64. In comparisons the first set is the
generated one, the second the real one.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

ROWS = 2048  # of a block of pairwise distances; bounds the memory


class Estimate(NamedTuple):
    """A number and its standard error (0 where it has none)."""

    value: float
    error: float


# ---- means and covariances ----


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of a set of features.

    Args:
        count: N.
        mean: float64 (D,).
        scatter: Σ (x − mean)(x − mean)ᵀ, float64 (D, D).
    """

    count: int
    mean: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> "Moments":
        """The moments of features (N, D), N >= 0, on their device."""
        features = features.double()
        if len(features) == 0:
            return cls(0, features.new_zeros(features.shape[1]), features.new_zeros(features.shape[1:] * 2))
        mean = features.mean(dim=0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets together, without the cancellation that sums of squares would have."""
        count = self.count + other.count
        if count == 0:
            return self
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        weight = self.count * other.count / count
        scatter = self.scatter + other.scatter + weight * torch.outer(difference, difference)
        return Moments(count, mean, scatter)

    @property
    def covariance(self) -> torch.Tensor:
        """The unbiased covariance, float64 (D, D); needs N >= 2."""
        return self.scatter / (self.count - 1)

    @property
    def dim(self) -> int:
        """Number D of features."""
        return len(self.mean)


def merge_all(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts together, merged from left to right."""
    first, *others = parts
    for other in others:
        first = first.merge(other)
    return first


def check_rank(moments: Moments, what: str) -> None:
    """Raise ValueError if the covariance of N pictures in D features is singular (N <= D)."""
    if moments.count <= moments.dim:
        raise ValueError(
            f"{what} has {moments.count} pictures; the covariance of {moments.dim} features needs more than "
            f"{moments.dim} of them, otherwise it is singular and the Fréchet distance mostly bias"
        )


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """A with A Aᵀ = covariance; rounding below zero is taken for zero."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def frechet_distance(one: Moments, other: Moments) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians: |μ₁−μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½).

    With Σᵢ = AᵢAᵢᵀ, tr (Σ₁Σ₂)^½ is the sum of the singular values of A₁ᵀA₂. This needs no square root of a matrix that
    is not symmetric, and loses no digits where a covariance is singular.

    Args:
        one, other: moments of equal dimension D, of at least 2 pictures each.
    """
    cross = torch.linalg.svdvals(_root(one.covariance).T @ _root(other.covariance)).sum()
    traces = one.covariance.trace() + other.covariance.trace()
    return float((one.mean - other.mean).square().sum() + traces - 2 * cross)


def bootstrap_error(
    statistic: Callable[[torch.Tensor], float], features: torch.Tensor, resamples: int, seed: int = 0
) -> float:
    """Standard error of a statistic of features, from resamples with replacement.

    Only the spread of the resamples is used: their mean has the bias of a finite sample twice.

    Args:
        statistic: function of features (N, D).
        features: (N, D).
        resamples: number of resamples, >= 2.
        seed: seed of the resampling.
    """
    random = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        chosen = torch.from_numpy(random.integers(0, len(features), len(features))).to(features.device)
        values.append(statistic(features[chosen]))
    return float(np.std(values, ddof=1))


def frechet_distance_infinity(features: torch.Tensor, reference: Moments, points: int = 15, seed: int = 0) -> Estimate:
    """Fréchet distance extrapolated to infinitely many generated pictures (Chong & Forsyth 2020, arXiv:1911.07023).

    The bias of N pictures is a/N to first order. The distance is computed for `points` subsets, at equal distances in
    1/N between N/5 and all of them, and a line in 1/N is fitted; the result is its value at 1/N = 0.

    Args:
        features: of the generated pictures, (N, D), N >= 50.
        reference: moments of the real ones, taken as exact.
        points: number of subsets.
        seed: seed of the choice of the subsets.

    Returns:
        The extrapolated distance and the standard error of the fit. The subsets overlap, so that the error is a lower
        bound.

    Raises:
        ValueError: fewer than 50 pictures.
    """
    count = len(features)
    if count < 50:
        raise ValueError(f"there are {count} pictures; extrapolation to infinitely many needs at least 50")
    random = np.random.default_rng(seed)
    inverse = np.linspace(1 / count, 5 / count, points)
    sizes = np.unique(np.round(1 / inverse).astype(int))
    values = []
    for size in sizes.tolist():
        chosen = torch.from_numpy(random.permutation(count)[:size]).to(features.device)
        values.append(frechet_distance(Moments.of(features[chosen]), reference))
    coefficients, covariance = np.polyfit(1 / sizes, values, 1, cov=True)
    return Estimate(float(coefficients[1]), float(math.sqrt(covariance[1, 1])))


# ---- KID ----


def mmd_unbiased(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Unbiased squared maximum mean discrepancy with the kernel (x·y/D + 1)³; a 0-d float64 tensor.

    Args:
        one, other: features (M, D) and (N, D), M, N >= 2.
    """
    one, other = one.double(), other.double()

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def without_diagonal(matrix: torch.Tensor) -> torch.Tensor:
        return (matrix.sum() - matrix.trace()) / (len(matrix) * (len(matrix) - 1))

    return without_diagonal(kernel(one, one)) + without_diagonal(kernel(other, other)) - 2 * kernel(one, other).mean()


def kernel_distance(one: torch.Tensor, other: torch.Tensor, block: int = 1000, seed: int = 0) -> Estimate:
    """KID: mean of `mmd_unbiased` over disjoint blocks of both sets, and its standard error.

    The blocks are independent, so that the error is right also where both sets have the same distribution and the
    estimate is degenerate. Its expectation does not depend on the number of pictures or on the block.

    Args:
        one, other: features (M, D) and (N, D), M, N >= 40.
        block: largest number of pictures of a block; there are at least 20 blocks.
        seed: seed of the division into blocks.

    Raises:
        ValueError: fewer than 40 pictures.
    """
    fewest = min(len(one), len(other))
    if fewest < 40:
        raise ValueError(f"there are {fewest} pictures; KID with its standard error needs at least 40 in each set")
    block = min(block, fewest // 20)
    random = np.random.default_rng(seed)
    orders = [torch.from_numpy(random.permutation(len(each))).to(each.device) for each in (one, other)]
    values = torch.stack(
        [
            mmd_unbiased(one[orders[0][start : start + block]], other[orders[1][start : start + block]])
            for start in range(0, fewest - block + 1, block)
        ]
    )
    return Estimate(float(values.mean()), float(values.std() / math.sqrt(len(values))))


# ---- CMMD ----


def clip_distance(one: torch.Tensor, other: torch.Tensor, sigma: float = 10.0) -> float:
    """CMMD (Jayasumana et al. 2024, arXiv:2401.09603): 1000 MMD² with a Gaussian kernel, without bias (eq. 4).

    Args:
        one, other: CLIP embeddings of length 1, (M, D) and (N, D), M, N >= 2.
        sigma: width of the kernel exp(−|x − y|² / (2σ²)).
    """
    one, other = one.double(), other.double()

    def total(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # 1 − k, which is small, so that the sums lose no digits.
        rows = [torch.expm1(-_squared_distances(part, b) / (2 * sigma**2)).sum() for part in a.split(ROWS)]
        return torch.stack(rows).sum()

    m, n = len(one), len(other)  # on the diagonals 1 − k is 0
    within = total(one, one) / (m * (m - 1)) + total(other, other) / (n * (n - 1))
    return float(1000 * (within - 2 * total(one, other) / (m * n)))


# ---- precision, recall, density, coverage ----


def _squared_distances(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    squares = one.square().sum(1)[:, None] + other.square().sum(1)[None, :]
    return (squares - 2 * one @ other.T).clamp_(min=0)


def _squared_radii(features: torch.Tensor, k: int) -> torch.Tensor:
    """Squared distance of every sample to its k-th nearest other one."""
    radii = []
    for start in range(0, len(features), ROWS):
        distances = _squared_distances(features[start : start + ROWS], features)
        rows = torch.arange(len(distances), device=features.device)
        distances[rows, start + rows] = torch.inf  # itself, also where a copy is at the same place
        radii.append(distances.topk(k, largest=False).values[:, -1])
    return torch.cat(radii)


def _mean(values: torch.Tensor) -> Estimate:
    values = values.double()
    return Estimate(float(values.mean()), float(values.std() / math.sqrt(len(values))))


def neighbourhoods(generated: torch.Tensor, real: torch.Tensor, k: int = 3, k_density: int = 5) -> dict[str, Estimate]:
    """Precision, recall, density and coverage, from balls that reach to the k-th nearest sample of the same set.

    Args:
        generated: features (M, D).
        real: features (N, D).
        k: neighbours for precision and recall (3 in the paper).
        k_density: neighbours for density and coverage (5 in the paper).

    Returns:
        precision: share of generated samples in the ball of any real one.
        recall: share of real samples in the ball of any generated one.
        density: mean number of balls of real samples that a generated one lies in, divided by k.
        coverage: share of real samples with a generated one in their ball.
        Each with the standard error over the samples that are counted, the balls being fixed.

    Raises:
        ValueError: a set has no more than k samples.
    """
    fewest = min(len(generated), len(real))
    if fewest <= max(k, k_density):
        raise ValueError(f"there are {fewest} pictures; precision and coverage need more than {max(k, k_density)}")
    centre = real.double().mean(0)  # small numbers lose fewer digits in the squares
    generated, real = generated.double() - centre, real.double() - centre
    real_radii, generated_radii = _squared_radii(real, k), _squared_radii(generated, k)
    density_radii = real_radii if k == k_density else _squared_radii(real, k_density)
    precise, density, recalled = [], [], []
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for start in range(0, len(generated), ROWS):
        distances = _squared_distances(generated[start : start + ROWS], real)
        precise.append((distances <= real_radii).any(1))
        inside = distances <= density_radii
        density.append(inside.sum(1).double() / k_density)
        covered |= inside.any(0)
    for start in range(0, len(real), ROWS):
        recalled.append((_squared_distances(real[start : start + ROWS], generated) <= generated_radii).any(1))
    return {
        "precision": _mean(torch.cat(precise)),
        "recall": _mean(torch.cat(recalled)),
        "density": _mean(torch.cat(density)),
        "coverage": _mean(covered),
    }
