"""custom_ddpm/evaluation/bounds.py: closed forms, brute force, and the order of the curves."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from custom_ddpm.evaluation import bounds
from custom_ddpm.evaluation.bounds import (
    cached_bounds,
    compute_bounds,
    covariance_eigenvalues,
    linear_errors,
    loss_factors,
    memorised_errors,
    picture_statistics,
)
from custom_ddpm.evaluation.records import LEVELS, read_json
from custom_ddpm.objective import simple_loss
from custom_ddpm.scheduler import PREDICTION_TYPES, CustomDDPMScheduler

ROOT = np.random.default_rng(0).normal(size=(5, 5)) * np.array([1.0, 0.6, 0.3, 0.1, 0.02])
COVARIANCE, MEAN = ROOT @ ROOT.T, np.array([0.4, -0.3, 0.1, 0.0, 1.0])


class Pictures:
    """Pictures in memory with the interface of `ImageData`, in an order that is not that of the array."""

    def __init__(self, images, labels=None):
        self.images, self.labels = torch.as_tensor(images), labels
        self.num_images, self.channels, self.height, self.width = self.images.shape
        self.fingerprint, self.order = "pictures", np.random.default_rng(1).permutation(len(images))
        self.read = 0

    def batches(self, positions):
        for batch in positions:
            rows = self.order[list(batch)]
            self.read += len(rows)
            yield self.images[rows], None if self.labels is None else self.labels[rows]


def random_pictures(n, channels=1, size=4, seed=0):
    """Pictures of which neighbours are alike: a few smooth patterns and a little noise."""
    random = np.random.default_rng(seed)
    patterns = random.normal(size=(3, channels, size, size)).cumsum(-1) * 40
    pixels = 128 + np.tensordot(random.normal(size=(n, 3)), patterns, 1) + random.normal(size=(n, channels, size, size))
    return torch.tensor(pixels.clip(0, 255).round().astype(np.uint8))


# ---- the linear curve ----


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_of_gaussian_data_the_linear_loss_is_the_formula_of_the_issue(prediction_type):
    scheduler = CustomDDPMScheduler(prediction_type=prediction_type)
    t = torch.tensor([0, 10, 100, 500, 999])
    values = np.linalg.eigvalsh(COVARIANCE)
    ours = loss_factors(scheduler, t) * linear_errors(torch.tensor(values), 5, scheduler.snr(t))
    for i, mine in zip(t.tolist(), ours.tolist(), strict=True):
        betas = np.linspace(1e-4, 0.02, 1000)
        a = np.prod(1 - betas[: i + 1])
        epsilon = np.mean(a * values / (a * values + 1 - a))
        factor = {"epsilon": 1, "sample": (1 - a) / a, "v_prediction": 1 / a}[prediction_type]
        assert mine == pytest.approx(epsilon * factor, rel=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("weighting", ["uniform", "min_snr", "p2"])
def test_of_gaussian_data_the_linear_loss_is_the_training_loss_of_the_exact_model(prediction_type, weighting):
    """The posterior mean of N(m, Σ) in a million draws, through the training's own loss."""
    scheduler, n = CustomDDPMScheduler(prediction_type=prediction_type), 200_000
    random = torch.Generator().manual_seed(0)
    x_0 = torch.tensor(MEAN) + torch.randn(n, 5, generator=random, dtype=torch.float64) @ torch.tensor(ROOT).T
    noise = torch.randn(n, 5, generator=random, dtype=torch.float64)
    covariance = torch.tensor(COVARIANCE)
    for t in (3, 60, 300, 900):
        timesteps = torch.full((n,), t)
        a = scheduler.alphas_cumprod[t].double()
        x_t = scheduler.add_noise(x_0, noise, timesteps)
        gain = a.sqrt() * covariance @ torch.linalg.inv(a * covariance + (1 - a) * torch.eye(5))
        best = torch.tensor(MEAN) + (x_t - a.sqrt() * torch.tensor(MEAN)) @ gain.T
        epsilon = (x_t - a.sqrt() * best) / (1 - a).sqrt()
        output = {"sample": best, "epsilon": epsilon, "v_prediction": a.sqrt() * epsilon - (1 - a).sqrt() * best}
        losses = simple_loss(
            scheduler, output[prediction_type], x_0, noise, timesteps, loss_weighting=weighting, snr_gamma=5.0
        )
        one = torch.tensor([t])
        expected = loss_factors(scheduler, one, weighting, 5.0) * linear_errors(
            torch.linalg.eigvalsh(covariance), 5, scheduler.snr(one)
        )
        error = losses.std() / math.sqrt(n)
        assert abs(losses.mean() - expected) < 4 * error + 1e-4 * expected


def test_eigenvalues_are_those_of_numpy_and_the_gram_matrix_has_the_same(monkeypatch):
    x = np.random.default_rng(0).normal(size=(30, 70)) + 5
    batches = [torch.tensor(part) for part in np.array_split(x, 4)]
    mean, of_covariance = covariance_eigenvalues(iter(batches), 70)
    expected = np.linalg.eigvalsh(np.cov(x.T, bias=True))
    np.testing.assert_allclose(mean, x.mean(0))
    np.testing.assert_allclose(of_covariance, expected, atol=1e-10)
    monkeypatch.setattr(bounds, "MAX_DIMENSIONS", 69)
    mean, of_gram = covariance_eigenvalues(iter(batches), 70)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-6)  # the pictures are kept in float32
    np.testing.assert_allclose(of_gram, expected[-30:], atol=1e-5)


# ---- the memorised curve ----


def brute_force(pictures, chosen, noise, snr, labels=None):
    """The definition, one picture at a time, in float64, with ᾱ = SNR/(1+SNR); pixels are rounded to float32."""
    x = (pictures.numpy().reshape(len(pictures), -1).astype(np.float32) / np.float32(127.5) - 1).astype(float)
    found = []
    for i, epsilon, s in zip(chosen.tolist(), noise.double().numpy(), snr.tolist(), strict=True):
        a, b = s / (1 + s), 1 / (1 + s)
        x_t = math.sqrt(a) * x[i] + math.sqrt(b) * epsilon
        logs = [-sum((x_t - math.sqrt(a) * x_j) ** 2) / (2 * b) for x_j in x]
        if labels is not None:
            logs = [log if labels[j] == labels[i] else -math.inf for j, log in enumerate(logs)]
        weights = [math.exp(log - max(logs)) for log in logs]
        mean = sum(w * x_j for w, x_j in zip(weights, x, strict=True)) / sum(weights)
        found.append(np.mean((x[i] - mean) ** 2))
    return np.array(found)


@pytest.mark.parametrize("batch_size", [None, 1, 7])
@pytest.mark.parametrize("conditional", [False, True])
def test_of_a_finite_set_the_memorised_loss_is_brute_force(batch_size, conditional):
    pictures = random_pictures(40, size=3)
    labels = torch.arange(40) % 3 if conditional else None
    chosen, snr = torch.arange(40), torch.logspace(-3, 4, 40)
    noise = torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    ours = memorised_errors(pictures, chosen, noise, snr, labels, batch_size)
    expected = brute_force(pictures, chosen, noise, snr, labels)
    assert expected[0] > 0.01 and expected[-1] < 1e-3
    np.testing.assert_allclose(ours, expected, rtol=1e-8, atol=1e-15)


def test_two_pictures_have_a_closed_form():
    """x_0 = ±c: E[x_0|x_t] = c tanh(…), and the error is an integral in one dimension."""
    pictures = torch.tensor([[[[100]]], [[[160]]]], dtype=torch.uint8)
    x, snr = (np.array([100, 160]) / 127.5 - 1), 20.0
    half = (x[1] - x[0]) / 2
    z, width = np.linspace(-9, 9, 20001, retstep=True)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    expected = ((half - half * np.tanh(snr * half**2 + math.sqrt(snr) * half * z)) ** 2 * density).sum() * width
    n = 100_000
    noise = torch.randn(n, 1, generator=torch.Generator().manual_seed(0))
    errors = memorised_errors(pictures, torch.arange(n) % 2, noise, torch.full((n,), snr))
    assert errors.mean().item() == pytest.approx(expected, abs=4 * errors.std().item() / math.sqrt(n))


def test_nothing_is_lost_where_exponents_are_huge():
    pictures = torch.cat([random_pictures(6, channels=3, size=32)] * 2)
    pictures[6:, 0, 0, 0] ^= 1  # twins that differ in one pixel by one step
    noise = torch.randn(12, 3072, generator=torch.Generator().manual_seed(0))
    for snr in (1e4, 1e8):
        errors = memorised_errors(pictures, torch.arange(12), noise, torch.full((12,), snr), batch_size=5)
        expected = brute_force(pictures, torch.arange(12), noise, torch.full((12,), snr))
        np.testing.assert_allclose(errors, expected, rtol=1e-4, atol=1e-16)
        assert torch.isfinite(errors).all()


# ---- both, of pictures ----


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_memorised_is_below_the_optimum_is_below_linear(prediction_type):
    """The distribution: 2,000 pictures, equally probable; its optimum is known. The training set: 60 of them."""
    scheduler = CustomDDPMScheduler(prediction_type=prediction_type)
    many = random_pictures(2000)
    few = many[:60]
    of_few = compute_bounds(Pictures(few), scheduler)
    of_many = compute_bounds(Pictures(many), scheduler)
    for level in range(LEVELS):
        tolerance = 4 * (of_few["memorised_error"][level] + of_many["memorised_error"][level])
        assert of_few["memorised"][level] <= of_many["memorised"][level] + tolerance
        assert of_many["memorised"][level] <= of_many["linear"][level] + tolerance
        assert of_many["linear"][level] <= of_many["constant"][level]
    assert of_few["memorised"][1] < 0.7 * of_few["linear"][1]


def test_curves_are_means_over_the_timesteps_of_a_level():
    scheduler, pictures = CustomDDPMScheduler(25, beta_schedule="squaredcos_cap_v2"), random_pictures(50)
    found = compute_bounds(Pictures(pictures), scheduler)
    x = pictures.flatten(1).numpy() / 127.5 - 1
    values = np.linalg.eigvalsh(np.cov(x.T, bias=True)).clip(0)
    a = scheduler.alphas_cumprod.double().numpy()
    of_t = [np.mean(p * values / (p * values + 1 - p)) for p in a]
    for level in range(LEVELS):
        inside = [t for t in range(25) if level <= t / 25 * LEVELS < level + 1]
        assert found["linear"][level] == pytest.approx(np.mean([of_t[t] for t in inside]), rel=1e-4)
        assert found["constant"][level] == pytest.approx(1)
    assert (found["num_images"], found["linear_pictures"], found["memorised_pictures"]) == (50, 50, 50)
    few = compute_bounds(Pictures(pictures), CustomDDPMScheduler(4))
    assert [level for level, value in enumerate(few["linear"]) if value is not None] == [0, 2, 5, 7]
    assert [value is None for value in few["memorised"]] == [value is None for value in few["linear"]]


def test_mirrored_pictures_count():
    pictures, scheduler = random_pictures(30), CustomDDPMScheduler()
    both = compute_bounds(Pictures(torch.cat([pictures, pictures.flip(-1)])), scheduler)
    flipped = compute_bounds(Pictures(pictures), scheduler, random_flip=True)
    np.testing.assert_allclose(flipped["linear"], both["linear"], rtol=1e-9)
    assert flipped["memorised_pictures"] == 30
    plain = compute_bounds(Pictures(pictures), scheduler)
    assert not np.allclose(flipped["linear"], plain["linear"], rtol=1e-2)


def test_the_budget_bounds_what_is_read(monkeypatch):
    monkeypatch.setattr(bounds, "BUDGET", 16 * 16 * 40)
    monkeypatch.setattr(bounds, "MAX_MEMORISED", 7)
    data = Pictures(random_pictures(100))
    found = compute_bounds(data, CustomDDPMScheduler())
    assert (data.read, found["linear_pictures"], found["num_images"]) == (40, 40, 100)
    assert found["memorised_pictures"] == 1
    monkeypatch.setattr(bounds, "MAX_DIMENSIONS", 10)
    found = compute_bounds(Pictures(random_pictures(100)), CustomDDPMScheduler())
    assert found["linear_pictures"] == 10


def test_statistics_of_pictures():
    images = torch.tensor([[[[0, 10], [20, 30]]], [[[100, 100], [100, 100]]]], dtype=torch.uint8)
    found = picture_statistics(images)
    assert (found["minimum"], found["maximum"], found["mean"]) == ([0], [100], [57.5])
    assert found["roughness"] == 5 and found["mean_std"] == pytest.approx(42.5) and not found["gray"]
    assert picture_statistics(images.expand(-1, 3, -1, -1))["gray"]


def test_they_are_computed_once_and_again_when_anything_differs(tmp_path):
    data, scheduler = Pictures(random_pictures(20)), CustomDDPMScheduler()
    first = cached_bounds(tmp_path, data, scheduler)
    assert data.read == 20 and read_json(tmp_path / "loss_bounds.json") == first
    assert cached_bounds(tmp_path, data, scheduler) == first and data.read == 20
    others = [
        (data, CustomDDPMScheduler(beta_schedule="squaredcos_cap_v2"), {}),
        (data, CustomDDPMScheduler(prediction_type="sample"), {}),
        (data, scheduler, {"random_flip": True}),
        (data, scheduler, {"loss_weighting": "min_snr"}),
    ]
    for number, (pictures, noises, options) in enumerate(others, 2):
        cached_bounds(tmp_path, pictures, noises, **options)
        assert data.read == 20 * number
    data.fingerprint = "other pictures"
    cached_bounds(tmp_path, data, scheduler)
    assert data.read == 120
    (tmp_path / "loss_bounds.json").write_text("{damaged")
    assert cached_bounds(tmp_path, data, scheduler) == {**first, "key": read_json(tmp_path / "loss_bounds.json")["key"]}


def test_streams_and_other_losses_have_none(tmp_path):
    stream = SimpleNamespace(num_images=None)
    assert cached_bounds(tmp_path, stream, CustomDDPMScheduler()) is None
    assert "--streaming" in bounds.no_bounds(stream, "simple")
    pictures = Pictures(random_pictures(5))
    assert cached_bounds(tmp_path, pictures, CustomDDPMScheduler(), loss_type="vlb") is None
    assert "vlb" in bounds.no_bounds(pictures, "vlb") and bounds.no_bounds(pictures, "simple") is None
    assert list(tmp_path.iterdir()) == []
