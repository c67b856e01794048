"""custom_ddpm/data/stream.py: the same images as the cache, worker processes, unreadable rows, fingerprints."""

import multiprocessing
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from custom_ddpm.data import open_images
from data.images import TRUNCATED, image_of, make, numbered, visited

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_of_a_stream_raise_or_are_replaced(tmp_path, num_workers):
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


def test_stream_and_cache_give_the_same_pixels_and_labels(tmp_path):
    rng = np.random.default_rng(1)
    images = [image_of(rng.integers(0, 256, (9, 14, 3), np.uint8)) for _ in range(7)]
    folder = make(tmp_path / "d", images, label=([0, 1, 2, 0, 1, 2, 0], datasets.ClassLabel(names=["a", "b", "c"])))
    for options in ({"center_crop": True, "resolution": 5}, {"resolution": (6, 5)}):
        cached, stream = (
            open_images(dataset_name=folder, class_conditional=True, streaming=streaming, **options)
            for streaming in (False, True)
        )
        assert stream.num_images is None and stream.id2label == cached.id2label == {0: "a", 1: "b", 2: "c"}
        for a, b in zip(cached.take(5), stream.take(5), strict=True):
            assert torch.equal(a, b)


def test_a_stream_does_not_depend_on_the_number_of_workers(tmp_path):
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


def test_a_stream_can_only_be_read_forwards(tmp_path):
    data = open_images(dataset_name=make(tmp_path / "d", numbered(5)), resolution=4, streaming=True)
    with pytest.raises(ValueError, match="can only be read forwards: position 2 requested after 3"):
        list(data.batches([[3], [2]]))


def test_the_labels_of_a_stream_must_be_a_classlabel(tmp_path):
    folder = make(tmp_path / "d", numbered(2), label=([1, 2], datasets.Value("int64")))
    with pytest.raises(ValueError, match="'label' of a stream must be a ClassLabel"):
        open_images(dataset_name=folder, resolution=4, streaming=True, class_conditional=True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_missing_label_in_a_stream_raises(tmp_path, num_workers):
    folder = make(tmp_path / "d", numbered(20), label=([0] * 19 + [-1], datasets.ClassLabel(2)))
    data = open_images(
        dataset_name=folder, resolution=4, streaming=True, class_conditional=True, num_workers=num_workers
    )
    with pytest.raises(ValueError, match="of the stream: the row has the label -1"):
        list(data.batches([range(20)]))


# Computed with version 0.1 from examples/digits. Checkpoints contain the fingerprint and are rejected if it changes.
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "b99bc746b813513c"),
        ({"class_conditional": True}, "6325ff17cfa412f4"),
        (
            {
                "class_conditional": True, "center_crop": True, "background": "red", "resolution": (5, 4),
                "image_mode": "RGB",
            },
            "953e47049e8434b6",
        ),
    ],
)  # fmt: skip
def test_stream_fingerprints_of_version_0_1_are_unchanged(monkeypatch, options, expected):
    monkeypatch.chdir(ROOT)  # the fingerprint contains the path as it was given
    options = {"dataset_name": "examples/digits", "streaming": True, "resolution": 8} | options
    assert open_images(**options).fingerprint == expected
