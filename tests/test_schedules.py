"""β schedules compared with their formulas in 40-digit arithmetic (tests/reference.py)."""

import math
from itertools import pairwise

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_ddpm import schedules
from custom_ddpm.schedules import log_alphas_cumprod, make_betas, resample_betas, rescale_zero_terminal_snr


@pytest.mark.parametrize("T", [1, 2, 7, 1000])
@pytest.mark.parametrize("schedule", reference.SCHEDULES)
def test_every_schedule_is_its_formula(schedule, T):
    betas = make_betas(schedule, T)
    assert betas.dtype == torch.float64 and betas.shape == (T,)
    # β of a curve is 1 minus a ratio near 1, so its relative error in float64 is about 1e-16/β.
    np.testing.assert_allclose(betas.numpy(), reference.floats(reference.betas(schedule, T)), rtol=1e-10)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "sigmoid"])
def test_a_range_starts_and_ends_at_its_arguments(schedule):
    betas = make_betas(schedule, 50, beta_start=0.003, beta_end=0.3)
    np.testing.assert_allclose(betas.numpy(), reference.floats(reference.betas(schedule, 50, 0.003, 0.3)), rtol=1e-12)
    assert betas.diff().min() > 0  # F4


def test_all_names_are_known():
    assert set(schedules.BETA_SCHEDULES) == set(reference.SCHEDULES)


def test_an_unknown_schedule_raises_and_lists_the_known_ones():
    with pytest.raises(NotImplementedError, match=r"beta_schedule 'quadratic' is not implemented.*linear.*exp"):
        make_betas("quadratic")


@settings(deadline=None)
@given(
    schedule=st.sampled_from(reference.SCHEDULES),
    T=st.integers(1, 1500),
    start=st.floats(1e-5, 0.01),
    end=st.floats(0.011, 0.9),
)
def test_beta_lies_between_0_and_1_and_alpha_bar_falls(schedule, T, start, end):
    betas = make_betas(schedule, T, start, end)
    assert ((betas > 0) & (betas < 1)).all()
    assert (log_alphas_cumprod(betas).diff() < 0).all()


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "laplace", "exp"])
def test_a_curve_has_the_same_shape_for_every_T(schedule):
    coarse = log_alphas_cumprod(make_betas(schedule, 100))
    fine = log_alphas_cumprod(make_betas(schedule, 1000))[9::10]
    np.testing.assert_allclose(coarse[:-1].numpy(), fine[:-1].numpy(), rtol=1e-9)  # the last β may be capped


@pytest.mark.parametrize("schedule", reference.SCHEDULES)
def test_log_alphas_cumprod_is_the_product(schedule):
    betas = reference.betas(schedule)
    logs = [reference.log(a) for a in reference.alphas_cumprod(betas)]
    ours = log_alphas_cumprod(torch.tensor(reference.floats(betas)))
    np.testing.assert_allclose(ours.numpy(), reference.floats(logs), rtol=1e-13)


def test_log_alphas_cumprod_is_minus_infinity_for_a_beta_of_1():
    assert log_alphas_cumprod(torch.tensor([0.5, 1.0])).tolist() == [math.log(0.5), -math.inf]


@pytest.mark.parametrize("schedule", reference.SCHEDULES)
def test_rescale_zero_terminal_snr(schedule):
    ours = rescale_zero_terminal_snr(make_betas(schedule))
    expected = reference.floats(reference.zero_terminal_snr(reference.betas(schedule)))
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9)
    assert ours[-1] == 1.0
    assert ours[0] == make_betas(schedule)[0]


@pytest.mark.parametrize("T", [1, 20, 200, 300, 1000, 1700])
def test_resample_interpolates_log_alpha_bar_linearly(T):
    logs = [reference.mpf(0)] + [reference.log(a) for a in reference.alphas_cumprod(reference.betas("linear"))]
    expected = []
    for i in range(T + 1):
        left, rest = divmod(i * 1000, T)
        upper = logs[min(left + 1, 1000)]
        expected.append(logs[left] + (upper - logs[left]) * rest / T)
    betas = [1 - reference.exp(b - a) for a, b in pairwise(expected)]
    ours = resample_betas(make_betas("linear"), T)
    np.testing.assert_allclose(ours.numpy(), reference.floats(betas), rtol=1e-9)


def test_resample_ends_where_the_given_schedule_ends():
    stock = log_alphas_cumprod(make_betas("linear", 200))[-1].exp().item()
    assert stock == pytest.approx(0.13, abs=0.005)  # the value in the docstring of resample_betas
    given = log_alphas_cumprod(make_betas("linear", 1000))
    ours = log_alphas_cumprod(resample_betas(make_betas("linear", 1000), 200))
    np.testing.assert_allclose(ours.numpy(), given[4::5].numpy(), rtol=1e-12)


def test_resample_to_the_same_number_changes_nothing():
    betas = make_betas("squaredcos_cap_v2", 77)
    np.testing.assert_allclose(resample_betas(betas, 77).numpy(), betas.numpy(), rtol=1e-10)
