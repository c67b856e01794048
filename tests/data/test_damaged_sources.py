"""custom_ddpm/data/sources.py: what is damaged, hostile or dropped is told in one line, not in a traceback."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from custom_ddpm.data import open_images
from data.images import encoded, image_of, make, numbered


def tar(folder, members, cut=None):
    """Write a WebDataset, of which only the first `cut` bytes are kept."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    folder.mkdir()
    (folder / "train.tar").write_bytes(buffer.getvalue()[:cut])
    return str(folder)


def refusal(name, **options):
    """The one line that a dataset is refused with, at the latest while it is read."""
    with pytest.raises(ValueError) as error:
        list(open_images(dataset_name=name, resolution=4, **options).batches([range(60)]))
    assert "\n" not in str(error.value)
    return str(error.value)


def noise(n):
    return [encoded(image_of(np.random.default_rng(i).integers(0, 256, (40, 40), np.uint8))) for i in range(n)]


class Harmful:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 300, 511, 513, 3100, 64900, 109000])
def test_a_tar_that_is_cut_short(tmp_path, streaming, cut):
    members = [(f"{i:02}.png", content) for i, content in enumerate(noise(50))]
    assert refusal(tar(tmp_path / "d", members, cut), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("cut", [25 * 2560, 25 * 2560 + 300])
def test_a_tar_that_is_cut_between_two_pictures_is_told(tmp_path, streaming, cut):
    """`tarfile` takes such a cut for the end."""
    members = [(f"{i:02}.png", content) for i, content in enumerate(noise(50))]
    for name, kept, said in (("whole", None, False), ("cut", cut, True)):
        data = open_images(dataset_name=tar(tmp_path / name, members, kept), resolution=4, streaming=streaming)
        assert len(data.take(99)[0]) == (25 if said else 50)
        assert ("train.tar has no end mark" in data.describe()) == said
    file = str(tmp_path / "cut" / "train.tar")
    assert "no end mark" in open_images(dataset_name=file, resolution=4, streaming=streaming).describe()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["pickle", "pkl", "pyd", "pth", "npy"])
def test_pickles_in_a_tar_are_not_loaded(tmp_path, streaming, kind):
    harmful = pickle.dumps(Harmful(tmp_path / "harm"))
    if kind == "npy":
        buffer = io.BytesIO()
        np.save(buffer, np.array([Harmful(tmp_path / "harm")], dtype=object), allow_pickle=True)
        harmful = buffer.getvalue()
    members = [(f"{i}.{end}", data) for i, png in enumerate(noise(6)) for end, data in (("png", png), (kind, harmful))]
    name = tar(tmp_path / "d", members)
    if kind in ("pth", "npy"):  # which `datasets` would decode
        assert refusal(name, streaming=streaming)
    else:
        assert open_images(dataset_name=name, resolution=4, streaming=streaming).take(9)[0].shape[0] == 6
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("streaming", [False, True])
def test_scripts_are_not_run(tmp_path, streaming):
    script = f"import os; os.mkdir({str(tmp_path / 'harm')!r})"
    name = tar(
        tmp_path / "d", [*((f"{i}.png", content) for i, content in enumerate(noise(6))), ("s.py", script.encode())]
    )
    assert "row 6" in refusal(name, streaming=streaming)
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text(script)
    assert "scripts are no longer supported" in refusal(str(tmp_path / "script"), streaming=streaming)
    (tmp_path / "script" / "a.png").write_bytes(encoded(numbered(1)[0]))
    data = open_images(train_data_dir=str(tmp_path / "script"), resolution=4, streaming=streaming)
    assert "1 not a picture ('script.py')" in data.describe()
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_file_that_is_damaged_in_the_middle(tmp_path, streaming):
    (tmp_path / "d").mkdir()
    file = tmp_path / "d" / "train.parquet"
    rows = [{"bytes": content, "path": None} for content in noise(40)]
    dataset = datasets.Dataset.from_dict({"image": rows}, datasets.Features(image=datasets.Image()))
    dataset.to_parquet(file, batch_size=10)
    content = bytearray(file.read_bytes())
    middle = len(content) // 3
    content[middle : middle + 8000] = bytes(8000)
    file.write_bytes(content)
    assert refusal(str(tmp_path / "d"), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("paths", [["a.png", None], [None, None], None])
def test_parquet_of_images_without_metadata_of_datasets(tmp_path, streaming, paths):
    rows = [{"bytes": encoded(image)} for image in numbered(2)]
    if paths is not None:
        rows = [{**row, "path": path} for row, path in zip(rows, paths, strict=True)]
    (tmp_path / "d").mkdir()
    other = [{"left": 1, "right": 2}] * 2
    pyarrow.parquet.write_table(pa.table({"other": other, "picture": rows}), tmp_path / "d" / "train.parquet")
    options = {"dataset_name": str(tmp_path / "d"), "resolution": 4, "streaming": streaming}
    for column in (None, "picture"):
        assert open_images(**options, image_column=column).take(9)[0][:, 0, 0, 0].tolist() == [0, 1]
    with pytest.raises(ValueError, match="'other' is not a column of a suitable type"):
        open_images(**options, image_column="other")


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_that_the_library_drops_are_told(tmp_path, streaming):
    """The rules of `datasets`: with a word for a split in one name, only the files with such a word are read."""
    folder = tmp_path / "d"
    folder.mkdir()
    for i, name in enumerate(("cat", "dog", "train", "tubes")):
        (folder / f"photo of a {name}.png").write_bytes(encoded(numbered(4)[i]))
    options = {"resolution": 4, "streaming": streaming}
    data = open_images(dataset_name=str(folder), **options)
    assert len(data.take(9)[0]) == 1
    assert "1 of the folder's 4 pictures" in data.describe()
    assert f"--train_data_dir {folder} takes all" in data.describe()
    (folder / "photo of a train.png").unlink()
    data = open_images(dataset_name=str(folder), **options)
    assert len(data.take(9)[0]) == 3 and "--train_data_dir" not in data.describe()
    (folder / "test notes.txt").write_text("not a picture")
    assert f"--train_data_dir {folder}" in refusal(str(folder), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_paths_that_the_library_takes_for_patterns_are_refused(tmp_path, streaming):
    """Otherwise the neighbour's pictures are read."""
    make(tmp_path / "d1", numbered(1))
    folder = Path(make(tmp_path / "d[1]", numbered(3)))
    (tmp_path / "link").symlink_to(folder)  # which the library resolves
    for path in (folder, folder / "train.parquet", tmp_path / "link"):
        line = refusal(str(path), streaming=streaming)
        assert "d[1]" in line and "pattern" in line


def test_transparent_colours_of_16_bits(tmp_path):
    """Pillow keeps the upper 8 bits of the colours."""
    from custom_ddpm.data.pixels import _convert_mode

    image = image_of(np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8))
    image.info["transparency"] = (300, 600, 900)
    assert np.asarray(_convert_mode(image, None, "white")).tolist() == [[[255] * 3, [9] * 3]]
