"""The commands of evaluation: `features train`, `evaluate`, `bits-per-dim` and `memorization`.

Torch is imported by the commands, not for --help. All but `features train` run on several processes as well:
`accelerate launch -m custom_ddpm.cli evaluate …`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .features import Features
    from .pictures import Pictures

Command = Callable[[str, Callable[[Any], None]], argparse.ArgumentParser]


def train_features(args: argparse.Namespace) -> None:
    """Train a small classifier on labelled pictures, whose features compare sets of such pictures."""
    from ..sampling import process_state
    from .classifier import train_classifier
    from .features import CONFIG_FILE
    from .pictures import DatasetPictures, open_dataset

    if Path(args.output_dir, CONFIG_FILE).exists():
        raise FileExistsError(f"{args.output_dir} holds features already; choose another folder")
    pictures = open_dataset(
        args.dataset, args.split, resolution=args.resolution, class_conditional=True, cache_dir=args.cache_dir
    )
    if not isinstance(pictures, DatasetPictures):
        raise ValueError(f"{args.dataset} has no labels; a classifier needs a dataset or a folder with classes")
    name = args.name or f"{Path(args.dataset.rstrip('/')).name} classifier"
    device = process_state().device
    facts = train_classifier(pictures.data, name, args.output_dir, steps=args.steps, seed=args.seed, device=device)
    print(
        f"{facts['name']}: {facts['held_out_accuracy']:.2%} of {facts['num_held_out_images']:,} held-out pictures "
        f"right, trained on {facts['num_train_images']:,}; in {args.output_dir}"
    )


def _load_features(names: list[str]) -> "list[Features]":
    from ..sampling import process_state
    from .features import load_features

    return [load_features(name, process_state().device) for name in names]


def _open_source(args: argparse.Namespace) -> "Pictures":
    """The pictures to evaluate: of a model, or of a dataset, a folder or an NPZ file."""
    from ..sampling import process_state
    from .pictures import is_model, open_dataset, open_model

    options = {name: getattr(args, name) for name in ("num_inference_steps", "eta") if getattr(args, name) is not None}
    if args.guidance_scale != 1.0:
        options["guidance_scale"] = args.guidance_scale
    if is_model(args.source):
        if args.resolution is not None:
            raise ValueError(f"--resolution is {args.resolution}, but a model draws in its own size; leave it out")
        return open_model(args.source, args.num_images or 10_000, args.seed, options, process_state().device)
    if options:
        raise ValueError(f"{args.source} is no model, so that {', '.join(f'--{name}' for name in options)} has no use")
    return open_dataset(
        args.source,
        args.source_split,
        num_images=args.num_images,
        resolution=args.resolution,
        cache_dir=args.cache_dir,
    )


def _open_like(source: "Pictures", path: str, split: str, args: argparse.Namespace, **options: Any) -> "Pictures":
    from .pictures import open_dataset

    size = [source.height, source.width]
    return open_dataset(path, split, resolution=size, channels=source.channels, cache_dir=args.cache_dir, **options)


def evaluate(args: argparse.Namespace) -> None:
    """Compare pictures of a model, a dataset or a folder with a dataset: FD or FID, KID, precision and recall."""
    from ..sampling import process_state
    from .evaluate import evaluate as run
    from .evaluate import table, write_json

    features = _load_features(args.features)
    source = _open_source(args)
    reference = _open_like(source, args.against, args.split, args, num_images=args.num_reference_images)
    result = run(source, reference, features, batch_size=args.batch_size, cache_dir=args.cache_dir)
    if process_state().is_main_process:
        print(table(result))
        if args.output:
            write_json(result, args.output)


def bits_per_dim(args: argparse.Namespace) -> None:
    """Bits per dimension of held-out pictures under a model, in the three parts of the bound."""
    from ..pipelines.pipeline_custom_ddpm import CustomDDPMPipeline
    from ..sampling import process_state
    from .bits_per_dim import as_json, pipeline_bits_per_dim
    from .evaluate import write_json
    from .pictures import ModelPictures

    state = process_state()
    pipeline = CustomDDPMPipeline.from_pretrained(args.model).to(state.device)
    classes, names = pipeline.unet.config.num_class_embeds, pipeline.config.id2label
    options = {"class_conditional": True, "id2label": {int(i): name for i, name in names.items()}} if classes else {}
    like = ModelPictures(pipeline, args.model, 0)
    pictures = _open_like(like, args.against, args.split, args, num_images=args.num_images, **options)

    found = pipeline_bits_per_dim(
        pipeline, pictures, num_timesteps=args.num_timesteps, batch_size=args.batch_size, seed=args.seed
    )
    if not state.is_main_process:
        return
    print(f"bits per dimension of {pictures.description} ({pictures.num_images:,} pictures) under {args.model}")
    print(f"{'variance':14}" + "".join(f"{part:>20}" for part in next(iter(found.values())).parts))
    for name, each in found.items():
        print(f"{name:14}" + "".join(f"{f'{value:.4f} ± {error:.4f}':>20}" for value, error in each.parts.values()))
    if "analytic" not in found:
        print("analytic: not estimated; `custom-ddpm analytic-variance` adds it to the model")
    if args.output:
        write_json({"model": args.model, "pictures": pictures.description, "variances": as_json(found)}, args.output)


def memorization(args: argparse.Namespace) -> None:
    """Compare the distances of generated and of held-out pictures to the training pictures: does the model copy?"""
    from ..sampling import process_state
    from .evaluate import write_json
    from .memorization import (
        QUANTILE,
        PixelFeatures,
        as_json,
        draw_distances,
        draw_neighbours,
        gather_images,
    )
    from .memorization import memorization as run

    folder = Path(args.output_dir)
    features: list[Features] = [PixelFeatures(), *_load_features(args.features)]
    source = _open_source(args)
    training = _open_like(source, args.against, args.split, args)
    held_out = _open_like(
        source, args.held_out or args.against, args.held_out_split, args, num_images=source.num_images
    )
    others, drawn = gather_images(held_out, args.batch_size), gather_images(source, args.batch_size)
    results = {each.name: run(drawn, others, training, each, batch_size=args.batch_size) for each in features}
    if process_state().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{source.description}: {len(drawn):,} pictures; training set: {training.description}")
        print(f"held out: {held_out.description}, {len(others):,} pictures")
        for name, each in results.items():
            print(
                f"{name}: {each.share.value:.1%} are nearer to a training picture, relative to the next ones, than "
                f"{1 - QUANTILE:.0%} of held-out pictures ({QUANTILE:.0%} ± {each.share.error:.1%} without copying): "
                f"{'it copies' if each.copies else 'no sign of copying'}"
            )
        draw_distances(results, folder / "distances.png")
        write_json({"pictures": source.description, **as_json(results)}, folder / "memorization.json")
    for name, each in results.items():
        draw_neighbours(drawn, each, training, folder / f"neighbours-{name.replace(' ', '-')}.png")


# ---- flags ----


def _source_flags(sub: argparse.ArgumentParser, num_images: int | None) -> None:
    sub.add_argument("source", help="model (folder or Hub repository), dataset, folder of pictures, or NPZ file")
    sub.add_argument("--source_split", default="train", help="split, if the source is a dataset")
    what = "number of pictures; if not given, 10,000 of a model and all of a dataset"
    sub.add_argument("--num_images", type=int, default=num_images, help=what)
    sub.add_argument("--seed", type=int, default=0, help="seed of the first picture of a model; the next has the next")
    sub.add_argument("--num_inference_steps", type=int, default=None, help="sampling steps; all T if not given")
    sub.add_argument("--eta", type=float, default=None, help="1: DDPM, 0: DDIM")
    sub.add_argument("--guidance_scale", type=float, default=1.0, help="classifier-free guidance; 1 is none")
    sub.add_argument("--resolution", type=int, nargs="+", default=None, help="size, if the source is a dataset")


def _common_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--batch_size", type=int, default=64, help="pictures at once, on each process")
    sub.add_argument("--cache_dir", default=None, help="cache of datasets and of reference statistics")


def add_commands(command: Command, commands: Any) -> None:
    """Add the commands of evaluation to a parser.

    Args:
        command: adds a command with its function and returns its parser.
        commands: the sub-parsers, for a command with commands of its own.
    """
    words = (
        "features: random, inception[:FILE], dinov2[:FOLDER], clip[:FOLDER], a folder of `features train`, or "
        "module:function"
    )
    sub = command("evaluate", evaluate)
    _source_flags(sub, None)
    sub.add_argument("--against", required=True, help="reference: dataset, folder of pictures, or NPZ file")
    sub.add_argument("--split", default="train", help="split of the reference")
    sub.add_argument("--num_reference_images", type=int, default=None, help="of the reference; all if not given")
    sub.add_argument("--features", nargs="+", default=["random"], help=words)
    sub.add_argument("--output", default=None, help="JSON file to write")
    _common_flags(sub)

    sub = command("bits-per-dim", bits_per_dim)
    sub.add_argument("model", help="folder or Hub repository")
    sub.add_argument("--against", required=True, help="dataset, folder of pictures, or NPZ file")
    sub.add_argument("--split", default="test", help="split; one that the model was not trained on")
    sub.add_argument("--num_images", type=int, default=1000, help="number of pictures, chosen at random")
    sub.add_argument("--num_timesteps", type=int, default=100, help="timesteps for each picture")
    sub.add_argument("--seed", type=int, default=0, help="seed of the noise and the timesteps")
    sub.add_argument("--output", default=None, help="JSON file to write")
    _common_flags(sub)

    sub = command("memorization", memorization)
    _source_flags(sub, 1000)
    sub.add_argument("--against", required=True, help="dataset with the training pictures")
    sub.add_argument("--split", default="train", help="split with the training pictures")
    sub.add_argument("--held_out", default=None, help="dataset with held-out pictures, if it is another")
    sub.add_argument("--held_out_split", default="test", help="split with the held-out pictures")
    sub.add_argument("--features", nargs="*", default=[], help=f"{words}; pixels are always compared")
    sub.add_argument("--output_dir", default="memorization", help="folder for the figures and the JSON file")
    _common_flags(sub)

    words = "Features that pictures are compared with."
    parser = commands.add_parser("features", help=words, description=words)
    inner = parser.add_subparsers(required=True, metavar="command")
    formatter = argparse.ArgumentDefaultsHelpFormatter
    doc = train_features.__doc__
    sub = inner.add_parser("train", help=doc, description=doc, formatter_class=formatter)
    sub.set_defaults(run=train_features)
    sub.add_argument("dataset", help="labelled dataset, or folder with one sub-folder per class")
    sub.add_argument("--output_dir", required=True, help="folder to write")
    sub.add_argument("--split", default="train", help="split to train on; a tenth of it is held out")
    sub.add_argument(
        "--resolution", type=int, nargs="+", default=None, help="size of the pictures; if none, as a run chooses it"
    )
    sub.add_argument("--name", default=None, help="printed with every number; by default that of the dataset")
    sub.add_argument("--steps", type=int, default=1000, help="optimiser steps")
    sub.add_argument("--seed", type=int, default=0, help="seed of the weights and the order")
    sub.add_argument("--cache_dir", default=None, help="cache of datasets")
