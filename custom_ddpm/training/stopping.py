"""Stopping a run early and cleanly: signals, a time limit, a launcher that has ended."""

import math
import os
import signal
import time
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from .launch import launcher_pid

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


class StopRequest:
    """Whether the run must end after this step; all processes agree on it. A checkpoint is then saved, see `run.py`.

    SIGTERM, SIGINT (Ctrl-C) and SIGHUP (the terminal was closed) are handled from the construction until `restore`.

    Args:
        accelerator: the run's accelerator.
        max_train_time: minutes from now after which the run ends; None for no limit.

    Attributes:
        reason: why, for the user; None while there is no reason.
    """

    def __init__(self, accelerator: Accelerator, max_train_time: float | None):
        self._deadline = math.inf if max_train_time is None else time.monotonic() + 60 * max_train_time
        self._launcher = launcher_pid()
        # On the CPU, so that no synchronisation with the device is needed.
        self._group: Any = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self._vote = torch.zeros(())
        self._pending: torch.distributed.Work | None = None
        self.reason: str | None = None
        # A signal that is ignored stays so: `nohup` starts programs with SIGHUP ignored.
        self._previous: dict[signal.Signals, Any] = {
            number: signal.signal(number, self._on_signal)
            for number in STOP_SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = f"received {signal.Signals(number).name}"
        if self._launcher is None:
            self.restore()  # a second signal ends the process at once; from a launcher it only repeats the first

    def restore(self) -> None:
        """Put the previous signal handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether to stop now. All processes must call this after each step."""
        if self.reason is None and time.monotonic() > self._deadline:
            self.reason = "the limit of --max_train_time was reached"
        if self.reason is None and self._launcher not in (None, os.getppid()):
            # accelerate's single-process launcher does not forward signals.
            self.reason = "its launcher has ended"
        if self._group is None:
            return self.reason is not None
        # The votes of the previous step are counted: they have arrived by now.
        if self._pending is not None:
            self._pending.wait()
        stop = self._vote.item() > 0
        self._vote = torch.tensor(float(self.reason is not None))
        self._pending = torch.distributed.all_reduce(self._vote, group=self._group, async_op=True)
        if stop and self.reason is None:
            self.reason = "another process was told to stop"
        return stop
