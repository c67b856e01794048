"""Whole runs by the commands that the documentation gives: processes, machines, streams, compilation."""

import subprocess

import pytest
import torch
from runs import LAUNCH, PYTHON, RANDOM, ROOT, SCRIPT, flags, free_port, metrics, python_environment, state

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return python_environment(HF_DATASETS_CACHE=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def together(environment):
    """Runs commands at the same time; all must succeed. Returns what they said."""

    def together(*commands):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
        processes = [subprocess.Popen(command, env=environment, **options) for command in commands]
        said = [process.communicate(timeout=900)[0] for process in processes]
        for process, words in zip(processes, said, strict=True):
            assert process.returncode == 0, words
        return said

    return together


def launch(port, processes, machines=1, rank=0):
    command = [*LAUNCH, "--cpu", "--num_processes", str(processes), "--num_machines", str(machines)]
    return [
        *command,
        "--machine_rank",
        str(rank),
        "--main_process_ip",
        "127.0.0.1",
        "--main_process_port",
        str(port),
        SCRIPT,
    ]


STEPS = 200


def losses(folder):
    lines = [line for line in metrics(folder) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return torch.tensor([line["loss"] for line in lines], dtype=torch.float64)


def test_two_hundred_steps_are_the_same_on_one_process_two_processes_and_two_machines(tmp_path, together):
    changes = {**RANDOM, "max_train_steps": STEPS, "logging_steps": 1, "checkpointing_steps": STEPS}
    together([PYTHON, SCRIPT, *flags(tmp_path / "one", **changes)])
    changes["gradient_accumulation_steps"] = 1
    together([*launch(free_port(), 2), *flags(tmp_path / "two", **changes)])
    port = free_port()
    machines = [[*launch(port, 2, machines=2, rank=rank), *flags(tmp_path / "machines", **changes)] for rank in (0, 1)]
    together(*machines)
    one = losses(tmp_path / "one")
    assert one[-20:].mean() < 0.8 * one[:20].mean()
    last = state(tmp_path / "one" / f"checkpoint-{STEPS}")
    for name in ("two", "machines"):
        difference = (losses(tmp_path / name) - one).abs().max().item()
        other = state(tmp_path / name / f"checkpoint-{STEPS}")
        weights = max((other[key] - value).abs().max().item() for key, value in last.items() if key.startswith("unet"))
        print(f"\none process x accumulation 2, {name} x 1: losses differ by {difference:.1e}, weights {weights:.1e}")
        assert difference < 1e-5
        assert weights < 1e-4
    # Two processes and two machines of one process do the same sums in the same order.
    assert torch.equal(losses(tmp_path / "two"), losses(tmp_path / "machines"))


def test_a_stream_with_workers_is_the_run_without(tmp_path, together):
    changes = {**RANDOM, "streaming": True}
    together([PYTHON, SCRIPT, *flags(tmp_path / "none", **changes)])
    together([PYTHON, SCRIPT, *flags(tmp_path / "two", **changes, dataloader_num_workers=2)])
    together([*launch(free_port(), 2), *flags(tmp_path / "processes", **{**changes, "gradient_accumulation_steps": 1})])
    assert metrics(tmp_path / "none") == metrics(tmp_path / "two")
    for line, other in zip(metrics(tmp_path / "none"), metrics(tmp_path / "processes"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_compiled_run(tmp_path, together):
    together([PYTHON, SCRIPT, *flags(tmp_path / "plain")])
    together([PYTHON, SCRIPT, *flags(tmp_path / "compiled", torch_compile=True)])
    for line, other in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "compiled"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_trackers_log_what_metrics_jsonl_holds(tmp_path, together):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    together([PYTHON, SCRIPT, *flags(tmp_path / "run", report_to="tensorboard", save_images_steps=6)])
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "logs" / "custom_ddpm"))
    events.Reload()
    told = [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")]
    assert told == [(line["step"], line["loss"]) for line in metrics(tmp_path / "run")]
    assert [event.step for event in events.Images("samples")] == [6, 12]
