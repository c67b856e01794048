"""Folders of many pictures: the same for every batch size and process count, restartable, exported."""

import json
import os
import signal
import subprocess
import time

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import make_pipeline
from runs import PYTHON, needs_forkserver, on_processes, python_environment

from custom_ddpm.evaluation.pictures import open_dataset
from custom_ddpm.sample_set import SampleSet, model_fingerprint

SEEDS = range(5, 24)


@pytest.fixture(scope="module", autouse=True)
def one_process():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def sample_set(folder, exact=False, classes=3):
    labels = classes and [i % classes for i in range(len(SEEDS))]
    return SampleSet(make_pipeline(classes=classes), folder, SEEDS, labels, {"num_inference_steps": 4}, exact)


def drawn(folder, batch_size=4, **options):
    found = sample_set(folder, **options)
    found.open({"seed": 5})
    found.draw(batch_size)
    return found


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_pictures_are_those_of_the_pipeline(tmp_path):
    drawn(tmp_path / "a")
    for i, seed in enumerate(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        expected = make_pipeline(classes=3)(class_labels=i % 3, generator=generator, num_inference_steps=4).images[0]
        np.testing.assert_array_equal(np.asarray(PIL.Image.open(tmp_path / "a" / f"seed-{seed}.png")), expected)


class Recorder:
    """A pipeline's stand-in, whose pictures show what they depend on: the place and the size of the batch."""

    def __init__(self):
        self.__dict__ |= make_pipeline(classes=3).__dict__
        self.unet, self.calls = make_pipeline(classes=3).unet, []

    _execution_device = torch.device("cpu")

    def __call__(self, batch_size, **options):
        self.calls.append(batch_size)
        images = (torch.arange(batch_size) * 16 + batch_size).view(-1, 1, 1, 1) / 255
        return type("Output", (), {"images": images.expand(-1, 1, 8, 8)})


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_an_exact_set_gives_every_picture_the_same_place_in_a_batch_of_the_same_size(tmp_path, batch_size):
    for exact in (True, False):
        found = sample_set(tmp_path / str(exact), exact)
        found.pipeline = Recorder()
        found.open({})
        found.draw(batch_size)
        places = [int(found.pixels(seed)[0, 0, 0]) for seed in SEEDS]
        assert (places == [seed % 8 * 16 + 8 for seed in SEEDS]) == exact
        assert set(found.pipeline.calls) == {8} or not exact


def draw_in(folder, exact):
    drawn(folder, exact=exact)


@needs_forkserver
@pytest.mark.parametrize("exact", [True, False])
def test_several_processes_make_the_same_files(tmp_path, exact):
    drawn(tmp_path / "one", exact=exact)
    on_processes(2, draw_in, tmp_path / "two", exact)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == len(SEEDS) + 1


def test_only_missing_and_damaged_pictures_are_drawn_again(tmp_path):
    folder = tmp_path / "a"
    drawn(folder)
    before = contents(folder)
    times = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.png")}
    (folder / "seed-6.png").unlink()
    (folder / "seed-10.png").write_bytes(before["seed-10.png"][:50])
    PIL.Image.new("L", (4, 4)).save(folder / "seed-11.png")
    (folder / ".seed-6.png.tmp").write_bytes(b"left by a killed process")
    again = sample_set(folder)
    again.open({"seed": 5})
    assert again.draw(4) == len(SEEDS) - 3
    assert contents(folder) == before
    changed = {file.name for file in folder.glob("*.png") if file.stat().st_mtime_ns != times[file.name]}
    assert changed == {"seed-6.png", "seed-10.png", "seed-11.png"}


def test_a_folder_of_other_settings_is_refused(tmp_path):
    folder = tmp_path / "a"
    drawn(folder)
    with pytest.raises(FileExistsError, match="drawn with seed 5, not 6; choose another folder"):
        sample_set(folder).open({"seed": 6})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already and is not empty"):
        sample_set(tmp_path / "b").open({"seed": 5})


def test_the_fingerprint_is_that_of_the_model(tmp_path):
    pipeline, other = make_pipeline(classes=3), make_pipeline(classes=3)
    pipeline.save_pretrained(tmp_path / "model")
    loaded = type(pipeline).from_pretrained(tmp_path / "model")
    assert model_fingerprint(loaded) == model_fingerprint(pipeline)
    with torch.no_grad():
        other.unet.conv_in.bias[0] += 1e-6
    different = [other, make_pipeline(classes=3, clip_sample=False), make_pipeline(classes=None)]
    assert len({model_fingerprint(each) for each in [pipeline, *different]}) == 4


def test_npz_and_dataset_hold_the_pictures_and_labels(tmp_path, digits_cache):
    found = drawn(tmp_path / "a")
    names = {0: "猫", 1: "dog", 2: "a, b"}
    found.write_npz()
    found.write_metadata(names)
    found.write_grid(names)
    expected = np.stack([np.asarray(PIL.Image.open(tmp_path / "a" / f"seed-{seed}.png")) for seed in SEEDS])
    with np.load(tmp_path / "a" / "samples.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], expected[..., None])
        np.testing.assert_array_equal(file["arr_1"], np.arange(len(SEEDS)) % 3)
    assert np.array_equal(open_dataset(str(tmp_path / "a" / "samples.npz")).images[:, 0].numpy(), expected)
    by_datasets = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "a"), split="train")
    assert by_datasets["label"] == [names[i % 3] for i in range(len(SEEDS))]
    assert by_datasets["seed"] == list(SEEDS)
    assert all(np.array_equal(np.asarray(row["image"]), each) for row, each in zip(by_datasets, expected, strict=True))
    ours = open_dataset(str(tmp_path / "a"), class_conditional=True)
    assert ours.num_images == len(SEEDS) and set(ours.data.id2label.values()) == set(names.values())


def test_a_grid_has_a_column_or_a_row_for_each_class(tmp_path):
    found = drawn(tmp_path / "a")
    names = {0: "猫", 1: "dog", 2: "a, b"}
    per_class = -(-len(SEEDS) // 3)
    found.write_grid(names)
    by_column = np.asarray(PIL.Image.open(tmp_path / "a" / "grid.png"))
    found.write_grid(names, class_rows=True)
    by_row = np.asarray(PIL.Image.open(tmp_path / "a" / "grid.png"))
    cell, factor = 64 + 4, 64 // found.pixels(SEEDS[0]).shape[0]  # a picture of 64 pixels, enlarged, and the gap
    columns, rows = by_column[-(per_class * cell + 4) :], by_row[:, -(per_class * cell + 4) :]
    for i, seed in enumerate(SEEDS):
        picture = np.asarray(PIL.Image.open(tmp_path / "a" / f"seed-{seed}.png"))
        label, place = i % 3, i // 3
        for sheet, row, column in ((columns, place, label), (rows, label, place)):
            top, left = 4 + row * cell, 4 + column * cell
            np.testing.assert_array_equal(sheet[top : top + 64 : factor, left : left + 64 : factor], picture)


SCRIPT = """
import sys, time
from pathlib import Path
import test_sample_set, custom_ddpm.sample_set as module
draw = module.draw_batch
def slowly(*words, **options):
    time.sleep(0.1)
    return draw(*words, **options)
module.draw_batch = slowly
test_sample_set.drawn(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_folder(tmp_path):
    drawn(tmp_path / "whole")
    folder = tmp_path / "killed"
    environment = python_environment(PYTHONPATH=os.path.dirname(__file__))
    process = subprocess.Popen([PYTHON, "-c", SCRIPT, str(folder)], env=environment)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*.png"))) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 6 <= len(list(folder.glob("*.png"))) < len(SEEDS)
    drawn(folder)
    assert contents(folder) == contents(tmp_path / "whole")
    assert json.loads((folder / "samples.json").read_text()) == {"seed": 5}
