"""The scheduler compared with the formulas (tests/reference.py), with brute force, and with its documentation."""

import inspect
import math
from itertools import pairwise

import numpy as np
import pytest
import reference
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_ddpm.scheduler import PREDICTION_TYPES, TIMESTEP_SPACINGS, CustomDDPMScheduler
from custom_ddpm.schedules import make_betas, resample_betas

EPS32 = float(torch.finfo(torch.float32).eps)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def make(schedule="linear", T=1000, **kwargs):
    return CustomDDPMScheduler(T, beta_schedule=schedule, **{"clip_sample": False, **kwargs})


def abar(schedule="linear", T=1000):
    return reference.alphas_cumprod(reference.betas(schedule, T))


def column(T):
    """Ones (T, 1) and all timesteps: inputs of ones and zeros give the coefficients."""
    return torch.ones(T, 1, dtype=torch.float64), torch.arange(T)


# ---- tables and coefficients, compared with 40-digit arithmetic ----


@pytest.mark.parametrize("schedule", reference.SCHEDULES)
def test_float32_tables_are_within_one_ulp(schedule):
    scheduler, betas = make(schedule), reference.betas(schedule)
    tables = {
        "betas": betas,
        "alphas": [1 - b for b in betas],
        "alphas_cumprod": abar(schedule),
    }
    for name, exact in tables.items():
        table = getattr(scheduler, name)
        assert table.dtype == torch.float32 and table.shape == (1000,)
        np.testing.assert_allclose(table.double().numpy(), reference.floats(exact), rtol=EPS32 / 2, err_msg=name)


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-9), (torch.float32, EPS32)])
@pytest.mark.parametrize("schedule", reference.SCHEDULES)
def test_every_coefficient_at_every_timestep(schedule, dtype, rtol):
    scheduler, products = make(schedule), abar(schedule)
    ones, t = column(1000)
    ones = ones.to(dtype)
    zeros = torch.zeros_like(ones)
    posterior = [reference.posterior(products, i, i - 1) for i in range(1000)]
    exact = {
        "√ᾱ": (scheduler.add_noise(ones, zeros, t), [reference.noising(products, i)[0] for i in range(1000)]),
        "√(1−ᾱ)": (scheduler.add_noise(zeros, ones, t), [reference.noising(products, i)[1] for i in range(1000)]),
        "√α": (scheduler.forward_step(ones, t, zeros), [reference.noising(products, i, i - 1)[0] for i in range(1000)]),
        "√β": (scheduler.forward_step(zeros, t, ones), [reference.noising(products, i, i - 1)[1] for i in range(1000)]),
        "μ̃ of x_0": (scheduler.posterior_mean_variance(ones, zeros, t)[0], [p[0] for p in posterior]),
        "μ̃ of x_t": (scheduler.posterior_mean_variance(zeros, ones, t)[0], [p[1] for p in posterior]),
        "β̃": (scheduler.posterior_mean_variance(ones, ones, t)[1], [p[2] for p in posterior]),
    }
    for name, (ours, theirs) in exact.items():
        assert ours.dtype == dtype and ours.shape == (1000, 1), name
        np.testing.assert_allclose(
            ours.double().flatten().numpy(), reference.floats(theirs), rtol=rtol, atol=1e-300, err_msg=name
        )


@pytest.mark.parametrize("schedule", reference.SCHEDULES)
def test_snr(schedule):
    ours = make(schedule).snr(torch.arange(1000))
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.double().numpy(), reference.floats(a / (1 - a) for a in abar(schedule)), rtol=EPS32)
    assert make(schedule).snr(7).shape == ()
    assert make(schedule).snr(7) == ours[7]


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_posterior_to_any_earlier_timestep_and_any_eta(schedule, eta):
    scheduler, products = make(schedule), abar(schedule)
    t = torch.tensor([0, 1, 1, 40, 40, 500, 500, 500, 999, 999, 999])
    s = torch.tensor([-1, 0, -1, 39, 3, 499, 450, -1, 998, 0, -1])
    ones = torch.ones(len(t), 1, dtype=torch.float64)
    of_original, variance = scheduler.posterior_mean_variance(ones, 0 * ones, t, s, eta=eta)
    of_sample, _ = scheduler.posterior_mean_variance(0 * ones, ones, t, s, eta=eta)
    exact = [reference.ddim(products, int(a), int(b), eta) for a, b in zip(t, s, strict=True)]
    for i, ours in enumerate((of_original, of_sample, variance)):
        np.testing.assert_allclose(ours.flatten().numpy(), reference.floats(e[i] for e in exact), rtol=1e-9, atol=1e-25)


def test_posterior_and_ddim_agree_at_eta_1():
    products = abar()
    for t, s in [(1, 0), (40, 3), (999, 998)]:
        for a, b in zip(reference.posterior(products, t, s), reference.ddim(products, t, s, 1), strict=True):
            assert abs(a - b) < reference.mpf("1e-30")


def test_noising_from_any_earlier_timestep():
    scheduler, products = make(), abar()
    t = torch.tensor([5, 300, 999, 999])
    s = torch.tensor([2, 0, 998, -1])
    ones = torch.ones(4, 1, dtype=torch.float64)
    exact = [reference.noising(products, int(a), int(b)) for a, b in zip(t, s, strict=True)]
    keep, add = scheduler.add_noise(ones, 0 * ones, t, s), scheduler.add_noise(0 * ones, ones, t, s)
    np.testing.assert_allclose(keep.flatten().numpy(), reference.floats(e[0] for e in exact), rtol=1e-12)
    np.testing.assert_allclose(add.flatten().numpy(), reference.floats(e[1] for e in exact), rtol=1e-12)


# ---- brute force ----


@pytest.mark.parametrize("t, s", [(1, 0), (9, 8), (9, 2), (300, 299), (300, 100), (999, 998), (999, 0)])
def test_posterior_is_bayes_theorem_on_a_grid(t, s):
    """R1-R3: multiply the densities of R2 on a grid, normalise, take mean and variance."""
    betas = np.linspace(1e-4, 0.02, 1000)
    alpha_bar_s, ratio = np.prod(1 - betas[: s + 1]), np.prod(1 - betas[s + 1 : t + 1])
    x_0, x_t = 0.6, -0.25
    grid = np.linspace(-5, 5, 400_001)
    forward = -((x_t - np.sqrt(ratio) * grid) ** 2) / (2 * (1 - ratio))  # log q(x_t | x_s)
    prior = -((grid - np.sqrt(alpha_bar_s) * x_0) ** 2) / (2 * (1 - alpha_bar_s))  # log q(x_s | x_0)
    density = np.exp(forward + prior - (forward + prior).max())
    density /= density.sum()  # the normalisation is q(x_t | x_0)
    mean = (density * grid).sum()
    variance = (density * (grid - mean) ** 2).sum()

    ours = make().posterior_mean_variance(
        torch.tensor([x_0], dtype=torch.float64), torch.tensor([x_t], dtype=torch.float64), t, s
    )
    assert ours[0].item() == pytest.approx(mean, rel=1e-8)
    assert ours[1].item() == pytest.approx(variance, rel=1e-8)


def test_closed_form_is_the_chain_with_a_million_samples():
    n, T, x_0 = 1_000_000, 50, 0.7
    scheduler = CustomDDPMScheduler(T, beta_start=1e-3, beta_end=0.15)
    generator = torch.Generator().manual_seed(0)
    products = reference.floats(reference.alphas_cumprod(reference.betas("linear", T, 1e-3, 0.15)))
    x = torch.full((n,), x_0)
    for t in range(T):
        x = scheduler.forward_step(x, t, torch.randn(n, generator=generator))
        if t in (0, 1, 9, 24, 49):
            variance = 1 - products[t]
            assert abs(x.double().mean().item() - math.sqrt(products[t]) * x_0) < 4 * math.sqrt(variance / n)
            assert abs(x.double().var().item() / variance - 1) < 4 * math.sqrt(2 / n)
    closed = scheduler.add_noise(torch.full((n,), x_0), torch.randn(n, generator=generator), T - 1)
    difference = closed.double().mean() - x.double().mean()
    assert abs(difference.item()) < 4 * math.sqrt(2 * (1 - products[-1]) / n)


@pytest.mark.parametrize("schedule", reference.SCHEDULES)
def test_the_chain_composes_to_the_closed_form_exactly(schedule):
    """F6, F8: signal coefficients multiply, noise variances add."""
    scheduler = make(schedule)
    ones, t = column(1000)
    keep = scheduler.forward_step(ones, t, 0 * ones).flatten().numpy()
    add = scheduler.forward_step(0 * ones, t, ones).flatten().numpy()
    variance, kept = 0.0, 1.0
    for i in range(1000):
        variance, kept = keep[i] ** 2 * variance + add[i] ** 2, kept * keep[i]
    assert kept == pytest.approx(scheduler.add_noise(ones[:1], 0 * ones[:1], 999).item(), rel=1e-9)
    assert math.sqrt(variance) == pytest.approx(scheduler.add_noise(0 * ones[:1], ones[:1], 999).item(), rel=1e-9)


# ---- conversions: x_0, ε, v, score ----


@pytest.mark.parametrize("schedule", ["linear", "exp"])
def test_any_prediction_gives_any_other(schedule):
    scheduler = make(schedule)
    rng = np.random.default_rng(0)
    t = np.array([0, 1, 10, 300, 700, 999])
    alpha_bar = reference.floats(abar(schedule))[t, None]
    beta_bar = reference.floats(1 - a for a in abar(schedule))[t, None]
    x_0, epsilon = rng.standard_normal((2, len(t), 5))
    x_t = np.sqrt(alpha_bar) * x_0 + np.sqrt(beta_bar) * epsilon
    exact = {
        "sample": x_0,
        "epsilon": epsilon,
        "v_prediction": np.sqrt(alpha_bar) * epsilon - np.sqrt(beta_bar) * x_0,
        "score": -(x_t - np.sqrt(alpha_bar) * x_0) / beta_bar,  # ∇ log N(x_t; √ᾱ x_0, 1−ᾱ)
    }
    convert = {
        "sample": scheduler.predict_original_sample,
        "epsilon": scheduler.predict_epsilon,
        "v_prediction": scheduler.predict_velocity,
        "score": scheduler.predict_score,
    }
    for given_type, value in exact.items():
        for wanted, function in convert.items():
            ours = function(torch.tensor(value), torch.tensor(t), torch.tensor(x_t), given_type)
            np.testing.assert_allclose(
                ours.numpy(), exact[wanted], rtol=1e-9, atol=1e-10, err_msg=f"{given_type} -> {wanted}"
            )
    velocity = scheduler.get_velocity(torch.tensor(x_0), torch.tensor(epsilon), torch.tensor(t))
    np.testing.assert_allclose(velocity.numpy(), exact["v_prediction"], rtol=1e-10)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_configured_prediction_type_is_the_default(prediction_type):
    scheduler = make(prediction_type=prediction_type)
    output, sample = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name in ("predict_original_sample", "predict_epsilon", "predict_velocity", "predict_score"):
        function = getattr(scheduler, name)
        assert torch.equal(function(output, 500, sample), function(output, 500, sample, prediction_type))
        for other in set(PREDICTION_TYPES) - {prediction_type}:
            assert not torch.allclose(function(output, 500, sample), function(output, 500, sample, other))


def test_a_prediction_comes_back_in_the_dtype_of_the_sample():
    output, sample = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 3)
    scheduler = make()
    for name in ("predict_original_sample", "predict_epsilon", "predict_velocity", "predict_score"):
        for prediction_type in (*PREDICTION_TYPES, "score"):
            assert getattr(scheduler, name)(output, 500, sample, prediction_type).dtype == torch.float32


def test_an_unknown_prediction_type_raises_in_every_conversion():
    for name in ("predict_original_sample", "predict_epsilon", "predict_velocity", "predict_score"):
        with pytest.raises(ValueError, match=r"prediction_type is 'flow'; it must be one of epsilon, sample"):
            getattr(make(), name)(torch.ones(1, 1), 5, torch.ones(1, 1), "flow")


# ---- the reverse step ----


def test_the_mean_with_epsilon_is_R6():
    scheduler, betas, products = make(), reference.floats(reference.betas("linear")), abar()
    generator = torch.Generator().manual_seed(0)
    x_t, epsilon = torch.randn(2, 1000, 1, dtype=torch.float64, generator=generator)
    mean, _, _ = scheduler.predict_mean_log_variance(epsilon, torch.arange(1000), x_t)
    root = np.sqrt(reference.floats(1 - a for a in products))
    expected = (x_t.numpy()[:, 0] - betas / root * epsilon.numpy()[:, 0]) / np.sqrt(1 - betas)
    np.testing.assert_allclose(mean.numpy()[:, 0], expected, rtol=1e-8, atol=1e-10)


def exact_variance(kind, products, t, s, eta, weight=None, extra=None):
    """σ² of the reverse step by the definition of each type, in float64."""
    of_original, posterior, beta = _posterior_floats(products, t, s, eta)
    if s == -1 and kind != "analytic":
        posterior = float(eta) ** 2 * float(reference.posterior(products, 1, 0)[2])
    return {
        "fixed_small": posterior,
        "fixed_small_log": posterior,
        "fixed_large": beta,
        "fixed_large_log": beta,
        "learned": float(eta) ** 2 * weight if weight is not None else None,
        "learned_range": beta**weight * posterior ** (1 - weight) if weight is not None else None,
        "analytic": posterior + of_original**2 * extra if extra is not None else None,
    }[kind]


def _posterior_floats(products, t, s, eta):
    of_original, _, variance = reference.ddim(products, t, s, eta)
    beta = 1 - reference.alpha_bar(products, t) / reference.alpha_bar(products, s)
    return float(of_original), float(variance), float(beta) * float(eta) ** 2


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("kind", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"])
@pytest.mark.parametrize("n", [1000, 20])
def test_fixed_variances(kind, eta, n):
    scheduler, products = make(variance_type=kind), abar()
    scheduler.set_timesteps(n)
    t = scheduler.timesteps
    s = torch.cat([t[1:], torch.tensor([-1])])
    zeros = torch.zeros(n, 1, dtype=torch.float64)
    _, log_variance, _ = scheduler.predict_mean_log_variance(zeros, t, zeros, s, eta=eta)
    expected = [exact_variance(kind, products, int(a), int(b), eta) for a, b in zip(t, s, strict=True)]
    np.testing.assert_allclose(log_variance.exp().flatten().numpy(), expected, rtol=1e-9)
    prev_sample = scheduler.step(zeros, t, zeros, variance_noise=zeros + 1, eta=eta).prev_sample
    np.testing.assert_allclose(prev_sample[:-1].flatten().numpy(), np.sqrt(expected[:-1]), rtol=1e-9)
    assert prev_sample[-1] == 0.0  # S1: no noise in the step to x_0


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("kind, value", [("learned", 0.02), ("learned", 0.5), ("learned_range", -0.6)])
def test_learned_variances(kind, value, eta):
    scheduler, products = make(variance_type=kind), abar()
    scheduler.set_timesteps(20)
    t = scheduler.timesteps
    s = torch.cat([t[1:], torch.tensor([-1])])
    zeros = torch.zeros(20, 1, dtype=torch.float64)
    output = torch.cat([zeros, zeros + value], dim=1)
    _, log_variance, _ = scheduler.predict_mean_log_variance(output, t, zeros, s, eta=eta)
    weight = value if kind == "learned" else (value + 1) / 2  # Nichol & Dhariwal 2021, eq. 15
    expected = [exact_variance(kind, products, int(a), int(b), eta, weight) for a, b in zip(t, s, strict=True)]
    np.testing.assert_allclose(log_variance.exp().flatten().numpy(), expected, rtol=1e-9)
    prev_sample = scheduler.step(output, t, zeros, variance_noise=zeros + 1, eta=eta).prev_sample
    np.testing.assert_allclose(prev_sample[:-1].flatten().numpy(), np.sqrt(expected[:-1]), rtol=1e-9)
    assert prev_sample[-1] == 0.0


def test_a_negative_learned_variance_is_clamped():
    scheduler = make(variance_type="learned")
    output = torch.tensor([[0.0, -3.0]])
    _, log_variance, _ = scheduler.predict_mean_log_variance(output, 5, torch.zeros(1, 1))
    assert log_variance.exp().item() == pytest.approx(1e-20, rel=2e-5, abs=0.0)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_analytic_variance(eta):
    rng = np.random.default_rng(0)
    of_x0 = rng.uniform(0.1, 0.9, 1000)
    scheduler, products = make(variance_type="analytic", original_sample_variances=of_x0.tolist()), abar()
    scheduler.set_timesteps(20)
    t = scheduler.timesteps
    s = torch.cat([t[1:], torch.tensor([-1])])
    zeros = torch.zeros(20, 1, dtype=torch.float64)
    _, log_variance, _ = scheduler.predict_mean_log_variance(zeros, t, zeros, s, eta=eta)
    expected = [
        exact_variance("analytic", products, int(a), int(b), eta, extra=of_x0[int(a)])
        for a, b in zip(t, s, strict=True)
    ]
    np.testing.assert_allclose(log_variance.exp().flatten().numpy(), expected, rtol=1e-9)
    prev_sample = scheduler.step(zeros, t, zeros, variance_noise=zeros + 1, eta=eta).prev_sample
    np.testing.assert_allclose(prev_sample[:-1].flatten().numpy(), np.sqrt(expected[:-1]), rtol=1e-9)
    assert prev_sample[-1] == 0.0


@pytest.mark.parametrize("kwargs, eta", [({"variance_type": "zero"}, 1.0), ({}, 0.0)])
def test_zero_variance_adds_no_noise(kwargs, eta):
    scheduler = make(**kwargs)
    sample = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    mean, log_variance, _ = scheduler.predict_mean_log_variance(sample, 400, sample, eta=eta)
    step = scheduler.step(sample, 400, sample, variance_noise=torch.full_like(sample, 1e9), eta=eta)
    assert torch.equal(step.prev_sample, mean)
    assert (log_variance == -math.inf).all()


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_last_step_returns_the_prediction(spacing, prediction_type):
    scheduler = make(timestep_spacing=spacing, prediction_type=prediction_type, steps_offset=1)
    scheduler.set_timesteps(20)
    sample = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    last = scheduler.step(0.5 * sample, scheduler.timesteps[-1], sample)
    assert torch.equal(last.prev_sample, last.pred_original_sample)
    early = scheduler.step(0.5 * sample, scheduler.timesteps[-2], sample)
    assert not torch.equal(early.prev_sample, early.pred_original_sample)


def test_a_step_is_the_same_however_the_timestep_is_given():
    scheduler = make()
    scheduler.set_timesteps(50)
    generator = torch.Generator().manual_seed(0)
    output, sample, z = torch.randn(3, 4, 3, 5, 5, generator=generator)
    t = scheduler.timesteps[[0, 7, 30, 49]]
    together = scheduler.step(output, t, sample, variance_noise=z).prev_sample
    for i in range(4):
        for timestep in (int(t[i]), t[i], t[i : i + 1], t[i].to(torch.int32)):
            alone = scheduler.step(output[i : i + 1], timestep, sample[i : i + 1], variance_noise=z[i : i + 1])
            assert torch.equal(alone.prev_sample[0], together[i])
    mean = scheduler.posterior_mean_variance(output, sample, t, -1)[0]  # one s for many t, and vice versa
    assert torch.equal(mean[1:2], scheduler.posterior_mean_variance(output[1:2], sample[1:2], t[1], -1)[0])
    for kind in ("fixed_small", "analytic"):
        other = make(variance_type=kind, original_sample_variances=[0.5] * 1000)
        _, log_variance, _ = other.predict_mean_log_variance(output, 900, sample, torch.tensor([-1, 5, 30, 899]))
        assert log_variance.shape == (4, 1, 1, 1)
        _, alone, _ = other.predict_mean_log_variance(output[:1], 900, sample[:1], 5)
        assert torch.equal(log_variance[1:2], alone)
        assert other.predict_mean_log_variance(output, t, sample, -1)[1].shape == (4, 1, 1, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_seed_gives_the_same_image_in_any_batch(dtype):
    scheduler = make("squaredcos_cap_v2")
    scheduler.set_timesteps(10)

    def sample(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        x = torch.cat([torch.randn(1, 3, 4, 4, generator=g, dtype=dtype) for g in generators])
        for t in scheduler.timesteps:
            x = scheduler.step(0.3 * x, t, x, generator=generators).prev_sample
        return x

    together = sample([5, 6, 7])
    assert together.isfinite().all() and together.dtype == dtype
    assert torch.equal(together, sample([5, 6, 7]))
    for i, seed in enumerate([5, 6, 7]):
        assert torch.equal(together[i : i + 1], sample([seed]))
    assert not torch.equal(together[0], together[1])


def test_one_generator_gives_the_same_bits_again():
    scheduler, x = make(), torch.ones(2, 3)
    first = scheduler.step(x, 500, x, torch.Generator().manual_seed(3)).prev_sample
    assert torch.equal(first, scheduler.step(x, 500, x, torch.Generator().manual_seed(3)).prev_sample)
    assert not torch.equal(first, scheduler.step(x, 500, x, torch.Generator().manual_seed(4)).prev_sample)


def test_step_returns_a_tuple_on_request():
    scheduler, x = make(), torch.ones(2, 3)
    output = scheduler.step(x, 500, x, variance_noise=x)
    pair = scheduler.step(x, 500, x, variance_noise=x, return_dict=False)
    assert torch.equal(pair[0], output.prev_sample) and torch.equal(pair[1], output.pred_original_sample)


# ---- clipping, thresholding ----


def test_clipping():
    scheduler = make(clip_sample=True, clip_sample_range=0.7, prediction_type="sample")
    x_0 = torch.tensor([[-2.0, -0.5, 0.5, 2.0]])
    step = scheduler.step(x_0, 0, torch.zeros(1, 4))
    assert step.pred_original_sample.tolist() == pytest.approx(np.array([[-0.7, -0.5, 0.5, 0.7]]))
    assert scheduler.predict_mean_log_variance(x_0, 0, x_0, limit=False)[2].tolist() == x_0.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dynamic_thresholding_by_its_definition(dtype):
    """Saharia et al. 2022: s is a quantile of |x̂_0| of one image, at least 1; clip to ±s, divide by s."""
    scheduler = make(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=2.5, prediction_type="sample")
    scale = torch.tensor([0.3, 1.0, 40.0])[:, None, None]
    x_0 = (scale * torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(0))).to(dtype)
    ours = scheduler.step(x_0, 0, x_0).pred_original_sample
    assert ours.dtype == dtype
    for image, limited in zip(x_0.double().numpy(), ours.double().numpy(), strict=True):
        bound = min(max(np.quantile(np.abs(image), 0.9), 1.0), 2.5)
        expected = np.clip(image, -bound, bound) / bound
        np.testing.assert_allclose(limited, expected, rtol=2 * float(torch.finfo(dtype).eps), atol=1e-7)


# ---- zero terminal SNR ----


def test_dynamic_thresholding_of_more_pixels_than_torch_quantile_takes():
    scheduler = make(thresholding=True, dynamic_thresholding_ratio=0.75, sample_max_value=1e9)
    n = 2**24 + 5
    x_0 = torch.arange(n, dtype=torch.float32).view(1, 1, 1, n)
    limited = scheduler._limit(x_0)
    bound = 0.75 * (n - 1)
    assert limited.max() == 1.0
    assert float(limited[0, 0, 0, 1000]) == pytest.approx(1000 / bound, rel=1e-6)


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "zero"])
def test_zero_terminal_snr_starts_from_pure_noise(spacing, prediction_type, variance_type):
    scheduler = make(
        rescale_betas_zero_snr=True,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        variance_type=variance_type,
    )
    assert scheduler.alphas_cumprod[-1] == 0 and scheduler.snr(999) == 0
    x_0, noise = torch.randn(2, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scheduler.add_noise(x_0, noise, 999), noise)
    output = x_0 if prediction_type == "sample" else -x_0  # v = √0 ε − √1 x_0
    assert torch.equal(scheduler.predict_original_sample(output, 999, noise), x_0)
    assert torch.equal(scheduler.predict_epsilon(output, 999, noise), noise)
    scheduler.set_timesteps(25)
    first = scheduler.step(output, 999, noise, variance_noise=0 * noise)
    products = reference.alphas_cumprod(reference.zero_terminal_snr(reference.betas("linear")))
    products[-1] = reference.mpf(0)
    s = int(scheduler.previous_timestep(999))
    of_original, of_sample, _ = reference.posterior(products, 999, s)
    assert float(of_sample) == 0
    np.testing.assert_allclose(first.prev_sample.numpy(), float(of_original) * x_0.numpy(), rtol=1e-9)


def test_zero_terminal_snr_raises_for_epsilon_prediction():
    with pytest.raises(ValueError, match=r"'epsilon' cannot recover x_0 where ᾱ = 0.*use 'v_prediction' or 'sample'"):
        make(rescale_betas_zero_snr=True)


# ---- timesteps ----


@settings(deadline=None)
@given(
    spacing=st.sampled_from(TIMESTEP_SPACINGS),
    T=st.integers(1, 1200),
    data=st.data(),
)
def test_spacings(spacing, T, data):
    n = data.draw(st.integers(1, T))
    scheduler = make(T=T, timestep_spacing=spacing)
    scheduler.set_timesteps(n)
    timesteps = scheduler.timesteps.tolist()
    exact = reference.floats(reference.positions(spacing, T, n))
    assert np.abs(np.array(timesteps) - exact).max() < 0.5 + 1e-9  # a tie may round either way
    assert len(timesteps) == n == scheduler.num_inference_steps
    assert all(a > b for a, b in pairwise(timesteps))
    assert timesteps[0] < T and timesteps[-1] >= 0
    assert [int(scheduler.previous_timestep(t)) for t in timesteps] == [*timesteps[1:], -1]
    assert scheduler.previous_timestep(scheduler.timesteps).tolist() == [*timesteps[1:], -1]


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_spacings_of_a_long_chain(spacing):
    scheduler = make("squaredcos_cap_v2", 30_000, timestep_spacing=spacing)
    scheduler.set_timesteps(7)
    assert scheduler.timesteps.tolist() == reference.timesteps(spacing, 30_000, 7)


def test_the_default_is_every_timestep():
    scheduler = make(T=10)
    assert scheduler.timesteps.tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert scheduler.previous_timestep(torch.arange(10)).tolist() == list(range(-1, 9))
    assert len(scheduler) == 10
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.scale_model_input("anything", 3) == "anything"


def test_custom_timesteps_and_the_timesteps_between_them():
    scheduler = make()
    scheduler.set_timesteps(timesteps=[800, 30, 3])
    assert scheduler.timesteps.tolist() == [800, 30, 3] and scheduler.custom_timesteps
    assert [scheduler.previous_timestep(t) for t in (999, 800, 500, 30, 5, 3, 1)] == [800, 30, 30, 3, 3, -1, -1]
    scheduler.set_timesteps(5)
    assert not scheduler.custom_timesteps


def test_steps_offset_moves_leading_only():
    for spacing, expected in {"leading": [501, 1], "linspace": [999, 0], "trailing": [999, 499]}.items():
        scheduler = make(timestep_spacing=spacing, steps_offset=1)
        scheduler.set_timesteps(2)
        assert scheduler.timesteps.tolist() == expected


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({}, "Can only pass one of .* one is needed"),
        ({"num_inference_steps": 10, "timesteps": [5, 1]}, "Can only pass one of"),
        ({"num_inference_steps": 0}, r"`num_inference_steps` is 0; it must be between 1 and num_train_timesteps, 1000"),
        ({"num_inference_steps": 1001}, "`num_inference_steps` is 1001; it must be between 1 and"),
        ({"num_inference_steps": 5.0}, r"`num_inference_steps` is 5\.0; .* and an integer"),
        ({"num_inference_steps": True}, "`num_inference_steps` is True; .* and an integer"),
        ({"timesteps": []}, "must be in descending order, with at least one"),
        ({"timesteps": [1, 5]}, "must be in descending order"),
        ({"timesteps": [5, 5]}, "must be in descending order"),
        ({"timesteps": [1000, 5]}, r"must lie in \[0, 1000\), num_train_timesteps; they run from 1000 to 5"),
        ({"timesteps": [5, -1]}, r"must lie in \[0, 1000\).* they run from 5 to -1"),
    ],
)
def test_set_timesteps_raises(kwargs, message):
    scheduler = make()
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**kwargs)
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))


def test_an_offset_beyond_the_last_timestep_raises():
    with pytest.raises(ValueError, match=r"they run from 1000 to 1 \(steps_offset is 1\)"):
        make(steps_offset=1).set_timesteps(1000)


# ---- invalid arguments ----


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"variance_type": "huge"}, ValueError, "variance_type is 'huge'; it must be one of fixed_small"),
        ({"prediction_type": "flow"}, ValueError, "prediction_type is 'flow'; it must be one of epsilon"),
        ({"timestep_spacing": "even"}, ValueError, "timestep_spacing is 'even'; it must be one of linspace"),
        ({"num_train_timesteps": 0}, ValueError, "num_train_timesteps is 0; it must be at least 1"),
        ({"beta_schedule": "quadratic"}, NotImplementedError, "beta_schedule 'quadratic' is not implemented"),
        ({"beta_start": 0.0}, ValueError, r"betas run from 0 to 0.02; each must be in \(0, 1\)"),
        ({"beta_end": 1.5}, ValueError, r"betas run from 0.0001 to 1.5; each must be in \(0, 1\)"),
        (
            {"num_train_timesteps": 3, "trained_betas": [0.1, 1.0, 0.1]},
            ValueError,
            "betas run from 0.1 to 1; each must",
        ),
        ({"num_train_timesteps": 2, "trained_betas": [0.1, math.nan]}, ValueError, "betas run from nan"),
        ({"trained_betas": [0.1, 0.2]}, ValueError, r"trained_betas has shape \(2,\); num_train_timesteps=1000 needs"),
        ({"num_train_timesteps": 2, "trained_betas": [0.1, 1.0]}, ValueError, "'epsilon' cannot recover x_0"),
        ({"variance_type": "analytic"}, ValueError, "needs original_sample_variances: 1000 numbers >= 0.*got 0"),
        (
            {"num_train_timesteps": 2, "variance_type": "analytic", "original_sample_variances": [0.1, -0.1]},
            ValueError,
            "needs original_sample_variances: 2 numbers >= 0",
        ),
    ],
)
def test_the_constructor_raises(kwargs, error, message):
    with pytest.raises(error, match=message):
        CustomDDPMScheduler(**kwargs)


def test_a_model_output_of_the_wrong_shape_raises():
    sample = torch.zeros(2, 1, 4, 4)
    with pytest.raises(
        ValueError, match=r"'learned_range' and a sample of shape \(2, 1, 4, 4\) it must have \(2, 2, 4"
    ):
        make(variance_type="learned_range").step(sample, 5, sample)
    with pytest.raises(ValueError, match=r"model_output has shape \(2, 2, 4, 4\); with variance_type 'fixed_small'"):
        make().step(torch.zeros(2, 2, 4, 4), 5, sample)


@pytest.mark.parametrize("timestep", [-2, 1000])
def test_a_timestep_out_of_range_is_an_error_and_not_another_timestep(timestep):
    sample = torch.zeros(1, 2)
    with pytest.raises(IndexError):
        make().add_noise(sample, sample, timestep)


# ---- dtypes and shapes ----


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.sampled_from(reference.SCHEDULES),
    T=st.integers(2, 300),
    spacing=st.sampled_from(TIMESTEP_SPACINGS),
    prediction_type=st.sampled_from(PREDICTION_TYPES),
    variance_type=st.sampled_from(["fixed_small", "fixed_large", "learned_range"]),
    eta=st.sampled_from([0.0, 0.5, 1.0]),
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_a_step_in_any_dtype_is_the_float64_step_rounded(
    schedule, T, spacing, prediction_type, variance_type, eta, shape, dtype, data
):
    scheduler = make(
        schedule, T, timestep_spacing=spacing, prediction_type=prediction_type, variance_type=variance_type
    )
    scheduler.set_timesteps(data.draw(st.integers(1, T)))
    t = scheduler.timesteps[data.draw(st.lists(st.integers(0, len(scheduler.timesteps) - 1), min_size=1, max_size=1))]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    x_0, epsilon, z = torch.randn(3, *shape, generator=generator, dtype=torch.float64).to(dtype)
    sample = scheduler.add_noise(x_0, epsilon, t)
    assert sample.dtype == dtype and sample.shape == x_0.shape
    output = {"epsilon": epsilon, "sample": x_0, "v_prediction": scheduler.get_velocity(x_0, epsilon, t)}[
        prediction_type
    ]
    if variance_type == "learned_range":
        output = torch.cat([output, torch.rand(shape, generator=generator).to(dtype)], dim=1)

    ours = scheduler.step(output, t, sample, variance_noise=z, eta=eta)
    exact = scheduler.step(output.double(), t, sample.double(), variance_noise=z.double(), eta=eta)
    assert ours.prev_sample.dtype == ours.pred_original_sample.dtype == dtype
    assert ours.prev_sample.shape == x_0.shape and ours.prev_sample.isfinite().all()
    eps = max(float(torch.finfo(dtype).eps), 1e-12)
    x0_error = (ours.pred_original_sample.double() - exact.pred_original_sample).abs()
    # x̂_0 is a difference of two numbers that may be much larger, so its error is relative to their size.
    alpha_bar = scheduler.add_noise(torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64), t)
    size = (sample.double().abs() + 5.0) / alpha_bar.view(-1, *[1] * (len(shape) - 1))
    assert (x0_error <= eps * exact.pred_original_sample.abs() + 4 * EPS32 * size + 1e-6).all()
    error = (ours.prev_sample.double() - exact.prev_sample).abs()
    assert (error <= 4 * eps * (1 + exact.prev_sample.abs()) + x0_error + sample.double().abs() * eps).all()


def test_integer_timesteps_of_any_kind_and_samples_of_any_rank():
    scheduler = make()
    for shape in [(3,), (3, 2), (3, 2, 4, 4), (3, 2, 2, 2, 2)]:
        x = torch.ones(shape)
        t = torch.tensor([0, 10, 999])
        assert scheduler.add_noise(x, x, t).shape == shape
        assert torch.equal(scheduler.add_noise(x, x, t), scheduler.add_noise(x, x, t.to(torch.int32)))
        assert torch.equal(scheduler.add_noise(x, x, 10)[1], scheduler.add_noise(x, x, t)[1])


# ---- no device synchronisation, and full-graph compilation ----


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large_log", "learned_range", "analytic", "zero"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_nothing_depends_on_tensor_values(variance_type, eta):
    """Tensors on the meta device have no values, so branching on one, or synchronising, raises an error."""
    scheduler = make(variance_type=variance_type, original_sample_variances=[0.5] * 1000)
    scheduler.set_timesteps(20, device="meta")
    x, t = torch.empty(4, 3, 8, 8, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    output = torch.cat([x, x], dim=1) if variance_type == "learned_range" else x
    for timestep in (t, t[0], 500):
        assert scheduler.add_noise(x, x, timestep).shape == x.shape
        assert scheduler.forward_step(x, timestep, x).shape == x.shape
        assert scheduler.get_velocity(x, x, timestep).shape == x.shape
        assert scheduler.posterior_mean_variance(x, x, timestep)[0].shape == x.shape
        for z in (x, None):
            step = scheduler.step(output, timestep, x, variance_noise=z, eta=eta)
            assert step.prev_sample.device.type == "meta" and step.prev_sample.shape == x.shape
    assert scheduler.snr(t).shape == (4,)
    assert scheduler.previous_timestep(t).shape == (4,)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_step_and_add_noise_compile_as_one_graph(backend, variance_type):
    torch.compiler.reset()
    scheduler = make(variance_type=variance_type, clip_sample=True)
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(0)
    x, noise, z = torch.randn(3, 4, 3, 8, 8, generator=generator)
    output = torch.cat([noise, z.clamp(-1, 1)], dim=1) if variance_type == "learned_range" else noise
    t = scheduler.timesteps[[0, 5, 12, 19]]
    add_noise = torch.compile(scheduler.add_noise, fullgraph=True, backend=backend)
    step = torch.compile(scheduler.step, fullgraph=True, backend=backend)
    for timestep in (t, t[1], int(t[2])):
        torch.testing.assert_close(add_noise(x, noise, timestep), scheduler.add_noise(x, noise, timestep))
        compiled = step(output, timestep, x, variance_noise=z, return_dict=False)
        eager = scheduler.step(output, timestep, x, variance_noise=z, return_dict=False)
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


# ---- the interface of diffusers ----


def test_the_constructor_has_diffusers_arguments_and_defaults():
    ours = inspect.signature(CustomDDPMScheduler).parameters
    theirs = inspect.signature(DDPMScheduler).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert {name: ours[name].default for name in theirs} == {name: p.default for name, p in theirs.items()}


@pytest.mark.parametrize(
    "method", ["set_timesteps", "step", "add_noise", "get_velocity", "previous_timestep", "scale_model_input"]
)
def test_methods_have_diffusers_arguments(method):
    ours = inspect.signature(getattr(CustomDDPMScheduler, method)).parameters
    theirs = inspect.signature(getattr(DDPMScheduler, method)).parameters
    assert [name for name in ours if name in theirs] == list(theirs)
    for name, parameter in theirs.items():
        if parameter.default is not inspect.Parameter.empty:
            assert ours[name].default == parameter.default, name


def test_every_argument_is_documented_in_order():
    for name, function in inspect.getmembers(CustomDDPMScheduler, inspect.isfunction):
        documentation = CustomDDPMScheduler.__doc__ if name == "__init__" else function.__doc__
        if (name.startswith("_") and name != "__init__") or "Args:" not in (documentation or ""):
            continue
        if function.__qualname__.split(".")[0] != "CustomDDPMScheduler":
            continue
        arguments = [p for p in inspect.signature(function).parameters if p != "self"]
        section = inspect.cleandoc(documentation).split("Args:\n")[1].split("\n\n")[0]
        listed = [
            line.strip().split(":")[0] for line in section.splitlines() if line.startswith("    ") and line[4] != " "
        ]
        assert listed == arguments, name


# ---- saving ----


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"beta_schedule": "exp"},
        {"beta_schedule": "sigmoid", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"trained_betas": resample_betas(make_betas(), 1000)},
        {"trained_betas": np.linspace(0.001, 0.01, 1000)},
        {"variance_type": "analytic", "original_sample_variances": [0.25] * 1000},
    ],
)
def test_saving_and_loading_changes_nothing(kwargs, tmp_path):
    scheduler = CustomDDPMScheduler(**kwargs)
    scheduler.save_pretrained(tmp_path)
    again = CustomDDPMScheduler.from_pretrained(tmp_path)
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 500, 999])
    assert torch.equal(scheduler.betas, again.betas)
    for ours, loaded in zip(
        scheduler.predict_mean_log_variance(x, t, x), again.predict_mean_log_variance(x, t, x), strict=True
    ):
        assert torch.equal(ours, loaded)
    assert {k: v for k, v in again.config.items() if not k.startswith("_")} == {
        k: v for k, v in scheduler.config.items() if not k.startswith("_")
    }
