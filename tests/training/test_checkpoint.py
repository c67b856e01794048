"""Checkpoints under everything that can go wrong: kills, full disks, damage, other runs in the folder."""

import errno
import gc
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator

from custom_ddpm.training.checkpoint import (
    LOCK,
    MANIFEST,
    METADATA,
    differing_settings,
    find_checkpoint,
    list_checkpoints,
    lock_output_dir,
    save_checkpoint,
)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator()


def contents(step):
    """What the tests save as the checkpoint of a step: files in the folder and in one below it."""
    return {"model.bin": f"weights {step}".encode() * 1000, "ema/model.bin": f"average {step}".encode() * 1000}


def write_contents(step):
    def write(folder):
        for name, data in contents(step).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)

    return write


def save(output_dir, step, accelerator, write=None, **arguments):
    metadata = {"settings": {"learning_rate": 1e-4, "seed": 7}}
    write = write or write_contents(step)
    return save_checkpoint(output_dir, step, write, metadata=metadata, accelerator=accelerator, **arguments)


def assert_is_checkpoint(path, step):
    files = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert json.loads(files.pop(METADATA))["step"] == step
    del files[MANIFEST]
    assert files == contents(step)


def claim(output_dir, resumed_from=None):
    with lock_output_dir(output_dir, resumed_from):
        pass


def steps(output_dir):
    return list(list_checkpoints(output_dir))


def names(output_dir):
    return sorted(path.name for path in output_dir.iterdir() if path.name != LOCK)


# Saving and finding


def test_what_is_saved_is_found(tmp_path, accelerator):
    path = save(tmp_path, 30, accelerator)
    assert path == tmp_path / "checkpoint-30"
    assert_is_checkpoint(path, 30)
    metadata = {"settings": {"learning_rate": 1e-4, "seed": 7}, "step": 30}
    assert find_checkpoint(tmp_path) == (path, metadata)
    assert find_checkpoint(tmp_path, "checkpoint-30") == (path, metadata)
    assert find_checkpoint("elsewhere", path) == (path, metadata)


def test_latest_is_the_highest_step_and_not_the_last_name(tmp_path, accelerator):
    for step in [9, 10, 100]:
        save(tmp_path, step, accelerator)
    assert list_checkpoints(tmp_path) == {step: tmp_path / f"checkpoint-{step}" for step in [9, 10, 100]}
    path, metadata = find_checkpoint(tmp_path)
    assert path.name == "checkpoint-100" and metadata["step"] == 100


def test_only_checkpoint_folders_are_listed(tmp_path, accelerator):
    save(tmp_path, 5, accelerator)
    for name in [".checkpoint-6.tmp", "checkpoint-", "checkpoint-best", "checkpoint-7-old", "samples"]:
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-8").write_text("a file")
    assert steps(tmp_path) == [5]


def test_no_checkpoints_are_no_error_for_latest(tmp_path):
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path / "not there") is None


def test_unknown_name_is_refused_with_the_names_there_are(tmp_path, accelerator):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint checkpoint-3; .* has none"):
        find_checkpoint(tmp_path, "checkpoint-3")
    save(tmp_path, 1, accelerator)
    save(tmp_path, 2, accelerator)
    with pytest.raises(FileNotFoundError, match="has checkpoint-1, checkpoint-2"):
        find_checkpoint(tmp_path, "checkpoint-3")


def test_a_step_that_is_saved_already_stays(tmp_path, accelerator):
    save(tmp_path, 4, accelerator)
    assert save(tmp_path, 4, accelerator, write=write_contents(5)) == tmp_path / "checkpoint-4"
    assert_is_checkpoint(tmp_path / "checkpoint-4", 4)


def test_files_are_flushed_before_the_name_is_given_and_the_name_after(tmp_path, accelerator, monkeypatch):
    flushed, flushed_before_rename = [], []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor):
        flushed.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def record_rename(self, target):
        flushed_before_rename.extend(flushed)
        flushed.clear()
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    path = save(tmp_path, 1, accelerator)
    assert set(flushed_before_rename) >= {entry.stat().st_ino for entry in [path, *path.rglob("*")]}
    assert flushed == [tmp_path.stat().st_ino]


def test_training_state_through_accelerate(tmp_path):
    """`accelerator.save_state` serves as `write`, and `load_state` brings model and optimizer back to the bit."""
    accelerator = Accelerator()
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)

    def train_step():
        model(torch.ones(4, 3, device=accelerator.device)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    train_step()
    save(tmp_path, 1, accelerator, write=accelerator.save_state)
    train_step()
    expected = [parameter.clone() for parameter in model.parameters()]
    train_step()
    path, _ = find_checkpoint(tmp_path)
    accelerator.load_state(path)
    train_step()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), expected, strict=True))


# Pruning


@pytest.mark.parametrize(
    ("total_limit", "keep", "left"),
    [
        (None, (), [1, 2, 3, 4, 5, 6]),
        (9, (), [1, 2, 3, 4, 5, 6]),
        (3, (), [4, 5, 6]),
        (1, (), [6]),
        (3, {2}, [2, 5, 6]),
        (1, {2}, [2, 6]),
        (2, {1, 2, 3}, [1, 2, 3, 6]),
        (2, {77}, [5, 6]),
    ],
)
def test_oldest_go_first_but_never_the_new_one_or_those_to_keep(tmp_path, accelerator, total_limit, keep, left):
    for step in range(1, 7):
        save(tmp_path, step, accelerator, total_limit=total_limit, keep=keep)
        assert find_checkpoint(tmp_path)[1]["step"] == step
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]


def test_nothing_is_deleted_before_the_new_one_is_complete(tmp_path, accelerator):
    save(tmp_path, 1, accelerator, total_limit=1)
    seen = []
    save(tmp_path, 2, accelerator, write=lambda folder: seen.extend(steps(tmp_path)), total_limit=1)
    assert seen == [1] and steps(tmp_path) == [2]


def test_what_cannot_be_deleted_is_no_reason_to_stop(tmp_path, accelerator, monkeypatch, caplog):
    save(tmp_path, 1, accelerator)

    def refuse(path, *arguments, **keywords):
        if not keywords.get("ignore_errors"):
            raise PermissionError("in use")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with caplog.at_level(logging.WARNING):
        save(tmp_path, 2, accelerator, total_limit=1)
    assert find_checkpoint(tmp_path)[1]["step"] == 2
    assert "checkpoint-1" in caplog.text and "in use" in caplog.text


# Kills

FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def in_a_child(function):
    """Runs `function` in a forked process; returns the process, started."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    return process


needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")


@needs_fork
def test_killed_before_any_file_operation_of_a_save(tmp_path, accelerator):
    """Kills the process that saves before its first, second, ... file operation, until it gets through."""

    def save_and_die(output_dir, count):
        def die_at_last(event, arguments):
            nonlocal count
            if event in FILE_OPERATIONS:
                count -= 1
                if count == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die_at_last)
        save(output_dir, 3, accelerator, total_limit=2)

    found = []
    for count in range(1, 200):
        output_dir = tmp_path / str(count)
        save(output_dir, 1, accelerator)
        save(output_dir, 2, accelerator)
        child = in_a_child(lambda output_dir=output_dir, count=count: save_and_die(output_dir, count))
        child.join()
        for step, path in list_checkpoints(output_dir).items():
            assert_is_checkpoint(path, step)
        path, metadata = find_checkpoint(output_dir)
        found.append(metadata["step"])
        assert len(steps(output_dir)) >= 2 and metadata["step"] in {2, 3}

        claim(output_dir, path)
        assert not list(output_dir.glob(".checkpoint-*"))
        save(output_dir, 3, accelerator, total_limit=2)
        assert_is_checkpoint(output_dir / "checkpoint-3", 3)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
    assert child.exitcode == 0 and found == sorted(found)
    assert found.count(2) > 10 and found.count(3) > 5, "kills fell on both sides of the moment of completion"


@needs_fork
def test_killed_at_random_moments(tmp_path, accelerator):
    """Twenty times: goes on from the latest, saves as fast as it can, is killed; at most the save under way is lost."""
    saved = multiprocessing.get_context("fork").Value("q", 0, lock=False)

    def save_for_ever(start):
        step = start
        while True:
            step += 1
            save(tmp_path, step, accelerator, total_limit=2)
            saved.value = step

    moments = random.Random(0)
    for _ in range(20):
        found = find_checkpoint(tmp_path)
        claim(tmp_path, found and found[0])
        assert names(tmp_path) == sorted(f"checkpoint-{step}" for step in steps(tmp_path))
        start = found[1]["step"] if found else 0
        child = in_a_child(lambda start=start: save_for_ever(start))
        while saved.value <= start and child.is_alive():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        path, metadata = find_checkpoint(tmp_path)
        assert metadata["step"] - saved.value in {0, 1} and metadata["step"] > start
        assert_is_checkpoint(path, metadata["step"])


# Failing saves


def assert_save_fails(output_dir, step, accelerator, write, message):
    before = names(output_dir)
    with pytest.raises(OSError, match=message) as caught:
        save(output_dir, step, accelerator, write=write, total_limit=1)
    assert f"could not save checkpoint-{step} in {output_dir}" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert names(output_dir) == before


def test_a_failing_writer_leaves_everything_as_it_was(tmp_path, accelerator):
    save(tmp_path, 1, accelerator)

    def write(folder):
        write_contents(2)(folder)
        raise ValueError("no such tensor\nand more lines")

    assert_save_fails(tmp_path, 2, accelerator, write, "ValueError: no such tensor")
    assert_is_checkpoint(tmp_path / "checkpoint-1", 1)
    save(tmp_path, 2, accelerator)
    assert_is_checkpoint(tmp_path / "checkpoint-2", 2)


def test_an_interrupted_save_can_be_done_again(tmp_path, accelerator):
    def write(folder):
        (folder / "unfinished").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1, accelerator, write=write)
    assert find_checkpoint(tmp_path) is None
    assert_is_checkpoint(save(tmp_path, 1, accelerator), 1)
    assert names(tmp_path) == ["checkpoint-1"]


def test_metadata_that_json_cannot_hold_is_refused(tmp_path, accelerator):
    with pytest.raises(OSError, match="PosixPath is not JSON serializable"):
        save_checkpoint(tmp_path, 1, write_contents(1), metadata={"path": tmp_path}, accelerator=accelerator)
    assert names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount_point)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield mount_point
    subprocess.run(["umount", str(mount_point)], check=True)


def fill_disk(folder):
    with pytest.raises(OSError), (folder / "file").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))


TOO_LARGE = {"weights": torch.zeros(1 << 20)}


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda folder: (folder / "file").write_bytes(bytes(1 << 21)), id="plain file"),
        pytest.param(lambda folder: torch.save(TOO_LARGE, folder / "file"), id="torch.save"),
        pytest.param(lambda folder: safetensors.torch.save_file(TOO_LARGE, folder / "file"), id="safetensors"),
        pytest.param(fill_disk, id="no room for the manifest"),
    ],
)
def test_full_disk(small_disk, accelerator, write):
    save(small_disk, 1, accelerator)
    assert_save_fails(small_disk, 2, accelerator, write, "the disk is full")
    assert_is_checkpoint(small_disk / "checkpoint-1", 1)
    gc.collect()  # torch.save holds its file open as long as the traceback lives
    save(small_disk, 2, accelerator)
    assert_is_checkpoint(small_disk / "checkpoint-2", 2)


def test_read_only_disk(small_disk, accelerator):
    save(small_disk, 1, accelerator)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert find_checkpoint(small_disk)[1]["step"] == 1
    with pytest.raises(OSError, match=f"cannot write to the output folder {small_disk}: Read-only file system"):
        claim(small_disk, small_disk / "checkpoint-1")
    with pytest.raises(OSError, match=f"cannot write to the output folder {small_disk / 'run'}: Read-only"):
        claim(small_disk / "run")
    assert_save_fails(small_disk, 2, accelerator, write_contents(2), "Read-only file system")


# Damage


def truncate(path):
    os.truncate(path / "model.bin", 100)
    return "model.bin"


def flip_byte(path):
    data = bytearray((path / "ema" / "model.bin").read_bytes())
    data[1234] ^= 1
    (path / "ema" / "model.bin").write_bytes(data)
    return "ema/model.bin"


def lose_file(path):
    (path / "model.bin").unlink()
    return "model.bin"


def alter_metadata(path):
    (path / METADATA).write_text((path / METADATA).read_text().replace('"seed": 7', '"seed": 8'))
    return METADATA


def truncate_manifest(path):
    os.truncate(path / MANIFEST, (path / MANIFEST).stat().st_size // 2)
    return MANIFEST


def empty_manifest(path):
    (path / MANIFEST).write_text("{}")
    return MANIFEST


def lose_manifest(path):
    (path / MANIFEST).unlink()
    return MANIFEST


def empty_folder(path):
    shutil.rmtree(path)
    path.mkdir()
    return MANIFEST


DAMAGES = [
    truncate,
    flip_byte,
    lose_file,
    alter_metadata,
    truncate_manifest,
    empty_manifest,
    lose_manifest,
    empty_folder,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_one_before_taken(tmp_path, accelerator, caplog, damage):
    for step in [1, 2, 3]:
        save(tmp_path, step, accelerator)
    named = damage(tmp_path / "checkpoint-3")
    with caplog.at_level(logging.WARNING):
        path, metadata = find_checkpoint(tmp_path)
    assert path.name == "checkpoint-2" and metadata["step"] == 2
    (record,) = caplog.records
    assert str(tmp_path / "checkpoint-3") in record.message and named in record.message
    assert len(record.message.splitlines()) == 1
    with pytest.raises(ValueError, match=f"checkpoint-3 is damaged .*{named}"):
        find_checkpoint(tmp_path, "checkpoint-3")


def test_every_altered_byte_is_noticed(tmp_path, accelerator):
    path = save(tmp_path, 1, accelerator, write=lambda folder: (folder / "a").write_bytes(b"weights"))
    for file in path.iterdir():
        data = file.read_bytes()
        for position in range(len(data)):
            file.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
            with pytest.raises(ValueError, match="is damaged"):
                find_checkpoint(tmp_path, path)
        file.write_bytes(data)
    assert find_checkpoint(tmp_path, path) is not None


def test_start_anew_is_not_the_answer_to_nothing_but_damage(tmp_path, accelerator, caplog):
    for step in [1, 2]:
        truncate(save(tmp_path, step, accelerator))
    with pytest.raises(ValueError, match=f"all checkpoints in {tmp_path} are damaged"):
        find_checkpoint(tmp_path)
    assert "checkpoint-1" in caplog.text and "checkpoint-2" in caplog.text


def test_a_folder_of_something_else_is_no_checkpoint(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ValueError, match=r"it has no manifest\.json"):
        find_checkpoint(tmp_path, tmp_path / "pictures")


# The folder of a run


HOLD = """
import os, sys, time
from custom_ddpm.training.checkpoint import lock_output_dir
with lock_output_dir(sys.argv[1]):
    child = os.fork()  # as workers are, which may outlive a process that is killed
    if child:
        print(child, flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(os.name != "posix", reason="POSIX locks")
def test_a_folder_has_one_run_at_a_time_and_is_free_when_that_is_killed(tmp_path, accelerator):
    save(tmp_path, 1, accelerator)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    (tmp_path / "run" / ".checkpoint-1.tmp").mkdir()
    try:
        with pytest.raises(BlockingIOError, match=f"another run is using {tmp_path / 'run'}: stop it, or choose"):
            claim(tmp_path / "run")
        assert names(tmp_path / "run") == [".checkpoint-1.tmp"]
        holder.kill()
        holder.wait()
        claim(tmp_path / "run")
        assert names(tmp_path / "run") == []
        os.kill(child, 0)
    finally:
        holder.kill()
        holder.wait()
        os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(os.name != "posix", reason="POSIX locks")
def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, caplog):
    def lockf(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", lockf)
    claim(tmp_path)
    assert f"{tmp_path} is on a file system without locks (No locks available)" in caplog.text


def test_a_new_folder_is_made(tmp_path):
    claim(tmp_path / "runs" / "first")
    assert names(tmp_path / "runs" / "first") == []


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("notes")
    for folder in [tmp_path / "run", tmp_path / "run" / "below"]:
        with pytest.raises(OSError, match=f"cannot write to the output folder {folder}: "):
            claim(folder)
    assert (tmp_path / "run").read_text() == "notes"


def test_leftovers_of_a_killed_run_go_and_nothing_else(tmp_path, accelerator):
    path = save(tmp_path, 1, accelerator)
    (tmp_path / ".checkpoint-2.tmp").mkdir()
    write_contents(2)(tmp_path / ".checkpoint-2.tmp")
    (tmp_path / "samples").mkdir()
    (tmp_path / ".notes").write_text("mine")
    claim(tmp_path, path)
    assert names(tmp_path) == [".notes", "checkpoint-1", "samples"]


def test_a_new_run_leaves_the_folder_of_another_alone(tmp_path, accelerator):
    path = save(tmp_path / "other", 1, accelerator)
    truncate(path)
    (tmp_path / "other" / ".checkpoint-2.tmp").mkdir()
    elsewhere = save(tmp_path / "elsewhere", 1, accelerator)
    for resumed_from in [None, elsewhere]:
        with pytest.raises(FileExistsError, match="holds checkpoint-1, which this run does not resume from"):
            claim(tmp_path / "other", resumed_from)
    assert names(tmp_path / "other") == [".checkpoint-2.tmp", "checkpoint-1"]


def test_a_checkpoint_from_elsewhere_may_begin_a_folder(tmp_path, accelerator):
    claim(tmp_path / "new", save(tmp_path / "elsewhere", 1, accelerator))
    assert names(tmp_path / "new") == [] and names(tmp_path / "elsewhere") == ["checkpoint-1"]


def test_resuming_before_complete_checkpoints_is_refused(tmp_path, accelerator):
    paths = [save(tmp_path, step, accelerator) for step in [1, 2, 3]]
    truncate(paths[1])
    with pytest.raises(FileExistsError, match="holds checkpoint-3, which this run does not resume from"):
        claim(tmp_path, paths[0])
    assert steps(tmp_path) == [1, 2, 3]


def test_resuming_before_damaged_checkpoints_makes_way_for_new_ones(tmp_path, accelerator, caplog):
    for step in [1, 2, 3]:
        save(tmp_path, step, accelerator)
    truncate(tmp_path / "checkpoint-1")
    truncate(tmp_path / "checkpoint-3")
    path, _ = find_checkpoint(tmp_path)
    with caplog.at_level(logging.WARNING):
        claim(tmp_path, path)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert f"Deleting the damaged {tmp_path / 'checkpoint-3'}" in caplog.text
    save(tmp_path, 3, accelerator)
    assert find_checkpoint(tmp_path)[1]["step"] == 3


# Settings


def test_differing_settings():
    saved = {"resolution": [32, 48], "seed": 0, "dropout": 0.1, "learning_rate": 1e-4}
    current = {"resolution": (32, 48), "seed": False, "dropout": 0.2, "learning_rate": 3e-4, "dataset": "digits"}
    assert differing_settings(saved, current, ["dropout", "resolution", "dataset"]) == [
        "dropout: saved 0.1, now 0.2",
        "dataset: saved None, now 'digits'",
    ]
    assert differing_settings(saved, saved, saved) == []


def test_settings_are_the_same_after_json():
    settings = {"learning_rate": 0.1 + 0.2, "levels": (1, 2, (3,)), "class": None, "on": True, "名": "ᾱ"}
    assert differing_settings(json.loads(json.dumps(settings)), settings, settings) == []


# Two processes

TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from custom_ddpm.training.checkpoint import find_checkpoint, save_checkpoint

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
model = torch.nn.Linear(3, 2)
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
output_dir = Path(sys.argv[1])

def save(step, write):
    return save_checkpoint(output_dir, step, write, metadata={}, accelerator=accelerator, total_limit=1)

path = save(1, accelerator.save_state)
accelerator.wait_for_everyone()
assert find_checkpoint(output_dir) == (path, {"step": 1})

def fail_on_the_second(folder):
    accelerator.save_state(folder)
    if not accelerator.is_main_process:
        raise OSError(28, "No space left on device")

try:
    save(2, fail_on_the_second)
except OSError as error:
    (output_dir / f"error-{accelerator.process_index}").write_text(str(error))
assert save(1, fail_on_the_second) == path

def write_together(folder):
    accelerator.reduce(torch.ones(100))

try:
    own = output_dir.with_name(f"own-{accelerator.process_index}")
    save_checkpoint(own, 1, write_together, metadata={}, accelerator=accelerator)
except OSError as error:
    assert "own-1 is not the same folder for all processes" in str(error)
    (output_dir / f"error-{accelerator.process_index + 2}").write_text(str(error))
accelerator.load_state(save(3, accelerator.save_state))
"""


@pytest.mark.slow
def test_two_processes_save_together_and_fail_together(tmp_path):
    script, output_dir = tmp_path / "script.py", tmp_path / "run"
    script.write_text(TWO_PROCESSES)
    output_dir.mkdir()
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    # accelerate starts several processes on CPUs through its launcher for GPUs only.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launch, "--main_process_port", "0", str(script), str(output_dir)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert names(output_dir) == ["checkpoint-3", "error-0", "error-1", "error-2", "error-3"]
    for process in [0, 1]:
        assert (output_dir / f"error-{process}").read_text() == (
            f"could not save checkpoint-2 in {output_dir}: OSError: [Errno 28] No space left on device"
        )
    manifest = json.loads((output_dir / "checkpoint-3" / MANIFEST).read_text())
    assert {"model.safetensors", "optimizer.bin", "random_states_0.pkl", "random_states_1.pkl"} <= set(manifest)
