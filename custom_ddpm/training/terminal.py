"""The newest sample grid in the terminal, for `--preview terminal`.

Needs textual-image, which asks the terminal what it can show: sixel graphics, kitty's protocol, or else blocks of
colour.
"""

import logging
import os
import sys

import PIL.Image
from tqdm.auto import tqdm

KEPT_LINES = 4  # of the terminal, for what stands over and under the grid


def check_terminal() -> None:
    """Ask the terminal what it can show, before anything else is written to it.

    Raises:
        ValueError: textual-image is not installed, or there is no terminal.
    """
    # It is asked through one and answers through the other. What has no size only passes for a terminal.
    streams = (sys.__stdin__, sys.__stdout__)
    asked = all(stream is not None and stream.isatty() for stream in streams)
    if not asked or 0 in os.get_terminal_size(sys.__stdout__.fileno()):  # type: ignore[union-attr]
        raise ValueError("--preview is 'terminal', but the run has no terminal for its input and output; leave it out")
    logging.getLogger("textual_image").setLevel(logging.ERROR)  # it warns, with a traceback, of what has no answer
    try:
        import textual_image.renderable  # noqa: F401 (it asks when it is imported)
    except ImportError:
        raise ValueError(
            "--preview is 'terminal', which needs textual-image: pip install 'custom-ddpm[terminal]'"
        ) from None


def show_grid(grid: PIL.Image.Image, step: int) -> None:
    """Show a sample grid over the progress bars, as wide and high as fits.

    Args:
        grid: the pictures.
        step: optimiser steps done.
    """
    from rich.console import Console
    from textual_image.renderable import Image

    console = Console()
    lines = max(1, console.height - KEPT_LINES)
    columns = max(1, min(console.width, round(2 * lines * grid.width / grid.height)))  # a line is two columns high
    with tqdm.external_write_mode(sys.stdout):
        console.print(f"Samples after step {step}:", highlight=False)
        console.print(Image(grid.convert("RGB"), width=columns, height="auto"))
