"""Bits per dimension for Gaussian data and the exact model, against the bound by hand and the entropy."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from runs import needs_forkserver, on_processes

from custom_ddpm.data.pixels import denormalise, normalise
from custom_ddpm.evaluation.bits_per_dim import bits_per_dim, draw_timesteps, variance_schedulers
from custom_ddpm.sampling import process_state
from custom_ddpm.scheduler import CustomDDPMScheduler

V, T, N = 0.04, 50, 4000
RANGE = {"beta_start": 0.01, "beta_end": 0.3}
PRODUCTS = reference.alphas_cumprod(reference.betas("linear", T, *RANGE.values()))
A, B = reference.floats(PRODUCTS), reference.floats(1 - p for p in PRODUCTS)
# Of the data with the rounding to 8 bits, which adds the variance of a uniform number of width 2/255.
ROUNDED = V + (2 / 255) ** 2 / 12
OF_X_0 = ROUNDED * B / (A * ROUNDED + B)


@pytest.fixture(scope="module", autouse=True)
def one_process():
    process_state()


def make(variance_type="fixed_small", **options):
    return CustomDDPMScheduler(T, prediction_type="sample", variance_type=variance_type, **RANGE, **options)


def pictures(seed=0):
    x = torch.randn(N, 1, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * math.sqrt(V)
    return normalise(denormalise(x)).double()


def exact_model(x_t, timesteps, labels):
    a, b = (torch.tensor(level)[timesteps].view(-1, 1, 1, 1) for level in (A, B))
    return SimpleNamespace(sample=a.sqrt() * ROUNDED / (a * ROUNDED + b) * x_t)


def batches(x_0, size=500, start=0, step=1):
    for first in range(start * size, len(x_0), size * step):
        yield range(first, min(first + size, len(x_0))), x_0[first : first + size], None


def by_hand(kind):
    """E L_{t−1} for every t > 0, in bits: R4, with E|x_0 − x̂_0|² known."""
    terms = []
    for t in range(1, T):
        of_original, _, small = reference.posterior(PRODUCTS, t, t - 1)
        gap = of_original**2 * reference.mpf(OF_X_0[t])
        variance = {"fixed_small": small, "fixed_large": 1 - PRODUCTS[t] / PRODUCTS[t - 1], "analytic": small + gap}
        s = variance[kind]
        terms.append(float((small / s - 1 - reference.log(small / s) + gap / s) / 2 / reference.log(2)))
    return np.array(terms)


def test_every_part_is_the_bound_by_hand_and_the_total_is_above_the_entropy():
    x_0 = pictures()
    schedulers = variance_schedulers(make(original_sample_variances=OF_X_0.tolist()))
    assert list(schedulers) == ["fixed_small", "fixed_large", "analytic"]
    found = bits_per_dim(exact_model, schedulers, batches(x_0), num_timesteps=T, batch_size=2048)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * V) - math.log2(2 / 255)
    prior = 0.5 * (A[-1] * x_0.square().mean().item() - A[-1] - math.log1p(-A[-1])) / math.log(2)
    for name, result in found.items():
        expected, errors = by_hand(name), result.timestep_errors
        assert (np.abs(result.timesteps[1:] - expected) < 4.5 * errors[1:]).all(), name
        assert (errors[1:] < 0.05 * expected).all() or name != "fixed_small"  # the test could fail
        total, error = result.parts["total"]
        assert result.parts["L_T"].value == pytest.approx(prior, rel=1e-5)
        assert result.parts["L_t-1"].value == pytest.approx(expected.sum(), abs=4 * result.parts["L_t-1"].error)
        assert result.parts["L_0"].value == pytest.approx(result.timesteps[0], rel=1e-9)
        assert total == pytest.approx(sum(result.parts[part].value for part in ("L_T", "L_t-1", "L_0")))
        assert total > entropy - 3 * error and error < 0.05 and result.num_images == N
    # With the best variance the bound is tight for Gaussian data; the fixed ones are worse.
    assert found["analytic"].parts["total"].value == pytest.approx(entropy, abs=0.05)
    assert found["fixed_small"].parts["total"].value > found["analytic"].parts["total"].value


def test_some_timesteps_estimate_the_sum_over_all():
    x_0 = pictures()
    schedulers = variance_schedulers(make())
    few = bits_per_dim(exact_model, schedulers, batches(x_0), num_timesteps=5, batch_size=2048)["fixed_small"]
    assert few.parts["L_t-1"].value == pytest.approx(by_hand("fixed_small").sum(), abs=4 * few.parts["L_t-1"].error)
    assert few.parts["L_t-1"].error < 0.1 * few.parts["L_t-1"].value


def test_a_learned_variance_is_used_and_dropped_where_another_is_asked_for():
    x_0 = pictures()[:500]
    best = [0.0] * T
    for t in range(1, T):  # log σ² = w log β + (1−w) log β̃, w = (output + 1)/2
        of_original, _, small = (float(each) for each in reference.posterior(PRODUCTS, t, t - 1))
        large = float(1 - PRODUCTS[t] / PRODUCTS[t - 1])
        best[t] = 2 * math.log((small + of_original**2 * OF_X_0[t]) / small) / math.log(large / small) - 1

    def learned(x_t, timesteps, labels):
        second = torch.tensor(best, dtype=torch.float64)[timesteps].view(-1, 1, 1, 1).expand_as(x_t)
        return SimpleNamespace(sample=torch.cat([exact_model(x_t, timesteps, labels).sample, second], dim=1))

    own = make("learned_range", original_sample_variances=OF_X_0.tolist())
    found = bits_per_dim(learned, variance_schedulers(own), batches(x_0), num_timesteps=T, batch_size=512)
    assert list(found) == ["learned_range", "fixed_small", "fixed_large", "analytic"]
    np.testing.assert_allclose(found["learned_range"].timesteps[1:], found["analytic"].timesteps[1:], rtol=1e-4)
    plain = bits_per_dim(exact_model, variance_schedulers(make()), batches(x_0), num_timesteps=T, batch_size=512)
    np.testing.assert_allclose(found["fixed_small"].timesteps, plain["fixed_small"].timesteps, rtol=1e-6)


def test_the_draws_do_not_depend_on_the_batch():
    x_0, schedulers = pictures()[:60], {"fixed_small": make()}
    whole = bits_per_dim(exact_model, schedulers, batches(x_0), num_timesteps=10, batch_size=1000)["fixed_small"]
    parts = bits_per_dim(exact_model, schedulers, batches(x_0, 7), num_timesteps=10, batch_size=3)["fixed_small"]
    assert parts.parts["total"].value == pytest.approx(whole.parts["total"].value, rel=1e-9)
    np.testing.assert_allclose(parts.timesteps, whole.timesteps, rtol=1e-9)


def on_each(folder):
    process_state()
    rank = process_state().process_index
    share = list(batches(pictures()[:60], 7, start=rank, step=2))
    result = bits_per_dim(exact_model, {"fixed_small": make()}, share, num_timesteps=10)["fixed_small"]
    torch.save([result.num_images, *result.parts["total"], result.timesteps], folder / f"{rank}.pt")


@needs_forkserver
def test_two_processes_give_the_result_of_one(tmp_path):
    on_processes(2, on_each, tmp_path)
    one = bits_per_dim(exact_model, {"fixed_small": make()}, batches(pictures()[:60]), num_timesteps=10)["fixed_small"]
    for rank in range(2):
        count, value, error, timesteps = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert (count, value, error) == pytest.approx((60, *one.parts["total"]), rel=1e-9)
        np.testing.assert_allclose(timesteps, one.timesteps, rtol=1e-9)


@pytest.mark.parametrize(("total", "drawn"), [(1000, 100), (1000, 1000), (20, 7), (2, 2)])
def test_the_timesteps_cover_all_with_their_weights(total, drawn):
    low, weights = draw_timesteps(total, drawn, torch.zeros(drawn - 1))
    high, _ = draw_timesteps(total, drawn, torch.full((drawn - 1,), 1 - 2**-24))
    assert weights.sum() == total and low[0] == high[0] == 0
    # Each part begins where the last one ends.
    assert low[1] == 1 and high[-1] == total - 1 and torch.equal(low[2:], high[1:-1] + 1)
    assert torch.equal((high - low + 1).double(), weights)


def test_no_pictures_raise():
    with pytest.raises(ValueError, match="no pictures"):
        bits_per_dim(exact_model, {"fixed_small": make()}, [])
