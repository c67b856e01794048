"""custom_ddpm/data.py: pixels by hand for every mode, the endless order, labels, bad rows, streams, caches."""

import io
import itertools
import json
import multiprocessing
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import torch
from hub.server import HubServer

from custom_ddpm.data import denormalise, normalise, open_images, sample_order

ROOT = Path(__file__).parents[1]
# `datasets` pauses for 5 seconds whenever it has read a shuffled parquet stream to its end, or drops one.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """A cache of its own for each test, and no progress bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def encoded(image, **options):
    """A picture as the bytes of a PNG file (TIFF where PNG has no such mode)."""
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if image.mode in ("CMYK", "F") else "PNG", **options)
    return buffer.getvalue()


def picture(pixels, mode=None):
    image = PIL.Image.fromarray(np.asarray(pixels))
    return image if mode is None else image.convert(mode)


def make(folder, images, split="train", **columns):
    """Write a parquet dataset of images (PIL or encoded bytes, None: an empty row) and other columns (values, type)."""
    rows = [None if i is None else {"bytes": i if isinstance(i, bytes) else encoded(i), "path": None} for i in images]
    features = {"image": datasets.Image()} | {name: dtype for name, (_, dtype) in columns.items()}
    data = {"image": rows} | {name: values for name, (values, _) in columns.items()}
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(data, datasets.Features(features)).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def numbered(n, size=4):
    """n gray pictures, the i-th of which is i everywhere."""
    return [picture(np.full((size, size), i, np.uint8)) for i in range(n)]


def visited(data, batches):
    """The numbers of the numbered pictures that come out."""
    return [int(image[0, 0, 0]) for images, _ in data.batches(batches) for image in images]


# normalise


def test_normalise_is_f1_and_denormalise_undoes_it_exactly():
    values = torch.arange(256, dtype=torch.uint8)
    scaled = normalise(values)
    assert scaled.dtype == torch.float32
    assert scaled[[0, 51, 255]].tolist() == pytest.approx([-1, -0.6, 1], abs=1e-7)
    assert (scaled[0], scaled[255]) == (-1, 1)
    assert torch.equal(denormalise(scaled), values)


def test_denormalise_rounds_and_clips():
    assert denormalise(torch.tensor([-3.0, -1.0, 0.0035, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]


# modes, by hand

PALETTE = picture(np.array([[0, 1]], np.uint8))
PALETTE.putpalette([10, 20, 30, 200, 100, 50])
ORIENTED = PIL.Image.Exif()
ORIENTED[PIL.ExifTags.Base.Orientation] = 6  # to be turned clockwise: what is left comes on top


def png(pixels, mode=None, dtype=np.uint8, **options):
    return encoded(picture(np.array(pixels, dtype), mode), **options)


# name: (file, options, mode, pixels as channels of rows)
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
    # alpha 0 shows the background, alpha 51 a fifth of the picture: 100/5 + 255·4/5 = 224
    "LA": (png([[[9, 0], [100, 51]]], "LA"), {}, "L", [[[255, 224]]]),
    "LA over black": (png([[[9, 0], [100, 51]]], "LA"), {"background": "black"}, "L", [[[0, 20]]]),
    # a coloured background counts as gray under gray: blue is 0.114 · 255 = 29
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
def test_every_mode_by_hand(tmp_path, image, options, mode, expected, streaming):
    height, width = np.array(expected).shape[1:]
    folder = make(tmp_path / "d", [image])
    data = open_images(dataset_name=folder, streaming=streaming, resolution=(height, width), **options)
    images, labels = data.take(1)
    assert images.dtype == torch.uint8
    assert images.tolist() == [expected]
    assert labels is None
    assert (data.mode, data.channels, data.height, data.width) == (mode, len(expected), height, width)


@pytest.mark.parametrize("streaming", [False, True])
def test_one_coloured_picture_makes_all_rgb(tmp_path, streaming):
    images = [*numbered(3), PIL.Image.new("RGB", (4, 4), (1, 2, 3))]
    data = open_images(dataset_name=make(tmp_path / "d", images), resolution=4, streaming=streaming)
    assert data.mode == "RGB"
    assert data.take(4)[0][:, :, 0, 0].tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2], [1, 2, 3]]
    assert "3 L" in data.describe() and "1 RGB" in data.describe()


@pytest.mark.parametrize("pixels", [np.array([[0.5]], np.float32), np.array([[70000]], np.int32)])
def test_pixels_without_a_known_range_are_refused(tmp_path, pixels):
    buffer = io.BytesIO()
    picture(pixels).save(buffer, "TIFF")
    with pytest.raises(ValueError, match=r"row 0: no readable image .*(no fixed range|16 bits hold)"):
        open_images(dataset_name=make(tmp_path / "d", [buffer.getvalue()]), resolution=1)


# sizes


@pytest.mark.parametrize("center_crop", [True, False])
@pytest.mark.parametrize("resolution", [1, 3, (2, 5), (5, 2)])
def test_a_picture_of_one_pixel_fills_any_resolution(tmp_path, resolution, center_crop):
    folder = make(tmp_path / "d", [PIL.Image.new("RGB", (1, 1), (7, 8, 9))])
    data = open_images(dataset_name=folder, resolution=resolution, center_crop=center_crop)
    (images, _), *_ = data.batches([[0, 1, 2, 3, 4]])
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    assert images.shape == (5, 3, height, width)
    assert (images == torch.tensor([7, 8, 9]).view(3, 1, 1)).all()


def test_reduction_averages(tmp_path):
    """A board of single black and white pixels must come out gray; picking pixels would leave black or white."""
    board = np.indices((64, 64)).sum(0) % 2 * 255
    data = open_images(dataset_name=make(tmp_path / "d", [picture(board.astype(np.uint8))]), resolution=8)
    inner = data.take(1)[0][0, 0, 1:-1, 1:-1].float()
    assert inner.sub(127.5).abs().max() < 4


def test_proportions_are_kept_and_the_centre_stays(tmp_path):
    bands = np.zeros((20, 60), np.uint8)
    bands[:, 20:40], bands[:, 40:] = 100, 200
    folder = make(tmp_path / "d", [picture(bands)])
    for center_crop in (True, False):  # take() is centred in any case
        image = open_images(dataset_name=folder, resolution=10, center_crop=center_crop).take(1)[0][0, 0]
        assert (image[:, 2:-2] == 100).all()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("streaming", [False, True])
def test_random_crops_are_exact_windows_uniform_and_repeatable(tmp_path, axis, streaming):
    """The picture's k-th column (row) is k everywhere, so that a crop shows its offset."""
    pixels = np.broadcast_to(np.arange(13, dtype=np.uint8), (8, 13))
    folder = make(tmp_path / "d", [picture(pixels if axis else pixels.T)] * 50)
    data = open_images(dataset_name=folder, resolution=8, seed=5, streaming=streaming)
    ((images, _),) = data.batches([range(600)])
    crops = images[:, 0] if axis else images[:, 0].transpose(1, 2)
    offsets = crops[:, 0, 0].long()
    assert torch.equal(crops.long(), (offsets[:, None] + torch.arange(8)).unsqueeze(1).expand(-1, 8, -1))
    counts = torch.bincount(offsets, minlength=6)
    assert len(counts) == 6 and counts.min() > 60  # 100 expected, 9 the standard deviation
    again = torch.cat([images for images, _ in data.batches(range(p, p + 50) for p in range(0, 600, 50))])
    assert torch.equal(again, images)
    ((other, _),) = open_images(dataset_name=folder, resolution=8, seed=6, streaming=streaming).batches([range(600)])
    assert not torch.equal(other, images)


def test_a_centre_crop_is_never_random(tmp_path):
    folder = make(tmp_path / "d", [picture(np.arange(13 * 8, dtype=np.uint8).reshape(8, 13))])
    data = open_images(dataset_name=folder, resolution=8, center_crop=True)
    ((images, _),) = data.batches([range(20)])
    assert (images == images[0]).all()


# order


def test_sample_order_is_a_permutation_of_its_own_for_every_seed_and_epoch():
    orders = [tuple(sample_order(seed, epoch, 50)) for seed in range(6) for epoch in range(6)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(orders)) == 36


def test_sample_order_is_uniform():
    firsts = np.bincount([sample_order(3, epoch, 5)[0] for epoch in range(2000)])
    assert np.abs(firsts - 400).max() < 90  # five standard deviations


def test_batches_follow_sample_order(tmp_path):
    n = 23
    folder = make(tmp_path / "d", numbered(n), label=([i * i for i in range(n)], datasets.Value("int32")))
    data = open_images(dataset_name=folder, resolution=4, seed=11, class_conditional=True)
    positions = [[0, 1, 2], [22, 23, 24], [5], list(range(100, 180)), [10**9]]
    batches = list(data.batches(positions))
    for batch, (images, labels) in zip(positions, batches, strict=True):
        expected = [sample_order(11, p // n, n)[p % n] for p in batch]
        assert images[:, 0, 0, 0].tolist() == expected
        assert labels.dtype == torch.int64 and labels.tolist() == expected
        assert images.shape == (len(batch), 1, 4, 4) and images.dtype == torch.uint8


@pytest.mark.parametrize("streaming", [False, True])
def test_each_epoch_visits_each_picture_once_and_anew(tmp_path, streaming):
    data = open_images(dataset_name=make(tmp_path / "d", numbered(20)), resolution=4, streaming=streaming)
    order = visited(data, [range(p, p + 8) for p in range(0, 80, 8)])  # batches straddle the epochs
    epochs = [order[i : i + 20] for i in range(0, 80, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_order_is_the_same_for_any_number_of_processes_and_after_a_restart(tmp_path, streaming):
    folder = make(tmp_path / "d", numbered(20))

    def fresh():
        return open_images(dataset_name=folder, resolution=4, seed=3, streaming=streaming)

    whole = visited(fresh(), [range(p, p + 6) for p in range(0, 90, 6)])
    parts = [visited(fresh(), [range(p + 3 * rank, p + 3 * rank + 3) for p in range(0, 90, 6)]) for rank in (0, 1)]
    merged = [sample for p in range(0, 45, 3) for part in parts for sample in part[p : p + 3]]
    assert merged == whole
    assert visited(fresh(), [range(p, p + 6) for p in range(48, 90, 6)]) == whole[48:]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_batch_may_be_larger_than_the_dataset_and_the_dataset_one_picture(tmp_path, streaming):
    for n in (1, 3):
        folder = make(tmp_path / f"d{n}", numbered(n))
        order = visited(open_images(dataset_name=folder, resolution=4, streaming=streaming), [range(30)])
        assert np.bincount(order).tolist() == [30 // n] * n


def test_positions_may_be_arrays_and_tensors(tmp_path):
    data = open_images(dataset_name=make(tmp_path / "d", numbered(9)), resolution=4)
    expected = visited(data, [[3, 4, 5]])
    assert visited(data, [np.array([3, 4, 5])]) == visited(data, [torch.tensor([3, 4, 5])]) == expected


# the thread behind batches()


@pytest.mark.parametrize(("streaming", "num_workers"), [(False, 0), (True, 0), (True, 2)])
def test_closing_stops_thread_and_workers(tmp_path, streaming, num_workers):
    folder = make(tmp_path / "d", numbered(9))
    data = open_images(dataset_name=folder, resolution=4, streaming=streaming, num_workers=num_workers)
    batches = data.batches([p, p + 1] for p in itertools.count(0, 2))
    next(batches)
    assert any(thread.name.startswith("images") for thread in threading.enumerate())
    assert len(multiprocessing.active_children()) == num_workers
    batches.close()
    assert not any(thread.name.startswith("images") for thread in threading.enumerate())
    assert not multiprocessing.active_children()


def test_errors_of_the_background_surface_in_order(tmp_path):
    def positions():
        yield [0]
        raise RuntimeError("no more positions")

    batches = open_images(dataset_name=make(tmp_path / "d", numbered(2)), resolution=4).batches(positions())
    next(batches)
    with pytest.raises(RuntimeError, match="no more positions"):
        next(batches)


def test_memory_is_pinned_where_asked(tmp_path, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    folder = make(tmp_path / "d", numbered(3), label=([0, 1, 0], datasets.ClassLabel(2)))
    data = open_images(dataset_name=folder, resolution=4, class_conditional=True)
    list(data.batches([[0, 1]]))
    assert not pinned
    ((images, labels),) = data.batches([[0, 1]], pin_memory=True)
    assert torch.equal(images, pinned[0]) and torch.equal(labels, pinned[1])


# labels


def labelled(tmp_path, values, dtype, **options):
    folder = make(tmp_path / "d", numbered(len(values)), label=(values, dtype))
    data = open_images(dataset_name=folder, resolution=4, class_conditional=True, **options)
    return data.take(99)[1].tolist(), data.id2label


@pytest.mark.parametrize(
    ("values", "dtype", "labels", "id2label"),
    [
        ([9, 3, 7, 3, 10], datasets.Value("int64"), [2, 0, 1, 0, 3], {0: "3", 1: "7", 2: "9", 3: "10"}),
        (["dog", "cat", "dog"], datasets.Value("string"), [1, 0, 1], {0: "cat", 1: "dog"}),
        (["dog", "cat", "dog"], datasets.Value("large_string"), [1, 0, 1], {0: "cat", 1: "dog"}),
        ([True, False], datasets.Value("bool"), [1, 0], {0: "False", 1: "True"}),
        ([4, 1, 4], datasets.ClassLabel(names=["z", "y", "x", "w", "v"]), [1, 0, 1], {0: "y", 1: "v"}),
    ],
)
def test_labels_are_numbered_without_gaps(tmp_path, values, dtype, labels, id2label):
    assert labelled(tmp_path, values, dtype) == (labels, id2label)


def test_a_held_out_split_takes_the_numbering_of_the_training_data(tmp_path):
    id2label = {0: "3", 1: "7", 2: "9"}
    assert labelled(tmp_path, [9, 7], datasets.Value("int64"), id2label=id2label) == ([2, 1], id2label)
    with pytest.raises(ValueError, match="row 1 has the label 8"):
        labelled(tmp_path, [9, 8], datasets.Value("int64"), id2label=id2label)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([0, 1, None], datasets.Value("int64")), ([0, 1, -1], datasets.ClassLabel(2)), ([-1] * 3, datasets.ClassLabel(2))],
)
def test_rows_without_a_label_are_named(tmp_path, values, dtype):
    with pytest.raises(ValueError, match=r"row \d has the label (None|-1), which is none of the"):
        labelled(tmp_path, values, dtype)


def test_the_class_column_is_preferred_and_labels_are_optional(tmp_path):
    folder = make(
        tmp_path / "d", numbered(2),
        label=([0.5, 1.5], datasets.Value("float32")), kind=([1, 0], datasets.ClassLabel(names=["a", "b"])),
    )  # fmt: skip
    data = open_images(dataset_name=folder, resolution=4, class_conditional=True)
    assert data.take(2)[1].tolist() == [1, 0]
    assert open_images(dataset_name=folder, resolution=4).id2label is None


def test_labels_stay_with_their_pictures_where_rows_are_skipped(tmp_path):
    images = [b"broken" if i % 4 == 0 else image for i, image in enumerate(numbered(20))]
    folder = make(tmp_path / "d", images, label=([i + 100 for i in range(20)], datasets.Value("int64")))
    data = open_images(dataset_name=folder, resolution=4, class_conditional=True, on_bad_image="skip")
    for pictures, labels in data.batches([range(40)]):
        for image, label in zip(pictures, labels, strict=True):
            assert data.id2label[int(label)] == str(int(image[0, 0, 0]) + 100)
    assert len(data.id2label) == 15


# bad rows

TRUNCATED = encoded(picture(np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)))[:300]


@pytest.mark.parametrize("bad", [b"", b"no picture", TRUNCATED, None])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_picture_is_named_by_its_row(tmp_path, bad, num_workers):
    images = numbered(6)
    images[4] = bad
    folder = make(tmp_path / "d", images)
    with pytest.raises(ValueError, match=r"^row 4: no readable image .*--on_bad_image skip") as error:
        open_images(dataset_name=folder, resolution=4, num_workers=num_workers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_pictures_can_be_skipped_and_are_counted(tmp_path, num_workers):
    images = numbered(12)
    images[0] = images[7] = images[11] = TRUNCATED
    data = open_images(
        dataset_name=make(tmp_path / "d", images), resolution=4, on_bad_image="skip", num_workers=num_workers
    )
    assert (data.num_images, data.num_skipped) == (9, 3)
    readable = [1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert visited(data, [range(9)]) == [readable[i] for i in sample_order(0, 0, 9)]
    assert data.take(99)[0][:, 0, 0, 0].tolist() == readable
    assert "3 unreadable" in data.describe()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_names_or_replaces_unreadable_pictures(tmp_path, num_workers):
    images = numbered(40)
    images[30] = images[35] = TRUNCATED
    options = {"dataset_name": make(tmp_path / "d", images), "resolution": 4, "streaming": True}
    options["num_workers"] = num_workers
    with pytest.raises(ValueError, match=r"^position \d+ of the stream: no readable image .*skip") as error:
        visited(open_images(**options), [range(p, p + 10) for p in range(0, 40, 10)])
    assert "\n" not in str(error.value)
    assert not multiprocessing.active_children()

    data = open_images(**options, on_bad_image="skip")
    order = visited(data, [range(p, p + 10) for p in range(0, 40, 10)])
    assert data.num_skipped == 2
    assert set(order) == set(range(40)) - {30, 35}
    parts = [visited(open_images(**options, on_bad_image="skip"), [[p] for p in range(r, 40, 2)]) for r in (0, 1)]
    assert [part[i] for i in range(20) for part in parts] == order
    assert data.take(40)[0][:, 0, 0, 0].tolist() == [i for i in range(40) if i not in (30, 35)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("images", [[], [b"", None]])
def test_no_readable_picture_is_an_error(tmp_path, images, streaming):
    folder = make(tmp_path / "d", images)
    with pytest.raises(ValueError, match=r"holds no (readable )?images|corresponds to no data"):
        open_images(dataset_name=folder, resolution=4, on_bad_image="skip", streaming=streaming)


# streams


def test_stream_and_cache_give_the_same_pixels_and_labels(tmp_path):
    rng = np.random.default_rng(1)
    images = [picture(rng.integers(0, 256, (9, 14, 3), np.uint8)) for _ in range(7)]
    folder = make(tmp_path / "d", images, label=([0, 1, 2, 0, 1, 2, 0], datasets.ClassLabel(names=["a", "b", "c"])))
    for options in ({"center_crop": True, "resolution": 5}, {"resolution": (6, 5)}):
        cached, stream = (
            open_images(dataset_name=folder, class_conditional=True, streaming=streaming, **options)
            for streaming in (False, True)
        )
        assert stream.num_images is None and stream.id2label == cached.id2label == {0: "a", 1: "b", 2: "c"}
        for a, b in zip(cached.take(5), stream.take(5), strict=True):
            assert torch.equal(a, b)


def test_workers_change_nothing_in_a_stream(tmp_path):
    folder = make(tmp_path / "d", numbered(30), label=(list(range(30)), datasets.ClassLabel(30)))
    batches = []
    for num_workers in (0, 2):
        data = open_images(
            dataset_name=folder, resolution=4, streaming=True, num_workers=num_workers, class_conditional=True
        )
        batches.append(list(data.batches(range(p, p + 7) for p in range(0, 70, 7))))
    for (images, labels), (others, other_labels) in zip(*batches, strict=True):
        assert torch.equal(images, others) and torch.equal(labels, other_labels)
        assert torch.equal(images[:, 0, 0, 0].long(), labels)


def test_a_stream_is_read_forwards_only(tmp_path):
    data = open_images(dataset_name=make(tmp_path / "d", numbered(5)), resolution=4, streaming=True)
    with pytest.raises(ValueError, match="read forwards: position 2 was asked for after 3"):
        list(data.batches([[3], [2]]))


def test_a_stream_needs_its_classes_beforehand(tmp_path):
    folder = make(tmp_path / "d", numbered(2), label=([1, 2], datasets.Value("int64")))
    with pytest.raises(ValueError, match="'label' of a stream must be a ClassLabel"):
        open_images(dataset_name=folder, resolution=4, streaming=True, class_conditional=True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_names_a_missing_label(tmp_path, num_workers):
    folder = make(tmp_path / "d", numbered(20), label=([0] * 19 + [-1], datasets.ClassLabel(2)))
    data = open_images(
        dataset_name=folder, resolution=4, streaming=True, class_conditional=True, num_workers=num_workers
    )
    with pytest.raises(ValueError, match="of the stream: the row has the label -1"):
        list(data.batches([range(20)]))


# what can be opened


def test_image_folders_with_and_without_classes(tmp_path):
    for name in ("b/2.png", "a/0.png", "a/1.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(numbered(3)[int(Path(name).stem)]))
    for streaming in (False, True):
        data = open_images(
            train_data_dir=str(tmp_path / "images"), resolution=4, class_conditional=True, streaming=streaming
        )
        images, labels = data.take(3)
        assert images[:, 0, 0, 0].tolist() == [0, 1, 2] and labels.tolist() == [0, 0, 1]
        assert data.id2label == {0: "a", 1: "b"}


@pytest.mark.parametrize("streaming", [False, True])
def test_local_files_of_every_kind(tmp_path, streaming):
    folder = Path(make(tmp_path / "d", numbered(4)))
    dataset = datasets.Dataset.from_parquet(str(folder / "train.parquet"), cache_dir=str(tmp_path / "c"))
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=dataset, test=dataset.select([3])).save_to_disk(tmp_path / "dict")
    (tmp_path / "tar").mkdir()
    with tarfile.open(tmp_path / "tar" / "train.tar", "w") as tar:
        for i, image in enumerate(numbered(4)):
            for name, content in ((f"{i}.png", encoded(image)), (f"{i}.cls", str(i + 5).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (tmp_path / "arrow").mkdir()
    arrow = next((tmp_path / "saved").glob("*.arrow")).rename(tmp_path / "arrow" / "a.arrow")
    dataset.save_to_disk(tmp_path / "saved")
    sources = [folder, folder / "train.parquet", tmp_path / "saved", tmp_path / "dict", arrow]
    for source in [*sources, tmp_path / "tar", tmp_path / "tar" / "train.tar"]:
        data = open_images(dataset_name=str(source), resolution=4, streaming=streaming)
        assert data.take(9)[0][:, 0, 0, 0].tolist() == [0, 1, 2, 3], source
    data = open_images(dataset_name=str(tmp_path / "dict"), split="test", resolution=4, streaming=streaming)
    assert data.take(9)[0][:, 0, 0, 0].tolist() == [3]
    if not streaming:
        data = open_images(dataset_name=str(tmp_path / "tar"), resolution=4, class_conditional=True)
        assert data.id2label == {0: "5", 1: "6", 2: "7", 3: "8"}


def test_split_expressions(tmp_path):
    make(tmp_path / "d", numbered(10), split="test")
    folder = make(tmp_path / "d", numbered(20), split="train")
    for split, number in (("train[:90%]", 18), ("train[90%:]", 2), ("train[3:5]+test", 12)):
        assert open_images(dataset_name=folder, split=split, resolution=4).num_images == number
    assert open_images(dataset_name=folder, split="train[3:5]", resolution=4).take(5)[0][:, 0, 0, 0].tolist() == [3, 4]


def test_columns_that_are_named(tmp_path):
    rows = {"a": [encoded(i) for i in numbered(2)], "n": [encoded(i) for i in numbered(4)[2:]], "kind": [5, 3]}
    (tmp_path / "d").mkdir()
    datasets.Dataset.from_dict(rows).cast_column("a", datasets.Image()).to_parquet(tmp_path / "d" / "train.parquet")
    for streaming in (False, True):  # "n" is plain bytes: taken for images where the user says so
        data = open_images(dataset_name=str(tmp_path / "d"), image_column="n", resolution=4, streaming=streaming)
        assert data.take(2)[0][:, 0, 0, 0].tolist() == [2, 3]
    data = open_images(dataset_name=str(tmp_path / "d"), label_column="kind", class_conditional=True, resolution=4)
    assert data.take(2)[1].tolist() == [1, 0]


# refusals: one line that says what is wrong and what would be right


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 0}, "resolution must be one or two .* at least 1, not 0"),
        ({"resolution": (8, -1)}, r"resolution must be one or two .*not \(8, -1\)"),
        ({"resolution": (8, 8, 8)}, "resolution must be one or two"),
        ({"image_mode": "CMYK"}, "image_mode must be one of L, RGB, RGBA, not 'CMYK'"),
        ({"background": "whitish"}, "background must be .*not 'whitish'"),
        ({"on_bad_image": "ignore"}, "on_bad_image must be raise or skip, not 'ignore'"),
        ({"seed": -1}, "seed must not be negative, not -1"),
        ({"train_data_dir": "x"}, "either dataset_name or train_data_dir"),
        ({"dataset_name": None}, "either dataset_name or train_data_dir"),
        ({"dataset_name": "/no/such/folder"}, "cannot open the dataset '/no/such/folder'"),
        ({"dataset_name": None, "train_data_dir": "/no/such/folder"}, "cannot open the dataset '/no/such/folder'"),
        ({"split": "validation"}, "cannot open .*validation.*train"),
        ({"split": "train[:x]"}, r"cannot open .*train\[:x\]"),
        ({"split": "train[:0]"}, r"cannot open .*train\[:0\]"),
        (
            {"image_column": "picture"},
            "'picture' is no column of a type that fits; there are image .*, other .*, caption",
        ),
        ({"image_column": None}, "image_column: several columns fit, name one of image, other"),
        ({"image_column": "fine"}, "'fine' is no column of a type that fits"),
        (
            {"label_column": "kind", "class_conditional": True},
            "'kind' is no column of a type that fits; there are image",
        ),
        ({"label_column": "image", "class_conditional": True}, "'image' is no column of a type that fits"),
        ({"label_column": "coarse"}, "label_column 'coarse' is of use only with class_conditional"),
        ({"class_conditional": True}, "label_column: several columns fit, name one of fine, coarse"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_refusals(tmp_path, options, message, streaming):
    classes = ([0, 1], datasets.ClassLabel(2))
    folder = make(
        tmp_path / "d", numbered(2),
        other=([encoded(i) for i in numbered(2)], datasets.Image()), caption=(["x", "y"], datasets.Value("string")),
        fine=classes, coarse=classes,
    )  # fmt: skip
    options = {"dataset_name": folder, "image_column": "image", "resolution": 4, "streaming": streaming} | options
    with pytest.raises(ValueError, match=message) as error:
        open_images(**options)
    assert "\n" not in str(error.value)


def test_refusals_where_columns_are_missing(tmp_path):
    (tmp_path / "d").mkdir()
    datasets.Dataset.from_dict({"text": ["x"]}).to_parquet(tmp_path / "d" / "train.parquet")
    with pytest.raises(ValueError, match=r"image_column: no column fits; there are text \(string\)"):
        open_images(dataset_name=str(tmp_path / "d"), resolution=4)
    folder = make(tmp_path / "e", numbered(2), caption=(["x", "y"], datasets.Value("string")))
    with pytest.raises(ValueError, match=r"label_column: no column fits; there are image .*, caption \(string\)"):
        open_images(dataset_name=folder, resolution=4, class_conditional=True)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(ValueError, match="cannot open the dataset") as error:
        open_images(train_data_dir=str(tmp_path), resolution=4)
    assert "\n" not in str(error.value)


# cache and fingerprint


def test_pictures_are_decoded_once(tmp_path, monkeypatch):
    folder = make(tmp_path / "d", numbered(5))
    first = open_images(dataset_name=folder, resolution=4)
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("decoded again"))
    again = open_images(dataset_name=folder, resolution=4, seed=8, num_workers=2)
    assert torch.equal(again.take(5)[0], first.take(5)[0])
    with pytest.raises(pytest.fail.Exception):  # other pixels are no case for the cache
        open_images(dataset_name=folder, resolution=5)


def test_a_changed_picture_is_noticed(tmp_path):
    path = tmp_path / "images" / "0.png"
    path.parent.mkdir()
    path.write_bytes(encoded(numbered(2)[0]))
    before = open_images(train_data_dir=str(path.parent), resolution=4)
    path.write_bytes(encoded(numbered(2)[1]))
    after = open_images(train_data_dir=str(path.parent), resolution=4)
    assert (int(before.take(1)[0].max()), int(after.take(1)[0].max())) == (0, 1)
    assert before.fingerprint != after.fingerprint


def test_the_fingerprint_is_of_what_is_trained_on(tmp_path):
    rng = np.random.default_rng(0)
    images = [picture(rng.integers(0, 256, (6, 8), np.uint8)) for _ in range(3)]
    labels = ([0, 1, 0], datasets.ClassLabel(2))
    folder = make(tmp_path / "d", images, label=labels)
    options = {"resolution": 6, "class_conditional": True}
    reference = open_images(dataset_name=folder, **options).fingerprint
    datasets.Dataset.from_parquet(f"{folder}/train.parquet", cache_dir=str(tmp_path / "c")).save_to_disk(tmp_path / "s")
    for same in ({"dataset_name": str(tmp_path / "s")}, {"seed": 4}, {"on_bad_image": "skip"}, {"background": "red"}):
        assert open_images(**{"dataset_name": folder} | options | same).fingerprint == reference
    touched = np.asarray(images[2]).copy()
    touched[0, 0] ^= 1
    others = [
        {"dataset_name": make(tmp_path / "e", [*images[:2], picture(touched)], label=labels)},
        {"dataset_name": make(tmp_path / "f", images, label=([0, 1, 1], datasets.ClassLabel(2)))},
        {"dataset_name": make(tmp_path / "g", images[::-1], label=labels)},
        {"class_conditional": False},
        {"center_crop": True},
        {"resolution": 5},
        {"image_mode": "RGB"},
        {"split": "train[:2]"},
        {"streaming": True},
    ]
    prints = [open_images(**{"dataset_name": folder} | options | other).fingerprint for other in others]
    assert len({reference, *prints}) == 1 + len(others)


RACE = """
import json, sys, time
from pathlib import Path
import datasets
from custom_ddpm.data import open_images
datasets.disable_progress_bars()
folder, cache, mine, other = sys.argv[1:]
Path(mine).touch()
while not Path(other).exists():
    time.sleep(0.001)
data = open_images(dataset_name=folder, cache_dir=cache, resolution=4)
images = next(data.batches([range(300)]))[0]
print(json.dumps([data.fingerprint, images.sum(dim=(1, 2, 3)).tolist()]))
"""


def test_processes_that_race_for_the_cache_agree_and_leave_it_whole(tmp_path):
    folder, cache = make(tmp_path / "d", numbered(200) * 10), tmp_path / "c"
    racers = []
    for mine, other in ("ab", "ba"):
        command = [sys.executable, "-c", RACE, folder, cache, tmp_path / mine, tmp_path / other]
        racers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT))
    results = [json.loads(racer.communicate(timeout=100)[0]) for racer in racers]
    data = open_images(dataset_name=folder, resolution=4, cache_dir=str(cache))
    images = next(data.batches([range(300)]))[0]
    assert results == [[data.fingerprint, images.sum(dim=(1, 2, 3)).tolist()]] * 2
    assert len(list(cache.rglob("cache-*.arrow"))) == 1
    assert not list(cache.rglob("tmp*"))


# the Hub, played by a server on loopback

FROM_THE_HUB = """
import json, sys
import datasets
from custom_ddpm.data import open_images
datasets.disable_progress_bars()
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
for name, streaming in json.loads(sys.argv[1]):
    try:
        data = open_images(
            dataset_name=name, resolution=4, streaming=streaming, class_conditional=True, num_workers=2 * streaming
        )
        images, labels = data.take(9)
        epoch = sorted(int(image.max()) for batch, _ in data.batches([[0, 1], [2]]) for image in batch)
        print(json.dumps([images[:, 0, 0, 0].tolist(), labels.tolist(), epoch, list(data.id2label.values())]))
    except ValueError as error:
        print(json.dumps(str(error)))
"""


def test_private_datasets_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    make(tmp_path / "parquet", numbered(3), label=([1, 0, 1], datasets.ClassLabel(names=["a", "b"])))
    for i, name in enumerate(["a/0.png", "b/1.png", "b/2.png"]):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(numbered(3)[i]))
    with HubServer() as hub:
        api = huggingface_hub.HfApi(endpoint=hub.endpoint, token=hub.token)
        for name in ("parquet", "folder"):
            api.create_repo(f"user/{name}", repo_type="dataset", private=True)
            api.upload_folder(repo_id=f"user/{name}", repo_type="dataset", folder_path=tmp_path / name)

        def ask(names, token):
            asked = json.dumps([[name, streaming] for name in names for streaming in (False, True)])
            environment = hub.env(tmp_path / f"home of {token}", token=token)
            command = [sys.executable, "-c", FROM_THE_HUB, asked]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
            assert hub.token not in done.stdout + done.stderr
            return [json.loads(line) for line in done.stdout.splitlines()]

        assert ask(["user/parquet"], hub.token) == [[[0, 1, 2], [1, 0, 1], [0, 1, 2], ["a", "b"]]] * 2
        assert ask(["user/folder"], hub.token) == [[[0, 1, 2], [0, 1, 1], [0, 1, 2], ["a", "b"]]] * 2
        refused = "Dataset 'user/folder' doesn't exist on the Hub or cannot be accessed."
        assert ask(["user/folder"], None) == [f"cannot open the dataset 'user/folder': {refused}"] * 2
