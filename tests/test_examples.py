"""The example data: what is in the repository, and the scripts that make the rest from its sources."""

import gzip
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Image, load_dataset
from PIL import Image as PILImage
from sklearn.datasets import load_digits

EXAMPLES = Path(__file__).parent.parent / "examples"
DIGIT_NAMES = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]


@pytest.fixture
def script(monkeypatch):
    """Imports a script of `examples/` by its name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def run(script_name, *arguments):
    """Runs a script as a user would."""
    command = [sys.executable, str(EXAMPLES / script_name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def idx_bytes(array, magic_type=8):
    header = bytes([0, 0, magic_type, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


# Digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return load_dataset(str(EXAMPLES / "digits"), cache_dir=str(tmp_path_factory.mktemp("cache")))


def test_digits_have_one_split_with_image_and_class_label(digits):
    assert list(digits) == ["train"]
    assert digits["train"].features == {"image": Image(), "label": ClassLabel(names=DIGIT_NAMES)}
    assert digits["train"].num_rows == 1797
    assert {(picture.mode, picture.size) for picture in digits["train"]["image"]} == {("L", (8, 8))}


def test_digits_are_those_of_sklearn(digits):
    source = load_digits()
    pixels = np.stack([np.asarray(picture) for picture in digits["train"]["image"]])
    assert pixels.min() == 0 and pixels.max() == 255
    # The nearest sixteenth of 255 is unique (they lie 15.9 apart), so this also pins the rounding to half a level.
    assert np.abs(pixels - source.images * 255 / 16).max() <= 0.5
    assert list(digits["train"]["label"]) == source.target.tolist()


def test_digits_script_makes_what_is_in_the_repository(digits, script):
    made = script("make_digits").digits()
    assert made.features == digits["train"].features
    for one, other in zip(made, digits["train"], strict=True):
        assert one["label"] == other["label"] and np.array_equal(one["image"], other["image"])


def test_digits_card_names_licence_and_source():
    card = (EXAMPLES / "digits" / "README.md").read_text()
    assert "license: cc-by-4.0" in card and "10.24432/C50P49" in card and "Alpaydin" in card


# Fashion-MNIST


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("shape", [(7,), (3, 2, 5)])
def test_idx_round_trip(script, tmp_path, shape, compress):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / ("data.gz" if compress else "data")
    path.write_bytes(gzip.compress(idx_bytes(array)) if compress else idx_bytes(array))
    read = script("make_fashion_mnist").read_idx(path, len(shape))
    assert read.dtype == np.uint8 and np.array_equal(read, array)


GOOD_IDX = idx_bytes(np.arange(12).reshape(3, 2, 2))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels", idx_bytes(np.arange(3)), "with 3 axes: 00000801 instead of 00000803"),
        ("floats", idx_bytes(np.zeros((1, 2, 2)), magic_type=13), "00000d03 instead of 00000803"),
        ("text", b"<html>404</html>", "does not begin like an IDX file"),
        ("empty", b"", "does not begin like an IDX file"),
        ("header", GOOD_IDX[:9], "does not begin like an IDX file"),
        ("short", GOOD_IDX[:-1], "holds 11 values, its header says [3, 2, 2]"),
        ("long", GOOD_IDX + b"\0", "holds 13 values, its header says [3, 2, 2]"),
        ("cut.gz", gzip.compress(GOOD_IDX, mtime=0)[:-9], "is not a whole gzip file"),
        ("plain.gz", GOOD_IDX, "is not a whole gzip file"),
        ("altered.gz", gzip.compress(GOOD_IDX, mtime=0)[:-8] + bytes(8), "is not a whole gzip file"),
    ],
)
def test_bad_idx_is_named(script, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        script("make_fashion_mnist").read_idx(path, 3)
    assert str(path) in str(caught.value) and message in str(caught.value)


def write_fashion_mnist(folder, num_labels=4):
    """Four training and two test pictures, the training files gzipped and the others not."""
    pictures = np.random.default_rng(1).integers(0, 256, (4, 28, 28), dtype=np.uint8)
    labels = np.array([9, 0, 3, 9])
    folder.mkdir()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(pictures)))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels[:num_labels])))
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(pictures[:2]))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(labels[:2]))
    return pictures, labels


def test_fashion_mnist_from_idx_files(tmp_path):
    pictures, labels = write_fashion_mnist(tmp_path / "idx")
    result = run("make_fashion_mnist.py", tmp_path / "idx", tmp_path / "made")
    assert result.returncode == 0, result.stderr
    made = load_dataset(str(tmp_path / "made"), cache_dir=str(tmp_path / "cache"))
    for split, count in [("train", 4), ("test", 2)]:
        assert np.array_equal(np.stack([np.asarray(picture) for picture in made[split]["image"]]), pictures[:count])
        assert list(made[split]["label"]) == labels[:count].tolist()
        assert {picture.mode for picture in made[split]["image"]} == {"L"}
    assert made["train"].features["label"].int2str([0, 9]) == ["T-shirt/top", "Ankle boot"]
    assert "license: mit" in (tmp_path / "made" / "README.md").read_text()


def test_fashion_mnist_errors_are_one_line_and_write_nothing(tmp_path):
    write_fashion_mnist(tmp_path / "idx", num_labels=3)
    for source, message in [("idx", "4 pictures but 3 labels for train"), ("nowhere", "No such file")]:
        result = run("make_fashion_mnist.py", tmp_path / source, tmp_path / "made")
        assert result.returncode == 1
        assert message in result.stderr and len(result.stderr.splitlines()) == 1
        assert not (tmp_path / "made").exists()


def test_fashion_mnist_leaves_an_existing_folder_alone(tmp_path):
    write_fashion_mnist(tmp_path / "idx")
    (tmp_path / "made").mkdir()
    result = run("make_fashion_mnist.py", tmp_path / "idx", tmp_path / "made")
    assert result.returncode == 1 and "File exists" in result.stderr
    assert not list((tmp_path / "made").iterdir())


# Twemoji


def write_emoji_package(folder):
    """Three pictures: one with a palette, one RGBA, and one that is a skin tone of it."""
    pictures = folder / "img" / "twitter" / "64"
    pictures.mkdir(parents=True)
    rgba = np.random.default_rng(2).integers(0, 256, (2, 64, 64, 4), dtype=np.uint8)
    PILImage.fromarray(rgba[0]).save(pictures / "1f44b.png")
    PILImage.fromarray(rgba[1]).save(pictures / "1f44b-1f3fb.png")
    palette = PILImage.new("P", (64, 64), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.putpixel((3, 5), 0)
    palette.save(pictures / "1f34e.png", transparency=0)
    emoji = [
        {"image": "1f44b.png", "category": "People & Body", "skin_variations": {"1F3FB": {"image": "1f44b-1f3fb.png"}}},
        {"image": "1f34e.png", "category": "Food & Drink"},
    ]
    (folder / "emoji.json").write_text(json.dumps(emoji))
    return rgba


def test_twemoji_from_package(tmp_path):
    rgba = write_emoji_package(tmp_path / "package")
    result = run("make_twemoji.py", tmp_path / "package", tmp_path / "made")
    assert result.returncode == 0, result.stderr
    made = load_dataset(str(tmp_path / "made"), split="train", cache_dir=str(tmp_path / "cache"))
    assert made.features == {"image": Image(), "label": ClassLabel(names=["Food & Drink", "People & Body"])}
    assert list(made["label"]) == [0, 1, 1]
    apple, tone, hand = made["image"]
    assert [picture.mode for picture in made["image"]] == ["RGBA"] * 3
    assert np.array_equal(hand, rgba[0]) and np.array_equal(tone, rgba[1])
    assert apple.getpixel((3, 5))[3] == 0 and apple.getpixel((0, 0)) == (200, 100, 50, 255)
    card = (tmp_path / "made" / "README.md").read_text()
    assert "license: cc-by-4.0" in card and "Twitter, Inc" in card


def test_twemoji_errors_are_one_line_and_write_nothing(tmp_path):
    write_emoji_package(tmp_path / "unknown")
    (tmp_path / "unknown" / "img" / "twitter" / "64" / "ffff.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "emoji.json").write_text("[]")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "emoji.json").write_text("[{")
    for source, message in [
        ("unknown", "1 pictures are not in"),
        ("empty", "no pictures in"),
        ("broken", "Expecting"),
        ("nowhere", "No such file"),
    ]:
        result = run("make_twemoji.py", tmp_path / source, tmp_path / "made")
        assert result.returncode == 1
        assert message in result.stderr and len(result.stderr.splitlines()) == 1
        assert not (tmp_path / "made").exists()
