"""custom_ddpm/training/loop.py: the generator as a notebook would use it, against the formulas written down."""

import itertools

import pytest
import torch
from accelerate import Accelerator
from conftest import make_pipeline

from custom_ddpm.objective import diffusion_loss
from custom_ddpm.training import TrainingStep, loop, training_steps
from custom_ddpm.training.randomness import draw
from custom_ddpm.training.sharding import weights_of


def prepared(lr=1e-2, classes=None):
    pipeline = make_pipeline(classes=classes)
    optimizer = torch.optim.AdamW(pipeline.unet.parameters(), lr=lr, fused=True)
    accelerator = Accelerator()
    model, optimizer = accelerator.prepare(pipeline.unet, optimizer)
    return (
        model,
        pipeline.scheduler,
        optimizer,
        torch.optim.lr_scheduler.ConstantLR(optimizer.optimizer, 1),
        accelerator,
    )


def pictures(labels=None):
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return itertools.repeat((images, labels))


def test_one_step_is_algorithm_1():
    model, scheduler, optimizer, lr_scheduler, accelerator = prepared(lr=0.0)
    images, _ = next(pictures())
    seen = []

    def loss(scheduler, output, x_0, noise, x_t, t):
        seen.append((output.detach(), x_0, noise, x_t, t))
        return diffusion_loss(scheduler, output, x_0, noise, x_t, t)

    steps = training_steps(model, scheduler, optimizer, lr_scheduler, pictures(), accelerator, loss, 3, seed=5)
    step = list(steps)[1]
    assert isinstance(step, TrainingStep) and step.step == 2 and step.skipped == 0
    output, x_0, noise, x_t, t = seen[1]
    draws = draw(5, 1, range(4), (1, 8, 8), torch.device("cpu"))
    assert torch.equal(noise, draws.noise) and torch.equal(t, (draws.timestep * 20).long())
    a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(x_0, images / 127.5 - 1)
    torch.testing.assert_close(x_t, a.sqrt() * x_0 + (1 - a).sqrt() * noise)
    torch.testing.assert_close(step.losses[0], (output - noise).square().mean((1, 2, 3)))
    assert torch.equal(step.timesteps[0], t)


def test_another_loss_and_another_learning_rate_are_one_line_each():
    model, scheduler, optimizer, _, accelerator = prepared()
    rates = torch.optim.lr_scheduler.ExponentialLR(optimizer.optimizer, 0.5)

    def absolute(scheduler, output, x_0, noise, x_t, t):
        return (output - noise).abs().mean((1, 2, 3))

    losses = [
        step.losses[0].mean().item()
        for step in training_steps(model, scheduler, optimizer, rates, pictures(), accelerator, absolute, 12)
    ]
    assert losses[-1] < losses[0] and rates.get_last_lr() == pytest.approx([1e-2 * 0.5**12])


def test_labels_are_dropped_at_the_given_rate():
    model, scheduler, optimizer, lr_scheduler, accelerator = prepared(lr=0.0, classes=3)
    given = []
    model.register_forward_pre_hook(lambda module, a, kw: given.append(kw["class_labels"]), with_kwargs=True)
    labels = torch.tensor([0, 1, 2, 0])
    options = {"label_dropout": 0.25, "null_label": 3}
    for _ in training_steps(
        *(model, scheduler, optimizer, lr_scheduler, pictures(labels), accelerator, diffusion_loss, 200), **options
    ):
        pass
    given = torch.stack(given)
    dropped = (given == 3).float().mean().item()
    assert dropped == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 800) ** 0.5)
    assert torch.equal(given[given != 3], labels.expand_as(given)[given != 3])


def test_a_resumed_loop_draws_what_the_whole_one_draws():
    whole, resumed = [], []
    for first, into in [(0, whole), (4, resumed)]:
        parts = prepared(lr=0.0)
        model, scheduler, optimizer, lr_scheduler, accelerator = parts
        for step in training_steps(
            model, scheduler, optimizer, lr_scheduler, pictures(), accelerator, diffusion_loss, 6, first_step=first
        ):
            into.append((step.step, step.losses[0]))
    assert [number for number, _ in resumed] == [5, 6]
    for (_, one), (_, other) in zip(whole[4:], resumed, strict=True):
        assert torch.equal(one, other)


def test_stratified_timesteps_are_evenly_spaced_in_the_global_batch():
    device, each = torch.device("cpu"), []
    for step in range(200):
        u = draw(3, step, range(8), (1, 2, 2), device, strata=8).timestep.double()
        parts = [draw(3, step, range(i, i + 2), (1, 2, 2), device, strata=8).timestep for i in (0, 2, 4, 6)]
        assert torch.equal(u.float(), torch.cat(parts))
        torch.testing.assert_close(u.sort().values.diff(), torch.full((7,), 1 / 8).double())
        each.append(u)
    # Every position of the batch sees all noise levels: the mean over steps of a uniform number.
    assert (torch.stack(each).mean(0) - 0.5).abs().max() < 4 * (1 / 12 / 200) ** 0.5
    others = draw(3, 0, range(8), (1, 2, 2), device)
    assert torch.equal(others.noise, draw(3, 0, range(8), (1, 2, 2), device, strata=8).noise)


def test_dropout_is_seeded_as_by_torch_without_the_devices_that_are_not_in_use(monkeypatch):
    seed = 2**64 - 3  # the draws are words of 64 bits
    torch.manual_seed(seed)
    expected = torch.rand(5)
    torch.rand(1)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds a device that is not in use"))
    loop._seed(seed, torch.device("cpu"))
    assert torch.equal(torch.rand(5), expected)


def test_the_weights_of_an_optimiser_are_those_of_its_model_in_order():
    model, _, optimizer, _, _ = prepared()
    found, expected = weights_of(optimizer), list(model.parameters())
    assert len(found) == len(expected) > 10 and all(a is b for a, b in zip(found, expected, strict=True))
