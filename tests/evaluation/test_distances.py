"""Distances between sets, against closed forms, scipy, brute force and torch-fidelity's functions."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from custom_ddpm.evaluation.distances import (
    Moments,
    bootstrap_error,
    check_rank,
    frechet_distance,
    frechet_distance_infinity,
    kernel_distance,
    merge_all,
    mmd_unbiased,
    neighbourhoods,
)


def normal(n, d, seed=0, scale=1.0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + shift


def gaussian(mean, covariance, count=1000):
    mean, covariance = torch.tensor(mean).double(), torch.tensor(covariance).double()
    return Moments(count, mean, covariance * (count - 1))


# ---- the Fréchet distance ----


def test_diagonal_gaussians_in_closed_form():
    one = gaussian([0.0, 1.0, 2.0], np.diag([1.0, 4.0, 0.0]))
    other = gaussian([3.0, 1.0, -2.0], np.diag([9.0, 4.0, 0.25]))
    assert frechet_distance(one, other) == pytest.approx(9 + 16 + (1 - 3) ** 2 + 0 + 0.25, rel=1e-12)


@pytest.mark.parametrize("d", [2, 7, 40])
def test_covariances_that_do_not_commute_against_sqrtm(d):
    random = np.random.default_rng(d)
    a, b = random.standard_normal((d, d)), random.standard_normal((d, d))
    one, other = a @ a.T, b @ b.T
    assert np.abs(one @ other - other @ one).max() > 0.1
    m, n = random.standard_normal(d), random.standard_normal(d)
    expected = ((m - n) ** 2).sum() + np.trace(one + other - 2 * scipy.linalg.sqrtm(one @ other).real)
    assert frechet_distance(gaussian(m, one), gaussian(n, other)) == pytest.approx(expected, rel=1e-8)


def test_singular_covariances_lose_no_digits():
    random = np.random.default_rng(0)
    a = random.standard_normal((30, 5))
    moments = gaussian(np.zeros(30), a @ a.T)
    assert abs(frechet_distance(moments, moments)) < 1e-12 * np.trace(a @ a.T) * 30
    twice = gaussian(np.zeros(30), 4 * a @ a.T)
    assert frechet_distance(moments, twice) == pytest.approx(np.trace(a @ a.T), rel=1e-10)


def test_few_pictures_are_refused():
    check_rank(Moments.of(normal(9, 8)), "the set")
    with pytest.raises(ValueError, match=r"the set has 8 pictures; the covariance of 8 features needs more than 8"):
        check_rank(Moments.of(normal(8, 8)), "the set")


def test_extrapolation_removes_the_bias():
    reference = gaussian(np.zeros(16), np.eye(16))
    plain, extrapolated = [], []
    for seed in range(20):
        features = normal(400, 16, seed)
        plain.append(frechet_distance(Moments.of(features), reference))
        extrapolated.append(frechet_distance_infinity(features, reference, seed=seed).value)
    # Of N pictures of the same distribution: |mean|² is d/N, the covariance's part about d(d+1)/(4N).
    assert np.mean(plain) == pytest.approx(16 / 400 + 16 * 17 / 1600, rel=0.1)
    assert abs(np.mean(extrapolated)) < 0.1 * np.mean(plain)
    with pytest.raises(ValueError, match="needs at least 50"):
        frechet_distance_infinity(normal(49, 2), reference)


def test_the_bootstrap_error_is_the_spread_of_new_samples():
    reference = gaussian(np.zeros(4), np.eye(4))

    def distance(features):
        return frechet_distance(Moments.of(features), reference)

    new = [distance(normal(500, 4, seed, shift=0.3)) for seed in range(200)]
    errors = [bootstrap_error(distance, normal(500, 4, 1000 + seed, shift=0.3), 50, seed) for seed in range(10)]
    assert np.mean(errors) == pytest.approx(np.std(new), rel=0.2)


# ---- merging ----


@pytest.mark.parametrize("sizes", [[1, 2, 300], [100, 0, 203], [303]])
def test_merged_parts_equal_the_whole(sizes):
    features = normal(303, 12, scale=3.0, shift=1000.0)
    merged = merge_all(map(Moments.of, features.split(sizes)))
    assert merged.count == 303
    np.testing.assert_allclose(merged.mean, features.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(features.numpy().T), rtol=1e-10, atol=1e-10)


# ---- KID ----


def test_mmd_is_the_mean_over_pairs():
    one, other = normal(5, 3).numpy(), normal(4, 3, 1, shift=0.5).numpy()

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    expected = np.mean([k(one[i], one[j]) for i in range(5) for j in range(5) if i != j])
    expected += np.mean([k(other[i], other[j]) for i in range(4) for j in range(4) if i != j])
    expected -= 2 * np.mean([k(x, y) for x in one for y in other])
    assert mmd_unbiased(torch.tensor(one), torch.tensor(other)).item() == pytest.approx(expected, rel=1e-12)


def test_kid_of_equal_distributions_is_zero_within_its_error_and_of_others_is_not():
    scores = []
    for seed in range(30):
        value, error = kernel_distance(normal(400, 8, seed), normal(400, 8, 100 + seed), seed=seed)
        scores.append(value / error)
    # Student's t with 19 degrees of freedom has standard deviation 1.06.
    assert np.std(scores) == pytest.approx(1.06, rel=0.35) and abs(np.mean(scores)) < 4 / math.sqrt(30)
    value, error = kernel_distance(normal(400, 8), normal(400, 8, 1, shift=0.5))
    assert value > 10 * error
    with pytest.raises(ValueError, match="needs at least 40"):
        kernel_distance(normal(39, 2), normal(400, 2))


def test_the_expectation_of_kid_does_not_depend_on_the_block():
    one, other = normal(2000, 4), normal(2000, 4, 1, shift=0.3)
    small, large = kernel_distance(one, other, block=10), kernel_distance(one, other, block=100)
    assert abs(small.value - large.value) < 4 * math.hypot(small.error, large.error)
    assert small.value == pytest.approx(mmd_unbiased(one, other).item(), abs=4 * small.error)


# ---- precision, recall, density, coverage ----


def brute_force(generated, real, k, k_density):
    def radius(points, i, k):
        return sorted(np.linalg.norm(points[i] - points[j]) for j in range(len(points)) if j != i)[k - 1]

    def inside(x, points, radii):
        return np.array([np.linalg.norm(x - p) <= r for p, r in zip(points, radii, strict=True)])

    real_radii, dense_radii = ([radius(real, i, n) for i in range(len(real))] for n in (k, k_density))
    generated_radii = [radius(generated, i, k) for i in range(len(generated))]
    balls = np.array([inside(x, real, dense_radii) for x in generated])
    return {
        "precision": np.mean([inside(x, real, real_radii).any() for x in generated]),
        "recall": np.mean([inside(x, generated, generated_radii).any() for x in real]),
        "density": balls.sum(1).mean() / k_density,
        "coverage": balls.any(0).mean(),
    }


@pytest.mark.parametrize(("k", "k_density"), [(3, 5), (1, 1)])
def test_neighbourhoods_against_brute_force(k, k_density):
    generated, real = normal(40, 2, scale=0.8, shift=100.3), normal(50, 2, 1, shift=100.0)
    ours = neighbourhoods(generated, real, k, k_density)
    expected = brute_force(generated.numpy(), real.numpy(), k, k_density)
    assert {name: value for name, (value, _) in ours.items()} == pytest.approx(expected)
    assert 0.3 < ours["precision"].value < 1 and 0.3 < ours["recall"].value < 1
    p = ours["precision"].value
    assert ours["precision"].error == pytest.approx(math.sqrt(p * (1 - p) / 39))


def test_neighbourhoods_in_several_blocks(monkeypatch):
    generated, real = normal(40, 2, scale=0.8), normal(50, 2, 1)
    whole = neighbourhoods(generated, real)
    monkeypatch.setattr("custom_ddpm.evaluation.distances.ROWS", 7)
    assert {name: each.value for name, each in neighbourhoods(generated, real).items()} == pytest.approx(
        {name: each.value for name, each in whole.items()}
    )


def test_a_lost_mode_is_seen_by_recall_and_coverage_alone():
    real = torch.cat([normal(100, 2, 0, 0.1), normal(100, 2, 1, 0.1, shift=5.0)])
    one_mode = neighbourhoods(normal(200, 2, 2, 0.1), real)
    assert one_mode["precision"].value > 0.8 and one_mode["recall"].value < 0.55 and one_mode["coverage"].value <= 0.5
    with pytest.raises(ValueError, match="need more than 5"):
        neighbourhoods(real, real[:5])


# ---- the library that published numbers are compared with ----


def test_torch_fidelity_gives_the_same_numbers():
    fid = pytest.importorskip("torch_fidelity.metric_fid", exc_type=(ImportError, RuntimeError))
    from torch_fidelity.metric_kid import kernel_poly, mmd2
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    one, other = normal(300, 12), normal(300, 12, 1, scale=1.2, shift=0.2)
    statistics = [fid.fid_features_to_statistics(each) for each in (one, other)]
    expected = fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID]
    assert frechet_distance(Moments.of(one), Moments.of(other)) == pytest.approx(expected, rel=1e-6)
    kernels = [kernel_poly(a.numpy(), b.numpy()) for a, b in ((one, one), (one, other), (other, other))]
    assert mmd_unbiased(one, other).item() == pytest.approx(mmd2(*kernels), rel=1e-6)
    precision, recall = calculate_precision_recall_full(one, other)
    ours = neighbourhoods(one, other)
    assert (ours["precision"].value, ours["recall"].value) == pytest.approx((precision, recall), rel=1e-6)
