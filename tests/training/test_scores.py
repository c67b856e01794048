"""custom_ddpm/training/scores.py: metrics of drawn pictures at their steps, once each, on any number of processes."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from diffusers import DPMSolverMultistepScheduler
from huggingface_hub import ModelCard
from runs import DIGITS, RANDOM, differences, metrics, needs_forkserver, run, run_killed_at, run_on_processes

from custom_ddpm import CustomDDPMPipeline
from custom_ddpm.config import TrainingConfig
from custom_ddpm.data.sources import open_images
from custom_ddpm.evaluation.features import load_features
from custom_ddpm.training import run as run_module
from custom_ddpm.training import scores as scores_module
from custom_ddpm.training.checkpoint import list_checkpoints
from custom_ddpm.training.metrics import tracker_name

pytestmark = pytest.mark.usefixtures("digits_cache")
HELD_OUT = {"split": "train[:90%]", "validation_split": "train[90%:]"}
EVALUATED = {**HELD_OUT, "eval_steps": 5, "eval_num_images": 60, "eval_features": "runs:small_features"}
FD = "FD (runs:small_features)"


def evaluated(folder):
    return [line for line in metrics(folder) if "evaluation" in line]


def test_the_numbers_are_those_of_pictures_drawn_with_the_saved_weights(tmp_path):
    run(tmp_path, **HELD_OUT, eval_steps=100, eval_features="random", eval_num_images=140, seed=3)
    lines = evaluated(tmp_path)
    names = ("FD ({}), N → ∞", "KID ({})", "precision ({})", "recall ({})", "FD ({})")
    *_, fd = names = [name.format("random convolutions") for name in names]
    assert {*names} < lines[0].keys()
    about = lines[-1]["evaluation"]
    assert about.pop("standard_errors").keys() == lines[-1].keys() - {"step", "evaluation"}
    assert about == {
        "num_images": 140,
        "sampler": "DPM-Solver++, 20 steps",
        "reference": "180 held-out pictures, split train[90%:]",
        "best_by": fd,
    }

    pipeline = CustomDDPMPipeline.from_pretrained(tmp_path)
    options = {"timestep_spacing": "trailing", "thresholding": True, "sample_max_value": 1.0}  # clips, as ours
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **options)
    generators = [torch.Generator().manual_seed(3 + i) for i in range(140)]
    drawn = pipeline(batch_size=140, generator=generators, num_inference_steps=20, output_type="np").images
    drawn = torch.tensor((drawn * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
    real, _ = open_images(dataset_name=DIGITS, split="train[90%:]", resolution=8).take(180)
    a, b = (load_features("random")(images).double().numpy() for images in (drawn, real))
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert lines[-1][fd] == pytest.approx(distance, rel=1e-3)


def test_without_held_out_pictures_the_reference_is_what_is_trained_on(tmp_path):
    run(
        tmp_path, eval_steps=100, eval_num_images=60, eval_features="random", class_conditional=True, guidance_scale=2.0
    )
    (line,) = evaluated(tmp_path)
    assert line["step"] == 12 and line["evaluation"]["reference"] == "1,797 training pictures"
    # 60 pictures have no covariance of 128 features; then the extrapolated number chooses.
    fd = "FD (random convolutions)"
    assert fd not in line and line["evaluation"]["best_by"] == f"{fd}, N → ∞"


@pytest.mark.slow
def test_it_changes_nothing_in_the_run(tmp_path):
    run(tmp_path / "evaluated", **{**EVALUATED, **RANDOM})
    run(tmp_path / "not", **HELD_OUT, **RANDOM)
    assert differences(tmp_path / "evaluated" / "checkpoint-12", tmp_path / "not" / "checkpoint-12") == []
    for name in ("samples.png", "final_loss.json"):
        assert (tmp_path / "evaluated" / name).read_bytes() == (tmp_path / "not" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [True, False])
def test_what_was_due_at_the_checkpoint_is_measured_after_a_resume_and_only_then(tmp_path, monkeypatch, lost):
    options = {**EVALUATED, "eval_steps": 4, "save_images_steps": 4}
    run(tmp_path / "straight", **options)
    run_killed_at(monkeypatch, 5, tmp_path / "killed", **options)
    if lost:
        lines = tmp_path / "killed" / "metrics.jsonl"
        lines.write_text("".join(line for line in lines.open() if "evaluation" not in line and "valid" not in line))
        (tmp_path / "killed" / "samples" / "step-0000004.png").unlink()
    measured, scores = [], scores_module.Reference.scores
    monkeypatch.setattr(scores_module.Reference, "scores", lambda *a: measured.append(a) or scores(*a))
    for _ in range(2):  # the second finds the run finished
        run(tmp_path / "killed", **options, resume_from_checkpoint="latest")
        assert len(measured) == 2 + lost
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "straight")


def test_the_best_checkpoint_is_kept_by_the_distance_not_by_the_loss(tmp_path, monkeypatch):
    distances = iter([3.0, 1.0, 0.5, 4.0, 5.0])  # of steps 2, 4, 6 (no checkpoint), 8, 9

    def scores(*arguments):
        about = {"best_by": "FID", "standard_errors": {"FID": 0.1}, "num_images": 50, "sampler": "S", "reference": "R"}
        return {"FID": next(distances), "evaluation": about}

    monkeypatch.setattr(scores_module.Reference, "scores", scores)
    left, save = [], run_module.save_checkpoint
    monkeypatch.setattr(
        run_module, "save_checkpoint", lambda *a, **k: (save(*a, **k), left.append(list(list_checkpoints(tmp_path))))
    )
    options = {**EVALUATED, "eval_steps": 2, "save_images_steps": 2, "max_train_steps": 9, "learning_rate": 1e-2}
    run(tmp_path, **options, checkpointing_steps=4, checkpoints_total_limit=1)
    losses = {line["step"]: line["validation_loss"] for line in metrics(tmp_path) if "validation_loss" in line}
    assert losses[8] < losses[4]
    assert left == [[4], [4, 8], [4, 9]]


def test_the_card_has_the_metrics_in_place_of_the_loss(tmp_path):
    run(tmp_path, **EVALUATED)
    assert [line["step"] for line in evaluated(tmp_path)] == [5, 10, 12]
    line, results = evaluated(tmp_path)[-1], ModelCard.load(tmp_path / "README.md").data.eval_results
    assert {r.metric_type: r.metric_value for r in results} == {
        name: value for name, value in line.items() if name not in ("step", "evaluation")
    }
    assert {(r.dataset_name, r.metric_args["num_images"], r.metric_args["step"]) for r in results} == {
        ("digits", 60, 12)
    }
    text = (tmp_path / "README.md").read_text()
    assert f"| {FD} |" in text and "sampler DPM-Solver++, 20 steps" in text and "validation_loss" not in text


def test_what_cannot_be_evaluated_is_refused_before_the_first_step(tmp_path):
    too_few = {"split": "train[:90%]", "validation_split": "train[95%:]"}
    with pytest.raises(ValueError, match=r"--eval_features random are 128 numbers .* more than 128 held-out .* are 90"):
        run(tmp_path / "few", **{**EVALUATED, **too_few, "eval_features": "random"})
    with pytest.raises(ValueError, match="there are no features 'nonsense'"):
        run(tmp_path / "unknown", **{**EVALUATED, "eval_features": "nonsense"})
    with pytest.raises(ValueError, match="--eval_steps is 5; --streaming reads a stream"):
        TrainingConfig(eval_steps=5, streaming=True)
    with pytest.raises(ValueError, match="--eval_num_images is 49; it must be at least 50"):
        TrainingConfig(eval_num_images=49)


def test_names_are_such_as_every_tracker_takes():
    assert tracker_name("FD (digits classifier), N → ∞") == "FD digits classifier N to infinity"
    assert tracker_name("validation_loss") == "validation_loss"


@pytest.mark.slow
@needs_forkserver
def test_two_processes_measure_what_one_does(tmp_path):
    run(tmp_path / "one", **EVALUATED, gradient_accumulation_steps=2)
    run_on_processes(2, tmp_path / "two", **EVALUATED)
    one, two = evaluated(tmp_path / "one"), evaluated(tmp_path / "two")
    assert [line["step"] for line in two] == [5, 10, 12]
    for ours, theirs in zip(one, two, strict=True):
        assert theirs[FD] == pytest.approx(ours[FD], rel=1e-3)
        assert json.dumps(sorted(ours)) == json.dumps(sorted(theirs))
