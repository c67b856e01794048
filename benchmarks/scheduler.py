"""CPU time of the scheduler beside diffusers' `DDPMScheduler`: `python benchmarks/scheduler.py`.

Ours, the peer and the bound are called in turn, and each line has the median over the turns of their times, and the
median and the quartiles of the ratio within a turn. The bound is what cannot be left out: drawing the noise, and two
multiply-adds, a·x + b·y. Memory that is freed stays with the process, as in one where a model runs: otherwise half of
the time is that of the kernel giving the same pages again.
"""

import contextlib
import ctypes
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler

from custom_ddpm.scheduler import CustomDDPMScheduler

TURNS, SECONDS = 60, 0.02  # turns, and about how long one measurement in a turn takes
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
Call = Callable[[], object]


def keep_memory() -> None:
    """Let freed memory stay with the process."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, 2**25)
        library.mallopt(M_TRIM_THRESHOLD, 2**30)


def seconds(call: Call, number: int) -> float:
    """CPU time of one call, over a number of them."""
    start = time.process_time()
    for _ in range(number):
        call()
    return (time.process_time() - start) / number


def measure(calls: dict[str, Call]) -> dict[str, np.ndarray]:
    """CPU time of each call in each turn."""
    numbers = {}
    for name, call in calls.items():
        seconds(call, 3)
        numbers[name] = max(1, round(SECONDS / max(seconds(call, 3), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            times[name].append(seconds(call, numbers[name]))
    return {name: np.array(each) for name, each in times.items()}


def row(title: str, calls: dict[str, Call]) -> str:
    """One line of the table."""
    times = measure(calls)
    cells = [f"{np.median(times[name]) * 1e6:,.0f}" for name in ("ours", "diffusers", "bound")]
    for other in ("diffusers", "bound"):
        low, middle, high = np.quantile(times["ours"] / times[other], [0.25, 0.5, 0.75])
        cells.append(f"{middle:.2f} ({low:.2f}–{high:.2f})")
    return f"| {title} | " + " | ".join(cells) + " |"


def loop(scheduler: Any, x_T: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """All steps, with a model that returns its input."""
    x = x_T
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x, generator=generator, return_dict=False)[0]
    return x


def main() -> None:
    """Print the table as Markdown."""
    torch.set_num_threads(1)
    keep_memory()
    ours, generator = CustomDDPMScheduler(), torch.Generator().manual_seed(0)
    theirs: Any = DDPMScheduler()
    ours.set_timesteps(1000)
    theirs.set_timesteps(1000)
    a, b = torch.tensor([0.6, 0.8]).view(2, 1, 1, 1, 1)
    x, y = torch.randn(2, 4, 3, 32, 32, generator=generator)

    def combine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (a * x).addcmul_(b, y)

    def bound() -> torch.Tensor:
        return combine(combine(x, y), torch.randn(x.shape, generator=generator))

    def bound_loop() -> None:
        for _ in range(1000):
            bound()

    print("| | ours, µs | diffusers, µs | bound, µs | ours / diffusers | ours / bound |\n|---|---|---|---|---|---|")
    for name, t in (("a tensor", ours.timesteps[400]), ("a number", 500)):
        calls: dict[str, Call] = {
            "ours": lambda t=t: ours.step(y, t, x, generator=generator, return_dict=False),  # type: ignore[misc]
            "diffusers": lambda t=t: theirs.step(y, t, x, generator=generator, return_dict=False),  # type: ignore[misc]
            "bound": bound,
        }
        print(row(f"`step`, 4x3x32x32, t is {name}", calls))
    calls = {
        "ours": lambda: loop(ours, x, generator),
        "diffusers": lambda: loop(theirs, x, generator),
        "bound": bound_loop,
    }
    print(row("1000 steps, 4x3x32x32, a model that returns its input", calls))
    images, noise = torch.randn(2, 128, 3, 32, 32, generator=generator)
    times = torch.randint(1000, (128,), generator=generator)
    of_images, of_noise = torch.rand(2, 128, 1, 1, 1, generator=generator)
    calls = {
        "ours": lambda: ours.add_noise(images, noise, times),
        "diffusers": lambda: theirs.add_noise(images, noise, times),
        "bound": lambda: (of_images * images).addcmul_(of_noise, noise),
    }
    print(row("`add_noise`, 128x3x32x32", calls))


if __name__ == "__main__":
    main()
