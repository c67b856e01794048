"""Starts the default run as a process of its own, one at a time, and stops it."""

import atexit
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO

from ..messages import shown

CLONE = Path(__file__).parents[2]
SCRIPT, CONFIG, DIGITS = "train_ddpm.py", "examples/configs/digits.yaml", "examples/digits"
NAME = "ddpm-digits"
GRACE = 60.0  # seconds in which a stopped run saves its checkpoint


def can_train() -> bool:
    """Whether the package runs from a clone of the repository, which has the digits."""
    return all((CLONE / each).exists() for each in (SCRIPT, CONFIG, DIGITS))


class Trainer:
    """The training that the page has started.

    Args:
        runs: folder in which output folders are made.
    """

    def __init__(self, runs: Path):
        self.runs = runs
        self.folder: Path | None = None
        self._process: subprocess.Popen | None = None
        self._output: IO[bytes] | None = None
        self._lock = threading.Lock()

    @property
    def is_running(self) -> bool:
        """Whether the process is still there."""
        return self._process is not None and self._process.poll() is None

    def start(self, *flags: str) -> Path:
        """Train on the digits into a new folder, which is returned; `flags` are further ones of `train_ddpm.py`.

        Raises:
            RuntimeError: a training runs already.
            OSError: the process cannot be started.
        """
        with self._lock:
            if self.is_running:
                raise RuntimeError(f"a training runs in {self.folder}")
            names = [NAME, *(f"{NAME}-{i}" for i in range(2, 1000))]
            self.folder = next(each for name in names if not (each := self.runs.resolve() / name).exists())
            self._output = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
            command = [sys.executable, str(CLONE / SCRIPT), "--config", str(CLONE / CONFIG)]
            command += ["--dataset_name", str(CLONE / DIGITS), "--output_dir", str(self.folder), *flags]
            # A session of its own: Ctrl-C in the terminal of the page is not meant for it.
            self._process = subprocess.Popen(
                command,
                cwd=self.runs,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                start_new_session=os.name != "nt",
            )
            atexit.register(self.end)
            return self.folder

    def stop(self) -> bool:
        """Ask the run to save a checkpoint and end; returns whether there is one."""
        with self._lock:
            if not self.is_running:
                return False
            assert self._process is not None
            self._process.terminate()
            return True

    def end(self) -> None:
        """Stop the run and wait for it; at last it is killed."""
        if self.stop():
            assert self._process is not None
            try:
                self._process.wait(GRACE)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def ended(self) -> tuple[int, str] | None:
        """Exit status and last line of a training that has ended; None while it runs, and if there was none."""
        if self._process is None or self._output is None or self.is_running:
            return None
        self._output.seek(max(0, self._output.seek(0, os.SEEK_END) - 4096))
        lines = self._output.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")
        return self._process.returncode, shown(next((line for line in reversed(lines) if line.strip()), ""), 300)
