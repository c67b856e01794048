"""The sampler on data whose optimal prediction is known in closed form.

For Gaussian data N(m, Σ) the optimal prediction is affine in x_t, so every step of the sampler is affine too,
x_s = A x_t + b + σ z. A, b and σ are obtained exactly by calling `step` with zeros, unit vectors and a z of ones, for
all timesteps at once. The mean and covariance of the output then follow without random numbers. They are compared with
the same recursion from the formulas of tests/reference.py. Random numbers are used only to compare an ordinary sampling
loop with the recursion, and for a mixture of Gaussians.
"""

from functools import lru_cache

import numpy as np
import pytest
import reference
import torch

from custom_ddpm.scheduler import PREDICTION_TYPES, TIMESTEP_SPACINGS, CustomDDPMScheduler

MEAN = np.array([0.4, -0.3, 0.1])
ROOT = np.array([[0.5, 0.0, 0.0], [0.3, 0.4, 0.0], [-0.2, 0.1, 0.3]])
COVARIANCE = ROOT @ ROOT.T  # eigenvalues 0.05, 0.16, 0.43


@lru_cache
def products(schedule, T=1000):
    return reference.alphas_cumprod(reference.betas(schedule, T))


@lru_cache
def noise_levels(schedule, T=1000):
    """ᾱ_t and 1−ᾱ_t in float64, the latter without cancellation."""
    return reference.floats(products(schedule, T)), reference.floats(1 - a for a in products(schedule, T))


@lru_cache
def steps(schedule, spacing, n, eta=1.0):
    """[(t, s, coefficient of x_0, coefficient of x_t, η²β̃, η²β)] for every reverse step, from the formulas."""
    timesteps = reference.timesteps(spacing, 1000, n)
    table = []
    for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
        a_t, a_s = reference.alpha_bar(products(schedule), t), reference.alpha_bar(products(schedule), s)
        coefficients = reference.ddim(products(schedule), t, s, eta)
        table.append((t, s, *map(float, coefficients), eta**2 * float(1 - a_t / a_s)))
    return table


def make(schedule, spacing, n, prediction_type="epsilon", **kwargs):
    kwargs = {"clip_sample": False, **kwargs}
    scheduler = CustomDDPMScheduler(
        1000, beta_schedule=schedule, timestep_spacing=spacing, prediction_type=prediction_type, **kwargs
    )
    scheduler.set_timesteps(n)
    return scheduler


def gain(covariance, a, b):
    """E[x_0 | x_t] = m + gain · (x_t − √ᾱ m)."""
    return np.sqrt(a) * covariance @ np.linalg.inv(a * covariance + b * np.eye(len(covariance)))


def output_for(x_0, x, a, b, prediction_type):
    """The prediction that corresponds to x̂_0: F9 solved for ε, and v by its definition."""
    epsilon = (x - np.sqrt(a) * x_0) / np.sqrt(b)
    return {"sample": x_0, "epsilon": epsilon, "v_prediction": np.sqrt(a) * epsilon - np.sqrt(b) * x_0}[prediction_type]


def best_output(x, a, b, prediction_type, mean=MEAN, covariance=COVARIANCE):
    """The optimal prediction for N(m, Σ): x (N, D); ᾱ and 1−ᾱ per row (N,) or scalar."""
    a, b = np.broadcast_to(a, len(x)), np.broadcast_to(b, len(x))
    marginal = a[:, None, None] * covariance + b[:, None, None] * np.eye(len(mean))
    centred = x - np.sqrt(a)[:, None] * mean
    x_0 = mean + np.sqrt(a)[:, None] * (np.linalg.solve(marginal, centred[..., None])[..., 0] @ covariance)
    return output_for(x_0, x, a[:, None], b[:, None], prediction_type)


def read_off(scheduler, schedule, model, D=3, eta=1.0, variance=None):
    """A (K, D, D), b (K, D), σ (K, D) of every step of the scheduler's timesteps."""
    timesteps = scheduler.timesteps
    K = len(timesteps)
    probes = np.concatenate([np.zeros((1, D)), np.eye(D), np.zeros((1, D))])  # 0, the unit vectors, 0 with z = 1
    x, z = np.tile(probes, (K, 1)), np.zeros((K, D + 2, D))
    z[:, -1] = 1.0
    t = timesteps.repeat_interleave(D + 2)
    a, b = (level[t.numpy()] for level in noise_levels(schedule))
    output = torch.tensor(model(x, a, b, scheduler.config.prediction_type))
    if variance is not None:
        output = torch.cat([output, torch.tensor(variance).repeat_interleave(D + 2)[:, None].expand(-1, D)], dim=1)
    x_s = scheduler.step(output, t, torch.tensor(x), variance_noise=torch.tensor(z).reshape(-1, D), eta=eta)
    x_s = x_s.prev_sample.numpy().reshape(K, D + 2, D)
    offset = x_s[:, 0]
    return (x_s[:, 1:-1] - offset[:, None]).transpose(0, 2, 1), offset, x_s[:, -1] - offset


def recursion(affine, mean, covariance):
    """Means and covariances after every step, from those at the start."""
    means, covariances = [mean], [covariance]
    for A, b, sigma in zip(*affine, strict=True):
        means.append(A @ means[-1] + b)
        covariances.append(A @ covariances[-1] @ A.T + np.diag(sigma**2))
    return np.array(means), np.array(covariances)


def exact_affine(schedule, spacing, n, eta=1.0, variance="small"):
    A, b, sigma = [], [], []
    for t, s, of_original, of_sample, small, large in steps(schedule, spacing, n, eta):
        a, beta_bar = (level[t] for level in noise_levels(schedule))
        of_centred = of_original * gain(COVARIANCE, a, beta_bar)
        A.append(of_centred + of_sample * np.eye(3))
        b.append(of_original * MEAN - np.sqrt(a) * of_centred @ MEAN)
        sigma.append(np.full(3, 0.0 if s < 0 else {"small": small, "large": large, "zero": 0.0}[variance] ** 0.5))
    return np.array(A), np.array(b), np.array(sigma)


@pytest.mark.parametrize("n", [1000, 100, 20])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", reference.SCHEDULES)
def test_the_output_distribution_is_the_recursion_of_the_formulas(schedule, prediction_type, spacing, n):
    ours = read_off(make(schedule, spacing, n, prediction_type), schedule, best_output)
    exact = exact_affine(schedule, spacing, n)
    for mine, theirs in zip(ours, exact, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-7, atol=1e-8)
    # The loop starts from N(0, I), as S1 does.
    means, covariances = recursion(ours, np.zeros(3), np.eye(3))
    exact_means, exact_covariances = recursion(exact, np.zeros(3), np.eye(3))
    np.testing.assert_allclose(means, exact_means, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(covariances, exact_covariances, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", reference.SCHEDULES)
def test_with_all_steps_the_output_has_the_distribution_of_the_data(schedule, prediction_type):
    # The discretisation error of T steps; largest for the curves with a long first step.
    tolerance = {"laplace": 0.35, "exp": 0.30}.get(schedule, 0.035)
    scheduler = make(schedule, "leading", 1000, prediction_type)
    means, covariances = recursion(read_off(scheduler, schedule, best_output), np.zeros(3), np.eye(3))
    np.testing.assert_allclose(means[-1], MEAN, atol=2e-3)
    ratio = np.linalg.eigvals(np.linalg.solve(COVARIANCE, covariances[-1])).real
    assert (1 - tolerance < ratio).all() and (ratio < 1.01).all()


@pytest.mark.parametrize("n", [1000, 100, 20])
@pytest.mark.parametrize("schedule", reference.SCHEDULES)
def test_small_and_large_variance_bracket_the_true_covariance(schedule, n):
    """Ho et al. 2020, section 3.2: β̃ is a lower bound of σ², β an upper bound for data of variance below 1."""
    timesteps = reference.timesteps("trailing", 1000, n)
    a, b = noise_levels(schedule)
    start = a[timesteps[0]] * COVARIANCE + b[timesteps[0]] * np.eye(3)
    small, large = (
        recursion(
            read_off(make(schedule, "trailing", n, variance_type=kind), schedule, best_output),
            np.sqrt(a[timesteps[0]]) * MEAN,
            start,
        )
        for kind in ("fixed_small", "fixed_large")
    )
    for i, t in enumerate(timesteps):
        np.testing.assert_allclose(small[0][i], np.sqrt(a[t]) * MEAN, rtol=1e-6)
        exact = np.linalg.eigvalsh(a[t] * COVARIANCE + b[t] * np.eye(3))
        assert (np.linalg.eigvalsh(small[1][i]) <= exact + 1e-9).all()
        assert (np.linalg.eigvalsh(large[1][i]) >= exact - 1e-9).all()


@pytest.mark.parametrize(
    "eta, kind", [(0.0, "small"), (0.3, "small"), (1.0, "large"), (0.3, "large"), (1.0, "zero"), (0.3, "zero")]
)
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_every_eta_and_fixed_variance(schedule, spacing, eta, kind):
    for variance_type in {"small": ("fixed_small", "fixed_small_log"), "large": ("fixed_large", "fixed_large_log")}.get(
        kind, ("zero",)
    ):
        scheduler = make(schedule, spacing, 50, variance_type=variance_type)
        ours = read_off(scheduler, schedule, best_output, eta=eta)
        for mine, theirs in zip(ours, exact_affine(schedule, spacing, 50, eta, kind), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-7, atol=1e-9)


def test_deterministic_sampling_reaches_the_data_distribution():
    """η = 0 solves the probability-flow ODE, which transports N(0, I) to the data distribution."""
    affine = read_off(make("linear", "trailing", 1000), "linear", best_output, eta=0.0)
    assert (affine[2] == 0).all()
    means, covariances = recursion(affine, np.zeros(3), np.eye(3))
    np.testing.assert_allclose(means[-1], MEAN, atol=2e-3)
    np.testing.assert_allclose(covariances[-1], COVARIANCE, atol=6e-3)


# ---- variances that make every step exact ----

V = 0.2  # data N(m, V·I), where one variance per timestep is exact


def isotropic_output(x, a, b, prediction_type):
    return best_output(x, a, b, prediction_type, MEAN, V * np.eye(3))


def of_original_sample(schedule):
    """Var(x_0 | x_t) of data N(m, V·I)."""
    a, b = noise_levels(schedule)
    return V * b / (a * V + b)


def assert_every_marginal_is_exact(affine, schedule, spacing, n):
    timesteps = reference.timesteps(spacing, 1000, n)
    a, b = noise_levels(schedule)
    first, last = timesteps[0], timesteps[-1]
    means, covariances = recursion(affine, np.sqrt(a[first]) * MEAN, (a[first] * V + b[first]) * np.eye(3))
    for i, t in enumerate(timesteps):
        np.testing.assert_allclose(means[i], np.sqrt(a[t]) * MEAN, rtol=1e-7)
        np.testing.assert_allclose(covariances[i], (a[t] * V + b[t]) * np.eye(3), rtol=1e-7, atol=1e-9)
    # The last step adds no noise, so the output variance is smaller by exactly Var(x_0 | x_t).
    np.testing.assert_allclose(means[-1], MEAN, rtol=1e-7)
    left = V - of_original_sample(schedule)[last]
    np.testing.assert_allclose(covariances[-1], left * np.eye(3), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", [1000, 100, 20, 5])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("schedule", reference.SCHEDULES)
def test_the_analytic_variance_makes_every_step_exact(schedule, spacing, n, eta):
    scheduler = make(
        schedule,
        spacing,
        n,
        variance_type="analytic",
        original_sample_variances=of_original_sample(schedule).tolist(),
    )
    affine = read_off(scheduler, schedule, isotropic_output, eta=eta)
    assert_every_marginal_is_exact(affine, schedule, spacing, n)


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
@pytest.mark.parametrize("n", [1000, 20])
@pytest.mark.parametrize("schedule", reference.SCHEDULES)
def test_an_optimal_learned_variance_makes_every_step_exact(schedule, n, kind):
    best = []
    for t, _, of_original, _, small, large in steps(schedule, "trailing", n):
        variance = small + of_original**2 * of_original_sample(schedule)[t]
        if kind == "learned_range":  # log σ² = w log β + (1−w) log β̃, w = (output + 1)/2
            variance = 2 * np.log(variance / small) / np.log(large / small) - 1 if small > 0 else 0.0
        best.append(variance)
    scheduler = make(schedule, "trailing", n, variance_type=kind)
    affine = read_off(scheduler, schedule, isotropic_output, variance=np.array(best))
    assert_every_marginal_is_exact(affine, schedule, "trailing", n)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_zero_terminal_snr_samples_the_exact_prior(prediction_type, spacing):
    """With ᾱ_T = 0 the start N(0, I) is exactly q(x_T), so the mean of the output is exactly the mean of the data."""
    zero = reference.alphas_cumprod(reference.zero_terminal_snr(reference.betas("linear")))
    a, b = reference.floats(zero), reference.floats(1 - p for p in zero)
    a[-1] = 0.0
    scheduler = make("linear", spacing, 50, prediction_type, rescale_betas_zero_snr=True)
    x, mean = np.zeros((1, 3)), []
    for t in scheduler.timesteps.tolist():
        output = torch.tensor(best_output(x, a[t], b[t], prediction_type))
        x = scheduler.step(output, t, torch.tensor(x), variance_noise=torch.zeros(1, 3)).prev_sample.numpy()
        mean.append(x)
    np.testing.assert_allclose(mean[-1][0], MEAN, rtol=1e-9)


# ---- the sampling loop with random numbers ----


def run_loop(scheduler, model, levels, shape, seed=0, eta=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    for t in scheduler.timesteps:
        a, b = (level[int(t)] for level in levels)
        output = torch.tensor(model(x.double().numpy(), a, b, scheduler.config.prediction_type)).float()
        x = scheduler.step(output, t, x, generator=generator, eta=eta).prev_sample
    return x.double().numpy()


@pytest.mark.parametrize(
    "schedule, prediction_type, spacing, n, eta",
    [
        ("linear", "epsilon", "leading", 100, 1.0),
        ("squaredcos_cap_v2", "v_prediction", "trailing", 20, 0.3),
        ("sigmoid", "sample", "linspace", 20, 1.0),
        pytest.param("linear", "epsilon", "leading", 1000, 1.0, marks=pytest.mark.slow),
    ],
)
def test_samples_have_the_mean_and_covariance_of_the_recursion(schedule, prediction_type, spacing, n, eta):
    N = 40_000
    scheduler = make(schedule, spacing, n, prediction_type)
    samples = run_loop(scheduler, best_output, noise_levels(schedule), (N, 3), eta=eta)
    means, covariances = recursion(exact_affine(schedule, spacing, n, eta), np.zeros(3), np.eye(3))
    mean, covariance = means[-1], covariances[-1]
    variances = np.diag(covariance)
    assert (np.abs(samples.mean(0) - mean) < 4 * np.sqrt(variances / N)).all()
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / N)  # standard error of the covariance
    assert (np.abs(np.cov(samples.T) - covariance) < 4 * error).all()


# ---- a mixture of Gaussians, whose optimal prediction is not affine ----

WEIGHTS, CENTRES, SPREADS = np.array([0.3, 0.5, 0.2]), np.array([-0.7, 0.2, 0.8]), np.array([0.10, 0.15, 0.08])


def mixture_x_0(x, a, b):
    variances = a * SPREADS**2 + b
    centred = x - np.sqrt(a) * CENTRES
    log_share = np.log(WEIGHTS) - 0.5 * np.log(variances) - centred**2 / (2 * variances)
    share = np.exp(log_share - log_share.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    return (share * (CENTRES + np.sqrt(a) * SPREADS**2 / variances * centred)).sum(-1, keepdims=True)


def mixture_output(x, a, b, prediction_type):
    return output_for(mixture_x_0(x, a, b), x, a, b, prediction_type)


def mixture_density(x, a, b):
    variances = a * SPREADS**2 + b
    bells = np.exp(-((x[:, None] - np.sqrt(a) * CENTRES) ** 2) / (2 * variances)) / np.sqrt(2 * np.pi * variances)
    return bells @ WEIGHTS


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2", "sigmoid"])
def test_the_density_of_a_mixture_propagated_on_a_grid(schedule, prediction_type):
    """The density, propagated from T to 0 with the scheduler's means and variances, is the data density."""
    T, grid = 100, np.linspace(-4.5, 4.5, 1201)
    betas = {"beta_start": 1e-3, "beta_end": 0.2}
    exact = reference.alphas_cumprod(reference.betas(schedule, T, *betas.values()))
    a, b = reference.floats(exact), reference.floats(1 - p for p in exact)
    scheduler = CustomDDPMScheduler(
        T, beta_schedule=schedule, prediction_type=prediction_type, clip_sample=False, **betas
    )
    x, t = np.tile(grid, T)[:, None], np.repeat(np.arange(T), len(grid))
    output = torch.tensor(mixture_output(x, a[t, None], b[t, None], prediction_type))
    mean = scheduler.step(output, torch.tensor(t), torch.tensor(x), variance_noise=torch.zeros(len(x), 1)).prev_sample
    sigma = scheduler.step(output, torch.tensor(t), torch.tensor(x), variance_noise=torch.ones(len(x), 1)).prev_sample
    mean, sigma = mean.numpy().reshape(T, -1), (sigma - mean).numpy().reshape(T, -1)
    for i in range(T):  # R4 with the known E[x_0 | x_t]
        of_original, of_sample, variance = map(float, reference.posterior(exact, i, i - 1))
        expected = of_original * mixture_x_0(grid[:, None], a[i], b[i])[:, 0] + of_sample * grid
        np.testing.assert_allclose(mean[i], expected, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(sigma[i], np.sqrt(variance), rtol=1e-6, atol=1e-9)

    density = np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi)
    width = grid[1] - grid[0]
    for i in range(T - 1, 0, -1):
        bells = np.exp(-((grid[:, None] - mean[i]) ** 2) / (2 * sigma[i] ** 2)) / np.sqrt(2 * np.pi) / sigma[i]
        density = bells @ density * width
    assert density.sum() * width == pytest.approx(1, abs=1e-3)
    assert (
        np.abs(density - mixture_density(grid, a[0], b[0])).sum() * width / 2 < 0.06
    )  # total variation; the discretisation error of 100 steps is 0.02 to 0.05


def test_samples_of_a_mixture_have_the_distribution_of_the_data():
    """Kolmogorov-Smirnov test against the data distribution, with all steps of a cosine schedule."""
    from scipy.stats import norm

    N = 20_000
    scheduler = make("squaredcos_cap_v2", "leading", 1000)
    x = np.sort(run_loop(scheduler, mixture_output, noise_levels("squaredcos_cap_v2"), (N, 1))[:, 0])
    exact = norm.cdf((x[:, None] - CENTRES) / SPREADS) @ WEIGHTS
    statistic = np.abs(exact - (np.arange(N) + 0.5) / N).max()
    assert statistic < 1.95 / np.sqrt(N) + 0.003  # significance 0.001, plus the discretisation error of 1000 steps
