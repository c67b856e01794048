"""What `step` and `add_noise` multiply with, from their tables, and what they ask of the device."""

import numpy as np
import pytest
import reference
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from custom_ddpm.scheduler import CustomDDPMScheduler

EPS32 = float(torch.finfo(torch.float32).eps)
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range", "zero", "analytic")


def make(**kwargs):
    return CustomDDPMScheduler(**{"clip_sample": False, "original_sample_variances": [0.3] * 1000, **kwargs})


class Trace(TorchDispatchMode):
    """The operators that are called, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name().removeprefix("aten::").split(".")[0])
        return function(*args, **(kwargs or {}))


VIEWS = {"view", "narrow", "slice", "unbind", "detach", "alias", "split", "_unsafe_view", "unsqueeze", "select"}


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("variance_type", VARIANCES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_step_never_waits_for_the_device(prediction_type, variance_type, eta):
    scheduler = make(variance_type=variance_type, prediction_type=prediction_type, clip_sample=True)
    scheduler.set_timesteps(10)
    x = torch.zeros(2, 3, 4, 4)
    output = torch.zeros(2, 6 if variance_type.startswith("learned") else 3, 4, 4)
    scheduler.step(output, 500, x, eta=eta)  # the first call makes the tables
    scheduler.add_noise(x, x, 500)
    for t in (500, scheduler.timesteps[3], scheduler.timesteps[[1, 4]]):
        with Trace() as trace:
            scheduler.step(output, t, x, eta=eta)
            scheduler.add_noise(x, x, t) if eta == 1.0 else None
        assert not {"item", "_local_scalar_dense", "_to_copy", "to", "copy_", "nonzero", "full"} & set(trace.names)


@pytest.mark.parametrize("t", [500, torch.tensor(500), torch.tensor([5, 9])])
def test_a_step_allocates_what_it_returns(t):
    scheduler, x = make(clip_sample=True), torch.zeros(2, 3, 4, 4)
    scheduler.step(x, 500, x)
    with Trace() as trace:
        prev_sample, pred_original_sample = scheduler.step(x, t, x, return_dict=False)
    calls = [name for name in trace.names if name not in (*VIEWS, "promote_types")]
    coefficients = [] if isinstance(t, int) else ["index_select"]
    # x̂_0 and the noise are the two new tensors; everything else is done in their place.
    assert calls == [*coefficients, "mul", "addcmul_", "clamp_", "randn", "mul_", "addcmul_", "addcmul_"], calls
    assert prev_sample.shape == pred_original_sample.shape == x.shape


@pytest.mark.parametrize("variance_type", VARIANCES)
def test_a_step_changes_none_of_its_inputs(variance_type):
    for prediction_type in ("epsilon", "sample"):
        scheduler = make(variance_type=variance_type, prediction_type=prediction_type, clip_sample=True)
        channels = 6 if variance_type.startswith("learned") else 3
        generator = torch.Generator().manual_seed(0)
        inputs = [3 * torch.randn(2, n, 4, 4, generator=generator) for n in (channels, 3, 3)]
        before = [each.clone() for each in inputs]
        for eta in (0.0, 1.0):
            scheduler.step(inputs[0], 500, inputs[1], variance_noise=inputs[2], eta=eta)
        assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("n", [1000, 13])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2", "exp"])
def test_the_coefficients_of_a_step_are_rounded_once(schedule, n):
    """x_s = a x̂_0 + b x_t + σ z: each of a, b, σ is within half a unit in the last place of float32 (R4, R7)."""
    scheduler = make(beta_schedule=schedule, prediction_type="sample", timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    t = scheduler.timesteps
    products = reference.alphas_cumprod(reference.betas(schedule))
    exact = [reference.posterior(products, a, b) for a, b in zip(t.tolist(), [*t.tolist()[1:], -1], strict=True)]
    ones, zeros = torch.ones(n, 1), torch.zeros(n, 1)
    read = [
        scheduler.step(output, t, sample, variance_noise=z).prev_sample.double().flatten().numpy()
        for output, sample, z in ((ones, zeros, zeros), (zeros, ones, zeros), (zeros, zeros, ones))
    ]
    expected = [reference.floats(each) for each in zip(*[(a, b, reference.sqrt(v)) for a, b, v in exact], strict=True)]
    for name, ours, theirs in zip("abσ", read, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=EPS32 / 2, atol=1e-40, err_msg=name)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("variance_type", VARIANCES)
def test_a_step_is_its_mean_and_variance(variance_type, eta):
    """From any t, scheduled or not, to the next scheduled timestep, as `predict_mean_log_variance` has them."""
    scheduler = make(variance_type=variance_type)
    scheduler.set_timesteps(timesteps=[999, 600, 40, 3])
    t = torch.tensor([999, 700, 600, 41, 40, 39, 4, 3, 2, 0])
    s = torch.tensor([600, 600, 40, 40, 3, 3, 3, -1, -1, -1])
    generator = torch.Generator().manual_seed(0)
    output, x, z = torch.randn(3, len(t), 2, 5, dtype=torch.float64, generator=generator)
    if variance_type.startswith("learned"):
        output = torch.cat([output, torch.rand(len(t), 2, 5, generator=generator, dtype=torch.float64)], dim=1)
    mean, log_variance, x_0 = scheduler.predict_mean_log_variance(output, t, x, s, eta=eta)
    noise = (log_variance / 2).exp() * (s >= 0)[:, None, None]
    if eta == 0 and variance_type != "analytic":
        assert noise.max() <= 1e-10  # the least that a learned variance can be; `step` leaves it out
        noise *= 0
    ours = scheduler.step(output, t, x, variance_noise=z, eta=eta)
    torch.testing.assert_close(ours.prev_sample, mean + noise * z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.pred_original_sample, x_0, rtol=1e-12, atol=1e-12)


def test_new_timesteps_are_new_coefficients():
    scheduler, x = make(), torch.ones(1, 2)
    for eta in (0.0, 1.0):
        steps = []
        for n in (10, 50, 10):
            scheduler.set_timesteps(n)
            steps.append(scheduler.step(x, 900, x, variance_noise=x, eta=eta).prev_sample)
        assert torch.equal(steps[0], steps[2]) and not torch.equal(steps[0], steps[1])


def test_a_step_is_differentiable():
    scheduler = make(clip_sample=True)
    x, output = (torch.full((1, 3), value, dtype=torch.float64, requires_grad=True) for value in (0.3, 0.2))
    z = torch.ones(1, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, o: scheduler.step(o, 300, x, variance_noise=z).prev_sample, (x, output))


@pytest.mark.parametrize("t", [-1, 1000])
def test_a_step_from_a_timestep_out_of_range(t):
    x = torch.zeros(1, 2)
    for timestep in (t, torch.tensor(t)):
        with pytest.raises((IndexError, RuntimeError), match=r"out of range|out of DATA bounds"):
            make().step(x, timestep, x)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 5)])
def test_a_step_compiles_before_its_tables_are_made(shape):
    torch.compiler.reset()
    scheduler, plain = make(), make()
    x, z = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    step = torch.compile(scheduler.step, fullgraph=True, backend="aot_eager")
    for eta in (0.5, 0.5, 1.0):
        compiled = step(x, torch.tensor(600), x, variance_noise=z, eta=eta, return_dict=False)
        eager = plain.step(x, 600, x, variance_noise=z, eta=eta, return_dict=False)
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_a_setting_that_is_changed_after_set_timesteps_is_used():
    x, output = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for name, value in (("variance_type", "fixed_large"), ("prediction_type", "v_prediction")):
        changed, given = CustomDDPMScheduler(), CustomDDPMScheduler(**{name: value})
        for scheduler in (changed, given):
            scheduler.set_timesteps(10)
        changed.register_to_config(**{name: value})
        found, expected = (
            scheduler.step(output, 500, x, generator=torch.Generator().manual_seed(1)).prev_sample
            for scheduler in (changed, given)
        )
        assert torch.equal(found, expected), name
