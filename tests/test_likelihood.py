"""The variational bound, compared with integrals, 40-digit arithmetic and data for which the bound is tight."""

import math
from collections import deque
from fractions import Fraction
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
import reference
import torch
from batches import batch, make
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_ddpm.likelihood import (
    ImportanceSampler,
    discretized_gaussian_log_likelihood,
    estimate_original_sample_variances,
    normal_kl,
    prior_term,
    vlb_term,
)
from custom_ddpm.scheduler import PREDICTION_TYPES, CustomDDPMScheduler

PIXELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1.0  # F1


# ---- Gaussians ----


@pytest.mark.parametrize(
    "difference, v1, v2", [(0.0, 1.0, 1.0), (0.3, 0.5, 2.0), (-1.2, 2.0, 0.3), (0.01, 1e-3, 1.1e-3)]
)
def test_kl_is_the_integral(difference, v1, v2):
    def integrand(x):
        log1 = -((x - difference) ** 2) / (2 * v1) - mpmath.log(2 * mpmath.pi * v1) / 2
        log2 = -(x**2) / (2 * v2) - mpmath.log(2 * mpmath.pi * v2) / 2
        return mpmath.exp(log1) * (log1 - log2)

    with mpmath.workdps(20):
        width = 12 * mpmath.sqrt(v1)
        exact = mpmath.quad(integrand, mpmath.linspace(difference - width, difference + width, 9))
    difference, v1, v2 = torch.tensor([difference, v1, v2], dtype=torch.float64)
    ours = normal_kl(difference, v1.log(), v2.log())
    assert ours.item() == pytest.approx(float(exact), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("std", [1e-4, 2e-3, 0.0078, 0.05, 0.3, 2.0, 30.0])
def test_the_256_bins_add_up_to_one(std, dtype):
    for mean in (-3.0, -1.0, -0.999, -0.4, 0.0, 0.123, 0.5, 0.9999, 1.0, 1.7):
        x = PIXELS.to(dtype)
        log_p = discretized_gaussian_log_likelihood(
            x, torch.full_like(x, mean), torch.tensor(2 * math.log(std)).to(dtype)
        )
        assert log_p.isfinite().all() and (log_p <= 0).all()
        assert log_p.double().exp().sum().item() == pytest.approx(1.0, abs=2e-5 if dtype == torch.float32 else 1e-9)


def exact_log_bin(k, mean, std):
    """log P of pixel value k; a bin in the lower tail is reflected, for precision."""
    if k < (mean + 1) * 127.5:
        k, mean = 255 - k, -mean
    low = mpmath.inf if k == 255 else ((k + 0.5) / reference.mpf("127.5") - 1 - mean) / std
    high = -mpmath.inf if k == 0 else ((k - 0.5) / reference.mpf("127.5") - 1 - mean) / std
    return float(mpmath.log((mpmath.erfc(high / mpmath.sqrt(2)) - mpmath.erfc(low / mpmath.sqrt(2))) / 2))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_the_decoder_is_a_difference_of_distribution_functions(dtype, tolerance):
    """Also far in the tail, where the difference underflows to 0 in float32."""
    for std in (2e-3, 0.0078, 0.05, 0.3, 2.0):
        for mean in (-1.1, -0.4, 0.2, 1.0):
            index = torch.tensor([0, 1, 40, 100, 127, 128, 153, 200, 254, 255])
            x = PIXELS[index].to(dtype)
            ours = discretized_gaussian_log_likelihood(
                x, torch.full_like(x, mean), torch.tensor(2 * math.log(std), dtype=dtype)
            )
            for k, value in zip(index.tolist(), ours.tolist(), strict=True):
                assert value == pytest.approx(exact_log_bin(k, mean, std), rel=tolerance, abs=tolerance), (std, mean, k)


def test_the_gradient_of_the_decoder_is_finite_and_right():
    x = PIXELS[[0, 60, 128, 255]]
    mean = torch.tensor([-0.9, 0.4, 0.0039, 0.2], dtype=torch.float64, requires_grad=True)
    log_variance = torch.full((4,), 2 * math.log(0.01), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, v: discretized_gaussian_log_likelihood(x, m, v), (mean, log_variance))
    for std in (1e-6, 1e-2, 1e2):
        for far in (0.0, 1.0, 50.0):
            mean = torch.tensor([far], requires_grad=True)
            log_variance = torch.tensor([2 * math.log(std)], requires_grad=True)
            value = discretized_gaussian_log_likelihood(torch.tensor([PIXELS[128]]), mean, log_variance)
            value.sum().backward()
            assert value.isfinite() and mean.grad.isfinite() and log_variance.grad.isfinite(), (std, far)


# ---- the bound ----


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range", "analytic"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_vlb_terms_by_the_formulas(prediction_type, variance_type):
    """KL of N(μ̃, β̃) and N(μ_θ, σ²), with both means from R4, in 40-digit arithmetic."""
    scheduler = make(
        prediction_type=prediction_type, variance_type=variance_type, original_sample_variances=[0.05] * 1000
    )
    products = reference.alphas_cumprod(reference.betas("linear"))
    t = torch.tensor([1, 2, 30, 500, 999])
    x_0, _, x_t = batch(scheduler, t)
    wrong = x_0 + 0.1 * x_t.flip(0)
    prediction = {
        "sample": wrong,
        "epsilon": scheduler.predict_epsilon(wrong, t, x_t, "sample"),
        "v_prediction": scheduler.predict_velocity(wrong, t, x_t, "sample"),
    }[prediction_type]
    if variance_type == "learned_range":
        prediction = torch.cat([prediction, torch.full_like(prediction, 0.2)], dim=1)
    ours = vlb_term(scheduler, prediction, x_0, x_t, t)
    for i, step in enumerate(t.tolist()):
        of_original, _, small = reference.posterior(products, step, step - 1)
        large = 1 - products[step] / products[step - 1]
        sigma2 = {
            "fixed_small": small,
            "fixed_large": large,
            "learned_range": large ** reference.mpf("0.6") * small ** reference.mpf("0.4"),
            "analytic": small + of_original**2 * reference.mpf(0.05),
        }[variance_type]
        gap = float(((wrong[i] - x_0[i]) ** 2).mean())
        nats = (small / sigma2 - 1 - reference.log(small / sigma2) + of_original**2 * gap / sigma2) / 2
        assert ours[i].item() == pytest.approx(float(nats / reference.log(2)), rel=1e-7)


def test_the_first_vlb_term_is_the_decoder():
    scheduler = make(prediction_type="sample")
    t = torch.zeros(3, dtype=torch.int64)
    x_0, noise, x_t = batch(scheduler, t)
    prediction = x_0 + 0.003 * noise
    std = float(reference.posterior(reference.alphas_cumprod(reference.betas("linear")), 1, 0)[2]) ** 0.5
    for value, image, mean in zip(vlb_term(scheduler, prediction, x_0, x_t, t), x_0, prediction, strict=True):
        indices = ((image.flatten() + 1) * 127.5).round().long().tolist()
        nats = [-exact_log_bin(k, m, std) for k, m in zip(indices, mean.flatten().tolist(), strict=True)]
        assert value.item() == pytest.approx(np.mean(nats) / math.log(2), rel=1e-9)


@pytest.mark.parametrize("schedule", ["exp", "linear"])
def test_the_bound_is_tight_where_the_model_is_exact(schedule):
    """For Gaussian data and the exact reverse process, L_T + Σ L_{t−1} + L_0 is the entropy of the data.

    x_0 and ε are integrated by Gauss-Hermite quadrature. The decoder's bins, 2/255 wide, take a density to a
    probability as long as its σ is wide beside them, which a first β of 0.012 sees to.
    """
    v, T = 0.04, 1000 if schedule == "exp" else 100
    ranges = {} if schedule == "exp" else {"beta_start": 0.01, "beta_end": 0.2}
    products = reference.alphas_cumprod(reference.betas(schedule, T, *ranges.values()))
    a, b = reference.floats(products), reference.floats(1 - p for p in products)
    scheduler = make(
        T,
        beta_schedule=schedule,
        prediction_type="sample",
        variance_type="analytic",
        original_sample_variances=(v * b / (a * v + b)).tolist(),
        **ranges,
    )
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    weights = torch.tensor(np.outer(weights, weights).flatten() / weights.sum() ** 2)
    x_0 = torch.tensor(np.repeat(nodes, 12) * math.sqrt(v))[None, :, None].expand(T, -1, -1)
    epsilon = torch.tensor(np.tile(nodes, 12))[None, :, None].expand(T, -1, -1)
    t = torch.arange(T).repeat_interleave(144)
    x_0, epsilon = x_0.reshape(-1, 1), epsilon.reshape(-1, 1)
    x_t = scheduler.add_noise(x_0, epsilon, t)
    gain = torch.tensor(np.sqrt(a) * v / (a * v + b))[t, None]
    terms = vlb_term(scheduler, gain * x_t, x_0, x_t, t).reshape(T, 144) @ weights
    bound = (terms.sum() + prior_term(scheduler, x_0[:144]) @ weights).item()
    entropy = 0.5 * math.log2(2 * math.pi * math.e * v) - math.log2(2 / 255)
    assert bound == pytest.approx(entropy, abs=4e-4)  # (2/255)²/24σ² of the bins
    assert (terms > 0).all()


def test_clipping_is_optional_in_the_bound():
    scheduler = make(clip_sample=True, prediction_type="sample")
    t = torch.tensor([500])
    x_0, _, x_t = batch(scheduler, t)
    outside = x_0 + 5.0
    assert vlb_term(scheduler, outside, x_0, x_t, t) < vlb_term(scheduler, outside, x_0, x_t, t, limit=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prior_term(dtype):
    x_0 = torch.stack([torch.zeros(16), torch.linspace(-1, 1, 16)]).to(dtype)
    for kwargs in ({}, {"beta_end": 0.002}, {"rescale_betas_zero_snr": True, "prediction_type": "sample"}):
        scheduler = make(**kwargs)
        a = reference.mpf(scheduler.alphas_cumprod[-1].item())
        for image, ours in zip(x_0, prior_term(scheduler, x_0).tolist(), strict=True):
            second_moment = reference.mpf((image.double() ** 2).mean().item())
            nats = (a * second_moment + (1 - a) - 1 - reference.log(1 - a)) / 2
            assert ours == pytest.approx(float(nats / reference.log(2)), rel=1e-6)


def test_variance_type_zero_has_no_bound():
    scheduler, t = make(variance_type="zero"), torch.tensor([5])
    x_0, noise, x_t = batch(scheduler, t)
    with pytest.raises(ValueError, match="variance_type 'zero' has no likelihood"):
        vlb_term(scheduler, noise, x_0, x_t, t)


# ---- importance sampling of t ----


def test_sampler_defaults_are_those_of_the_paper():
    """Nichol & Dhariwal 2021, section 3.3."""
    assert ImportanceSampler(2).uniform_probability == 0.001
    assert ImportanceSampler(2).history[:, :-1].shape == (2, 10)


def test_timesteps_are_uniform_until_every_history_is_full():
    sampler = ImportanceSampler(4, history_per_timestep=2)
    uniforms = (torch.arange(8) + 0.5) / 8
    sampler.update(torch.tensor([0, 0, 1, 1, 2, 2, 3]), torch.tensor([9.0, 9, 1, 1, 1, 1, 1]))
    timesteps, weights = sampler.sample(uniforms)
    assert timesteps.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and timesteps.dtype == torch.int64
    assert weights.tolist() == pytest.approx([1.0] * 8)
    sampler.update(torch.tensor([3]), torch.tensor([1.0]))
    assert sampler.sample(uniforms)[0].tolist() == [0, 0, 0, 0, 0, 0, 1, 3]  # p_0 = 3/4


def test_probabilities_follow_the_root_of_the_second_moment():
    """Nichol & Dhariwal 2021, eq. 18."""
    rng = np.random.default_rng(0)
    T, H = 7, 10
    losses = rng.uniform(0.1, 3.0, (T, H)) * np.arange(1, T + 1)[:, None]
    sampler = ImportanceSampler(T, H, uniform_probability=0.3)
    sampler.update(torch.arange(T).repeat_interleave(H), torch.tensor(losses).flatten())
    root = np.sqrt((losses**2).mean(1))
    expected = 0.7 * root / root.sum() + 0.3 / T
    np.testing.assert_allclose(sampler.probabilities().numpy(), expected, rtol=1e-5)

    n = 200_000
    timesteps, weights = sampler.sample((torch.arange(n) + 0.5) / n)
    np.testing.assert_allclose(np.bincount(timesteps, minlength=T) / n, expected, atol=2e-5)
    np.testing.assert_allclose(weights.numpy(), 1 / (T * expected[timesteps.numpy()]), rtol=1e-5)
    # The weighted mean over the draws estimates the mean over t, for any function of t.
    value = torch.tensor(rng.standard_normal(T))
    assert (weights.double() * value[timesteps]).mean().item() == pytest.approx(value.mean().item(), abs=2e-4)


@settings(deadline=None)
@given(
    T=st.integers(1, 5),
    history=st.integers(1, 4),
    batches=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=14), min_size=1, max_size=8),
)
def test_the_history_holds_the_latest_losses(T, history, batches):
    sampler, expected = ImportanceSampler(T, history), [deque(maxlen=history) for _ in range(T)]
    loss = 0.0
    for timesteps in batches:
        timesteps = [t % T for t in timesteps]
        losses = []
        for t in timesteps:
            loss += 1.0
            losses.append(loss)
            expected[t].append(loss)
        sampler.update(torch.tensor(timesteps), torch.tensor(losses))
    for t in range(T):
        held = sorted(x for x in sampler.history[t, :-1].tolist() if x > 0)
        assert held == sorted(expected[t])


def test_the_draw_is_a_function_of_the_uniforms_at_the_edges_too():
    sampler = ImportanceSampler(1000)
    edges = torch.tensor([0.0, 1.0 - 2**-24])
    for T in range(1, 400):  # for some T the float32 probabilities sum to less than the upper edge
        assert ImportanceSampler(T).sample(edges)[0].tolist() == [0, T - 1]
    uniforms = torch.rand(64, generator=torch.Generator().manual_seed(0))
    first, again = sampler.sample(uniforms), sampler.sample(uniforms)
    assert torch.equal(first[0], again[0])
    alone = torch.cat([sampler.sample(uniforms[i : i + 1])[0] for i in range(64)])
    assert torch.equal(first[0], alone)


def test_the_sampler_is_saved_and_restored():
    sampler = ImportanceSampler(3, 2)
    sampler.update(torch.tensor([0, 0, 1, 1, 2, 2, 2]), torch.arange(7.0) + 1)
    again = ImportanceSampler(3, 2)
    again.load_state_dict(sampler.state_dict())
    assert torch.equal(again.probabilities(), sampler.probabilities())
    for one in (sampler, again):
        one.update(torch.tensor([0, 2]), torch.tensor([10.0, 20.0]))
    assert torch.equal(again.history, sampler.history) and torch.equal(again.counts, sampler.counts)


def test_the_sampler_does_not_synchronise_with_the_device():
    sampler = ImportanceSampler(10).to("meta")
    timesteps, weights = sampler.sample(torch.empty(5, device="meta"))
    sampler.update(timesteps, weights)
    assert timesteps.shape == weights.shape == (5,)


def test_the_history_has_no_autograd_graph():
    sampler = ImportanceSampler(3)
    sampler.update(torch.tensor([0]), torch.tensor([1.0], requires_grad=True) * 2)
    assert not sampler.history.requires_grad


# ---- the analytic variance ----


def gaussian_model(scheduler, v, learned=False):
    """The optimal ε-prediction for data N(0, v·I)."""

    def model(sample, timesteps, class_labels):
        a = scheduler.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)
        epsilon = ((1 - a).sqrt() / (a * v + 1 - a) * sample).to(sample.dtype)
        return SimpleNamespace(sample=torch.cat([epsilon, epsilon], dim=1) if learned else epsilon)

    return model


def gaussian_batches(v, num_batches=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for size in [16] * (num_batches - 1) + [8]:
        yield v**0.5 * torch.randn(size, 3, 16, 16, generator=generator), None


def exact_variances(v, T=1000):
    products = reference.alphas_cumprod(reference.betas("linear", T))
    return np.array([float(v * (1 - a) / (a * v + 1 - a)) for a in products])


@pytest.mark.parametrize("v, variance_type", [(1.0, "fixed_small"), (0.1, "learned_range")])
def test_the_estimate_is_the_variance_of_x_0_given_x_t(v, variance_type):
    scheduler = make(variance_type=variance_type)
    model = gaussian_model(scheduler, v, learned=variance_type == "learned_range")
    variances = estimate_original_sample_variances(
        model, scheduler, gaussian_batches(v), num_timesteps=40, generator=torch.Generator().manual_seed(0)
    )
    assert isinstance(variances, list) and len(variances) == 1000
    numbers = 56 * 3 * 16 * 16
    measured = np.unique(np.linspace(0, 999, 40).round().astype(int))
    ratio = np.array(variances) / exact_variances(v)
    assert np.abs(ratio[measured] - 1).max() < 4 * math.sqrt(2 / numbers)
    # Interpolated timesteps: exact for v = 1, otherwise within a few percent.
    assert np.abs(ratio - 1).max() < (4 * math.sqrt(2 / numbers) if v == 1.0 else 0.08)
    ready = CustomDDPMScheduler(variance_type="analytic", original_sample_variances=variances)
    assert ready.config.original_sample_variances == variances


def test_all_timesteps_can_be_measured_and_a_seed_reproduces_the_estimate():
    scheduler = make(20, beta_end=0.5)
    products = reference.floats(reference.alphas_cumprod(reference.betas("linear", 20, 1e-4, 0.5)))

    def estimate(seed):
        return estimate_original_sample_variances(
            gaussian_model(scheduler, 0.3),
            scheduler,
            gaussian_batches(0.3),
            num_timesteps=100,
            generator=torch.Generator().manual_seed(seed),
        )

    expected = 0.3 * (1 - products) / (0.3 * products + 1 - products)
    np.testing.assert_allclose(estimate(0), expected, rtol=4 * math.sqrt(2 / (56 * 768)))
    assert estimate(0) == estimate(0) != estimate(1)


def test_class_labels_reach_the_model_and_clipping_is_included():
    seen = []
    scheduler = make(4, clip_sample=True, prediction_type="sample")

    def model(sample, timesteps, class_labels):
        seen.append(class_labels)
        return SimpleNamespace(sample=torch.full_like(sample, 9.0))

    labels = torch.tensor([3, 4])
    variances = estimate_original_sample_variances(model, scheduler, [(torch.zeros(2, 1, 2, 2), labels)])
    assert all(given is labels for given in seen) and len(seen) == 4
    assert variances == pytest.approx([1.0] * 4)  # 9 clipped to 1, data at 0


def test_a_perfect_model_has_the_smallest_variance():
    scheduler = make(4, prediction_type="sample")
    variances = estimate_original_sample_variances(
        lambda sample, timesteps, class_labels: SimpleNamespace(sample=torch.zeros_like(sample)),
        scheduler,
        [(torch.zeros(2, 1, 2, 2), None)],
    )
    assert variances == pytest.approx([1e-20] * 4, rel=1e-9, abs=0.0)  # the lower bound used for the logarithm


def test_interpolation_is_exact_for_a_power_law():
    scheduler = make(prediction_type="sample")
    products = reference.alphas_cumprod(reference.betas("linear"))
    expected = 0.01 * reference.floats((1 - a) ** reference.mpf("1.5") for a in products)
    error = torch.tensor(np.sqrt(expected))

    def model(sample, timesteps, class_labels):
        return SimpleNamespace(sample=error[timesteps].view(-1, 1, 1, 1).expand_as(sample))

    data = [(torch.zeros(2, 1, 2, 2, dtype=torch.float64), None), (torch.zeros(1, 1, 2, 2, dtype=torch.float64), None)]
    variances = estimate_original_sample_variances(model, scheduler, data, num_timesteps=11)
    np.testing.assert_allclose(variances, expected, rtol=1e-5)


@pytest.mark.parametrize(("T", "num_timesteps"), [(1000, 100), (1000, 3), (7, 100)])
def test_the_measured_timesteps_are_evenly_spaced(T, num_timesteps):
    scheduler, seen = make(T, prediction_type="sample"), []

    def model(sample, timesteps, class_labels):
        seen.append(timesteps.tolist())
        return SimpleNamespace(sample=sample)

    data = [(torch.zeros(2, 1, 2, 2), None)]
    estimate_original_sample_variances(model, scheduler, data, num_timesteps=num_timesteps)
    n = min(num_timesteps, T)
    assert seen == [[round(Fraction(i * (T - 1), n - 1))] * 2 for i in range(n)]


def test_no_batches_raise():
    with pytest.raises(ValueError, match="batches is empty"):
        estimate_original_sample_variances(gaussian_model(make(), 1.0), make(), [])
