"""`custom-ddpm`: train a model, and use trained models from the command line.

Torch is imported by the commands, not for --help.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .app.command import add_app
from .evaluation.commands import add_commands
from .evaluation.report_command import add_report
from .evaluation.tune import add_tune
from .memory import keep_freed_memory
from .messages import one_line, shown
from .sample_command import add_sample_flags, sample

if TYPE_CHECKING:
    from .pipelines import CustomDDPMPipeline

MAX_PROBLEMS = 50  # lines that `verify` prints


def _load(model: str) -> "CustomDDPMPipeline":
    import torch

    from .pipelines import CustomDDPMPipeline

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return CustomDDPMPipeline.from_pretrained(model).to(device)


def _new_folder(path: str) -> Path:
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already and is not empty; choose another folder")
    return folder


def convert(args: argparse.Namespace) -> None:
    """Convert a pipeline to diffusers' own classes, or from them."""
    from .hub.convert import pipeline_from_diffusers, pipeline_to_diffusers
    from .pipelines import CustomDDPMPipeline

    folder = _new_folder(args.output_dir)
    if args.to == "diffusers":
        stock = pipeline_to_diffusers(CustomDDPMPipeline.from_pretrained(args.model))
        stock.save_pretrained(folder)  # type: ignore[attr-defined]
    else:
        pipeline_from_diffusers(args.model).save_pretrained(folder)
    print(f"{args.model} as {args.to} in {folder}")


def push(args: argparse.Namespace) -> None:
    """Push a saved pipeline to the Hub: `main`, and the export to diffusers' classes to the branch `diffusers`."""
    from .hub.push import push_pipeline

    print(push_pipeline(args.folder, args.repo_id, private=args.private or None))
    if args.space:
        from .hub.space import push_space

        print(push_space(args.repo_id, private=args.private or None))


def verify(args: argparse.Namespace) -> None:
    """Check the code, the configuration and the weights of a repository, without running or unpickling anything."""
    from .hub.verify import verification

    found = verification(args.repository, revision=args.revision)
    lines = found.problems[:MAX_PROBLEMS]
    if found.problems:
        lines += [f"and {len(found.problems) - len(lines)} more"] * (len(lines) < len(found.problems))
        sys.exit("\n  ".join([f"custom-ddpm: error: {shown(args.repository, 300)} is not to be trusted:", *lines]))
    print("\n  ".join([f"{shown(args.repository, 300)}: nothing wrong was found. What was checked:", *found.checked]))


def analytic_variance(args: argparse.Namespace) -> None:
    """Estimate the optimal variances of the reverse steps from the training data, and save them with the model."""
    from accelerate import PartialState

    from .evaluation.records import CONFIG_FILE
    from .evaluation.tune import measure_errors
    from .flags import parse_config
    from .scheduler import CustomDDPMScheduler
    from .training.parts import open_data

    folder = Path(args.folder)
    pipeline = _load(str(folder))
    data, _ = open_data(parse_config(["--config", str(folder / CONFIG_FILE)]), PartialState())
    variances = measure_errors(pipeline, data, args.num_images, args.batch_size, args.seed)
    scheduler = CustomDDPMScheduler.from_config(
        pipeline.scheduler.config, variance_type="analytic", original_sample_variances=variances, tuned=None
    )
    scheduler.save_pretrained(folder / "scheduler")
    count = min(args.num_images, data.num_images or args.num_images)
    print(f"variance_type 'analytic', from {count} pictures, in {folder / 'scheduler'}")


def diagnose(args: argparse.Namespace) -> None:
    """Say in words what is wrong with a run, from what it wrote."""
    from .evaluation.diagnosis import diagnose, in_words
    from .evaluation.records import BOUNDS_FILE
    from .training.ending import add_bounds

    folder = Path(args.folder)
    findings = diagnose(folder)
    if not (folder / BOUNDS_FILE).exists():
        try:
            add_bounds(folder)
            findings = diagnose(folder)
        except (ValueError, OSError) as error:
            print(f"without the bounds of the loss: {error}")
    print(*in_words(findings), sep="\n")


def best_average(args: argparse.Namespace) -> None:
    """Compare post-hoc averages of a run, of several lengths, by drawn pictures, and save the best one."""
    from .evaluation.records import SCORES
    from .sampling import process_state
    from .training.best_average import measure_averages, save_average

    folder = Path(args.folder)
    in_place = args.output_dir is not None and Path(args.output_dir).resolve() == folder.resolve()
    target = folder if in_place else args.output_dir and _new_folder(args.output_dir)
    results = []
    measured = measure_averages(folder, args.features, args.sigma_rels, args.num_images, args.batch_size)
    for each in measured:
        results.append(each)
        name = "as saved" if each.sigma_rel is None else f"{each.sigma_rel:g}"
        if each.scores is not None:
            if len(results) == 1:
                about, best_by = each.scores[SCORES], each.scores[SCORES]["best_by"]
                print(f"{about['num_images']:,} pictures, {about['sampler']}, against {about['reference']}")
                print(f"{'sigma_rel':>9}  {best_by}")
            print(f"{name:>9}  {each.value:.4g} ± {each.scores[SCORES]['standard_errors'][best_by]:.2g}")
        elif each.problem is not None and process_state().is_main_process:
            print(f"{name:>9}  {each.problem}")
    if process_state().is_main_process:
        best = min(results, key=lambda each: each.value)
        name = "the average that the run saved" if best.sigma_rel is None else f"--sigma_rels {best.sigma_rel:g}"
        print(f"least: {name}")
        if target is not None:
            save_average(folder, best, target)
            print(f"saved in {target}")


def train(argv: Sequence[str]) -> None:
    """Train a model on one process; for several use `accelerate launch --quiet -m custom_ddpm.train`."""
    from .train import main

    main(argv, prog="custom-ddpm train")


def _average_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("folder", help="output folder of a run with --posthoc_ema_steps")
    sub.add_argument("--features", default=None, help="as those of `evaluate`; the run's --eval_features if not given")
    lengths = [0.02, 0.035, 0.05, 0.075, 0.1, 0.14, 0.2]
    sub.add_argument("--sigma_rels", type=float, nargs="+", default=lengths, help="lengths, relative to the run's")
    sub.add_argument("--num_images", type=int, default=None, help="pictures of each; --eval_num_images if not given")
    sub.add_argument("--batch_size", type=int, default=64, help="pictures at once, on each process")
    sub.add_argument("--output_dir", default=None, help="new folder for the best one, or the run's own; else no file")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="custom-ddpm",
        description="Train diffusion models, sample from them, evaluate, convert, push, verify them.",
    )
    parser.add_argument("--version", action="version", version=f"custom-ddpm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    formatter = argparse.ArgumentDefaultsHelpFormatter

    def command(name: str, run: Callable[[Any], None]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=run.__doc__, description=run.__doc__, formatter_class=formatter)
        sub.set_defaults(run=run)
        return sub

    command("train", train)

    add_sample_flags(command("sample", sample))
    sub = command("convert", convert)
    sub.add_argument("model", help="folder or Hub repository")
    sub.add_argument("output_dir", help="new folder")
    sub.add_argument("--to", choices=["diffusers", "custom"], default="diffusers", help="whose classes")

    sub = command("push", push)
    sub.add_argument("folder", help="folder of a saved pipeline, such as a run's output folder")
    sub.add_argument("repo_id", help="user/model; created if it does not exist")
    sub.add_argument("--private", action="store_true", help="make it private")
    sub.add_argument("--space", action="store_true", help="also push a Space of the same name: the page of `app` on it")

    sub = command("verify", verify)
    sub.add_argument("repository", help="folder or Hub repository")
    sub.add_argument("--revision", default=None, help="branch, tag or commit")

    sub = command("diagnose", diagnose)
    sub.add_argument("folder", help="output folder of a run")

    _average_flags(command("best-average", best_average))

    sub = command("analytic-variance", analytic_variance)
    sub.add_argument("folder", help="output folder of a run")
    sub.add_argument("--num_images", type=int, default=512, help="pictures to estimate from")
    sub.add_argument("--batch_size", type=int, default=64, help="pictures at once")
    sub.add_argument("--seed", type=int, default=0, help="seed of the noise")

    add_commands(command, commands)
    add_report(command)
    add_tune(command)
    add_app(command)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `custom-ddpm`; ends with status 1 or 2 and one line of text when something is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        return train(argv[1:])  # it has a parser of its own
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    from .hub.errors import HubError

    try:
        if "MASTER_ADDR" in os.environ:  # of a launcher
            from .training.launch import start_all_cpu_processes

            start_all_cpu_processes()
        if argv[0] != "app":  # which lives for long, between drawings of all sizes
            keep_freed_memory()
        args.run(args)
    except (ValueError, OSError, HubError) as error:
        if int(os.environ.get("RANK", 0)) > 0:
            from .training.launch import REPORT_DELAY

            time.sleep(REPORT_DELAY)  # the first process reports the same error, and the launcher ends the others
        sys.exit(f"custom-ddpm: error: {one_line(error)}")


if __name__ == "__main__":
    main()
