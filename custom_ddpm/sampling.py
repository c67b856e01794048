"""Batched and distributed sampling with one seed per image, and image grids."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import PartialState
from accelerate.utils import gather, parse_flag_from_env
from diffusers import DPMSolverMultistepScheduler
from PIL import ImageDraw, ImageFont

from .data.pixels import denormalise

CAPTION_SIZE = 13  # pixels
CAPTION_HEIGHT = CAPTION_SIZE + 5  # of the line over a grid, with room for descenders
ROW_NAME_WIDTH = 160  # of the longest name beside a row
# Tried in this order for names that Pillow's own font lacks, which has hardly more than ASCII.
FONTS = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "msyh.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "NotoSerifCJK-Bold.ttc",
    "Arial Unicode.ttf",
)


def process_state() -> PartialState:
    """The state of the processes, which the first call starts; on CPUs where there is no accelerator or so chosen."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu)


def clipping(scheduler: Any) -> dict[str, Any]:
    """Settings with which diffusers' multistep solvers clip x̂_0 to [−1, 1] if `scheduler`, whose place they take, does.

    They have no `clip_sample`; thresholding with a largest value of 1 is the same.
    """
    clips = scheduler.config.clip_sample and scheduler.config.clip_sample_range == 1.0
    return {"thresholding": True, "sample_max_value": 1.0} if clips else {}


def untuned(config: Any) -> dict[str, Any]:
    """A scheduler's configuration without what is only for `CustomDDPMScheduler`, of which diffusers would warn.

    `solver_order` as well, which would otherwise be that of diffusers' multistep solvers.
    """
    own = ("tuned", "prediction_errors", "original_sample_variances", "corrector", "solver_order")
    return {name: value for name, value in config.items() if name not in own}


def fast_sampler(scheduler: Any) -> Any:
    """DPM-Solver++ of second order (Lu et al. 2022, arXiv:2211.01095) for the noise schedule of a scheduler."""
    options = {"timestep_spacing": "trailing", "solver_order": 2, **clipping(scheduler)}
    return DPMSolverMultistepScheduler.from_config(untuned(scheduler.config), **options)


def draw_batch(pipeline: Any, seeds: Sequence[int], labels: Sequence[Any] | None, **options: Any) -> torch.Tensor:
    """Generate one image per seed in one batch (S1).

    Args:
        pipeline: `CustomDDPMPipeline`, on its device.
        seeds: one per image.
        labels: class names or labels, one per image, or None.
        **options: further arguments of the pipeline call.

    Returns:
        uint8 (len(seeds), C, H, W) on the pipeline's device.
    """
    device = pipeline._execution_device
    images = pipeline(
        batch_size=len(seeds),
        class_labels=labels,
        generator=[torch.Generator(device).manual_seed(seed) for seed in seeds],
        output_type="pt",
        **options,
    ).images
    return denormalise(images * 2 - 1)


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
    state = process_state()
    share = math.ceil(len(seeds) / state.num_processes)
    # The last process may have fewer images; it repeats the last one, since `gather` needs tensors of the same shape.
    mine = [min(state.process_index * share + i, len(seeds) - 1) for i in range(share)]
    parts = []
    for start in range(0, share, batch_size):
        chosen = mine[start : start + batch_size]
        labels = None if class_labels is None else [class_labels[i] for i in chosen]
        parts.append(draw_batch(pipeline, [seeds[i] for i in chosen], labels, **options))
    return gather(torch.cat(parts)).cpu()[: len(seeds)]


def image_grid(
    images: torch.Tensor,
    columns: int | None = None,
    min_size: int = 64,
    captions: Sequence[str] | None = None,
    row_names: Sequence[str] | None = None,
) -> PIL.Image.Image:
    """Arrange images in a grid with gaps; small images are enlarged by an integer factor without interpolation.

    Args:
        images: uint8 (N, C, H, W), C = 1, 3 or 4.
        columns: images per row; a square grid if None.
        min_size: images are enlarged to at least this many pixels on the longer side.
        captions: text over each column, such as its class; cut where it is wider than the column, and left out where no
            font has its characters.
        row_names: text at the left of each row, likewise; cut at `ROW_NAME_WIDTH` pixels.
    """
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    factor = max(1, math.ceil(min_size / max(height, width)))
    gap = max(2, height * factor // 16)
    pixels = np.repeat(np.repeat(images.permute(0, 2, 3, 1).numpy(), factor, axis=1), factor, axis=2)
    height, width = height * factor, width * factor
    names = _fitting_all(row_names or (), ROW_NAME_WIDTH)
    head = CAPTION_HEIGHT if captions else 0
    side = gap + math.ceil(max(font.getlength(text) for text, font in names.values())) if names else 0
    shape = (head + rows * (height + gap) + gap, side + columns * (width + gap) + gap, channels)
    sheet = np.full(shape, 255, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = head + gap + i // columns * (height + gap), side + gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    grid = PIL.Image.fromarray(sheet.squeeze(-1) if channels == 1 else sheet)
    draw = ImageDraw.Draw(grid)
    for i, (text, font) in _fitting_all(captions or (), width).items():
        middle = (side + gap + i * (width + gap) + width / 2, gap + CAPTION_SIZE)
        draw.text(middle, text, fill="black", font=font, anchor="ms")
    for i, (text, font) in names.items():
        draw.text((side, head + gap + i * (height + gap) + height / 2), text, fill="black", font=font, anchor="rm")
    return grid


@functools.cache
def _fonts() -> list[tuple[ImageFont.FreeTypeFont, bytes]]:
    """The fonts that there are, each with its picture of a character that it lacks."""
    found: list[Any] = [ImageFont.load_default(size=CAPTION_SIZE)]
    for name in FONTS:
        try:
            found.append(ImageFont.truetype(name, size=CAPTION_SIZE))
        except OSError:  # not installed
            continue
    return [(font, bytes(font.getmask("\U0010fffd"))) for font in found]


def font_for(text: str) -> ImageFont.FreeTypeFont | None:
    """The first font that has all characters of a text."""
    for font, missing in _fonts():
        if all(c == " " or bytes(font.getmask(c)) != missing for c in text):
            return font
    return None


def _fitting_all(texts: Sequence[str], width: int) -> dict[int, tuple[str, ImageFont.FreeTypeFont]]:
    """Texts by their place, each cut to a width in pixels, with its font; those that no font has are left out."""
    fonts = {i: font for i, text in enumerate(texts) if (font := font_for(text)) is not None}
    return {i: (_fitting(texts[i], font, width), font) for i, font in fonts.items()}


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """A text, cut to a width in pixels."""
    end = len(text)
    while end and font.getlength(text[:end] + "…" * (end < len(text))) > width:
        end -= 1
    return text[:end] + "…" * (0 < end < len(text))
