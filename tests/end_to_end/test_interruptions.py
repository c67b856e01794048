"""Runs that are ended from outside: kill -9, SIGTERM to one process or to a launcher, one of two processes lost.

Programs of their own, started as a user starts them, so all of it is slow.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from runs import LAUNCH, PYTHON, RANDOM, ROOT, SCRIPT, differences, flags, free_port, python_environment

from custom_ddpm.training.checkpoint import find_checkpoint, list_checkpoints
from custom_ddpm.training.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")]
PATIENCE = 300.0  # seconds, after which what is waited for does not come


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return python_environment(HF_DATASETS_CACHE=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def start(environment, tmp_path):
    """Starts a program with its output in a file; all that are left are ended after the test."""
    started = []

    def start(command, **options):
        log = (tmp_path / f"log-{len(started)}").open("w+")
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT, **options)
        process.log = Path(log.name)
        started.append(process)
        return process

    yield start
    for process in started:
        # Those below it too: a launcher that is killed leaves its processes.
        for each in family(process):
            each.kill()
        process.wait()


def family(process):
    try:
        parent = psutil.Process(process.pid)
        return [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return []


def wait_until(condition, process=None, pause=0.01):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE:.0f} s for nothing"
        assert process is None or process.poll() is None, process.log.read_text()
        time.sleep(pause)


def steps_told(output_dir):
    lines = read_metrics(output_dir)
    return lines[-1]["step"] if lines else 0


def last_step(output_dir):
    return max(list_checkpoints(output_dir), default=0)


def finish(process):
    process.wait(PATIENCE)
    assert process.returncode == 0, process.log.read_text()
    return process.log.read_text()


def training_processes(output_dir):
    """Those that train, not their launchers."""
    own = [p for p in psutil.process_iter(["cmdline"]) if str(output_dir) in (p.info["cmdline"] or [])]
    parents = {p.ppid() for p in own}
    return [p for p in own if p.pid not in parents]


def metrics_of(output_dir):
    """Which file it is: a run that starts writes it anew."""
    file = output_dir / "metrics.jsonl"
    return file.stat().st_ino if file.exists() else None


INTERVAL = 3
KILLS = 20


def test_killed_at_twenty_random_moments(tmp_path, start):
    rng = random.Random(0)
    changes = {**RANDOM, "max_train_steps": 400, "checkpointing_steps": INTERVAL, "logging_steps": 1}
    changes |= {"checkpoints_total_limit": 2}
    straight, begin = start([PYTHON, SCRIPT, *flags(tmp_path / "straight", **changes)]), time.monotonic()
    wait_until(lambda: steps_told(tmp_path / "straight"), straight)
    to_the_first_step = time.monotonic() - begin
    finish(straight)
    output_dir = tmp_path / "killed"
    command = [PYTHON, SCRIPT, *flags(output_dir, **changes, resume_from_checkpoint="latest")]
    resumed = aimed = inside = 0
    lost, reached = [], 0
    for kill in range(KILLS):
        before = metrics_of(output_dir)
        process = start(command)
        if kill % 4:
            # Until the steps that it comes to again are out of the metrics, and what was half written is gone.
            wait_until(lambda before=before: metrics_of(output_dir) != before, process)
        goal = reached + rng.randrange(1, 2 * INTERVAL)
        if kill % 2:
            # Inside the writing, if the folder is still there when the process is gone.
            wait_until(lambda goal=goal: steps_told(output_dir) >= goal, process)
            wait_until(lambda: any(output_dir.glob(".checkpoint-*.tmp")), process, pause=0.0)
            time.sleep(rng.uniform(0, 0.15))
            aimed += 1
        elif kill % 4:
            wait_until(lambda goal=goal: steps_told(output_dir) >= goal, process)
            time.sleep(rng.uniform(0, 0.2))
        else:
            time.sleep(rng.uniform(0, to_the_first_step))  # imports, reading of the checkpoint and the data
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL, process.log.read_text()
        if f"resumed from {output_dir}/checkpoint-{reached} at step {reached}" in process.log.read_text():
            resumed += 1
        inside += kill % 2 and any(output_dir.glob(".checkpoint-*.tmp"))
        found = find_checkpoint(output_dir)
        reached, done = found[1]["step"] if found else 0, steps_told(output_dir)
        lost.append(done - reached)
    end = finish(start(command))
    assert f"resumed from {output_dir}/checkpoint-{reached} at step {reached}" in end
    print(
        f"\n{KILLS} kills, {inside} of them inside the writing of a checkpoint ({aimed} tried), "
        f"{KILLS - resumed} while it started; {KILLS} of {KILLS} went on; steps lost: {lost}, saved: {reached}"
    )
    assert max(lost) <= INTERVAL
    assert inside > 0
    assert differences(tmp_path / "straight" / "checkpoint-400", output_dir / "checkpoint-400") == []
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (output_dir / weights).read_bytes() == (tmp_path / "straight" / weights).read_bytes()


FOREVER = {"max_train_steps": 100_000, "checkpointing_steps": 100_000, "logging_steps": 5}


def launched(processes, *words):
    launcher = [*LAUNCH, "--cpu", "--num_processes", str(processes), "--num_machines", "1"]
    return [*launcher, "--main_process_port", str(free_port()), SCRIPT, *words]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_process(tmp_path, start, number):
    process = start([PYTHON, SCRIPT, *flags(tmp_path / "run", **FOREVER)])
    wait_until(lambda: steps_told(tmp_path / "run") >= 10, process)
    process.send_signal(number)
    said = finish(process)
    step = last_step(tmp_path / "run")
    assert step >= 10 and f"stopped at step {step}: received {number.name}" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_launcher(tmp_path, start, processes, number):
    """`accelerate launch` of CPU processes hands no signal on; the run notices that it is gone."""
    process = start(launched(processes, *flags(tmp_path / "run", **FOREVER)))
    wait_until(lambda: steps_told(tmp_path / "run") >= 10, process)
    process.send_signal(number)
    process.wait(PATIENCE)
    wait_until(lambda: not training_processes(tmp_path / "run"))
    said = process.log.read_text()
    step = last_step(tmp_path / "run")
    assert step >= 10, said
    assert f"stopped at step {step}: " in said and "Traceback" not in said


def torchrun(*words):
    return [PYTHON, "-m", "torch.distributed.run", "--nproc_per_node", "2", *words]


def test_a_signal_to_torchs_launcher(tmp_path, start, monkeypatch, environment):
    monkeypatch.setitem(environment, "ACCELERATE_USE_CPU", "true")
    process = start(torchrun(SCRIPT, *flags(tmp_path / "run", **FOREVER)))
    wait_until(lambda: steps_told(tmp_path / "run") >= 10, process)
    process.send_signal(signal.SIGTERM)
    process.wait(PATIENCE)
    assert process.returncode != 0
    step = last_step(tmp_path / "run")
    assert step >= 10 and f"stopped at step {step}: received SIGTERM" in process.log.read_text()


def test_torchs_launcher_replaces_a_lost_process_and_the_run_goes_on(tmp_path, start, monkeypatch, environment):
    monkeypatch.setitem(environment, "ACCELERATE_USE_CPU", "true")
    changes = {"max_train_steps": 80, "checkpointing_steps": 10, "logging_steps": 1, "resume_from_checkpoint": "latest"}
    # A store that is shared outlives a restart, in torch 2.13 with the addresses of the processes before.
    monkeypatch.setitem(environment, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    process = start(torchrun("--standalone", "--max_restarts", "2", SCRIPT, *flags(tmp_path / "run", **changes)))
    wait_until(lambda: last_step(tmp_path / "run") >= 20, process)
    training_processes(tmp_path / "run")[0].kill()
    said = finish(process)
    assert "resumed from" in said and last_step(tmp_path / "run") == 80
    told = [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert told == list(range(1, 81))


def test_ctrl_c_to_a_launcher_and_all_its_processes(tmp_path, start):
    process = start(launched(2, *flags(tmp_path / "run", **FOREVER)), start_new_session=True)
    wait_until(lambda: steps_told(tmp_path / "run") >= 10, process)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(PATIENCE)
    wait_until(lambda: not training_processes(tmp_path / "run"))
    step = last_step(tmp_path / "run")
    assert step >= 10 and f"stopped at step {step}: received SIGINT" in process.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_process_group_of_a_stream_with_workers(tmp_path, start, number):
    """The workers that decode get the signal too, and must live until the checkpoint is saved."""
    changes = {**FOREVER, "streaming": True, "dataloader_num_workers": 2}
    process = start([PYTHON, SCRIPT, *flags(tmp_path / "run", **changes)], start_new_session=True)
    wait_until(lambda: steps_told(tmp_path / "run") >= 10, process)
    os.killpg(process.pid, number)
    said = finish(process)
    step = last_step(tmp_path / "run")
    assert step >= 10 and f"stopped at step {step}: received {number.name}" in said
    assert "Traceback" not in said
    wait_until(lambda: not training_processes(tmp_path / "run"))


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_two_processes_dies(tmp_path, start, which):
    changes = {**RANDOM, "max_train_steps": 400, "checkpointing_steps": 10, "logging_steps": 1}
    process = start(launched(2, *flags(tmp_path / "run", **changes)))
    wait_until(lambda: last_step(tmp_path / "run") >= 20, process)
    victim = next(p for p in training_processes(tmp_path / "run") if p.environ().get("LOCAL_RANK") == str(which))
    victim.kill()
    process.wait(PATIENCE)
    said = process.log.read_text()
    assert process.returncode != 0
    assert not training_processes(tmp_path / "run")
    assert f"process {which} was ended by SIGKILL" in said
    assert "Connection closed" not in said
    found, metadata = find_checkpoint(tmp_path / "run")
    assert steps_told(tmp_path / "run") - metadata["step"] <= 10
    # And on one process, with the same global batch, it goes on.
    changes |= {"max_train_steps": metadata["step"] + 3, "gradient_accumulation_steps": 4}
    resume = [PYTHON, SCRIPT, *flags(tmp_path / "run", **changes, resume_from_checkpoint="latest")]
    assert f"resumed from {found} at step {metadata['step']}" in finish(start(resume))


def test_an_error_of_one_process_ends_all_with_its_line(tmp_path, start):
    """Only process 1 comes to the row that is no picture: a stream is decoded where it is needed."""
    import datasets
    import numpy as np
    import PIL.Image

    (tmp_path / "data").mkdir()
    rows = []
    for i in range(40):
        PIL.Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / "row.png")
        rows.append({"bytes": (tmp_path / "row.png").read_bytes() if i != 30 else b"no picture", "path": None})
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": rows}, features).to_parquet(tmp_path / "data" / "train.parquet")
    changes = {"dataset_name": str(tmp_path / "data"), "streaming": True, "train_batch_size": 1}
    process = start(launched(2, *flags(tmp_path / "run", **changes, max_train_steps=40)))
    process.wait(PATIENCE)
    said = process.log.read_text()
    assert process.returncode != 0
    assert not training_processes(tmp_path / "run")
    errors = [line for line in said.split("\n") if line.startswith("train_ddpm.py: error: ")]
    assert len(errors) == 1 and "no readable image" in errors[0], said
    assert "Connection closed" not in said
