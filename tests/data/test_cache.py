"""custom_ddpm/data/cache.py: decoding once, unreadable rows, fingerprints, concurrent processes."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from custom_ddpm.data import open_images, sample_order
from custom_ddpm.data.cache import _decode_row
from custom_ddpm.data.pixels import Transform
from data.images import TRUNCATED, encoded, image_of, make, numbered, visited

ROOT = Path(__file__).parents[2]


def test_labels_stay_with_their_images_where_rows_are_skipped(tmp_path):
    images = [b"broken" if i % 4 == 0 else image for i, image in enumerate(numbered(20))]
    folder = make(tmp_path / "d", images, label=([i + 100 for i in range(20)], datasets.Value("int64")))
    data = open_images(dataset_name=folder, resolution=4, class_conditional=True, on_bad_image="skip")
    for images, labels in data.batches([range(40)]):
        for image, label in zip(images, labels, strict=True):
            assert data.id2label[int(label)] == str(int(image[0, 0, 0]) + 100)
    assert len(data.id2label) == 15


@pytest.mark.parametrize("bad", [b"", b"not an image", TRUNCATED, None])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_raises_with_its_row(tmp_path, bad, num_workers):
    images = numbered(6)
    images[4] = bad
    folder = make(tmp_path / "d", images)
    with pytest.raises(ValueError, match=r"^row 4: no readable image .*--on_bad_image skip") as error:
        open_images(dataset_name=folder, resolution=4, num_workers=num_workers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_can_be_skipped_and_are_counted(tmp_path, num_workers):
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


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("images", [[], [b"", None]])
def test_no_readable_image_raises(tmp_path, images, streaming):
    folder = make(tmp_path / "d", images)
    with pytest.raises(ValueError, match=r"holds no (readable )?images|corresponds to no data"):
        open_images(dataset_name=folder, resolution=4, on_bad_image="skip", streaming=streaming)


def test_images_are_decoded_once(tmp_path, monkeypatch):
    folder = make(tmp_path / "d", numbered(5))
    first = open_images(dataset_name=folder, resolution=4)
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("decoded again"))
    again = open_images(dataset_name=folder, resolution=4, seed=8, num_workers=2)
    assert torch.equal(again.take(5)[0], first.take(5)[0])
    with pytest.raises(pytest.fail.Exception):  # another resolution is not in the cache
        open_images(dataset_name=folder, resolution=5)


def test_a_changed_image_is_decoded_again(tmp_path):
    path = tmp_path / "images" / "0.png"
    path.parent.mkdir()
    path.write_bytes(encoded(numbered(2)[0]))
    before = open_images(train_data_dir=str(path.parent), resolution=4)
    path.write_bytes(encoded(numbered(2)[1]))
    after = open_images(train_data_dir=str(path.parent), resolution=4)
    assert (int(before.take(1)[0].max()), int(after.take(1)[0].max())) == (0, 1)
    assert before.fingerprint != after.fingerprint


def test_the_fingerprint_depends_on_images_labels_and_crops_only(tmp_path):
    rng = np.random.default_rng(0)
    images = [image_of(rng.integers(0, 256, (6, 8), np.uint8)) for _ in range(3)]
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
        {"dataset_name": make(tmp_path / "e", [*images[:2], image_of(touched)], label=labels)},
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


# Computed with version 0.1 from examples/digits. Checkpoints contain the fingerprint and are rejected if it changes.
@pytest.mark.parametrize(("class_conditional", "expected"), [(False, "86e71c8e81a094c3"), (True, "10247f117d8fd415")])
def test_cached_fingerprints_of_version_0_1_are_unchanged(class_conditional, expected):
    options = {"resolution": 8, "class_conditional": class_conditional}
    assert open_images(dataset_name=str(ROOT / "examples/digits"), **options).fingerprint == expected


def test_transform_and_decoding_are_pickled_under_the_names_of_version_0_1():
    """The cache file's name is a hash of these pickles: with other names every cached dataset is decoded again."""
    for value, name in ((Transform(6, 5, True, None, "white"), b"_Transform"), (_decode_row, b"_decode_row")):
        pickled = pickle.dumps(value, protocol=0)
        assert b"ccustom_ddpm.data\n" + name + b"\n" in pickled
        assert pickle.loads(pickled) == value


OPEN_CONCURRENTLY = """
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


def test_concurrent_processes_agree_and_leave_one_cache_file(tmp_path):
    folder, cache = make(tmp_path / "d", numbered(200) * 10), tmp_path / "c"
    processes = []
    for mine, other in ("ab", "ba"):
        command = [sys.executable, "-c", OPEN_CONCURRENTLY, folder, cache, tmp_path / mine, tmp_path / other]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT))
    results = [json.loads(process.communicate(timeout=100)[0]) for process in processes]
    data = open_images(dataset_name=folder, resolution=4, cache_dir=str(cache))
    images = next(data.batches([range(300)]))[0]
    assert results == [[data.fingerprint, images.sum(dim=(1, 2, 3)).tolist()]] * 2
    assert len(list(cache.rglob("cache-*.arrow"))) == 1
    assert not list(cache.rglob("tmp*"))


@pytest.mark.parametrize("when", ["downloading", "decoding"])
def test_a_full_cache_disk_is_named(tmp_path, monkeypatch, when):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    folder = make(tmp_path / "d", numbered(3))
    if when == "decoding":
        monkeypatch.setattr(datasets.Dataset, "map", full)
    else:
        monkeypatch.setattr(datasets, "load_dataset", full)
    cache = str(tmp_path / "cache")
    with pytest.raises(OSError, match=f"the disk of the cache folder {cache} is full: .* --cache_dir"):
        open_images(dataset_name=folder, resolution=4, cache_dir=cache)
