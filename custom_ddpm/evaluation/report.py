"""Measurements of the report on a run, each kept as JSON in the run's folder.

A part that was measured with the same weights and settings is read from its file. The pictures that a model draws are
kept in blocks, and the samplers one by one, so that an interrupted report goes on where it stopped.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..config import TrainingConfig
from ..data.base import fingerprint
from ..flags import parse_config
from ..hub.card import public_name
from ..messages import one_line
from ..pipelines.pipeline_custom_ddpm import CustomDDPMPipeline
from ..sampling import clipping, process_state, untuned
from ..training.parts import open_data
from .bits_per_dim import as_json as bits_as_json
from .bits_per_dim import pipeline_bits_per_dim
from .collect import collect, collect_cached
from .evaluate import evaluate, frechet_metrics, frechet_name
from .features import Features, load_features
from .memorization import PixelFeatures, draw_distances, draw_neighbours, gather_images, memorization
from .memorization import as_json as memorization_as_json
from .pictures import ArrayPictures, DatasetPictures, ModelPictures
from .records import CONFIG_FILE, read_json, write_json

FOLDER = "report"  # in the run's folder
VERSION = 1  # to be increased with every change of what is measured
BLOCK = 256  # pictures in a file
STEPS = (5, 10, 20, 50)  # network evaluations of the comparison of samplers
MAX_BY_STEPS = 2500  # pictures of each of its points: more than Inception has features
DISTANCES_FILE, NEIGHBOURS_FILE = "distances.png", "neighbours.png"
# Name -> class of diffusers, or None for the run's own scheduler, and options of the pipeline's call.
SAMPLERS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "ancestral (DDPM)": (None, {"eta": 1.0}),
    "DDIM": (None, {"eta": 0.0}),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}
TUNED = "as tuned"  # the sampler of a model that `custom-ddpm tune` has measured


@dataclass(frozen=True)
class ReportSettings:
    """What is measured, and with how many pictures.

    Args:
        num_images: pictures that the model draws, and held-out pictures, at most.
        seed: of the first picture, and of the noise of bits per dimension.
        num_inference_steps: sampling steps; None: as the run's grids, or 100 if these take all T.
        eta: 1: DDPM, 0: DDIM; None: the scheduler's own.
        guidance_scale: classifier-free guidance; 1 is none.
        features: as in `load_features`; the samplers are compared, and copies are looked for, with the first.
        num_reference_images: training pictures to compare with; all if None.
        num_timesteps: of bits per dimension, for each picture.
        against: dataset or folder that takes the place of the run's own, if that is elsewhere now.
        split, validation_split: of the training and of the held-out pictures; None: as the run's.
        batch_size: pictures at once.
        cache_dir: as in `open_images`; None: as the run's.
    """

    num_images: int = 256
    seed: int = 0
    num_inference_steps: int | None = None
    eta: float | None = None
    guidance_scale: float = 1.0
    features: tuple[str, ...] = ("random",)
    num_reference_images: int | None = None
    num_timesteps: int = 50
    against: str | None = None
    split: str | None = None
    validation_split: str | None = None
    batch_size: int = 64
    cache_dir: str | None = None


class Missing(ValueError):
    """A part that cannot be had.

    Args:
        reason: key of `report_words.REASONS`.
        detail: the error, if there was one.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} {detail}")
        self.reason, self.detail = reason, detail


class Report:
    """The measurements of a run, each made when it is asked for.

    Args:
        run: output folder of the run.
        settings: what is measured.

    Raises:
        ValueError: the folder is not that of a run, or a setting is out of range.
    """

    def __init__(self, run: str | Path, settings: ReportSettings):
        self.run, self.settings = Path(run), settings
        self.folder = self.run / FOLDER
        for name in ("num_images", "batch_size", "num_timesteps", "num_inference_steps"):
            value = getattr(settings, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 1")
        if not settings.features:
            raise ValueError("--features is empty; give at least one, such as random")
        for name in (CONFIG_FILE, "model_index.json"):
            if not (self.run / name).is_file():
                raise ValueError(f"{run} holds no {name}: it is not the output folder of a run")
        self.config: TrainingConfig = parse_config(["--config", str(self.run / CONFIG_FILE)])

    # ---- what is measured with ----

    @cached_property
    def pipeline(self) -> CustomDDPMPipeline:
        """The run's model, on its device."""
        pipeline = CustomDDPMPipeline.from_pretrained(str(self.run)).to(process_state().device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @cached_property
    def extractors(self) -> list[Features]:
        """The features, in their order."""
        return [load_features(name, process_state().device) for name in self.settings.features]

    @cached_property
    def model_key(self) -> str:
        """Equal for equal weights, schedule and classes."""
        files = [*sorted((self.run / "unet").glob("*.safetensors")), self.run / "model_index.json"]
        digests = []
        for file in [*files, self.run / "scheduler" / "scheduler_config.json"]:
            with file.open("rb") as opened:
                digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
        return fingerprint(digests)

    @cached_property
    def _opened(self) -> tuple[DatasetPictures, DatasetPictures | None]:
        config, given = self.config, self.settings
        place = "dataset_name" if config.train_data_dir is None else "train_data_dir"
        changes: dict[str, Any] = {"center_crop": True}
        for name, value in (
            (place, given.against),
            ("split", given.split),
            ("validation_split", given.validation_split),
            ("cache_dir", given.cache_dir),
        ):
            if value is not None:
                changes[name] = value
        config = dataclasses.replace(config, **changes)
        shown_name = public_name(config.dataset_name or config.train_data_dir)[0]
        try:
            if config.streaming:
                raise Missing("stream")
            data, held_out = open_data(config, process_state())
        except (ValueError, OSError) as error:
            raise error if isinstance(error, Missing) else Missing("no_data", one_line(error)) from error
        training = DatasetPictures(data, f"{shown_name}, {config.split}", given.num_reference_images)
        if held_out is None:
            return training, None
        return training, DatasetPictures(held_out, f"{shown_name}, {config.validation_split}", given.num_images)

    @property
    def training(self) -> DatasetPictures:
        """The training pictures, cropped at the centre; `Missing` if they cannot be opened."""
        return self._opened[0]

    @property
    def held_out(self) -> DatasetPictures:
        """The held-out pictures; `Missing` if there are none."""
        if self._opened[1] is None:
            raise Missing("no_held_out")
        return self._opened[1]

    @property
    def sampling_options(self) -> dict[str, Any]:
        """Arguments of the pipeline's call for the pictures of the metrics."""
        given, T = self.settings, self.config.ddpm_num_steps
        steps = given.num_inference_steps or self.config.ddpm_num_inference_steps or min(T, 100)
        options: dict[str, Any] = {"num_inference_steps": steps}
        if given.eta is not None:
            options["eta"] = given.eta
        if given.guidance_scale != 1.0:
            options["guidance_scale"] = given.guidance_scale
        return options

    # ---- pictures of the model ----

    def _drawn_blocks(self) -> Iterator[torch.Tensor]:
        """The drawn pictures, in blocks that are kept as files."""
        given, options = self.settings, self.sampling_options
        folder = self.folder / f"pictures-{fingerprint(VERSION, self.model_key, given.seed, sorted(options.items()))}"
        with tqdm(total=given.num_images, desc="Drawing", unit="picture", leave=False) as bar:
            for start in range(0, given.num_images, BLOCK):
                count = min(BLOCK, given.num_images - start)
                file = folder / f"{given.seed + start}-{count}.npy"
                if not file.is_file():
                    folder.mkdir(parents=True, exist_ok=True)
                    pictures = ModelPictures(self.pipeline, "", start + count, given.seed, options)
                    images = []
                    for numbers, batch, _ in pictures.batches(given.batch_size, start):
                        images.append(batch)
                        bar.update(len(numbers))
                    partial = file.with_name(f".{file.name}.tmp.npy")
                    np.save(partial, torch.cat(images).numpy())
                    partial.replace(file)
                bar.n = start + count
                bar.refresh()
                yield torch.from_numpy(np.load(file, allow_pickle=False))

    @cached_property
    def drawn(self) -> ArrayPictures:
        """The pictures of the metrics."""
        first, count = self.settings.seed, self.settings.num_images
        words = ", ".join(f"{name} {value:g}" for name, value in self.sampling_options.items())
        return ArrayPictures(torch.cat(list(self._drawn_blocks())), f"seeds {first} to {first + count - 1}, {words}")

    # ---- the parts ----

    def _part(self, name: str, key: Any, measure: Callable[[], Mapping[str, Any]], *files: str) -> dict[str, Any]:
        """A part from its file, or measured; {"missing": reason, "detail": error} if it cannot be had."""
        given = dataclasses.asdict(self.settings)
        data = [given[option] for option in ("against", "split", "validation_split", "num_reference_images", "seed")]
        key = fingerprint(VERSION, self.model_key, data, dataclasses.asdict(self.config), key)
        file = self.folder / f"{name}.json"
        saved = read_json(file)
        if saved is not None and saved.get("key") == key and all((self.folder / each).is_file() for each in files):
            return saved
        print(f"measuring: {name.replace('_', ' ')}", flush=True)
        self.folder.mkdir(exist_ok=True)
        try:
            result = {"key": key, **measure()}
        except Missing as error:
            return {"missing": error.reason, "detail": error.detail}
        except (ValueError, OSError, ArithmeticError, RuntimeError, MemoryError) as error:
            return {"missing": "failed", "detail": one_line(error)}
        write_json(file, result)
        return result

    @property
    def _feature_keys(self) -> list[str | None]:
        return [each.identity or each.name for each in self.extractors]

    def metrics(self) -> dict[str, Any]:
        """FD or FID, KID, precision and recall; see `evaluate`."""
        given = self.settings

        def measure() -> dict[str, Any]:
            reference = self.training  # opened first: without it no pictures are drawn
            return evaluate(
                self.drawn, reference, self.extractors, batch_size=given.batch_size, cache_dir=given.cache_dir
            )

        return self._part("metrics", (given.num_images, self.sampling_options, self._feature_keys), measure)

    def bits_per_dim(self) -> dict[str, Any]:
        """Bits per dimension of held-out pictures; see `bits_per_dim`."""
        given = self.settings
        steps = min(given.num_timesteps, self.config.ddpm_num_steps)

        def measure() -> dict[str, Any]:
            held_out = self.held_out
            found = pipeline_bits_per_dim(
                self.pipeline, held_out, num_timesteps=steps, batch_size=given.batch_size, seed=given.seed
            )
            return {"variances": bits_as_json(found), "pictures": held_out.description, "num_timesteps": steps}

        return self._part("bits_per_dim", (given.num_images, steps), measure)

    def memorization(self) -> dict[str, Any]:
        """Distances to the training pictures in pixels and in the first features, and two figures."""
        given = self.settings
        features: list[Features] = [PixelFeatures(), self.extractors[0]]

        def measure() -> dict[str, Any]:
            held_out, whole = self.held_out, dataclasses.replace(self.training, limit=None)
            others, drawn = gather_images(held_out, given.batch_size), self.drawn.images
            results = {
                each.name: memorization(drawn, others, whole, each, batch_size=given.batch_size) for each in features
            }
            draw_distances(results, self.folder / DISTANCES_FILE)
            draw_neighbours(drawn, results[features[1].name], whole, self.folder / NEIGHBOURS_FILE, rows=8)
            spaces = memorization_as_json(results)
            return {"spaces": spaces, "neighbours": features[1].name, "training": whole.description}

        key = (given.num_images, self.sampling_options, self._feature_keys[0])
        return self._part("memorization", key, measure, DISTANCES_FILE, NEIGHBOURS_FILE)

    @property
    def samplers(self) -> list[str]:
        """Names of those that are compared: `SAMPLERS`, and `TUNED` for a model that was tuned."""
        return [*SAMPLERS, *([TUNED] if self.pipeline.scheduler.config.get("tuned") else [])]

    def by_steps(self) -> dict[str, Any]:
        """The Fréchet distance at several numbers of network evaluations, for each of `samplers`.

        Nothing is drawn if there are too few pictures for the features. A sampler that fails has no value; `TUNED` has
        no points where nothing was tuned.
        """
        given, features = self.settings, self.extractors[0]
        count = min(given.num_images, MAX_BY_STEPS)
        steps = [n for n in STEPS if n <= self.config.ddpm_num_steps]
        key = (count, given.guidance_scale, self._feature_keys[0], steps)
        points_file = self.folder / "by_steps_points.json"

        def measure() -> dict[str, Any]:
            reference = collect_cached(self.training, features, given.batch_size, cache_dir=given.cache_dir)
            if count <= (dim := reference.moments.dim):  # the covariance would be singular, see `check_rank`
                raise ValueError(f"--num_images is {given.num_images}; {dim} features need more than {dim} pictures")
            points_key = fingerprint(VERSION, self.model_key, key, self.training.fingerprint, given.seed)
            saved = read_json(points_file) or {}
            points = saved.get("points", []) if saved.get("key") == points_key else []
            done = {(point["sampler"], point["steps"]) for point in points}
            tuned_for = self.pipeline.scheduler.tuned_for
            every = [(name, n) for name in self.samplers for n in steps if name != TUNED or tuned_for(n) is not None]
            left = [point for point in every if point not in done]
            for name, n in tqdm(left, desc="Samplers", unit="point", leave=False):
                value, error, note = self._point(name, n, count, reference)
                points.append({"sampler": name, "steps": n, "value": value, "error": error, "note": note})
                write_json(points_file, {"key": points_key, "points": points})
            return {"metric": frechet_name(features), "num_images": count, "points": points}

        return self._part("by_steps", key, measure)

    def _point(self, name: str, n: int, count: int, reference: Any) -> tuple[float | None, float | None, str]:
        import diffusers

        scheduler, options = SAMPLERS.get(name, (None, {}))
        pipeline, features, given = self.pipeline, self.extractors[0], self.settings
        options = {**options, "num_inference_steps": n}
        if given.guidance_scale != 1.0:
            options["guidance_scale"] = given.guidance_scale
        try:
            if name != TUNED:
                own = trained = pipeline.scheduler
                if scheduler is not None:
                    own = getattr(diffusers, scheduler).from_config(untuned(trained.config), **clipping(trained))
                elif trained.config.get("tuned"):  # which is a sampler of its own here
                    own = trained.from_config(trained.config, tuned=None, prediction_errors=None)
                pipeline = CustomDDPMPipeline(pipeline.unet, own, id2label=pipeline.config.id2label)
                pipeline.set_progress_bar_config(disable=True)
            pictures = ModelPictures(pipeline, f"{name}, {n} steps", count, given.seed, options)
            found = collect(pictures, [features], given.batch_size)[0]
        except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError, RuntimeError) as error:
            return None, None, one_line(error)
        metric = frechet_metrics(found, reference, frechet_name(features))[0]
        finite = metric.value is not None and math.isfinite(metric.value)
        return (metric.value, metric.standard_error, "") if finite else (None, None, metric.note)
