"""Conversion to and from diffusers' classes, compared with diffusers itself."""

import inspect
import json
import math

import pytest
import torch
from conftest import make_pipeline
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file

from custom_ddpm import CustomDDPMPipeline, CustomDDPMScheduler, CustomUNet2DModel
from custom_ddpm.hub.convert import (
    pipeline_from_diffusers,
    pipeline_to_diffusers,
    scheduler_from_diffusers,
    scheduler_to_diffusers,
)


def make_stock(**scheduler_options) -> DDPMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    stock = DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20, **scheduler_options))
    stock.set_progress_bar_config(disable=True)
    return stock


def generate(pipeline, steps=20):
    return pipeline(generator=torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="np").images


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"])
def test_to_diffusers_generates_the_same_images(beta_schedule, prediction_type):
    ours = make_pipeline(channels=3, beta_schedule=beta_schedule, prediction_type=prediction_type)
    stock = pipeline_to_diffusers(ours)
    stock.set_progress_bar_config(disable=True)
    assert type(stock.unet) is UNet2DModel and type(stock.scheduler) is DDPMScheduler
    difference = abs(generate(stock) - generate(ours)).max()
    assert difference < 1e-4 and generate(ours).std() > 0.005


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_from_diffusers_generates_the_same_images(variance_type):
    stock = make_stock(variance_type=variance_type)
    ours = pipeline_from_diffusers(stock)
    ours.set_progress_bar_config(disable=True)
    assert type(ours.unet) is CustomUNet2DModel and type(ours.scheduler) is CustomDDPMScheduler
    assert abs(generate(stock) - generate(ours)).max() < 1e-4


def test_stock_to_custom_to_stock_is_bit_identical(tmp_path):
    stock = make_stock(beta_schedule="scaled_linear", clip_sample_range=2.0, timestep_spacing="trailing")
    stock.save_pretrained(tmp_path / "stock")
    pipeline_from_diffusers(tmp_path / "stock").save_pretrained(tmp_path / "ours")
    ours = CustomDDPMPipeline.from_pretrained(tmp_path / "ours")
    pipeline_to_diffusers(ours).save_pretrained(tmp_path / "again")

    weights = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(tmp_path / "stock" / weights), load_file(tmp_path / "again" / weights)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    for config in ("unet/config.json", "scheduler/scheduler_config.json"):
        was, now = (json.loads((tmp_path / folder / config).read_text()) for folder in ("stock", "again"))
        assert {name: now[name] for name in was if not name.startswith("_")} == {
            name: value for name, value in was.items() if not name.startswith("_")
        }
    # Without trust_remote_code, and without code in the folder.
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert type(loaded) is DDPMPipeline
    assert not list((tmp_path / "again").rglob("*.py"))


def test_custom_to_stock_to_custom_is_bit_identical():
    ours = make_pipeline(channels=3)
    again = pipeline_from_diffusers(pipeline_to_diffusers(ours))
    assert ours.unet.state_dict().keys() == again.unet.state_dict().keys()
    assert all(map(torch.equal, ours.unet.state_dict().values(), again.unet.state_dict().values()))
    for name, value in ours.unet.config.items():
        assert name.startswith("_") or again.unet.config[name] == value, name


def test_schedulers_keep_their_betas_and_settings():
    ours = CustomDDPMScheduler(
        num_train_timesteps=50, beta_schedule="exp", prediction_type="v_prediction", steps_offset=1
    )
    stock = scheduler_to_diffusers(ours)
    torch.testing.assert_close(stock.betas, ours.betas, rtol=1e-6, atol=0)
    again = scheduler_from_diffusers(stock)
    assert torch.equal(again.betas, ours.betas)
    assert (again.config.prediction_type, again.config.steps_offset) == ("v_prediction", 1)


def test_to_diffusers_keeps_another_scheduler():
    ours = make_pipeline(channels=3)
    ours.scheduler = DDIMScheduler.from_config(ours.scheduler.config)
    assert pipeline_to_diffusers(ours).scheduler is ours.scheduler


def test_checkpoints_with_former_attention_names_load(tmp_path):
    # google/ddpm-cifar10-32 and others of its time store query, key, value and proj_attn.
    stock = make_stock()
    stock.save_pretrained(tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    renamed = {}
    for name, tensor in tensors.items():
        for new_part, old_part in old.items():
            name = name.replace(new_part, old_part)
        renamed[name] = tensor
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file, metadata={"format": "pt"})
    ours = pipeline_from_diffusers(tmp_path)
    for name, tensor in ours.unet.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


def test_unsupported_settings_of_pipelines_are_rejected_by_name(tmp_path):
    with pytest.raises(ValueError, match="does not support class labels; this model has num_class_embeds=4"):
        pipeline_to_diffusers(make_pipeline(classes=3))
    odd = make_pipeline(channels=3)
    odd.unet.register_to_config(sample_size=(8, 7))
    with pytest.raises(ValueError, match=r"does not pad: sample_size \(8, 7\) is not a multiple of 2"):
        pipeline_to_diffusers(odd)
    with pytest.raises(ValueError, match="DDPMScheduler has no variance_type 'zero'"):
        scheduler_to_diffusers(CustomDDPMScheduler(variance_type="zero"))
    fourier = make_stock()
    fourier.unet.register_to_config(time_embedding_type="fourier")
    with pytest.raises(ValueError, match="time_embedding_type='fourier'"):
        pipeline_from_diffusers(fourier)
    stock = make_stock()
    stock.save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        pipeline_from_diffusers(tmp_path)


def test_repositories_without_subfolders_load(tmp_path):
    # As google/ddpm-cifar10-32: all files at the root, and no settings that diffusers added later.
    stock = make_stock(variance_type="fixed_large")
    stock.unet.save_config(tmp_path)
    save_file(stock.unet.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    stock.scheduler.save_config(tmp_path)
    stock.save_config(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("dropout", "resnet_time_scale_shift", "add_attention", "attn_norm_num_groups", "num_class_embeds"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = pipeline_from_diffusers(str(tmp_path))
    ours.set_progress_bar_config(disable=True)
    assert ours.scheduler.config.variance_type == "fixed_large"
    assert abs(generate(stock) - generate(ours)).max() < 1e-4


def test_conversion_copies_the_weights():
    ours = make_pipeline(channels=3)
    stock = pipeline_to_diffusers(ours)
    again = pipeline_from_diffusers(stock)
    kept = ours.unet.conv_in.weight.clone()
    with torch.no_grad():
        stock.unet.conv_in.weight.add_(1)
        again.unet.conv_in.weight.add_(2)
    assert torch.equal(ours.unet.conv_in.weight, kept)


def test_from_diffusers_keeps_another_scheduler():
    stock = make_stock()
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    assert pipeline_from_diffusers(stock).scheduler is stock.scheduler


def test_schedule_that_diffusers_does_not_have_is_passed_as_betas():
    stock = scheduler_to_diffusers(CustomDDPMScheduler(num_train_timesteps=10, beta_schedule="exp"))
    with pytest.raises(NotImplementedError):
        DDPMScheduler(num_train_timesteps=10, beta_schedule="exp")
    expected = [1 - math.exp(-12 / 10)] * 10
    torch.testing.assert_close(stock.betas, torch.tensor(expected), rtol=1e-6, atol=0)


def test_variance_type_for_which_diffusers_gives_nan_is_rejected():
    # The reason for the error; this fails when diffusers has fixed it (diffusers #14569).
    stock = DDPMScheduler(variance_type="fixed_large_log")
    assert stock.step(torch.zeros(1, 1, 2, 2), 500, torch.zeros(1, 1, 2, 2)).prev_sample.isnan().any()
    with pytest.raises(ValueError, match="NaN for variance_type 'fixed_large_log'; use 'fixed_large', which is"):
        scheduler_to_diffusers(CustomDDPMScheduler(variance_type="fixed_large_log"))
    ours = [CustomDDPMScheduler(variance_type=name) for name in ("fixed_large_log", "fixed_large")]
    log, plain = (
        scheduler.step(
            torch.ones(1, 1, 2, 2), 500, torch.ones(1, 1, 2, 2), generator=torch.Generator().manual_seed(0)
        ).prev_sample
        for scheduler in ours
    )
    torch.testing.assert_close(log, plain)


def test_unsupported_settings_of_schedulers_are_rejected_by_name():
    analytic = CustomDDPMScheduler(
        num_train_timesteps=2, variance_type="analytic", original_sample_variances=[0.1, 0.2]
    )
    with pytest.raises(ValueError, match="DDPMScheduler has no variance_type 'analytic'"):
        scheduler_to_diffusers(analytic)
    with pytest.raises(ValueError, match="'epsilon' cannot recover x_0"):
        scheduler_from_diffusers(DDPMScheduler(rescale_betas_zero_snr=True))
    sizeless = make_pipeline(channels=3)
    sizeless.unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="this unet has none"):
        pipeline_to_diffusers(sizeless)
    with pytest.raises(TypeError, match="must be a DDPMScheduler, got DDIMScheduler"):
        scheduler_from_diffusers(DDIMScheduler())
    with pytest.raises(TypeError, match="must be a CustomDDPMScheduler, got DDPMScheduler"):
        scheduler_to_diffusers(DDPMScheduler())


def test_every_setting_of_the_stock_scheduler_is_converted():
    stock = DDPMScheduler(
        num_train_timesteps=30,
        trained_betas=[0.01 * (i + 1) for i in range(30)],
        variance_type="fixed_large",
        clip_sample=False,
        prediction_type="sample",
        thresholding=True,
        dynamic_thresholding_ratio=0.9,
        clip_sample_range=2.0,
        sample_max_value=3.0,
        timestep_spacing="linspace",
        steps_offset=1,
        rescale_betas_zero_snr=True,
    )
    settings = inspect.signature(DDPMScheduler.__init__).parameters.keys() - {"self"}
    default = DDPMScheduler().config
    named = {"beta_start", "beta_end", "beta_schedule"}  # ignored when trained_betas is given
    assert all(stock.config[name] != default[name] for name in settings - named)
    ours = scheduler_from_diffusers(stock)
    again = scheduler_to_diffusers(ours)
    for scheduler in (ours, again):
        assert {name: scheduler.config[name] for name in settings} == {name: stock.config[name] for name in settings}
        torch.testing.assert_close(scheduler.betas, stock.betas, rtol=1e-5, atol=1e-6)
    named_range = DDPMScheduler(beta_start=0.001, beta_end=0.03, beta_schedule="scaled_linear")
    again = scheduler_to_diffusers(scheduler_from_diffusers(named_range))
    assert {name: again.config[name] for name in settings} == {name: named_range.config[name] for name in settings}
