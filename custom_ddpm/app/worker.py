"""A model for several visitors: one call at a time, watched while it runs, and stopped when it must be."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..pipelines.pipeline_custom_ddpm import CustomDDPMPipeline
from ..sample_command import build_sampler

INTERVAL = 0.15  # seconds between two looks at a call
PATIENCE = 15.0  # seconds after which nobody is thought to watch a call any more
STATES = 40  # of a call that are shown


class Stopped(Exception):
    """A call was ended before its result; `too_long` says whether by the limit of time."""

    def __init__(self, too_long: bool):
        super().__init__("stopped")
        self.too_long = too_long


@dataclass
class Model:
    """A pipeline, and the lock that its calls take.

    Args:
        name: folder or Hub repository that it was loaded from.
        pipeline: on its device.
    """

    name: str
    pipeline: CustomDDPMPipeline
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its pictures."""
        size = self.pipeline._picture_size()
        if size is None:
            raise ValueError(f"{self.name} has no sample_size in its configuration; the page needs one")
        return size

    @property
    def classes(self) -> dict[int, str]:
        """Class names by label; numbers where the model has classes without names; empty if it has none."""
        count = self.pipeline.unet.config.num_class_embeds
        return (self.pipeline.config.id2label or {i: str(i) for i in range(count)}) if count else {}

    @property
    def guides(self) -> bool:
        """Whether it can be guided."""
        return self.pipeline._null_label() is not None

    def pipeline_of(self, kind: Any, sampler: str | None = None) -> Any:
        """A pipeline of a class of `custom_ddpm.pipelines` on the same weights, with a sampler by its name.

        Raises:
            ValueError: a sampler that does not exist, or does not take the model's noise schedule.
        """
        own = self.pipeline.scheduler
        scheduler = own if sampler in (None, type(own).__name__) else build_sampler(sampler, (), own)
        made = kind(self.pipeline.unet, scheduler, id2label=self.pipeline.config.id2label)
        made.set_progress_bar_config(disable=True)
        return made


@dataclass
class Progress:
    """How far a call is.

    Args:
        done, total: steps; total is 0 if it is not known.
        state: t, x_t and x̂_0 of the newest step that was recorded, (B, C, H, W) on the CPU.
        result: what the call returned, in the last one only.
    """

    done: int = 0
    total: int = 0
    state: tuple[float, torch.Tensor, torch.Tensor] | None = None
    result: Any = None


def watch(
    model: Model, call: Callable[[Callable[..., dict]], Any], stop: threading.Event, seconds: float
) -> Iterator[Progress]:
    """Run a call of a model's pipelines in a thread, and yield how far it is; the last one has its result.

    Args:
        model: its lock is held meanwhile.
        call: gets the `callback_on_step_end` that it passes on to the pipeline.
        stop: ends the call at the next evaluation of the network when it is set.
        seconds: limit for the call, without the time in which it waits for others.

    Raises:
        Stopped: before the result.
    """
    watched, newest, error = [time.monotonic()], [Progress()], []
    done = threading.Event()

    def note(pipeline: Any, i: int, t: torch.Tensor, inputs: dict[str, Any]) -> dict:
        state = newest[0].state
        if pipeline._recorded:
            when, x_t, x_0 = pipeline._recorded[-1]
            state = (float(when), x_t.cpu(), x_0.cpu())
        newest[0] = Progress(i + 1, pipeline.num_timesteps, state)
        return {}

    def work() -> None:
        try:
            with model.lock, _stoppable(model, stop, seconds, watched):
                result = call(note)
                newest[0] = replace(newest[0], result=result)
        except Exception as problem:
            error.append(problem)
        finally:
            done.set()

    threading.Thread(target=work, name="drawing", daemon=True).start()
    told = newest[0]
    try:
        while not done.wait(INTERVAL):
            watched[0] = time.monotonic()
            if newest[0] is not told:
                told = newest[0]
                yield told
        if error:
            raise error[0]
        yield newest[0]
    finally:
        stop.set()  # also if the visitor has left, and the generator is closed


@contextmanager
def _stoppable(model: Model, stop: threading.Event, seconds: float, watched: list[float]) -> Iterator[None]:
    """Raise `Stopped` before an evaluation of the network that is not wanted any more, in any pipeline."""
    end = time.monotonic() + seconds

    def check(*_: Any) -> None:
        now = time.monotonic()
        if stop.is_set() or now > watched[0] + PATIENCE:
            raise Stopped(too_long=False)
        if now > end:
            raise Stopped(too_long=True)

    check()
    hook = model.pipeline.unet.register_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()
