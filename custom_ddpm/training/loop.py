"""The training loop: Algorithm 1 (T2) as a generator.

Checkpoints, sample grids, metrics and averages are not here: the caller of `training_steps` does these.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from ..data.pixels import normalise
from ..scheduler import CustomDDPMScheduler
from .augmentation import augmented
from .randomness import Draws, UniformSampler, draw
from .sharding import weights_of, whole

Loss = Callable[..., torch.Tensor]


@dataclass
class TrainingStep:
    """The result of one optimiser step. Its tensors are on the device; no synchronisation has taken place."""

    step: int  # optimiser steps done, this one included
    timesteps: list[torch.Tensor]  # t of this process, int64 (B,), one tensor per batch of the step
    losses: list[torch.Tensor]  # loss of each sample, (B,), one tensor per batch
    grad_norm: torch.Tensor  # norm of the gradients before clipping, ()
    skipped: torch.Tensor  # 1.0 if the gradients were not finite and the weights stayed as they were, else 0.0; ()


def training_steps(
    model: Any,
    scheduler: CustomDDPMScheduler,
    optimizer: Any,
    lr_scheduler: Any,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor | None]],
    accelerator: Accelerator,
    loss: Loss,
    max_train_steps: int,
    *,
    first_step: int = 0,
    seed: int = 0,
    timestep_sampler: Any = None,
    stratified: bool = False,
    random_flip: bool = False,
    augment_share: float = 0.0,
    label_dropout: float = 0.0,
    null_label: int = 0,
    max_grad_norm: float = 1.0,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Iterator[TrainingStep]:
    """Train a noise predictor, and yield after every optimiser step.

    Args:
        model, optimizer: prepared by `accelerator`; `model(x_t, t, class_labels=...).sample` is the prediction.
        scheduler, lr_scheduler: of the noise (forward process); of the learning rate, stepped after every step.
        batches: images uint8 (B, C, H, W) and labels int64 (B,) or None; an infinite iterator.
        accelerator: its `gradient_accumulation_steps` batches make one step.
        loss: (scheduler, model_output, x_0, ε, x_t, t) -> losses (B,), such as `objective.diffusion_loss`.
        max_train_steps, first_step: optimiser steps of the whole run, and those done before.
        seed, timestep_sampler, stratified: seed of the random draws (`randomness.draw`), what draws t (None: uniform),
            and whether the timesteps of a global batch are evenly spaced rather than independent.
        random_flip: whether pictures are flipped left-right at random.
        augment_share: share of the run, from its first step, in which pictures are changed by `augmentation.augmented`.
        label_dropout, null_label: probability of replacing a label by `null_label`, for classifier-free guidance.
        max_grad_norm, memory_format: norm that gradients are clipped to; memory layout of x_t.
    """
    timestep_sampler = timestep_sampler or UniformSampler(len(scheduler))
    for step in range(first_step, max_train_steps):
        timesteps, losses, augment = [], [], step < augment_share * max_train_steps
        for batch in range(accelerator.gradient_accumulation_steps):
            images, labels = next(batches)
            draws = _draws(accelerator, batch, images, seed, step, stratified)
            x_0 = _changed(normalise(images.to(accelerator.device, non_blocking=True)), draws, random_flip, augment)
            t, weights = timestep_sampler.sample(draws.timestep)
            x_t = scheduler.add_noise(x_0, draws.noise, t).to(memory_format=memory_format)
            condition = _condition(labels, draws, label_dropout, null_label)
            with accelerator.accumulate(model):
                _seed(draws.dropout_seed, accelerator.device)  # dropout draws from the global generator
                output = model(x_t, t, **condition).sample
                sample_losses = loss(scheduler, output, x_0, draws.noise, x_t, t)
                accelerator.backward((sample_losses * weights).mean())
                if accelerator.sync_gradients:  # the last batch of the step
                    grad_norm, skipped = _clip_gradients(accelerator, optimizer, max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            timesteps.append(t)
            losses.append(sample_losses.detach())
        lr_scheduler.step()
        yield TrainingStep(step + 1, timesteps, losses, grad_norm, skipped)


def _draws(accelerator: Accelerator, batch: int, images: torch.Tensor, seed: int, step: int, stratified: bool) -> Draws:
    """The random draws for a batch of this process, by the positions of its pictures in the global batch."""
    count = len(images)
    first = (batch * accelerator.num_processes + accelerator.process_index) * count
    strata = count * accelerator.num_processes * accelerator.gradient_accumulation_steps if stratified else 0
    return draw(seed, step, range(first, first + count), images.shape[1:], accelerator.device, strata)


def _changed(x_0: torch.Tensor, draws: Draws, random_flip: bool, augment: bool) -> torch.Tensor:
    """The pictures, mirrored left-right with probability 1/2 if `random_flip`, and augmented if `augment`."""
    if random_flip:
        x_0 = torch.where((draws.flip < 0.5).view(-1, 1, 1, 1), x_0.flip(-1), x_0)
    return augmented(x_0, draws.changes) if augment else x_0


def _condition(
    labels: torch.Tensor | None, draws: Draws, label_dropout: float, null_label: int
) -> dict[str, torch.Tensor]:
    """The model's keyword arguments: the labels, some of them dropped; nothing for a model without classes."""
    if labels is None:
        return {}
    labels = labels.to(draws.label.device, non_blocking=True)
    return {"class_labels": torch.where(draws.label < label_dropout, null_label, labels)}


def _seed(seed: int, device: torch.device) -> None:
    """Seed the global generators of the CPU and the device.

    `torch.manual_seed` does the same for all kinds of devices. For those that are not in use it writes a stack trace at
    every call, which takes longer than the averages of the weights.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def _clip_gradients(
    accelerator: Accelerator, optimizer: Any, max_grad_norm: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip the gradients to a norm, and have the optimiser skip the step if they are not finite.

    Returns:
        The norm before clipping; 1.0 if the step is skipped, else 0.0.
    """
    grad_norm = whole(accelerator.clip_grad_norm_(weights_of(optimizer), max_grad_norm))
    skipped = (~torch.isfinite(grad_norm)).float()
    if accelerator.scaler is None:
        # The attribute that GradScaler sets: a fused optimiser reads it on the device and skips the update, without
        # a synchronisation.
        optimizer.optimizer.found_inf = skipped
    return grad_norm, skipped
