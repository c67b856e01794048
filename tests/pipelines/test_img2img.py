"""Image to image: with exact models the result has the mean and variance of the formulas, for every sampler."""

import numpy as np
import PIL.Image
import pytest
import reference
import torch
from conftest import make_pipeline
from custom_ddpm.pipelines import CustomDDPMImg2ImgPipeline
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from test_samplers import ANCESTRAL, CLASSES, DRIVEN, MEAN, SIZE, VARIANCE, build

PICTURE = 0.7  # of [0, 1], so 0.4 of [−1, 1]; the data are −0.4 ± 0.3
REFUSED = ("PNDMScheduler", "DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler")
# TCD's timesteps are those of its distillation; SA-Solver is random in the middle of the chain only.
SAMPLERS = sorted(name for name in DRIVEN if name in CLASSES and name not in ("TCDScheduler", "SASolverScheduler"))


def edited(pipeline, strength):
    editing = CustomDDPMImg2ImgPipeline(pipeline.unet, pipeline.scheduler)
    editing.set_progress_bar_config(disable=True)
    image = torch.full((2, 1, SIZE, SIZE), PICTURE)
    generator = torch.Generator().manual_seed(0)
    return editing(image, strength, num_inference_steps=100, generator=generator, output_type="latent").images


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_every_sampler_returns_what_the_noised_picture_leads_to(name, strength):
    """From x_t = √ᾱ c + √(1−ᾱ) ε: draws of the posterior of x_0 where steps are random, else its flow."""
    pipeline = build(name, "epsilon", "fixed_large" if name == "CustomDDPMScheduler" else "fixed_small")
    if name in REFUSED:
        with pytest.raises(ValueError, match=f"{name} cannot begin at a noised picture; use another scheduler"):
            edited(pipeline, strength)
        return
    images = edited(pipeline, strength)
    curve = reference.betas(pipeline.scheduler.config.beta_schedule)
    a = float(reference.alphas_cumprod(curve)[999 if strength == 1 else 299])
    total = a * VARIANCE + 1 - a
    random = DRIVEN[name] == ANCESTRAL or name in ("KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler")
    if random:
        gain = a**0.5 * VARIANCE / total
        variance = VARIANCE * (1 - a) / total + gain**2 * (1 - a)
    else:
        gain = (VARIANCE / total) ** 0.5
        variance = gain**2 * (1 - a)
    mean = MEAN + gain * a**0.5 * (2 * PICTURE - 1 - MEAN)
    assert float(images.mean()) == pytest.approx(mean, abs=0.04)
    assert float(images.std()) == pytest.approx(variance**0.5, rel=0.12)


def test_it_is_the_noising_and_the_last_steps_written_out():
    pipeline = CustomDDPMImg2ImgPipeline.from_pipe(make_pipeline(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    picture = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)
    ours = pipeline(picture, 0.3, generator=torch.Generator().manual_seed(3), output_type="latent").images
    betas = np.linspace(1e-4, 0.02, 20)
    bars = np.cumprod(1 - betas)
    generator = torch.Generator().manual_seed(3)
    x_0 = torch.from_numpy(picture.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    x = np.sqrt(bars[5]) * x_0 + np.sqrt(1 - bars[5]) * torch.randn(x_0.shape, generator=generator)  # 6 of 20 steps
    with torch.no_grad():
        for t in reversed(range(6)):
            eps = pipeline.unet(x.float(), t).sample
            mean = (x - betas[t] / np.sqrt(1 - bars[t]) * eps) / np.sqrt(1 - betas[t])
            sigma = np.sqrt((1 - bars[t - 1]) / (1 - bars[t]) * betas[t]) if t > 0 else 0.0
            x = mean + sigma * torch.randn(x_0.shape, generator=generator)
    torch.testing.assert_close(ours, x.float(), atol=2e-5, rtol=0)


def test_one_picture_in_several_classes_each_by_its_own_seed():
    pipeline = CustomDDPMImg2ImgPipeline.from_pipe(make_pipeline(classes=3))
    pipeline.set_progress_bar_config(disable=True)
    picture = PIL.Image.effect_noise((20, 30), 64)
    options = {"strength": 0.5, "guidance_scale": 2.0, "output_type": "pt"}
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = pipeline(picture, class_labels=["class 1", "class 2"], generator=seeds, **options).images
    one = pipeline(picture, class_labels=2, generator=[torch.Generator().manual_seed(2)], **options).images
    assert both.shape == (2, 1, 8, 8)
    torch.testing.assert_close(both[1], one[0], atol=1e-5, rtol=0)
    trajectory = pipeline(picture, 0.5, num_inference_steps=10, return_trajectory=True).trajectory
    assert trajectory.timesteps.tolist() == [8, 6, 4, 2, 0, -1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, "strength is 0.0; it must be more than 0 and at most 1"),
        ({"strength": 1.1}, "strength is 1.1; it must be"),
        ({"strength": float("nan")}, "strength is nan; it must be"),
        ({"strength": 0.01, "num_inference_steps": 10}, "strength 0.01 of 10 steps is less than one step"),
        ({"image": np.zeros((3, 8, 8, 1)), "class_labels": [0, 1]}, "there are 3 pictures for 2|2 class_labels for"),
        ({"generator": [torch.Generator()] * 2}, "generator has 2 entries for batch_size 1"),
        ({"class_labels": "no such"}, "class label 'no such' is unknown"),
    ],
)
def test_refusals_are_one_line(options, message):
    pipeline = CustomDDPMImg2ImgPipeline.from_pipe(make_pipeline(classes=3))
    with pytest.raises(ValueError, match=message) as caught:
        pipeline(**{"image": np.zeros((8, 8)), **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_stock_models(scheduler_class):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    stock = DDPMPipeline(unet, scheduler_class(num_train_timesteps=20))
    pipeline = CustomDDPMImg2ImgPipeline.from_pipe(stock)
    pipeline.set_progress_bar_config(disable=True)
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    weak, strong = (
        np.asarray(pipeline(picture, s, num_inference_steps=10, generator=torch.Generator().manual_seed(0)).images[0])
        for s in (0.1, 1.0)
    )
    distance = [abs(each.astype(float) - np.asarray(picture)).mean() for each in (weak, strong)]
    assert 0 < distance[0] < distance[1]
