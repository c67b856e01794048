"""Recipes: the values of the settings that a user did not give.

`stock` has the values of diffusers' `train_unconditional.py`, `ddpm` those of Ho et al. 2020 for CIFAR-10. `default`
chooses by the pictures, the device and the time that there is. What was measured, for CPUs, is in docs/benchmarks.md;
the other lines, and those for other devices, are what is usual. This module does not import torch.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .config import TrainingConfig


@dataclass(frozen=True)
class Facts:
    """What a recipe chooses by.

    Args:
        height, width: of the pictures.
        num_classes: classes of the pictures; None if they have no labels, or these are not used.
        device: type of the device, "cpu" or "cuda" or another of torch's.
        sharded: whether each process has a part of every weight only (FSDP).
        num_images: number of the pictures; None if it is not known, as for a stream.
    """

    height: int
    width: int
    num_classes: int | None
    device: str
    sharded: bool = False
    num_images: int | None = None


STOCK: Mapping[str, Any] = {
    "resolution": [64],
    "class_conditional": False,
    "patch_size": 1,
    "block_out_channels": [64, 128, 256, 256],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "resnet_time_scale_shift": "default",
    "dropout": 0.0,
    "augment_share": 0.0,
    "ddpm_beta_schedule": "linear",
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "loss_weighting": "uniform",
    "timestep_sampling": "uniform",
    "train_batch_size": 16,
    "num_epochs": 100,
    "optimizer": "adamw",
    "learning_rate": 1e-4,
    "lr_warmup_steps": 500,
    "adam_beta1": 0.95,
    "lr_scheduler": "cosine",
    "adam_weight_decay": 1e-6,
    "ema_inv_gamma": 1.0,
    "ema_power": 0.75,
    "save_images_steps": 1000,
    "eval_batch_size": 16,
    "preview_sampler": "ddpm",
    "guidance_scale": 1.0,
    "checkpointing_steps": 500,
    "channels_last": False,
    "torch_compile": False,
}
PAPER_BLOCKS = ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]
DDPM: Mapping[str, Any] = {
    **STOCK,
    "resolution": [32],
    "block_out_channels": [128, 256, 256, 256],
    # Attention at 16x16 alone; for another number of levels, at 16x16 and below.
    "down_block_types": lambda facts, config: PAPER_BLOCKS if len(config.block_out_channels) == 4 else None,
    "dropout": 0.1,
    "variance_type": "fixed_large",  # σ² = β, which their code takes for CIFAR-10
    "train_batch_size": 128,
    "num_epochs": 2048,  # 800,000 steps of 128 pictures of CIFAR-10's 50,000
    "learning_rate": 2e-4,
    "lr_warmup_steps": 5000,
    "lr_scheduler": "constant_with_warmup",
    "adam_beta1": 0.9,
    "adam_weight_decay": 0.0,
    # 0.9999 from the start: an average that warms up in less than a step.
    "ema_inv_gamma": 1e-6,
    "ema_power": 1.0,
    "eval_batch_size": 64,
    "save_images_steps": 20_000,
    "checkpointing_steps": 5000,
}

# ---- the default recipe: a value, or a function of the facts and the settings so far ----

Rule = Callable[[Facts, TrainingConfig], Any]
FEW_PICTURES = 1000


def _patch_size(facts: Facts, config: TrainingConfig) -> int:
    """The first level has 32x32 positions or fewer."""
    return max(1, 2 ** math.ceil(math.log2(max(facts.height, facts.width) / 32)))


def _block_out_channels(facts: Facts, config: TrainingConfig) -> list[int]:
    """A thin level at full resolution on a CPU; patches, which are many values, need a wider one."""
    if facts.device != "cpu":
        return [128, 256, 256]
    if config.patch_size > 1:
        return [48, 48, 64]
    return [16, 32, 64] if max(facts.height, facts.width) > 16 else [32, 64]


def _down_block_types(facts: Facts, config: TrainingConfig) -> list[str]:
    """Attention in the middle block only on a CPU, elsewhere at the last level too."""
    levels = len(config.block_out_channels)
    last = "DownBlock2D" if facts.device == "cpu" else "AttnDownBlock2D"
    return ["DownBlock2D"] * (levels - 1) + [last]


def _are_few(facts: Facts) -> bool:
    return facts.num_images is not None and facts.num_images < FEW_PICTURES


def _dropout(facts: Facts, config: TrainingConfig) -> float:
    """Few pictures are seen hundreds of times in a run, and the held-out loss rises from a hundred times on."""
    return 0.1 if _are_few(facts) else 0.0


def _augment_share(facts: Facts, config: TrainingConfig) -> float:
    """Few pictures are changed at random, until the learning rate falls: what is learned then is drawn."""
    return 0.6 if _are_few(facts) else 0.0


def _num_inference_steps(facts: Facts, config: TrainingConfig) -> int:
    return 20 if config.preview_sampler == "dpmsolver++" else config.ddpm_num_steps


DEFAULT: Mapping[str, Any] = {
    "patch_size": _patch_size,
    "block_out_channels": _block_out_channels,
    "layers_per_block": lambda facts, config: 1 if facts.device == "cpu" else 2,
    "down_block_types": _down_block_types,
    "norm_num_groups": 8,
    "resnet_time_scale_shift": "scale_shift",
    "dropout": _dropout,
    "augment_share": _augment_share,
    "ddpm_beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "variance_type": "fixed_small",
    "loss_weighting": "uniform",
    "timestep_sampling": "stratified",
    "train_batch_size": lambda facts, config: 16 if facts.device == "cpu" else 64,
    # Muon needs whole weights; on GPUs it was not measured.
    "optimizer": lambda facts, config: "muon" if facts.device == "cpu" and not facts.sharded else "adamw",
    "learning_rate": lambda facts, config: 2e-3 if facts.device == "cpu" else 5e-4,
    "adam_beta1": 0.9,
    "lr_scheduler": "warmup_stable_decay",
    "adam_weight_decay": 1e-6,
    "ema_inv_gamma": 1.0,
    "ema_power": 0.75,
    "eval_batch_size": lambda facts, config: 5 * facts.num_classes if 1 < (facts.num_classes or 0) <= 16 else 36,
    "preview_sampler": "dpmsolver++",
    "guidance_scale": lambda facts, config: 1.5 if config.class_conditional and config.label_dropout > 0 else 1.0,
    "channels_last": False,
    "torch_compile": False,
}
DEFAULT_TIME_BUDGET = 30.0  # minutes, where no length is given
# Shares of the run.
WARMUP = 0.05
GRIDS = 12
CHECKPOINTS = 10

RECIPES = {"default": DEFAULT, "stock": STOCK, "ddpm": DDPM}
AFTER_LENGTH = ("lr_warmup_steps", "save_images_steps", "checkpointing_steps")  # by the length of the run


def _chosen(config: TrainingConfig, values: Mapping[str, Any]) -> TrainingConfig:
    missing = {name: value for name, value in values.items() if getattr(config, name) is None and value is not None}
    return dataclasses.replace(config, **missing)


def before_data(config: TrainingConfig) -> TrainingConfig:
    """Choose what the pictures are opened with; the default recipe leaves it open, so that the pictures decide."""
    recipe = RECIPES[config.recipe]
    return _chosen(config, {name: recipe.get(name) for name in ("resolution", "class_conditional")})


def complete(config: TrainingConfig, facts: Facts) -> TrainingConfig:
    """Choose all settings that are None, but those that depend on the length of the run.

    Raises:
        ValueError: given and chosen settings contradict each other.
    """
    size = [facts.height] if facts.height == facts.width else [facts.height, facts.width]
    config = _chosen(config, {"resolution": size, "class_conditional": facts.num_classes is not None})
    for name, rule in {**RECIPES[config.recipe], "ddpm_num_inference_steps": _num_inference_steps}.items():
        if name not in AFTER_LENGTH and name != "num_epochs":
            config = _chosen(config, {name: rule(facts, config) if callable(rule) else rule})
    if config.time_budget is config.max_train_steps is config.num_epochs is None:
        length = {"time_budget": DEFAULT_TIME_BUDGET} if config.recipe == "default" else RECIPES[config.recipe]
        config = _chosen(config, {name: length.get(name) for name in ("time_budget", "num_epochs")})
    return config


def complete_length(config: TrainingConfig, max_train_steps: int) -> TrainingConfig:
    """Choose the settings that depend on the number of optimiser steps of the run.

    Raises:
        ValueError: given and chosen settings contradict each other.
    """
    recipe = RECIPES[config.recipe]
    shares = {
        "lr_warmup_steps": math.ceil(WARMUP * max_train_steps),
        "save_images_steps": math.ceil(max_train_steps / GRIDS),
        "checkpointing_steps": math.ceil(max_train_steps / CHECKPOINTS),
    }
    return _chosen(config, {name: recipe.get(name, share) for name, share in shares.items()})
