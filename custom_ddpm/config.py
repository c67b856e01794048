"""The configuration of a training run: one dataclass defines the flags, the YAML keys and the saved settings.

Flags have the names of diffusers' `train_unconditional.py` where they mean the same. This module does not import torch.
"""

import dataclasses
import math
import os
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

GROUPS = {
    "recipe": "the settings that are not given",
    "data": "pictures and labels",
    "model": "the U-Net",
    "diffusion": "the forward process and what the model predicts",
    "objective": "the loss",
    "optimiser": "batches, steps, learning rate",
    "averaging": "averages of the weights",
    "evaluation": "metrics of drawn pictures during training",
    "sampling": "sample grids during training",
    "checkpoints": "what is saved, and resuming",
    "Hub": "pushing to the Hugging Face Hub",
    "running": "precision, memory, speed, logging",
}


def _flag(group: str, default: Any, help: str, choices: Iterable[str] | None = None, by_recipe: bool = False) -> Any:
    metadata = {
        "group": group,
        "help": help,
        "choices": None if choices is None else tuple(choices),
        "by_recipe": by_recipe,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _chosen(group: str, help: str, choices: Iterable[str] | None = None) -> Any:
    """A setting that --recipe chooses: None until then, and of its type from then on."""
    return _flag(group, None, help, choices, by_recipe=True)


@dataclass
class TrainingConfig:
    """Settings of a training run; each field is documented by the flag of its name (`train_ddpm.py --help`).

    A setting that is None is chosen by the recipe when the data are known (`recipe.complete`).

    Raises:
        ValueError: a value out of range, or values that contradict each other; one line, with the flag's name.
    """

    recipe: Literal["default", "stock", "ddpm"] = _flag(
        "recipe",
        "default",
        "what chooses the settings that are not given: default, for the best pictures in little time; stock, as "
        "diffusers' train_unconditional.py, with a smaller network; ddpm, as Ho et al. 2020 for CIFAR-10",
    )

    dataset_name: str | None = _flag("data", None, "dataset on the Hub, or path of a local dataset folder or file")
    dataset_config_name: str | None = _flag("data", None, "configuration of that dataset")
    dataset_revision: str | None = _flag("data", None, "branch, tag or commit of that dataset")
    train_data_dir: str | None = _flag(
        "data", None, "folder of pictures, instead of --dataset_name; sub-folders are classes"
    )
    split: str = _flag("data", "train", "split to train on; slices such as train[:90%] too")
    validation_split: str | None = _flag("data", None, "split to compute the validation loss on")
    image_column: str | None = _flag("data", None, "column of the pictures; found by its type if not given")
    label_column: str | None = _flag("data", None, "column of the labels; found by its type if not given")
    image_mode: Literal["L", "RGB", "RGBA"] | None = _flag(
        "data", None, "colour mode; if not given gray pictures stay gray (one channel) and all others become RGB"
    )
    background: str = _flag("data", "white", "colour behind transparent pixels: a name or #rrggbb")
    resolution: list[int] = _chosen("data", "size of the pictures in pixels: one side, or height and width")
    center_crop: bool = _flag(
        "data", False, "crop the centre instead of a random part of pictures with another aspect ratio"
    )
    random_flip: bool = _flag("data", False, "flip pictures left-right at random")
    augment_share: float = _chosen(
        "data", "share of the run, from its start, in which pictures are mirrored, shifted and scaled at random"
    )
    streaming: bool = _flag("data", False, "read the dataset as a stream, without storing it on the disk")
    on_bad_image: Literal["raise", "skip"] = _flag("data", "raise", "what to do with a picture that cannot be read")
    dataloader_num_workers: int = _flag("data", 0, "processes that decode pictures, for the cache or a stream")
    cache_dir: str | None = _flag("data", None, "folder where datasets are cached")

    init_from: str | None = _flag(
        "model", None, "pipeline to start from (ours or a stock DDPM): folder or Hub repository"
    )
    block_out_channels: list[int] = _chosen("model", "channels at each level of the U-Net")
    patch_size: int = _chosen(
        "model", "side of the patches of pixels that become one position of the first level (space-to-depth)"
    )
    down_block_types: list[str] | None = _flag(
        "model",
        None,
        "DownBlock2D or AttnDownBlock2D for each level; if not given, attention where a level has 16x16 or less",
    )
    layers_per_block: int = _chosen("model", "residual blocks at each level")
    attention_head_dim: int | None = _flag("model", None, "channels of an attention head; one head if not given")
    norm_num_groups: int = _chosen("model", "groups of the group normalisation")
    resnet_time_scale_shift: Literal["default", "scale_shift"] = _chosen(
        "model", "how a residual block takes the timestep: added, or as scale and shift after the second norm"
    )
    dropout: float = _chosen("model", "dropout probability in the residual blocks")
    class_conditional: bool = _chosen("model", "condition the model on the labels of the dataset")
    label_dropout: float = _flag(
        "model", 0.1, "probability of dropping a label, which makes guidance possible; with --class_conditional only"
    )

    ddpm_num_steps: int = _flag("diffusion", 1000, "T, steps of the forward process")
    ddpm_beta_schedule: str = _chosen(
        "diffusion",
        "beta schedule; keeps its shape when T is not 1000",
        ("linear", "scaled_linear", "sigmoid", "squaredcos_cap_v2", "laplace", "exp"),
    )
    rescale_betas_zero_snr: bool = _flag("diffusion", False, "rescale the betas to zero terminal SNR")
    prediction_type: str = _chosen("diffusion", "what the model predicts", ("epsilon", "sample", "v_prediction"))
    variance_type: str = _chosen(
        "diffusion",
        "variance of the reverse step",
        ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range", "zero"),
    )

    loss_type: Literal["simple", "hybrid", "vlb"] = _flag(
        "objective",
        "simple",
        "simple: L_simple of the paper; vlb: the variational bound; hybrid: both (for learned variances)",
    )
    loss_weighting: Literal["uniform", "min_snr", "p2"] = _chosen("objective", "weight of L_simple at each timestep")
    snr_gamma: float = _flag("objective", 5.0, "gamma of the min_snr weighting")
    timestep_sampling: Literal["uniform", "stratified", "importance"] = _chosen(
        "objective",
        "distribution of t; stratified: evenly spaced in a batch; importance: by its share of the variational bound "
        "(for --loss_type vlb)",
    )

    train_batch_size: int = _chosen("optimiser", "pictures in a batch, for each process")
    gradient_accumulation_steps: int = _flag("optimiser", 1, "batches in an optimiser step, for each process")
    time_budget: float | None = _flag(
        "optimiser",
        None,
        "minutes for the whole run: --max_train_steps, if not given, is chosen by the measured speed",
    )
    num_epochs: int | None = _flag("optimiser", None, "passes over the dataset")
    max_train_steps: int | None = _flag("optimiser", None, "optimiser steps of the whole run")
    max_train_time: float | None = _flag("optimiser", None, "minutes after which the run saves a checkpoint and ends")
    optimizer: Literal["adamw", "muon"] = _chosen(
        "optimiser", "AdamW; or Muon for the weights of convolutions and attention, AdamW for the others"
    )
    learning_rate: float = _chosen("optimiser", "peak learning rate")
    lr_scheduler: str = _chosen(
        "optimiser",
        "learning rate schedule; warmup_stable_decay falls to zero in the last two fifths",
        (
            "linear",
            "cosine",
            "cosine_with_restarts",
            "polynomial",
            "constant",
            "constant_with_warmup",
            "warmup_stable_decay",
        ),
    )
    lr_warmup_steps: int = _chosen("optimiser", "optimiser steps of warm-up")
    adam_beta1: float = _chosen("optimiser", "beta1 of AdamW")
    adam_beta2: float = _flag("optimiser", 0.999, "beta2 of AdamW")
    adam_weight_decay: float = _chosen("optimiser", "weight decay of AdamW")
    adam_epsilon: float = _flag("optimiser", 1e-8, "epsilon of AdamW")
    max_grad_norm: float = _flag("optimiser", 1.0, "norm that gradients are clipped to")
    seed: int = _flag("optimiser", 0, "seed of weights, data order, timesteps, noise and sample grids")

    use_ema: bool = _flag(
        "averaging", True, "keep an exponential moving average of the weights, which is sampled from and saved"
    )
    ema_inv_gamma: float = _chosen("averaging", "inverse gamma of the average's warm-up")
    ema_power: float = _chosen("averaging", "power of the average's warm-up")
    ema_max_decay: float = _flag("averaging", 0.9999, "decay at the end of the average's warm-up")
    posthoc_ema_steps: int | None = _flag(
        "averaging", None, "optimiser steps between snapshots for averages of any length after the run"
    )

    eval_steps: int | None = _flag(
        "evaluation", None, "optimiser steps between evaluations of the averaged weights; none if not given"
    )
    eval_features: str = _flag(
        "evaluation",
        "random",
        "features of the metrics: random, inception, dinov2, or a folder of `custom-ddpm features train`",
    )
    eval_num_images: int = _flag("evaluation", 2000, "pictures drawn for an evaluation")

    save_images_steps: int = _chosen("sampling", "optimiser steps between sample grids")
    eval_batch_size: int = _chosen("sampling", "pictures in a sample grid")
    preview_sampler: Literal["ddpm", "dpmsolver++"] = _chosen(
        "sampling", "sampler of the grids: the reverse process as it was trained, or DPM-Solver++ for few steps"
    )
    ddpm_num_inference_steps: int = _chosen("sampling", "sampling steps of the grids")
    preview: Literal["terminal"] | None = _flag(
        "sampling", None, "terminal: also show the grids in the terminal (needs textual-image)"
    )
    guidance_scale: float = _chosen("sampling", "classifier-free guidance of the grids, for class-conditional models")

    output_dir: str = _flag("checkpoints", "ddpm-model", "folder of the run")
    checkpointing_steps: int = _chosen("checkpoints", "optimiser steps between checkpoints")
    checkpoints_total_limit: int | None = _flag("checkpoints", None, "how many checkpoints to keep; all if not given")
    resume_from_checkpoint: str | None = _flag("checkpoints", None, "checkpoint to resume from: its path, or latest")

    push_to_hub: bool = _flag("Hub", False, "push the model at every sample grid and at the end")
    hub_model_id: str | None = _flag("Hub", None, "repository, user/model; the name of the output folder if not given")
    hub_private_repo: bool = _flag("Hub", False, "make the repository private")

    mixed_precision: Literal["no", "fp16", "bf16"] | None = _flag(
        "running", None, "precision of the model's arithmetic; as accelerate is configured if not given"
    )
    cpu_threads: int | None = _flag(
        "running", None, "threads of a process on a CPU; all cores, or fewer where that is faster, if not given"
    )
    gradient_checkpointing: bool = _flag("running", False, "recompute activations to save memory")
    channels_last: bool = _chosen("running", "memory layout that is faster on GPUs with bf16 or fp16")
    torch_compile: bool = _chosen("running", "compile the model")
    allow_tf32: bool = _flag("running", True, "use TF32 on GPUs that have it")
    logging_steps: int = _flag("running", 50, "optimiser steps between lines of metrics")
    report_to: list[str] = _flag("running", [], "trackers to log to besides the output folder: tensorboard, wandb, ...")

    def __post_init__(self) -> None:
        for message in self.problems():
            raise ValueError(message)

    def problems(self) -> list[str]:
        """What is wrong with the values: one line each, with the flag's name, the value and what would be right."""
        rows = [*_range_checks(self), *_consistency_checks(self)]
        found = [f"--{name} is {getattr(self, name)!r}; {rule}" for name, holds, rule in rows if not holds]
        return list(dict.fromkeys(found))

    def to_yaml(self) -> str:
        """The configuration as YAML that `--config` reads back."""
        import yaml

        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


AT_LEAST_ONE = (
    "train_batch_size gradient_accumulation_steps num_epochs max_train_steps ddpm_num_steps layers_per_block "
    "checkpointing_steps checkpoints_total_limit save_images_steps eval_batch_size ddpm_num_inference_steps "
    "logging_steps norm_num_groups attention_head_dim posthoc_ema_steps eval_steps patch_size cpu_threads"
).split()
POSITIVE = (
    "learning_rate max_grad_norm snr_gamma adam_epsilon ema_inv_gamma ema_power max_train_time time_budget".split()
)
NOT_NEGATIVE = "lr_warmup_steps adam_weight_decay dataloader_num_workers seed".split()
FRACTIONS = "augment_share dropout label_dropout adam_beta1 adam_beta2 ema_max_decay".split()

Check = tuple[str, bool, str]  # name of the setting, whether the rule holds, the rule


def _range_checks(config: TrainingConfig) -> Iterable[Check]:
    """Rules for one setting each."""
    for spec in dataclasses.fields(config):
        if (choices := choices_of(spec)) is not None and getattr(config, spec.name) is not None:
            yield spec.name, getattr(config, spec.name) in choices, f"it must be one of {', '.join(choices)}"
    for name in AT_LEAST_ONE:
        value = getattr(config, name)
        yield name, value is None or value >= 1, "it must be at least 1"
    for name in POSITIVE:
        value = getattr(config, name)
        yield name, value is None or (value > 0 and not math.isnan(value)), "it must be more than 0"
    for name in NOT_NEGATIVE:
        value = getattr(config, name)
        yield name, value is None or value >= 0, "it must not be negative"
    for name in FRACTIONS:
        value = getattr(config, name)
        yield name, value is None or 0 <= value < 1, "it must be in [0, 1)"
    yield "eval_num_images", config.eval_num_images >= 50, "it must be at least 50"
    sides = config.resolution
    right = sides is None or (len(sides) in (1, 2) and all(side >= 1 for side in sides))
    yield "resolution", right, "it must be one or two numbers of at least 1"
    yield "background", _is_colour(config.background), "it must be a colour, such as white or #ff8800"


def _consistency_checks(config: TrainingConfig) -> Iterable[Check]:
    """Rules that concern several settings; one that the recipe has still to choose breaks none."""
    channels, groups = config.block_out_channels, config.norm_num_groups
    if channels is not None:
        yield "block_out_channels", len(channels) >= 1, "it must have a number for each level"
        fits = all(width >= 1 and (groups is None or width % max(1, groups) == 0) for width in channels)
        yield "block_out_channels", fits, f"each must be a multiple of --norm_num_groups, {groups}"
    if config.down_block_types is not None and channels is not None:
        known = set(config.down_block_types) <= {"DownBlock2D", "AttnDownBlock2D"}
        rule = f"it must name DownBlock2D or AttnDownBlock2D for each of the {len(channels)} levels"
        yield "down_block_types", known and len(config.down_block_types) == len(channels), rule
    both = config.dataset_name is not None and config.train_data_dir is not None
    yield "train_data_dir", not both, "give either it or --dataset_name"
    for name in ("train_data_dir", "dataset_name"):
        data = getattr(config, name)
        inside = (
            data is not None
            and os.path.isdir(data)
            and Path(config.output_dir).resolve().is_relative_to(Path(data).resolve())
        )
        yield "output_dir", not inside, f"it must not lie inside --{name}, {data!r}: its pictures would be trained on"
    infinite_bound = config.loss_type != "simple" and config.variance_type == "zero"
    yield "loss_type", not infinite_bound, "the bound is infinite with --variance_type zero"
    variance_is_untrained = config.loss_type == "simple" and config.variance_type in ("learned", "learned_range")
    yield "variance_type", not variance_is_untrained, "it is trained by --loss_type hybrid or vlb only"
    x_0_is_lost = config.rescale_betas_zero_snr and config.prediction_type == "epsilon"
    yield "prediction_type", not x_0_is_lost, "zero terminal SNR needs v_prediction or sample"
    steps = config.ddpm_num_inference_steps
    rule = f"it must not be more than --ddpm_num_steps, {config.ddpm_num_steps}"
    yield "ddpm_num_inference_steps", steps is None or steps <= config.ddpm_num_steps, rule
    known = config.eval_steps is None or not config.streaming
    yield "eval_steps", known, "--streaming reads a stream, of which no reference can be taken; leave one of them out"
    guided = config.class_conditional is not False and config.label_dropout > 0
    rule = "guidance needs --class_conditional and --label_dropout above 0"
    yield "guidance_scale", config.guidance_scale in (None, 1.0) or guided, rule
    several = config.time_budget is not None and config.num_epochs is not None
    yield "time_budget", not several, "it chooses the number of steps: leave out --num_epochs"


def _is_colour(name: str) -> bool:
    from PIL import ImageColor

    try:
        ImageColor.getrgb(name)
    except ValueError:
        return False
    return True


_HINTS = typing.get_type_hints(TrainingConfig)


def value_type(name: str) -> tuple[type, bool]:
    """Type of a setting's values, and whether it is a list of them."""
    hint = _HINTS[name]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True
    return (str if typing.get_origin(hint) is Literal else hint), False


def choices_of(spec: dataclasses.Field) -> tuple[str, ...] | None:
    """Values that a setting may have; None if there is no list of them."""
    for hint in (_HINTS[spec.name], *typing.get_args(_HINTS[spec.name])):
        if typing.get_origin(hint) is Literal:
            return typing.get_args(hint)
    return spec.metadata["choices"]
