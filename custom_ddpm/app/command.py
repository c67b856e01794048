"""The command `app` and its flags. Torch and gradio are imported by the command, not for --help."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .limits import Limits

if TYPE_CHECKING:
    from .worker import Model

Command = Callable[[str, Callable[[Any], None]], argparse.ArgumentParser]
DEFAULT_MODEL = "ddpm-digits"  # of the README's first command


def app(args: argparse.Namespace) -> None:
    """Show a page in the browser: draw with a model, edit pictures, watch trainings, see the mathematics."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError("the page needs gradio, which is not installed: pip install 'custom-ddpm[app]'") from error
    limits = _limits(args)
    if not 1 <= args.port <= 65535:
        raise ValueError(f"--port is {args.port}; it must be between 1 and 65535")
    if not Path(args.runs).is_dir():
        raise ValueError(f"--runs is {args.runs}, which is no folder")
    from .page import Settings, serve

    settings = Settings(_model(args.model), Path(args.runs), args.host, args.port, limits)
    if not settings.is_local:
        if settings.model is not None and Path(settings.model.name).is_dir():
            settings.model.name = Path(settings.model.name).resolve().name  # others need not know where it is
        print(
            f"--host {args.host}: everybody who reaches this computer over the network can use the page and its "
            "processor, without a password and not encrypted. Trainings cannot be started from the page."
        )
    host = "127.0.0.1" if args.host == "0.0.0.0" else args.host
    address = f"http://{f'[{host}]' if ':' in host else host}:{args.port}"
    serve(settings, started=lambda: print(f"{address} (in Chinese: {address}/zh); Ctrl-C ends it", flush=True))


def _limits(args: argparse.Namespace) -> Limits:
    names = ("steps", "pictures", "seconds", "upload_mb", "waiting")
    values = {name: getattr(args, f"max_{name}") for name in names}
    for name, value in values.items():
        least = 2 if name == "steps" else 1
        if not value >= least:
            raise ValueError(f"--max_{name} is {value:g}; it must be at least {least}")
    return Limits(**values)


def _model(name: str | None) -> "Model | None":
    """The model that the page draws with; None if none is named and the default run is not here."""
    import torch

    from ..pipelines.pipeline_custom_ddpm import CustomDDPMPipeline
    from .worker import Model

    if name is None and not Path(DEFAULT_MODEL, "model_index.json").is_file():
        return None
    name = name or DEFAULT_MODEL
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = Model(name, CustomDDPMPipeline.from_pretrained(name).to(device))
    model.pipeline.set_progress_bar_config(disable=True)
    model.pipeline._check_scheduler()
    if model.pipeline._picture_size() is None:
        raise ValueError(f"{name} has no sample_size in unet/config.json; the page needs one")
    return model


def add_app(command: Command) -> None:
    """Add the command to a parser; `command` adds one with its function and returns its parser."""
    sub = command("app", app)
    words = f"folder or Hub repository; if not given, {DEFAULT_MODEL} if it is here, or none"
    sub.add_argument("model", nargs="?", default=None, help=words)
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: the whole network")
    sub.add_argument("--port", type=int, default=7860, help="port to listen on")
    sub.add_argument("--runs", default=".", metavar="FOLDER", help="folder whose runs the page shows")
    most = Limits()
    sub.add_argument("--max_steps", type=int, default=most.steps, help="sampling steps of a request")
    sub.add_argument("--max_pictures", type=int, default=most.pictures, help="pictures of a request")
    sub.add_argument("--max_seconds", type=float, default=most.seconds, help="after which a request is stopped")
    sub.add_argument("--max_upload_mb", type=int, default=most.upload_mb, help="size of an uploaded picture")
    sub.add_argument("--max_waiting", type=int, default=most.waiting, help="requests that wait in the queue")
