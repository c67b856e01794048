"""Sample grids, the validation loss, and the pipeline that is saved with the averaged weights during training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..data import ImageData, normalise
from ..evaluation.records import facts_of_card, read_metrics
from ..hub.card import write_model_card
from ..hub.push import BackgroundPush
from ..objective import diffusion_loss
from ..pipelines import CustomDDPMPipeline
from ..sampling import image_grid, sample_images
from ..scheduler import CustomDDPMScheduler
from ..unet import CustomUNet2DModel
from .metrics import MetricsLogger
from .randomness import draw
from .state import TrainingState

IMAGE_TRACKERS: dict[str, dict[str, str]] = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}


def grid_file(output_dir: Path, step: int) -> Path:
    """The file of the sample grid after optimiser step `step`; the last thing that `Preview.save` writes."""
    return output_dir / "samples" / f"step-{step:07d}.png"


@torch.no_grad()
def validation_loss(
    unet: CustomUNet2DModel,
    scheduler: CustomDDPMScheduler,
    data: ImageData,
    batch_size: int,
    accelerator: Accelerator,
) -> float:
    """Mean L_simple on up to 1,024 held-out pictures, with the same noise and timesteps in every run.

    Must be called by all processes.
    """
    images, labels = data.take(1024)
    count = len(images)
    total = torch.zeros((), device=accelerator.device)
    for start in range(0, count, accelerator.num_processes * batch_size):
        begin = start + accelerator.process_index * batch_size
        # All processes must call a sharded model equally often: one without pictures left discards the result.
        chosen = range(min(begin, count - 1), min(begin + batch_size, count))
        x_0 = normalise(images[chosen.start : chosen.stop].to(accelerator.device))
        noise = draw(0, 0, chosen, x_0.shape[1:], accelerator.device).noise
        # Evenly spaced over 0 … T, which has less variance than independent draws.
        t = ((torch.arange(chosen.start, chosen.stop, device=accelerator.device) + 0.5) / count * len(scheduler)).long()
        x_t = scheduler.add_noise(x_0, noise, t)
        conditions = (
            {} if labels is None else {"class_labels": labels[chosen.start : chosen.stop].to(accelerator.device)}
        )
        output = unet(x_t, t, **conditions).sample  # type: ignore[operator]
        if begin < count:
            total += diffusion_loss(scheduler, output, x_0, noise, x_t, t).sum()
    return float(accelerator.reduce(total, "sum").item()) / count


@dataclass
class Preview:
    """Draws pictures with the averaged weights, and saves them with the pipeline and its model card.

    Args:
        accelerator, state, scheduler, metrics: of the run.
        output_dir: output folder of the run.
        id2label: names of the classes; None without classes.
        seeds: one for each picture of the grid.
        batch_size: pictures that a process draws at once.
        sampler: scheduler that the pictures are drawn with; the saved pipeline has `scheduler`.
        sampling_options: further arguments of the pipeline's call.
        validation_data: held-out pictures, if any.
        facts: what the model card says about the run; see `hub.write_model_card`.
        push: pushes the folder to the Hub, if asked for.
        show: gets each grid and its step on the main process, if given.
    """

    accelerator: Accelerator
    state: TrainingState
    scheduler: CustomDDPMScheduler
    metrics: MetricsLogger
    output_dir: Path
    id2label: dict[int, str] | None
    seeds: Sequence[int]
    batch_size: int
    sampler: Any
    sampling_options: Mapping[str, Any]
    validation_data: ImageData | None
    facts: Mapping[str, Any]
    push: BackgroundPush | None
    show: Callable[[PIL.Image.Image, int], None] | None = None
    _pipeline: CustomDDPMPipeline = field(init=False)

    def __post_init__(self) -> None:
        self._pipeline = CustomDDPMPipeline(self.state.unet, self.sampler, id2label=self.id2label)
        hidden = not self.accelerator.is_main_process
        self._pipeline.set_progress_bar_config(leave=False, desc="Sampling", disable=hidden)

    def draw(self, count: int, **options: Any) -> torch.Tensor:
        """The first `count` pictures of the grid at most, uint8 (N, C, H, W); must be called by all processes.

        Args:
            count: number of pictures.
            **options: arguments of the pipeline's call, in place of those of the grid.
        """
        seeds = self.seeds[:count]
        labels = None if self.id2label is None else [i % len(self.id2label) for i in range(len(seeds))]
        options = {**self.sampling_options, **options}
        return sample_images(self._pipeline, seeds, labels, batch_size=self.batch_size, **options)

    def save(self, step: int, final: bool = False) -> None:
        """Save the sample grid, the loss curves and the pipeline after optimiser step `step`, and log to trackers.

        Must be called by all processes. With `final`, pushing is left to `finish`.
        """
        with self.state.averaged():
            if self.validation_data is not None and not self._is_validated(step):
                loss = validation_loss(
                    self.state.unet, self.scheduler, self.validation_data, self.batch_size, self.accelerator
                )
                self.metrics.write({"step": step, "validation_loss": loss})
            images = self.draw(len(self.seeds))
            self.metrics.draw()
            unet = self.state.whole_unet()
            if self.accelerator.is_main_process:
                self._write(unet, self._grid(images), step)
                if self.push is not None and not final:
                    self.push.push(self.output_dir, f"Step {step}")
        self.accelerator.wait_for_everyone()

    def finish(self, step: int) -> None:
        """Save for the last time, and push."""
        self.save(step, final=True)
        if self.push is not None and self.accelerator.is_main_process:
            self.push.finish(self.output_dir, f"Trained for {step} steps")

    def save_pipeline(self, step: int) -> None:
        """Save the pipeline, its card and the loss curves alone: a run that stops early leaves a usable model."""
        with self.state.averaged():
            self.metrics.draw()
            unet = self.state.whole_unet()
            if self.accelerator.is_main_process:
                self._write_pipeline(unet, step)
        self.accelerator.wait_for_everyone()

    def _is_validated(self, step: int) -> bool:
        """Whether the validation loss of this step was written before the run was interrupted."""
        lines = read_metrics(self.output_dir) if self.accelerator.is_main_process else []
        found = any(line["step"] == step and "validation_loss" in line for line in lines)
        return bool(broadcast_object_list([found])[0])

    def _grid(self, images: torch.Tensor) -> PIL.Image.Image:
        """The pictures, with a column for each class if there are few."""
        if self.id2label is None or len(self.id2label) > 16:
            return image_grid(images)
        names = [self.id2label[label] for label in sorted(self.id2label)]
        return image_grid(images, columns=len(names), captions=names)

    def _write(self, unet: CustomUNet2DModel | None, grid: PIL.Image.Image, step: int) -> None:
        grid.save(self.output_dir / "samples.png")
        self._write_pipeline(unet, step)
        self._log_grid(grid, step)
        file = grid_file(self.output_dir, step)
        file.parent.mkdir(exist_ok=True)
        partial = file.with_name(f".{file.name}.tmp")
        grid.save(partial, format="PNG")
        partial.replace(file)
        if self.show is not None:
            self.show(grid, step)

    def _write_pipeline(self, unet: CustomUNet2DModel | None, step: int) -> None:
        CustomDDPMPipeline(unet, self.scheduler, id2label=self.id2label).save_pretrained(self.output_dir)
        write_model_card(self.output_dir, {**self.facts, "steps": step, **facts_of_card(read_metrics(self.output_dir))})

    def _log_grid(self, grid: PIL.Image.Image, step: int) -> None:
        pixels = {"samples": np.asarray(grid.convert("RGB"))[None]}
        for tracker in self.accelerator.trackers:
            if tracker.name in IMAGE_TRACKERS:
                tracker.log_images(pixels, step=step, **IMAGE_TRACKERS[tracker.name])
