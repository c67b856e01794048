"""Metrics and progress of a run: progress bar, `metrics.jsonl`, trackers, and the loss curves as pictures."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib.figure
import numpy as np
import torch
from accelerate import Accelerator
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from tqdm.auto import tqdm

from ..evaluation.records import (
    BOUNDS_FILE,
    FINAL_LOSS_FILE,
    LEVELS,
    METRICS,
    numbered_lines,
    read_json,
    read_metrics,
)
from .launch import get_logger

logger = get_logger(__name__)


LONG_ON_CPU = 120  # minutes


class TimedBatches:
    """An iterator over the batches of another, with the time that was spent waiting for them.

    Args:
        batches: the iterator.
    """

    def __init__(self, batches: Iterator[Any]):
        self._batches, self._waited = batches, 0.0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        batch = next(self._batches)
        self._waited += time.perf_counter() - start
        return batch

    def seconds_waited(self) -> float:
        """Seconds since the last call of this method."""
        waited, self._waited = self._waited, 0.0
        return waited


def tracker_name(name: str) -> str:
    """The name of a metric with the characters that every tracker takes; MLflow refuses brackets and commas."""
    return " ".join(re.sub(r"[^\w ./-]", " ", name.replace("→ ∞", "to infinity")).split())


class MetricsLogger:
    """Accumulates losses on the device and logs their means at intervals; nothing waits for the device in between.

    Args:
        accelerator: the run's accelerator.
        output_dir: folder of `metrics.jsonl` and of the pictures.
        num_train_timesteps: T.
        start_step: optimiser steps done before. Lines of later steps are deleted: a resumed run writes them again.
        max_train_steps: optimiser steps of the whole run.
        images_per_step: pictures in an optimiser step.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        num_train_timesteps: int,
        start_step: int,
        max_train_steps: int,
        images_per_step: int,
    ):
        self.accelerator, self.output_dir = accelerator, output_dir
        self.num_train_timesteps, self.images_per_step = num_train_timesteps, images_per_step
        # Rows: sum of losses, number of samples; columns: noise levels.
        self._levels = torch.zeros(2, LEVELS, device=accelerator.device)
        self._steps = torch.zeros(2, device=accelerator.device)  # sum of gradient norms, number of skipped steps
        self._logged_step, self._logged_time, self._waited = start_step, time.perf_counter(), 0.0
        self._told_time_left = False
        self.bar = tqdm(
            total=max_train_steps,
            initial=start_step,
            unit="step",
            desc="Training",
            disable=not accelerator.is_main_process,
        )
        if accelerator.is_main_process:
            lines = numbered_lines(output_dir)
            if bad := [str(number) for number, line in lines if line is None]:
                logger.warning(f"{output_dir / METRICS}: line {', '.join(bad[:10])} holds no metrics and is deleted")
            kept = [line for _, line in lines if line is not None and line["step"] <= start_step]
            new = output_dir / f".{METRICS}.tmp"
            new.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            new.replace(output_dir / METRICS)

    def add_losses(self, losses: torch.Tensor, timesteps: torch.Tensor) -> None:
        """Add losses (B,) at timesteps (B,) to the means; those that are not finite are left out."""
        level = timesteps * LEVELS // self.num_train_timesteps
        losses = losses.detach().float()
        finite = torch.isfinite(losses)
        self._levels[0].index_add_(0, level, torch.where(finite, losses, 0.0))
        self._levels[1].index_add_(0, level, finite.float())

    def add_step(self, grad_norm: torch.Tensor, skipped: torch.Tensor, waited: float) -> None:
        """Add an optimiser step: its gradient norm, whether it was skipped (0 or 1), seconds waited for data."""
        self._steps += torch.stack([torch.where(skipped > 0, 0.0, grad_norm.float()), skipped.float()])
        self._waited += waited
        self.bar.update()

    def log(self, step: int, learning_rate: float) -> dict[str, Any]:
        """Log the means since the last call, over all processes; waits for the device.

        Args:
            step: optimiser steps done.
            learning_rate: of the next step.

        Returns:
            The line that was written to `metrics.jsonl`.
        """
        sums, counts = self.accelerator.reduce(self._levels, "sum").tolist()
        norms, skipped = self._steps.tolist()
        steps, seconds = step - self._logged_step, time.perf_counter() - self._logged_time
        line = {
            "step": step,
            "loss": sum(sums) / sum(counts) if sum(counts) else None,
            "loss_by_timestep": [s / c if c else None for s, c in zip(sums, counts, strict=True)],
            "learning_rate": learning_rate,
            "grad_norm": norms / max(1.0, steps - skipped),
            "skipped_steps": int(skipped),
            "images_per_second": steps * self.images_per_step / seconds,
            "data_wait": self._waited / seconds,
        }
        self.write(line)
        self.bar.set_postfix(
            loss="not finite" if line["loss"] is None else f"{line['loss']:.4f}",
            lr=f"{learning_rate:.1e}",
            images_per_s=f"{line['images_per_second']:.0f}",
        )
        if line["data_wait"] > 0.1 and self._waited > 1:
            logger.warning(
                f"step {step}: {line['data_wait']:.0%} of the time was spent waiting for pictures; with --streaming "
                "raise --dataloader_num_workers, without --streaming put --cache_dir on a faster disk"
            )
        self._tell_time_left(step, line["images_per_second"])
        self._levels.zero_()
        self._steps.zero_()
        self.restart_clock(step)
        return line

    def _tell_time_left(self, step: int, images_per_second: float) -> None:
        """Tell once how long the rest of the run takes, if that is minutes; on a CPU, what makes hours minutes."""
        minutes = (self.bar.total - step) * self.images_per_step / images_per_second / 60
        if self._told_time_left or minutes < 2:
            return
        self._told_time_left = True
        text = f"{images_per_second:,.0f} pictures/s: {minutes:,.0f} minutes to the end"
        if self.accelerator.device.type == "cpu" and minutes > LONG_ON_CPU:
            text += "; --time_budget 30 without --max_train_steps and --num_epochs plans a run of 30 minutes"
        logger.info(text)

    def restart_clock(self, step: int) -> None:
        """Exclude what was done since the last step (a checkpoint, a sample grid) from the throughput."""
        self._logged_step, self._logged_time, self._waited = step, time.perf_counter(), 0.0

    def write(self, line: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl` and log its numbers to the trackers."""
        if self.accelerator.is_main_process:
            with (self.output_dir / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        numbers = {
            tracker_name(name): value
            for name, value in line.items()
            if isinstance(value, int | float) and name != "step"
        }
        self.accelerator.log(numbers, step=line["step"])

    def draw(self) -> None:
        """Draw `loss_curve.png` and `loss_by_timestep.png` from `metrics.jsonl`."""
        if self.accelerator.is_main_process:
            draw_losses(self.output_dir)

    def close(self) -> None:
        """Remove the progress bar."""
        self.bar.close()


def draw_losses(output_dir: Path) -> None:
    """Draw `loss_curve.png` and `loss_by_timestep.png` of a run from its files."""
    lines = read_metrics(output_dir)
    bounds, final = (read_json(output_dir / name) for name in (BOUNDS_FILE, FINAL_LOSS_FILE))
    draw_loss_curve(lines, output_dir / "loss_curve.png")
    draw_loss_by_timestep(lines, output_dir / "loss_by_timestep.png", bounds, final)


def draw_loss_curve(lines: list[dict[str, Any]], file: Path) -> None:
    """Plot the training loss by step, smoothed over a twentieth of the run, and the validation loss if there is one."""
    training = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    if not training:
        return
    steps, losses = np.array(training).T
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
    width = max(1, len(losses) // 20)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], smooth, color="tab:blue", label="training")
    validation = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    if validation:
        axes.plot(
            *np.array(validation).T, color="tab:orange", marker="o", markersize=4, label="validation (EMA weights)"
        )
    axes.set(xlabel="optimiser step", ylabel="loss", title="Loss")
    _save(figure, axes, file)


def draw_loss_by_timestep(
    lines: list[dict[str, Any]],
    file: Path | BinaryIO,
    bounds: dict[str, Any] | None = None,
    final: dict[str, Any] | None = None,
) -> None:
    """Plot the loss at each tenth of 0 … T, for the first, second and last third of the run.

    Args:
        lines: of `metrics.jsonl`.
        file: the picture, by its name or open for writing.
        bounds: losses to hold it against, see `evaluation.bounds.compute_bounds`, if they are known.
        final: losses of the averaged weights at the end of the run, see `measure_final_loss`, if they are known.
    """
    lines = [line for line in lines if "loss_by_timestep" in line]
    if not lines:
        return
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    places = (np.arange(LEVELS) + 0.5) / LEVELS
    thirds = [part for part in np.array_split(np.arange(len(lines)), min(3, len(lines))) if len(part)]
    for part, shade in zip(thirds, ("0.75", "0.5", "tab:blue")[-len(thirds) :], strict=True):
        rows = np.array([lines[i]["loss_by_timestep"] for i in part], dtype=float)
        present = np.isfinite(rows)
        mean = np.where(present, rows, 0).sum(0) / np.where(present.any(0), present.sum(0), np.nan)
        label = f"steps to {lines[part[-1]]['step']:,}"
        axes.plot(places, mean, color=shade, marker="o", label=label)
    held_out = (final or {}).get("validation_by_timestep")
    if held_out is not None:
        axes.plot(places, np.array(held_out, float), color="tab:orange", marker="o", label="held-out pictures")
    if bounds is not None:
        # A denoiser that remembers has no loss at low noise: without this limit its curve would flatten all others.
        lowest = axes.dataLim.intervaly[0] / 5
        for name, style, label in (
            ("linear", "--", "best linear denoiser"),
            ("memorised", ":", "memorised training set"),
        ):
            values = np.array(bounds[name], float)
            values[~(values >= lowest)] = np.nan
            axes.plot(places, values, color="black", linestyle=style, label=label)
    axes.set(xlabel="t / T  (0: picture, 1: noise)", ylabel="loss", title="Loss by noise level")
    _save(figure, axes, file)


def _save(figure: matplotlib.figure.Figure, axes: Axes, file: Path | BinaryIO) -> None:
    low, high = axes.dataLim.intervaly
    if 0 < 5 * low < high:
        # Early steps, or small t, lie far above the rest: a logarithmic axis shows both.
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    figure.savefig(file, dpi=110)
