"""What a run wrote about itself, read for the diagnosis."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ..config import TrainingConfig
from ..sampling import CAPTION_HEIGHT
from ..scheduler import CustomDDPMScheduler
from .records import BOUNDS_FILE, CONFIG_FILE, FINAL_LOSS_FILE, read_json, read_metrics


def mean_of(levels: list[float | None]) -> float:
    """Mean over the noise levels that have timesteps."""
    return float(np.mean([value for value in levels if value is not None]))


@dataclass(frozen=True)
class Evidence:
    """What a run wrote.

    Args:
        settings: of `TrainingConfig`, name -> value.
        lines: of `metrics.jsonl`, those with a finite training loss.
        skipped: optimiser steps that were skipped.
        validation: (step, validation loss).
        steps: optimiser steps done.
        scheduler: the noise scheduler that was saved with the model.
        samples: the pictures of the last grid, uint8 (N, C, H, W).
        bounds: see `bounds.compute_bounds`.
        final: see `training.ending.measure_final_loss`.
    """

    settings: dict[str, Any]
    lines: list[dict[str, Any]]
    skipped: int
    validation: list[tuple[int, float]]
    steps: int
    scheduler: CustomDDPMScheduler | None
    samples: np.ndarray | None
    bounds: dict[str, Any] | None
    final: dict[str, Any] | None

    def mean_loss(self, begin: float, end: float) -> tuple[float, float] | None:
        """Mean training loss of the lines in a part of the run and its standard error; None for fewer than two lines.

        Args:
            begin, end: fractions of the run; a line belongs to the steps before it.
        """
        part = [line["loss"] for line in self.lines if begin * self.steps < line["step"] <= end * self.steps]
        if len(part) < 2:
            return None
        return float(np.mean(part)), float(np.std(part, ddof=1) / len(part) ** 0.5)

    @property
    def constant_loss(self) -> float | None:
        """Mean loss of the best prediction that ignores x_t; None if it is not known."""
        if self.bounds is not None:
            return mean_of(self.bounds["constant"])
        plain = self.settings["loss_type"] == "simple" and self.settings["loss_weighting"] == "uniform"
        return 1.0 if plain and self.settings["prediction_type"] == "epsilon" else None


def read_evidence(run: Path) -> Evidence:
    """Read what a run wrote; see `diagnose` for the errors."""
    import yaml

    if not (run / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{run} holds no {CONFIG_FILE}: it is not the output folder of a run")
    try:
        values = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
        config = TrainingConfig(**values)
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"{run / CONFIG_FILE} is no configuration: {' '.join(str(error).split())}") from error
    lines = read_metrics(run)
    return Evidence(
        settings=dataclasses.asdict(config),
        lines=[line for line in lines if line.get("loss") is not None],
        skipped=sum(line.get("skipped_steps", 0) for line in lines),
        validation=[(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line],
        steps=max((line["step"] for line in lines), default=0),
        scheduler=_read_scheduler(run),
        samples=_read_samples(run, config),
        bounds=read_json(run / BOUNDS_FILE),
        final=read_json(run / FINAL_LOSS_FILE),
    )


def _read_scheduler(run: Path) -> CustomDDPMScheduler | None:
    folder = run / "scheduler"
    return CustomDDPMScheduler.from_pretrained(folder) if folder.is_dir() else None


def _read_samples(run: Path, config: TrainingConfig) -> np.ndarray | None:
    """The pictures of `samples.png`, uint8 (N, C, H, W); None if there is none, or it is of another size."""
    file = run / "samples.png"
    if not file.is_file():
        return None
    with PIL.Image.open(file) as image:
        sheet = np.asarray(image)
    size = config.resolution if len(config.resolution) == 2 else 2 * config.resolution
    return split_grid(sheet if sheet.ndim == 3 else sheet[..., None], *size)


def split_grid(sheet: np.ndarray, height: int, width: int, min_size: int = 64) -> np.ndarray | None:
    """The pictures in a grid of `sampling.image_grid`, at their own size.

    Args:
        sheet: uint8 (rows, columns, C).
        height, width: of a picture.
        min_size: as it was given to `image_grid`.

    Returns:
        uint8 (N, C, height, width), blank places left out; None if the sheet is no such grid.
    """
    factor = max(1, -(-min_size // max(height, width)))
    gap = max(2, height * factor // 16)
    tall, wide = height * factor + gap, width * factor + gap
    if (sheet.shape[0] - gap) % tall == CAPTION_HEIGHT % tall:
        sheet = sheet[CAPTION_HEIGHT:]
    if (sheet.shape[0] - gap) % tall or (sheet.shape[1] - gap) % wide:
        return None
    inside = sheet[gap:, gap:].reshape(sheet.shape[0] // tall, tall, sheet.shape[1] // wide, wide, sheet.shape[2])
    tiles = inside[:, : height * factor : factor, :, : width * factor : factor].transpose(0, 2, 4, 1, 3)
    tiles = tiles.reshape(-1, *tiles.shape[2:])
    last = len(tiles)
    while last > 1 and (tiles[last - 1] == 255).all():
        last -= 1
    return tiles[:last]
