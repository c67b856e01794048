import json

import pytest
import torch
from conftest import make_pipeline
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file

from custom_ddpm import CustomDDPMPipeline, CustomDDPMScheduler, CustomUNet2DModel
from custom_ddpm.convert import (
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


def draw(pipeline, steps=20):
    return pipeline(generator=torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="np").images


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"])
def test_to_diffusers_draws_the_same_pictures(beta_schedule, prediction_type):
    ours = make_pipeline(channels=3, beta_schedule=beta_schedule, prediction_type=prediction_type)
    stock = pipeline_to_diffusers(ours)
    stock.set_progress_bar_config(disable=True)
    assert type(stock.unet) is UNet2DModel and type(stock.scheduler) is DDPMScheduler
    difference = abs(draw(stock) - draw(ours)).max()
    assert difference < 1e-4 and draw(ours).std() > 0.005


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_from_diffusers_draws_the_same_pictures(variance_type):
    stock = make_stock(variance_type=variance_type)
    ours = pipeline_from_diffusers(stock)
    ours.set_progress_bar_config(disable=True)
    assert type(ours.unet) is CustomUNet2DModel and type(ours.scheduler) is CustomDDPMScheduler
    assert abs(draw(stock) - draw(ours)).max() < 1e-4


def test_stock_to_ours_to_stock_is_the_same_bit_for_bit(tmp_path):
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
    # With no code of the folder, and no leave to run any.
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert type(loaded) is DDPMPipeline
    assert not list((tmp_path / "again").rglob("*.py"))


def test_ours_to_stock_to_ours_is_the_same_bit_for_bit():
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


def test_another_scheduler_of_diffusers_stays_what_it_is():
    ours = make_pipeline(channels=3)
    ours.scheduler = DDIMScheduler.from_config(ours.scheduler.config)
    assert pipeline_to_diffusers(ours).scheduler is ours.scheduler


def test_published_checkpoints_with_the_old_names_of_attention_load(tmp_path):
    # google/ddpm-cifar10-32 and its kind store query, key, value and proj_attn.
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


def test_what_the_other_side_cannot_express_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="DDPMPipeline cannot pass class labels on; this model has num_class_embeds=4"):
        pipeline_to_diffusers(make_pipeline(classes=3))
    odd = make_pipeline(channels=3)
    odd.unet.register_to_config(sample_size=(8, 7))
    with pytest.raises(ValueError, match=r"does not pad: sample_size \(8, 7\) is no multiple of 2"):
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
