"""Metrics of pictures that the averaged weights draw during training: --eval_steps.

The pictures are drawn with DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095), which needs few steps, so that the numbers
compare the steps of one run. They are not those of the grid's sampler, and each line of metrics names the sampler.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from ..config import TrainingConfig
from ..data.base import ImageData
from ..evaluation.collect import FeatureSet, collect, collect_cached
from ..evaluation.evaluate import compare
from ..evaluation.features import Features, load_features
from ..evaluation.pictures import DatasetPictures, ModelPictures
from ..evaluation.records import SCORES, read_metrics
from ..pipelines import CustomDDPMPipeline
from ..sampling import fast_sampler
from ..scheduler import CustomDDPMScheduler
from ..unet import CustomUNet2DModel
from .launch import get_logger
from .metrics import MetricsLogger
from .state import TrainingState

logger = get_logger(__name__)

SAMPLING_STEPS = 20


@dataclass(frozen=True)
class Reference:
    """What drawn pictures are compared with.

    Args:
        features: the feature extractor.
        known: features of the reference pictures.
        description: which pictures these are, without a path.
        num_images: number of pictures to draw.
        seed: seed of the first of them; the next has the next.
        batch_size: pictures that a process draws at once.
        guidance_scale: of a class-conditional model.
    """

    features: Features
    known: FeatureSet
    description: str
    num_images: int
    seed: int
    batch_size: int
    guidance_scale: float

    def scores(
        self, unet: CustomUNet2DModel, scheduler: CustomDDPMScheduler, id2label: dict[int, str] | None, main: bool
    ) -> dict[str, Any] | None:
        """Draw pictures with a model, and compare them; must be called by all processes.

        Args:
            unet: the model, in evaluation mode.
            scheduler: its noise scheduler.
            id2label: names of the classes; they are drawn in turn.
            main: whether this is the main process.

        Returns:
            On the main process: name -> value, of the metrics that were not refused, and under `SCORES` what they were
            measured with.
        """
        pipeline = CustomDDPMPipeline(unet, fast_sampler(scheduler), id2label=id2label)
        pipeline.set_progress_bar_config(leave=False, desc="Evaluating", disable=True)
        steps = min(SAMPLING_STEPS, len(scheduler))
        options: dict[str, Any] = {"num_inference_steps": steps}
        if id2label:
            options["guidance_scale"] = self.guidance_scale
        drawn = ModelPictures(pipeline, "the drawn pictures", self.num_images, self.seed, options)
        found = collect(drawn, [self.features], self.batch_size)[0]
        if not main:
            return None
        metrics = [metric for metric in compare(found, self.known, self.features) if metric.value is not None]
        about = {
            "num_images": self.num_images,
            "sampler": f"DPM-Solver++, {steps} steps",
            "reference": f"{self.known.moments.count:,} {self.description}",
            "best_by": metrics[0].name,  # the Fréchet distance, unless it was refused for too few pictures
            "standard_errors": {metric.name: metric.standard_error for metric in metrics},
        }
        return {**{metric.name: metric.value for metric in metrics}, SCORES: about}


def open_reference(
    config: TrainingConfig, state: Accelerator | PartialState, data: ImageData, validation_data: ImageData | None
) -> Reference:
    """The held-out pictures of a run, or the training pictures if it has none, in the space of --eval_features.

    Must be called by all processes. The features of the reference are computed here, or read from the cache.

    Raises:
        ValueError: there are no such features, or too few pictures for them.
    """
    with state.local_main_process_first():  # one process of each machine downloads
        features = load_features(config.eval_features, state.device)
    held_out = validation_data is not None
    pictures = DatasetPictures(data if validation_data is None else validation_data, "the reference")
    known = collect_cached(pictures, features, config.train_batch_size, cache_dir=config.cache_dir)
    count, dim = known.moments.count, known.moments.dim
    if count <= dim:
        raise ValueError(
            f"--eval_features {config.eval_features} are {dim} numbers for a picture, which needs more than {dim} "
            f"{'held-out' if held_out else 'training'} pictures to compare with; there are {count}"
        )
    description = f"held-out pictures, split {config.validation_split}" if held_out else "training pictures"
    return Reference(
        features,
        known,
        description,
        config.eval_num_images,
        config.seed,
        config.train_batch_size,
        config.guidance_scale,
    )


@dataclass
class Scores:
    """Computes the metrics of a run at its steps, each step once.

    Args:
        accelerator, state, scheduler, metrics: of the run.
        output_dir: output folder of the run.
        id2label: names of the classes; None without classes.
        reference: what is drawn, and what it is compared with.
    """

    accelerator: Accelerator
    state: TrainingState
    scheduler: CustomDDPMScheduler
    metrics: MetricsLogger
    output_dir: Path
    id2label: dict[int, str] | None
    reference: Reference

    def write(self, step: int) -> None:
        """Write the metrics after optimiser step `step`, unless that was done before the run was interrupted.

        Must be called by all processes.
        """
        main = self.accelerator.is_main_process
        done = main and any(line["step"] == step and SCORES in line for line in read_metrics(self.output_dir))
        if broadcast_object_list([done])[0]:
            return
        with self.state.averaged() as unet:
            found = self.reference.scores(unet, self.scheduler, self.id2label, main)
        line = broadcast_object_list([found])[0]
        self.metrics.write({"step": step, **line})
        best_by = line[SCORES]["best_by"]
        logger.info(f"step {step}: {best_by} {line[best_by]:.4g} of {self.reference.num_images:,} pictures")
        self.accelerator.wait_for_everyone()


def build_scores(
    config: TrainingConfig,
    state: TrainingState,
    scheduler: CustomDDPMScheduler,
    metrics: MetricsLogger,
    data: ImageData,
    validation_data: ImageData | None,
) -> Scores | None:
    """The metrics of a run; None without --eval_steps. See `open_reference` for the errors."""
    if config.eval_steps is None:
        return None
    reference = open_reference(config, state.accelerator, data, validation_data)
    return Scores(state.accelerator, state, scheduler, metrics, Path(config.output_dir), data.id2label, reference)
