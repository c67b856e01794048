"""Where the steps go (S4): the dynamic programme against all choices, and the exact world."""

from itertools import combinations

import diffusers
import numpy as np
import pytest
import torch
from test_exact_world import COVARIANCE, best_output, noise_levels

from custom_ddpm.scheduler import CustomDDPMScheduler
from custom_ddpm.schedules import log_alphas_cumprod, make_betas, optimal_timesteps


def exact_errors(schedule, variances):
    """E|x_0 − E[x_0|x_t]|²/d of data N(m, Σ) with these eigenvalues of Σ."""
    a, b = noise_levels(schedule)
    return np.mean([v * b / (a * v + b) for v in variances], axis=0)


def cost(errors, a, timesteps):
    """The sum over the steps of (1 − e^{−h})² (E_t − E_s), with e^{−h} from ᾱ."""
    total = 0.0
    for t, s in zip(timesteps, [*timesteps[1:], None], strict=True):
        if s is None:
            total += errors[t]
        else:
            kept = np.sqrt(a[t] / a[s] * (1 - a[s]) / (1 - a[t]))
            total += (1 - kept) ** 2 * (errors[t] - errors[s])
    return total


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 11, 12])
def test_no_other_timesteps_cost_less(schedule, n):
    log = log_alphas_cumprod(make_betas(schedule, 12, 1e-3, 0.4))
    a = log.exp().numpy()
    errors = np.random.default_rng(0).uniform(size=12).cumsum()
    ours = optimal_timesteps(log, errors, n).tolist()
    every = [[11, *sorted(rest, reverse=True)] for rest in combinations(range(11), n - 1)]
    assert ours in every
    assert cost(errors, a, ours) == pytest.approx(min(cost(errors, a, each) for each in every), rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_the_choice_changes_where_two_costs_are_equal(schedule):
    """Two steps from t = 2, by 1 or by 0: the costs are linear in E_1, and equal at one E_1 in closed form."""
    log = log_alphas_cumprod(make_betas(schedule, 3, 0.1, 0.3))
    a = log.exp().numpy()
    share_0, share_1 = ((1 - np.sqrt(a[2] / a[s] * (1 - a[s]) / (1 - a[2]))) ** 2 for s in (0, 1))
    first, last = 0.2, 1.0  # E_0, E_2
    equal = (share_0 * (last - first) + first - share_1 * last) / (1 - share_1)
    assert first < equal < last
    for factor, chosen in ((1 - 1e-8, 1), (1 + 1e-8, 0)):
        assert optimal_timesteps(log, [first, equal * factor, last], 2).tolist() == [2, chosen]


def test_an_error_that_grows_towards_the_picture_is_a_measurement_error():
    log = log_alphas_cumprod(make_betas("linear", 50))
    errors = np.linspace(0.1, 0.5, 50)
    noisy = errors.copy()
    noisy[20] = 0.0
    assert np.isfinite(optimal_timesteps(log, noisy, 10)).all()
    assert (np.diff(optimal_timesteps(log, noisy, 10)) < 0).all()
    assert optimal_timesteps(log, noisy, 50).tolist() == list(range(49, -1, -1))


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2", "sigmoid"])
def test_every_number_of_steps_follows_from_one_table(schedule):
    scheduler = CustomDDPMScheduler(beta_schedule=schedule, prediction_errors=exact_errors(schedule, [0.2]).tolist())
    for n in (1, 2, 7, 10, 50):
        scheduler.set_timesteps(n)
        timesteps = scheduler.timesteps.tolist()
        assert len(timesteps) == n and timesteps[0] == 999 and (np.diff(timesteps) < 0).all()
    scheduler.set_timesteps(timesteps=[5, 1])
    assert scheduler.timesteps.tolist() == [5, 1]


def test_zero_terminal_snr_has_timesteps():
    scheduler = CustomDDPMScheduler(
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        prediction_errors=exact_errors("linear", [0.2]).tolist(),
    )
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999 and (scheduler.timesteps.diff() < 0).all()


def error(schedule, n, **kwargs):
    """Largest error of the covariance of the samples, without noise, from the start N(0, I)."""
    scheduler = CustomDDPMScheduler(
        beta_schedule=schedule, timestep_spacing="trailing", clip_sample=False, solver_order=2, **kwargs
    )
    scheduler.set_timesteps(n)
    a, b = noise_levels(schedule)
    x = torch.cat([torch.zeros(1, 3), torch.eye(3)]).double()
    for t in scheduler.timesteps.tolist():
        output = torch.tensor(best_output(x.numpy(), a[t], b[t], "epsilon"))
        x = scheduler.step(output, t, x, eta=0.0).prev_sample
    A = (x[1:] - x[0]).numpy()
    return np.abs(A.T @ A - COVARIANCE).max()


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_ten_steps_have_a_third_of_the_error_of_trailing(schedule):
    errors = exact_errors(schedule, np.linalg.eigvalsh(COVARIANCE)).tolist()
    assert error(schedule, 10, prediction_errors=errors) < error(schedule, 10) / 3


def test_the_configuration_has_them_when_they_are_there(tmp_path):
    assert "prediction_errors" not in CustomDDPMScheduler().config
    errors = exact_errors("linear", [0.2]).tolist()
    scheduler = CustomDDPMScheduler(prediction_errors=errors)
    scheduler.save_pretrained(tmp_path)
    again = CustomDDPMScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(10)
    again.set_timesteps(10)
    assert torch.equal(scheduler.timesteps, again.timesteps)
    theirs = diffusers.DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    theirs.set_timesteps(timesteps=scheduler.timesteps.tolist())
    assert theirs.timesteps.tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("errors", [[0.1], [-1.0] * 1000])
def test_errors_that_do_not_fit_are_refused(errors):
    with pytest.raises(ValueError, match="the timesteps need prediction_errors: 1000 numbers >= 0"):
        CustomDDPMScheduler(prediction_errors=errors)
