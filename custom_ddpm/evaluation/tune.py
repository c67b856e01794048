"""The best way to make a number of steps with a model: orders, η and spacings measured by drawn pictures, and saved.

`scheduler.CustomDDPMScheduler` takes what is saved: `prediction_errors` and `tuned`. Torch is imported by the command,
not for --help.
"""

import argparse
import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..pipelines.pipeline_custom_ddpm import CustomDDPMPipeline
    from ..training.scores import Reference

STEPS = (5, 8, 10, 15, 20, 50)
SPACINGS = ("optimal", "trailing")
ETAS = (0.0, 1.0)
ORDERS = ("1", "2", "2c", "3")  # "2c": with the corrector
FINALISTS = 4  # that are still measured where steps are many, and pictures slow
MANY = 12  # steps
FILE = "tuned.json"
VERSION = 1  # to be increased with every change of what is measured
Command = Callable[[str, Callable[[Any], None]], argparse.ArgumentParser]


class Measured(NamedTuple):
    """A candidate for a number of steps, as an entry of the scheduler's `tuned`, and its Fréchet distance."""

    entry: str
    distance: float

    @property
    def steps(self) -> int:
        """The number of steps."""
        return int(self.entry.split()[0])

    @property
    def how(self) -> str:
        """The entry without the number of steps."""
        return self.entry.split(maxsplit=1)[1]


def measure_errors(
    pipeline: "CustomDDPMPipeline", data: Any, num_images: int, batch_size: int, seed: int
) -> list[float]:
    """E|x_0 − x̂_0(x_t)|² per pixel at every t, on pictures of the training data.

    Args:
        pipeline: the model, on its device.
        data: the dataset, `ImageData`.
        num_images: number of its pictures.
        batch_size: pictures at once.
        seed: of the noise.
    """
    import torch

    from ..data.pixels import normalise
    from ..likelihood import estimate_original_sample_variances

    images, labels = data.take(num_images)
    device = pipeline.unet.device

    @torch.no_grad()
    def model(x_t: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None) -> object:
        return pipeline.unet(x_t, t, **({} if class_labels is None else {"class_labels": class_labels}))

    batches = (
        (
            normalise(images[start : start + batch_size].to(device)),
            None if labels is None else labels[start : start + batch_size].to(device),
        )
        for start in range(0, len(images), batch_size)
    )
    generator = torch.Generator(device).manual_seed(seed)
    return estimate_original_sample_variances(model, pipeline.scheduler, batches, generator=generator)


def _distance(pipeline: "CustomDDPMPipeline", reference: "Reference", entry: str, guidance_scale: float) -> float:
    """Fréchet distance of the pictures that a model draws with one setting; the same on every process."""
    from ..pipelines import pipeline_custom_ddpm
    from ..scheduler import CustomDDPMScheduler
    from .collect import collect
    from .distances import frechet_distance
    from .pictures import ModelPictures

    scheduler = pipeline.scheduler
    pipeline.scheduler = CustomDDPMScheduler.from_config(scheduler.config, tuned=[entry])
    n = int(entry.split()[0])
    pipeline_custom_ddpm._SAID.add((n, str(pipeline.scheduler.tuned_for(n))))  # the command says it itself
    options: dict[str, Any] = {"num_inference_steps": n}
    if guidance_scale != 1.0:
        options["guidance_scale"] = guidance_scale
    try:
        drawn = ModelPictures(pipeline, "the drawn pictures", reference.num_images, reference.seed, options)
        found = collect(drawn, [reference.features], reference.batch_size)[0]
    finally:
        pipeline.scheduler = scheduler
    return float(frechet_distance(found.moments, reference.known.moments))


def num_candidates(steps: Sequence[int]) -> dict[int, int]:
    """How many candidates are measured at each number of steps, ascending."""
    every = len(ORDERS) * len(ETAS) * len(SPACINGS)
    return {n: FINALISTS if n != steps[0] and n >= MANY else every for n in steps}


def measure(
    pipeline: "CustomDDPMPipeline",
    reference: "Reference",
    steps: Sequence[int],
    guidance_scale: float,
    known: Mapping[str, float],
) -> Iterator[Measured]:
    """Measure the candidates for every number of steps; must be iterated to its end by all processes.

    All draw with the same seeds. Where steps are many only those that were the best at the number before are measured.

    Args:
        pipeline: the model; its scheduler has `prediction_errors`.
        reference: what is drawn, and what it is compared with.
        steps: numbers of steps, ascending.
        guidance_scale: of a class-conditional model.
        known: distances that were measured before, by entry.
    """
    candidates = [f"{order} {eta:g} {spacing}" for order, eta, spacing in itertools.product(ORDERS, ETAS, SPACINGS)]
    results: list[Measured] = []
    for n, count in num_candidates(steps).items():
        if count < len(candidates):
            candidates = [each.how for each in sorted(results, key=lambda each: each.distance)][:count]
        results = []
        for candidate in candidates:
            entry = f"{n} {candidate}"
            value = known.get(entry)
            value = _distance(pipeline, reference, entry, guidance_scale) if value is None else value
            results.append(Measured(entry, value))
            yield results[-1]


def best_of(results: Sequence[Measured]) -> list[Measured]:
    """The best for each number of steps, ascending."""
    every = sorted({each.steps for each in results})
    return [min((each for each in results if each.steps == n), key=lambda each: each.distance) for n in every]


def _open(args: argparse.Namespace) -> tuple["CustomDDPMPipeline", "Reference", Any, list[int]]:
    """The model, what its pictures are compared with, its training data and the numbers of steps."""
    from ..flags import parse_config
    from ..pipelines.pipeline_custom_ddpm import CustomDDPMPipeline
    from ..sampling import process_state
    from ..scheduler import CustomDDPMScheduler
    from ..training.parts import open_data
    from ..training.scores import open_reference
    from .records import CONFIG_FILE

    state, folder = process_state(), Path(args.folder)
    config = parse_config(["--config", str(folder / CONFIG_FILE)])
    given = {"dataset_name": args.against, "train_data_dir": None} if args.against else {}
    changes = {"train_batch_size": args.batch_size, "eval_num_images": args.num_images, "seed": args.seed}
    try:
        config = dataclasses.replace(config, eval_features=args.features or config.eval_features, **changes, **given)
    except ValueError as error:
        text = str(error).replace("--eval_num_images", "--num_images").replace("--train_batch_size", "--batch_size")
        raise ValueError(text) from None
    pipeline = CustomDDPMPipeline.from_pretrained(folder).to(state.device)
    pipeline.set_progress_bar_config(disable=True)
    if not isinstance(pipeline.scheduler, CustomDDPMScheduler):
        name = type(pipeline.scheduler).__name__
        raise ValueError(f"the scheduler of {folder} is {name}; only CustomDDPMScheduler can be tuned")
    steps = sorted({n for n in args.steps if n < len(pipeline.scheduler)})
    if not steps or steps[0] < 1:
        raise ValueError(f"--steps is {args.steps}; it must have numbers from 1 to {len(pipeline.scheduler) - 1}")
    data, validation_data = open_data(config, state)
    reference = open_reference(config, state, data, validation_data)
    dim = reference.known.moments.dim
    if args.num_images <= dim:  # with a singular covariance the distance is mostly bias
        raise ValueError(
            f"--num_images is {args.num_images}; the Fréchet distance in {dim} features needs more than {dim} pictures"
        )
    return pipeline, reference, data, steps


def _key(pipeline: "CustomDDPMPipeline", reference: "Reference", data: Any, args: argparse.Namespace) -> str:
    """Equal where the distances are: for equal weights, noise schedules, reference pictures and settings."""
    from ..data.base import fingerprint

    weights = [
        hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(args.folder, "unet").glob("*.safetensors")
    ]
    schedule = {
        key: value for key, value in pipeline.scheduler.config.items() if key not in ("tuned", "prediction_errors")
    }
    known = [reference.features.identity or reference.features.name, reference.known.moments.mean.tolist()]
    settings = [args.num_images, args.num_error_images, args.guidance_scale, args.seed, data.fingerprint]
    return fingerprint(VERSION, sorted(weights), sorted(map(str, schedule.items())), known, settings)


def _time_left(seconds: float) -> str:
    """In words, rounded."""
    return f"about {seconds / 60:.0f} minutes" if seconds >= 90 else f"about {seconds:.0f} seconds"


def tune(args: argparse.Namespace) -> None:
    """Measure how a model draws best in 5 to 50 steps, and save that in its scheduler's configuration."""
    from accelerate.utils import broadcast_object_list

    from ..sampling import process_state
    from ..scheduler import CustomDDPMScheduler
    from .evaluate import frechet_name
    from .records import read_json, write_json

    pipeline, reference, data, steps = _open(args)
    folder, main = Path(args.folder), process_state().is_main_process
    key = _key(pipeline, reference, data, args)
    stored = (read_json(folder / FILE) or {}) if main else {}
    if stored.get("key") != key:
        stored = {}
    metric = frechet_name(reference.features)
    against = f"{reference.known.moments.count:,} {reference.description}"
    if main:
        print(f"{metric}, {args.num_images:,} pictures against {against}")
        if not stored:
            print(f"first the error of the model on {args.num_error_images:,} training pictures", flush=True)
    stored = broadcast_object_list([stored])[0]
    errors = stored.get("prediction_errors") or measure_errors(
        pipeline, data, args.num_error_images, args.batch_size, args.seed
    )
    plain = CustomDDPMScheduler.from_config(pipeline.scheduler.config, prediction_errors=errors, tuned=None)
    pipeline.scheduler = plain
    about = {"key": key, "num_images": args.num_images, "guidance_scale": args.guidance_scale, "reference": against}
    about |= {"features": reference.features.name, "metric": metric, "prediction_errors": errors}
    known: dict[str, float] = stored.get("distances", {})
    counts, results, spent, worked = num_candidates(steps), [], 0.0, 0
    left, start = sum(n * count for n, count in counts.items()), time.monotonic()
    for each in measure(pipeline, reference, steps, args.guidance_scale, dict(known)):
        results.append(each)
        left -= each.steps
        if each.entry not in known:
            spent, worked = time.monotonic() - start, worked + each.steps
            known[each.entry] = each.distance
        if main:
            when = f", {_time_left(spent / worked * left)} left" if worked and left else ""
            print(
                f"{each.entry:>20}  {each.distance:<8.4g}  {len(results)} of {sum(counts.values())}{when}", flush=True
            )
            write_json(folder / FILE, {**about, "distances": known})
    if main:
        best = best_of(results)
        tuned = [each.entry for each in best]
        CustomDDPMScheduler.from_config(plain.config, tuned=tuned).save_pretrained(folder / "scheduler")
        write_json(folder / FILE, {**about, "distances": known, "tuned": tuned})
        print(*(f"best: {each.entry:>20}  {each.distance:.4g}" for each in best), sep="\n")
        print(f"saved in {folder / 'scheduler'}; all in {folder / FILE}")


def add_tune(command: Command) -> None:
    """Add the command to a parser; `command` adds one with its function and returns its parser."""
    sub = command("tune", tune)
    sub.add_argument("folder", help="output folder of a run")
    sub.add_argument("--steps", nargs="+", type=int, default=list(STEPS), help="numbers of steps")
    words = "as --eval_features of the training; those of the run if not given"
    sub.add_argument("--features", default=None, help=words)
    sub.add_argument("--num_images", type=int, default=512, help="pictures to draw with each candidate")
    sub.add_argument(
        "--num_error_images", type=int, default=256, help="training pictures that the error is measured on"
    )
    sub.add_argument("--guidance_scale", type=float, default=1.0, help="classifier-free guidance; 1 is none")
    sub.add_argument("--seed", type=int, default=0, help="seed of the first picture; the next has the next")
    sub.add_argument("--against", default=None, help="where the run's dataset or folder of pictures is now")
    sub.add_argument("--batch_size", type=int, default=64, help="pictures at once")
