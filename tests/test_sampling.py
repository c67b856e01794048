"""Batched and distributed sampling with one seed per image, and image grids."""

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import make_pipeline
from runs import needs_forkserver, on_processes

from custom_ddpm.sampling import image_grid, sample_images


@pytest.fixture(scope="module", autouse=True)
def one_process():
    AcceleratorState._reset_state(reset_partial_state=True)


def test_an_image_depends_on_its_seed_only(pipeline):
    seeds = [3, 1, 4, 1, 5]
    whole = sample_images(pipeline, seeds, batch_size=5)
    assert whole.dtype == torch.uint8 and whole.shape == (5, 1, 8, 8) and whole.device.type == "cpu"
    assert torch.equal(whole[1], whole[3])
    assert len({bytes(image.numpy()) for image in whole}) == 4
    for batch_size in (1, 2, 3, 64):
        assert torch.equal(sample_images(pipeline, seeds, batch_size=batch_size), whole)
    assert torch.equal(sample_images(pipeline, seeds[::-1], batch_size=2), whole.flip(0))


def test_images_equal_those_of_the_pipeline(pipeline):
    for seed, image in zip([0, 7], sample_images(pipeline, [0, 7], num_inference_steps=5), strict=True):
        expected = pipeline(generator=torch.Generator().manual_seed(seed), num_inference_steps=5).images[0]
        np.testing.assert_array_equal(image[0], np.asarray(expected))


def test_labels_belong_to_their_seeds(class_pipeline):
    whole = sample_images(class_pipeline, [0, 0, 1], [0, 2, 2], guidance_scale=2.0)
    for i, (seed, label) in enumerate([(0, 0), (0, 2), (1, 2)]):
        assert torch.equal(sample_images(class_pipeline, [seed], [label], guidance_scale=2.0)[0], whole[i])
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize(
    ("seeds", "options", "message"),
    [
        ([], {}, "seeds is empty"),
        ([1], {"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ([1, 2], {"class_labels": [0]}, "there are 1 class_labels for 2 seeds"),
        ([1], {"class_labels": [0, 1]}, "there are 2 class_labels for 1 seeds"),
        ([1], {"class_labels": [3]}, "class label 3 is unknown"),
    ],
)
def test_arguments_that_do_not_fit(class_pipeline, seeds, options, message):
    with pytest.raises(ValueError, match=message):
        sample_images(class_pipeline, seeds, **options)


def sample_and_save(folder):
    images = sample_images(make_pipeline(3), [5, 6, 7, 8, 9], batch_size=2)
    torch.save(images, folder / f"{torch.distributed.get_rank()}.pt")


@needs_forkserver
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_share_the_work_and_all_return_every_image(tmp_path, processes):
    expected = sample_images(make_pipeline(3), [5, 6, 7, 8, 9], batch_size=2)
    on_processes(processes, sample_and_save, tmp_path)
    for rank in range(processes):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), expected)


# ---- grids ----


def test_every_pixel_of_a_grid():
    images = torch.tensor([[[[1, 2], [3, 4]]], [[[5, 6], [7, 8]]], [[[9, 10], [11, 12]]]], dtype=torch.uint8)
    grid = image_grid(images, columns=2, min_size=4)
    assert grid.mode == "L"
    __ = 255
    # Images enlarged by 2, with a gap of two pixels around each.
    expected = [
        [__] * 14,
        [__] * 14,
        [__, __, 1, 1, 2, 2, __, __, 5, 5, 6, 6, __, __],
        [__, __, 1, 1, 2, 2, __, __, 5, 5, 6, 6, __, __],
        [__, __, 3, 3, 4, 4, __, __, 7, 7, 8, 8, __, __],
        [__, __, 3, 3, 4, 4, __, __, 7, 7, 8, 8, __, __],
        [__] * 14,
        [__] * 14,
        [__, __, 9, 9, 10, 10, *[__] * 8],
        [__, __, 9, 9, 10, 10, *[__] * 8],
        [__, __, 11, 11, 12, 12, *[__] * 8],
        [__, __, 11, 11, 12, 12, *[__] * 8],
        [__] * 14,
        [__] * 14,
    ]
    np.testing.assert_array_equal(np.asarray(grid), expected)


def test_names_stand_beside_the_rows_and_move_nothing_else():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 64, 64)
    plain = np.asarray(image_grid(images, columns=3))
    named = np.asarray(image_grid(images, columns=3, row_names=["Ankle boot", "a"]))
    side = named.shape[1] - plain.shape[1]
    assert 60 < side < 100  # ten characters of 13 pixels
    np.testing.assert_array_equal(named[:, side:], plain)
    for row in range(2):
        middle = 4 + row * 68 + 32
        ink = np.argwhere(named[middle - 9 : middle + 9, :side] < 128)
        assert len(ink) and abs(ink[:, 0].mean() - 9) < 4 and ink[:, 1].max() >= side - 3
        others = named[middle - 34 : middle - 9, :side]
        assert (others == 255).all()
    long = image_grid(images, columns=3, row_names=["wide " * 50, ""])
    assert long.width <= plain.shape[1] + 4 + 160
    unreadable = image_grid(images, columns=3, row_names=["\U0010fffd", "\U0010fffd"])  # in no font
    np.testing.assert_array_equal(np.asarray(unreadable), plain)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_modes_and_channels_of_a_grid(channels, mode):
    image = torch.arange(channels, dtype=torch.uint8).view(1, channels, 1, 1).expand(1, channels, 64, 96)
    grid = image_grid(image)
    gap = 64 // 16
    assert (grid.mode, grid.size) == (mode, (96 + 2 * gap, 64 + 2 * gap))
    assert grid.getpixel((gap, gap)) == (0 if channels == 1 else tuple(range(channels)))
    assert grid.getpixel((gap - 1, gap)) == (255 if channels == 1 else (255,) * channels)


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (4, 2), (5, 3), (10, 4), (16, 4)])
def test_a_grid_is_square_by_default(count, columns):
    grid = image_grid(torch.zeros(count, 1, 64, 64, dtype=torch.uint8))
    assert grid.size == (columns * 68 + 4, -(-count // columns) * 68 + 4)
