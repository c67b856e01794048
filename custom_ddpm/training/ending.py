"""The end of a run: the loss of its weights measured once more, the bounds of the loss, and the diagnosis.

During training the loss is that of the weights as they are, on one timestep per picture. Here averaged and raw weights
see the same pictures, timesteps and noise, and held-out pictures are measured like the training pictures.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from ..data.base import Batch, ImageData
from ..data.pixels import normalise
from ..evaluation.bounds import BOUND_SETTINGS, cached_bounds, no_bounds
from ..evaluation.diagnosis import diagnose, in_words
from ..evaluation.records import CONFIG_FILE, FINAL_LOSS_FILE, LEVELS, write_json
from ..flags import parse_config
from ..messages import one_line
from ..scheduler import CustomDDPMScheduler
from .build import Run
from .launch import get_logger
from .loop import Loss
from .metrics import draw_losses
from .parts import open_data
from .randomness import draw
from .sharding import reshard

logger = get_logger(__name__)

MAX_PICTURES = 1024
LABEL_PICTURES = 256  # fewer held-out pictures do not show whether labels are used; training pictures are taken then
MAX_SEEDS, MAX_STEPS = 16, 100  # of the comparison of sampling steps, which takes three times as many evaluations


@torch.no_grad()
def sample_losses(
    unet: Any, scheduler: CustomDDPMScheduler, loss: Loss, batch: Batch, batch_size: int, accelerator: Accelerator
) -> torch.Tensor:
    """Loss of each picture at its own timestep, evenly spaced over 0 … T; must be called by all processes.

    Args:
        unet: the model itself, in evaluation mode.
        scheduler, loss: of the run.
        batch: images uint8 (N, C, H, W) and labels or None, the same on all processes.
        batch_size: pictures that a process takes at once.
        accelerator: of the run.

    Returns:
        float64 (N,) on the CPU, the same on all processes.
    """
    images, labels = batch
    count, device = len(images), accelerator.device
    losses = torch.zeros(count, device=device)
    for start in range(0, count, accelerator.num_processes * batch_size):
        begin = start + accelerator.process_index * batch_size
        # All processes must call a sharded model equally often: one without pictures left discards the result.
        chosen = range(min(begin, count - 1), min(begin + batch_size, count))
        x_0 = normalise(images[chosen.start : chosen.stop].to(device))
        noise = draw(0, 0, chosen, x_0.shape[1:], device).noise
        t = ((torch.arange(chosen.start, chosen.stop, device=device) + 0.5) / count * len(scheduler)).long()
        x_t = scheduler.add_noise(x_0, noise, t)
        condition = {} if labels is None else {"class_labels": labels[chosen.start : chosen.stop].to(device)}
        found = loss(scheduler, unet(x_t, t, **condition).sample, x_0, noise, x_t, t)
        if begin < count:
            losses[chosen.start : chosen.stop] = found.float()
    return accelerator.reduce(losses, "sum").double().cpu()


def _random_pictures(data: ImageData, count: int) -> Batch:
    """Pictures in the random order of the first epoch; the first ones of a stream."""
    if data.num_images is None:
        return data.take(count)
    batches = data.batches([range(min(count, data.num_images))])
    try:
        return next(batches)
    finally:
        batches.close()


def _summary(name: str, losses: torch.Tensor) -> dict[str, Any]:
    """Mean, mean at each noise level, and standard error of the mean given that timesteps are evenly spaced."""
    level = torch.arange(len(losses)) * LEVELS // len(losses)
    parts = [losses[level == i] for i in range(LEVELS)]
    variance = sum(float(part.var()) * len(part) for part in parts if len(part) > 1)
    return {
        name: float(losses.mean()),
        f"{name}_by_timestep": [float(part.mean()) if len(part) else None for part in parts],
        f"{name}_error": math.sqrt(variance) / len(losses),
    }


def wrong_labels(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Labels (N,) none of which is right, spread evenly over the other classes."""
    shift = torch.arange(len(labels), device=labels.device) % (num_classes - 1)
    return (labels + 1 + shift) % num_classes


def sampling_change(run: Run) -> dict[str, Any]:
    """How much pictures change with twice the sampling steps, if the grid has few; must be called by all processes.

    The pictures of the same seeds are drawn without noise in the steps (η = 0). Their RMS difference is divided by √2
    times the standard deviation of the pixels, which is that of unrelated pictures, and the median over seeds is taken.

    Returns:
        `sampling_steps` (both numbers) and `sampling_change`; empty if the grid has all steps or more than `MAX_STEPS`,
        if sampling is random in any case, or if the pictures are all of one colour.
    """
    n, T = run.preview.sampling_options["num_inference_steps"], len(run.scheduler)
    if n is None or n >= T or n > MAX_STEPS or run.scheduler.config.variance_type == "analytic":
        return {}
    steps = [n, min(2 * n, T)]
    options = {"eta": 0.0} if run.preview.sampler is run.scheduler else {}  # DPM-Solver++ draws no noise
    few, many = (run.preview.draw(MAX_SEEDS, num_inference_steps=k, **options).double().flatten(1) for k in steps)
    spread = float(many.std(correction=0))
    if spread == 0:
        return {}
    change = (many - few).square().mean(1).sqrt() / (math.sqrt(2) * spread)
    return {"sampling_steps": steps, "sampling_change": float(change.median())}


def measure_final_loss(run: Run, step: int) -> None:
    """Write `final_loss.json`: the loss of averaged and raw weights on training pictures, and on held-out ones.

    With classes, also how much larger the loss is with wrong labels; see also `sampling_change`. All processes must
    call it. It takes at most a tenth of the pictures that the run was trained on.
    """
    seen = run.first_sample + (step - run.first_step) * run.global_batch
    count = max(LEVELS, min(MAX_PICTURES, seen // 10))
    arguments = (run.scheduler, run.loss)
    training = _random_pictures(run.data, count)
    held_out = None if run.preview.validation_data is None else _random_pictures(run.preview.validation_data, count)
    unet = run.state.unet

    def measured(batch: Batch) -> torch.Tensor:
        return sample_losses(unet, *arguments, batch, run.batch_size, run.accelerator)

    with run.state.averaged():
        losses = measured(training)
        found = {"step": step, "pictures": len(losses), **_summary("training", losses)}
        (images, labels), right = training, losses
        if held_out is not None:
            of_held_out = measured(held_out)
            found |= _summary("validation", of_held_out)
            if len(of_held_out) >= LABEL_PICTURES:
                (images, labels), right = held_out, of_held_out
        num_classes = len(run.data.id2label or ())
        if labels is not None and num_classes > 1:
            wrong = measured((images, wrong_labels(labels, num_classes)))
            found |= {"label_pictures": len(right), **_summary("wrong_minus_right_labels", wrong - right)}
        found |= sampling_change(run)
    if run.state.ema is not None:
        unet.eval()
        raw = measured(training)
        reshard(unet)  # a split model is whole after a forward pass
        unet.train()
        found |= _summary("raw", raw)
        found["averaged_minus_raw_error"] = _summary("difference", losses - raw)["difference_error"]
    if run.accelerator.is_main_process:
        write_json(run.output_dir / FINAL_LOSS_FILE, found)


def write_bounds(run: Run) -> None:
    """Write `loss_bounds.json`, on the main process. A failure is a warning: the model is not concerned."""
    options = {name: run.settings[name] for name in BOUND_SETTINGS}
    if not run.accelerator.is_main_process:
        return
    if (reason := no_bounds(run.data, options["loss_type"])) is not None:
        logger.info(reason)
        return
    try:
        cached_bounds(run.output_dir, run.data, run.scheduler, **options)
    except (ValueError, OSError, ArithmeticError, RuntimeError, MemoryError) as error:
        logger.warning(f"the bounds of the loss could not be computed: {type(error).__name__}: {one_line(error)}")


def final_diagnosis(run: Run) -> Iterator[str]:
    """The lines of the diagnosis for the user."""
    try:
        yield from in_words(diagnose(run.output_dir))
    except (ValueError, OSError, ArithmeticError, RuntimeError, LookupError, TypeError) as error:
        logger.warning(f"the run could not be diagnosed: {type(error).__name__}: {one_line(error)}")


def add_bounds(folder: Path) -> None:
    """Write `loss_bounds.json` of a run that ended, from the pictures in its configuration, and draw it.

    Args:
        folder: output folder of the run.

    Raises:
        ValueError, OSError: the configuration, the pictures or the scheduler cannot be read, or there are no bounds.
    """
    config = parse_config(["--config", str(folder / CONFIG_FILE)])
    scheduler = CustomDDPMScheduler.from_pretrained(folder / "scheduler")
    data, _ = open_data(config, PartialState())
    if (reason := no_bounds(data, config.loss_type)) is not None:
        raise ValueError(reason)
    cached_bounds(folder, data, scheduler, **{name: getattr(config, name) for name in BOUND_SETTINGS})
    draw_losses(folder)
