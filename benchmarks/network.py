"""Speed and memory of the U-Net beside diffusers' `UNet2DModel` of the same layout and weights.

`python benchmarks/network.py [--compile] [--repeats 20] [--steps 60]`

A Markdown table: median CPU time of a forward pass without gradients and of forward and backward, bytes that are kept
for the backward pass, and the ratio of theirs to ours. Both are measured in turn, and the ratio is that of neighbours:
its median and quartiles. On a GPU the time is wall clock. A second table: what part of a training step of the default
recipe is neither forward, backward nor optimiser (see bench_training.py).
"""

import argparse
import copy
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DModel
from torch import nn

from custom_ddpm.unet import CustomUNet2DModel

BATCH = 16
DEFAULT = {
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",) * 3,
    "up_block_types": ("UpBlock2D",) * 3,
    "norm_num_groups": 8,
    "resnet_time_scale_shift": "scale_shift",
    "num_class_embeds": 11,
}
USUAL = {
    "block_out_channels": (64, 128, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D",) * 2 + ("AttnDownBlock2D",) * 2,
    "up_block_types": ("AttnUpBlock2D",) * 2 + ("UpBlock2D",) * 2,
}
# Name -> layout, side of the pictures, bf16, share of the repeats.
CASES: dict[str, tuple[dict[str, Any], int, bool, float]] = {
    "default recipe on a CPU: 28x28, bf16": (DEFAULT, 28, True, 1.0),
    "the same, float32": (DEFAULT, 28, False, 1.0),
    "channels 64, 128, 256, 256, 32x32, float32": (USUAL, 32, False, 0.25),
}
SHARES = {"digits at 8x8": ["--resolution", "8"], "digits at 28x28": ["--resolution", "28"]}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clock() -> float:
    """CPU seconds of this process, which other programs disturb less; on a GPU seconds, after waiting for it."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def pair(layout: dict[str, Any]) -> list[nn.Module]:
    """Their network and ours, with the same weights; none of them is zero, as after some training."""
    torch.manual_seed(0)
    theirs, ours = UNet2DModel(**layout), CustomUNet2DModel(**layout)
    ours.load_state_dict(theirs.state_dict())
    return [theirs.to(DEVICE), ours.to(DEVICE)]


def make_inputs(layout: dict[str, Any], side: int) -> tuple[torch.Tensor | None, ...]:
    """A batch of noisy pictures, timesteps and labels."""
    sample = torch.randn(BATCH, layout.get("in_channels", 3), side, side, device=DEVICE)
    labels = torch.arange(BATCH, device=DEVICE) % 10 if "num_class_embeds" in layout else None
    return sample, torch.randint(0, 1000, (BATCH,), device=DEVICE), labels


def predict(model: nn.Module, inputs: tuple[torch.Tensor | None, ...], bf16: bool) -> torch.Tensor:
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
        prediction: torch.Tensor = model(*inputs).sample
    return prediction


def forward(model: nn.Module, inputs: tuple[torch.Tensor | None, ...], bf16: bool) -> None:
    with torch.no_grad():
        predict(model, inputs, bf16)


def step(model: nn.Module, inputs: tuple[torch.Tensor | None, ...], bf16: bool) -> None:
    (predict(model, inputs, bf16).float() - 1).square().mean().backward()
    model.zero_grad()


def in_turn(runs: list[Callable[[], None]], repeats: int) -> tuple[list[float], list[float]]:
    """Median milliseconds of each; first quartile, median and third of the ratio of the first to the second."""
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 2):
        for run, taken in zip(runs, times, strict=True):
            start = clock()
            run()
            if repeat >= 2:
                taken.append(1e3 * (clock() - start))
    ratios = [theirs / ours for theirs, ours in zip(*times, strict=True)]
    return [statistics.median(taken) for taken in times], statistics.quantiles(ratios, n=4)


def kept_bytes(model: nn.Module, inputs: tuple[torch.Tensor | None, ...], bf16: bool) -> int:
    """Bytes of the tensors that are kept for the backward pass, each once, without the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        predict(model, inputs, bf16)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def print_networks(repeats: int, compiled: bool) -> None:
    """The first table."""
    print("| network | | UNet2DModel | ours | ratio | quartiles |\n|---|---|---|---|---|---|")
    for name, (layout, side, bf16, share) in CASES.items():
        models, inputs = pair(layout), make_inputs(layout, side)
        number = max(4, round(share * repeats))
        kinds = [("eager", models)]
        if compiled:
            torch._dynamo.reset()
            kinds.append(("compiled", [torch.compile(copy.deepcopy(model)) for model in models]))  # type: ignore[misc]
        for kind, runnable in kinds:
            for what, function in (("forward", forward), ("training step", step)):
                runs = [partial(function, model, inputs, bf16) for model in runnable]
                (theirs, ours), (low, middle, high) = in_turn(runs, number)
                row = f"{theirs:.1f} ms | {ours:.1f} ms | {middle:.2f} | {low:.2f} … {high:.2f}"
                print(f"| {name} | {kind}, {what} | {row} |", flush=True)
        theirs, ours = (kept_bytes(model, inputs, bf16) / 1e6 for model in models)
        print(f"| {name} | kept for the backward pass | {theirs:.1f} MB | {ours:.1f} MB | {theirs / ours:.2f} | |")


def print_shares(steps: int) -> None:
    """The second table."""
    sys.path.insert(0, str(Path(__file__).parent))
    import bench_training

    bench_training.now = clock
    print(
        "| default recipe, batch 16 | a step | forward, backward, optimiser | the rest, quartiles |\n|---|---|---|---|"
    )
    for name, flags in SHARES.items():
        records = bench_training.measure(flags, steps, 10)
        whole = statistics.median(1e3 * record["step"] for record in records)
        rest = [1 - sum(record[part] for part in bench_training.MODEL) / record["step"] for record in records]
        low, middle, high = statistics.quantiles(rest, n=4)
        print(f"| {name} | {whole:.1f} ms | {1 - middle:.1%} | {middle:.1%} ({low:.1%} … {high:.1%}) |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="measure torch.compile of both too (minutes)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of the second table; 0: leave it out")
    args = parser.parse_args()
    machine = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, Python {platform.python_version()}; ", end="")
    print(f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {machine}; batch {BATCH}\n")
    print_networks(args.repeats, args.compile)
    if args.steps:
        print()
        print_shares(args.steps)


if __name__ == "__main__":
    main()
