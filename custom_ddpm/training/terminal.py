"""The newest sample grid in the terminal, for `--preview terminal`.

Needs textual-image, which asks the terminal what it can show: sixel graphics, kitty's protocol, or else blocks of
colour.
"""

import io
import logging
import os
import sys

import PIL.Image
from tqdm.auto import tqdm

from ..messages import one_line

KEPT_LINES = 4  # of the terminal, for what stands over and under the grid


def check_terminal() -> None:
    """Ask the terminal all that the grids need to know of it, before anything else is written to it.

    Raises:
        ValueError: textual-image is not installed, there is no terminal, or its answer cannot be read.
    """
    # It is asked through one and answers through the other. What has no size only passes for a terminal.
    streams = (sys.__stdin__, sys.__stdout__)
    asked = all(stream is not None and not stream.closed and stream.isatty() for stream in streams)
    if not asked or 0 in os.get_terminal_size(sys.__stdout__.fileno()):  # type: ignore[union-attr]
        raise ValueError(
            "--preview is 'terminal', but the run has no terminal for its input and output; leave it out, here or in "
            "--config"
        )
    if _in_background():
        raise ValueError("--preview is 'terminal', but the run is in the background, where it cannot ask the terminal")
    logging.getLogger("textual_image").setLevel(logging.ERROR)  # it warns, with a traceback, of what has no answer
    try:
        from rich.console import Console
        from textual_image.renderable import Image  # it asks when it is imported, and for the size when it shows

        Console(file=io.StringIO()).print(Image(PIL.Image.new("RGB", (1, 1)), width=1, height=1))
    except ImportError:
        raise ValueError(
            "--preview is 'terminal', which needs textual-image: pip install 'custom-ddpm[terminal]'"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"--preview is 'terminal', whose answer cannot be read ({one_line(error)}): press no key at its start"
        ) from error


def _in_background() -> bool:
    """Whether a question would stop the process: its terminal is another job's."""
    try:
        return os.tcgetpgrp(sys.__stdin__.fileno()) != os.getpgrp()  # type: ignore[union-attr]
    except (OSError, AttributeError):  # in a session of its own, as under torch's launcher; on Windows
        return False


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
