"""The command `sample`: its flags, what they mean for a model, and the folder that it makes.

Torch is imported by the command, not for --help. It runs on several processes as well:
`accelerate launch -m custom_ddpm.cli sample …`.
"""

import argparse
import dataclasses
import difflib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .messages import one_line, shown

if TYPE_CHECKING:
    from .pipelines.pipeline_custom_ddpm import CustomDDPMPipeline
    from .sample_set import SampleSet

MAX_SEED = 2**63
MOVING_PICTURES = 16  # that --trajectory shows
MOVING_STATES, STRIP_STATES = 40, 11


@contextmanager
def _sampling_errors(pipeline: "CustomDDPMPipeline", batch_size: int) -> Iterator[None]:
    """Errors that are not of this package, as ValueError: no memory, and a sampler of diffusers that fails."""
    import torch

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ValueError(f"out of memory with --batch_size {batch_size}; choose a smaller one") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" in str(error):  # of torch's allocator for CPUs
            raise ValueError(f"out of memory with --batch_size {batch_size}; choose a smaller one") from error
        if not type(pipeline.scheduler).__module__.startswith("diffusers."):
            raise
        sampler = type(pipeline.scheduler).__name__
        raise ValueError(f"diffusers' {sampler} fails with these settings: {one_line(error)}") from error


def _meant(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(known)}"


def build_sampler(name: str | None, words: Sequence[str], trained: Any) -> Any:
    """The scheduler to sample with, of the noise schedule that the model was trained with.

    Args:
        name: class of diffusers or `CustomDDPMScheduler`; None: the model's own.
        words: options as NAME=VALUE, the value as in YAML.
        trained: the model's scheduler.

    Raises:
        ValueError: an unknown class or option, or a value that it does not take.
    """
    import diffusers
    import yaml

    from .hub.settings import config_problem, stock_scheduler
    from .sampling import untuned
    from .scheduler import CustomDDPMScheduler

    own = CustomDDPMScheduler.__name__
    cls: Any = type(trained) if name is None else CustomDDPMScheduler if name == own else stock_scheduler(name)
    if cls is None:
        known = [own, *(each for each in dir(diffusers.schedulers) if each.endswith("Scheduler"))]
        known = [each for each in known if each == own or stock_scheduler(each) is not None]
        raise ValueError(
            f"--scheduler is {shown(str(name))}, which is no scheduler of diffusers{_meant(str(name), known)}"
        )
    settings = [key for key in inspect.signature(cls.__init__).parameters if key not in ("self", "kwargs")]
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--scheduler_options has {shown(word)}; an option is NAME=VALUE")
        if key not in settings:
            raise ValueError(f"--scheduler_options has {shown(key)}, which {cls.__name__} lacks{_meant(key, settings)}")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--scheduler_options {shown(word)} cannot be read: {one_line(error)}") from error
    if problem := config_problem("scheduler", options, cls):
        raise ValueError(f"--scheduler_options of {cls.__name__}: {problem}")
    try:
        # A scheduler of diffusers would warn of the settings that only ours has.
        config = trained.config if cls.__name__ == own else untuned(trained.config)
        return cls.from_config(config, **options)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"--scheduler {cls.__name__} does not take these settings: {one_line(error)}") from error


# ---- labels ----


def spread(counts: Sequence[int], num_images: int) -> list[int]:
    """Labels in the shares of counts; the first n of them have the shares as well, for every n.

    Args:
        counts: pictures of each label; not all 0.
        num_images: number of labels.

    Returns:
        One label per picture: picture i has the quantile frac((i + 1/2) φ) of the labels, φ the golden ratio's
        fractional part, whose multiples fill [0, 1) evenly.
    """
    import numpy as np

    golden = (5**0.5 - 1) / 2
    where = (np.arange(num_images) + 0.5) * golden % 1
    shares = np.cumsum(counts) / np.sum(counts)
    return np.minimum(np.searchsorted(shares, where, side="right"), len(counts) - 1).tolist()


def _training_counts(model: str) -> list[int]:
    """Pictures of each class in the data that a run was trained on."""
    import numpy as np

    from .evaluation.records import CONFIG_FILE
    from .flags import parse_config
    from .sampling import process_state
    from .training.parts import open_data

    file = Path(model, CONFIG_FILE)
    if not file.is_file():
        raise ValueError(f"--class_labels is as_data, but {model} has no {CONFIG_FILE} that names its training data")
    config = dataclasses.replace(parse_config(["--config", str(file)]), validation_split=None)
    counts = open_data(config, process_state())[0].label_counts()
    if counts is None:
        raise ValueError("--class_labels is as_data, but the training data are a stream, or have no classes")
    return np.asarray(counts).tolist()


def _labels(pipeline: "CustomDDPMPipeline", args: argparse.Namespace) -> list[int] | None:
    """The label of each picture; None for a model without classes."""
    words: list[str] = args.class_labels or ["uniform"]
    names, embeddings = pipeline.config.id2label or {}, pipeline.unet.config.num_class_embeds
    if not embeddings:
        if args.class_rows:
            raise ValueError("--class_rows is for models with classes, and this one has none; leave it out")
        pipeline._check_labels(args.class_labels, len(words), args.guidance_scale)
        return None
    special = words[0] if len(words) == 1 and words[0] not in names.values() else None
    if special == "as_data":
        counts = _training_counts(args.model)
        if len(counts) != (len(names) or embeddings):
            raise ValueError(
                f"--class_labels is as_data, but the data have {len(counts)} classes, the model {len(names)}"
            )
        return spread(counts, args.num_images)
    turn: list[Any] = list(range(len(names) or embeddings)) if special == "uniform" else list(words)
    checked = pipeline._check_labels(turn, len(turn), args.guidance_scale)
    assert checked is not None
    return [checked[i % len(checked)] for i in range(args.num_images)]


# ---- the command ----


def _check(args: argparse.Namespace) -> None:
    for name in ("num_images", "batch_size", "num_inference_steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    if args.trajectory is not None:
        from .trajectory import animation_format

        animation_format(args.trajectory)
        if not Path(args.trajectory).absolute().parent.is_dir():
            raise ValueError(f"--trajectory is {args.trajectory}, whose folder does not exist")
    if not 0 <= args.seed <= MAX_SEED - args.num_images:
        raise ValueError(f"--seed is {args.seed}; it must be between 0 and 2**63 - {args.num_images}")


def _check_call(pipeline: "CustomDDPMPipeline", args: argparse.Namespace) -> None:
    """Raise what the pipeline's call would raise, before anything is drawn or written."""
    from .pipelines.pipeline_custom_ddpm import _check_interval

    pipeline._check_arguments("pt", args.guidance_scale, args.num_inference_steps, args.eta, ())
    _check_interval(args.guidance_interval, args.guidance_scale)
    pipeline._begin(args.guidance_scale, args.num_inference_steps)


def _settings(sample_set: "SampleSet", args: argparse.Namespace) -> dict[str, Any]:
    """All that the pictures depend on."""
    from .data.base import fingerprint
    from .sample_set import model_fingerprint

    pipeline = sample_set.pipeline
    return {
        "model": model_fingerprint(pipeline),
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_options": sorted(args.scheduler_options),
        "seed": args.seed,
        "num_images": args.num_images,
        "class_labels": args.class_labels,
        "labels": None if sample_set.labels is None else fingerprint(sample_set.labels),
        "num_inference_steps": args.num_inference_steps,
        "eta": args.eta,
        "guidance_scale": args.guidance_scale,
        "guidance_interval": args.guidance_interval,
        "exact": args.exact,
        "device": pipeline._execution_device.type,
    }


def _write_trajectory(sample_set: "SampleSet", file: Path, batch_size: int) -> list[str]:
    """Draw the first pictures of a set again, and write how they come about: moving, and as a strip of the first."""
    import torch

    from .trajectory import save_animation, trajectory_frames, trajectory_strip

    seeds = sample_set.seeds[: min(MOVING_PICTURES, batch_size)]
    pipeline, labels = sample_set.pipeline, sample_set.labels and sample_set.labels[: len(seeds)]
    device = pipeline._execution_device
    trajectory = pipeline(
        batch_size=len(seeds),
        class_labels=labels,
        generator=[torch.Generator(device).manual_seed(seed) for seed in seeds],
        output_type="latent",
        return_trajectory=MOVING_STATES,
        **sample_set.options,
    ).trajectory
    save_animation(trajectory_frames(trajectory), file)
    strip = file.with_name(f"{file.stem}-strip.png")
    trajectory_strip(trajectory, pictures=2, states=STRIP_STATES).save(strip)
    return [str(file), str(strip)]


def sample(args: argparse.Namespace) -> None:
    """Draw pictures with a model: a PNG file for each seed and a grid; started again, it goes on where it stopped."""
    _check(args)
    from .pipelines.pipeline_custom_ddpm import CustomDDPMPipeline
    from .sample_set import SampleSet
    from .sampling import process_state

    state, folder = process_state(), Path(args.output_dir)
    pipeline = CustomDDPMPipeline.from_pretrained(args.model).to(state.device)
    pipeline.set_progress_bar_config(disable=True)
    options = {name: getattr(args, name) for name in ("num_inference_steps", "eta") if getattr(args, name) is not None}
    if args.guidance_scale != 1.0:
        options["guidance_scale"] = args.guidance_scale
    if args.guidance_interval is not None:
        options["guidance_interval"] = tuple(args.guidance_interval)
    if args.scheduler is not None or args.scheduler_options:
        pipeline.scheduler = build_sampler(args.scheduler, args.scheduler_options, pipeline.scheduler)
    with _sampling_errors(pipeline, args.batch_size):
        labels = _labels(pipeline, args)
        _check_call(pipeline, args)
    seeds = range(args.seed, args.seed + args.num_images)
    sample_set = SampleSet(pipeline, folder, seeds, labels, options, args.exact)
    sample_set.open(_settings(sample_set, args))
    with _sampling_errors(pipeline, args.batch_size):
        sample_set.draw(args.batch_size)
    if state.is_main_process:
        names = pipeline.config.id2label or {}
        sample_set.write_grid(names, args.class_rows)
        made = ["grid.png"]
        if args.format == "npz":
            made.append(sample_set.write_npz().name)
        if args.format == "dataset":
            made.append(sample_set.write_metadata(names).name)
        if args.trajectory is not None:
            with _sampling_errors(pipeline, args.batch_size):
                files = _write_trajectory(sample_set, Path(args.trajectory), args.batch_size)
                print(f"trajectory: {' and '.join(files)}")
        print(f"{args.num_images} pictures and {' and '.join(made)} in {folder}")
    state.wait_for_everyone()


def add_sample_flags(sub: argparse.ArgumentParser) -> None:
    """The flags of `sample`."""
    sub.add_argument("model", help="folder or Hub repository, ours or a stock DDPM")
    sub.add_argument("--output_dir", default="samples", help="folder for the pictures: new, or one to go on with")
    sub.add_argument("-n", "--num_images", type=int, default=16, help="number of pictures")
    sub.add_argument("--seed", type=int, default=0, help="seed of the first picture; the next has the next number")
    words = (
        "class names, or labels if no name is a number, in turn; or uniform: all in turn; or as_data: in the shares "
    )
    words += "of the training data; if not given, all in turn for a model with classes"
    sub.add_argument("--class_labels", nargs="+", default=None, help=words)
    sub.add_argument("--guidance_scale", type=float, default=1.0, help="classifier-free guidance; 1 is none")
    words = "fractions of T: guidance only at LOW <= t/T < HIGH"
    sub.add_argument("--guidance_interval", nargs=2, type=float, default=None, metavar=("LOW", "HIGH"), help=words)
    sub.add_argument("--num_inference_steps", type=int, default=None, help="sampling steps; all T if not given")
    sub.add_argument("--eta", type=float, default=None, help="1: DDPM, 0: DDIM")
    sub.add_argument("--scheduler", default=None, help="scheduler of diffusers by name; the model's own if not given")
    words = "its options, such as algorithm_type=sde-dpmsolver++"
    sub.add_argument("--scheduler_options", nargs="+", default=[], metavar="NAME=VALUE", help=words)
    sub.add_argument("--batch_size", type=int, default=64, help="pictures drawn at once, on each process")
    words = "batches of one fixed size, so that the files are equal in every bit for any --batch_size and number of "
    words += "processes (slower on small pictures)"
    sub.add_argument("--exact", action="store_true", help=words)
    words = "png: the files alone; npz: and samples.npz; dataset: and metadata.csv, with which the folder is a dataset"
    sub.add_argument("--format", choices=["png", "npz", "dataset"], default="png", help=words)
    words = "in grid.png a row for each class, beside its name; if not given, a column, under its name"
    sub.add_argument("--class_rows", action="store_true", help=words)
    words = f"moving picture of the first {MOVING_PICTURES} from noise to the result, .webp, .png or .gif; and a strip"
    sub.add_argument("--trajectory", default=None, metavar="FILE", help=words)
