"""The number of steps by time: measuring changes nothing, and the run that follows is the run of that many steps."""

import dataclasses
import json
import time
from types import SimpleNamespace

import pytest
import runs
import torch
import yaml

from custom_ddpm.config import TrainingConfig
from custom_ddpm.training import budget, build

SMALL_GRID = {"ddpm_num_inference_steps": 1, "guidance_scale": 1.0}


def test_a_run_with_a_time_budget_is_the_run_of_as_many_steps(tmp_path, monkeypatch):
    """Measured steps leave weights, optimiser and random numbers as they were."""
    lengths = {"max_train_steps": None, "time_budget": 1000.0}
    monkeypatch.setattr(budget, "SECONDS", 0.05)
    monkeypatch.setattr(build, "plan", lambda config, *_: dataclasses.replace(config, max_train_steps=12))
    runs.run(tmp_path / "budget", **runs.RANDOM, **lengths)
    monkeypatch.undo()
    runs.run(tmp_path / "steps", **runs.RANDOM)
    for step in (4, 12):
        name = f"checkpoint-{step}"
        assert runs.differences(tmp_path / "budget" / name, tmp_path / "steps" / name) == []


def test_resuming_keeps_the_planned_number_of_steps(tmp_path, monkeypatch):
    options = {"max_train_steps": None, "time_budget": 1000.0}
    monkeypatch.setattr(budget, "SECONDS", 0.05)
    monkeypatch.setattr(build, "plan", lambda config, *_: dataclasses.replace(config, max_train_steps=12))
    runs.run(tmp_path / "whole", **options)
    runs.run_killed_at(monkeypatch, 6, tmp_path / "killed", **options)
    monkeypatch.setattr(build, "plan", lambda *_: pytest.fail("planned again"))
    runs.run(tmp_path / "killed", resume_from_checkpoint="latest", **options)
    assert runs.differences(tmp_path / "whole" / "checkpoint-12", tmp_path / "killed" / "checkpoint-12") == []
    settings = json.loads((tmp_path / "killed" / "checkpoint-12" / "metadata.json").read_text())["settings"]
    assert settings["max_train_steps"] == 12 and settings["time_budget"] == 1000.0
    assert yaml.safe_load((tmp_path / "killed" / "training_config.yaml").read_text())["max_train_steps"] == 12


def test_a_checkpoint_from_before_there_were_recipes_is_of_the_stock_one():
    found = build._with_choices_of(TrainingConfig(dropout=0.5), {"settings": {"learning_rate": 3e-4, "dropout": 0.1}})
    assert (found.recipe, found.learning_rate, found.dropout) == ("stock", 3e-4, 0.5)
    assert (found.patch_size, found.resnet_time_scale_shift) == (1, "default")
    assert build._with_choices_of(TrainingConfig(), {}) == TrainingConfig()


@pytest.mark.slow
def test_a_run_ends_within_its_time(tmp_path):
    """Counted from the start of the process, which here has run for a while."""
    already = time.time() - budget.psutil.Process().create_time()
    start = time.perf_counter()
    options = {"max_train_steps": None, "checkpointing_steps": 10**6}
    runs.run(tmp_path / "run", time_budget=already / 60 + 0.6, **options)
    assert 18 < time.perf_counter() - start < 54  # 36 seconds were asked for
    assert (tmp_path / "run" / "samples.png").exists()


@pytest.mark.parametrize(("minutes", "grids"), [(3, 2), (30, 12)])
def test_grids_take_a_small_part_of_the_time(monkeypatch, minutes, grids):
    """A grid of 50 pictures, 20 steps and guidance is 1,000 steps of two pictures, here 3.4 seconds."""
    monkeypatch.setattr(budget.psutil, "Process", lambda: SimpleNamespace(create_time=time.time))
    sizes = {"train_batch_size": 16, "eval_batch_size": 50, "ddpm_num_inference_steps": 20, "guidance_scale": 1.5}
    config = TrainingConfig(time_budget=minutes, class_conditional=True, **sizes)
    planned = budget.plan(config, 0.05, SimpleNamespace(num_processes=1))
    assert (planned.max_train_steps - 1) // planned.save_images_steps == grids
    grid = 0.05 / 16 * budget.FORWARD * 2000
    training = planned.max_train_steps * 0.05
    assert 0.85 * 60 * minutes < training + (grids + 1) * grid < 60 * minutes


def test_no_time_for_training_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "SECONDS", 0.05)
    with pytest.raises(ValueError, match=r"--time_budget is 0\.01; loading, .* take about .* minutes here"):
        runs.run(tmp_path / "run", time_budget=0.01, max_train_steps=None)


def test_a_resumed_run_plans_what_is_left(monkeypatch):
    monkeypatch.setattr(budget.psutil, "Process", lambda: SimpleNamespace(create_time=time.time))
    config = TrainingConfig(time_budget=3, eval_batch_size=1, train_batch_size=1, **SMALL_GRID)
    plans = [budget.plan(config, 0.05, SimpleNamespace(num_processes=1), step).max_train_steps for step in (0, 5000)]
    assert plans[1] == plans[0] + 5000


def test_a_precision_is_chosen_once_and_only_where_nobody_asked(tmp_path, monkeypatch):
    speed = {"now": 2.0}
    threads = torch.get_num_threads()
    monkeypatch.setattr(budget, "bf16_speed", lambda device: speed["now"] if torch.get_num_threads() == 1 else 0.0)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)

    def chosen(**settings):
        return budget.choose_precision(TrainingConfig(output_dir=str(tmp_path), **settings))[0].mixed_precision

    assert chosen() == "bf16" and torch.get_num_threads() == threads
    assert chosen(mixed_precision="no") == "no" and chosen(recipe="stock") is None
    (tmp_path / "training_config.yaml").write_text('mixed_precision: "bf16"\n')
    speed["now"] = 1.1
    assert chosen() == "no"
    assert chosen(resume_from_checkpoint="latest") == "bf16"  # as the run began, however fast the machine is today
    assert chosen(resume_from_checkpoint=str(tmp_path / "checkpoint-5")) == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert chosen() is None  # accelerate's
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    speed["now"] = 2.0
    assert chosen() == "no"  # processes could measure differently


def test_the_speed_of_bf16_is_a_ratio():
    assert 0.001 < budget.bf16_speed(torch.device("cpu")) < 100


@pytest.fixture
def threads(monkeypatch):
    """The number of threads in use, of 8; the real one stays as it is."""
    used = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(budget, "threads_were_chosen", lambda: False)
    return used


ON_CPU = SimpleNamespace(device=torch.device("cpu"), num_processes=1)


@pytest.mark.parametrize(
    ("seconds", "tried", "chosen"),
    [
        ({8: 1.0, 4: 1.1}, [8, 4], 8),  # a large network
        ({8: 1.0, 4: 0.9, 2: 0.95}, [8, 4, 2], 8),  # no clear difference
        ({8: 1.0, 4: 0.6, 2: 0.5, 1: 0.7}, [8, 4, 2, 1], 2),
        ({8: 5.0, 4: 3.0, 2: 2.0, 1: 0.1}, [8, 4, 2, 1], 1),  # a core is taken by another program
    ],
)
def test_fewer_threads_where_they_are_clearly_faster(threads, monkeypatch, caplog, seconds, tried, chosen):
    monkeypatch.setattr(budget, "_step_times", lambda *_: [9.0, seconds[threads[-1]]])
    with caplog.at_level("INFO"):
        found = budget.choose_threads(TrainingConfig(), ON_CPU, False)
    assert (threads[1:-1], threads[-1], found.cpu_threads) == (tried, chosen, chosen)
    ratio = seconds[8] / seconds[chosen]
    said = [] if chosen == 8 else [f"--cpu_threads {chosen}: steps are {ratio:.1f}x as fast as with 8"]
    assert caplog.messages == said


def test_threads_are_not_measured_where_somebody_chose_them(threads, monkeypatch):
    monkeypatch.setattr(budget, "_step_times", lambda *_: pytest.fail("measured"))
    several = SimpleNamespace(device=torch.device("cpu"), num_processes=2)
    gpu = SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    for settings, accelerator in (({"recipe": "stock"}, ON_CPU), ({}, several), ({}, gpu)):
        assert budget.choose_threads(TrainingConfig(**settings), accelerator, False).cpu_threads is None
    assert budget.choose_threads(TrainingConfig(cpu_threads=3), ON_CPU, False).cpu_threads == threads[-1] == 3
    assert budget.choose_threads(TrainingConfig(), ON_CPU, True).cpu_threads is None  # resumed
    monkeypatch.setattr(budget, "threads_were_chosen", lambda: True)
    assert budget.choose_threads(TrainingConfig(), ON_CPU, False).cpu_threads is None


def test_the_threads_of_a_checkpoint_are_those_of_one_process_that_chose_none(monkeypatch):
    saved = {"settings": {"cpu_threads": 16}}
    monkeypatch.setattr(build, "threads_were_chosen", lambda: False)
    assert build._with_choices_of(TrainingConfig(), saved).cpu_threads == 16
    assert build._with_choices_of(TrainingConfig(cpu_threads=2), saved).cpu_threads == 2
    assert build._with_choices_of(TrainingConfig(), saved, 4).cpu_threads is None
    monkeypatch.setattr(build, "threads_were_chosen", lambda: True)
    assert build._with_choices_of(TrainingConfig(), saved).cpu_threads is None


def test_measuring_threads_changes_nothing_and_a_resumed_run_keeps_them(tmp_path, monkeypatch):
    before = torch.get_num_threads()
    options = {**runs.RANDOM, **SMALL_GRID, "recipe": "default", "mixed_precision": "no"}
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr(budget, "threads_were_chosen", lambda: False)
        monkeypatch.setattr(build, "threads_were_chosen", lambda: False)
        monkeypatch.setattr("custom_ddpm.training.launch.threads_were_chosen", lambda: True)  # leaves the two
        monkeypatch.setattr(budget, "FEWER", 0.0)
        runs.run_killed_at(monkeypatch, 6, tmp_path / "measured", **options)
        chosen = yaml.safe_load((tmp_path / "measured" / "training_config.yaml").read_text())["cpu_threads"]
        assert chosen in (1, 2)
        monkeypatch.setattr(budget, "_step_times", lambda *_: pytest.fail("measured again"))
        runs.run(tmp_path / "measured", resume_from_checkpoint="latest", **options)
        runs.run(tmp_path / "given", cpu_threads=chosen, **options)
    finally:
        torch.set_num_threads(before)
    found = [tmp_path / name / "checkpoint-12" for name in ("measured", "given")]
    assert runs.differences(*found) == []
