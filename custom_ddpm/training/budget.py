"""What this machine does fast: bf16 or float32, and the number of optimiser steps that fit into the time of a run."""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..config import TrainingConfig
from ..data.base import ImageData
from ..recipe import GRIDS
from ..scheduler import CustomDDPMScheduler
from .launch import get_logger
from .loop import Loss, training_steps
from .randomness import sample_positions

logger = get_logger(__name__)

SECONDS = 4.0  # for which steps are measured
# Time of a forward pass alone, in float32, relative to a whole step for a picture, in float32 or bf16.
FORWARD = 0.55
# What a run takes besides its steps: loading, the bounds of the loss, the diagnosis, the model card, in seconds.
ENDING = 8.0
MIN_STEPS = 10
GRID_SHARE = 0.05  # largest share of the time that the sample grids before the last one take
MIN_SPEED = 1.2  # of bf16, relative to float32, from which on it is used


class _NoUpdates:
    """A learning rate schedule of zeros, so that the measured steps leave the weights as they are."""

    def __init__(self, optimizer: Any):
        self._groups = optimizer.param_groups
        self._rates = [group["lr"] for group in self._groups]

    def __enter__(self) -> "_NoUpdates":
        for group in self._groups:
            group["lr"] = 0.0
        return self

    def __exit__(self, *error: object) -> None:
        for group, rate in zip(self._groups, self._rates, strict=True):
            group["lr"] = rate

    def step(self) -> None:
        """Nothing changes."""


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def bf16_speed(device: torch.device) -> float:
    """How many times as fast a convolution, forward and backward, is in bf16 as in float32; measured for a second."""
    layer = torch.nn.Conv2d(64, 64, 3, padding=1).to(device)
    images = torch.randn(32, 64, 16, 16, device=device, requires_grad=True)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    start = time.perf_counter()
    while time.perf_counter() - start < 1.0 or len(seconds[True]) < 3:
        for half in (False, True):
            _synchronise(device)
            begin = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                output = layer(images)
            output.float().sum().backward()
            _synchronise(device)
            seconds[half].append(time.perf_counter() - begin)
    # The fastest of each: another program slows down single ones.
    return min(seconds[False]) / min(seconds[True])


def seconds_per_step(
    model: Any,
    scheduler: CustomDDPMScheduler,
    optimizer: Any,
    data: ImageData,
    accelerator: Accelerator,
    loss: Loss,
    batch_size: int,
    loop_options: dict[str, Any],
) -> float:
    """Measure optimiser steps for a few seconds; weights and state of the optimiser stay as they are.

    Must be called by all processes. The arguments are those of `training_steps`; `batch_size` is that of a process.

    Returns:
        Seconds, the same on all processes.
    """
    batches = data.batches(sample_positions(accelerator, batch_size, 0))
    times: list[float] = []
    with _NoUpdates(optimizer) as rates:
        steps: Iterator[Any] = training_steps(
            model, scheduler, optimizer, rates, batches, accelerator, loss, 10**6, **loop_options
        )
        start = last = time.perf_counter()
        for _ in steps:
            _synchronise(accelerator.device)
            now = time.perf_counter()
            times.append(now - last)
            last = now
            enough = len(times) >= 4 and now - start > SECONDS
            if broadcast_object_list([enough])[0]:
                break
        steps.close()  # type: ignore[attr-defined]
    batches.close()
    optimizer.optimizer.state.clear()
    later = sorted(times[1:])  # the first one also allocates memory, and compiles
    return float(broadcast_object_list([later[len(later) // 2]])[0])


def plan(config: TrainingConfig, seconds: float, accelerator: Accelerator) -> TrainingConfig:
    """Choose --max_train_steps so that the run ends with its --time_budget, counted from the start of this process.

    Args:
        config: settings of the run, with a time budget.
        seconds: time of an optimiser step.
        accelerator: of the run.

    Raises:
        ValueError: there is no time left for training.
    """
    assert config.time_budget is not None
    images_per_step = config.train_batch_size * accelerator.num_processes * config.gradient_accumulation_steps
    picture = seconds / images_per_step * FORWARD  # a forward pass of one picture, on all processes
    guided = 1 if config.guidance_scale == 1.0 else 2
    grid = picture * config.eval_batch_size * config.ddpm_num_inference_steps * guided
    grid += picture * 1024 * (config.validation_split is not None)
    elapsed = time.time() - psutil.Process().create_time()
    left = 60 * config.time_budget - elapsed - ENDING
    # At the end the loss is measured, on a tenth of the pictures that were seen and 1,024 at most, with both weights.
    left -= 2 * min(1024 * picture, 0.1 * max(0.0, left) * FORWARD)
    left -= grid  # the last one
    grids = min(GRIDS, max(1, int(GRID_SHARE * left / grid)))
    chosen: dict[str, Any] = {}
    if config.save_images_steps is None:
        steps = int((left - grids * grid) / seconds)
        chosen = {"save_images_steps": math.ceil(max(1, steps) / (grids + 1))}
    else:
        steps = int(left / (seconds + grid / config.save_images_steps))
    steps, chosen = broadcast_object_list([steps, chosen])
    if steps < MIN_STEPS:
        raise ValueError(
            f"--time_budget is {config.time_budget:g}; loading, sample grids and the end of the run alone take about "
            f"{config.time_budget - left / 60:.1f} minutes here: raise it, or lower --ddpm_num_inference_steps"
        )
    logger.info(
        f"--time_budget {config.time_budget:g}: about {images_per_step / seconds:,.0f} pictures/s, {steps:,} optimiser "
        f"steps of {images_per_step} pictures, {steps * images_per_step:,} in all"
    )
    return dataclasses.replace(config, max_train_steps=steps, **chosen)
