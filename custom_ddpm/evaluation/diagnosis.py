"""What is wrong with a run, found from what it wrote: findings, each with its evidence and what changes it.

`diagnose` reads `training_config.yaml`, `metrics.jsonl`, `final_loss.json`, `loss_bounds.json`, the scheduler and
`samples.png`. A file that is missing (a run that is still going, or one of an earlier version) leaves out the findings
that need it. The findings themselves are in `symptoms.py`.
"""

import dataclasses
from pathlib import Path

import numpy as np
import PIL.Image

from ..config import TrainingConfig
from ..scheduler import CustomDDPMScheduler
from .records import BOUNDS_FILE, FINAL_LOSS_FILE, read_json, read_metrics
from .symptoms import SYMPTOMS, Evidence, Finding

CONFIG_FILE = "training_config.yaml"


def diagnose(run: str | Path) -> list[Finding]:
    """What is wrong with a run.

    Args:
        run: its output folder.

    Returns:
        The findings; empty if nothing was found.

    Raises:
        FileNotFoundError: the folder is not that of a run.
        ValueError: its `training_config.yaml` is no configuration.
    """
    evidence = read_evidence(Path(run))
    findings: list[Finding] = []
    for symptom in SYMPTOMS:
        # Of the causes of a bad loss only the first is named: the others follow from it.
        if symptom.explained_by & {finding.name for finding in findings}:
            continue
        found = symptom.look(evidence)
        if found is not None:
            findings.append(Finding(symptom.name, *found))
    return findings


def in_words(findings: list[Finding]) -> list[str]:
    """The findings as lines of text."""
    if not findings:
        return ["Diagnosis: nothing found."]
    return ["Diagnosis:", *(f"  {finding.name}: {finding.evidence}; {finding.remedy}" for finding in findings)]


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
    if (sheet.shape[0] - gap) % tall or (sheet.shape[1] - gap) % wide:
        return None
    inside = sheet[gap:, gap:].reshape(sheet.shape[0] // tall, tall, sheet.shape[1] // wide, wide, sheet.shape[2])
    tiles = inside[:, : height * factor : factor, :, : width * factor : factor].transpose(0, 2, 4, 1, 3)
    tiles = tiles.reshape(-1, *tiles.shape[2:])
    last = len(tiles)
    while last > 1 and (tiles[last - 1] == 255).all():
        last -= 1
    return tiles[:last]
