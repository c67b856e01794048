"""How the processes of a run start, and how they end: all together, and with one line when something is wrong.

`accelerate launch --cpu --num_processes N` starts one process only, whatever N is, unless it is given an MPI host file:
training would go on with another global batch than was asked for. Here that one process starts the others, by
torch's own launcher.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch.distributed.run
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import str_to_bool
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# Seconds that a process leaves to the one whose error is the cause of its own; the launcher ends it meanwhile.
FIRST_TO_SPEAK = 3.0


def start_all_cpu_processes() -> None:
    """Be torch's launcher, and exit, if `accelerate launch` was asked for more CPU processes than this one.

    Raises:
        ValueError: several processes were asked for, in a way that does not tell how many.
    """
    # MASTER_ADDR without WORLD_SIZE is how accelerate marks the case: a launcher of several sets both.
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
            "several CPU processes were asked for, but accelerate started one and does not tell how many: "
            "give --cpu --num_processes N to `accelerate launch` on the command line"
        )
    machines = asked.num_machines or 1
    command = ["--nnodes", str(machines), "--nproc_per_node", str(asked.num_processes // machines)]
    command += ["--node_rank", str(asked.machine_rank or 0)]
    command += ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    try:
        torch.distributed.run.main([*command, *sys.argv])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # A process that could has said itself what was wrong.
        sys.exit(f"process {rank} was ended by {failure.signal_name()}" if failure.exitcode < 0 else failure.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    sys.exit()


def _end_with(parent: int) -> None:
    # accelerate's launcher of one process, when it is told to end, tells nobody.
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def one_line_errors(*expected: type[Exception]) -> Iterator[None]:
    """End the program with status 1 and one line for errors of these types; others keep their traceback.

    When one of several processes fails, those that wait for it fail too, and an error that all of them find they would
    all tell. So those that may not be the first to know give the launcher the time to end them.
    """
    rank, several = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        yield
    except expected as error:
        line = f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(error).split()) or type(error).__name__}"
        if rank > 0:
            time.sleep(FIRST_TO_SPEAK)
            line = "\n" + line  # the progress bar of the first process may be in the middle of one
        sys.exit(line)
    except RuntimeError:
        if several:
            time.sleep(FIRST_TO_SPEAK)
        raise


def launcher_pid() -> int | None:
    """The process that launched this one and waits for it, if it is accelerate's or torch's launcher."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    return os.getppid() if launched else None
