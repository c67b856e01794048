"""One dataclass is the command-line flags, the YAML keys, and what is saved with the run.

Flags are named as in diffusers' `train_unconditional.py` where they mean the same. A YAML file given by `--config` is
read as if its keys had been typed as flags before the others, so both pass through one parser.
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from diffusers.optimization import SchedulerType
from PIL import ImageColor
from transformers import HfArgumentParser

from .scheduler import PREDICTION_TYPES, VARIANCE_TYPES
from .schedules import BETA_SCHEDULES


def _flag(default: Any, help: str, **metadata: Any) -> Any:
    metadata = {"help": help, **metadata}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _choice(default: Any, choices: Sequence[Any], help: str) -> Any:
    return _flag(default, help, choices=list(choices))


@dataclass
class TrainingConfig:
    """Everything that a run is made of. Each field is documented by its flag's help (`train_ddpm.py --help`)."""

    # ---- pictures ----
    dataset_name: str | None = _flag(None, "dataset on the Hub, or a local dataset folder or file")
    dataset_config_name: str | None = _flag(None, "configuration of that dataset")
    dataset_revision: str | None = _flag(None, "branch, tag or commit of that dataset")
    train_data_dir: str | None = _flag(None, "folder of pictures, in place of --dataset_name; sub-folders are classes")
    split: str = _flag("train", "split to train on; slices such as train[:90%%] too")
    validation_split: str | None = _flag(None, "split to compute the validation loss on")
    image_column: str | None = _flag(None, "column of the pictures; found by its type if not given")
    label_column: str | None = _flag(None, "column of the labels; found by its type if not given")
    image_mode: Literal["L", "RGB", "RGBA"] | None = _flag(
        None, "force this mode; if not given gray pictures stay gray (one channel), all others become RGB"
    )
    background: str = _flag("white", "colour that transparent pictures are laid on")
    resolution: list[int] = _flag([64], "height and width of the pictures in pixels: one number or two")
    center_crop: bool = _flag(False, "crop the centre instead of a random part where a picture is not of that shape")
    random_flip: bool = _flag(False, "flip pictures left-right at random")
    streaming: bool = _flag(False, "read the dataset as a stream, without storing it on the disk")
    on_bad_image: Literal["raise", "skip"] = _flag("raise", "what to do with a picture that cannot be read")
    dataloader_num_workers: int = _flag(0, "processes that decode, for the cache or a stream")
    cache_dir: str | None = _flag(None, "where datasets are stored")

    # ---- model ----
    init_from: str | None = _flag(None, "pipeline to start from (ours or a stock DDPM): folder or Hub repository")
    block_out_channels: list[int] = _flag([64, 128, 256, 256], "channels at each level of the U-Net")
    down_block_types: list[str] | None = _flag(
        None,
        "DownBlock2D or AttnDownBlock2D for each level; attention where a level sees 16 pixels or less if not given",
    )
    layers_per_block: int = _flag(2, "residual blocks at each level")
    attention_head_dim: int | None = _flag(None, "channels of an attention head; all of them if not given")
    norm_num_groups: int = _flag(32, "groups of the group normalisation")
    dropout: float = _flag(0.0, "dropout in the residual blocks")
    class_conditional: bool = _flag(False, "condition the model on the labels of the dataset")
    label_dropout: float = _flag(0.1, "part of the labels dropped, so that guidance is possible; with labels only")

    # ---- diffusion ----
    ddpm_num_steps: int = _flag(1000, "T, steps of the forward process")
    ddpm_beta_schedule: str = _choice("linear", BETA_SCHEDULES, "beta schedule; keeps its shape when T is not 1000")
    rescale_betas_zero_snr: bool = _flag(False, "rescale the betas to zero terminal SNR")
    prediction_type: str = _choice("epsilon", PREDICTION_TYPES, "what the model predicts")
    variance_type: str = _choice(
        "fixed_small",
        # "analytic" is estimated from a trained model.
        [kind for kind in VARIANCE_TYPES if kind != "analytic"],
        "variance of the reverse step",
    )
    loss_type: Literal["simple", "hybrid", "vlb"] = _flag(
        "simple", "simple: the paper's L_simple; vlb: the variational bound; hybrid: both (for learned variances)"
    )
    loss_weighting: Literal["uniform", "min_snr", "p2"] = _flag("uniform", "weight of L_simple by timestep")
    snr_gamma: float = _flag(5.0, "gamma of the min_snr weighting")
    timestep_sampling: Literal["uniform", "importance"] = _flag(
        "uniform", "how t is drawn; importance: by its part of the variational bound (for --loss_type vlb)"
    )

    # ---- optimisation ----
    train_batch_size: int = _flag(16, "pictures in a batch, for each process")
    gradient_accumulation_steps: int = _flag(1, "batches in one optimiser step, for each process")
    num_epochs: int = _flag(100, "times that every picture is seen; unused if --max_train_steps is given")
    max_train_steps: int | None = _flag(None, "optimiser steps of the whole run")
    max_train_time: float | None = _flag(None, "minutes after which the run saves a checkpoint and ends")
    learning_rate: float = _flag(1e-4, "peak learning rate")
    lr_scheduler: str = _choice(
        "cosine",
        [s.value for s in SchedulerType if s is not SchedulerType.PIECEWISE_CONSTANT],
        "learning rate schedule, in optimiser steps",
    )
    lr_warmup_steps: int = _flag(500, "optimiser steps of warm-up")
    adam_beta1: float = _flag(0.95, "beta1 of AdamW")
    adam_beta2: float = _flag(0.999, "beta2 of AdamW")
    adam_weight_decay: float = _flag(1e-6, "weight decay of AdamW")
    adam_epsilon: float = _flag(1e-8, "epsilon of AdamW")
    max_grad_norm: float = _flag(1.0, "gradients are clipped to this norm")
    use_ema: bool = _flag(True, "keep an exponential moving average of the weights; it is what is sampled and saved")
    ema_inv_gamma: float = _flag(1.0, "inverse gamma of the average's warm-up")
    ema_power: float = _flag(0.75, "power of the average's warm-up")
    ema_max_decay: float = _flag(0.9999, "decay that the average's warm-up ends at")
    posthoc_ema_steps: int | None = _flag(
        None, "optimiser steps between snapshots, from which averages of any length can be made after the run"
    )
    seed: int = _flag(0, "seed of everything")

    # ---- machine ----
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _flag(
        None, "precision of the model's arithmetic; as accelerate is configured if not given"
    )
    gradient_checkpointing: bool = _flag(False, "compute activations twice to save memory")
    channels_last: bool = _flag(False, "memory layout that is faster on GPUs with bf16 or fp16")
    torch_compile: bool = _flag(False, "compile the model")
    allow_tf32: bool = _flag(True, "TF32 arithmetic on GPUs that have it")

    # ---- what the run leaves ----
    output_dir: str = _flag("ddpm-model", "folder of the run")
    checkpointing_steps: int = _flag(500, "optimiser steps between checkpoints")
    checkpoints_total_limit: int | None = _flag(None, "how many checkpoints are kept; all if not given")
    resume_from_checkpoint: str | None = _flag(None, "checkpoint to go on from: its path, or latest")
    save_images_steps: int = _flag(1000, "optimiser steps between sample grids")
    eval_batch_size: int = _flag(16, "pictures in a sample grid")
    ddpm_num_inference_steps: int | None = _flag(None, "sampling steps of the grids; all T if not given")
    guidance_scale: float = _flag(1.0, "guidance of the grids, for class-conditional models")
    logging_steps: int = _flag(50, "optimiser steps between log lines")
    report_to: list[str] = _flag([], "trackers to log to besides the run's folder: tensorboard, wandb, ...")
    push_to_hub: bool = _flag(False, "push the model to the Hub, at every grid and at the end")
    hub_model_id: str | None = _flag(None, "repository on the Hub, user/model; the output folder's name if not given")
    hub_private_repo: bool = _flag(False, "make that repository private")

    def __post_init__(self) -> None:
        for message in self.problems():
            raise ValueError(message)

    def problems(self) -> list[str]:
        """What is wrong with the values: one line each, with the flag's name and what would be right."""
        found = []

        def check(name: str, right: bool, what: str) -> None:
            if not right:
                found.append(f"--{name} is {getattr(self, name)!r}; {what}")

        for spec in dataclasses.fields(self):
            if (choices := spec.metadata.get("choices")) is None:
                choices = [c for c in get_args(spec.type) if isinstance(c, str)] or None
            if choices is not None and getattr(self, spec.name) is not None:
                check(spec.name, getattr(self, spec.name) in choices, f"it must be one of {', '.join(choices)}")
        at_least_one = (
            "train_batch_size gradient_accumulation_steps num_epochs max_train_steps ddpm_num_steps layers_per_block "
            "checkpointing_steps checkpoints_total_limit save_images_steps eval_batch_size ddpm_num_inference_steps "
            "logging_steps norm_num_groups attention_head_dim posthoc_ema_steps"
        )
        for name in at_least_one.split():
            value = getattr(self, name)
            check(name, value is None or value >= 1, "it must be at least 1")
        for name in "learning_rate max_grad_norm snr_gamma adam_epsilon ema_inv_gamma ema_power max_train_time".split():
            value = getattr(self, name)
            check(name, value is None or (value > 0 and not math.isnan(value)), "it must be more than 0")
        for name in "lr_warmup_steps adam_weight_decay dataloader_num_workers seed".split():
            check(name, getattr(self, name) >= 0, "it must not be negative")
        for name in "dropout label_dropout adam_beta1 adam_beta2 ema_max_decay".split():
            check(name, 0 <= getattr(self, name) < 1, "it must be in [0, 1)")
        check(
            "resolution",
            len(self.resolution) in (1, 2) and all(size >= 1 for size in self.resolution),
            "it must be one or two numbers of at least 1",
        )
        levels = len(self.block_out_channels)
        check("block_out_channels", levels >= 1, "it must have a number for each level")
        for channels in self.block_out_channels:
            check(
                "block_out_channels",
                channels >= 1 and channels % max(1, self.norm_num_groups) == 0,
                f"each must be a multiple of --norm_num_groups, {self.norm_num_groups}",
            )
        if self.down_block_types is not None:
            check(
                "down_block_types",
                len(self.down_block_types) == levels
                and set(self.down_block_types) <= {"DownBlock2D", "AttnDownBlock2D"},
                f"it must name DownBlock2D or AttnDownBlock2D for each of the {levels} levels",
            )
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            check("background", False, "it must be a colour, such as white or #ff8800")
        if self.dataset_name is not None and self.train_data_dir is not None:
            check("train_data_dir", False, "give either it or --dataset_name")
        learned = self.variance_type in ("learned", "learned_range")
        if self.loss_type != "simple":
            check("loss_type", self.variance_type != "zero", "the bound is infinite with --variance_type zero")
        if learned:
            check("variance_type", self.loss_type != "simple", "it is trained by --loss_type hybrid or vlb only")
        if self.rescale_betas_zero_snr:
            check(
                "prediction_type", self.prediction_type != "epsilon", "zero terminal SNR needs v_prediction or sample"
            )
        if self.ddpm_num_inference_steps is not None:
            check(
                "ddpm_num_inference_steps",
                self.ddpm_num_inference_steps <= self.ddpm_num_steps,
                f"it must not be more than --ddpm_num_steps, {self.ddpm_num_steps}",
            )
        if self.guidance_scale != 1.0:
            check(
                "guidance_scale",
                self.class_conditional and self.label_dropout > 0,
                "guidance needs --class_conditional and --label_dropout above 0",
            )
        return list(dict.fromkeys(found))

    def to_yaml(self) -> str:
        """The configuration as YAML that `--config` reads back."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


def _yaml_flags(path: str, known: set[str]) -> list[str]:
    """The keys of a YAML file as command-line words."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: it must hold `flag: value` lines")
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        raise ValueError(f"--config {path}: unknown keys {', '.join(unknown)}; the keys are the flags' names")
    words = []
    for key, value in values.items():
        if value is None or value == []:
            continue
        words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return words


def parse_config(argv: Sequence[str], default_config: Path | None = None) -> TrainingConfig:
    """Command-line words to a `TrainingConfig`; exits with status 2 and one line when something is wrong.

    Args:
        argv: the words after the program's name.
        default_config: YAML file that is used when neither data nor --config is given.
    """
    parser = HfArgumentParser(
        TrainingConfig,  # type: ignore[arg-type]
        usage="accelerate launch train_ddpm.py [--config FILE] [--flag value ...]",
        description="Train a DDPM on any pictures. Without flags: on the digits in examples/.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", default=None, help="YAML file with any of these flags as keys; flags win over it")
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "dataset_name", "train_data_dir"):
        before.add_argument(f"--{name}")
    first, _ = before.parse_known_args(argv)
    config_file = first.config
    if default_config and not (first.config or first.dataset_name or first.train_data_dir):
        config_file = str(default_config)
    known = {spec.name for spec in dataclasses.fields(TrainingConfig)}
    try:
        words = _yaml_flags(config_file, known) if config_file else []
        return parser.parse_args_into_dataclasses([*words, *argv])[0]
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
