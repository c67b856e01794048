"""Batched and distributed sampling with one seed per image, and image grids."""

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
    class_labels: Sequence[int] | Sequence[str] | None = None,
    batch_size: int = 64,
    **options: Any,
) -> torch.Tensor:
    """Generate one image per seed (S1).

    An image depends on its seed only, not on the batch size or the number of processes. Under `accelerate launch` every
    process generates a share, and each of them returns all images.

    Args:
        pipeline: `CustomDDPMPipeline`, on its device.
        seeds: one per image.
        class_labels: class names or labels, one per image, for a class-conditional model.
        batch_size: images per batch in each process.
        **options: further arguments of the pipeline call.

    Returns:
        uint8 (len(seeds), C, H, W) on the CPU.

    Raises:
        ValueError: no seeds; not one label per seed; a batch size below 1; what the pipeline raises for `options`.
    """
    if len(seeds) == 0:
        raise ValueError("seeds is empty; give at least one, for one image")
    if class_labels is not None and len(class_labels) != len(seeds):
        raise ValueError(f"there are {len(class_labels)} class_labels for {len(seeds)} seeds; give one per image")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    state = PartialState()
    share = math.ceil(len(seeds) / state.num_processes)
    # The last process may have fewer images; it repeats the last one, since `gather` needs tensors of the same shape.
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
    """Arrange images in a grid with gaps; small images are enlarged by an integer factor without interpolation.

    Args:
        images: uint8 (N, C, H, W), C = 1, 3 or 4.
        columns: images per row; a square grid if None.
        min_size: images are enlarged to at least this many pixels on the longer side.
    """
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    factor = max(1, math.ceil(min_size / max(height, width)))
    gap = max(2, height * factor // 16)
    pixels = np.repeat(np.repeat(images.permute(0, 2, 3, 1).numpy(), factor, axis=1), factor, axis=2)
    height, width = height * factor, width * factor
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return PIL.Image.fromarray(sheet.squeeze(-1) if channels == 1 else sheet)
