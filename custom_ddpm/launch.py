"""Several processes on CPUs, as asked of `accelerate launch`.

`accelerate launch --cpu --num_processes N` starts one process only, whatever N is, unless it is given an MPI host file:
training would go on with another global batch than was asked for. Here that one process starts the others, by
torch's own launcher.
"""

import os
import sys

import psutil
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import str_to_bool


def start_all_cpu_processes() -> None:
    """Become torch's launcher if `accelerate launch` was asked for more CPU processes than this one; else do nothing.

    Raises:
        RuntimeError: several processes were asked for, in a way that does not tell how many.
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
        raise RuntimeError(
            "several CPU processes were asked for, but accelerate started one and does not tell how many: "
            "give --cpu --num_processes N to `accelerate launch` on the command line"
        )
    machines = asked.num_machines or 1
    command = ["-m", "torch.distributed.run"]
    command += ["--nnodes", str(machines), "--nproc_per_node", str(asked.num_processes // machines)]
    command += ["--node_rank", str(asked.machine_rank or 0)]
    command += ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
    os.execv(sys.executable, [sys.executable, *command, *sys.argv])
