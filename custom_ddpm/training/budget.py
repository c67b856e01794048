"""What this machine does fast: bf16 or float32, threads, and the optimiser steps that fit into the time of a run."""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from ..config import TrainingConfig
from ..data.base import ImageData
from ..evaluation.records import CONFIG_FILE
from ..flags import parse_config
from ..recipe import GRIDS
from ..scheduler import CustomDDPMScheduler
from .launch import get_logger, threads_were_chosen
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
FEWER = 1.3  # speed with fewer threads, relative to all, from which on they are used


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


def choose_precision(config: TrainingConfig) -> tuple[TrainingConfig, str | None]:
    """The configuration with a precision, where neither it nor accelerate asks for one and the recipe is the default.

    A resumed run keeps its precision. One process measures bf16; several, which must all decide alike, take it on GPUs
    that have it. No state of accelerate is made here, since it keeps the settings that it is first made with.

    Returns:
        The configuration, and a line for the log if something was chosen.
    """
    asked = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if config.mixed_precision is not None or asked != "no" or config.recipe != "default":
        return config, None
    if (saved := _saved_precision(config)) is not None:
        return dataclasses.replace(config, mixed_precision=saved), f"--mixed_precision {saved}, as before"
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        faster = not on_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        reason = "several processes do not measure it"
    else:
        device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
        assert device is not None
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # where another program uses a core, several wait for each other
        ratio = bf16_speed(device)
        torch.set_num_threads(threads)
        faster, reason = ratio > MIN_SPEED, f"bf16 is {ratio:.1f}x as fast as float32 here"
    chosen: Literal["bf16", "no"] = "bf16" if faster else "no"
    return dataclasses.replace(config, mixed_precision=chosen), f"--mixed_precision {chosen}: {reason}"


def _saved_precision(config: TrainingConfig) -> Literal["no", "fp16", "bf16"] | None:
    """That of the run to resume, from the settings in its folder; None for a new run."""
    if config.resume_from_checkpoint is None:
        return None
    latest = config.resume_from_checkpoint == "latest"
    folder = Path(config.output_dir) if latest else Path(config.resume_from_checkpoint).parent
    if not (folder / CONFIG_FILE).is_file():
        return None
    return parse_config(["--config", str(folder / CONFIG_FILE)]).mixed_precision


def _step_times(
    enough: Callable[[list[float]], bool],
    model: Any,
    scheduler: CustomDDPMScheduler,
    optimizer: Any,
    data: ImageData,
    accelerator: Accelerator,
    loss: Loss,
    batch_size: int,
    loop_options: dict[str, Any],
) -> list[float]:
    """Seconds of optimiser steps, until they are `enough`; weights and state of the optimiser stay as they are.

    Must be called by all processes. The arguments are those of `training_steps`; `batch_size` is that of a process.
    The first step, which also allocates memory and compiles, is left out of the result.
    """
    batches = data.batches(sample_positions(accelerator, batch_size, 0))
    times: list[float] = []
    with _NoUpdates(optimizer) as rates:
        steps: Iterator[Any] = training_steps(
            model, scheduler, optimizer, rates, batches, accelerator, loss, 10**6, **loop_options
        )
        last = time.perf_counter()
        for _ in steps:
            _synchronise(accelerator.device)
            now = time.perf_counter()
            times.append(now - last)
            last = now
            if broadcast_object_list([enough(times)])[0]:
                break
        steps.close()  # type: ignore[attr-defined]
    batches.close()
    optimizer.optimizer.state.clear()
    return times[1:]


def seconds_per_step(*parts: Any) -> float:
    """Measure optimiser steps for a few seconds, see `_step_times`.

    Returns:
        Seconds, the same on all processes.
    """
    times = sorted(_step_times(lambda times: len(times) >= 4 and sum(times) > SECONDS, *parts))
    return float(broadcast_object_list([times[len(times) // 2]])[0])


def choose_threads(config: TrainingConfig, accelerator: Accelerator, resumed: bool, *parts: Any) -> TrainingConfig:
    """The configuration with the number of threads of one process, measured where nobody chose it.

    Small networks wait for their threads more than they gain by them, and all the more where another program needs a
    core: every operation then waits until the thread on that core has its turn. All threads are compared with half as
    many, and so on while that is faster. It is measured for new runs of the default recipe. Several processes share the
    cores without a measurement.

    Args:
        config: settings of the run.
        accelerator: of the run.
        resumed: whether the run goes on from a checkpoint, whose number of threads `config` has if it is known.
        parts: arguments of `_step_times`.
    """
    if accelerator.device.type != "cpu" or accelerator.num_processes > 1:
        return config
    if config.cpu_threads is not None:  # given, or of the checkpoint
        torch.set_num_threads(config.cpu_threads)
        return config
    cores = threads = torch.get_num_threads()
    if config.recipe != "default" or resumed or cores == 1 or threads_were_chosen():
        return config
    seconds: dict[int, float] = {}
    while threads >= 1:
        torch.set_num_threads(threads)
        seconds[threads] = min(_step_times(_few, *parts))
        if seconds[threads] > min(seconds.values()):
            break
        threads //= 2
    best = min(seconds, key=lambda threads: seconds[threads])
    ratio = seconds[cores] / seconds[best]
    chosen = best if ratio > FEWER else cores
    torch.set_num_threads(chosen)
    if chosen < cores:
        logger.info(f"--cpu_threads {chosen}: steps are {ratio:.1f}x as fast as with {cores}")
    return dataclasses.replace(config, cpu_threads=chosen)


def _few(times: list[float]) -> bool:
    return len(times) >= 6 or (len(times) >= 2 and sum(times) > 1.0)


def plan(config: TrainingConfig, seconds: float, accelerator: Accelerator, first_step: int = 0) -> TrainingConfig:
    """Choose --max_train_steps so that the run ends with its --time_budget, counted from the start of this process.

    Args:
        config: settings of the run, with a time budget.
        seconds: time of an optimiser step.
        accelerator: of the run.
        first_step: optimiser steps done before this start, which took time of their own.

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
    return dataclasses.replace(config, max_train_steps=first_step + steps, **chosen)
