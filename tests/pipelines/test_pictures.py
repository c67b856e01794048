"""Pictures and masks of every kind, as the editing pipelines read them."""

import numpy as np
import PIL.Image
import pytest
import torch
from custom_ddpm.pipelines.pictures import read_mask, read_pictures

from custom_ddpm.data.pixels import Transform, normalise

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
GRAY = PIXELS[..., 0]


def levels(pixels):
    """Pixels (…, H, W, C) as the model takes them, by F1."""
    return torch.from_numpy(pixels.astype(np.float64) / 127.5 - 1).movedim(-1, -3).float()


@pytest.mark.parametrize(
    "picture",
    [
        PIL.Image.fromarray(PIXELS),
        PIXELS,
        PIXELS[None],
        [PIXELS],
        PIXELS / 255,
        (PIXELS / 255).astype(np.float16).astype(np.float32) * 0 + PIXELS.astype(np.float32) / 255,
        (PIXELS.astype(np.uint16) * 257),
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        torch.from_numpy(PIXELS).permute(2, 0, 1)[None] / 255,
        (torch.from_numpy(PIXELS).permute(2, 0, 1) / 255,),
    ],
)
def test_kinds_of_pictures_are_read_alike(picture):
    read = read_pictures(picture, 3, (6, 8))
    assert read.dtype == torch.float32 and read.shape == (1, 3, 6, 8)
    torch.testing.assert_close(read[0], levels(PIXELS), atol=1e-6, rtol=0)


def test_8_bits_are_exact():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for picture in (values, PIL.Image.fromarray(values), torch.from_numpy(values)):
        assert torch.equal(read_pictures(picture, 1, (16, 16))[0, 0], normalise(torch.from_numpy(values)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_mode_is_read_as_in_training(mode, channels, tmp_path):
    if mode in ("I", "I;16"):
        picture = PIL.Image.fromarray(GRAY.astype(np.uint16) * 257)
        picture = picture.convert("I") if mode == "I" else picture
    elif mode == "LAB":
        picture = PIL.Image.frombytes("LAB", (8, 6), PIXELS.tobytes())
    else:
        picture = PIL.Image.fromarray(PIXELS).convert(mode)
    if mode in ("LA", "RGBA"):
        picture.putalpha(PIL.Image.fromarray(GRAY))
    if mode == "LAB" and channels != 3:
        with pytest.raises(ValueError, match="conversion"):
            picture.convert("L")
        return
    read = read_pictures(picture, channels, (6, 8))
    assert read.shape == (1, channels, 6, 8)
    if mode in ("CMYK", "YCbCr", "HSV", "LAB"):
        return  # files of the training have other modes
    file = tmp_path / "a.png"
    (PIL.Image.fromarray(GRAY.astype(np.uint16) * 257) if mode == "I" else picture).save(file)
    image_mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    expected = Transform(6, 8, True, image_mode, "white")({"bytes": file.read_bytes(), "path": None})[1]
    assert torch.equal(read[0], normalise(torch.from_numpy(expected)))


@pytest.mark.parametrize("size", [(3, 4), (12, 16), (6, 6), (10, 5)])
def test_other_sizes_are_covered_and_cropped_at_the_centre_as_in_training(size, tmp_path):
    smooth = np.add.outer(np.linspace(0, 120, 40), np.linspace(0, 120, 60)).astype(np.uint8)
    file = tmp_path / "a.png"
    PIL.Image.fromarray(smooth).save(file)
    read = read_pictures(smooth, 1, size)
    expected = Transform(*size, True, "L", "white")({"bytes": file.read_bytes(), "path": None})[1]
    assert read.shape == (1, 1, *size)
    torch.testing.assert_close(read[0], normalise(torch.from_numpy(expected)), atol=0.08, rtol=0)
    floats = read_pictures(smooth / 255, 1, size)
    torch.testing.assert_close(floats, read, atol=0.006, rtol=0)


def test_without_a_size_pictures_keep_theirs():
    assert read_pictures([GRAY, GRAY], 1, None).shape == (2, 1, 6, 8)
    with pytest.raises(ValueError, match="sizes 6x6 and 8x6"):
        read_pictures([GRAY, GRAY[:, :6]], 1, None)


@pytest.mark.parametrize(
    ("floats", "channels", "expected"),
    [
        ([0.2, 0.4, 0.6], 1, [0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.6]),
        ([0.2], 3, [0.2] * 3),
        ([0.2, 0.25], 3, [0.2 * 0.25 + 0.75] * 3),
        ([0.2, 0.4, 0.6, 0.5], 3, [0.6, 0.7, 0.8]),
        ([0.2, 0.4, 0.6], 4, [0.2, 0.4, 0.6, 1.0]),
        ([0.2, 0.5], 4, [0.2, 0.2, 0.2, 0.5]),
        ([0.1, 0.2, 0.3, 0.4, 0.5], 5, [0.1, 0.2, 0.3, 0.4, 0.5]),
    ],
)
def test_channels_of_floats(floats, channels, expected):
    read = read_pictures(np.array(floats)[None, None], channels, (1, 1))
    np.testing.assert_allclose(read.flatten().numpy(), 2 * np.array(expected) - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("picture", "channels", "message"),
    [
        ("a.png", 3, "image is a str; it must be a PIL picture, a NumPy array or a tensor"),
        ([], 3, "image is empty"),
        (PIXELS.astype(np.float32), 3, "floating-point pictures must be in"),
        (np.full((6, 8, 3), np.nan), 3, "has values from nan to nan"),
        (PIXELS.astype(np.int64), 3, "is of dtype torch.int64; it must be bool, uint8"),
        (np.zeros((6, 0, 3)), 3, "has 3 channels and 0 values"),
        (np.zeros((2, 6, 8)), 3, r"has 8 channels and 96 values; a picture is \(H, W, C\)"),
        (torch.zeros(6, 8, 3), 3, r"has 6 channels and 144 values; a picture is \(C, H, W\)"),
        (np.zeros(6), 3, r"has shape \(6,\); an array is"),
        (torch.zeros(1, 1, 1, 6, 8), 3, "a tensor is"),
        (PIL.Image.new("F", (8, 6)), 3, "PIL mode F, whose pixels have no fixed range"),
        (PIL.Image.fromarray(np.full((6, 8), -1, np.int32)), 3, "16 bits are 0 to 65535"),
        (PIL.Image.new("RGB", (8, 6)), 5, "needs arrays with"),
        (np.zeros((6, 8, 3)), 5, "has 3 channels; this model needs 5"),
    ],
)
def test_what_is_no_picture_is_told_in_one_line(picture, channels, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_pictures(picture, channels, (6, 8))
    assert "\n" not in str(caught.value)


def test_masks_are_true_where_they_are_white():
    values = np.array([[0, 127, 128, 255]], np.uint8)
    expected = [[False, False, True, True]]
    for mask in (values, PIL.Image.fromarray(values), torch.from_numpy(values), values / 255, values >= 128):
        read = read_mask(mask, (1, 4))
        assert read.dtype == torch.bool and read[0, 0].tolist() == expected
    colours = PIL.Image.new("RGB", (4, 1), "white")
    assert read_mask(colours, (1, 4)).all()
