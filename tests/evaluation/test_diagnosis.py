"""custom_ddpm/evaluation/diagnosis.py, evidence.py and symptoms.py: each sickness is named, and a healthy run has none.

Whole runs take minutes and are marked slow; the others here are the files of a run, written by hand.
"""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.training_utils import EMAModel

from custom_ddpm.cli import main
from custom_ddpm.config import TrainingConfig
from custom_ddpm.evaluation.diagnosis import diagnose, in_words
from custom_ddpm.evaluation.evidence import split_grid
from custom_ddpm.evaluation.symptoms import SYMPTOMS, weight_before
from custom_ddpm.recipe import STOCK
from custom_ddpm.sampling import image_grid
from custom_ddpm.scheduler import CustomDDPMScheduler
from evaluation.sick_runs import HEALTHY_RUNS, SICK_RUNS, run_one

LINEAR = [0.3, 0.15, 0.1, 0.06, 0.04, 0.03, 0.02, 0.01, 0.005, 0.002]
REMEMBERED = [0.1 * x for x in LINEAR]
LEARNT = [0.2, 0.1, 0.07, 0.04, 0.03, 0.02, 0.01, 0.008, 0.004, 0.002]


def losses(curve, at=LEARNT, steps=1000, every=20, noise=0.02):
    """Lines of metrics whose mean loss follows a curve over the run, 0 … 1, with noise."""
    random, lines = np.random.default_rng(0), []
    for step in range(every, steps + 1, every):
        factor = curve(step / steps) / np.mean(at) * (1 + noise * random.normal())
        by_level = [value * factor for value in at]
        lines.append(
            {"step": step, "loss": float(np.mean(by_level)), "loss_by_timestep": by_level, "grad_norm": 0.3}
            | {"learning_rate": 1e-4, "skipped_steps": 0}
        )
    return lines


def falling(u):
    return 0.0484 + np.exp(-30 * u)  # the mean of LEARNT, and what vanishes early


def pictures(n=16, channels=1, seed=0):
    """Smooth pictures, uint8 (n, C, 8, 8)."""
    x = np.linspace(0, 1, 8)
    random = np.random.default_rng(seed).random((n, channels, 3))
    waves = np.sin(
        6 * (x[None, None, :, None] * random[..., :1, None] + x * random[..., 1:2, None]) + 6 * random[..., 2:, None]
    )
    return torch.tensor((127 + 120 * waves).astype(np.uint8))


HEALTHY_STATISTICS = {"minimum": [0], "maximum": [255], "mean": [127], "std": [80], "picture_std": 70, "mean_std": 40}


def write_run(folder, lines=None, samples=None, scheduler=None, final=None, statistics=None, bounds=None, **settings):
    """The files of a healthy run, but for what is given."""
    folder.mkdir(exist_ok=True)
    own = {"dataset_name": "digits", "resolution": [8], "lr_warmup_steps": 100}
    config = TrainingConfig(**{**STOCK, "max_train_steps": 1000, **own, **settings})
    (folder / "training_config.yaml").write_text(config.to_yaml())
    lines = losses(falling) if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    image_grid(pictures() if samples is None else samples).save(folder / "samples.png")
    (scheduler or CustomDDPMScheduler()).save_pretrained(folder / "scheduler")
    found = {
        "training": 0.05,
        "training_by_timestep": LEARNT,
        "training_error": 0.001,
        "raw": 0.05,
        "averaged_minus_raw_error": 1e-4,
    } | (final or {})
    (folder / "final_loss.json").write_text(json.dumps(found))
    found = {"num_images": 10_000, "num_dimensions": 64, "linear_pictures": 10_000, "memorised_pictures": 10_000}
    found |= {"linear": LINEAR, "memorised": [0.01] * 10, "constant": [1.0] * 10, **(bounds or {})}
    found["pictures"] = HEALTHY_STATISTICS | {"roughness": 20, "gray": False, **(statistics or {})}
    (folder / "loss_bounds.json").write_text(json.dumps(found))
    return folder


def names(folder):
    return [finding.name for finding in diagnose(folder)]


def test_a_healthy_run_has_none(tmp_path, capsys):
    assert diagnose(write_run(tmp_path)) == []
    main(["diagnose", str(tmp_path)])
    assert capsys.readouterr().out == "Diagnosis: nothing found.\n"


SICK = {
    "skipped steps": ("learning rate too high", {"lines": [x | {"skipped_steps": 1} for x in losses(falling)]}),
    "the loss explodes": ("learning rate too high", {"lines": losses(lambda u: 0.1 if u < 0.3 else 5.0)}),
    "the loss explodes and all units die": (
        "learning rate too high",
        {"lines": losses(lambda u: 2.0 + 9 * u if u < 0.4 else 0.99)},
    ),
    "the loss rises": ("learning rate too high", {"lines": losses(lambda u: 0.05 + 0.05 * u**2)}),
    "warm-up": ("warm-up too long", {"lr_warmup_steps": 501}),
    "nothing learnt": ("loss has not begun to fall", {"lines": losses(lambda u: 0.98)}),
    "still falling": ("too few steps", {"lines": losses(lambda u: 0.03 + 0.05 * (1 - u))}),
    "a plateau above linear": ("loss has stopped falling", {"lines": losses(lambda u: 0.3)}),
    "bad at low noise": (
        "worse than linear",
        {"lines": losses(lambda u: 0.0684 + np.exp(-30 * u), at=[0.4, *LEARNT[1:]])},
    ),
    "an average of all": ("average too long", {"ema_inv_gamma": 1.0, "ema_power": 1.0, "ema_max_decay": 0.99999}),
    "averaged is worse than raw": ("average too long", {"final": {"training": 0.06, "raw": 0.05}}),
    "held-out loss above": ("overfitting", {"final": {"validation": 0.065, "validation_error": 0.001}}),
    "held-out loss rose": (
        "overfitting",
        {
            "lines": losses(falling)
            + [{"step": 200 * i, "validation_loss": x} for i, x in ((2, 0.05), (3, 0.055), (5, 0.06))]
        },
    ),
    "near the memorised curve": (
        "remembers the training set",
        {
            "bounds": {"memorised": REMEMBERED},
            "final": {"training_by_timestep": [0.3 * x for x in LINEAR]},
        },
    ),
    "pixels of 0 and 1": ("range or mode of the training pictures", {"statistics": {"maximum": [1]}}),
    "pixels in [0, 1] of the model": ("range or mode of the training pictures", {"statistics": {"minimum": [128]}}),
    "gray in three channels": ("range or mode of the training pictures", {"statistics": {"gray": True}}),
    "constant channel": (
        "range or mode of the training pictures",
        {"statistics": {"minimum": [0, 0, 9], "maximum": [255, 255, 9]}},
    ),
    "laplace": ("x_T shows the picture", {"scheduler": CustomDDPMScheduler(beta_schedule="laplace")}),
    "few betas": ("x_T shows the picture", {"scheduler": CustomDDPMScheduler(200)}),
    "leading, 4 steps": ("sampling starts too late", {"ddpm_num_inference_steps": 4}),
    "wrong labels are as good": (
        "labels not used",
        {
            "final": {
                "label_pictures": 256,
                "wrong_minus_right_labels": 2.9e-4,
                "wrong_minus_right_labels_error": 1e-4,
            }
        },
    ),
    "twice the steps draw other pictures": (
        "too few sampling steps",
        {"ddpm_num_inference_steps": 40, "final": {"sampling_steps": [40, 80], "sampling_change": 0.065}},
    ),
    "ten steps": ("too few sampling steps", {"ddpm_num_inference_steps": 10}),
    "one colour": ("drawn pictures look wrong", {"samples": torch.full((16, 1, 8, 8), 90, dtype=torch.uint8)}),
    "too bright": ("drawn pictures look wrong", {"samples": 200 + pictures() // 5}),
    "channel without anything": (
        "drawn pictures look wrong",
        {
            "samples": pictures(channels=3) * torch.tensor([1, 1, 0], dtype=torch.uint8)[:, None, None],
            "statistics": {name: HEALTHY_STATISTICS[name] * 3 for name in ("minimum", "maximum", "mean", "std")},
        },
    ),
    "noise": (
        "drawn pictures are noisy",
        {"samples": torch.tensor(np.random.default_rng(0).integers(0, 256, (16, 1, 8, 8), dtype=np.uint8))},
    ),
}


@pytest.mark.parametrize("sickness", SICK)
def test_each_sickness_is_named_and_nothing_else(tmp_path, sickness):
    expected, changes = SICK[sickness]
    (finding,) = diagnose(write_run(tmp_path, **changes))
    assert finding.name == expected
    assert any(character.isdigit() for character in finding.evidence) or "channels" in finding.evidence


def test_every_finding_has_a_sickness_and_names_a_flag():
    assert {expected for expected, _ in SICK.values()} == {symptom.name for symptom in SYMPTOMS}
    assert {expected for expected, _ in SICK_RUNS.values()} >= {s.name for s in SYMPTOMS} - {
        "loss has stopped falling",
        "sampling starts too late",  # not from flags: new runs sample with trailing timesteps
        "drawn pictures look wrong",
        "drawn pictures are noisy",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"lines": losses(lambda u: 0.0484 + 0.005 * (1 - u))},
        {"lines": losses(falling, noise=0.1)},
        {"lines": losses(lambda u: 3.0 if u < 0.03 else falling(u))},
        {"lines": losses(falling, every=500)},
        {"lines": losses(falling, at=[*LEARNT[:-1], 0.006])},  # three times the bound, of a small loss
        {"final": {"validation": 0.055, "validation_error": 0.01}},
        {"final": {"training": 0.0505, "raw": 0.05}},
        {
            "bounds": {"memorised": REMEMBERED},
            "final": {"training_by_timestep": [0.5 * x for x in LINEAR]},
        },
        {"use_ema": False, "ema_power": 1.0, "ema_max_decay": 0.99999},
        {"ddpm_num_inference_steps": 50},
        {"ddpm_num_inference_steps": 10, "final": {"sampling_steps": [10, 20], "sampling_change": 0.055}},
        {"final": {"label_pictures": 256, "wrong_minus_right_labels": 3.1e-4, "wrong_minus_right_labels_error": 1e-4}},
        {"final": {"label_pictures": 255, "wrong_minus_right_labels": 0.0, "wrong_minus_right_labels_error": 1e-4}},
        # x_0-prediction: even a linear denoiser is not far below a constant.
        {
            "lines": losses(lambda u: 0.23, at=[0.23] * 10),
            "bounds": {"constant": [0.29] * 10, "linear": [0.23] * 10, "memorised": [0.2] * 10},
        },
        # Too few pictures for 64 dimensions.
        {"bounds": {"linear_pictures": 100, "linear": [x / 9 for x in LINEAR], "memorised": [x / 10 for x in LINEAR]}},
        {"scheduler": CustomDDPMScheduler(beta_schedule="squaredcos_cap_v2"), "ddpm_num_inference_steps": 100},
    ],
)
def test_what_is_near_a_threshold_is_no_finding(tmp_path, changes):
    assert names(write_run(tmp_path, **changes)) == []


def test_a_run_that_has_just_begun_or_is_old_is_diagnosed_with_what_it_has(tmp_path):
    write_run(tmp_path, ddpm_num_inference_steps=10)
    for name in ("loss_bounds.json", "final_loss.json", "samples.png"):
        (tmp_path / name).unlink()
    assert names(tmp_path) == ["too few sampling steps"]
    (tmp_path / "metrics.jsonl").unlink()
    assert names(tmp_path) == ["too few sampling steps"]
    (tmp_path / "training_config.yaml").write_text("no: flag\n")
    with pytest.raises(SystemExit, match=r"training_config\.yaml is no configuration"):
        main(["diagnose", str(tmp_path)])
    with pytest.raises(SystemExit, match="not the output folder of a run"):
        main(["diagnose", str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    "settings",
    [
        {"ema_inv_gamma": 1.0, "ema_power": 0.75, "ema_max_decay": 0.9999},
        {"ema_inv_gamma": 1e-6, "ema_power": 1.0, "ema_max_decay": 0.99},
        {"ema_inv_gamma": 20.0, "ema_power": 2 / 3, "ema_max_decay": 0.95},
    ],
)
@pytest.mark.parametrize(("steps", "first"), [(1, 1), (40, 20), (41, 0), (300, 150)])
def test_the_share_of_the_first_steps_is_that_of_diffusers_average(settings, steps, first):
    """A weight that is 1 up to step `first` and 0 after it: its average is the share."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    options = {
        "inv_gamma": settings["ema_inv_gamma"],
        "power": settings["ema_power"],
        "decay": settings["ema_max_decay"],
    }
    average = EMAModel([weight], use_ema_warmup=True, **options)
    for step in range(1, steps + 1):
        weight.data.fill_(1.0 if step <= first else 0.0)
        average.step([weight])
    assert weight_before(settings, steps, first) == pytest.approx(average.shadow_params[0].item(), abs=1e-12)


@pytest.mark.parametrize("shape", [(5, 1, 8, 8), (16, 3, 28, 20), (2, 4, 64, 64), (7, 3, 100, 130), (1, 1, 1, 1)])
@pytest.mark.parametrize("columns", [None, 3])
def test_a_grid_is_split_into_its_pictures(shape, columns):
    images = torch.tensor(np.random.default_rng(0).integers(0, 250, shape, dtype=np.uint8))
    sheet = np.asarray(image_grid(images, columns))
    found = split_grid(sheet if sheet.ndim == 3 else sheet[..., None], *shape[2:])
    np.testing.assert_array_equal(found, images)
    assert split_grid(np.zeros((101, 103, 1), np.uint8), 8, 8) is None


# ---- whole runs ----


@pytest.mark.slow
@pytest.mark.usefixtures("digits_cache")
@pytest.mark.parametrize("name", HEALTHY_RUNS)
def test_a_healthy_run_ends_with_nothing_found(tmp_path, capsys, name):
    folder = run_one(tmp_path, name, **HEALTHY_RUNS[name])
    assert in_words(diagnose(folder)) == ["Diagnosis: nothing found."]
    assert "Diagnosis: nothing found." in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("digits_cache")
@pytest.mark.parametrize("name", SICK_RUNS)
def test_a_run_made_sick_is_told_so(tmp_path, capsys, name):
    expected, changes = SICK_RUNS[name]
    folder = run_one(tmp_path, name, **changes)
    assert expected in names(folder)
    assert f"  {expected}: " in capsys.readouterr().out


@pytest.mark.usefixtures("digits_cache")
def test_a_run_ends_with_its_diagnosis_and_the_command_repeats_it(tmp_path, capsys):
    folder = run_one(tmp_path, "short", max_train_steps=40, logging_steps=4, save_images_steps=40, eval_batch_size=1)
    told = capsys.readouterr().out
    assert told.index("Done. In") < told.index("Diagnosis:")
    words = "\n".join(in_words(diagnose(folder)))
    assert words in told and "warm-up too long: the learning rate rises for 50 of 40 steps" in words
    bounds = (folder / "loss_bounds.json").read_bytes()
    (folder / "loss_bounds.json").unlink()
    main(["diagnose", str(folder)])
    assert words in capsys.readouterr().out
    assert (folder / "loss_bounds.json").read_bytes() == bounds
    final = json.loads((folder / "final_loss.json").read_text())
    assert (final["step"], final["pictures"]) == (40, 128)
    # Without the bounds the command says why, and goes on.
    (folder / "loss_bounds.json").unlink()
    config = Path(folder, "training_config.yaml")
    config.write_text(config.read_text().replace("streaming: false", "streaming: true"))
    main(["diagnose", str(folder)])
    assert "without the bounds of the loss: " in (told := capsys.readouterr().out) and "--streaming" in told
    assert PIL.Image.open(folder / "loss_by_timestep.png").size == (880, 495)
