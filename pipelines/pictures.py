"""Reading the pictures and masks that the editing pipelines are given; saved beside them in every model repository."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from PIL import ImageOps

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels
GRAY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
LUMA = (0.299, 0.587, 0.114)  # of ITU-R 601, as in Pillow


def read_pictures(pictures: Any, channels: int, size: tuple[int, int] | None, name: str = "image") -> torch.Tensor:
    """Pictures of any kind as the model takes them.

    A picture of another size is resized as in training: to the smallest size that covers `size` (bicubic with
    antialiasing), and cropped at the centre. Colours become gray or gray becomes colours as the model needs;
    transparency is laid on white, unless the model has it.

    Args:
        pictures: one or a sequence of: PIL pictures of any mode with a fixed range; NumPy arrays (H, W), (H, W, C) or
            (B, H, W, C); torch tensors (H, W), (C, H, W) or (B, C, H, W). Arrays and tensors are of bool, uint8,
            uint16, or floating point in [0, 1].
        channels: of the result.
        size: (height, width) of the result; None: the pictures' own.
        name: of the argument, for messages.

    Returns:
        float32 (B, channels, height, width) in [−1, 1] on the CPU; of 8-bit pictures of that size exactly v/127.5 − 1.

    Raises:
        ValueError: a picture of another kind, with values out of its range, or empty.
    """
    entries = list(pictures) if isinstance(pictures, list | tuple) else [pictures]
    if not entries:
        raise ValueError(f"{name} is empty; give at least one picture")
    read = [_fit(each, size) for entry in entries for each in _read(entry, channels, name)]
    if len({each.shape for each in read}) > 1:
        sizes = " and ".join(sorted({f"{each.shape[2]}x{each.shape[1]}" for each in read}))
        raise ValueError(f"{name} has pictures of sizes {sizes}, and the model none; give pictures of one size")
    return torch.stack([each * 2 - 1 if each.is_floating_point() else each.float() / 127.5 - 1 for each in read])


def picture_sizes(pictures: Any) -> list[tuple[int, int]]:
    """Height and width of each entry, before anything is done to it."""
    entries = list(pictures) if isinstance(pictures, list | tuple) else [pictures]
    sizes = []
    for each in entries:
        if isinstance(each, PIL.Image.Image):
            upright = ImageOps.exif_transpose(each)
            sizes.append((upright.height, upright.width))
        elif isinstance(each, np.ndarray) and each.ndim > 2:
            sizes.append((each.shape[-3], each.shape[-2]))
        else:
            sizes.append(tuple(each.shape[-2:]))
    return sizes


def read_mask(masks: Any, size: tuple[int, int] | None, name: str = "mask_image") -> torch.Tensor:
    """Masks of any kind that `read_pictures` takes, as bool (B, 1, H, W): true where a mask is white (1/2 or more)."""
    return read_pictures(masks, 1, size, name) >= 0


def _read(entry: Any, channels: int, name: str) -> Sequence[torch.Tensor]:
    """The pictures of one entry as (channels, H, W): uint8 in [0, 255], or float32 in [0, 1]."""
    if isinstance(entry, PIL.Image.Image):
        return [_from_pil(entry, channels, name)]
    if isinstance(entry, np.ndarray):
        if entry.ndim not in (2, 3, 4):
            raise ValueError(f"{name} has shape {entry.shape}; an array is (H, W), (H, W, C) or (B, H, W, C)")
        batch, order = torch.from_numpy(np.ascontiguousarray(entry)), "(H, W, C)"
        batch = batch[None] if batch.ndim == 2 else batch.movedim(-1, -3)
        batch = batch if batch.ndim == 4 else batch[None]
    elif isinstance(entry, torch.Tensor):
        if entry.ndim not in (2, 3, 4):
            raise ValueError(f"{name} has shape {tuple(entry.shape)}; a tensor is (H, W), (C, H, W) or (B, C, H, W)")
        batch, order = entry.detach().cpu()[(None,) * (4 - entry.ndim)], "(C, H, W)"
    else:
        raise ValueError(f"{name} is a {type(entry).__name__}; it must be a PIL picture, a NumPy array or a tensor")
    if batch.numel() == 0 or batch.shape[1] not in {1, 2, 3, 4, channels}:
        raise ValueError(f"{name} has {batch.shape[1]} channels and {batch.numel()} values; a picture is {order}")
    return [_from_tensor(each, channels, name) for each in batch]


def _from_tensor(picture: torch.Tensor, channels: int, name: str) -> torch.Tensor:
    c = picture.shape[0]
    if picture.dtype == torch.uint8 and c in (1, 2, 3, 4) and channels in MODES:
        array = np.ascontiguousarray(picture.permute(1, 2, 0).numpy())
        return _from_pil(PIL.Image.fromarray(array[..., 0] if c == 1 else array), channels, name)
    if picture.dtype == torch.uint8 and c == channels:
        return picture
    if picture.dtype in (torch.bool, torch.uint16):
        picture = picture.double() / (1 if picture.dtype == torch.bool else 65535)
    elif not picture.is_floating_point():
        raise ValueError(f"{name} is of dtype {picture.dtype}; it must be bool, uint8, uint16 or floating point")
    picture = picture.float()
    low, high = float(picture.min()), float(picture.max())
    if not (low >= 0 and high <= 1):  # also for NaN
        raise ValueError(f"{name} has values from {low:g} to {high:g}; floating-point pictures must be in [0, 1]")
    return _with_channels(picture, channels, name)


def _with_channels(picture: torch.Tensor, channels: int, name: str) -> torch.Tensor:
    """A float picture (C, H, W) with another number of channels."""
    c = picture.shape[0]
    if c == channels:
        return picture
    if channels not in MODES or c not in (1, 2, 3, 4):
        raise ValueError(f"{name} has {c} channels; this model needs {channels}")
    colours, alpha = (picture[:-1], picture[-1:]) if c in (2, 4) else (picture, torch.ones_like(picture[:1]))
    if channels == 4:
        return torch.cat([colours.expand(3, -1, -1), alpha])
    colours = colours * alpha + (1 - alpha)  # on white
    if channels == 1 and len(colours) == 3:
        return torch.tensordot(torch.tensor(LUMA), colours, 1)[None]
    return colours.expand(channels, -1, -1)


def _from_pil(picture: PIL.Image.Image, channels: int, name: str) -> torch.Tensor:
    if channels not in MODES:
        raise ValueError(
            f"{name} is a picture of PIL; this model has {channels} channels and needs arrays with as many"
        )
    if picture.mode == "F":
        raise ValueError(f"{name} has PIL mode F, whose pixels have no fixed range; give a float array in [0, 1]")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"{name} has values from {values.min()} to {values.max()}; 16 bits are 0 to 65535")
        picture = PIL.Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        gray = picture.mode in GRAY_MODES
        picture = picture.convert("LA" if gray else "RGBA").convert("RGBA")
        if channels != 4:
            white = PIL.Image.new("RGBA", picture.size, "white")
            picture = PIL.Image.alpha_composite(white, picture).convert("L" if gray else "RGB")
    pixels = np.asarray(picture.convert(MODES[channels])).reshape(picture.height, picture.width, channels)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _fit(picture: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    """A picture (C, H, W), resized to cover `size` and cropped at the centre; unchanged if it has that size."""
    if size is None or tuple(picture.shape[1:]) == tuple(size):
        return picture
    (height, width), (h, w) = size, picture.shape[1:]
    scale = max(height / h, width / w)
    covering = (max(height, round(h * scale)), max(width, round(w * scale)))
    values = picture.float() if picture.is_floating_point() else picture.float() / 255
    values = torch.nn.functional.interpolate(values[None], covering, mode="bicubic", antialias=True)[0].clamp(0, 1)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    values = values[:, top : top + height, left : left + width]
    return values if picture.is_floating_point() else (values * 255).round().to(torch.uint8)
