"""What can go wrong with a run, as the user of `train_ddpm.py` sees it: one line on stderr, a status that is not 0,
and nothing overwritten."""

import importlib
import re
import shutil
import subprocess

import datasets
import huggingface_hub.constants
import numpy as np
import PIL.Image
import pytest
from accelerate.state import AcceleratorState
from runs import PYTHON, ROOT, SCRIPT, flags, metrics, run, tiny

from custom_ddpm import CustomDDPMPipeline
from custom_ddpm.training.checkpoint import LOCK, list_checkpoints

pytestmark = pytest.mark.usefixtures("digits_cache")


@pytest.fixture
def program(monkeypatch, capsys, caplog):
    """`python train_ddpm.py …` in this process: returns the exit status and what is logged and said on stderr, but the
    progress bars."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def call(*words):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr("sys.argv", ["train_ddpm.py", *words])
        capsys.readouterr()
        caplog.clear()
        status, last = 0, ""
        try:
            importlib.import_module("train_ddpm").main()
        except SystemExit as end:
            # The interpreter's own rule.
            status, last = (1, end.code) if isinstance(end.code, str) else (end.code or 0, "")
        logged = [record.getMessage() for record in caplog.records if record.name.startswith("custom_ddpm")]
        said = [*logged, *capsys.readouterr().err.replace("\r", "\n").split("\n"), last]
        return status, [line for line in said if line.strip() and not re.search(r"[\w?]/s\b|it\]", line)]

    return call


def contents(folder):
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != LOCK]
    return {file.relative_to(folder): file.read_bytes() for file in files}


def refused(result, *parts):
    """Whether it ended with one line, the last, that has these parts."""
    status, said = result
    assert status != 0
    assert said[-1].startswith("train_ddpm.py: error: "), said
    assert not any("Traceback" in line for line in said)
    for part in parts:
        assert part in said[-1], said[-1]
    return said


def parquet(folder, images, **columns):
    """A dataset of pictures: arrays, or bytes that may be none."""
    folder.mkdir(parents=True)
    rows = []
    for image in images:
        if not isinstance(image, bytes | None):
            PIL.Image.fromarray(image).save(folder / "row.png")
            image = (folder / "row.png").read_bytes()
            (folder / "row.png").unlink()
        rows.append(None if image is None else {"bytes": image, "path": None})
    features = {"image": datasets.Image(), **{name: feature for name, (feature, _) in columns.items()}}
    data = {"image": rows, **{name: values for name, (_, values) in columns.items()}}
    datasets.Dataset.from_dict(data, datasets.Features(features)).to_parquet(folder / "train.parquet")
    return str(folder)


def pictures(count, size=8):
    return list(np.random.default_rng(0).integers(0, 256, (count, size, size), dtype=np.uint8))


# Bad input


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"image_column": "picture"}, ["'picture'", "image"]),
        ({"class_conditional": True, "label_column": "kind"}, ["'kind'", "label"]),
        ({"split": "practice"}, ["practice", "train"]),
        ({"split": "train[:0]"}, ["train[:0]", "no data"]),
        ({"validation_split": "held_out"}, ["held_out"]),
        ({"dataset_name": "not-there"}, ["not-there"]),
        ({"dataset_name": None, "train_data_dir": "not-there"}, ["--train_data_dir 'not-there' does not exist"]),
        ({"dataset_name": None, "train_data_dir": SCRIPT}, ["train_ddpm.py' is a file"]),
        ({"resolution": 0}, ["--resolution is [0]", "at least 1"]),
        ({"train_batch_size": 0}, ["--train_batch_size is 0", "at least 1"]),
        ({"mixed_precision": "fp16"}, ["--mixed_precision is fp16", "bf16"]),
        ({"init_from": "not/there"}, ["not/there"]),
        ({"resume_from_checkpoint": "checkpoint-3"}, ["no checkpoint checkpoint-3"]),
        ({"streaming": True, "max_train_steps": None}, ["--max_train_steps"]),
        ({"report_to": "nobody"}, ["nobody"]),
        ({"block_out_channels": [6, 16]}, ["--block_out_channels is [6, 16]", "multiple"]),
    ],
    ids=lambda value: ", ".join(map(str, value)),
)
def test_bad_values_are_refused_in_one_line_and_leave_nothing(tmp_path, program, changes, parts):
    refused(program(*flags(tmp_path / "run", **changes)), *parts)
    assert not (tmp_path / "run").exists() or contents(tmp_path / "run") == {}


def test_a_folder_without_pictures(tmp_path, program):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no picture")
    refused(program(*flags(tmp_path / "run", dataset_name=None, train_data_dir=str(tmp_path / "texts"))), "texts")
    assert not contents(tmp_path / "run")


def test_what_is_left_out_of_a_folder_is_said_at_the_start(tmp_path, program):
    (tmp_path / "pics[1]").mkdir()
    for i, image in enumerate(pictures(4)):
        PIL.Image.fromarray(image).save(tmp_path / "pics[1]" / f"test {i}.png")
    (tmp_path / "pics[1]" / "train.txt").write_text("no picture")
    options = {"dataset_name": None, "train_data_dir": str(tmp_path / "pics[1]"), "validation_split": "train[75%:]"}
    status, said = program(*flags(tmp_path / "run", **options, split="train[:75%]"))
    assert status == 0
    assert any("5 files found, 4 pictures used; left out: 1 not a picture ('train.txt')" in line for line in said), said
    assert any("images: 3 " in line for line in said)
    refused(program(*flags(tmp_path / "other", **{**options, "validation_split": "test"})), "'test'", "train[90%:]")


def test_a_row_that_is_no_picture_is_named_or_skipped_and_counted(tmp_path, program):
    images = [*pictures(5), b"no picture", *pictures(3), None]
    name = parquet(tmp_path / "data", images)
    refused(program(*flags(tmp_path / "run", dataset_name=name)), "row 5", "--on_bad_image skip")
    status, said = program(*flags(tmp_path / "run", dataset_name=name, on_bad_image="skip"))
    assert status == 0 and any("images: 8" in line and "2 unreadable left out" in line for line in said), said


def test_a_folder_that_holds_another_run_stays_as_it_is(tmp_path, program):
    run(tmp_path)
    before = contents(tmp_path)
    said = refused(program(*flags(tmp_path)), "holds another run", "--resume_from_checkpoint latest")
    assert len(said) == 1
    assert contents(tmp_path) == before


def test_a_folder_where_another_run_goes_on(tmp_path, program):
    run(tmp_path, max_train_steps=4)
    code = "import sys; from pathlib import Path; from custom_ddpm.training.checkpoint import lock_output_dir\n"
    code += "with lock_output_dir(sys.argv[1], Path(sys.argv[1], 'checkpoint-4')): print(flush=True); input()"
    with subprocess.Popen([PYTHON, "-c", code, str(tmp_path)], stdin=-1, stdout=-1) as other:
        other.stdout.readline()
        before = contents(tmp_path)
        said = refused(program(*flags(tmp_path, resume_from_checkpoint="latest")), "another run is using")
        assert len(said) == 1 and contents(tmp_path) == before
        other.communicate(b"\n")
    assert other.returncode == 0
    assert program(*flags(tmp_path, resume_from_checkpoint="latest"))[0] == 0


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"block_out_channels": [8, 8]}, ["block_out_channels: saved [8, 16], now [8, 8]"]),
        ({"ddpm_num_steps": 50, "split": "train[:99]"}, ["ddpm_num_steps: saved 20, now 50", "dataset: saved"]),
    ],
    ids=["architecture", "T and dataset"],
)
def test_a_checkpoint_of_another_run(tmp_path, program, changes, parts):
    run(tmp_path, max_train_steps=4)
    before = contents(tmp_path)
    refused(
        program(*flags(tmp_path, **changes, resume_from_checkpoint="latest")),
        "belongs to a run with other settings",
        *parts,
    )
    assert contents(tmp_path) == before


def test_a_file_where_the_folder_should_be(tmp_path, program):
    (tmp_path / "run").write_text("mine")
    assert len(refused(program(*flags(tmp_path / "run")), "cannot write to the output folder")) == 1
    assert (tmp_path / "run").read_text() == "mine"


# Unusual input, which trains


@pytest.mark.parametrize(
    ("images", "changes"),
    [
        (pictures(9, size=1), {"resolution": 8}),
        (pictures(9), {"resolution": 1}),
        (pictures(3), {"train_batch_size": 8}),
        (pictures(1), {"train_batch_size": 2}),
        (pictures(1, size=1), {"resolution": [3, 5], "gradient_accumulation_steps": 2}),
    ],
    ids=["pictures of one pixel", "to one pixel", "batch larger than the dataset", "one picture", "all of it"],
)
def test_small_datasets_train(tmp_path, program, images, changes):
    name = parquet(tmp_path / "data", images)
    changes = {**changes, "dataset_name": name, "max_train_steps": 3, "logging_steps": 1}
    assert program(*flags(tmp_path / "run", **changes))[0] == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]
    resolution = tiny("unused", resolution=np.atleast_1d(changes.get("resolution", 8)).tolist()).resolution
    width, height = CustomDDPMPipeline.from_pretrained(tmp_path / "run")().images[0].size
    assert [height, width] == [resolution[0], resolution[-1]]


def test_labels_with_gaps_are_closed(tmp_path, program):
    name = parquet(tmp_path / "data", pictures(4), label=(datasets.Value("int64"), [7, -3, 100, 7]))
    assert program(*flags(tmp_path / "run", dataset_name=name, class_conditional=True))[0] == 0
    pipeline = CustomDDPMPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.config.id2label == {0: "-3", 1: "7", 2: "100"}
    assert pipeline.unet.config.num_class_embeds == 4


# Damage


def truncate(folder):
    file = folder / "unet.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_byte(folder):
    content = bytearray((folder / "optimizer.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "optimizer.safetensors").write_bytes(content)


def lose_a_file(folder):
    (folder / "ema.safetensors").unlink()


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    "damage", [truncate, *(pytest.param(each, marks=pytest.mark.slow) for each in (flip_a_byte, lose_a_file, empty))]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(tmp_path, program, damage):
    run(tmp_path / "straight")
    run(tmp_path / "run")
    damage(tmp_path / "run" / "checkpoint-12")
    refused(program(*flags(tmp_path / "run", resume_from_checkpoint="checkpoint-12")), "checkpoint-12 is damaged")
    status, said = program(*flags(tmp_path / "run", resume_from_checkpoint="latest"))
    assert status == 0
    assert any("checkpoint-12 is damaged" in line and "looking for the one before" in line for line in said)
    assert any("resumed from" in line and "checkpoint-8" in line for line in said)
    # The averaged weights of the whole run, to the bit.
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "straight" / weights).read_bytes()


def test_nothing_but_damage_is_no_reason_to_start_anew(tmp_path, program):
    run(tmp_path)
    for path in list_checkpoints(tmp_path).values():
        empty(path)
    before = contents(tmp_path)
    refused(program(*flags(tmp_path, resume_from_checkpoint="latest")), "all checkpoints", "are damaged")
    assert contents(tmp_path) == before


# Disks


@pytest.fixture
def small_disk(tmp_path):
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mount_point)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield mount_point
    subprocess.run(["umount", "-l", str(mount_point)], check=True)


def test_a_full_disk_ends_the_run_with_its_last_checkpoint_whole(tmp_path, small_disk, program):
    """A checkpoint of this model takes some 0.9 MB of the 3 MB."""
    said = refused(program(*flags(small_disk / "run", checkpointing_steps=2)), "the disk is full", "checkpoint-")
    complete = list(list_checkpoints(small_disk / "run").values())
    assert complete and said[-1].count(complete[-1].name) == 0
    # With room again the run goes on, to the bit.
    shutil.copytree(small_disk / "run", tmp_path / "roomy")
    status, said = program(*flags(tmp_path / "roomy", checkpointing_steps=2, resume_from_checkpoint="latest"))
    assert status == 0 and any(f"resumed from {tmp_path / 'roomy' / complete[-1].name}" in line for line in said)
    run(tmp_path / "straight", checkpointing_steps=2)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "roomy" / weights).read_bytes() == (tmp_path / "straight" / weights).read_bytes()


def test_a_limit_keeps_a_run_on_a_small_disk(small_disk, program):
    assert program(*flags(small_disk / "run", checkpointing_steps=2, checkpoints_total_limit=1))[0] == 0
    assert list(list_checkpoints(small_disk / "run")) == [12]


def test_a_read_only_disk(small_disk, program):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    said = refused(program(*flags(small_disk / "run")), "cannot write to the output folder", "Read-only file system")
    assert len(said) == 1
