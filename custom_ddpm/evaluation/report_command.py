"""The command `report` and its flags. Torch is imported by the command, not for --help."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any

Command = Callable[[str, Callable[[Any], None]], argparse.ArgumentParser]


def report(args: argparse.Namespace) -> None:
    """Write a page about a run: report.html, and report.md for the model card."""
    from .report import Report, ReportSettings
    from .report_page import write_report

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"report runs on one process, there are {os.environ['WORLD_SIZE']}; leave the launcher out")
    given = {name: value for name, value in vars(args).items() if name not in ("folder", "language", "run")}
    settings = ReportSettings(**{**given, "features": tuple(args.features)})
    command = shlex.join(["custom-ddpm", *sys.argv[1:]]) if sys.argv[1:2] == ["report"] else "custom-ddpm report"
    page, card = write_report(Report(args.folder, settings), args.language, command)
    print(f"{page}, and {card} for the model card")


def add_report(command: Command) -> None:
    """Add the command to a parser; `command` adds one with its function and returns its parser."""
    sub = command("report", report)
    sub.add_argument("folder", help="output folder of a run")
    sub.add_argument("--language", choices=["en", "zh"], default="en", help="the page has both; this one shows first")
    sub.add_argument(
        "--num_images", type=int, default=256, help="pictures to draw, and held-out ones; 10000 for numbers to publish"
    )
    words = (
        "features, the first for the samplers and copies: random, inception[:FILE], dinov2[:FOLDER], a folder of "
        "`features train`, or module:function"
    )
    sub.add_argument("--features", nargs="+", default=["random"], help=words)
    sub.add_argument("--num_reference_images", type=int, default=None, help="training pictures; all if not given")
    sub.add_argument("--num_timesteps", type=int, default=50, help="of bits per dimension, for each picture")
    words = "sampling steps; as the run's grids if not given, or 100 where these take all T"
    sub.add_argument("--num_inference_steps", type=int, default=None, help=words)
    sub.add_argument("--eta", type=float, default=None, help="1: DDPM, 0: DDIM")
    sub.add_argument("--guidance_scale", type=float, default=1.0, help="classifier-free guidance; 1 is none")
    sub.add_argument("--seed", type=int, default=0, help="seed of the first picture; the next has the next")
    sub.add_argument("--against", default=None, help="where the run's dataset or folder of pictures is now")
    sub.add_argument("--split", default=None, help="split of the training pictures; the run's if not given")
    sub.add_argument("--validation_split", default=None, help="split of the held-out pictures; the run's if not given")
    sub.add_argument("--batch_size", type=int, default=64, help="pictures at once")
    sub.add_argument("--cache_dir", default=None, help="cache of datasets and of reference statistics")
