"""Starting the processes of a run, and ending them together, with one line of text when there is an error.

`accelerate launch --cpu --num_processes N` starts only one process, whatever N is, unless it is given an MPI host file:
the global batch size would silently be wrong. Here that process starts the others, with torch's launcher.
"""

import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed.run
from accelerate import PartialState
from accelerate.commands.launch import launch_command_parser
from accelerate.logging import MultiProcessAdapter
from accelerate.utils import str_to_bool
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..messages import one_line

# Seconds that a process waits before it reports an error, for another process whose error may be the cause.
REPORT_DELAY = 3.0


def start_all_cpu_processes() -> None:
    """If `accelerate launch` was asked for several CPU processes, start them with torch's launcher, wait, and exit.

    Raises:
        ValueError: several processes were asked for, but their number is not known.
    """
    # Only in this case does accelerate set MASTER_ADDR without WORLD_SIZE.
    several = "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    if not several or not str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false")):
        return
    parent = psutil.Process(os.getppid()).cmdline()
    if "launch" in parent:
        words = parent[parent.index("launch") + 1 :]
    elif any(word.endswith("accelerate-launch") for word in parent[:2]):
        words = parent[2:]
    else:
        words = []
    asked = launch_command_parser().parse_known_args([*words, "script"])[0] if words else None
    if asked is None or not asked.num_processes:
        raise ValueError(
            "several CPU processes were asked for, but accelerate started one and does not report how many: "
            "give --cpu --num_processes N to `accelerate launch` on the command line"
        )
    machines = asked.num_machines or 1
    command = ["--nnodes", str(machines), "--nproc_per_node", str(asked.num_processes // machines)]
    command += ["--node_rank", str(asked.machine_rank or 0)]
    command += ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    try:
        torch.distributed.run.main([*command, *_program()])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # A process that ended by itself has already reported its error.
        sys.exit(f"process {rank} was ended by {failure.signal_name()}" if failure.exitcode < 0 else failure.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    sys.exit()


def _program() -> list[str]:
    """This program and its arguments, as torch's launcher takes them."""
    spec = sys.modules["__main__"].__spec__
    return sys.argv if spec is None else ["--module", spec.name, *sys.argv[1:]]


def command_line() -> str:
    """The command that started this program, as a user would type it; empty in a notebook or an interpreter."""
    if "ipykernel" in sys.modules or not sys.argv[0] or sys.argv[0] == "-c":
        return ""
    spec = sys.modules["__main__"].__spec__
    if spec is not None and spec.name.startswith("custom_ddpm."):
        return shlex.join(["accelerate", "launch", "--quiet", "-m", spec.name, *sys.argv[1:]])
    if Path(sys.argv[0]).name == "custom-ddpm":
        return shlex.join(["custom-ddpm", *sys.argv[1:]])
    return shlex.join(["accelerate", "launch", "--quiet", *sys.argv])


def _end_with(parent: int) -> None:
    """End this process once its parent has ended: accelerate's single-process launcher does not forward signals."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def one_line_errors(*expected: type[Exception]) -> Iterator[None]:
    """Context that ends the program with status 1 and one line of text for errors of the given types.

    Other errors keep their traceback. When one of several processes fails, the others fail too, because they wait for
    it or find the same error. So all but the first wait a moment before they report, until the launcher ends them.
    """
    rank, several = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        yield
    except expected as error:
        line = f"{os.path.basename(sys.argv[0])}: error: {one_line(error)}"
        if rank > 0:
            time.sleep(REPORT_DELAY)
            line = "\n" + line  # the cursor may be at the end of the first process's progress bar
        sys.exit(line)
    except RuntimeError:
        if several:
            time.sleep(REPORT_DELAY)
        raise


class _Logger(MultiProcessAdapter):
    """accelerate's logger, which speaks on the first process only, without "[RANK 0]" on one process."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        """The message, with the number of the process if there are several."""
        if PartialState().num_processes > 1:
            return super().process(msg, kwargs)
        kwargs.setdefault("stacklevel", 2)
        return msg, kwargs


def get_logger(name: str) -> MultiProcessAdapter:
    """The logger of a module, for messages from the first process."""
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    return _Logger(logger, {})


def launcher_pid() -> int | None:
    """Process id of the launcher (accelerate's or torch's) that started this process; None if there is none."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    return os.getppid() if launched else None


def set_cpu_threads(local_processes: int, asked: int | None = None) -> int:
    """Let this process use its share of the physical cores, unless the user chose a number of threads.

    `accelerate launch` and torch's launcher set OMP_NUM_THREADS to 1 where the user has not set it, which would leave
    all cores but one idle.

    Args:
        local_processes: processes of the run on this machine.
        asked: number of threads; None: those of the environment, or the share of the cores.

    Returns:
        The number of threads that torch uses.
    """
    if asked is not None:
        torch.set_num_threads(asked)
    elif not threads_were_chosen():
        cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):
            cores = min(cores, len(os.sched_getaffinity(0)))
        torch.set_num_threads(max(1, cores // local_processes))
    return torch.get_num_threads()


def time_taken() -> str:
    """The wall time of this process so far, and the cores that it had in use: its CPU seconds per second."""
    process = psutil.Process()
    wall, cpu = time.time() - process.create_time(), process.cpu_times()
    cores = (cpu.user + cpu.system) / wall
    return f"{wall / 60:.1f} minutes, {cores:.1f} of {os.cpu_count()} CPU cores in use on average"


def threads_were_chosen() -> bool:
    """Whether OMP_NUM_THREADS is the user's: set in the environment of the launcher, or by a flag of the launcher."""
    if "OMP_NUM_THREADS" not in os.environ:
        return False
    try:
        for process in psutil.Process().parents():
            # The environment that a process was started with; later changes are not in it.
            if "OMP_NUM_THREADS" not in process.environ():
                words = process.cmdline()
                is_launcher = "launch" in words or any(
                    word.endswith(("accelerate-launch", "torchrun")) or word == "torch.distributed.run"
                    for word in words
                )
                return not is_launcher or any(word.startswith("--num_cpu_threads_per_process") for word in words)
    except psutil.Error:  # another user's process, or one that has ended
        pass
    return True
