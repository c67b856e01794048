"""Building a training run from its configuration. The loop and what runs beside it get the built objects only."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from diffusers.optimization import get_scheduler
from transformers.optimization import get_wsd_schedule

from ..config import TrainingConfig
from ..data.base import ImageData
from ..evaluation.records import CONFIG_FILE
from ..hub.push import BackgroundPush
from ..likelihood import ImportanceSampler
from ..messages import one_line
from ..recipe import before_data, complete_length
from ..sampling import fast_sampler
from ..scheduler import CustomDDPMScheduler
from ..unet import CustomUNet2DModel
from .budget import choose_threads, plan, seconds_per_step
from .checkpoint import delete_checkpoint, differing_settings, find_checkpoint
from .ema import PostHocEMA
from .launch import command_line, get_logger, threads_were_chosen
from .loop import Loss
from .metrics import MetricsLogger
from .parts import build_ema, build_loss, build_model, build_optimizer, describe_device, open_data
from .preview import Preview
from .scores import Scores, build_scores
from .sharding import local_part
from .state import TrainingState, find_problem
from .terminal import show_grid

logger = get_logger(__name__)

# Settings that must be those of the checkpoint that a run resumes from, besides the dataset.
FIXED_SETTINGS = (
    "resolution block_out_channels patch_size down_block_types layers_per_block attention_head_dim norm_num_groups "
    "class_conditional label_dropout ddpm_num_steps ddpm_beta_schedule rescale_betas_zero_snr prediction_type "
    "variance_type timestep_sampling optimizer use_ema posthoc_ema_steps init_from seed"
).split()
# What runs had before there were these settings; their checkpoints do not hold them.
FORMER_SETTINGS = {"patch_size": 1, "resnet_time_scale_shift": "default", "optimizer": "adamw", "augment_share": 0.0}
UNCOMPARED_SETTINGS = ("output_dir", "resume_from_checkpoint", "preview")  # may differ at every start

DECAY = 0.4  # share of the run in which warmup_stable_decay falls linearly to zero

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
    first_step: int  # optimiser steps done before this start; 0 for a new run
    first_sample: int  # pictures seen before this start
    max_train_steps: int  # optimiser steps of the whole run
    loop_options: dict[str, Any]  # further arguments of `training_steps`
    metrics: MetricsLogger
    preview: Preview
    scores: Scores | None  # metrics of drawn pictures, with --eval_steps
    settings: dict[str, Any]  # stored in the metadata of each checkpoint
    # Optimiser steps between checkpoints, sample grids, evaluations, post-hoc snapshots, lines of metrics.
    checkpointing_steps: int
    save_images_steps: int
    eval_steps: int | None
    posthoc_ema_steps: int | None
    logging_steps: int
    checkpoints_total_limit: int | None
    max_train_time: float | None  # minutes

    @property
    def global_batch(self) -> int:
        """Pictures in an optimiser step, over all processes."""
        return self.batch_size * self.accelerator.num_processes * self.accelerator.gradient_accumulation_steps


def _apply_memory_settings(
    config: TrainingConfig, unet: CustomUNet2DModel, accelerator: Accelerator
) -> torch.memory_format:
    """Apply the settings for memory and speed to the U-Net; returns the memory layout of its inputs."""
    logger.info(f"network: {sum(weight.numel() for weight in unet.parameters()):,} parameters")
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    if not _is_sharded(accelerator):  # FSDP needs contiguous weights
        unet.to(memory_format=memory_format)
    if config.torch_compile:
        # In place, so that parameter names get no prefix; one compilation per input shape, of which there are few.
        unet.compile(dynamic=False)
    return memory_format


def _max_train_steps(config: TrainingConfig, data: ImageData, global_batch: int, step: int, samples_seen: int) -> int:
    """Optimiser steps of the whole run: --max_train_steps, or what completes --num_epochs at this batch size."""
    if data.num_images is not None and config.train_batch_size > data.num_images:
        logger.warning(
            f"--train_batch_size is {config.train_batch_size} and there are {data.num_images} pictures: every batch "
            "has pictures more than once"
        )
    if config.max_train_steps is not None:
        return config.max_train_steps
    if data.num_images is None:
        raise ValueError("--max_train_steps is needed with --streaming: the length of a stream is not known")
    assert config.num_epochs is not None  # one of the three lengths is given, or chosen
    return step + math.ceil((config.num_epochs * data.num_images - samples_seen) / global_batch)


def _build_lr_scheduler(config: TrainingConfig, optimizer: torch.optim.Optimizer, max_train_steps: int) -> Any:
    """The learning rate schedule; not prepared by accelerate, which would step it once for every process."""
    warmup = config.lr_warmup_steps
    if config.lr_scheduler != "constant" and max_train_steps <= warmup:
        logger.warning(
            f"--lr_warmup_steps is {warmup} and the run has {max_train_steps} steps: the learning rate never comes to "
            f"--learning_rate, {config.learning_rate:g}"
        )
    if config.lr_scheduler == "warmup_stable_decay":
        decay = min(math.ceil(DECAY * max_train_steps), max(0, max_train_steps - warmup))
        return get_wsd_schedule(optimizer, warmup, decay, max_train_steps, decay_type="linear")
    return get_scheduler(config.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=max_train_steps)


def _record(config: TrainingConfig, settings: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Write the settings of the run to its folder and its trackers."""
    if accelerator.is_main_process:
        Path(config.output_dir, CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
    accelerator.init_trackers("custom_ddpm", config={name: str(value) for name, value in settings.items()})


def _with_choices_of(config: TrainingConfig, metadata: Mapping[str, Any], num_processes: int = 1) -> TrainingConfig:
    """The settings that are not given as the checkpoint's run had them: another machine would choose others."""
    saved = metadata.get("settings")
    saved = {**FORMER_SETTINGS, **saved} if isinstance(saved, dict) else {}
    names = ["down_block_types", *(each.name for each in dataclasses.fields(config) if each.metadata["by_recipe"])]
    if num_processes == 1 and not threads_were_chosen():
        names.append("cpu_threads")  # with others the sums of floating point numbers are others
    if config.time_budget is config.max_train_steps is config.num_epochs is None:
        names += ["time_budget", "max_train_steps", "num_epochs"]
    elif config.time_budget is not None and config.time_budget == saved.get("time_budget"):
        names.append("max_train_steps")
    found = {name: saved[name] for name in names if getattr(config, name) is None and saved.get(name) is not None}
    if saved and "recipe" not in saved:
        found["recipe"] = "stock"  # its values were the defaults before there were recipes
    return dataclasses.replace(config, **found)


def _is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def build_run(config: TrainingConfig, accelerator: Accelerator, resumed: Resumed | None) -> Run:
    """Build everything that a run consists of. The output folder must be locked.

    Args:
        config: settings of the run.
        accelerator: from `build_accelerator`.
        resumed: checkpoint to resume from and its metadata; None for a new run.

    Raises:
        ValueError, OSError: invalid settings, data or checkpoint; one line, before the first step.
    """
    config = before_data(_with_choices_of(config, {} if resumed is None else resumed[1], accelerator.num_processes))
    data, validation_data = open_data(config, accelerator)
    logger.info(f"{describe_device(accelerator)}\n{data.describe()}")
    torch.manual_seed(config.seed)
    config, unet, scheduler = build_model(config, data, accelerator.device.type, _is_sharded(accelerator))
    memory_format = _apply_memory_settings(config, unet, accelerator)

    sampler = _build_sampler(config, len(scheduler), accelerator)
    global_batch = config.train_batch_size * accelerator.num_processes * config.gradient_accumulation_steps
    facts = {"dataset": data.fingerprint, "global_batch": global_batch}
    resumed = _usable_checkpoint(resumed, config, facts, unet, sampler, accelerator)
    first_step, first_sample = (resumed[1]["step"], resumed[1]["samples_seen"]) if resumed else (0, 0)
    optimizer = build_optimizer(config, unet)
    model, prepared_optimizer = accelerator.prepare(unet, optimizer)
    loss, loop_options = build_loss(config), _loop_options(config, data, sampler, memory_format)
    parts = (model, scheduler, prepared_optimizer, data, accelerator, loss, config.train_batch_size, loop_options)
    config = choose_threads(config, accelerator, resumed is not None, *parts)
    if config.max_train_steps is None and config.time_budget is not None:
        config = plan(config, seconds_per_step(*parts), accelerator, first_step)
    max_train_steps = _max_train_steps(config, data, global_batch, first_step, first_sample)
    config = complete_length(config, max_train_steps)
    settings = {**dataclasses.asdict(config), **facts}
    lr_scheduler = _build_lr_scheduler(config, optimizer, max_train_steps)
    state = _build_state(config, accelerator, unet, optimizer, sampler)
    _resume(resumed, settings, state, lr_scheduler)
    _record(config, settings, accelerator)
    output_dir = Path(config.output_dir)
    metrics = MetricsLogger(accelerator, output_dir, len(scheduler), first_step, max_train_steps, global_batch)
    return Run(
        output_dir=output_dir,
        accelerator=accelerator,
        model=model,
        optimizer=prepared_optimizer,
        scheduler=scheduler,
        lr_scheduler=lr_scheduler,
        loss=loss,
        state=state,
        data=data,
        batch_size=config.train_batch_size,
        first_step=first_step,
        first_sample=first_sample,
        max_train_steps=max_train_steps,
        loop_options=loop_options,
        metrics=metrics,
        preview=_build_preview(config, accelerator, state, scheduler, metrics, data, validation_data),
        scores=build_scores(config, state, scheduler, metrics, data, validation_data),
        settings=settings,
        **{name: getattr(config, name) for name in INTERVAL_SETTINGS},
    )


# Settings that `Run` takes over by name.
INTERVAL_SETTINGS = (
    "checkpointing_steps save_images_steps eval_steps posthoc_ema_steps logging_steps checkpoints_total_limit "
    "max_train_time"
).split()


def _build_state(
    config: TrainingConfig,
    accelerator: Accelerator,
    unet: CustomUNet2DModel,
    optimizer: torch.optim.Optimizer,
    sampler: ImportanceSampler | None,
) -> TrainingState:
    weights = [local_part(weight) for weight in unet.parameters()]
    return TrainingState(
        accelerator,
        unet,
        optimizer,
        ema=build_ema(config, weights) if config.use_ema else None,
        posthoc_ema=None if config.posthoc_ema_steps is None else PostHocEMA(weights),
        sampler=sampler,
    )


def _build_sampler(config: TrainingConfig, T: int, accelerator: Accelerator) -> ImportanceSampler | None:
    """What draws the timesteps, if they are not uniform."""
    return ImportanceSampler(T).to(accelerator.device) if config.timestep_sampling == "importance" else None


def _loop_options(
    config: TrainingConfig, data: ImageData, sampler: ImportanceSampler | None, memory_format: torch.memory_format
) -> dict[str, Any]:
    if config.augment_share:
        logger.info(
            f"--augment_share {config.augment_share:g}: in that share of the run, from its start, pictures are "
            "mirrored, shifted and scaled at random; 0 leaves it out"
        )
    return {
        "seed": config.seed,
        "timestep_sampler": sampler,
        "stratified": config.timestep_sampling == "stratified",
        "random_flip": config.random_flip,
        "augment_share": config.augment_share,
        "label_dropout": config.label_dropout,
        "null_label": len(data.id2label or ()),
        "max_grad_norm": config.max_grad_norm,
        "memory_format": memory_format,
    }


def _usable_checkpoint(
    resumed: Resumed | None,
    config: TrainingConfig,
    facts: dict[str, Any],
    unet: CustomUNet2DModel,
    sampler: ImportanceSampler | None,
    accelerator: Accelerator,
) -> Resumed | None:
    """The checkpoint to resume from, chosen by the main process; see `_first_usable`. None for a new run.

    Raises:
        ValueError: on all processes: the checkpoint belongs to a run with other settings, or none fits the model.
    """
    if resumed is None:
        return None
    settings = {**dataclasses.asdict(config), **facts}
    choice: list[Any] = [None, None]  # a checkpoint, or what is wrong
    if accelerator.is_main_process:
        try:
            choice[0] = _first_usable(resumed, config, settings, unet, sampler)
        except (OSError, ValueError) as error:
            choice[1] = one_line(error)
    resumed, problem = broadcast_object_list(choice)
    if problem is not None:
        raise ValueError(problem)
    return resumed


def _first_usable(
    resumed: Resumed | None,
    config: TrainingConfig,
    settings: dict[str, Any],
    unet: CustomUNet2DModel,
    sampler: ImportanceSampler | None,
) -> Resumed:
    """The given checkpoint or, if it does not fit the model, the latest before it that does."""
    while resumed is not None:
        path, metadata = resumed
        problem = None
        if not isinstance(metadata.get("settings"), dict) or type(metadata.get("samples_seen")) is not int:
            problem = "metadata.json holds no settings"
        elif differing := differing_settings(
            {**FORMER_SETTINGS, **metadata["settings"]}, settings, [*FIXED_SETTINGS, "dataset"]
        ):
            raise ValueError(f"{path} belongs to a run with other settings: {'; '.join(differing)}")
        problem = problem or find_problem(path, unet, config.use_ema, config.posthoc_ema_steps is not None, sampler)
        if problem is None:
            return resumed
        if config.resume_from_checkpoint != "latest":
            raise ValueError(f"{path} cannot be resumed from: {problem}")
        logger.warning(f"{path} cannot be resumed from ({problem}): deleting it, and taking the one before")
        delete_checkpoint(path)
        resumed = find_checkpoint(config.output_dir, before=metadata["step"])
    raise ValueError(f"no checkpoint in {config.output_dir} can be resumed from: choose another output folder")


def _resume(resumed: Resumed | None, settings: dict[str, Any], state: TrainingState, lr_scheduler: Any) -> None:
    """Restore the state of a checkpoint, if there is one, and tell which settings have changed."""
    if resumed is None:
        return
    path, metadata = resumed
    free = settings.keys() - {*FIXED_SETTINGS, "dataset", *UNCOMPARED_SETTINGS}
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
        sampler=scheduler if config.preview_sampler == "ddpm" else fast_sampler(scheduler),
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
        show=show_grid if config.preview == "terminal" else None,
    )
