"""Building a training run from its configuration. The rest of the package gets built objects, not the configuration."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from ..config import TrainingConfig
from ..data.base import ImageData
from ..data.folder import list_folder
from ..data.folder_dataset import overlap
from ..data.sources import open_images
from ..hub.push import BackgroundPush
from ..objective import ImportanceSampler, diffusion_loss
from ..pipelines import CustomDDPMPipeline
from ..scheduler import CustomDDPMScheduler
from ..schedules import BETA_RANGES, make_betas, resample_betas
from ..unet import CustomUNet2DModel
from .checkpoint import differing_settings
from .ema import PostHocEMA
from .launch import command_line
from .loop import Loss
from .metrics import MetricsLogger
from .preview import Preview
from .sharding import check_strategy, local_part
from .state import TrainingState

logger = get_logger(__name__, log_level="INFO")

CONFIG_FILE = "training_config.yaml"
# Settings that must be those of the checkpoint that a run resumes from, besides the dataset.
FIXED_SETTINGS = (
    "resolution block_out_channels down_block_types layers_per_block attention_head_dim norm_num_groups "
    "class_conditional label_dropout ddpm_num_steps ddpm_beta_schedule rescale_betas_zero_snr prediction_type "
    "variance_type timestep_sampling use_ema posthoc_ema_steps init_from seed"
).split()
OWN_SETTINGS = ("output_dir", "resume_from_checkpoint")  # those that belong to one start of a run
PATIENCE = timedelta(hours=6)  # that processes wait for one that decodes a large dataset or writes a large checkpoint

Resumed = tuple[Path, dict[str, Any]]  # a checkpoint and its metadata


@dataclass
class Run:
    """The parts of a training run, built and, if it is resumed, with the state of the checkpoint."""

    output_dir: Path
    accelerator: Accelerator
    model: Any  # the U-Net as accelerate has wrapped it
    optimizer: Any  # as accelerate has wrapped it
    scheduler: CustomDDPMScheduler
    lr_scheduler: Any
    loss: Loss
    state: TrainingState
    data: ImageData
    batch_size: int  # pictures in a batch of one process
    first_step: int  # optimiser steps done before
    first_sample: int  # pictures seen before
    max_train_steps: int  # optimiser steps of the whole run
    loop_options: dict[str, Any]  # further arguments of `training_steps`
    metrics: MetricsLogger
    preview: Preview
    settings: dict[str, Any]  # what the metadata of checkpoints record
    # Optimiser steps between checkpoints, sample grids, snapshots of the post-hoc averages, lines of metrics.
    checkpointing_steps: int
    save_images_steps: int
    posthoc_ema_steps: int | None
    logging_steps: int
    checkpoints_total_limit: int | None
    max_train_time: float | None  # minutes

    @property
    def global_batch(self) -> int:
        """Pictures in an optimiser step, over all processes."""
        return self.batch_size * self.accelerator.num_processes * self.accelerator.gradient_accumulation_steps


# ---- parts ----


def build_accelerator(config: TrainingConfig) -> Accelerator:
    """The accelerator of a run, with the processes and devices that it was launched on.

    Raises:
        ValueError: accelerate is configured for something that is not supported.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to or None,
        project_config=ProjectConfiguration(
            project_dir=config.output_dir, logging_dir=str(Path(config.output_dir, "logs"))
        ),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    check_strategy(accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        # Otherwise accelerate keeps full gradients, in half precision, on every process until the last batch.
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        # accelerate would silently train in single precision.
        raise ValueError("--mixed_precision is fp16, which a CPU has no training for; it must be bf16 or no")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    return accelerator


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
        "resolution": config.resolution if len(config.resolution) == 2 else config.resolution[0],
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
            validation = open_images(split=config.validation_split, **held_out)
            data.notes = list(dict.fromkeys([*data.notes, *validation.notes]))
            if folder is not None and (both := overlap(config.split, config.validation_split, len(folder.pictures))):
                data.notes.append(
                    f"{both:,} pictures of --validation_split are trained on too; --split may exclude them"
                )
    return data, validation


def build_scheduler(config: TrainingConfig) -> CustomDDPMScheduler:
    """The noise scheduler. A schedule given by a range of β keeps the shape that it has at T = 1000 for any T."""
    trained_betas = None
    if config.ddpm_num_steps != 1000 and config.ddpm_beta_schedule in BETA_RANGES:
        trained_betas = resample_betas(make_betas(config.ddpm_beta_schedule), config.ddpm_num_steps).tolist()
    return CustomDDPMScheduler(
        num_train_timesteps=config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        trained_betas=trained_betas,
        prediction_type=config.prediction_type,
        variance_type=config.variance_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
    )


def build_unet(config: TrainingConfig, data: ImageData) -> CustomUNet2DModel:
    """A new U-Net; by default with attention at levels of 16x16 pixels or less, as in the paper."""
    height, width = data.height, data.width
    down_block_types = config.down_block_types or [
        "AttnDownBlock2D" if max(height, width) / 2**level <= 16 else "DownBlock2D"
        for level in range(len(config.block_out_channels))
    ]
    learned = config.variance_type in ("learned", "learned_range")
    return CustomUNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=data.channels,
        out_channels=data.channels * (2 if learned else 1),
        block_out_channels=tuple(config.block_out_channels),
        down_block_types=tuple(down_block_types),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down_block_types)),
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        dropout=config.dropout,
        num_class_embeds=None if data.id2label is None else len(data.id2label) + (config.label_dropout > 0),
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


def build_model(config: TrainingConfig, data: ImageData) -> tuple[CustomUNet2DModel, CustomDDPMScheduler]:
    """The U-Net and the noise scheduler that training starts from: new ones, or those of --init_from.

    Raises:
        ValueError: the pipeline of --init_from does not fit the pictures or the flags.
    """
    if config.init_from is None:
        return build_unet(config, data), build_scheduler(config)
    pipeline = CustomDDPMPipeline.from_pretrained(config.init_from)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    needed = build_unet(config, data).config
    for name in ("in_channels", "out_channels", "num_class_embeds"):
        if unet.config[name] != needed[name]:
            raise ValueError(
                f"--init_from {config.init_from}: its {name} is {unet.config[name]}, these pictures and flags need "
                f"{needed[name]}"
            )
    wanted = {
        "ddpm_num_steps": scheduler.config.num_train_timesteps,
        "prediction_type": scheduler.config.prediction_type,
        "variance_type": scheduler.config.variance_type,
    }
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(f"--{name} is {getattr(config, name)!r}; the model of --init_from was made with {value!r}")
    unet.register_to_config(sample_size=needed.sample_size)
    return unet, scheduler


def build_optimizer(config: TrainingConfig, unet: CustomUNet2DModel) -> torch.optim.Optimizer:
    """AdamW; fused, because only a fused optimiser can skip a step without the host waiting for the device."""
    return torch.optim.AdamW(
        unet.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )


def _place(config: TrainingConfig, unet: CustomUNet2DModel, accelerator: Accelerator) -> torch.memory_format:
    """Apply the settings for memory and speed to the U-Net; returns the memory layout of its inputs."""
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    if accelerator.distributed_type != DistributedType.FSDP:  # which needs contiguous weights
        unet.to(memory_format=memory_format)
    if config.torch_compile:
        # In place, so that the weights keep their names; once per shape, of which there are few.
        unet.compile(dynamic=False)
    return memory_format


def _max_train_steps(config: TrainingConfig, data: ImageData, global_batch: int, step: int, samples_seen: int) -> int:
    """Optimiser steps of the whole run: --max_train_steps, or what --num_epochs leaves to do at the present batch."""
    if config.max_train_steps is not None:
        return config.max_train_steps
    if data.num_images is None:
        raise ValueError("--max_train_steps is needed with --streaming: the length of a stream is not known")
    return step + math.ceil((config.num_epochs * data.num_images - samples_seen) / global_batch)


# ---- the whole ----


def build_run(config: TrainingConfig, accelerator: Accelerator, resumed: Resumed | None) -> Run:
    """Build everything that a run consists of, in an output folder that is locked.

    Args:
        config: settings of the run.
        accelerator: from `build_accelerator`.
        resumed: checkpoint to resume from and its metadata; None for a new run.

    Raises:
        ValueError, OSError: something does not fit; one line, before the first step.
    """
    data, validation_data = open_data(config, accelerator)
    logger.info(data.describe())
    torch.manual_seed(config.seed)
    unet, scheduler = build_model(config, data)
    memory_format = _place(config, unet, accelerator)

    first_step, first_sample = (resumed[1]["step"], resumed[1]["samples_seen"]) if resumed else (0, 0)
    global_batch = config.train_batch_size * accelerator.num_processes * config.gradient_accumulation_steps
    max_train_steps = _max_train_steps(config, data, global_batch, first_step, first_sample)
    optimizer = build_optimizer(config, unet)
    # Not prepared by accelerate, which would step it once for every process.
    lr_scheduler = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=max_train_steps
    )
    model, prepared_optimizer = accelerator.prepare(unet, optimizer)
    state = _build_state(config, accelerator, unet, optimizer, len(scheduler))
    settings = {**dataclasses.asdict(config), "dataset": data.fingerprint, "global_batch": global_batch}
    if resumed is not None:
        _resume(resumed, settings, state, lr_scheduler)
    if accelerator.is_main_process:
        Path(config.output_dir, CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
    accelerator.init_trackers("custom_ddpm", config={name: str(value) for name, value in settings.items()})
    metrics = MetricsLogger(
        accelerator, Path(config.output_dir), len(scheduler), first_step, max_train_steps, global_batch
    )
    return Run(
        output_dir=Path(config.output_dir),
        accelerator=accelerator,
        model=model,
        optimizer=prepared_optimizer,
        scheduler=scheduler,
        lr_scheduler=lr_scheduler,
        loss=_build_loss(config),
        state=state,
        data=data,
        batch_size=config.train_batch_size,
        first_step=first_step,
        first_sample=first_sample,
        max_train_steps=max_train_steps,
        loop_options=_loop_options(config, data, state, memory_format),
        metrics=metrics,
        preview=_build_preview(config, accelerator, state, scheduler, metrics, data, validation_data),
        settings=settings,
        **{name: getattr(config, name) for name in SCHEDULE_SETTINGS},
    )


# Settings that `Run` takes over by name.
SCHEDULE_SETTINGS = (
    "checkpointing_steps save_images_steps posthoc_ema_steps logging_steps checkpoints_total_limit max_train_time"
).split()


def _build_state(
    config: TrainingConfig,
    accelerator: Accelerator,
    unet: CustomUNet2DModel,
    optimizer: torch.optim.Optimizer,
    num_train_timesteps: int,
) -> TrainingState:
    weights = [local_part(weight) for weight in unet.parameters()]
    importance = config.timestep_sampling == "importance"
    return TrainingState(
        accelerator,
        unet,
        optimizer,
        ema=build_ema(config, weights) if config.use_ema else None,
        posthoc_ema=None if config.posthoc_ema_steps is None else PostHocEMA(weights),
        sampler=ImportanceSampler(num_train_timesteps).to(accelerator.device) if importance else None,
    )


def _build_loss(config: TrainingConfig) -> Loss:
    return partial(
        diffusion_loss,
        loss_type=config.loss_type,
        loss_weighting=config.loss_weighting,
        snr_gamma=config.snr_gamma,
    )


def _loop_options(
    config: TrainingConfig, data: ImageData, state: TrainingState, memory_format: torch.memory_format
) -> dict[str, Any]:
    return {
        "seed": config.seed,
        "timestep_sampler": state.sampler,
        "random_flip": config.random_flip,
        "label_dropout": config.label_dropout,
        "null_label": len(data.id2label or ()),
        "max_grad_norm": config.max_grad_norm,
        "memory_format": memory_format,
    }


def _resume(resumed: Resumed, settings: dict[str, Any], state: TrainingState, lr_scheduler: Any) -> None:
    """Restore the state of a checkpoint, if its settings allow it."""
    path, metadata = resumed
    fixed, free = [*FIXED_SETTINGS, "dataset"], settings.keys() - {*FIXED_SETTINGS, "dataset", *OWN_SETTINGS}
    if differing := differing_settings(metadata["settings"], settings, fixed):
        raise ValueError(f"{path} is of another run: {'; '.join(differing)}")
    for line in differing_settings(metadata["settings"], settings, sorted(free)):
        logger.warning(f"changed since {path.name}: {line}")
    state.load(path, metadata)
    step = metadata["step"]
    lr_scheduler.last_epoch = step
    for group, base_lr, factor in zip(
        state.optimizer.param_groups, lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base_lr * factor(step)
    logger.info(f"resumed from {path} at step {step}")


def _build_preview(
    config: TrainingConfig,
    accelerator: Accelerator,
    state: TrainingState,
    scheduler: CustomDDPMScheduler,
    metrics: MetricsLogger,
    data: ImageData,
    validation_data: ImageData | None,
) -> Preview:
    sampling_options: dict[str, Any] = {"num_inference_steps": config.ddpm_num_inference_steps}
    if data.id2label:
        sampling_options["guidance_scale"] = config.guidance_scale
    output_dir = Path(config.output_dir)
    push = None
    if config.push_to_hub:
        push = BackgroundPush(config.hub_model_id or output_dir.resolve().name, config.hub_private_repo or None)
    recipe = {"num_processes": accelerator.num_processes, "device": accelerator.device.type}
    return Preview(
        accelerator=accelerator,
        state=state,
        scheduler=scheduler,
        metrics=metrics,
        output_dir=output_dir,
        id2label=data.id2label,
        seeds=[config.seed + i for i in range(config.eval_batch_size)],
        batch_size=config.train_batch_size,
        sampling_options=sampling_options,
        validation_data=validation_data,
        facts={
            "dataset": config.dataset_name or config.train_data_dir,
            "base_model": config.init_from,
            "num_images": data.num_images,
            "recipe": {**dataclasses.asdict(config), **recipe},
            "command": command_line(),
        },
        push=push,
    )
