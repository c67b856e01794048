"""Time of forward and backward on a CPU, with freed memory given back to the system and with it kept.

    taskset -c 0 python benchmarks/memory.py [--pairs 5]

Forward and backward of the default recipe's network in bf16, batch 16, one thread; each number is of a process of its
own, since the setting cannot be undone, and the two are measured in turn. Printed are CPU milliseconds, pages that the
system had to supply in a step, and the median of the pairs' ratios with the least and the greatest.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from custom_ddpm.memory import keep_freed_memory

sys.path.insert(0, str(Path(__file__).parent))
STEPS = 30


def measure(side: int, keep: bool) -> dict[str, float]:
    """CPU milliseconds and page faults of a step, after five that are not counted."""
    from scale import network

    if keep and not keep_freed_memory():
        raise SystemExit("this C library has no such setting")
    torch.set_num_threads(1)
    unet, *_ = network(side)
    images = torch.randn(16, 3, side, side)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            output = unet(images, torch.randint(0, 1000, (16,))).sample
        output.float().square().mean().backward()
        unet.zero_grad()

    for _ in range(5):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(STEPS):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"ms": 1e3 * seconds / STEPS, "pages": (after.ru_minflt - before.ru_minflt) / STEPS}


def main() -> None:
    """Compare the two, in pairs of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of measurements of each size")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "KEEP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(int(args.one[0]), args.one[1] == "True")))
        return

    def one(side: int, keep: bool) -> dict[str, float]:
        command = [sys.executable, __file__, "--one", str(side), str(keep)]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)

    for side in (28, 64):
        pairs = [(one(side, False), one(side, True)) for _ in range(args.pairs)]
        ratios = [kept["ms"] / given["ms"] for given, kept in pairs]
        given, kept = ({key: statistics.median(pair[i][key] for pair in pairs) for key in pairs[0][i]} for i in (0, 1))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(
            f"{side}x{side}: given back {given['ms']:.1f} ms, {given['pages']:,.0f} pages; "
            f"kept {kept['ms']:.1f} ms, {kept['pages']:,.0f} pages; ratio {spread}",
            flush=True,
        )


if __name__ == "__main__":
    main()
