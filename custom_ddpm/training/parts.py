"""Building the parts of a training run, each from the settings of the configuration that concern it."""

import dataclasses
import os
from collections.abc import Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration
from diffusers.training_utils import EMAModel

from ..config import TrainingConfig
from ..data.base import ImageData
from ..data.folder import list_folder
from ..data.folder_dataset import overlap
from ..data.sources import open_images
from ..memory import keep_freed_memory
from ..objective import diffusion_loss
from ..pipelines import CustomDDPMPipeline
from ..recipe import Facts, complete
from ..scheduler import CustomDDPMScheduler
from ..schedules import BETA_RANGES, BETA_SCHEDULES, make_betas, resample_betas
from ..unet import CustomUNet2DModel
from .launch import get_logger, set_cpu_threads
from .loop import Loss
from .muon import Muon
from .sharding import check_strategy
from .terminal import check_terminal

logger = get_logger(__name__)

PROCESS_GROUP_TIMEOUT = timedelta(hours=6)  # one process decodes a large dataset, or writes a large checkpoint


def build_accelerator(config: TrainingConfig) -> Accelerator:
    """The accelerator of a run, with the processes and devices that it was launched on.

    Raises:
        ValueError: accelerate is configured for something that is not supported.
    """
    _check_trackers(config.report_to)
    if config.preview == "terminal" and int(os.environ.get("RANK", 0)) == 0:  # that of the first process
        check_terminal()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to or None,
        project_config=ProjectConfiguration(
            project_dir=config.output_dir, logging_dir=str(Path(config.output_dir, "logs"))
        ),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_GROUP_TIMEOUT)],
    )
    check_strategy(accelerator)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
        set_cpu_threads(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), config.cpu_threads)
    if accelerator.distributed_type == DistributedType.FSDP:
        # Otherwise accelerate keeps full gradients, in half precision, on every process until the last batch.
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        # accelerate would silently train in single precision.
        raise ValueError("--mixed_precision is fp16, which is not supported for training on a CPU; use bf16 or no")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    return accelerator


def _check_trackers(names: list[str]) -> None:
    """Raise ValueError for a tracker that is unknown or not installed, which accelerate leaves out silently."""
    known, installed = [*map(str, LOGGER_TYPE_TO_CLASS)], [*map(str, get_available_trackers())]
    for name in names:
        if name not in ("all", *known):
            raise ValueError(f"--report_to is {name!r}; it must be one of {', '.join(['all', *known])}")
        if name not in ("all", *installed):
            raise ValueError(f"--report_to is {name!r}, which is not installed: pip install {name.replace('_', '-')}")


def describe_device(accelerator: Accelerator) -> str:
    """One line for the start of a run: processes, and what each computes on."""
    device = accelerator.device
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type != "cpu":
        name = device.type
    return f"device: {accelerator.num_processes} x {name}"


def open_data(config: TrainingConfig, state: Accelerator | PartialState) -> tuple[ImageData, ImageData | None]:
    """The pictures to train on, and the held-out ones if there are any."""
    options: dict[str, Any] = {
        "dataset_name": config.dataset_name,
        "dataset_config_name": config.dataset_config_name,
        "dataset_revision": config.dataset_revision,
        "image_column": config.image_column,
        "label_column": config.label_column,
        "class_conditional": config.class_conditional,
        "background": config.background,
        "resolution": config.resolution,
        "streaming": config.streaming,
        "on_bad_image": config.on_bad_image,
        "num_workers": config.dataloader_num_workers,
        "cache_dir": config.cache_dir,
        "seed": config.seed,
    }
    # One process of each machine decodes; the others then read its result from the cache.
    with state.local_main_process_first():
        # Listed once, for both splits.
        folder = None if config.train_data_dir is None else list_folder(config.train_data_dir)
        options["train_data_dir"] = folder
        data = open_images(split=config.split, image_mode=config.image_mode, center_crop=config.center_crop, **options)
        validation = None
        if config.validation_split is not None:
            held_out = {**options, "id2label": data.id2label, "center_crop": True, "image_mode": data.mode}
            held_out |= {"resolution": (data.height, data.width), "class_conditional": data.id2label is not None}
            validation = open_images(split=config.validation_split, **held_out)
            data.notes = list(dict.fromkeys([*data.notes, *validation.notes]))
            if folder is not None and (both := overlap(config.split, config.validation_split, len(folder.pictures))):
                data.notes.append(
                    f"{both:,} pictures of --validation_split are trained on too; --split may exclude them"
                )
    return data, validation


def build_scheduler(config: TrainingConfig) -> CustomDDPMScheduler:
    """The noise scheduler. A schedule given by a range of β keeps the shape that it has at T = 1000 for any T."""
    return _make_scheduler(
        config.ddpm_beta_schedule,
        config.ddpm_num_steps,
        config.prediction_type,
        config.variance_type,
        config.rescale_betas_zero_snr,
    )


def _make_scheduler(
    schedule: str, num_steps: int, prediction_type: str, variance_type: str, zero_snr: bool
) -> CustomDDPMScheduler:
    trained_betas = None
    if num_steps != 1000 and schedule in BETA_RANGES:
        trained_betas = resample_betas(make_betas(schedule), num_steps).tolist()
    return CustomDDPMScheduler(
        num_train_timesteps=num_steps,
        beta_schedule=schedule,
        trained_betas=trained_betas,
        prediction_type=prediction_type,
        variance_type=variance_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing",  # with fewer steps than T, sampling starts at T−1, where the noise does
    )


def _sample_size(data: ImageData) -> int | tuple[int, int]:
    return data.height if data.height == data.width else (data.height, data.width)


def build_unet(config: TrainingConfig, data: ImageData) -> CustomUNet2DModel:
    """A new U-Net; by default with attention at levels of 16x16 positions or less, as in the paper."""
    height, width, attended = data.height, data.width, 16
    down_block_types = config.down_block_types or [
        "AttnDownBlock2D" if max(height, width) / (config.patch_size * 2**level) <= attended else "DownBlock2D"
        for level in range(len(config.block_out_channels))
    ]
    learned = config.variance_type in ("learned", "learned_range")
    return CustomUNet2DModel(
        sample_size=_sample_size(data),
        in_channels=data.channels,
        out_channels=data.channels * (2 if learned else 1),
        block_out_channels=tuple(config.block_out_channels),
        down_block_types=tuple(down_block_types),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down_block_types)),
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        resnet_time_scale_shift=config.resnet_time_scale_shift,
        dropout=config.dropout,
        num_class_embeds=None if data.id2label is None else len(data.id2label) + (config.label_dropout > 0),
        patch_size=config.patch_size,
    )


def build_ema(config: TrainingConfig, parameters: Iterable[torch.nn.Parameter]) -> EMAModel:
    """The average of the weights: decay 1 - (1 + step/inv_gamma)^-power, at most ema_max_decay."""
    return EMAModel(
        parameters,
        decay=config.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=config.ema_inv_gamma,
        power=config.ema_power,
        foreach=True,
    )


def build_model(
    config: TrainingConfig, data: ImageData, device: str = "cpu", sharded: bool = False
) -> tuple[TrainingConfig, CustomUNet2DModel, CustomDDPMScheduler]:
    """The U-Net and the noise scheduler that training starts from: new ones, or those of --init_from.

    Args:
        config: settings of the run; those that are None are chosen here.
        data: the pictures.
        device: type of the device.
        sharded: whether the weights will be sharded.

    Returns:
        The configuration, with the settings of the model of --init_from and those of the recipe, so that what is
        recorded is what is used; the U-Net; the noise scheduler.

    Raises:
        ValueError: the pipeline of --init_from does not fit the pictures or contradicts the flags; Muon with shards.
    """
    if sharded and config.optimizer == "muon":
        raise ValueError("--optimizer muon needs whole weights, and FSDP shards them: use --optimizer adamw")
    num_classes = None if data.id2label is None else len(data.id2label)
    facts = Facts(data.height, data.width, num_classes, device, sharded, data.num_images)
    if config.init_from is None:
        config = complete(config, facts)
        return config, build_unet(config, data), build_scheduler(config)
    pipeline = CustomDDPMPipeline.from_pretrained(config.init_from)
    try:
        config = complete(_with_settings_of(pipeline, config), facts)
        _check_fit(pipeline, config, data)
    except ValueError as error:
        raise ValueError(f"--init_from {config.init_from}: {error}") from None
    pipeline.unet.register_to_config(sample_size=_sample_size(data))
    # What `custom-ddpm tune` measured holds for the former weights only.
    scheduler = CustomDDPMScheduler.from_config(pipeline.scheduler.config, tuned=None, prediction_errors=None)
    return config, pipeline.unet, scheduler


def _with_settings_of(pipeline: CustomDDPMPipeline, config: TrainingConfig) -> TrainingConfig:
    """The configuration with the model's settings where flags are at their defaults; ValueError where others differ."""
    scheduler: Any = pipeline.scheduler
    if not isinstance(scheduler, CustomDDPMScheduler):
        raise ValueError(f"its scheduler is a {type(scheduler).__name__}; training needs a CustomDDPMScheduler")
    unet, noise = pipeline.unet.config, scheduler.config
    settings = {
        "block_out_channels": list(unet.block_out_channels),
        "down_block_types": list(unet.down_block_types),
        "layers_per_block": unet.layers_per_block,
        "attention_head_dim": unet.attention_head_dim,
        "norm_num_groups": unet.norm_num_groups,
        "patch_size": pipeline.unet.patch_size,
        "resnet_time_scale_shift": unet.resnet_time_scale_shift,
        "dropout": unet.dropout,
        "ddpm_num_steps": noise.num_train_timesteps,
        "rescale_betas_zero_snr": noise.rescale_betas_zero_snr,
        "prediction_type": noise.prediction_type,
        "variance_type": noise.variance_type,
    }
    settings["ddpm_beta_schedule"] = _schedule_name(scheduler)
    defaults = vars(TrainingConfig())
    for name, value in settings.items():
        given = getattr(config, name)
        if given not in (value, defaults[name]):
            raise ValueError(f"--{name} is {given!r}; the model of --init_from has {value!r}")
    return dataclasses.replace(config, **settings)


def _schedule_name(scheduler: CustomDDPMScheduler) -> str:
    """The --ddpm_beta_schedule that gives the ᾱ of a scheduler.

    Raises:
        ValueError: there is none.
    """
    noise = scheduler.config
    # A name that others repeat (the range of β may be another, and T) is tried first.
    for name in dict.fromkeys([noise.beta_schedule, *BETA_SCHEDULES]):
        named = _make_scheduler(
            name, noise.num_train_timesteps, noise.prediction_type, "fixed_small", noise.rescale_betas_zero_snr
        )
        if torch.allclose(named.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-5, atol=0):
            return name
    raise ValueError(
        f"its noise schedule is none that --ddpm_beta_schedule names at T = {noise.num_train_timesteps}: "
        f"{', '.join(BETA_SCHEDULES)}"
    )


def _check_fit(pipeline: CustomDDPMPipeline, config: TrainingConfig, data: ImageData) -> None:
    """Raise ValueError if channels or classes of a pipeline are not those of the pictures and flags."""
    with torch.device("meta"):  # only its configuration is needed
        needed = build_unet(config, data).config
    for name in ("in_channels", "out_channels", "num_class_embeds"):
        if pipeline.unet.config[name] != needed[name]:
            raise ValueError(
                f"its {name} is {pipeline.unet.config[name]}, these pictures and flags need {needed[name]}"
            )
    names = pipeline.config.id2label
    if names and data.id2label and names != data.id2label:
        own, theirs = (", ".join(labels[i] for i in sorted(labels)) for labels in (names, data.id2label))
        raise ValueError(f"its classes are {own}; the pictures' are {theirs}")


def build_optimizer(config: TrainingConfig, unet: CustomUNet2DModel) -> torch.optim.Optimizer:
    """AdamW or Muon; fused, because only a fused optimiser can skip a step without the host waiting for the device."""
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
        "fused": True,
    }
    if config.optimizer == "muon":
        return Muon(unet.named_parameters(), **options)
    return torch.optim.AdamW(unet.parameters(), **options)


def build_loss(config: TrainingConfig) -> Loss:
    """The loss of `training_steps`."""
    return partial(
        diffusion_loss,
        loss_type=config.loss_type,
        loss_weighting=config.loss_weighting,
        snr_gamma=config.snr_gamma,
    )
