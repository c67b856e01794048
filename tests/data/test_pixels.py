"""custom_ddpm/data/pixels.py: expected pixels, computed by hand, for every mode; sizes and crops."""

import io

import numpy as np
import PIL.Image
import pytest
import torch

from custom_ddpm.data import denormalise, normalise, open_images
from custom_ddpm.data.pixels import Transform
from data.images import encoded, image_of, make, numbered


def test_normalise_is_f1_and_denormalise_its_exact_inverse():
    values = torch.arange(256, dtype=torch.uint8)
    scaled = normalise(values)
    assert scaled.dtype == torch.float32
    assert scaled[[0, 51, 255]].tolist() == pytest.approx([-1, -0.6, 1], abs=1e-7)
    assert (scaled[0], scaled[255]) == (-1, 1)
    assert torch.equal(denormalise(scaled), values)


def test_denormalise_rounds_and_clips():
    assert denormalise(torch.tensor([-3.0, -1.0, 0.0035, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]


PALETTE = image_of(np.array([[0, 1]], np.uint8))
PALETTE.putpalette([10, 20, 30, 200, 100, 50])
ORIENTED = PIL.Image.Exif()
ORIENTED[PIL.ExifTags.Base.Orientation] = 6  # rotate by 90 degrees clockwise: the left column becomes the top row


def png(pixels, mode=None, dtype=np.uint8, **options):
    return encoded(image_of(np.array(pixels, dtype), mode), **options)


# name: (encoded image, options, expected mode, expected pixels as channels of rows)
CASES = {
    "L": (png([[0, 90]]), {}, "L", [[[0, 90]]]),
    "1": (png([[0, 1]], dtype=bool), {}, "L", [[[0, 255]]]),
    # 200 / 257 = 0.8, 25700 / 257 = 100 exactly, 25900 / 257 = 100.8
    "I;16": (png([[0, 200, 25700, 25900, 65535]], dtype=np.uint16), {}, "L", [[[0, 1, 100, 101, 255]]]),
    "I": (b"P5 2 1 65535 " + np.array([25700, 65535], ">u2").tobytes(), {}, "L", [[[100, 255]]]),
    "RGB": (png([[[1, 2, 3], [4, 5, 6]]]), {}, "RGB", [[[1, 4]], [[2, 5]], [[3, 6]]]),
    "P": (encoded(PALETTE), {}, "RGB", [[[10, 200]], [[20, 100]], [[30, 50]]]),
    "P with transparency": (encoded(PALETTE, transparency=0), {}, "RGB", [[[255, 200]], [[255, 100]], [[255, 50]]]),
    "P over a colour": (
        encoded(PALETTE, transparency=0), {"background": "#0a0b0c"}, "RGB", [[[10, 200]], [[11, 100]], [[12, 50]]],
    ),
    "L with transparency": (png([[0, 90]], transparency=90), {}, "L", [[[0, 255]]]),
    # alpha 0 shows the background, alpha 51 one fifth of the image: 100/5 + 255·4/5 = 224
    "LA": (png([[[9, 0], [100, 51]]], "LA"), {}, "L", [[[255, 224]]]),
    "LA over black": (png([[[9, 0], [100, 51]]], "LA"), {"background": "black"}, "L", [[[0, 20]]]),
    # under a grayscale image the background is converted to gray: blue is 0.114 · 255 = 29
    "LA over blue": (png([[[9, 0], [9, 255]]], "LA"), {"background": "blue"}, "L", [[[29, 9]]]),
    "RGBA over red": (
        png([[[9, 9, 9, 0], [100, 0, 5, 51]]]), {"background": "red"}, "RGB", [[[255, 224]], [[0, 0]], [[0, 1]]],
    ),
    "CMYK": (encoded(PIL.Image.new("CMYK", (1, 1), (0, 255, 255, 0))), {}, "RGB", [[[255]], [[0]], [[0]]]),
    "EXIF": (png([[1, 2]], exif=ORIENTED), {}, "L", [[[1], [2]]]),
    # 0.299 · 255 = 76.2, 0.587 · 255 = 149.7
    "RGB as L": (png([[[255, 0, 0], [0, 255, 0]]]), {"image_mode": "L"}, "L", [[[76, 150]]]),
    "L as RGB": (png([[0, 90]]), {"image_mode": "RGB"}, "RGB", [[[0, 90]]] * 3),
    "L as RGBA": (png([[0, 90]]), {"image_mode": "RGBA"}, "RGBA", [[[0, 90]]] * 3 + [[[255, 255]]]),
    "RGBA as RGBA": (png([[[1, 2, 3, 4]]]), {"image_mode": "RGBA"}, "RGBA", [[[1]], [[2]], [[3]], [[4]]]),
}  # fmt: skip


@pytest.mark.parametrize(("image", "options", "mode", "expected"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_mode_against_pixels_computed_by_hand(tmp_path, image, options, mode, expected, streaming):
    height, width = np.array(expected).shape[1:]
    folder = make(tmp_path / "d", [image])
    data = open_images(dataset_name=folder, streaming=streaming, resolution=(height, width), **options)
    images, labels = data.take(1)
    assert images.dtype == torch.uint8
    assert images.tolist() == [expected]
    assert labels is None
    assert (data.mode, data.channels, data.height, data.width) == (mode, len(expected), height, width)


@pytest.mark.parametrize("streaming", [False, True])
def test_one_colour_image_makes_all_images_rgb(tmp_path, streaming):
    images = [*numbered(3), PIL.Image.new("RGB", (4, 4), (1, 2, 3))]
    data = open_images(dataset_name=make(tmp_path / "d", images), resolution=4, streaming=streaming)
    assert data.mode == "RGB"
    assert data.take(4)[0][:, :, 0, 0].tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2], [1, 2, 3]]
    assert "3 L" in data.describe() and "1 RGB" in data.describe()


@pytest.mark.parametrize("pixels", [np.array([[0.5]], np.float32), np.array([[70000]], np.int32)])
def test_pixels_without_a_known_range_raise(tmp_path, pixels):
    buffer = io.BytesIO()
    image_of(pixels).save(buffer, "TIFF")
    with pytest.raises(ValueError, match=r"row 0: no readable image .*(no fixed range|outside 16 bits)"):
        open_images(dataset_name=make(tmp_path / "d", [buffer.getvalue()]), resolution=1)


@pytest.mark.parametrize("center_crop", [True, False])
@pytest.mark.parametrize("resolution", [1, 3, (2, 5), (5, 2)])
def test_an_image_of_one_pixel_fills_any_resolution(tmp_path, resolution, center_crop):
    folder = make(tmp_path / "d", [PIL.Image.new("RGB", (1, 1), (7, 8, 9))])
    data = open_images(dataset_name=folder, resolution=resolution, center_crop=center_crop)
    (images, _), *_ = data.batches([[0, 1, 2, 3, 4]])
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    assert images.shape == (5, 3, height, width)
    assert (images == torch.tensor([7, 8, 9]).view(3, 1, 1)).all()


def test_downsampling_averages(tmp_path):
    """A checkerboard of single pixels becomes gray; without antialiasing pixels would stay black or white."""
    board = np.indices((64, 64)).sum(0) % 2 * 255
    data = open_images(dataset_name=make(tmp_path / "d", [image_of(board.astype(np.uint8))]), resolution=8)
    inner = data.take(1)[0][0, 0, 1:-1, 1:-1].float()
    assert inner.sub(127.5).abs().max() < 4


def test_the_aspect_ratio_is_kept_and_the_crop_centred(tmp_path):
    bands = np.zeros((20, 60), np.uint8)
    bands[:, 20:40], bands[:, 40:] = 100, 200
    folder = make(tmp_path / "d", [image_of(bands)])
    for center_crop in (True, False):  # take() crops at the centre in both cases
        image = open_images(dataset_name=folder, resolution=10, center_crop=center_crop).take(1)[0][0, 0]
        assert (image[:, 2:-2] == 100).all()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("streaming", [False, True])
def test_random_crops_are_exact_windows_uniform_and_reproducible(tmp_path, axis, streaming):
    """All pixels of the image's column (row) k are k, so that a crop shows its offset."""
    pixels = np.broadcast_to(np.arange(13, dtype=np.uint8), (8, 13))
    folder = make(tmp_path / "d", [image_of(pixels if axis else pixels.T)] * 50)
    data = open_images(dataset_name=folder, resolution=8, seed=5, streaming=streaming)
    ((images, _),) = data.batches([range(600)])
    crops = images[:, 0] if axis else images[:, 0].transpose(1, 2)
    offsets = crops[:, 0, 0].long()
    assert torch.equal(crops.long(), (offsets[:, None] + torch.arange(8)).unsqueeze(1).expand(-1, 8, -1))
    counts = torch.bincount(offsets, minlength=6)
    assert len(counts) == 6 and counts.min() > 60  # expected 100, standard deviation 9
    again = torch.cat([images for images, _ in data.batches(range(p, p + 50) for p in range(0, 600, 50))])
    assert torch.equal(again, images)
    ((other, _),) = open_images(dataset_name=folder, resolution=8, seed=6, streaming=streaming).batches([range(600)])
    assert not torch.equal(other, images)


def test_a_centre_crop_is_the_same_at_every_visit(tmp_path):
    folder = make(tmp_path / "d", [image_of(np.arange(13 * 8, dtype=np.uint8).reshape(8, 13))])
    data = open_images(dataset_name=folder, resolution=8, center_crop=True)
    ((images, _),) = data.batches([range(20)])
    assert (images == images[0]).all()


def test_the_repr_of_a_transform_is_that_of_version_0_1():
    """The fingerprint of a stream, which checkpoints contain, is a hash of it."""
    text = "_Transform(height=6, width=5, center_crop=True, image_mode='L', background='white', version=1)"
    assert repr(Transform(6, 5, True, "L", "white")) == text
