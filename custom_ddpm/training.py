"""Training: Algorithm 1 (T2) on Accelerate.

The loop of `train_from` is the algorithm: draw, noise, predict, weigh, step. What hangs off it has a name: `state.py`
and `checkpoint.py` save, `journal.py` tells, `sampling.py` shows.

Randomness is a function of (seed, step, position in the global batch) and of nothing else. So a run is the same on one
process with two batches a step as on two processes with one, and an interrupted run goes on as if it had not been.
"""

import dataclasses
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from .checkpoint import claim_output_dir, differing_settings, find_checkpoint, list_checkpoints, save_checkpoint
from .config import TrainingConfig
from .data import ImageData, normalise, open_images
from .hub import BackgroundPush, write_model_card
from .journal import Journal, read_metrics
from .launch import launcher_pid
from .likelihood import ImportanceSampler
from .objective import diffusion_loss
from .pipelines import CustomDDPMPipeline
from .posthoc_ema import PostHocEMA
from .sampling import image_grid, sample_images
from .scheduler import CustomDDPMScheduler
from .schedules import BETA_RANGES, make_betas, resample_betas
from .sharding import check_strategy, local_part, whole
from .state import TrainingState
from .unet import CustomUNet2DModel

logger = get_logger(__name__, log_level="INFO")

CONFIG_FILE = "training_config.yaml"
RUN_FILES = (CONFIG_FILE, "model_index.json", "metrics.jsonl")
# What a checkpoint cannot be resumed without, beside the data.
FIXED_SETTINGS = (
    "resolution block_out_channels down_block_types layers_per_block attention_head_dim norm_num_groups "
    "class_conditional label_dropout ddpm_num_steps ddpm_beta_schedule rescale_betas_zero_snr prediction_type "
    "variance_type timestep_sampling use_ema posthoc_ema_steps init_from seed"
).split()
OWN_SETTINGS = ("output_dir", "resume_from_checkpoint")  # what every start of a run says anew
IMAGE_TRACKERS: dict[str, dict[str, str]] = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}
PATIENCE = timedelta(hours=6)  # of processes with one that decodes a large dataset, or writes a large checkpoint
MAX_SKIPPED_STEPS = 50  # steps in a row with gradients that are not finite, after which a run has no future


class Draws(NamedTuple):
    """What chance brings to a batch; see `draw`."""

    timestep: torch.Tensor  # float32 (B,) in [0, 1)
    flip: torch.Tensor  # float32 (B,) in [0, 1)
    label: torch.Tensor  # float32 (B,) in [0, 1)
    noise: torch.Tensor  # float32 (B, C, H, W), ε of F2
    dropout_seed: int  # of the first sample: dropout draws for a whole batch


def draw(seed: int, step: int, positions: range, shape: Sequence[int], device: torch.device) -> Draws:
    """All random numbers of the samples at `positions` of the global batch of optimiser step `step`.

    Args:
        seed: of the run, >= 0.
        step: optimiser step, >= 0.
        positions: places in the global batch, >= 0, without gaps.
        shape: (C, H, W) of a sample.
        device: of the tensors.

    Returns:
        Rows i that depend on (seed, step, positions[i]) only (ε on the kind of the device too).
    """
    # Five 64-bit words for each sample, counted from the first of the global batch, whoever asks for which.
    words = np.random.Philox(np.random.SeedSequence([seed, step])).random_raw((positions.stop, 5))[positions.start :]
    uniforms = (words[:, :3].T >> 40).astype(np.float32, order="C") / 2**24
    noise = torch.empty((len(positions), *shape), device=device)
    generator = torch.Generator(device)
    for row, word in zip(noise, words[:, 3].tolist(), strict=True):
        row.normal_(generator=generator.manual_seed(word))
    timestep, flip, label = torch.from_numpy(uniforms).to(device, non_blocking=True).unbind()
    return Draws(timestep, flip, label, noise, words[0, 4].item())


def build_scheduler(config: TrainingConfig) -> CustomDDPMScheduler:
    """The scheduler of a run. A schedule that is given by a range of β keeps its shape at T = 1000 for any T."""
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
    """A new U-Net for the pictures; attention where a level sees 16 pixels or less, as in the paper, if not told."""
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
    """The average of a run's weights: decay 1 - (1 + step/inv_gamma)^-power, at most ema_max_decay."""
    return EMAModel(
        parameters,
        decay=config.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=config.ema_inv_gamma,
        power=config.ema_power,
        foreach=True,
    )


def _initial_pipeline(config: TrainingConfig, data: ImageData) -> tuple[CustomUNet2DModel, CustomDDPMScheduler]:
    """The model and scheduler that training starts from: new ones, or those of --init_from."""
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


class _Stop:
    """Whether the run shall end early, as all processes agree: a signal came to any of them, or its time is over."""

    def __init__(self, accelerator: Accelerator, max_train_time: float | None):
        self._deadline = math.inf if max_train_time is None else time.monotonic() + 60 * max_train_time
        self._launcher = launcher_pid()
        # The votes go from host to host, so that no device is waited for.
        self._group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self._vote, self._pending = torch.zeros(()), None
        self.reason: str | None = None
        self._previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = f"{signal.Signals(number).name} came"
        if self._launcher is None:
            self.restore()  # a second signal ends the process at once; of a launcher it is the echo of the first

    def restore(self) -> None:
        """Give the signals back to who had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """To be called by all processes after each step."""
        if self.reason is None and time.monotonic() > self._deadline:
            self.reason = "--max_train_time is over"
        if self.reason is None and self._launcher not in (None, os.getppid()):
            # accelerate's launcher of one process hands no signals on.
            self.reason = "its launcher has ended"
        if self._group is None:
            return self.reason is not None
        # What is counted are the votes of a step ago: they have arrived by now.
        if self._pending is not None:
            self._pending.wait()
        stop = self._vote.item() > 0
        self._vote = torch.tensor(float(self.reason is not None))
        self._pending = torch.distributed.all_reduce(self._vote, group=self._group, async_op=True)
        if stop and self.reason is None:
            self.reason = "another process was told to stop"
        return stop


@torch.no_grad()
def validation_loss(
    unet: CustomUNet2DModel,
    scheduler: CustomDDPMScheduler,
    data: ImageData,
    config: TrainingConfig,
    accelerator: Accelerator,
) -> float:
    """Mean L_simple on up to 1,024 held-out pictures, whose noise and timesteps are the same in every run."""
    images, labels = data.take(1024)
    count, batch_size = len(images), config.train_batch_size
    total = torch.zeros((), device=accelerator.device)
    for start in range(0, count, accelerator.num_processes * batch_size):
        begin = start + accelerator.process_index * batch_size
        # All processes call a model that lies in parts at a time: one that has nothing left does so for nothing.
        chosen = range(min(begin, count - 1), min(begin + batch_size, count))
        x_0 = normalise(images[chosen.start : chosen.stop].to(accelerator.device))
        noise = draw(0, 0, chosen, x_0.shape[1:], accelerator.device).noise
        # Spread evenly over 0 … T: less noise in the mean than drawn independently.
        t = ((torch.arange(chosen.start, chosen.stop, device=accelerator.device) + 0.5) / count * len(scheduler)).long()
        x_t = scheduler.add_noise(x_0, noise, t)
        conditions = (
            {} if labels is None else {"class_labels": labels[chosen.start : chosen.stop].to(accelerator.device)}
        )
        output = unet(x_t, t, **conditions).sample  # type: ignore[operator]
        if begin < count:
            total += diffusion_loss(scheduler, output, x_0, noise, x_t, t).sum()
    return float(accelerator.reduce(total, "sum").item()) / count


def open_data(config: TrainingConfig, state: Accelerator | PartialState) -> tuple[ImageData, ImageData | None]:
    """The pictures to train on, and the held-out ones if there are any, as the configuration says."""
    options: dict[str, Any] = {
        "dataset_name": config.dataset_name,
        "dataset_config_name": config.dataset_config_name,
        "dataset_revision": config.dataset_revision,
        "train_data_dir": config.train_data_dir,
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
    # One process of each machine decodes; the others then find its work in the cache.
    with state.local_main_process_first():
        data = open_images(split=config.split, image_mode=config.image_mode, center_crop=config.center_crop, **options)
        validation = None
        if config.validation_split is not None:
            held_out = {**options, "id2label": data.id2label, "center_crop": True, "image_mode": data.mode}
            validation = open_images(split=config.validation_split, **held_out)
    return data, validation


def best_checkpoint(output_dir: Path) -> list[int]:
    """The step of the checkpoint with the lowest validation loss, if any was validated."""
    saved = list_checkpoints(output_dir)
    losses = {line["step"]: line["validation_loss"] for line in read_metrics(output_dir) if "validation_loss" in line}
    validated = [step for step in losses if step in saved]
    return [min(validated, key=losses.__getitem__)] if validated else []


@contextmanager
def _claimed(config: TrainingConfig, accelerator: Accelerator) -> Iterator[tuple[Path, dict[str, Any]] | None]:
    """The checkpoint to go on from, in an output folder that is ready, and this run's alone while it lasts.

    One process finds, checks and claims.
    """
    output_dir = Path(config.output_dir)
    found: list[Any] = [None]
    with ExitStack() as claim:
        if accelerator.is_main_process:
            if config.resume_from_checkpoint is not None:
                found[0] = find_checkpoint(output_dir, config.resume_from_checkpoint)
                if found[0] is None:
                    logger.info(f"{output_dir} has no checkpoint yet: starting anew")
            elif any((output_dir / name).exists() for name in RUN_FILES):
                raise FileExistsError(
                    f"--output_dir {output_dir} holds another run: choose another folder, or go on with that run by "
                    "--resume_from_checkpoint latest"
                )
            claim.enter_context(claim_output_dir(output_dir, found[0] and found[0][0]))
        yield broadcast_object_list(found)[0]


def train(config: TrainingConfig) -> Path:
    """Train a model, and leave in `config.output_dir` a pipeline that loads anywhere, with what shows how it was made.

    Args:
        config: see `train_ddpm.py --help`.

    Returns:
        The output folder.

    Raises:
        ValueError, OSError: something does not fit; one line that says what, found before the first step.
        FloatingPointError: the gradients are not finite any more.
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
        # Else accelerate leaves the gradients whole on every process, and in half precision, until the last batch.
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        # accelerate goes on in single precision, and does not say so.
        raise ValueError("--mixed_precision is fp16, which a CPU has no training for; it must be bf16 or no")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    with _claimed(config, accelerator) as resumed:
        train_from(resumed, config, accelerator)
    return Path(config.output_dir)


def train_from(resumed: tuple[Path, dict[str, Any]] | None, config: TrainingConfig, accelerator: Accelerator) -> None:
    """The run, from a checkpoint and its metadata or anew, in an output folder that is claimed."""
    output_dir = Path(config.output_dir)
    data, validation_data = open_data(config, accelerator)
    logger.info(data.describe())

    torch.manual_seed(config.seed)
    unet, scheduler = _initial_pipeline(config, data)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    if accelerator.distributed_type != DistributedType.FSDP:  # which wants weights without gaps
        unet.to(memory_format=memory_format)
    if config.torch_compile:
        # In place, so that its weights keep their names; for each shape anew, as there are few.
        unet.compile(dynamic=False)

    batch_size, processes = config.train_batch_size, accelerator.num_processes
    global_batch = batch_size * processes * config.gradient_accumulation_steps
    step = samples_seen = 0
    if resumed is not None:
        step, samples_seen = resumed[1]["step"], resumed[1]["samples_seen"]
    max_train_steps = config.max_train_steps
    if max_train_steps is None:
        if data.num_images is None:
            raise ValueError("--max_train_steps is needed with --streaming: a stream does not tell how long it is")
        # What is left, at the batch of now.
        max_train_steps = step + math.ceil((config.num_epochs * data.num_images - samples_seen) / global_batch)
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )
    # Not prepared by accelerate, which would step it once for every process.
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=max_train_steps,
    )
    model, prepared_optimizer = accelerator.prepare(unet, optimizer)
    sampler = ImportanceSampler(len(scheduler)) if config.timestep_sampling == "importance" else None
    state = TrainingState(
        accelerator,
        unet,
        optimizer,
        ema=build_ema(config, map(local_part, unet.parameters())) if config.use_ema else None,
        posthoc_ema=None if config.posthoc_ema_steps is None else PostHocEMA(map(local_part, unet.parameters())),
        sampler=sampler and sampler.to(accelerator.device),
    )

    # ---- where a resumed run stands ----
    settings = {**dataclasses.asdict(config), "dataset": data.fingerprint, "global_batch": global_batch}
    if resumed is not None:
        path, metadata = resumed
        fixed, free = [*FIXED_SETTINGS, "dataset"], settings.keys() - {*FIXED_SETTINGS, "dataset", *OWN_SETTINGS}
        if differing := differing_settings(metadata["settings"], settings, fixed):
            raise ValueError(f"{path} is of another run: {'; '.join(differing)}")
        for line in differing_settings(metadata["settings"], settings, sorted(free)):
            logger.warning(f"changed since {path.name}: {line}")
        state.load(path, metadata)
        lr_scheduler.last_epoch = step
        for group, base_lr, factor in zip(
            optimizer.param_groups, lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base_lr * factor(step)
        logger.info(f"resumed from {path} at step {step}")
    first_sample = samples_seen

    pipeline = CustomDDPMPipeline(unet, scheduler, id2label=data.id2label)
    pipeline.set_progress_bar_config(leave=False, desc="Sampling", disable=not accelerator.is_main_process)
    if accelerator.is_main_process:
        (output_dir / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
    accelerator.init_trackers("custom_ddpm", config={name: str(value) for name, value in settings.items()})
    journal = Journal(accelerator, output_dir, len(scheduler), step, max_train_steps, global_batch)
    push = (
        BackgroundPush(config.hub_model_id or output_dir.resolve().name, config.hub_private_repo or None)
        if config.push_to_hub
        else None
    )

    # ---- what hangs off the loop ----

    def checkpoint() -> Path:
        metadata = {"settings": settings, "samples_seen": samples_seen, **state.metadata()}
        return save_checkpoint(
            output_dir,
            step,
            state.save,
            metadata=metadata,
            accelerator=accelerator,
            total_limit=config.checkpoints_total_limit,
            keep=best_checkpoint(output_dir),
        )

    def show() -> None:
        """Validation loss, sample grid, curves, and the pipeline as it stands, with the averaged weights."""
        with state.averaged():
            if validation_data is not None:
                loss = validation_loss(unet, scheduler, validation_data, config, accelerator)
                journal.write({"step": step, "validation_loss": loss})
            labels = None
            if data.id2label is not None:
                labels = [i % len(data.id2label) for i in range(config.eval_batch_size)]
            images = sample_images(
                pipeline,
                [config.seed + i for i in range(config.eval_batch_size)],
                labels,
                batch_size=config.train_batch_size,
                num_inference_steps=config.ddpm_num_inference_steps,
                **({"guidance_scale": config.guidance_scale} if labels else {}),
            )
            journal.draw()
            whole_unet = state.whole_unet()
            if accelerator.is_main_process:
                classes = len(data.id2label or ())
                grid = image_grid(images, columns=classes if 0 < classes <= 16 else None)
                (output_dir / "samples").mkdir(exist_ok=True)
                grid.save(output_dir / "samples" / f"step-{step:07d}.png")
                grid.save(output_dir / "samples.png")
                CustomDDPMPipeline(whole_unet, scheduler, id2label=data.id2label).save_pretrained(output_dir)
                write_model_card(output_dir, facts())
                for tracker in accelerator.trackers:
                    if tracker.name in IMAGE_TRACKERS:
                        pixels = {"samples": np.asarray(grid.convert("RGB"))[None]}
                        tracker.log_images(pixels, step=step, **IMAGE_TRACKERS[tracker.name])
                if push is not None and step < max_train_steps:
                    push.push(output_dir, f"Step {step}")
        accelerator.wait_for_everyone()

    def facts() -> dict[str, Any]:
        """What the model card says of the run."""
        lines = read_metrics(output_dir)
        metrics = {}
        for name in ("loss", "validation_loss"):
            if values := [line[name] for line in lines if name in line]:
                metrics[name] = values[-1]
        return {
            "dataset": config.dataset_name or config.train_data_dir,
            "base_model": config.init_from,
            "num_images": data.num_images,
            "recipe": {**dataclasses.asdict(config), "num_processes": processes, "device": accelerator.device.type},
            "steps": step,
            "metrics": metrics,
            "command": shlex.join(["accelerate", "launch", *sys.argv]),
        }

    def my_positions() -> Iterator[range]:
        """Where this process's batches lie in the endless order of samples, from here on."""
        start = first_sample
        while True:
            for batch in range(config.gradient_accumulation_steps):
                begin = start + (batch * processes + accelerator.process_index) * batch_size
                yield range(begin, begin + batch_size)
            start += global_batch

    # ---- Algorithm 1 ----
    null_label = len(data.id2label or ())
    skipped_in_a_row = torch.zeros((), device=accelerator.device)
    shape = (data.channels, data.height, data.width)
    batches = data.batches(my_positions(), pin_memory=accelerator.device.type == "cuda")
    stop = _Stop(accelerator, config.max_train_time)
    unet.train()
    try:
        while step < max_train_steps:
            waited, seen = 0.0, []
            for micro in range(config.gradient_accumulation_steps):
                clock = time.perf_counter()
                images, labels = next(batches)
                waited += time.perf_counter() - clock
                first = (micro * processes + accelerator.process_index) * batch_size
                chance = draw(config.seed, step, range(first, first + batch_size), shape, accelerator.device)

                x_0 = normalise(images.to(accelerator.device, non_blocking=True))
                if config.random_flip:
                    x_0 = torch.where((chance.flip < 0.5).view(-1, 1, 1, 1), x_0.flip(-1), x_0)
                if sampler is None:
                    t, weights = (chance.timestep * len(scheduler)).long(), None
                else:
                    t, weights = sampler.sample(chance.timestep)
                conditions = {}
                if labels is not None:
                    labels = labels.to(accelerator.device, non_blocking=True)
                    conditions["class_labels"] = torch.where(chance.label < config.label_dropout, null_label, labels)

                with accelerator.accumulate(model):
                    torch.manual_seed(chance.dropout_seed)
                    x_t = scheduler.add_noise(x_0, chance.noise, t).to(memory_format=memory_format)
                    output = model(x_t, t, **conditions).sample
                    losses = diffusion_loss(
                        scheduler,
                        output,
                        x_0,
                        chance.noise,
                        x_t,
                        t,
                        loss_type=config.loss_type,
                        loss_weighting=config.loss_weighting,
                        snr_gamma=config.snr_gamma,
                    )
                    accelerator.backward((losses if weights is None else losses * weights).mean())
                    journal.add_losses(losses, t)
                    if accelerator.sync_gradients:
                        grad_norm = whole(accelerator.clip_grad_norm_(unet.parameters(), config.max_grad_norm))
                        skipped = (~torch.isfinite(grad_norm)).float()
                        if accelerator.scaler is None:
                            # GradScaler's flag: a fused optimiser leaves the step out, and the host is not asked.
                            optimizer.found_inf = skipped  # type: ignore[attr-defined]
                    prepared_optimizer.step()
                    prepared_optimizer.zero_grad()
                    seen.append((t, losses.detach().nan_to_num(0.0, 0.0, 0.0)))
            if sampler is not None:
                # Once all of the step is drawn, and in the order of the global batch.
                sampler.update(
                    *(torch.cat([accelerator.gather(part) for part in parts]) for parts in zip(*seen, strict=True))
                )
            lr_scheduler.step()
            state.step_averages()
            step += 1
            samples_seen += global_batch
            skipped_in_a_row = (skipped_in_a_row + 1) * skipped
            journal.add_step(grad_norm, skipped, waited)

            stopping = stop.agreed()
            last = step == max_train_steps or stopping
            # At every checkpoint too, so that a run that goes on from there tells no less.
            if step % config.logging_steps == 0 or step % config.checkpointing_steps == 0 or last:
                journal.log(step, float(lr_scheduler.get_last_lr()[0]))
                if skipped_in_a_row.item() >= MAX_SKIPPED_STEPS:
                    good = find_checkpoint(output_dir)
                    raise FloatingPointError(
                        f"the gradients were not finite for {MAX_SKIPPED_STEPS} steps or more up to step {step}; the "
                        f"last good checkpoint is {good[0] if good else 'none'}; lower --learning_rate"
                    )
            if step % config.checkpointing_steps == 0 or last:
                checkpoint()
            if config.posthoc_ema_steps and (step % config.posthoc_ema_steps == 0 or last):
                state.save_posthoc_snapshot(output_dir)
            if step % config.save_images_steps == 0 and not last:
                show()
            if step % config.checkpointing_steps == 0 or step % config.save_images_steps == 0:
                journal.restart_clock(step)
            if stopping and step < max_train_steps:
                break
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"out of memory with --train_batch_size {batch_size} at {data.height}x{data.width}; lower it and raise "
            "--gradient_accumulation_steps by as much, or try --gradient_checkpointing, --mixed_precision bf16"
        ) from error
    finally:
        batches.close()
        stop.restore()
        journal.close()
        # DDP must not be the last to hold the process group: it would wait, with the interpreter locked, for a thread
        # of gloo that may be waiting for the interpreter.
        model, prepared_optimizer = accelerator.free_memory(model, prepared_optimizer)

    if step < max_train_steps:
        logger.info(f"stopped at step {step}: {stop.reason}. Go on with --resume_from_checkpoint latest")
    else:
        show()
        if push is not None and accelerator.is_main_process:
            push.finish(output_dir, f"Trained for {step} steps")
        if accelerator.is_main_process:  # accelerate's own print would say it once for each machine
            print(_closing(output_dir, data, config))
    accelerator.end_training()


def _closing(output_dir: Path, data: ImageData, config: TrainingConfig) -> str:
    """Where everything is, and the lines that load it."""
    call = 'pipeline(class_labels=["' + data.id2label[0] + '"])' if data.id2label else "pipeline()"
    return f"""
Done. In {output_dir}:
  samples.png             pictures drawn by the model
  loss_curve.png          the loss; loss_by_timestep.png: by noise level; metrics.jsonl: its numbers
  model_index.json, ...   the pipeline, with the averaged weights; README.md: its card
  {CONFIG_FILE}    every setting of the run
  checkpoint-*            to go on from, with --resume_from_checkpoint latest

With this package:
  from custom_ddpm import CustomDDPMPipeline
  pipeline = CustomDDPMPipeline.from_pretrained("{output_dir}")
  {call}.images[0].save("picture.png")

Without it, with diffusers alone:
  from diffusers import DiffusionPipeline
  pipeline = DiffusionPipeline.from_pretrained("{output_dir}", trust_remote_code=True)
"""
