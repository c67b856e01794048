"""custom_ddpm/training/launch.py: the number of threads is the user's, or the machine's, but not the launcher's."""

import os
import subprocess
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from runs import LAUNCH, PYTHON

from custom_ddpm.training import launch

CODE = "from custom_ddpm.training.launch import set_cpu_threads; print('threads', set_cpu_threads(LOCAL))"
CORES = min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))


def threads(tmp_path, command, local=1, **environment):
    script = tmp_path / "script.py"
    script.write_text(CODE.replace("LOCAL", str(local)))
    kept = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS" and not k.startswith("ACCELERATE_")}
    # `sh -c` without exec: the shell that a user types into, whose own environment lacks what a command is given.
    said = subprocess.run(
        ["sh", "-c", f"{command} {script}; true"], env={**kept, **environment}, capture_output=True, text=True
    )
    return int(said.stdout.split("threads ")[1].split()[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "environment", "expected"),
    [
        (PYTHON, {}, CORES),
        (f"OMP_NUM_THREADS=1 {PYTHON}", {}, 1),
        (PYTHON, {"OMP_NUM_THREADS": "1"}, 1),
        (f"{' '.join(LAUNCH)} --cpu", {}, CORES),
        (f"OMP_NUM_THREADS=1 {' '.join(LAUNCH)} --cpu", {}, 1),
        (f"{' '.join(LAUNCH)} --cpu --num_cpu_threads_per_process 1", {}, 1),
    ],
    ids=["alone", "alone, chosen", "alone, exported", "launched", "launched, chosen", "launched, by flag"],
)
def test_all_cores_are_used_unless_the_user_chose(tmp_path, command, environment, expected):
    if CORES == 1:
        pytest.skip("one core tells nothing")
    assert threads(tmp_path, command, **environment) == expected


def test_processes_share_the_cores(monkeypatch):
    from custom_ddpm.training import launch

    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6), raising=False)
    try:
        assert [launch.set_cpu_threads(n) for n in (1, 2, 3, 100)] == [6, 3, 2, 1]
    finally:
        torch.set_num_threads(before)


def test_time_taken_is_in_minutes_and_cores(monkeypatch):
    process = SimpleNamespace(
        create_time=lambda: time.time() - 120, cpu_times=lambda: SimpleNamespace(user=150.0, system=30.0)
    )
    monkeypatch.setattr(launch.psutil, "Process", lambda: process)
    assert launch.time_taken() == f"2.0 minutes, 1.5 of {os.cpu_count()} CPU cores in use on average"
