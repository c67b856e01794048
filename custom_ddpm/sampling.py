"""Many pictures, on one process or many, one seed per picture; and the grids they are shown in."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import PartialState
from accelerate.utils import gather

from .data.pixels import denormalise


def sample_images(
    pipeline: Any,
    seeds: Sequence[int],
    class_labels: Sequence[int] | None = None,
    batch_size: int = 64,
    **options: Any,
) -> torch.Tensor:
    """Draw one picture per seed (S1). A picture is a function of its seed: batch size and processes do not change it.

    Under `accelerate launch` every process draws a share, and all of them return the whole.

    Args:
        pipeline: `CustomDDPMPipeline`, on its device.
        seeds: one for each picture.
        class_labels: one for each picture, for a class-conditional model.
        batch_size: pictures drawn at once by a process.
        **options: further arguments of the pipeline's call.

    Returns:
        uint8 (len(seeds), C, H, W) on the CPU.
    """
    state = PartialState()
    share = math.ceil(len(seeds) / state.num_processes)
    # The last process may have less to do; it repeats its last picture so that all tensors gathered are of one shape.
    mine = [min(state.process_index * share + i, len(seeds) - 1) for i in range(share)]
    device = pipeline._execution_device
    parts = []
    for start in range(0, share, batch_size):
        chosen = mine[start : start + batch_size]
        images = pipeline(
            batch_size=len(chosen),
            class_labels=None if class_labels is None else [class_labels[i] for i in chosen],
            generator=[torch.Generator(device).manual_seed(seeds[i]) for i in chosen],
            output_type="pt",
            **options,
        ).images
        parts.append(denormalise(images * 2 - 1))
    return gather(torch.cat(parts)).cpu()[: len(seeds)]


def image_grid(images: torch.Tensor, columns: int | None = None, min_size: int = 64) -> PIL.Image.Image:
    """Pictures in a grid with a gap between them, small ones enlarged by a whole factor without smoothing.

    Args:
        images: uint8 (N, C, H, W), C = 1, 3 or 4.
        columns: pictures in a row; a square grid if None.
        min_size: pictures are enlarged to at least this many pixels.
    """
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    factor = max(1, math.ceil(min_size / max(height, width)))
    gap = max(2, height * factor // 16)
    pixels = np.repeat(np.repeat(images.permute(0, 2, 3, 1).numpy(), factor, axis=1), factor, axis=2)
    height, width = height * factor, width * factor
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, dtype=np.uint8)
    for i, picture in enumerate(pixels):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return PIL.Image.fromarray(sheet.squeeze(-1) if channels == 1 else sheet)
