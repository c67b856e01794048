"""custom_ddpm/training/parts.py: what is used is what is recorded; what cannot work is said before the first step."""

import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import tracking
from conftest import make_pipeline
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from runs import DIGITS, ROOT, run, tiny

from custom_ddpm import CustomDDPMPipeline, CustomDDPMScheduler
from custom_ddpm.config import TrainingConfig
from custom_ddpm.training import build
from custom_ddpm.training.parts import build_model

pytestmark = pytest.mark.usefixtures("digits_cache")
GRAY = SimpleNamespace(height=8, width=8, channels=1, id2label=None, num_images=100)


def saved(folder, classes=None, **scheduler_options):
    make_pipeline(classes=classes, **scheduler_options).save_pretrained(folder)
    return str(folder)


# ---- --init_from ----


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        ({}, {"ddpm_num_steps": 20}),
        ({"num_train_timesteps": 1000}, {"ddpm_beta_schedule": "linear"}),
        ({"beta_schedule": "squaredcos_cap_v2"}, {"ddpm_beta_schedule": "squaredcos_cap_v2"}),
        ({"beta_schedule": "laplace", "prediction_type": "sample"}, {"prediction_type": "sample"}),
        (
            {"beta_schedule": "exp", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            {"ddpm_beta_schedule": "exp", "rescale_betas_zero_snr": True},
        ),
        ({"variance_type": "fixed_large"}, {"variance_type": "fixed_large"}),
    ],
    ids=str,
)
def test_settings_that_are_not_given_are_those_of_the_model(tmp_path, noise, expected):
    if noise in ({}, {"variance_type": "fixed_large"}):
        noise = {**noise, "beta_schedule": "squaredcos_cap_v2"}
    folder = saved(tmp_path, **noise)
    config, unet, scheduler = build_model(TrainingConfig(init_from=folder), GRAY)
    for name, value in expected.items():
        assert getattr(config, name) == value
    assert config.block_out_channels == [8, 16] and config.down_block_types == ["DownBlock2D", "AttnDownBlock2D"]
    assert (config.layers_per_block, config.norm_num_groups, config.attention_head_dim) == (1, 4, 8)
    # The recorded settings give the same model again.
    _, again, noise_again = build_model(TrainingConfig(**{**vars(config), "init_from": None}), GRAY)
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in unet.state_dict().items()
    }
    torch.testing.assert_close(noise_again.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ddpm_beta_schedule": "exp"}, "--ddpm_beta_schedule is 'exp'; the model of --init_from has 'laplace'"),
        ({"layers_per_block": 3}, "--layers_per_block is 3; the model of --init_from has 1"),
        ({"block_out_channels": [32]}, r"--block_out_channels is \[32\]; the model of --init_from has \[8, 16\]"),
        ({"dropout": 0.3}, "--dropout is 0.3; the model of --init_from has 0.0"),
        ({"norm_num_groups": 8}, "--norm_num_groups is 8; the model of --init_from has 4"),
        ({"attention_head_dim": 4}, "--attention_head_dim is 4; the model of --init_from has 8"),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "--rescale_betas_zero_snr is True; "),
        ({"variance_type": "fixed_large"}, "--variance_type is 'fixed_large'; the model of --init_from has"),
    ],
)
def test_settings_that_contradict_the_model_are_refused(tmp_path, changes, message):
    folder = saved(tmp_path, beta_schedule="laplace")
    with pytest.raises(ValueError, match=message) as caught:
        build_model(TrainingConfig(init_from=folder, **changes), GRAY)
    assert "\n" not in str(caught.value)


def test_a_schedule_without_a_name_is_refused(tmp_path):
    folder = saved(tmp_path, beta_start=0.001, beta_end=0.9)
    with pytest.raises(ValueError, match="its noise schedule is none that --ddpm_beta_schedule names at T = 20"):
        build_model(TrainingConfig(init_from=folder), GRAY)


def test_a_model_saved_with_another_sampler_is_refused(tmp_path):
    pipeline = make_pipeline()
    CustomDDPMPipeline(pipeline.unet, DDIMScheduler(num_train_timesteps=20)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its scheduler is a DDIMScheduler; training needs a CustomDDPMScheduler"):
        build_model(TrainingConfig(init_from=str(tmp_path)), GRAY)


def test_a_stock_pipeline_is_taken_with_its_settings(tmp_path):
    stock = UNet2DModel(in_channels=1, out_channels=1, sample_size=8, block_out_channels=(32, 64, 64, 64))
    DDPMPipeline(stock, DDPMScheduler()).save_pretrained(tmp_path)
    config, unet, scheduler = build_model(TrainingConfig(init_from=str(tmp_path)), GRAY)
    assert config.block_out_channels == [32, 64, 64, 64] and config.ddpm_beta_schedule == "linear"
    assert type(scheduler) is CustomDDPMScheduler and torch.equal(unet.conv_in.weight, stock.conv_in.weight)


@pytest.mark.parametrize(
    ("names", "holds"), [(["class 0", "class 1", "class 2"], True), (["cat", "dog", "eel"], False)]
)
def test_classes_of_the_same_number_but_other_names_are_refused(tmp_path, names, holds):
    folder = saved(tmp_path, classes=3, beta_schedule="exp")
    data = SimpleNamespace(**{**vars(GRAY), "id2label": dict(enumerate(names))})
    config = TrainingConfig(init_from=folder, class_conditional=True)
    if holds:
        build_model(config, data)
    else:
        with pytest.raises(ValueError, match=r"its classes are class 0, class 1, class 2; the pictures' are cat, dog"):
            build_model(config, data)


def test_what_is_used_is_what_is_recorded(tmp_path):
    run(tmp_path / "first", max_train_steps=1, ddpm_beta_schedule="exp", dropout=0.2)
    names = "layers_per_block norm_num_groups ddpm_num_steps dropout ddpm_beta_schedule prediction_type".split()
    defaults = {name: vars(TrainingConfig())[name] for name in names}
    run(
        tmp_path / "second",
        init_from=str(tmp_path / "first"),
        max_train_steps=4,
        block_out_channels=TrainingConfig().block_out_channels,
        **defaults,
    )
    written = yaml.safe_load((tmp_path / "second" / "training_config.yaml").read_text())
    metadata = json.loads((tmp_path / "second" / "checkpoint-4" / "metadata.json").read_text())["settings"]
    card = yaml.safe_load((tmp_path / "second" / "README.md").read_text().split("```yaml\n")[1].split("```")[0])
    for record in (written, metadata, card):
        assert (record["ddpm_beta_schedule"], record["dropout"], record["ddpm_num_steps"]) == ("exp", 0.2, 20)
        assert (record["block_out_channels"], record["layers_per_block"]) == ([8, 16], 1)
    # And the run can be gone on with, from its flags and from its file.
    run(
        tmp_path / "second",
        init_from=str(tmp_path / "first"),
        max_train_steps=5,
        block_out_channels=TrainingConfig().block_out_channels,
        resume_from_checkpoint="latest",
        **defaults,
    )
    del written["output_dir"]
    run(tmp_path / "second", **written | {"max_train_steps": 6, "resume_from_checkpoint": "latest"})


# ---- what cannot work ----


@pytest.mark.parametrize("size", [2000, 1797])
def test_a_batch_of_more_pictures_than_there_are_is_told(tmp_path, caplog, size):
    with caplog.at_level(logging.WARNING, "custom_ddpm"):
        run(tmp_path, train_batch_size=size, max_train_steps=1, lr_warmup_steps=0)
    expected = "--train_batch_size is 2000 and there are 1797 pictures: every batch has pictures more than once"
    assert [record.getMessage() for record in caplog.records] == ([expected] if size == 2000 else [])


@pytest.mark.parametrize("schedule", ["cosine", "constant_with_warmup", "constant"])
def test_a_run_shorter_than_its_warm_up_is_told(tmp_path, caplog, schedule):
    with caplog.at_level(logging.WARNING, "custom_ddpm"):
        run(tmp_path, max_train_steps=2, lr_warmup_steps=2, lr_scheduler=schedule)
    told = [record.getMessage() for record in caplog.records if "--lr_warmup_steps" in record.getMessage()]
    expected = "--lr_warmup_steps is 2 and the run has 2 steps: the learning rate never comes to --learning_rate, 0.001"
    assert told == ([] if schedule == "constant" else [expected])


@pytest.mark.parametrize(("steps", "warmup", "falls"), [(20, 2, 12), (20, 0, 12), (20, 15, 15), (5, 1, 3)])
def test_the_learning_rate_rises_stays_and_falls_in_the_last_two_fifths(steps, warmup, falls):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    config = TrainingConfig(lr_scheduler="warmup_stable_decay", lr_warmup_steps=warmup)
    schedule = build._build_lr_scheduler(config, optimizer, steps)
    rates = []
    for _ in range(steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    corners = [0, warmup, falls, steps], [0, 0.5, 0.5, 0]
    expected = np.interp(range(steps + 1), *([values[1:] for values in corners] if warmup == 0 else corners))
    np.testing.assert_allclose(rates, expected, atol=1e-12)


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TENSORBOARD])
    with pytest.raises(ValueError, match="--report_to is 'wandb', which is not installed: pip install wandb"):
        run(tmp_path, report_to=["tensorboard", "wandb"])
    with pytest.raises(ValueError, match=r"--report_to is 'nobody'; it must be one of all, .*tensorboard"):
        run(tmp_path, report_to=["nobody"])
    assert not any(tmp_path.iterdir())


# ---- messages ----


def test_messages_of_one_process_have_no_rank(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "custom_ddpm"):
        run(tmp_path, max_train_steps=1)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("custom_ddpm")]
    assert any(DIGITS in message or "images: " in message for message in messages)
    assert not any("RANK" in message for message in messages)


@pytest.mark.slow
def test_the_documented_command_ends_with_one_line(tmp_path):
    words = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--quiet",
        "train_ddpm.py",
        "--dataset_name",
        "not-there",
    ]
    result = subprocess.run([*words, "--output_dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr and "CalledProcessError" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("train_ddpm.py: error: ")
    for page in ("README.md", "README.zh.md", "examples/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert "accelerate launch --quiet train_ddpm.py" in text
        assert "accelerate launch train_ddpm.py" not in text


def test_flags_of_a_run_stay_as_they_are_without_init_from():
    config = tiny("unused")
    found = vars(build_model(config, GRAY)[0])
    assert {name: found[name] for name, value in vars(config).items() if value is not None} == {
        name: value for name, value in vars(config).items() if value is not None
    }


def test_muon_with_sharded_weights_is_refused():
    with pytest.raises(ValueError, match="--optimizer muon needs whole weights, and FSDP shards them"):
        build_model(TrainingConfig(optimizer="muon"), GRAY, "cpu", sharded=True)
