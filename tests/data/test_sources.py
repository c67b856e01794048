"""custom_ddpm/data/sources.py: folders, files and Hub datasets that can be opened, and the errors for all others."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from hub.server import HubServer

from custom_ddpm.data import open_images
from data.images import encoded, make, numbered

ROOT = Path(__file__).parents[2]


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
def test_every_kind_of_local_file(tmp_path, streaming):
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
        (
            {"dataset_name": None, "train_data_dir": "/no/such/folder"},
            "--train_data_dir '/no/such/folder' does not exist",
        ),
        ({"split": "validation"}, "cannot open .*validation.*train"),
        ({"split": "train[:x]"}, r"cannot open .*train\[:x\]"),
        ({"split": "train[:0]"}, r"cannot open .*train\[:0\]"),
        (
            {"image_column": "picture"},
            "'picture' is not a column of a suitable type; the columns are image .*, other .*, caption",
        ),
        ({"image_column": None}, "image_column: several columns are suitable, choose one of image, other"),
        ({"image_column": "fine"}, "'fine' is not a column of a suitable type"),
        (
            {"label_column": "kind", "class_conditional": True},
            "'kind' is not a column of a suitable type; the columns are image",
        ),
        ({"label_column": "image", "class_conditional": True}, "'image' is not a column of a suitable type"),
        ({"label_column": "coarse"}, "label_column 'coarse' requires class_conditional"),
        ({"class_conditional": True}, "label_column: several columns are suitable, choose one of fine, coarse"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_invalid_arguments_raise(tmp_path, options, message, streaming):
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


def test_a_folder_without_images_raises(tmp_path):
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(ValueError, match="holds no pictures") as error:
        open_images(train_data_dir=str(tmp_path), resolution=4)
    assert "\n" not in str(error.value)


OPEN_FROM_HUB = """
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


def test_private_datasets_of_the_hub_are_opened_with_a_token_only(tmp_path, monkeypatch):
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
            command = [sys.executable, "-c", OPEN_FROM_HUB, asked]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
            assert hub.token not in done.stdout + done.stderr
            return [json.loads(line) for line in done.stdout.splitlines()]

        assert ask(["user/parquet"], hub.token) == [[[0, 1, 2], [1, 0, 1], [0, 1, 2], ["a", "b"]]] * 2
        assert ask(["user/folder"], hub.token) == [[[0, 1, 2], [0, 1, 1], [0, 1, 2], ["a", "b"]]] * 2
        refused = "Dataset 'user/folder' doesn't exist on the Hub or cannot be accessed."
        assert ask(["user/folder"], None) == [f"cannot open the dataset 'user/folder': {refused}"] * 2
