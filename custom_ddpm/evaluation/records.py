"""Files that a run writes about itself: their names, and reading them."""

import json
from pathlib import Path
from typing import Any

CONFIG_FILE = "training_config.yaml"
METRICS = "metrics.jsonl"
LEVELS = 10  # equal parts of 0 … T that losses are averaged over separately
BOUNDS_FILE = "loss_bounds.json"
FINAL_LOSS_FILE = "final_loss.json"
SCORES = "evaluation"  # of a line of metrics: what its metrics of drawn pictures were measured with


def read_metrics(output_dir: str | Path) -> list[dict[str, Any]]:
    """The complete lines of a run's `metrics.jsonl`, in order; empty if there is no such file.

    Lines that are no metrics (damaged by a disk or an editor) are left out.
    """
    return [line for _, line in numbered_lines(output_dir) if line is not None]


def numbered_lines(output_dir: str | Path) -> list[tuple[int, dict[str, Any] | None]]:
    """The number of each complete line, from 1, and its metrics; None if it has none."""
    file = Path(output_dir, METRICS)
    if not file.is_file():
        return []
    # A line that a full disk or a killed process cut short has no line end.
    texts = file.read_bytes().split(b"\n")[:-1]
    return [(number, _metrics_of(text)) for number, text in enumerate(texts, 1)]


def _metrics_of(text: bytes) -> dict[str, Any] | None:
    line = _json_object(text)
    return line if line is not None and type(line.get("step")) is int else None


def facts_of_card(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What the model card tells of the lines of metrics: the last evaluation of drawn pictures, or the last losses.

    Returns:
        metrics: name -> value; evaluation: what they were measured with, name -> value, if anything.
    """
    evaluated = [line for line in lines if SCORES in line]
    if not evaluated:
        losses = {name: line[name] for line in lines for name in ("loss", "validation_loss") if name in line}
        return {"metrics": losses}
    last, about = evaluated[-1], evaluated[-1][SCORES]
    evaluation = {name: about[name] for name in ("num_images", "sampler", "reference")} | {"step": last["step"]}
    return {"metrics": {name: last[name] for name in about["standard_errors"]}, "evaluation": evaluation}


def scores_by_step(lines: list[dict[str, Any]]) -> dict[int, float]:
    """The number by which the models of a run are compared, the less the better, by optimiser step.

    It is that of the last evaluation of drawn pictures, such as "FD (digits classifier)"; without evaluations it is
    the validation loss.
    """
    evaluated = [line for line in lines if SCORES in line]
    name = evaluated[-1][SCORES]["best_by"] if evaluated else "validation_loss"
    return {line["step"]: line[name] for line in lines if name in line}


def _json_object(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_json(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file, or no object in it."""
    return _json_object(file.read_bytes()) if file.is_file() else None


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write a JSON object to a file, whole or not at all."""
    partial = file.with_name(f".{file.name}.tmp")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
