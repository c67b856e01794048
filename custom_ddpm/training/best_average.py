"""The best length of a post-hoc average, chosen after the run by a metric of drawn pictures."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..evaluation.records import CONFIG_FILE, SCORES, facts_of_card, read_metrics
from ..flags import parse_config
from ..hub.card import write_model_card
from ..pipelines import CustomDDPMPipeline
from ..sampling import process_state
from .ema import reconstruct
from .parts import open_data
from .scores import open_reference


class Measured(NamedTuple):
    """An average of a run and its metrics; those of `Reference.scores`, on the main process only."""

    sigma_rel: float | None  # None: the average that the run saved
    scores: dict[str, Any] | None
    problem: str | None = None  # why it cannot be reconstructed

    @property
    def value(self) -> float:
        """The metric by which averages are chosen."""
        return float("inf") if self.scores is None else self.scores[self.scores[SCORES]["best_by"]]


def measure_averages(
    folder: Path, features: str | None, sigma_rels: Sequence[float], num_images: int | None, batch_size: int
) -> Iterator[Measured]:
    """Evaluate the average that a run saved, and its post-hoc averages; must be called by all processes.

    All of them draw with the same seeds, and are compared with the pictures that --eval_steps compares with.

    Args:
        folder: output folder of a run with --posthoc_ema_steps.
        features, num_images: as --eval_features and --eval_num_images; those of the run if None.
        sigma_rels: lengths of the averages.
        batch_size: pictures at once.

    Raises:
        ValueError, OSError: the run, its pictures or the features cannot be read, or it has no snapshots.
    """
    state = process_state()
    config = parse_config(["--config", str(folder / CONFIG_FILE)])
    config = dataclasses.replace(
        config,
        eval_features=features or config.eval_features,
        eval_num_images=num_images or config.eval_num_images,
        train_batch_size=batch_size,
    )
    pipeline = CustomDDPMPipeline.from_pretrained(folder).to(state.device)
    reconstruct(folder, 0.1)  # without snapshots this fails before anything is drawn
    data, validation_data = open_data(config, state)
    reference = open_reference(config, state, data, validation_data)

    def measured(sigma_rel: float | None) -> Measured:
        scores = reference.scores(pipeline.unet, pipeline.scheduler, data.id2label, state.is_main_process)
        return Measured(sigma_rel, scores)

    yield measured(None)
    for sigma_rel in sigma_rels:
        try:
            weights = reconstruct(folder, sigma_rel)
        except ValueError as error:
            yield Measured(sigma_rel, None, str(error))
            continue
        pipeline.unet.load_state_dict(weights)
        yield measured(sigma_rel)


def save_average(folder: Path, best: Measured, output_dir: Path) -> None:
    """Save the pipeline of a run with one of its averages, and its model card with the metrics of that average.

    Args:
        folder: output folder of the run.
        best: the average.
        output_dir: folder to write; that of the run replaces the weights there.
    """
    pipeline = CustomDDPMPipeline.from_pretrained(folder)
    if best.sigma_rel is not None:
        pipeline.unet.load_state_dict(reconstruct(folder, best.sigma_rel))
        # What was measured with the former weights.
        config = pipeline.scheduler.config
        pipeline.scheduler = type(pipeline.scheduler).from_config(config, tuned=None, prediction_errors=None)
    pipeline.to(torch.device("cpu")).save_pretrained(output_dir)
    config = parse_config(["--config", str(folder / CONFIG_FILE)])
    step = max((line["step"] for line in read_metrics(folder)), default=0)
    facts = facts_of_card([{**(best.scores or {}), "step": step}])
    if best.sigma_rel is not None:
        facts["evaluation"] = {**facts.get("evaluation", {}), "average": f"post-hoc of length {best.sigma_rel:g}"}
    recipe = dataclasses.asdict(config)
    about = {"dataset": config.dataset_name or config.train_data_dir, "base_model": config.init_from}
    write_model_card(output_dir, {**about, "recipe": recipe, "steps": step, **facts})
