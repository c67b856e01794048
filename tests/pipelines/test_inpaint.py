"""Inpainting, outpainting and super-resolution: what is known stays, and in the exact world what is drawn is right.

Pictures of 2 x 2 pixels are N(m, Σ) and the model is the optimal one, so every step of the sampler is affine. The mean
and covariance after all steps then follow from the formulas without random numbers; the true ones given the known part
are those of a conditional Gaussian.
"""

import itertools
from functools import cache
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import reference
import torch
from conftest import make_pipeline
from custom_ddpm.pipelines import CustomDDPMInpaintPipeline
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UNet2DModel

from custom_ddpm import CustomDDPMScheduler

MEAN = np.array([0.2, -0.3, 0.1, 0.0])
ROOT = np.array([[0.5, 0, 0, 0], [0.3, 0.4, 0, 0], [-0.2, 0.1, 0.3, 0], [0.2, 0.2, -0.1, 0.3]])
COVARIANCE = ROOT @ ROOT.T
FIRST_TWO = np.diag([1.0, 1.0, 0, 0])  # the projections on what is known: the upper pixels, or the mean of all
ALL_MEAN = np.full((4, 4), 0.25)
N = 10_000


class GaussianUNet(torch.nn.Module):
    """The optimal ε for N(MEAN, COVARIANCE), of pictures of 2 x 2 pixels."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(in_channels=1, out_channels=1, sample_size=2, num_class_embeds=None)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.bars = reference.floats(bars())

    def forward(self, x, t):
        a = self.bars[int(t)]
        gain = np.sqrt(a) * COVARIANCE @ np.linalg.inv(a * COVARIANCE + (1 - a) * np.eye(4))
        flat, mean = x.flatten(1), torch.tensor(MEAN)
        x_0 = mean + (flat.double() - np.sqrt(a) * mean) @ torch.tensor(gain).T
        return SimpleNamespace(sample=((flat - np.sqrt(a) * x_0) / np.sqrt(1 - a)).float().view_as(x))


@cache
def bars():
    return reference.alphas_cumprod(reference.betas("linear"))


def exact_pipeline(scheduler_class):
    options = {"timestep_spacing": "trailing", "clip_sample": False}
    pipeline = CustomDDPMInpaintPipeline(GaussianUNet(), scheduler_class(**options))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def truth(P, y):
    """Mean and covariance of the picture, given P x = P y."""
    gain = COVARIANCE @ P @ np.linalg.pinv(P @ COVARIANCE @ P)
    return MEAN + gain @ P @ (y - MEAN), COVARIANCE - gain @ P @ COVARIANCE


def recursion(P, y, n, repeats, eta=1.0, large=True):
    """Mean and covariance of the result, from R4, R7 and F9."""
    mean, covariance, free = np.zeros(4), np.eye(4), np.eye(4) - P
    timesteps = reference.timesteps("trailing", 1000, n)
    for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
        a, a_s = float(bars()[t]), float(reference.alpha_bar(bars(), s))
        of_original, of_sample, noise = map(float, reference.ddim(bars(), t, s, eta))
        noise = (1 - a / a_s if large and eta else noise) * (s >= 0)
        gain = np.sqrt(a) * COVARIANCE @ np.linalg.inv(a * COVARIANCE + (1 - a) * np.eye(4))
        A, b = of_original * gain + of_sample * np.eye(4), of_original * (MEAN - np.sqrt(a) * gain @ MEAN)
        for repeat in range(repeats if s >= 0 else 1):
            if repeat:
                mean, covariance = np.sqrt(a / a_s) * mean, a / a_s * covariance + (1 - a / a_s) * np.eye(4)
            mean = free @ (A @ mean + b) + np.sqrt(a_s) * P @ y
            covariance = free @ (A @ covariance @ A.T + noise * np.eye(4)) @ free + (1 - a_s) * P
    return mean, covariance


def error(moments, exact):
    """Largest error of the mean in standard deviations, and of the covariance relative to the largest variance."""
    (mean, covariance), (true_mean, true_covariance) = moments, exact
    scale = true_covariance.diagonal().max()
    return abs(mean - true_mean).max() / scale**0.5, abs(covariance - true_covariance).max() / scale


def drawn(pipeline, known, n, repeats):
    """Mean and covariance of N results; `known`: "mask_image" or "scale_factor"."""
    y = np.array([[0.9, 0.4], [0.0, 0.0]], np.float32) if known == "mask_image" else np.array([[0.75]], np.float32)
    options = {"mask_image": np.array([[0, 0], [1, 1]], bool)} if known == "mask_image" else {"scale_factor": 2}
    images = pipeline(
        np.broadcast_to(y[None, ..., None], (N, *y.shape, 1)),
        **options,
        jump_n_sample=repeats,
        num_inference_steps=n,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    flat = images.flatten(1).double().numpy()
    target = np.resize(2 * y.ravel() - 1, 4)
    return (flat.mean(0), np.cov(flat.T)), target


@pytest.mark.parametrize("known", ["mask_image", "scale_factor"])
@pytest.mark.parametrize(
    ("scheduler_class", "eta"), [(CustomDDPMScheduler, 1.0), (DDPMScheduler, 1.0), (DDIMScheduler, 0.0)]
)
def test_the_result_has_the_moments_of_the_formulas(scheduler_class, eta, known, monkeypatch):
    monkeypatch.setattr("custom_ddpm.pipelines.pipeline_custom_ddpm_inpaint._CLIPPING_ROUNDS", 0)  # not affine
    P = FIRST_TWO if known == "mask_image" else ALL_MEAN
    for repeats in (1, 4):
        (mean, covariance), y = drawn(exact_pipeline(scheduler_class), known, 25, repeats)
        expected, variance = recursion(P, y, 25, repeats, eta)
        variances = variance.diagonal()
        assert (abs(mean - expected) <= 5 * np.sqrt(variances / N) + 1e-5).all()
        assert (abs(covariance - variance) <= 5 * np.sqrt(2 * np.outer(variances, variances) / N) + 1e-5).all()


@pytest.mark.parametrize("repeats", [1, 2])
def test_the_known_part_is_noised_as_the_forward_process_has_it(repeats):
    """x_t of the known pixels is N(√ᾱ_t x_0, 1−ᾱ_t) before every step (F9)."""
    trajectory = exact_pipeline(CustomDDPMScheduler)(
        np.full((N, 2, 2, 1), 0.9),
        np.array([[0, 0], [1, 1]], bool),
        jump_n_sample=repeats,
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(0),
        return_trajectory=True,
    ).trajectory
    for t, x_t in zip(trajectory.timesteps[1:-1].tolist(), trajectory.samples[1:-1], strict=True):
        a, known = float(bars()[round(t)]), x_t[:, 0, 0, :]
        assert float(known.mean()) == pytest.approx(a**0.5 * 0.8, abs=4 * ((1 - a) / (2 * N)) ** 0.5)
        assert float(known.std()) == pytest.approx((1 - a) ** 0.5, rel=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("known", ["mask_image", "scale_factor"])
def test_it_tends_to_the_true_conditional_distribution(known, monkeypatch):
    monkeypatch.setattr("custom_ddpm.pipelines.pipeline_custom_ddpm_inpaint._CLIPPING_ROUNDS", 0)
    P = FIRST_TWO if known == "mask_image" else ALL_MEAN
    errors = []
    for repeats in (1, 4, 16):
        moments, y = drawn(exact_pipeline(CustomDDPMScheduler), known, 100, repeats)
        errors.append(error(moments, truth(P, y)))
    means, covariances = zip(*errors, strict=True)
    assert means[0] > 2 * means[1] > 4 * means[2] or max(means) < 0.05
    assert means[2] < 0.08 and covariances[2] < 0.06


@pytest.mark.parametrize("P", [FIRST_TWO, ALL_MEAN])
def test_with_the_large_variance_both_moments_tend_to_the_truth_and_with_the_small_one_only_the_mean(P):
    y = np.array([0.8, -0.2, 0.0, 0.0]) if P is FIRST_TWO else np.full(4, 0.5)
    large, small = (
        [error(recursion(P, y, 250, repeats, large=kind), truth(P, y)) for repeats in (1, 4, 16, 64)]
        for kind in (True, False)
    )
    for before, after in itertools.pairwise(large):
        assert after[0] < 0.5 * before[0] or after[0] < 0.02
        assert after[1] < before[1]
    assert large[-1][0] < 0.02 and large[-1][1] < 0.02
    assert small[-1][0] < 0.02 and small[-1][1] > 0.15


# ---- what is known stays ----


def small_pipeline(**options):
    pipeline = CustomDDPMInpaintPipeline.from_pipe(make_pipeline(**options))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, *args, **options):
    options = {"num_inference_steps": 4, "jump_n_sample": 2, "generator": torch.Generator().manual_seed(0), **options}
    return pipeline(*args, **options).images


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)


@pytest.fixture
def mask():
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 3:] = 255
    return mask


def test_known_pixels_are_the_same_in_every_bit(picture, mask):
    pipeline = small_pipeline(channels=3)
    result = np.asarray(draw(pipeline, PIL.Image.fromarray(picture), PIL.Image.fromarray(mask))[0])
    assert np.array_equal(result[mask == 0], picture[mask == 0])
    assert (result[mask > 0] != picture[mask > 0]).mean() > 0.9
    every = np.arange(256, dtype=np.uint8).reshape(4, 8, 8)  # all values that a pixel can have
    masks = np.zeros((8, 8), bool)
    masks[0, 0] = True
    gray = small_pipeline()
    for values, result in zip(every, draw(gray, every[..., None], masks), strict=True):
        assert np.array_equal(np.asarray(result).ravel()[1:], values.ravel()[1:])


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler, CustomDDPMScheduler])
def test_known_pixels_stay_with_a_stock_model(picture, mask, scheduler_class):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    pipeline = CustomDDPMInpaintPipeline(unet, scheduler_class(num_train_timesteps=20))
    pipeline.set_progress_bar_config(disable=True)
    result = np.asarray(draw(pipeline, picture, mask)[0])
    assert np.array_equal(result[mask == 0], picture[mask == 0])


def test_borders_are_drawn_around_the_picture(picture):
    left, top, right, bottom = 1, 2, 3, 0
    inner = picture[:6, :4]
    result = np.asarray(draw(small_pipeline(channels=3), inner, padding=(left, top, right, bottom))[0])
    assert result.shape == (8, 8, 3) and np.array_equal(result[top:, left : 8 - right], inner)
    assert result[:top].std() > 0 and result[:, :left].std() > 0 and result[:, 8 - right :].std() > 0


def test_the_means_of_blocks_are_the_small_picture():
    small = np.random.default_rng(0).uniform(0.1, 0.9, (2, 4, 4, 3)).astype(np.float32)
    images = draw(small_pipeline(channels=3), small, scale_factor=2, output_type="np")
    np.testing.assert_allclose(images.reshape(2, 4, 2, 4, 2, 3).mean((2, 4)), small, atol=2e-3)
    assert images.min() >= 0 and images.max() <= 1 and images.std() > small.std()


def test_a_picture_does_not_depend_on_its_batch(picture, mask):
    pipeline = small_pipeline(channels=3, classes=3)
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    labels, options = ["class 1", "class 2"], {"guidance_scale": 2.0, "output_type": "pt"}
    both = draw(pipeline, picture, mask, class_labels=labels, generator=generators, **options)
    one = draw(pipeline, picture, mask, class_labels=[2], generator=[torch.Generator().manual_seed(5)], **options)
    torch.testing.assert_close(both[1], one[0], atol=1e-5, rtol=0)
    assert (both[0] - both[1]).abs().max() > 0.01


def test_the_trajectory_has_one_state_for_each_step(picture, mask):
    output = small_pipeline(channels=3)(picture, mask, num_inference_steps=5, jump_n_sample=3, return_trajectory=True)
    assert output.trajectory.timesteps.tolist() == [16, 12, 8, 4, 0, -1]


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of mask_image"),
        ({"mask_image": np.ones((8, 8)), "scale_factor": 2}, "give one of mask_image"),
        ({"mask_image": np.zeros((8, 8))}, "has no white pixel"),
        ({"mask_image": np.eye(8, dtype=np.uint8)}, r"has no white pixel \(at least 1/2, or 128 of 255\)"),
        ({"mask_image": np.ones((8, 9))}, "mask_image is 9x8, image is 8x8; they must have one size"),
        ({"mask_image": np.ones((8, 8)), "jump_n_sample": 0}, "jump_n_sample is 0; it must be an integer of at least"),
        ({"padding": (0, 0, 0, 0)}, r"it must be \(left, top, right, bottom\) of a picture of 8x8"),
        ({"padding": (4, 0, 4, 0)}, r"padding is \(4, 0, 4, 0\); it must be"),
        ({"padding": (-1, 0, 4, 0)}, "it must be"),
        ({"padding": (1.0, 0, 4, 0)}, "it must be"),
        ({"padding": 2}, "padding is 2; it must be"),
        ({"padding": (2, 2)}, "it must be"),
        ({"mask_image": "mask.png"}, "mask_image is a str; it must be a PIL picture"),
        ({"scale_factor": 3}, "it must be at least 2 and divide 8x8"),
        ({"scale_factor": 1}, "it must be at least 2 and divide 8x8"),
        ({"scale_factor": 2.0}, "must be an integer"),
    ],
)
def test_what_cannot_be_drawn(picture, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        draw(small_pipeline(channels=3), picture, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheduler_class", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_samplers_that_do_not_fit(picture, mask, scheduler_class):
    pipeline = small_pipeline(channels=3)
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match=f"{scheduler_class.__name__} keeps what earlier steps predicted"):
        draw(pipeline, picture, mask)


def test_tuned_steps_are_not_those_of_resampling():
    """A tuned scheduler, of higher order and without noise, is used in first order with noise."""
    plain, tuned = exact_pipeline(CustomDDPMScheduler), exact_pipeline(CustomDDPMScheduler)
    config = tuned.scheduler.config
    tuned.scheduler = CustomDDPMScheduler.from_config(config, tuned=["25 2c 0 trailing"], solver_order=3)
    tuned.scheduler = CustomDDPMScheduler.from_config(tuned.scheduler.config, tuned=["25 2c 0 trailing"])
    for known in ("mask_image", "scale_factor"):
        (mean, covariance), _ = drawn(plain, known, 25, 2)
        (mean_2, covariance_2), _ = drawn(tuned, known, 25, 2)
        assert np.array_equal(mean, mean_2) and np.array_equal(covariance, covariance_2)


def test_the_trajectory_ends_with_the_result():
    y = np.array([[0.75]], np.float32)
    found = exact_pipeline(CustomDDPMScheduler)(
        y[None, ..., None], scale_factor=2, num_inference_steps=5, output_type="latent", return_trajectory=True
    )
    assert torch.equal(found.trajectory.samples[-1], found.images)
