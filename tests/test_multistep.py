"""Steps of second and third order (S3): their weights by quadrature, their order in the exact world, their history."""

import copy
from functools import lru_cache
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import reference
import torch
from mpmath import exp, inf, log, mpf, quad, workdps
from test_exact_world import COVARIANCE, MEAN, best_output, noise_levels
from test_scheduler_step import Trace

from custom_ddpm.scheduler import CustomDDPMScheduler

LADDER = [999, 800, 620, 430, 250, 100, 20]


def make(order, timesteps=LADDER, **kwargs):
    kwargs = {"clip_sample": False, "prediction_type": "sample", **kwargs}
    scheduler = CustomDDPMScheduler(solver_order=order, **kwargs)
    scheduler.set_timesteps(timesteps=timesteps)
    return scheduler


@lru_cache
def log_snr(t, schedule="linear"):
    """λ = log(√ᾱ/√(1−ᾱ))."""
    if t == -1:
        return inf
    a = reference.alphas_cumprod(reference.betas(schedule))[t]
    return log(a / (1 - a)) / 2


def random(n, dtype=torch.float64, shape=(2, 3), seed=0):
    return list(torch.randn(n, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)))


def run(scheduler, predictions, x, **kwargs):
    """x_t before every step, and the last."""
    xs = [x]
    for t, x_0 in zip(scheduler.timesteps.tolist(), predictions, strict=True):
        xs.append(scheduler.step(x_0, t, xs[-1], **kwargs).prev_sample)
    return xs


# ---- the weights ----


@pytest.mark.parametrize(("order", "eta"), [(2, 0), (2, 0.5), (3, 0), (3, 1)])
def test_a_step_integrates_the_polynomial_through_the_last_predictions(order, eta):
    """x_s against numerical integration of the Lagrange polynomial."""
    products = reference.alphas_cumprod(reference.betas("linear"))
    predictions, (x,) = random(len(LADDER)), random(1, seed=1)
    xs = run(make(order, variance_type="zero"), predictions, x, eta=float(eta))
    for i, (t, s) in enumerate(pairwise([*LADDER, -1])):
        of_original, of_sample, _ = reference.ddim(products, t, s, eta)
        points = LADDER[max(0, i + 1 - min(order, len(LADDER) - i)) : i + 1][::-1]  # the last steps have lower order
        k, start, end = 1 + mpf(eta) ** 2, log_snr(t), log_snr(s)
        mean = predictions[i].numpy().astype(object) * 0
        for j, point in enumerate(points):
            others = [log_snr(p) for p in points if p != point]

            def weighted(u, point=point, others=others, k=k, end=end):
                value = exp(k * (u - end))
                for other in others:
                    value *= (u - other) / (log_snr(point) - other)
                return value

            with workdps(18):
                part = quad(weighted, [start, end])
            part = part * k / (1 - exp(k * (start - end))) if others else mpf(1)
            mean = mean + part * predictions[i - j].numpy().astype(object)
        expected = of_original * mean + of_sample * xs[i].numpy().astype(object)
        np.testing.assert_allclose(xs[i + 1].numpy(), expected.astype(float), rtol=1e-10, atol=1e-12, err_msg=str(t))


@pytest.mark.parametrize("order", [2, 3])
def test_the_weights_add_up_to_that_of_the_first_order(order):
    x, x_0 = random(2)
    for eta in (0.0, 1.0):
        for a, b in zip(
            run(make(order, variance_type="zero"), [x_0] * len(LADDER), x, eta=eta),
            run(make(1, variance_type="zero"), [x_0] * len(LADDER), x, eta=eta),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


# ---- the order ----


def error(order, n, eta, **kwargs):
    """Largest error of the covariance at t = 103 after n equal steps from t = 999, started from q(x_999)."""
    a, b = noise_levels("linear")
    timesteps = [999 - i * (896 // n) for i in range(n + 1)]
    scheduler = make(order, timesteps, prediction_type="epsilon", **kwargs)
    # x_s is affine in the start and in each noise: the lines of the batch are 0, the unit vectors, each noise alone.
    noises = 3 * n if eta else 0
    x = torch.cat([torch.zeros(1, 3), torch.eye(3), torch.zeros(noises, 3)]).double()
    for i, t in enumerate(timesteps[:-1]):
        z = torch.zeros_like(x)
        if eta:
            z[4 + 3 * i : 7 + 3 * i] = torch.eye(3)
        output = torch.tensor(best_output(x.numpy(), a[t], b[t], "epsilon"))
        x = scheduler.step(output, t, x, variance_noise=z, eta=eta).prev_sample
    offset, A, N = x.numpy()[0], (x.numpy()[1:4] - x.numpy()[0]), x.numpy()[4:] - x.numpy()[0]
    np.testing.assert_allclose(offset + (np.sqrt(a[999]) * MEAN) @ A, np.sqrt(a[103]) * MEAN, atol=1e-12)
    covariance = A.T @ (a[999] * COVARIANCE + b[999] * np.eye(3)) @ A + N.T @ N
    return np.abs(covariance - (a[103] * COVARIANCE + b[103] * np.eye(3))).max()


@pytest.mark.parametrize(
    ("order", "eta", "slope"),
    # Of a stochastic step the noise within it is not known to x̂_0, which leaves an error of second order.
    [(1, 0.0, 1), (2, 0.0, 2), (3, 0.0, 3), (1, 1.0, 1), (2, 1.0, 2), (3, 1.0, 2.5), (2, 0.5, 2)],
)
def test_the_error_falls_with_the_order(order, eta, slope):
    errors = [error(order, n, eta) for n in (112, 224)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(slope, abs=0.12)


def test_a_higher_order_is_better_at_few_steps():
    assert error(2, 14, 0.0) < error(1, 14, 0.0) / 10
    assert error(3, 28, 1.0) < error(1, 28, 1.0) / 5


# ---- the corrector ----


def lagrange_mean(t, s, points, values, eta):
    """The mean over a step of the polynomial through predictions, by numerical integration."""
    k, start, end, total = 1 + mpf(eta) ** 2, log_snr(t), log_snr(s), 0
    for point, value in zip(points, values, strict=True):
        others = [log_snr(p) for p in points if p != point]

        def weighted(u, point=point, others=others):
            weight = exp(k * (u - end))
            for other in others:
                weight *= (u - other) / (log_snr(point) - other)
            return weight

        with workdps(18):
            part = quad(weighted, [start, end])
        total = total + part * k / (1 - exp(k * (start - end))) * value.numpy().astype(object)
    return total


@pytest.mark.parametrize("eta", [0, 1])
def test_a_corrected_step_goes_on_from_the_polynomial_with_its_own_prediction(eta):
    """With the corrector x_t is what the last step would have given, had it known x̂_0 at t."""
    ladder = [999, 800, 620, 430, 100, 20]
    products = reference.alphas_cumprod(reference.betas("linear"))
    predictions, (x,) = random(len(ladder)), random(1, seed=1)
    scheduler = make(2, ladder, corrector=True, variance_type="zero")
    xs = run(scheduler, predictions, x, eta=float(eta))
    corrected = x.numpy().astype(object)
    for i, (t, s) in enumerate(pairwise(ladder[:-1])):
        of_original, of_sample, _ = reference.ddim(products, t, s, eta)
        before = slice(max(0, i - 1), i + 1)
        mean = lagrange_mean(t, s, ladder[before], predictions[before], eta)
        expected = of_original * mean + of_sample * corrected
        np.testing.assert_allclose(xs[i + 1].numpy(), expected.astype(float), rtol=1e-9, atol=1e-11, err_msg=str(t))
        points = slice(max(0, i - 1), i + 2)
        corrected = of_original * lagrange_mean(t, s, ladder[points], predictions[points], eta) + of_sample * corrected
    assert torch.equal(xs[-1], predictions[-1])


def test_the_corrector_gains_an_order():
    errors = [error(2, n, 0.0, corrector=True) for n in (112, 224)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(3, abs=0.15)


def test_nothing_is_corrected_where_the_schedule_jumps():
    predictions, (x,) = random(3), random(1, seed=1)
    for jump in ([620, 250], [430, 620], [430, 430]):
        scheduler = make(2, corrector=True)
        last = [scheduler.step(x_0, t, x, eta=0.0).prev_sample for t, x_0 in zip(jump, predictions, strict=False)][-1]
        assert torch.equal(last, first_order(jump[-1], predictions[1], x))


def test_the_corrector_is_for_second_order_only():
    assert "corrector" not in make(2).config and make(2, corrector=True).config.corrector
    for order in (1, 3):
        with pytest.raises(ValueError, match=f"corrector is True, but solver_order is {order}; it must be 2"):
            make(order, corrector=True)


def test_a_corrected_run_compiles_as_full_graphs():
    torch.compiler.reset()
    scheduler, plain = make(2, corrector=True), make(2, corrector=True)
    predictions, (x,) = random(len(LADDER), torch.float32), random(1, torch.float32, seed=1)
    step = torch.compile(scheduler.step, fullgraph=True, backend="aot_eager")
    for i, t in enumerate(scheduler.timesteps):
        compiled = step(predictions[i], t, x, eta=0.0, return_dict=False)
        torch.testing.assert_close(compiled, plain.step(predictions[i], t, x, eta=0.0, return_dict=False))


# ---- the history ----


def first_order(t, x_0, x, eta=0.0):
    return make(1).step(x_0, t, x, eta=eta).prev_sample


@pytest.mark.parametrize("order", [2, 3])
def test_the_history_ends_where_the_schedule_jumps(order):
    predictions, (x,) = random(3), random(1, seed=1)
    scheduler = make(order)

    def steps(*timesteps):
        return [scheduler.step(x_0, t, x, eta=0.0).prev_sample for t, x_0 in zip(timesteps, predictions, strict=False)]

    assert not torch.equal(steps(620, 430)[1], first_order(430, predictions[1], x))
    for jump in ([620, 250], [430, 620], [430, 430], [700, 620], [620, 610], [999, 999, 800]):
        last = steps(*jump)[-1]
        is_first = jump != [999, 999, 800]  # goes on from the second 999
        assert torch.equal(last, first_order(jump[-1], predictions[len(jump) - 1], x)) == is_first, jump
    steps(999, 800)
    scheduler.set_timesteps(timesteps=LADDER)
    assert torch.equal(steps(620)[0], first_order(620, predictions[0], x))


@pytest.mark.parametrize("kwargs", [{"order": 2}, {"order": 3}, {"order": 2, "corrector": True}])
def test_a_second_run_is_the_first(kwargs):
    """Also without `set_timesteps`, and whatever the last timestep is."""
    for last in (2, 1, 0):
        predictions, (x,) = random(4), random(1, seed=1)
        scheduler = make(timesteps=[999, 800, 620, last], **kwargs)
        first = run(scheduler, predictions, x, eta=0.0)
        assert all(map(torch.equal, run(scheduler, predictions, x, eta=0.0), first))


def test_third_order_begins_with_the_second_wherever_it_starts():
    predictions, (x,) = random(3), random(1, seed=1)
    second, third = make(2), make(3)
    for i, t in enumerate((620, 430, 250)):
        a, b = (each.step(predictions[i], t, x, eta=0.0).prev_sample for each in (second, third))
        assert torch.equal(a, b) == (i < 2)


@pytest.mark.parametrize("order", [2, 3])
def test_a_sample_of_its_own_t_has_its_own_history(order):
    predictions, (x,) = random(4, shape=(3, 2)), random(1, shape=(3, 2), seed=1)
    paths = [[999, 800, 620, 430], [800, 620, 430, 250], [800, 999, 800, 620]]
    together, alone = make(order), [make(order) for _ in paths]
    for i in range(4):
        t = torch.tensor([path[i] for path in paths])
        all_three = together.step(predictions[i], t, x, eta=0.0).prev_sample
        for j, scheduler in enumerate(alone):
            one = scheduler.step(predictions[i][j : j + 1], int(t[j]), x[j : j + 1], eta=0.0).prev_sample
            torch.testing.assert_close(all_three[j : j + 1], one, rtol=1e-14, atol=1e-14)


def test_another_number_of_samples_has_no_history():
    scheduler, (x_0, x) = make(2), random(2)
    scheduler.step(x_0, 999, x)
    one = scheduler.step(x_0[:1], 800, x[:1], eta=0.0).prev_sample
    assert torch.equal(one, first_order(800, x_0[:1], x[:1]))


def test_batches_in_turn_with_a_copy_each_are_those_one_after_the_other():
    """As the argument `solver_order` says; with one scheduler they would mix."""
    scheduler, predictions, xs = make(2), random(2 * len(LADDER)), random(2, seed=1)
    batches = [predictions[: len(LADDER)], predictions[len(LADDER) :]]
    alone = [run(make(2), batch, x, eta=0.0)[-2] for batch, x in zip(batches, xs, strict=True)]
    for schedulers, are_equal in (([scheduler, copy.deepcopy(scheduler)], True), ([make(2)] * 2, False)):
        turns = list(xs)
        for i, t in enumerate(LADDER[:-1]):
            for j, each in enumerate(schedulers):
                turns[j] = each.step(batches[j][i], t, turns[j], eta=0.0).prev_sample
        assert [torch.equal(a, b) for a, b in zip(turns, alone, strict=True)] == [are_equal] * 2


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("order", [2, 3])
def test_the_last_step_returns_the_prediction_clipped(order, eta):
    predictions, (x,) = random(len(LADDER)), random(1, seed=1)
    scheduler = make(order, clip_sample=True, clip_sample_range=0.5)
    xs = run(scheduler, predictions, x, eta=eta)
    assert torch.equal(xs[-1], predictions[-1].clamp(-0.5, 0.5))
    bounded = run(make(order, clip_sample=False), [each.clamp(-0.5, 0.5) for each in predictions], x, eta=0.0)
    clipped = run(make(order, clip_sample=True, clip_sample_range=0.5), predictions, x, eta=0.0)
    assert all(map(torch.equal, bounded, clipped))  # what is clipped is what the next steps go on from


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range", "analytic"])
def test_the_noise_is_that_of_the_first_order(order, variance_type):
    known = {"variance_type": variance_type, "original_sample_variances": [0.2] * 1000}
    x_0, x, z = random(3)
    output = torch.cat([x_0, x_0], dim=1) if variance_type == "learned_range" else x_0
    noises = []
    for each in (make(1, **known), make(order, **known)):
        for t in (999, 800):
            x_s = [each.step(output, t, x, variance_noise=n).prev_sample for n in (z, 0 * z)]
            if t == 999:
                noises.append(x_s[0] - x_s[1])
    torch.testing.assert_close(*noises)


def test_zero_terminal_snr_is_finite():
    for order in (2, 3):
        scheduler = make(order, rescale_betas_zero_snr=True, prediction_type="v_prediction")
        predictions, (x,) = random(len(LADDER)), random(1, seed=1)
        assert all(each.isfinite().all() for each in run(scheduler, predictions, x, eta=0.0))


# ---- what it asks of the device ----


@pytest.mark.parametrize("order", [2, 3])
def test_no_step_waits_for_the_device(order):
    scheduler, x = make(order), torch.zeros(2, 3)
    scheduler.set_timesteps(10)
    for timesteps in (scheduler.timesteps, scheduler.timesteps[:, None].expand(-1, 2)):
        scheduler.step(x, timesteps[0], x)
        with Trace() as trace:
            for t in timesteps[:4]:
                scheduler.step(x, t, x)
        assert not {"item", "_local_scalar_dense", "_to_copy", "copy_", "nonzero"} & set(trace.names)
    meta = torch.empty(2, 3, device="meta")
    scheduler.set_timesteps(10, device="meta")
    for t in (900, 800, torch.empty((), dtype=torch.int64, device="meta")):
        assert scheduler.step(meta, t, meta).prev_sample.device.type == "meta"


@pytest.mark.parametrize("order", [2, 3])
def test_a_run_compiles_as_full_graphs(order):
    torch.compiler.reset()
    scheduler, plain = make(order), make(order)
    predictions, (x,) = random(len(LADDER), torch.float32), random(1, torch.float32, seed=1)
    step = torch.compile(scheduler.step, fullgraph=True, backend="aot_eager")
    for i, t in enumerate(scheduler.timesteps):
        compiled = step(predictions[i], t, x, eta=0.0, return_dict=False)
        torch.testing.assert_close(compiled, plain.step(predictions[i], t, x, eta=0.0, return_dict=False))


def test_tables_made_in_inference_mode_serve_a_backward_pass():
    x = random(1)[0]
    with torch.inference_mode():
        scheduler = make(2, [999, 500, 20], prediction_type="v_prediction")
        scheduler.step(x, 999, x, eta=0.0)
        scheduler.add_noise(x, x, 20)
    sample = x.clone().requires_grad_()
    result = scheduler.step(0.1 * sample, 999, sample, eta=0.0).prev_sample
    result = scheduler.step(0.1 * result, 500, result, eta=0.0).prev_sample
    scheduler.add_noise(result, x, 20).sum().backward()
    assert sample.grad.isfinite().all() and (sample.grad != 0).all()


def test_float32_is_the_float64_run_rounded():
    predictions, (x,) = random(len(LADDER)), random(1, seed=1)
    exact = run(make(3), predictions, x, eta=0.0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.2)):
        ours = run(make(3), [each.to(dtype) for each in predictions], x.to(dtype), eta=0.0)
        assert ours[-1].dtype == dtype
        torch.testing.assert_close(ours[-2].double(), exact[-2], rtol=tolerance, atol=tolerance)


# ---- the configuration ----


def test_the_order_is_in_the_configuration_when_it_is_not_the_first(tmp_path):
    assert "solver_order" not in CustomDDPMScheduler().config
    scheduler = make(3)
    scheduler.save_pretrained(tmp_path)
    assert CustomDDPMScheduler.from_pretrained(tmp_path).config.solver_order == 3
    assert diffusers.DPMSolverMultistepScheduler.from_pretrained(tmp_path).config.solver_order == 3
    assert diffusers.DPMSolverMultistepScheduler.from_config(CustomDDPMScheduler().config).config.solver_order == 2
    with pytest.raises(ValueError, match="solver_order is 4; it must be 1, 2 or 3"):
        CustomDDPMScheduler(solver_order=4)


def test_the_order_of_a_multistep_solver_is_not_taken_over(tmp_path):
    theirs = diffusers.DPMSolverMultistepScheduler()
    theirs.save_pretrained(tmp_path)
    for config in (theirs.config, diffusers.DPMSolverMultistepScheduler.load_config(tmp_path)):
        assert "solver_order" not in CustomDDPMScheduler.from_config(config).config
    assert "solver_order" not in CustomDDPMScheduler.from_pretrained(tmp_path).config
    assert CustomDDPMScheduler.from_config(theirs.config, solver_order=2).config.solver_order == 2
