"""`train`: the training loop, with logging, checkpoints and sample grids at intervals."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..config import TrainingConfig
from ..evaluation.records import CONFIG_FILE, read_metrics, scores_by_step
from ..messages import quoted, shown
from .budget import choose_precision
from .build import Resumed, Run, build_run
from .checkpoint import find_checkpoint, list_checkpoints, lock_output_dir, prune_checkpoints, save_checkpoint
from .ema import snapshot_file
from .ending import final_diagnosis, measure_final_loss, write_bounds
from .launch import get_logger, time_taken
from .loop import TrainingStep, training_steps
from .metrics import TimedBatches
from .parts import build_accelerator
from .preview import grid_file
from .randomness import sample_positions
from .scores import Scores
from .stopping import StopRequest

logger = get_logger(__name__)

RUN_FILES = (CONFIG_FILE, "model_index.json", "metrics.jsonl")
MAX_SKIPPED_STEPS = 50  # consecutive steps with gradients that are not finite, after which the run ends


def train(config: TrainingConfig) -> Path:
    """Train a model, and save a pipeline, metrics and sample grids in `config.output_dir`.

    Args:
        config: settings of the run, see `train_ddpm.py --help`.

    Returns:
        The output folder.

    Raises:
        ValueError, OSError: invalid settings, data or checkpoint; one line, before the first step.
        FloatingPointError: the gradients stayed NaN or infinite for `MAX_SKIPPED_STEPS` steps.
        MemoryError: the device is out of memory.
    """
    config, told = choose_precision(config)
    accelerator = build_accelerator(config)
    if told is not None:
        logger.info(told)
    with _locked_output_dir(config, accelerator) as resumed:
        run = build_run(config, accelerator, resumed)
        step, stop_reason = _run_steps(run)
        if stop_reason is not None:
            logger.info(f"stopped at step {step}: {stop_reason}. Resume with --resume_from_checkpoint latest")
        else:
            measure_final_loss(run, step)
            write_bounds(run)
            if run.scores is not None:
                run.scores.write(step)
            run.preview.finish(step)
            if accelerator.is_main_process:  # accelerate's own print would print once on each machine
                print(_final_message(run))
                print(*final_diagnosis(run), sep="\n")
                logger.info(time_taken())
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
                    f"--output_dir {output_dir} holds another run: choose another folder, or resume that run with "
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
    positions = sample_positions(accelerator, run.batch_size, run.first_sample)
    batches = run.data.batches(positions, pin_memory=accelerator.device.type == "cuda")
    timed = TimedBatches(batches)
    stop = StopRequest(accelerator, run.max_train_time)
    skipped_in_a_row = torch.zeros((), device=accelerator.device)
    run.state.unet.train()
    if run.first_step > 0:
        _catch_up(run)
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
        for result in steps:
            step = result.step
            skipped_in_a_row = (skipped_in_a_row + 1) * result.skipped  # 0 after a step that was not skipped
            _update(run, result, timed.seconds_waited())
            stopping = stop.agreed()
            _run_periodic_tasks(run, step, skipped_in_a_row, last=stopping or step == run.max_train_steps)
            if stopping and step < run.max_train_steps:
                run.preview.save_pipeline(step)
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
        # Release the DDP wrapper first. If it held the last reference to the process group, its destructor would wait
        # for a thread of gloo while holding the interpreter's lock, which that thread may need: a deadlock.
        run.model, run.optimizer = accelerator.free_memory(run.model, run.optimizer)
    return step, None


def _update(run: Run, result: TrainingStep, seconds_waited: float) -> None:
    """Update averages, importance sampler and metrics after a step."""
    run.state.step_averages()
    if run.state.sampler is not None:
        # `gather` gives every process the same values, in the order of the global batch.
        gather = run.accelerator.gather
        losses = [loss.nan_to_num(0.0, 0.0, 0.0) for loss in result.losses]
        run.state.sampler.update(torch.cat([*map(gather, result.timesteps)]), torch.cat([*map(gather, losses)]))
    for losses_of_batch, timesteps in zip(result.losses, result.timesteps, strict=True):
        run.metrics.add_losses(losses_of_batch, timesteps)
    run.metrics.add_step(result.grad_norm, result.skipped, seconds_waited)


def _run_periodic_tasks(run: Run, step: int, skipped_in_a_row: torch.Tensor, last: bool) -> None:
    """Log metrics, save a checkpoint and a snapshot, evaluate, draw a grid, each if it is due at this step."""
    checkpoint_is_due, grid_is_due = step % run.checkpointing_steps == 0, step % run.save_images_steps == 0
    # At every checkpoint too: checkpoints do not hold the running means, and a resumed run must log the same lines.
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
    if _snapshot_is_due(run, step, last):
        run.state.save_posthoc_snapshot(run.output_dir)
    if (scores := _due_scores(run, step, last)) is not None:
        scores.write(step)
    if grid_is_due and not last:  # the last grid is drawn by `Preview.finish`
        run.preview.save(step)
    if checkpoint_is_due or grid_is_due or scores is not None:
        run.metrics.restart_clock(step)


def _snapshot_is_due(run: Run, step: int, last: bool) -> bool:
    return run.posthoc_ema_steps is not None and (step % run.posthoc_ema_steps == 0 or last)


def _due_scores(run: Run, step: int, last: bool) -> Scores | None:
    due = run.eval_steps is not None and step % run.eval_steps == 0
    return run.scores if due and not last else None  # the last are written by `train`


def _catch_up(run: Run) -> None:
    """Do what was due at the step of the checkpoint but not done, because the run ended between the two."""
    step = run.first_step
    if run.accelerator.is_main_process and run.checkpoints_total_limit is not None:
        prune_checkpoints(run.output_dir, step, run.checkpoints_total_limit, best_checkpoint(run.output_dir, step))
    last = step == run.max_train_steps
    missing = [
        _snapshot_is_due(run, step, last) and not snapshot_file(run.output_dir, step).exists(),
        step % run.save_images_steps == 0 and not last and not grid_file(run.output_dir, step).exists(),
    ]
    snapshot_is_missing, grid_is_missing = broadcast_object_list(missing)
    if snapshot_is_missing:
        run.state.save_posthoc_snapshot(run.output_dir)
    if (scores := _due_scores(run, step, last)) is not None:
        scores.write(step)
    if grid_is_missing:
        run.preview.save(step)


def _save_checkpoint(run: Run, step: int) -> None:
    samples_seen = run.first_sample + (step - run.first_step) * run.global_batch
    save_checkpoint(
        run.output_dir,
        step,
        run.state.save,
        metadata={"settings": run.settings, "samples_seen": samples_seen, **run.state.metadata()},
        accelerator=run.accelerator,
        total_limit=run.checkpoints_total_limit,
        keep=best_checkpoint(run.output_dir, step),
    )


def best_checkpoint(output_dir: Path, before: int) -> list[int]:
    """The step of the best checkpoint of those before a step, see `scores_by_step`; empty if there is none."""
    saved, scores = list_checkpoints(output_dir), scores_by_step(read_metrics(output_dir))
    known = [step for step in scores if step in saved and step < before]
    return [min(known, key=scores.__getitem__)] if known else []


def _final_message(run: Run) -> str:
    """The output files, and the code that loads the model."""
    output_dir, id2label = run.output_dir, run.data.id2label
    first = id2label and id2label[0]
    label = quoted(first) if first and len(first) <= 100 else 0
    call = f"pipeline(class_labels=[{label}])" if id2label else "pipeline()"
    source = quoted(str(output_dir))
    return f"""
Done. In {shown(str(output_dir), 1000)}:
  samples.png             pictures drawn by the model
  loss_curve.png          the loss; loss_by_timestep.png: by noise level; metrics.jsonl: its numbers
  model_index.json, ...   the pipeline, with the averaged weights; README.md: its model card
  {CONFIG_FILE}    every setting of the run
  checkpoint-*            to resume from, with --resume_from_checkpoint latest

With this package:
  from custom_ddpm import CustomDDPMPipeline
  pipeline = CustomDDPMPipeline.from_pretrained({source})
  {call}.images[0].save("picture.png")

Without it, with diffusers alone:
  from diffusers import DiffusionPipeline
  pipeline = DiffusionPipeline.from_pretrained({source}, trust_remote_code=True)
"""
