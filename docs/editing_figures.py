"""Figures of docs/editing.md, and the numbers that stand there.

    python docs/editing_figures.py exact                            images/inpainting.png: a world known exactly
    python docs/editing_figures.py gallery MODEL DATASET            images/editing.png
    python docs/editing_figures.py inversion MODEL DATASET SPLIT    prints the PSNR of inversion and back

MODEL of `gallery` is trained on Fashion-MNIST as in docs/gallery.md, DATASET made by examples/make_fashion_mnist.py.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib

matplotlib.use("Agg")
import datasets
import matplotlib.pyplot as plt
import numpy as np
import torch
from custom_ddpm.pipelines import (
    CustomDDPMImg2ImgPipeline,
    CustomDDPMInpaintPipeline,
    CustomDDPMInterpolationPipeline,
)
from custom_ddpm.pipelines.pictures import read_pictures

from custom_ddpm import CustomDDPMPipeline, CustomDDPMScheduler
from custom_ddpm.sampling import image_grid

HERE = Path(__file__).parent
MEAN = np.array([0.2, -0.3, 0.1, 0.0])
ROOT = np.array([[0.5, 0, 0, 0], [0.3, 0.4, 0, 0], [-0.2, 0.1, 0.3, 0], [0.2, 0.2, -0.1, 0.3]])
COVARIANCE = ROOT @ ROOT.T
KNOWN = np.array([0.8, -0.2])  # the upper two of 2 x 2 pixels
COUNT, REPEATS = 10_000, (1, 2, 4, 8, 16)
COLUMNS = 8


class GaussianUNet(torch.nn.Module):
    """The optimal prediction of ε for pictures of 2 x 2 pixels that are N(MEAN, COVARIANCE)."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=1, out_channels=1, sample_size=2, num_class_embeds=None)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.bars = CustomDDPMScheduler().alphas_cumprod.double().numpy()

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> SimpleNamespace:
        a = self.bars[int(t)]
        gain = np.sqrt(a) * COVARIANCE @ np.linalg.inv(a * COVARIANCE + (1 - a) * np.eye(4))
        flat = x.flatten(1).double()
        x_0 = torch.tensor(MEAN) + (flat - np.sqrt(a) * torch.tensor(MEAN)) @ torch.tensor(gain).T
        return SimpleNamespace(sample=((flat - np.sqrt(a) * x_0) / np.sqrt(1 - a)).float().view_as(x))


def errors(n: int, repeats: int, **variance: Any) -> tuple[float, float]:
    """Error of the mean, in standard deviations, and of the covariance, relative to the largest variance."""
    gain = COVARIANCE[2:, :2] @ np.linalg.inv(COVARIANCE[:2, :2])
    mean = MEAN[2:] + gain @ (KNOWN - MEAN[:2])
    covariance = COVARIANCE[2:, 2:] - gain @ COVARIANCE[:2, 2:]
    scheduler = CustomDDPMScheduler(timestep_spacing="trailing", clip_sample=False, **variance)
    pipeline = CustomDDPMInpaintPipeline(GaussianUNet(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    picture = np.zeros((2, 2, 1), np.float32)
    picture[0, :, 0] = (KNOWN + 1) / 2
    images = pipeline(
        np.broadcast_to(picture, (COUNT, 2, 2, 1)),
        np.array([[0, 0], [1, 1]], bool),
        num_inference_steps=n,
        jump_n_sample=repeats,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    drawn = images.flatten(1)[:, 2:].double().numpy()
    largest = covariance.diagonal().max()
    found = abs(drawn.mean(0) - mean).max() / largest**0.5, abs(np.cov(drawn.T) - covariance).max() / largest
    print(f"{n} steps x {repeats}: mean {found[0]:.3f}, covariance {found[1]:.3f}", *list(variance)[:1], flush=True)
    return found


def exact() -> None:
    """The error of inpainting against the number of repetitions, for three numbers of steps, and for σ² = β̃."""
    small = {"variance_type": "analytic", "original_sample_variances": [0.0] * 1000}  # which is β̃, not replaced
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.3), layout="constrained", sharex=True, sharey=True)
    curves = [(50, {}, "#56B4E9", "-"), (100, {}, "#0072B2", "-"), (250, {}, "#009E73", "-")]
    for n, variance, colour, line in [*curves, (100, small, "#D55E00", "--")]:
        found = np.array([errors(n, repeats, **variance) for repeats in REPEATS])
        label = f"{n} steps, σ² = {'β̃' if variance else 'β'}"
        for axis, values in zip(axes, found.T, strict=True):
            axis.plot(REPEATS, values, line, color=colour, marker="o", markersize=4, label=label)
    for axis, title in zip(axes, ("mean, in standard deviations", "covariance, relative"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="repetitions of each step (jump_n_sample)")
        axis.set_title(f"error of the {title}", fontsize=10)
        axis.set_xticks(REPEATS, [str(each) for each in REPEATS])
        axis.minorticks_off()
        axis.grid(color="#e4e4e4")
        axis.spines[["top", "right"]].set_visible(False)
        axis.axhline(1 / COUNT**0.5, color="#999999", linewidth=1, linestyle=":")
    axes[0].set_ylabel("error")
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "images" / "inpainting.png", dpi=110)


def stacked(images: list) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image.convert("L")))[None] for image in images])


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def gallery(model: str, dataset: str) -> None:
    """Six rows of eight pictures."""
    base = CustomDDPMPipeline.from_pretrained(model)
    pipelines = [
        each(base.unet, base.scheduler, base.config.id2label)
        for each in (CustomDDPMImg2ImgPipeline, CustomDDPMInpaintPipeline, CustomDDPMInterpolationPipeline)
    ]
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    to_image, inpaint, interpolate = pipelines
    table = datasets.load_dataset(dataset, split="test[:200]")
    place = {label: table["label"].index(label) for label in range(10)}
    pictures = {label: table[i]["image"].convert("L") for label, i in place.items()}
    size = pictures[0].size
    rows = []
    for strength in (0.35, 0.7):
        results = to_image(
            pictures[8], strength, class_labels=[8, 0, 2, 3, 4, 7, 9], guidance_scale=2.0, num_inference_steps=50,
            generator=generators(7),
        ).images  # fmt: skip
        rows.append([pictures[8], *results])
    options = {"num_inference_steps": 50, "jump_n_sample": 5, "generator": generators(6)}
    mask = np.zeros(size, bool)
    mask[:, 14:] = True
    grayed = np.where(mask, 128, np.array(pictures[9])).astype(np.uint8)
    half = inpaint(pictures[9], mask, class_labels=[9] * 6, **options).images
    rows.append([pictures[9], to_pil(grayed), *half])
    canvas = np.full(size, 128, np.uint8)
    canvas[:14] = np.array(pictures[3])[:14]
    below = inpaint(np.array(pictures[3])[:14], padding=(0, 0, 0, 14), class_labels=[3] * 6, **options).images
    rows.append([pictures[3], to_pil(canvas), *below])
    small = pictures[7].resize((7, 7), 4)  # the means of blocks
    larger = inpaint(small, scale_factor=4, class_labels=[7] * 6, **options).images
    rows.append([pictures[7], small.resize(size, 0), *larger])
    rows.append(interpolate([pictures[0], pictures[9]], COLUMNS, num_inference_steps=50).images)
    image_grid(torch.cat([stacked(row) for row in rows]), COLUMNS).save(HERE / "images" / "editing.png")


def inversion(model: str, dataset: str, split: str) -> None:
    """Peak signal-to-noise ratio of pictures after 100 steps to noise and 100 back."""
    base = CustomDDPMPipeline.from_pretrained(model)
    pipeline = CustomDDPMInterpolationPipeline(base.unet, base.scheduler, base.config.id2label)
    pipeline.set_progress_bar_config(disable=True)
    table = datasets.load_dataset(dataset, split=split)
    labels = list(table["label"])
    originals = read_pictures(list(table["image"]), base.unet.config.in_channels, pipeline._picture_size())
    for order in (1, 2):
        noise = pipeline.invert((originals + 1) / 2, labels, order=order)
        back = pipeline.restore(noise, labels, order=order, output_type="latent").images
        decibels = -10 * ((back.double() - originals) / 2).pow(2).flatten(1).mean(1).log10()
        below = int((decibels < 30).sum())
        print(f"order {order}: {decibels.mean():.1f} dB on average, {decibels.min():.1f} at least, {below} below 30")


def to_pil(array: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(array)


if __name__ == "__main__":
    {"exact": exact, "gallery": gallery, "inversion": inversion}[sys.argv[1]](*sys.argv[2:])
