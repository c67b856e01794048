"""The files of a pushed repository, and helpers that several of the Hub's test files use."""

import torch
from conftest import make_pipeline

STEPS = 6  # num_train_timesteps of the saved pipeline
MAIN_FILES = {
    ".gitattributes",  # created by the Hub
    "README.md",
    "loss_curve.png",
    "model_index.json",
    "pictures.py",
    "pipeline_custom_ddpm.py",
    "pipeline_custom_ddpm_img2img.py",
    "pipeline_custom_ddpm_inpaint.py",
    "pipeline_custom_ddpm_interpolate.py",
    "samples.png",
    "scheduler/schedules.py",
    "scheduler/scheduler.py",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/unet.py",
}
STOCK_FILES = {name for name in MAIN_FILES if not name.endswith(".py")}


def contents(folder):
    """Relative path -> bytes of every file in a folder."""
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def train_a_little(folder):
    """Save the pipeline again with other weights."""
    pipeline = make_pipeline(num_train_timesteps=STEPS)
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 1
    pipeline.save_pretrained(folder)
