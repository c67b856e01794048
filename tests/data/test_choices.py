"""What the pictures decide where nothing was said: their size, and whether their labels are used."""

import datasets
import numpy as np
import PIL.Image
import pytest

from custom_ddpm.data import open_images
from custom_ddpm.data.labels import usable_label_column
from custom_ddpm.data.pixels import natural_resolution


def dataset(sizes, labels=None, names=None):
    pictures = [PIL.Image.fromarray(np.full((height, width), 7, np.uint8)) for height, width in sizes]
    columns, features = {"image": pictures}, {"image": datasets.Image()}
    if labels is not None:
        columns["label"] = labels
        features["label"] = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


@pytest.mark.parametrize(
    ("sizes", "chosen"),
    [
        ([(28, 28)] * 20, (28, 28)),
        ([(48, 64)] * 3, (48, 64)),
        ([(64, 65)] * 3, (64, 64)),
        ([(300, 200), (500, 600), (90, 80)], (64, 64)),
        ([(50, 40), (44, 70), (60, 43)], (40, 40)),
        ([(5, 9), (7, 3)], (8, 8)),
    ],
)
def test_the_size_is_that_of_small_pictures_and_64_for_large_ones(sizes, chosen):
    assert natural_resolution(dataset(sizes), "image") == chosen
    stream = dataset(sizes[:1]).to_iterable_dataset()
    assert natural_resolution(stream, "image") == natural_resolution(dataset(sizes[:1]), "image")


def test_unreadable_pictures_are_passed_over():
    broken = datasets.Dataset.from_dict({"image": [b"no picture"] * 2}).cast_column(
        "image", datasets.Image(decode=False)
    )
    assert natural_resolution(broken, "image") == (64, 64)


@pytest.mark.parametrize(
    ("labels", "names", "used"),
    [
        ([0, 1] * 10, ["cat", "dog"], True),
        ([3, 4] * 10, None, True),  # numbers in a column of that name
        ([0] * 20, ["cat", "dog"], False),  # one class
        (list(range(20)), None, False),  # one picture each: names of the pictures rather than classes
        ([0, 1, None] * 10, ["cat", "dog"], False),
        (None, None, False),
    ],
)
def test_labels_are_used_where_they_make_classes(labels, names, used):
    data = dataset([(4, 4)] * len(labels or [1]), labels, names)
    assert usable_label_column(data) == ("label" if used else None)


def test_a_folder_decides(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "in classes" / name).mkdir(parents=True)
        for i in range(10):
            PIL.Image.new("L", (12, 12), i).save(tmp_path / "in classes" / name / f"{i}.png")
    options = {"resolution": None, "class_conditional": None, "cache_dir": str(tmp_path / "cache")}
    data = open_images(train_data_dir=str(tmp_path / "in classes"), **options)
    assert (data.height, data.width, data.id2label) == (12, 12, {0: "cat", 1: "dog"})
    assert "--class_conditional false" in " ".join(data.notes)
    PIL.Image.new("L", (12, 12)).save(tmp_path / "in classes" / "loose.png")
    data = open_images(train_data_dir=str(tmp_path / "in classes"), **options)
    assert data.id2label is None and data.num_images == 21
