"""Comparison with diffusers' schedulers: equal values where theirs are correct, and tests of their known errors."""

import diffusers
import numpy as np
import pytest
import reference
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from test_exact_world import COVARIANCE, MEAN, best_output, noise_levels

from custom_ddpm.scheduler import PREDICTION_TYPES, TIMESTEP_SPACINGS, CustomDDPMScheduler
from custom_ddpm.schedules import make_betas

THEIR_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
LIMITS = {
    "none": {"clip_sample": False},
    "clip": {"clip_sample": True, "clip_sample_range": 0.8},
    "threshold": {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.7},
}


def pair(schedule, theirs=DDPMScheduler, exact_tables=True, **kwargs):
    """Our scheduler and theirs with the same arguments; theirs gets ᾱ in float64 if `exact_tables`."""
    ours = CustomDDPMScheduler(beta_schedule=schedule, **kwargs)
    if "variance_type" in kwargs and theirs is DDIMScheduler:
        kwargs.pop("variance_type")
    theirs = theirs(beta_schedule=schedule, **kwargs)
    if exact_tables:
        theirs.alphas_cumprod = torch.tensor(reference.floats(reference.alphas_cumprod(reference.betas(schedule))))
    return ours, theirs


def tensors(n, dtype, seed=0, shape=(2, 3, 4, 4)):
    return torch.randn(n, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# ---- where both are correct ----


@pytest.mark.parametrize("schedule", THEIR_SCHEDULES)
def test_their_tables_are_ours_in_float32(schedule):
    ours, theirs = pair(schedule, exact_tables=False)
    for name in ("betas", "alphas", "alphas_cumprod"):
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("spacing", "n"),
    [(spacing, n) for spacing in TIMESTEP_SPACINGS for n in (1000, 500, 125, 100, 20, 8, 1)]
    + [(spacing, n) for spacing in ("linspace", "trailing") for n in (30, 7)],
)
def test_set_timesteps_chooses_the_same(spacing, n):
    ours, theirs = pair("linear", timestep_spacing=spacing)
    ours.set_timesteps(n)
    theirs.set_timesteps(n)
    assert torch.equal(ours.timesteps, theirs.timesteps) and ours.timesteps.dtype == theirs.timesteps.dtype
    assert [int(ours.previous_timestep(t)) for t in ours.timesteps] == [
        int(theirs.previous_timestep(t)) for t in theirs.timesteps
    ]


def test_their_leading_spacing_starts_in_the_middle_of_the_chain():
    ours, theirs = pair("linear")
    for n, first in ((501, 500), (999, 998), (7, 852)):
        ours.set_timesteps(n)
        theirs.set_timesteps(n)
        assert theirs.timesteps[0] == first
        assert ours.timesteps.tolist() == reference.timesteps("leading", 1000, n)
        assert ours.timesteps[0] == 999 - -(-1000 // n) + 1 and ours.timesteps[-1] == 0


def test_custom_timesteps_are_the_same():
    ours, theirs = pair("linear")
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=[900, 300, 2])
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert [int(ours.previous_timestep(t)) for t in (900, 300, 2)] == [
        int(theirs.previous_timestep(t)) for t in (900, 300, 2)
    ]


@pytest.mark.parametrize("schedule", THEIR_SCHEDULES)
def test_add_noise_and_get_velocity(schedule):
    ours, theirs = pair(schedule)
    x_0, noise = tensors(2, torch.float64, shape=(6, 3, 4, 4))
    t = torch.tensor([0, 1, 30, 500, 998, 999])
    for method in ("add_noise", "get_velocity"):
        torch.testing.assert_close(
            getattr(ours, method)(x_0, noise, t), getattr(theirs, method)(x_0, noise, t), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_step_is_the_same_given_exact_tables(spacing, prediction_type, variance_type, limit):
    """Same arguments and seed; a difference in the formulas would exceed 1e-9."""
    for schedule in THEIR_SCHEDULES:
        ours, theirs = pair(
            schedule,
            prediction_type=prediction_type,
            variance_type=variance_type,
            timestep_spacing=spacing,
            **LIMITS[limit],
        )
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(9)
        output, sample, predicted = tensors(3, torch.float64)
        if variance_type == "learned":
            output = torch.cat([output, 0.1 * predicted.square() + 0.01], dim=1)
        elif variance_type == "learned_range":
            output = torch.cat([output, predicted.clamp(-1, 1)], dim=1)
        timesteps = [int(t) for t in ours.timesteps]
        if timesteps[-1] > 0:
            timesteps.pop()  # theirs adds noise in the last step; see test_their_last_trailing_step_adds_noise
        for t in timesteps:
            results = [
                scheduler.step(output, t, sample, generator=torch.Generator().manual_seed(t))
                for scheduler in (ours, theirs)
            ]
            torch.testing.assert_close(
                results[0].pred_original_sample, results[1].pred_original_sample, rtol=1e-9, atol=1e-10
            )
            torch.testing.assert_close(results[0].prev_sample, results[1].prev_sample, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "sigmoid"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_step_is_the_same_within_the_error_of_their_tables(schedule, prediction_type):
    """With their own float32 tables, whose 1−ᾱ_t and β̃_t have relative errors up to 1e-4 from cancellation."""
    ours, theirs = pair(schedule, exact_tables=False, prediction_type=prediction_type, clip_sample=True)
    output, sample = tensors(2, torch.float32)
    for t in (999, 998, 700, 400, 100, 30, 10, 2, 1, 0):
        results = [
            scheduler.step(output, t, sample, generator=torch.Generator().manual_seed(t)).prev_sample
            for scheduler in (ours, theirs)
        ]
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_eta_is_that_of_ddim(spacing, prediction_type, limit, eta):
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        ours, theirs = pair(
            schedule, theirs=DDIMScheduler, prediction_type=prediction_type, timestep_spacing=spacing, **LIMITS[limit]
        )
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(10)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        output, sample, z = tensors(3, torch.float64)
        for t in ours.timesteps[:-1].tolist():
            # Ours uses the ε̂ that corresponds to the clipped x̂_0, as in R4; theirs needs an option for it.
            expected = theirs.step(output, t, sample, eta=eta, variance_noise=z, use_clipped_model_output=True)
            result = ours.step(output, t, sample, eta=eta, variance_noise=z)
            torch.testing.assert_close(result.prev_sample, expected.prev_sample, rtol=1e-9, atol=1e-9)
        last = ours.timesteps[-1].item()
        expected = theirs.step(output, last, sample, eta=0.0, use_clipped_model_output=True).prev_sample
        torch.testing.assert_close(ours.step(output, last, sample, eta=eta).prev_sample, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_terminal_snr(prediction_type):
    ours, theirs = pair(
        "linear", exact_tables=False, prediction_type=prediction_type, rescale_betas_zero_snr=True, clip_sample=False
    )
    assert ours.alphas_cumprod[-1] == theirs.alphas_cumprod[-1] == 0
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)
    output, sample = tensors(2, torch.float32)
    for t in (999, 500, 3):
        results = [
            scheduler.step(output, t, sample, generator=torch.Generator().manual_seed(t)).prev_sample
            for scheduler in (ours, theirs)
        ]
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


# ---- known errors of theirs ----


def test_their_fixed_large_log_is_nan():
    ours, theirs = pair("linear", variance_type="fixed_large_log")
    output, sample = tensors(2, torch.float32)
    assert theirs.step(output, 500, sample).prev_sample.isnan().all()
    large = CustomDDPMScheduler(variance_type="fixed_large")
    assert torch.equal(
        ours.step(output, 500, sample, variance_noise=sample).prev_sample,
        large.step(output, 500, sample, variance_noise=sample).prev_sample,
    )


def test_their_tables_are_less_accurate_than_ours():
    ours, theirs = pair("linear", exact_tables=False)
    products = reference.alphas_cumprod(reference.betas("linear"))
    exact = reference.floats(reference.posterior(products, t, t - 1)[2] for t in range(1, 1000))
    x = torch.zeros(999, 1)
    mine = ours.posterior_mean_variance(x, x, torch.arange(1, 1000))[1].double().flatten().numpy()
    diffusers_own = np.array([float(theirs._get_variance(t)) for t in range(1, 1000)])
    assert np.abs(mine / exact - 1).max() < 2**-23
    assert np.abs(diffusers_own / exact - 1).max() > 1e-4


def test_their_last_trailing_step_adds_noise():
    ours, theirs = pair("linear", timestep_spacing="trailing", clip_sample=False)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(20)
    output, sample = tensors(2, torch.float64)
    last = int(ours.timesteps[-1])
    assert last == 49
    seeds = (1, 2)
    mine = [ours.step(output, last, sample, torch.Generator().manual_seed(s)).prev_sample for s in seeds]
    diffusers_own = [theirs.step(output, last, sample, torch.Generator().manual_seed(s)).prev_sample for s in seeds]
    assert torch.equal(*mine)
    assert torch.equal(mine[0], ours.step(output, last, sample).pred_original_sample)
    assert not torch.equal(*diffusers_own)


def test_their_trailing_spacing_can_have_a_step_too_many():
    ours, theirs = pair("linear", timestep_spacing="trailing")
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(61)
    assert len(theirs.timesteps) == 62 and theirs.timesteps[-1] == -1
    assert len(ours.timesteps) == 61 and ours.timesteps[-1] == 15
    assert torch.equal(ours.timesteps, theirs.timesteps[:-1])


def test_their_offset_leaves_the_training_range():
    ours, theirs = pair("linear", steps_offset=1, timestep_spacing="leading")
    theirs.set_timesteps(1000)
    sample = torch.zeros(1, 1, 2, 2)
    with pytest.raises(IndexError):
        theirs.step(sample, theirs.timesteps[0], sample)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1000\)"):
        ours.set_timesteps(1000)


def test_their_epsilon_with_zero_terminal_snr_is_not_finite():
    theirs = DDPMScheduler(rescale_betas_zero_snr=True, clip_sample=False)
    output, sample = tensors(2, torch.float32)
    assert not theirs.step(output, 999, sample).prev_sample.isfinite().all()
    with pytest.raises(ValueError, match="'epsilon' cannot recover x_0"):
        CustomDDPMScheduler(rescale_betas_zero_snr=True)


def test_their_conversion_in_memory_changes_the_betas():
    """Their config marks values left at the default, and the other scheduler replaces these by its own defaults."""
    from diffusers import KDPM2DiscreteScheduler

    assert KDPM2DiscreteScheduler.from_config(DDPMScheduler().config).config.beta_end == 0.012
    ours = KDPM2DiscreteScheduler.from_config(CustomDDPMScheduler().config)
    assert ours.config.beta_start == 0.0001 and ours.config.beta_end == 0.02


# ---- interchange ----


def test_conversion_in_memory_gives_no_warning(caplog, monkeypatch):
    monkeypatch.setattr(diffusers.utils.logging.get_logger("diffusers"), "propagate", True)
    DDIMScheduler.from_config(CustomDDPMScheduler().config)
    assert not caplog.records
    measured = CustomDDPMScheduler(variance_type="analytic", original_sample_variances=[0.1] * 1000)
    DDIMScheduler.from_config(measured.config)
    assert "original_sample_variances" in caplog.text  # DDIM ignores it, with a warning


def build(scheduler_class, config):
    try:
        return scheduler_class.from_config(config)
    except ImportError:
        pytest.skip(f"{scheduler_class.__name__} needs a package that is not installed")


@pytest.mark.parametrize("name", sorted(c.__name__ for c in CustomDDPMScheduler().compatibles))
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", reference.SCHEDULES)
def test_every_compatible_scheduler_and_back(schedule, prediction_type, name, tmp_path):
    scheduler = CustomDDPMScheduler(
        200,
        beta_schedule=schedule,
        beta_end=0.07,
        prediction_type=prediction_type,
        variance_type="fixed_large",
        clip_sample=False,
    )
    other = build(getattr(diffusers, name), scheduler.config)
    assert other.config.prediction_type == prediction_type
    assert other.config.num_train_timesteps == 200
    if name != "EDMEulerScheduler":  # EDM has no β
        np.testing.assert_allclose(other.betas.numpy(), scheduler.betas.numpy(), rtol=2e-3)
    scheduler.save_pretrained(tmp_path / "ours")
    build(getattr(diffusers, name), getattr(diffusers, name).load_config(tmp_path / "ours"))  # and from the file
    other.save_pretrained(tmp_path / "other")
    for config in (other.config, CustomDDPMScheduler.load_config(tmp_path / "other")):
        back = CustomDDPMScheduler.from_config(config)
        for key, value in scheduler.config.items():
            if not key.startswith("_"):
                assert back.config[key] == value, key
        assert torch.equal(back.betas, scheduler.betas)


def test_configurations_of_diffusers_ddpm_load():
    theirs = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    ours = CustomDDPMScheduler.from_config(theirs.config)
    for key, value in theirs.config.items():
        if not key.startswith("_"):
            assert ours.config[key] == value, key


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"]
)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", reference.SCHEDULES)
def test_other_solvers_reach_the_data_distribution(schedule, prediction_type, name):
    """Deterministic solvers are affine for Gaussian data, so four start points determine the output distribution."""
    scheduler = CustomDDPMScheduler(
        beta_schedule=schedule, prediction_type=prediction_type, timestep_spacing="trailing", clip_sample=False
    )
    other = getattr(diffusers, name).from_config(scheduler.config)
    other.set_timesteps(100)
    a, b = noise_levels(schedule)
    *timesteps, last = other.timesteps.tolist()
    x = torch.cat([torch.zeros(1, 3), torch.eye(3)]).double()
    for t in timesteps:
        output = best_output(x.numpy(), a[t], b[t], prediction_type)
        x = other.step(torch.tensor(output), t, x).prev_sample
    offset, A = x.numpy()[0], (x.numpy()[1:] - x.numpy()[0]).T

    # The error after 100 steps: 0.03 for a first-order solver, less for others; laplace has few steps near the ends.
    tolerance = 0.04 if name == "DDIMScheduler" or schedule == "laplace" else 0.01
    first = timesteps[0]
    mean = offset + A @ (np.sqrt(a[first]) * MEAN)
    covariance = A @ (a[first] * COVARIANCE + b[first] * np.eye(3)) @ A.T
    np.testing.assert_allclose(mean, np.sqrt(a[last]) * MEAN, atol=tolerance)
    np.testing.assert_allclose(covariance, a[last] * COVARIANCE + b[last] * np.eye(3), atol=tolerance)


# ---- the same schedule with another T ----


def test_resampled_betas_survive_conversion_as_trained_betas():
    from custom_ddpm.schedules import resample_betas

    scheduler = CustomDDPMScheduler(200, trained_betas=resample_betas(make_betas("linear", 1000), 200))
    for theirs in (DDPMScheduler, DDIMScheduler, diffusers.UniPCMultistepScheduler):
        other = theirs.from_config(scheduler.config)
        assert other.alphas_cumprod[-1].item() == pytest.approx(4.036e-5, rel=1e-3)
