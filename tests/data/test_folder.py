"""custom_ddpm/data/folder.py: a local folder of pictures; every file is used, or left out with a reason."""

import json
import os
import socket
import threading

import datasets
import numpy as np
import PIL.Image
import pytest
import tqdm
from accelerate.state import PartialState

from custom_ddpm.config import TrainingConfig
from custom_ddpm.data import open_images
from custom_ddpm.data.pixels import _convert_mode
from custom_ddpm.training.build import open_data
from data.images import TRUNCATED, encoded, image_of, numbered


def fill(folder, *names, first=0):
    """Write a constant picture to each of these names, its value being its number in the list; returns the folder."""
    for value, name in enumerate(names, first):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image_of(np.full((4, 4), value, np.uint8))))
    return folder


def opened(folder, **options):
    return open_images(train_data_dir=str(folder), resolution=4, **options)


def values(data):
    """The values of the constant pictures, in the order of the dataset."""
    return data.take(999)[0][:, 0, 0, 0].tolist()


def by_class(data):
    """Class name -> the values of its pictures."""
    images, labels = data.take(999)
    result = {name: [] for name in data.id2label.values()}
    for image, label in zip(images, labels.tolist(), strict=True):
        result[data.id2label[label]].append(int(image[0, 0, 0]))
    return result


def refusal(folder, **options):
    """The one line that a folder is refused with."""
    with pytest.raises(ValueError) as error:
        opened(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# The names of files and folders


def test_words_in_file_names_choose_no_split(tmp_path):
    names = ["photo of a cat.png", "photo of a dog.png", "photo of a train.png", "photo of test tubes.png"]
    assert values(opened(fill(tmp_path, *names))) == [0, 1, 2, 3]


def test_class_folders_named_like_splits_are_classes(tmp_path):
    names = [f"{kind}/{i}.png" for kind in ("car", "dev", "plane", "test", "train") for i in range(2)]
    data = opened(fill(tmp_path, *names), class_conditional=True)
    assert by_class(data) == {"car": [0, 1], "dev": [2, 3], "plane": [4, 5], "test": [6, 7], "train": [8, 9]}


@pytest.mark.parametrize("class_conditional", [False, True])
def test_folders_named_like_splits_are_told(tmp_path, class_conditional):
    fill(tmp_path, "train/a.png", "Validation/b.png", "train/c.png")
    data = opened(tmp_path, class_conditional=class_conditional)
    (line,) = [line for line in data.describe().split("\n") if "'train'" in line]
    assert "'Validation'" in line and f"--train_data_dir {tmp_path}/train" in line
    assert data.num_images == 3
    fill(tmp_path / "other", "cats/a.png", "dogs/b.png")
    assert "--train_data_dir" not in opened(tmp_path / "other").describe()


def test_texts_named_like_splits_beside_the_pictures(tmp_path):
    fill(tmp_path, "a.png", "b.png")
    for name in ("train.txt", "training notes.docx", "test-results.json"):
        (tmp_path / name).write_text("{}")
    data = opened(tmp_path)
    assert values(data) == [0, 1]
    line = data.describe().split("\n")[0]
    assert "5 files found, 2 pictures" in line and "3 not pictures" in line and "'train.txt'" in line


@pytest.mark.parametrize("name", ["pics[1]", "pics*", "pics?", "{pics}", "pics with\nline", "画像 é", "a::b", "-x %20"])
def test_the_path_is_taken_literally(tmp_path, name):
    fill(tmp_path / "pics1", "other.png", first=9)
    fill(tmp_path / name, "[1].png", "a\nb.png", "zip:::x.png", "é.png", "猫.PNG")
    data = opened(tmp_path / name)
    assert values(data) == [0, 1, 4 - 2, 3, 4]
    assert values(opened(tmp_path / name, streaming=True)) == values(data)


def test_numbers_in_names_are_in_numeric_order(tmp_path):
    fill(tmp_path, *(f"{i}/x{j}.png" for i in range(1, 13) for j in (1, 2, 10)))
    data = opened(tmp_path, class_conditional=True)
    assert list(data.id2label.values()) == [str(i) for i in range(1, 13)]
    assert values(data) == list(range(36))
    fill(tmp_path / "names", "01.png", "1.png", "1a.png", "2.png", "10.png", "a9.png", "a10.png")
    assert values(opened(tmp_path / "names")) == list(range(7))


# Folders


def test_the_first_level_of_sub_folders_is_the_class(tmp_path):
    fill(tmp_path, "cats/2020/a.png", "cats/2021/b.png", "cats/c.png", "dogs/2020/d.png", "dogs/2020/more/e.png")
    assert by_class(opened(tmp_path, class_conditional=True)) == {"cats": [0, 1, 2], "dogs": [3, 4]}
    streamed = opened(tmp_path, class_conditional=True, streaming=True)
    assert by_class(streamed) == {"cats": [0, 1, 2], "dogs": [3, 4]}


def test_pictures_beside_class_folders_are_refused_by_class_only(tmp_path):
    fill(tmp_path, "cats/a.png", "dogs/b.png", "x.png", "y.png")
    line = refusal(tmp_path, class_conditional=True)
    assert "2 pictures" in line and "'x.png'" in line and "sub-folder" in line
    assert values(opened(tmp_path)) == [0, 1, 2, 3]


def test_no_class_folders_and_one(tmp_path):
    fill(tmp_path / "none", "a.png")
    assert "has no sub-folders with pictures" in refusal(tmp_path / "none", class_conditional=True)
    fill(tmp_path / "one", "cats/a.png", "cats/b.png")
    assert by_class(opened(tmp_path / "one", class_conditional=True)) == {"cats": [0, 1]}
    # Most likely the folder above the one that was meant.
    fill(tmp_path / "above", "pets/cats/a.png", "pets/dogs/b.png")
    data = opened(tmp_path / "above", class_conditional=True)
    assert data.id2label == {0: "pets"}
    assert f"--train_data_dir {tmp_path}/above/pets" in data.describe()


def test_links_are_followed_and_loops_noticed(tmp_path):
    fill(tmp_path / "elsewhere", "b.png", "deep/c.png", first=1)
    fill(tmp_path / "mix", "a/a.png")
    (tmp_path / "mix" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mix" / "a" / "file.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "mix" / "a" / "self").symlink_to(tmp_path / "mix")
    (tmp_path / "elsewhere" / "deep" / "again").symlink_to("../../elsewhere")
    (tmp_path / "mix" / "me").symlink_to("me")
    data = opened(tmp_path / "mix", class_conditional=True)
    assert by_class(data) == {"a": [0, 1], "b": [1, 2]}
    line = data.describe().split("\n")[0]
    assert "2 links back to a folder above" in line and "1 unreadable" in line and "'me'" in line


def test_the_same_folder_twice_is_no_loop(tmp_path):
    fill(tmp_path, "a/1.png")
    (tmp_path / "b").symlink_to("a")
    os.link(tmp_path / "a" / "1.png", tmp_path / "a" / "2.png")
    assert by_class(opened(tmp_path, class_conditional=True)) == {"a": [0, 0], "b": [0, 0]}


def test_a_path_that_is_no_folder(tmp_path):
    assert refusal(tmp_path / "nowhere") == f"--train_data_dir {str(tmp_path / 'nowhere')!r} does not exist"
    file = fill(tmp_path, "a.png") / "a.png"
    assert "is a file" in refusal(file) and "folder" in refusal(file)
    (tmp_path / "gone").symlink_to("nowhere")
    assert "does not exist" in refusal(tmp_path / "gone")


def test_folders_without_pictures_say_what_they_hold(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no pictures" in refusal(tmp_path / "empty") and "0 files" in refusal(tmp_path / "empty")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no picture")
    assert "'a.txt'" in refusal(tmp_path / "texts")
    (tmp_path / "table").mkdir()
    datasets.Dataset.from_dict({"a": [1]}).to_parquet(tmp_path / "table" / "train.parquet")
    assert f"--dataset_name {tmp_path}/table" in refusal(tmp_path / "table")


def test_a_folder_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    fill(tmp_path, "a/1.png", "locked/2.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    data = opened(tmp_path)
    assert values(data) == [0] and "1 unreadable: Permission denied ('locked')" in data.describe()


# Files


def test_what_pillow_opens_is_read_and_the_rest_is_named(tmp_path):
    fill(tmp_path, "0.png", "1", "2.picture", "3.PNG")
    image_of(np.full((4, 4, 3), 4, np.uint8)).save(tmp_path / "4.avif", quality=100)
    (tmp_path / "5.JPG").write_bytes(encoded(image_of(np.full((4, 4), 5, np.uint8))))  # in truth a PNG
    for name in ("a.heic", "b.svg", "c.exr", "d.pdf", "e.mp4", "f.h5", "Thumbs.db", "i.mpg"):
        (tmp_path / name).write_text("P5 no picture")
    (tmp_path / "old.zip").write_bytes(b"PK")
    (tmp_path / "broken.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
    data = opened(tmp_path)
    assert [round(value) for value in values(data)] == [0, 1, 2, 3, 4, 5]
    line = data.describe().split("\n")[0]
    for part in ("18 files found, 6 pictures used", "8 not pictures", "1 broken link", "2 not regular", "1 archive"):
        assert part in line, line
    assert "'broken.png'" in line and "'pipe.png'" in line and "'old.zip'" in line


def test_hidden_files_and_folders_are_counted(tmp_path):
    fill(tmp_path, "a.png", "._a.png", ".ipynb_checkpoints/a.png")
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    data = opened(tmp_path)
    assert values(data) == [0] and "3 hidden" in data.describe()
    fill(tmp_path / ".pictures", "b.png", first=7)  # hidden, but named
    assert values(opened(tmp_path / ".pictures")) == [7]


def test_names_that_are_not_utf_8_are_told(tmp_path):
    fill(tmp_path, "a.png")
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(encoded(numbered(1)[0]))
    except OSError:
        pytest.skip("this file system takes no such names")
    data = opened(tmp_path)
    assert values(data) == [0] and "1 not named in UTF-8" in data.describe()
    data.describe().encode()


def test_names_that_differ_in_case_only_are_two(tmp_path):
    fill(tmp_path, "A.png", "a.PNG", "a.png")
    assert sorted(values(opened(tmp_path))) == [0, 1, 2] or len(os.listdir(tmp_path)) < 3


@pytest.mark.parametrize("content", [b"", b"no picture", TRUNCATED])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_picture_is_named_or_skipped(tmp_path, content, streaming):
    fill(tmp_path, "a.png", "c.png")
    (tmp_path / "b.png").write_bytes(content)
    assert f"{tmp_path}/b.png" in refusal(tmp_path, streaming=streaming)
    assert values(opened(tmp_path, streaming=streaming, on_bad_image="skip")) == [0, 1]
    for name in ("a.png", "c.png"):
        (tmp_path / name).write_bytes(content)
    assert "no" in refusal(tmp_path, streaming=streaming, on_bad_image="skip")


def test_huge_animated_and_cmyk_pictures(tmp_path, monkeypatch):
    frames = [image_of(np.full((4, 4, 3), value, np.uint8)) for value in (0, 255)]
    frames[0].save(tmp_path / "0.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "1.webp", save_all=True, append_images=frames[1:], lossless=True)
    PIL.Image.new("CMYK", (4, 4), (0, 0, 0, 255)).save(tmp_path / "2.jpg")
    assert values(opened(tmp_path)) == [0, 0, 0]
    PIL.Image.new("1", (200, 200)).save(tmp_path / "3.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 10_000)
    line = refusal(tmp_path)
    assert "3.png" in line and "DecompressionBomb" in line
    assert opened(tmp_path, on_bad_image="skip").num_skipped == 1


# metadata.csv and metadata.jsonl


def test_metadata_beside_the_pictures(tmp_path):
    fill(tmp_path, "a.png", "b.png", "sub/c.png", "d.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\nb.png,y\nsub/c.png,x\na.png,y\n")
    data = opened(tmp_path, class_conditional=True)
    assert by_class(data) == {"x": [2], "y": [1, 0]} and values(data) == [1, 2, 0]
    assert "1 not listed in the metadata ('d.png')" in data.describe()
    (tmp_path / "metadata.csv").rename(tmp_path / "unused")
    lines = [{"file_name": "d.png", "label": 3}, {"file_name": "a.png", "label": 1}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert by_class(opened(tmp_path, class_conditional=True)) == {"1": [0], "3": [3]}


def test_metadata_in_sub_folders_lists_their_pictures(tmp_path):
    fill(tmp_path, "one/a.png", "two/b.png", "two/c.png")
    (tmp_path / "one" / "metadata.csv").write_text("file_name,label\na.png,p\n")
    (tmp_path / "two" / "metadata.csv").write_text("file_name,label\nc.png,q\nb.png,p\n")
    assert by_class(opened(tmp_path, class_conditional=True)) == {"p": [0, 1], "q": [2]}


def test_metadata_without_labels_leaves_the_classes_of_the_folders(tmp_path):
    fill(tmp_path, "cats/a.png", "dogs/b.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\ncats/a.png,A cat.\ndogs/b.png,A dog.\n")
    data = opened(tmp_path, class_conditional=True)
    assert by_class(data) == {"cats": [0], "dogs": [1]}
    assert "no column of labels" in data.describe() and "'text'" in data.describe()
    assert by_class(opened(tmp_path, class_conditional=True, label_column="text")) == {"A cat.": [0], "A dog.": [1]}


def test_metadata_that_is_none_or_lists_what_is_not_there(tmp_path):
    fill(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text("name;age\nx;3\n")
    data = opened(tmp_path)
    assert values(data) == [0, 1] and "1 metadata without a column file_name ('metadata.csv')" in data.describe()
    (tmp_path / "metadata.csv").write_text("file_name\na.png\nlost.png\n")
    assert "lost.png" in refusal(tmp_path)
    assert values(opened(tmp_path, on_bad_image="skip")) == [0]
    os.mkfifo(tmp_path / "lost.png")
    assert "lost.png" in refusal(tmp_path)
    for name in ("../a.png", "/etc/passwd", "file:///etc/passwd"):
        (tmp_path / "metadata.csv").write_text(f"file_name\n{name}\n")
        assert name in refusal(tmp_path) and "inside" in refusal(tmp_path)
    (tmp_path / "metadata.csv").write_bytes(b"file_name,a\nx\n\xff,,,\n")
    assert "metadata.csv" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("file_name,label\na.png,01\nb.png,1\n", {"01": [0], "1": [1]}),
        ("file_name,label\na.png,10\nb.png,9\n", {"9": [1], "10": [0]}),
        ("file_name,label\na.png,NA\nb.png,2020-01-01\n", {"2020-01-01": [1], "NA": [0]}),
        ("file_name,label\n001,x\n2,y\n", {"x": [2], "y": [3]}),
        ('\ufefflabel,file_name\r\n"two\nlines",a.png\r\n\r\nx,b.png\r\n', {"two\nlines": [0], "x": [1]}),
        ("file_name,label\nsub\\c.png,x\na.png,x\na.png,y\n", {"x": [4, 0], "y": [0]}),
    ],
)
def test_values_of_a_csv_are_what_is_written(tmp_path, text, expected):
    fill(tmp_path, "a.png", "b.png", "001", "2", "sub/c.png")
    (tmp_path / "metadata.csv").write_text(text, newline="")
    data = opened(tmp_path, class_conditional=True)
    assert by_class(data) == expected and list(data.id2label.values()) == list(expected)


@pytest.mark.parametrize(
    "content", [b"file_name,label,label\na.png,1,2\n", b"file_name,label\na.png\n", b"file_name\n"]
)
def test_a_csv_that_is_damaged(tmp_path, content):
    fill(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_bytes(content)
    assert "metadata" in refusal(tmp_path)


@pytest.mark.parametrize(
    "line", ['{"file_name": null}', '{"file_name": 3}', '{"file_name": ""}', '{"file_name":', "[1]", "", "[" * 10**5]
)
def test_a_jsonl_that_is_damaged(tmp_path, line):
    fill(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text(line)
    assert f"{tmp_path}/metadata.jsonl" in refusal(tmp_path)


# Splits


@pytest.mark.parametrize("streaming", [False, True])
def test_parts_of_a_folder(tmp_path, streaming):
    fill(tmp_path, *(f"{i}.png" for i in range(10)))
    assert values(opened(tmp_path, split="train[:90%]", streaming=streaming)) == list(range(9))
    assert values(opened(tmp_path, split="train[90%:]", streaming=streaming)) == [9]
    assert values(opened(tmp_path, split="train[2:4]+train[7:8]", streaming=streaming)) == [2, 3, 7]
    for split in ("validation", "test", "train[:x]", "", "train+test"):
        line = refusal(tmp_path, split=split, streaming=streaming)
        assert f"split {split!r}" in line and "train[90%:]" in line
    assert "'train[:0]' holds no pictures" in refusal(tmp_path, split="train[:0]", streaming=streaming)


def test_a_part_without_some_of_the_classes_is_told(tmp_path):
    fill(tmp_path, *(f"{kind}/{i}.png" for kind in "abc" for i in range(4)))
    data = opened(tmp_path, split="train[90%:]", class_conditional=True)
    assert "1 of the 3 classes" in data.describe()
    assert "of the 3 classes" not in opened(tmp_path, split="train[:90%]", class_conditional=True).describe()


# Speed, cache, order


def test_each_folder_is_listed_once(tmp_path, monkeypatch):
    fill(tmp_path, *(f"{kind}/{i}.png" for kind in "abc" for i in range(40)))
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path=".": listed.append(str(path)) or scandir(path))
    assert opened(tmp_path).num_images == 120
    inside = [path for path in listed if path.startswith(str(tmp_path)) and "cache" not in path]
    assert sorted(inside) == [str(tmp_path), *(f"{tmp_path}/{kind}" for kind in "abc")]


def test_listing_shows_its_progress_after_a_moment(tmp_path, monkeypatch, capsys):
    fill(tmp_path, *(f"{i}.png" for i in range(30)))
    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(datasets.utils, "tqdm", Bar)
    assert opened(tmp_path).num_images == 30
    bar = next(bar for bar in bars if bar.desc.startswith("Listing"))
    assert bar.n == 30 and str(tmp_path) in bar.desc and 0 < bar.delay <= 2


def test_a_run_with_held_out_pictures_lists_the_folder_once(tmp_path, monkeypatch):
    fill(tmp_path, *(f"{i}.png" for i in range(20)))
    (tmp_path / "notes.txt").write_text("not a picture")
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path=".": listed.append(str(path)) or scandir(path))
    options = {"train_data_dir": str(tmp_path), "resolution": [4], "validation_split": "train[90%:]"}
    data, held_out = open_data(TrainingConfig(**options, split="train[:90%]"), PartialState())
    assert listed.count(str(tmp_path)) == 1
    assert (values(data), values(held_out)) == (list(range(18)), [18, 19])
    assert data.describe().count("21 files found") == 1 and "trained on too" not in data.describe()
    assert (
        "2 pictures of --validation_split are trained on too"
        in open_data(TrainingConfig(**options), PartialState())[0].describe()
    )


def test_an_unchanged_folder_is_decoded_once(tmp_path, monkeypatch):
    fill(tmp_path / "a", "x.png", "y.png")
    first = opened(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("decoded again"))
        again = opened(tmp_path / "a", num_workers=2)
        (tmp_path / "a" / "notes.txt").write_text("not a picture")
        assert opened(tmp_path / "a").fingerprint == again.fingerprint == first.fingerprint
    status = (tmp_path / "a" / "y.png").stat()
    fill(tmp_path / "a", "x.png", "y.png", first=1)
    os.utime(tmp_path / "a" / "y.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert values(opened(tmp_path / "a")) == [1, 2]


def test_two_starts_at_once_share_the_cache(tmp_path):
    fill(tmp_path / "a", *(f"{i}.png" for i in range(50)))
    results = []
    threads = [threading.Thread(target=lambda: results.append(opened(tmp_path / "a").fingerprint)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 3 and len(set(results)) == 1
    assert len(list((tmp_path / "cache").rglob("pictures.arrow"))) == 1 and not list(tmp_path.rglob("*.part"))


def test_a_stream_shuffles_over_the_whole_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("custom_ddpm.data.stream.STREAM_BUFFER", 2)
    fill(tmp_path, *(f"{i // 50}/{i}.png" for i in range(100)))
    data = opened(tmp_path, streaming=True)
    ((images, _),) = data.batches([range(40)])
    numbers = images[:, 0, 0, 0].tolist()
    assert min(numbers) < 20 and max(numbers) >= 80 and len(set(numbers)) == 40


# Transparency of 16 bits


def test_transparent_gray_of_16_bits_is_laid_on_the_background(tmp_path):
    path = tmp_path / "a.png"
    PIL.Image.fromarray(np.array([[300, 65535, 257]], np.uint16)).save(path, transparency=300)
    pixels = PIL.Image.open(path)
    pixels.load()
    assert pixels.mode == "I;16" and pixels.info["transparency"] == 300
    assert np.asarray(_convert_mode(pixels, None, "white")).tolist() == [[255, 255, 1]]
    assert np.asarray(_convert_mode(pixels, None, "black")).tolist() == [[0, 255, 1]]
    assert np.asarray(_convert_mode(pixels, "RGBA", "white")).tolist() == [
        [[1, 1, 1, 0], [255, 255, 255, 255], [1, 1, 1, 255]]
    ]
