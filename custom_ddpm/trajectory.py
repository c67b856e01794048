"""Moving pictures and strips of the reverse process, made of the pipeline's `return_trajectory`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from PIL import ImageDraw, features

from .data.pixels import denormalise
from .sampling import CAPTION_HEIGHT, CAPTION_SIZE, font_for, image_grid

FORMATS = {".gif": "GIF", ".png": "PNG", ".apng": "PNG", ".webp": "WEBP"}
SECONDS, HOLD = 3.0, 2.0  # of the movement; of the result, before it begins again


def _when(timestep: float) -> str:
    return "result" if timestep < 0 else f"t = {timestep:.0f}"


def trajectory_strip(trajectory: Any, pictures: int = 1, states: int = 11, min_size: int = 64) -> PIL.Image.Image:
    """A picture with one column for each state, under its t: x_t in the upper row, x̂_0 in the lower one.

    Args:
        trajectory: of K states and B images.
        pictures: how many of the images, each two rows.
        states: how many of the states, spread evenly.
        min_size: images are enlarged to at least this many pixels on the longer side, without interpolation.
    """
    K = len(trajectory.timesteps)
    chosen = np.linspace(0, K - 1, min(states, K)).round().astype(int).tolist()
    rows = torch.stack([trajectory.samples, trajectory.pred_original_samples])[:, chosen, :pictures]
    rows = rows.permute(2, 0, 1, 3, 4, 5).flatten(0, 2)
    captions = [_when(t) for t in trajectory.timesteps[chosen].tolist()]
    return image_grid(denormalise(rows).cpu(), len(captions), min_size, captions)


def trajectory_frames(trajectory: Any, columns: int | None = None, min_size: int = 64) -> list[PIL.Image.Image]:
    """One picture for each state: all x_t in a grid at the left, all x̂_0 at the right.

    Args:
        trajectory: of K states and B images.
        columns: images per row of each grid; a square grid if None.
        min_size: images are enlarged to at least this many pixels on the longer side, without interpolation.
    """
    states = zip(
        trajectory.timesteps.tolist(),
        denormalise(trajectory.samples).cpu(),
        denormalise(trajectory.pred_original_samples).cpu(),
        strict=True,
    )
    return [
        _side_by_side(
            [image_grid(images, columns, min_size) for images in (x_t, x_0)],
            [f"x_t, {_when(t)}", "x_0, as the network predicts it from x_t"],
        )
        for t, x_t, x_0 in states
    ]


def _side_by_side(panels: Sequence[PIL.Image.Image], captions: Sequence[str]) -> PIL.Image.Image:
    gap = CAPTION_SIZE
    width = sum(panel.width for panel in panels) + gap * (len(panels) - 1)
    sheet = PIL.Image.new(panels[0].mode, (width, panels[0].height + CAPTION_HEIGHT), "white")
    draw, left = ImageDraw.Draw(sheet), 0
    for panel, caption in zip(panels, captions, strict=True):
        sheet.paste(panel, (left, CAPTION_HEIGHT))
        font = font_for(caption)
        if font is not None:
            draw.text((left + panel.width / 2, CAPTION_SIZE), caption, fill="black", font=font, anchor="ms")
        left += panel.width + gap
    return sheet


def animation_format(file: str | Path) -> str:
    """The format of Pillow for a moving picture of this name.

    Raises:
        ValueError: the name's ending is none of .gif, .png, .apng, .webp, or Pillow was built without WebP.
    """
    suffix = Path(file).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{file} ends in {suffix or 'no suffix'}; a moving picture is {', '.join(FORMATS)}")
    if suffix == ".webp" and not features.check("webp"):
        raise ValueError(f"{file}: this Pillow was built without WebP; use .png or .gif")
    return FORMATS[suffix]


def save_animation(
    frames: Sequence[PIL.Image.Image], file: str | Path, seconds: float = SECONDS, hold: float = HOLD
) -> None:
    """Write pictures of one size as a moving picture that repeats: APNG, WebP (without loss) or GIF, by the suffix.

    Args:
        frames: at least one.
        file: name with a suffix of `animation_format`.
        seconds: duration of all but the last frame.
        hold: seconds of the last frame.
    """
    each = max(20, round(1000 * seconds / max(1, len(frames) - 1)))
    durations = np.full(len(frames), each)
    durations[-1] = round(1000 * hold)
    kind = animation_format(file)
    options: dict[str, Any] = {"lossless": True, "quality": 90, "method": 4} if kind == "WEBP" else {"optimize": True}
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=durations.tolist(), loop=0, **options)
