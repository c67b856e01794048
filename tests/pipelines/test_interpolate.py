"""Inversion and back, and what lies between: against the exact flow of Gaussian data, and for real networks."""

import numpy as np
import PIL.Image
import pytest
import reference
import torch
from conftest import make_pipeline
from custom_ddpm.pipelines import CustomDDPMInterpolationPipeline
from custom_ddpm.pipelines.pipeline_custom_ddpm_interpolate import spherical_mean
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from test_samplers import MEAN, VARIANCE, build

from custom_ddpm.scheduler import PREDICTION_TYPES


def exact(prediction_type="epsilon", name="CustomDDPMScheduler", **options):
    pipeline = build(name, prediction_type, **options)
    editing = CustomDDPMInterpolationPipeline(pipeline.unet, pipeline.scheduler)
    editing.set_progress_bar_config(disable=True)
    return editing


@pytest.fixture
def image():
    return torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))


def flowed(x, from_t, to_t):
    """The probability flow of N(MEAN, VARIANCE) from one timestep to another: standard scores are kept."""
    bars = reference.alphas_cumprod(reference.betas("linear"))
    (a, total), (b, other) = ((float(bars[t]), float(bars[t]) * VARIANCE + 1 - float(bars[t])) for t in (from_t, to_t))
    return (x - a**0.5 * MEAN) * (other / total) ** 0.5 + b**0.5 * MEAN


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_both_ways_are_the_exact_flow_and_converge_at_their_order(image, prediction_type):
    pipeline, picture = exact(prediction_type), image * 2 - 1
    exact_noise, errors = flowed(picture, 0, 999), {}
    for order in (1, 2):
        for n in (37, 111, 333):  # steps of 27, 9 and 3
            noise = pipeline.invert(image, num_inference_steps=n, order=order)
            back = pipeline.restore(exact_noise, num_inference_steps=n, order=order, output_type="latent").images
            errors[order, n] = [float((noise - exact_noise).abs().max()), float((back - picture).abs().max())]
    for way in (0, 1):
        assert errors[1, 333][way] < 0.1 and errors[2, 333][way] < 0.005
        assert errors[1, 111][way] > 2 * errors[1, 333][way]
        assert errors[2, 111][way] > 5 * errors[2, 333][way]


@pytest.mark.parametrize(("order", "least"), [(1, 30), (2, 40)])
def test_a_picture_comes_back_from_its_noise_after_100_steps(image, order, least):
    pipeline = exact()
    noise = pipeline.invert(image, num_inference_steps=100, order=order)
    back = pipeline.restore(noise, num_inference_steps=100, order=order, output_type="latent").images
    error = ((back + 1) / 2 - image).pow(2).flatten(1).mean(1)
    assert float((-10 * error.log10()).min()) >= least


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_the_scheduler_gives_noise_levels_only(image, scheduler_class):
    expected = exact().invert(image, num_inference_steps=20)
    found = exact(name=scheduler_class.__name__).invert(image, num_inference_steps=20)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_curve_that_ends_in_pure_noise(image):
    pipeline = exact("v_prediction", rescale_betas_zero_snr=True)
    back = pipeline.restore(pipeline.invert(image, num_inference_steps=100), output_type="pt").images
    assert float((back - image).abs().max()) < 0.02


def test_a_network_returns_the_pictures_of_the_call(image):
    """Ends are the pictures after inversion and back; every order and class goes both ways."""
    pipeline = CustomDDPMInterpolationPipeline.from_pipe(make_pipeline(classes=3, num_train_timesteps=1000))
    pipeline.set_progress_bar_config(disable=True)
    for parameter in pipeline.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    pictures = [PIL.Image.effect_noise((8, 8), 40) for _ in range(2)]
    options = {"class_labels": ["class 0", "class 2"], "guidance_scale": 1.5, "num_inference_steps": 20}
    images = pipeline(pictures, 5, **options, output_type="pt").images
    assert images.shape == (5, 1, 8, 8)
    noise = pipeline.invert(pictures, **options)
    ends = pipeline.restore(noise, **options, output_type="pt").images
    torch.testing.assert_close(images[[0, 4]], ends, atol=1e-4, rtol=0)
    middle = spherical_mean(noise[0], noise[1], 0.25)[None]
    one = pipeline.restore(middle, **{**options, "class_labels": 0}, output_type="pt").images
    torch.testing.assert_close(images[1], one[0], atol=1e-4, rtol=0)


def test_the_spherical_mean_keeps_the_size_of_noise():
    a, b = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(spherical_mean(a, b, 0.0), a)
    torch.testing.assert_close(spherical_mean(a, b, 1.0), b)
    middle = spherical_mean(a, b, 0.5)
    assert float(middle.std()) == pytest.approx(1, abs=0.05) and float(((a + b) / 2).std()) < 0.75
    np.testing.assert_allclose(middle.numpy(), ((a + b) / (2 * np.cos(angle(a, b) / 2))).numpy(), atol=0.02)
    torch.testing.assert_close(spherical_mean(a, a, 0.3), a)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_trajectory_of_the_way_back_where_the_data_are_one_picture(image, prediction_type):
    pipeline = exact(prediction_type, world=(-0.4, 0.0))
    options = {"num_inference_steps": 10, "output_type": "latent", "return_trajectory": 4}
    output = pipeline(image, 3, **options)
    trajectory = output.trajectory
    assert trajectory.timesteps.tolist() == [999, 699, 300, -1]
    assert trajectory.samples.shape == (4, 3, 1, 64, 64)
    assert torch.equal(trajectory.samples[-1], output.images)
    np.testing.assert_allclose(trajectory.pred_original_samples[:-1].numpy(), -0.4, atol=0.03)
    torch.testing.assert_close(trajectory.samples[0, 0], pipeline.invert(image, num_inference_steps=10)[0])


def test_noises_of_another_shape_are_refused():
    pipeline = CustomDDPMInterpolationPipeline.from_pipe(make_pipeline())
    with pytest.raises(ValueError, match=r"latents have shape \(3, 8, 8\); this model needs \(B, 1, H, W\)"):
        pipeline.restore(torch.zeros(3, 8, 8), num_inference_steps=10)


def angle(a, b):
    return float(torch.arccos(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": np.zeros((3, 8, 8, 1))}, "image has 3 pictures; interpolation is between two"),
        ({"num_images": 0}, "num_images is 0; it must be an integer of at least 1"),
        ({"order": 3}, "order is 3; it must be 1"),
        ({"num_inference_steps": None}, "num_inference_steps is None; it must be an integer"),
        ({"num_inference_steps": 20}, "num_inference_steps is 20; it must be between 2 and 19"),
        ({"class_labels": [0, 1, 2]}, "there are 3 class_labels"),
    ],
)
def test_refusals_are_one_line(options, message):
    pipeline = CustomDDPMInterpolationPipeline.from_pipe(make_pipeline(classes=3))
    with pytest.raises(ValueError, match=message) as caught:
        pipeline(**{"image": np.zeros((2, 8, 8, 1)), "num_inference_steps": 10, **options})
    assert "\n" not in str(caught.value)
