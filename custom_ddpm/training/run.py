"""Running the training loop, with everything that is due at its steps: `train`."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..config import TrainingConfig
from .build import CONFIG_FILE, Resumed, Run, build_run
from .checkpoint import find_checkpoint, list_checkpoints, lock_output_dir, save_checkpoint
from .launch import get_logger
from .loop import TrainingStep, training_steps
from .metrics import TimedBatches, read_metrics
from .parts import build_accelerator
from .stopping import StopRequest

logger = get_logger(__name__)

RUN_FILES = (CONFIG_FILE, "model_index.json", "metrics.jsonl")
MAX_SKIPPED_STEPS = 50  # consecutive steps with gradients that are not finite, after which the run ends


def train(config: TrainingConfig) -> Path:
    """Train a model, and save in `config.output_dir` a pipeline that loads anywhere, with metrics and sample grids.

    Args:
        config: settings of the run, see `train_ddpm.py --help`.

    Returns:
        The output folder.

    Raises:
        ValueError, OSError: something does not fit; one line, before the first step.
        FloatingPointError: the gradients are not finite any more.
        MemoryError: the device is out of memory.
    """
    accelerator = build_accelerator(config)
    with _locked_output_dir(config, accelerator) as resumed:
        run = build_run(config, accelerator, resumed)
        step, stop_reason = _run_steps(run)
        if stop_reason is not None:
            logger.info(f"stopped at step {step}: {stop_reason}. Go on with --resume_from_checkpoint latest")
        else:
            run.preview.finish(step)
            if accelerator.is_main_process:  # accelerate's own print would print once on each machine
                print(_closing_words(run))
        accelerator.end_training()
    return run.output_dir


@contextmanager
def _locked_output_dir(config: TrainingConfig, accelerator: Accelerator) -> Iterator[Resumed | None]:
    """Lock the output folder on the main process; gives the checkpoint to resume from, or None, to all processes."""
    output_dir = Path(config.output_dir)
    found: list[Any] = [None]
    with ExitStack() as lock:
        if accelerator.is_main_process:
            if config.resume_from_checkpoint is not None:
                found[0] = find_checkpoint(output_dir, config.resume_from_checkpoint)
                if found[0] is None:
                    logger.info(f"{output_dir} has no checkpoint yet: starting a new run")
            elif any((output_dir / name).exists() for name in RUN_FILES):
                raise FileExistsError(
                    f"--output_dir {output_dir} holds another run: choose another folder, or go on with that run by "
                    "--resume_from_checkpoint latest"
                )
            lock.enter_context(lock_output_dir(output_dir, found[0] and found[0][0]))
        yield broadcast_object_list(found)[0]


def _run_steps(run: Run) -> tuple[int, str | None]:
    """Train to the last step, or until a stop is requested.

    Returns:
        Optimiser steps done; the reason for stopping early, None if the run is complete.
    """
    accelerator, step = run.accelerator, run.first_step
    batches = run.data.batches(_positions(run), pin_memory=accelerator.device.type == "cuda")
    timed = TimedBatches(batches)
    stop = StopRequest(accelerator, run.max_train_time)
    skipped_in_a_row = torch.zeros((), device=accelerator.device)
    run.state.unet.train()
    steps = training_steps(
        run.model,
        run.scheduler,
        run.optimizer,
        run.lr_scheduler,
        timed,
        accelerator,
        run.loss,
        run.max_train_steps,
        first_step=run.first_step,
        **run.loop_options,
    )
    try:
        for done in steps:
            step = done.step
            skipped_in_a_row = (skipped_in_a_row + 1) * done.skipped
            _update(run, done, timed.seconds_waited())
            stopping = stop.agreed()
            _do_what_is_due(run, step, skipped_in_a_row, last=stopping or step == run.max_train_steps)
            if stopping and step < run.max_train_steps:
                return step, stop.reason
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"out of memory with --train_batch_size {run.batch_size} at {run.data.height}x{run.data.width}; lower it "
            "and raise --gradient_accumulation_steps by as much, or try --gradient_checkpointing, --mixed_precision "
            "bf16"
        ) from error
    finally:
        steps.close()  # type: ignore[attr-defined]
        batches.close()
        stop.restore()
        run.metrics.close()
        # DDP must not be the last to hold the process group: its destructor would wait, holding the interpreter's
        # lock, for a thread of gloo that may be waiting for that lock.
        run.model, run.optimizer = accelerator.free_memory(run.model, run.optimizer)
    return step, None


def _positions(run: Run) -> Iterator[range]:
    """Positions of this process's batches in the endless order of samples, from here on."""
    accelerator, start = run.accelerator, run.first_sample
    while True:
        for batch in range(accelerator.gradient_accumulation_steps):
            first = (batch * accelerator.num_processes + accelerator.process_index) * run.batch_size
            yield range(start + first, start + first + run.batch_size)
        start += run.global_batch


def _update(run: Run, done: TrainingStep, seconds_waited: float) -> None:
    """Update averages, importance sampler and metrics after a step."""
    run.state.step_averages()
    if run.state.sampler is not None:
        # In the order of the global batch, on every process.
        gather = run.accelerator.gather
        losses = [loss.nan_to_num(0.0, 0.0, 0.0) for loss in done.losses]
        run.state.sampler.update(torch.cat([*map(gather, done.timesteps)]), torch.cat([*map(gather, losses)]))
    for losses_of_batch, timesteps in zip(done.losses, done.timesteps, strict=True):
        run.metrics.add_losses(losses_of_batch, timesteps)
    run.metrics.add_step(done.grad_norm, done.skipped, seconds_waited)


def _do_what_is_due(run: Run, step: int, skipped_in_a_row: torch.Tensor, last: bool) -> None:
    """Log metrics, save a checkpoint, a snapshot of the averages, a sample grid, each if it is due at this step."""
    checkpoint_is_due, grid_is_due = step % run.checkpointing_steps == 0, step % run.save_images_steps == 0
    # Logged at every checkpoint too: a run that resumes there starts a new mean.
    if step % run.logging_steps == 0 or checkpoint_is_due or last:
        run.metrics.log(step, float(run.lr_scheduler.get_last_lr()[0]))
        if skipped_in_a_row.item() >= MAX_SKIPPED_STEPS:
            good = find_checkpoint(run.output_dir)
            raise FloatingPointError(
                f"the gradients were not finite for {MAX_SKIPPED_STEPS} steps or more up to step {step}; the "
                f"last good checkpoint is {good[0] if good else 'none'}; lower --learning_rate"
            )
    if checkpoint_is_due or last:
        _save_checkpoint(run, step)
    if run.posthoc_ema_steps and (step % run.posthoc_ema_steps == 0 or last):
        run.state.save_posthoc_snapshot(run.output_dir)
    if grid_is_due and not last:
        run.preview.save(step)
    if checkpoint_is_due or grid_is_due:
        run.metrics.restart_clock(step)


def _save_checkpoint(run: Run, step: int) -> None:
    samples_seen = run.first_sample + (step - run.first_step) * run.global_batch
    save_checkpoint(
        run.output_dir,
        step,
        run.state.save,
        metadata={"settings": run.settings, "samples_seen": samples_seen, **run.state.metadata()},
        accelerator=run.accelerator,
        total_limit=run.checkpoints_total_limit,
        keep=best_checkpoint(run.output_dir),
    )


def best_checkpoint(output_dir: Path) -> list[int]:
    """The step of the checkpoint with the lowest validation loss; empty if no checkpoint was validated."""
    saved = list_checkpoints(output_dir)
    losses = {line["step"]: line["validation_loss"] for line in read_metrics(output_dir) if "validation_loss" in line}
    validated = [step for step in losses if step in saved]
    return [min(validated, key=losses.__getitem__)] if validated else []


def _closing_words(run: Run) -> str:
    """Where everything is, and the lines that load it."""
    output_dir, id2label = run.output_dir, run.data.id2label
    call = 'pipeline(class_labels=["' + id2label[0] + '"])' if id2label else "pipeline()"
    return f"""
Done. In {output_dir}:
  samples.png             pictures drawn by the model
  loss_curve.png          the loss; loss_by_timestep.png: by noise level; metrics.jsonl: its numbers
  model_index.json, ...   the pipeline, with the averaged weights; README.md: its card
  {CONFIG_FILE}    every setting of the run
  checkpoint-*            to resume from, with --resume_from_checkpoint latest

With this package:
  from custom_ddpm import CustomDDPMPipeline
  pipeline = CustomDDPMPipeline.from_pretrained("{output_dir}")
  {call}.images[0].save("picture.png")

Without it, with diffusers alone:
  from diffusers import DiffusionPipeline
  pipeline = DiffusionPipeline.from_pretrained("{output_dir}", trust_remote_code=True)
"""
