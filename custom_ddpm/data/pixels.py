"""Decoding of images to uint8 pixels of one mode and size, and their normalisation (F1).

Modes: grayscale images (1, L, LA, 16 bits) are converted to L, all others (RGB, RGBA, palette, CMYK, …) to RGB. If a
dataset contains both, all become RGB; for a stream the first images decide. Transparent pixels are composited over
`background`, 16 bits are scaled to 8 bits, and the EXIF orientation is applied. `image_mode` forces L, RGB or RGBA;
RGBA keeps the alpha channel.

Size: an image is resized (bicubic with antialiasing, aspect ratio kept) to the smallest size that covers the
resolution, then cropped: at the centre with `center_crop`, otherwise at a random offset, redrawn at every visit.
"""

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from PIL import ImageColor, ImageOps

from ..messages import one_line

Row = dict[str, Any]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels
GRAY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}


LARGEST_NATURAL = 64  # pixels of a side; larger pictures are resized unless a resolution is given


class UnreadableImageError(ValueError):
    """A row that contains no image, or an image that cannot be decoded."""


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Map pixels from [0, 255] to [-1, 1] by x / 127.5 - 1 (F1).

    Args:
        images: uint8 tensor of any shape.

    Returns:
        float32 tensor of the same shape on the same device.
    """
    return images.to(torch.float32) / 127.5 - 1


def denormalise(images: torch.Tensor) -> torch.Tensor:
    """Map pixels from [-1, 1] to [0, 255], rounded and clipped: the exact inverse of `normalise`.

    Args:
        images: floating-point tensor of any shape; values outside [-1, 1] are clipped.

    Returns:
        uint8 tensor of the same shape on the same device.
    """
    return ((images.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def crop(pixels: np.ndarray, height: int, width: int, seed: int, position: int | None) -> np.ndarray:
    """Cut a window (C, height, width) out of an image that covers it.

    Args:
        pixels: array (C, h, w) with h = height or w = width, and neither smaller.
        height, width: size of the window in pixels.
        seed: seed of the random offset, >= 0.
        position: sample position, which together with the seed determines the offset; None: the centre.
    """
    # At most one axis exceeds the window, so one random number places it. The third word of the seed separates these
    # draws from those of `sample_order`.
    where = 0.5 if position is None else np.random.default_rng([seed, position, 1]).random()
    top, left = int(where * (pixels.shape[1] - height + 1)), int(where * (pixels.shape[2] - width + 1))
    return pixels[:, top : top + height, left : left + width]


def _convert_mode(image: PIL.Image.Image, image_mode: str | None, background: str) -> PIL.Image.Image:
    """Convert an image to 8 bits in mode L, RGB or `image_mode`, by the rules in the module's docstring."""
    gray = image.mode in GRAY_MODES
    if image.mode == "F":
        raise ValueError("float pixels have no fixed range; store the image with 8 or 16 bits")
    transparent = image.info.get("transparency")  # of a PNG: the gray value or colour that is transparent
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixel values {values.min()} to {values.max()} are outside 16 bits (0 to 65535)")
        image = PIL.Image.fromarray(((values + 128) // 257).astype(np.uint8))
        if transparent is not None:
            image.putalpha(PIL.Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    elif image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        # Pillow reduces colours of 16 bits to their upper 8, but not the transparent one.
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.has_transparency_data:
        image = image.convert("LA" if gray else "RGBA").convert("RGBA")
        if image_mode != "RGBA":
            # For a grayscale image the background is converted to gray, so that transparency adds no colour.
            colour = ImageColor.getcolor(background, "L" if gray else "RGB")
            canvas = PIL.Image.new("L" if gray else "RGB", image.size, colour)
            image = PIL.Image.alpha_composite(canvas.convert("RGBA"), image)
    return image.convert(image_mode or ("L" if gray else "RGB"))


@dataclass(frozen=True)
class Transform:
    """Decoding of an encoded image to pixels: mode conversion, resizing and the centre crop.

    Args:
        height, width: size of the final image in pixels.
        center_crop: whether to crop at the centre; if not, the crop is left to `crop`.
        image_mode: "L", "RGB" or "RGBA", or None for the rules in the module's docstring.
        background: colour under transparent pixels, as Pillow names it.
        version: to be increased with every change of the resulting pixels, which invalidates existing caches.
    """

    # A stream's fingerprint contains the repr of the transform, and the name of a cache file its pickle: both contain
    # these names. A change would prevent old streaming runs from resuming and orphan old caches.
    __module__ = "custom_ddpm.data"
    __qualname__ = "_Transform"

    height: int
    width: int
    center_crop: bool
    image_mode: str | None
    background: str
    version: int = 1

    def __call__(self, raw: Row | None) -> tuple[str, np.ndarray]:
        """Decode one image.

        Args:
            raw: cell of a column `datasets.Image(decode=False)`: {"bytes", "path"}.

        Returns:
            The PIL mode of the encoded image, and uint8 pixels (C, h, w); without `center_crop` they cover
            (height, width) and are still to be cropped.

        Raises:
            UnreadableImageError: if the cell is empty or the image cannot be decoded or converted.
        """
        try:
            if raw is None:
                raise ValueError("the row is empty")
            found = datasets.Image().decode_example(raw)  # applies the EXIF orientation
            resize = ImageOps.fit if self.center_crop else ImageOps.cover
            image = _convert_mode(found, self.image_mode, self.background)
            image = resize(image, (self.width, self.height), method=PIL.Image.Resampling.BICUBIC)
        except Exception as error:  # decoders raise exceptions of any type on corrupt files
            path = f"{raw['path']!r}, " if raw and raw["path"] else ""
            cause = f"{path}{type(error).__name__}: {one_line(error)}"
            raise UnreadableImageError(f"no readable image ({cause}); --on_bad_image skip leaves it out") from error
        pixels = np.asarray(image).reshape(image.height, image.width, -1)
        return found.mode, np.ascontiguousarray(pixels.transpose(2, 0, 1))


def natural_resolution(dataset: datasets.Dataset | datasets.IterableDataset, column: str) -> tuple[int, int]:
    """The size to train at where none is given, from up to 16 pictures spread over the dataset (a stream's first one).

    The size that all of them have, if no side has more than 64 pixels; otherwise a square of 64 pixels, or as many as
    the shorter side of the middle one of them has, in whole eights.

    Returns:
        Height and width in pixels; 64 and 64 if none of the pictures is readable.
    """
    encoded = dataset.select_columns(column).cast_column(column, datasets.Image(decode=False))
    if isinstance(encoded, datasets.IterableDataset):
        rows = list(encoded.take(1))
    else:
        places = sorted({i * len(encoded) // 16 for i in range(16)} & set(range(len(encoded))))
        rows = [encoded[i] for i in places]
    sizes = []
    for row in rows:
        try:
            found = datasets.Image().decode_example(row[column])
        except Exception:
            continue
        sizes.append((found.height, found.width))
    if not sizes:
        return LARGEST_NATURAL, LARGEST_NATURAL
    if len(set(sizes)) == 1 and max(sizes[0]) <= LARGEST_NATURAL:
        return sizes[0]
    shorter = sorted(min(size) for size in sizes)[len(sizes) // 2]
    side = max(8, min(LARGEST_NATURAL, shorter) // 8 * 8)
    return side, side
