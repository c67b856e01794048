"""Speed of training and sampling on a GPU, beside diffusers' U-Net, as a Markdown table; under ten minutes.

    python benchmarks/gpu.py                      # on the GPU that torch finds
    python benchmarks/gpu.py --device cpu --tiny  # the same program on a CPU, to see that it runs

Both networks have the same weights and get the same inputs; their steps alternate, and the ratio is the median of the
ratios of neighbouring steps, with its quartiles. "Step" is forward, backward, AdamW (fused) and the clipping of the
gradient. The memory is the peak during a step. Host synchronisations of this package's training loop are counted with
torch's debug mode, which CUDA alone has.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel

from custom_ddpm import CustomDDPMScheduler, CustomUNet2DModel
from custom_ddpm.objective import diffusion_loss

LAYOUTS: dict[str, dict[str, Any]] = {
    "32x32, channels 128 256 256 (default recipe)": {
        "sample_size": 32,
        "block_out_channels": (128, 256, 256),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    },
    "64x64, channels 64 128 256 256": {
        "sample_size": 64,
        "block_out_channels": (64, 128, 256, 256),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    },
}
TINY = {
    "8x8, channels 8 8": {
        "sample_size": 8,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
}


def synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def training_step(net: Any, size: int, batch: int, device: torch.device, bf16: bool) -> Callable[[], None]:
    """A function that does one optimiser step of a noise predictor on a fixed batch."""
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=True)
    scheduler = CustomDDPMScheduler()
    x_0 = torch.rand(batch, 3, size, size, device=device) * 2 - 1

    def step() -> None:
        noise, t = torch.randn_like(x_0), torch.randint(0, 1000, (batch,), device=device)
        x_t = scheduler.add_noise(x_0, noise, t)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = net(x_t, t).sample
        diffusion_loss(scheduler, output.float(), x_0, noise, x_t, t).mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return step


def alternate(first: Callable[[], None], second: Callable[[], None], device: torch.device, seconds: float) -> Any:
    """Median seconds of both functions, called in turn, and the quartiles of the ratio of neighbouring calls."""
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[1]) < 6:
        for function, spent in zip((first, second), times, strict=True):
            synchronise(device)
            begin = time.perf_counter()
            function()
            synchronise(device)
            spent.append(time.perf_counter() - begin)
    ours, peer = (spent[2:] for spent in times)  # the first calls choose kernels, or compile
    ratios = [b / a for a, b in zip(ours, peer, strict=True)]
    return statistics.median(ours), statistics.median(peer), statistics.quantiles(ratios, n=4)


def peak_memory(step: Callable[[], None], device: torch.device) -> str:
    """GiB that a step allocates at its peak."""
    if device.type != "cuda":
        return "–"
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f}"


def training_rows(args: argparse.Namespace, device: torch.device) -> None:
    """Print a line for each layout and precision, eager and compiled."""
    print(
        "| training step | batch | ours, pictures/s | UNet2DModel, pictures/s | ratio (quartiles) | GiB, ours / peer |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    for name, layout in (TINY if args.tiny else LAYOUTS).items():
        for bf16, channels_last, compiled in ((0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)):
            if compiled and args.tiny:
                continue
            torch.manual_seed(0)
            nets = [cls(**layout).to(device) for cls in (CustomUNet2DModel, UNet2DModel)]
            nets[1].load_state_dict(nets[0].state_dict())
            if channels_last:
                nets = [net.to(memory_format=torch.channels_last) for net in nets]
            ran = [torch.compile(net) for net in nets] if compiled else nets
            batch = 4 if args.tiny else args.batch_size
            steps = [training_step(net, layout["sample_size"], batch, device, bool(bf16)) for net in ran]
            ours, peer, (low, middle, high) = alternate(*steps, device, args.seconds)
            memory = " / ".join(peak_memory(step, device) for step in steps)
            words = [name, "bf16" if bf16 else "float32", *["channels_last"] * channels_last, *["compiled"] * compiled]
            ratio = f"{middle:.2f} ({low:.2f}–{high:.2f})"
            row = f"| {', '.join(words)} | {batch} | {batch / ours:,.0f} | {batch / peer:,.0f} | {ratio} | {memory} |"
            print(row, flush=True)


def scheduler_rows(device: torch.device, seconds: float) -> None:
    """Print the time of the schedulers' own functions, and the synchronisations of the training step."""
    ours, peer = CustomDDPMScheduler(), DDPMScheduler()
    x, noise = torch.randn(2, 64, 3, 32, 32, device=device)
    t = torch.randint(0, 1000, (64,), device=device)
    for scheduler in (ours, peer):
        scheduler.set_timesteps(1000, device=device)
    pairs = {
        "add_noise, 64x3x32x32": [lambda s=s: s.add_noise(x, noise, t) for s in (ours, peer)],
        "step, 64x3x32x32": [lambda s=s: s.step(noise, s.timesteps[500], x).prev_sample for s in (ours, peer)],
    }
    print("\n| scheduler | ours, µs | DDPMScheduler, µs | ratio (quartiles) |\n|---|---:|---:|---:|")
    for name, functions in pairs.items():
        mine, theirs, (low, middle, high) = alternate(*functions, device, min(seconds, 3.0))
        print(f"| {name} | {mine * 1e6:.0f} | {theirs * 1e6:.0f} | {middle:.2f} ({low:.2f}–{high:.2f}) |", flush=True)
    if device.type == "cuda":
        step = training_step(CustomUNet2DModel(**TINY["8x8, channels 8 8"]).to(device), 8, 4, device, True)
        step()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
            ours.step(noise, ours.timesteps[500], x)
        torch.cuda.set_sync_debug_mode("default")
        print(f"\nHost synchronisations of a training step and a sampling step: {len(caught)}.")


def default_run(args: argparse.Namespace) -> None:
    """Print what the default recipe does in two minutes on the digits of examples/."""
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        length = ["--max_train_steps", "3"] if args.tiny else ["--time_budget", "2"]
        command = [sys.executable, str(root / "train_ddpm.py"), *length, "--output_dir", f"{folder}/run"]
        environment = {**os.environ, "ACCELERATE_USE_CPU": str(args.device == "cpu").lower()}
        begin = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        lines = [
            line for line in (result.stdout + result.stderr).splitlines() if "pictures/s" in line or "network" in line
        ]
        if result.returncode:
            raise SystemExit(result.stderr)
        print(f"\nThe default run on the digits took {time.perf_counter() - begin:.0f} s:\n")
        print(*(f"    {line.split(chr(13))[-1]}" for line in lines), sep="\n")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None, help="by default the accelerator that torch finds")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=15.0, help="for each line of the table")
    parser.add_argument("--tiny", action="store_true", help="small networks, to see that the program runs")
    args = parser.parse_args()
    device = torch.device(args.device) if args.device else torch.accelerator.current_accelerator()
    if device is None:
        parser.error("torch finds no GPU here; --device cpu --tiny tries the program on a CPU")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{name}, torch {torch.__version__}\n")
    training_rows(args, device)
    scheduler_rows(device, args.seconds)
    default_run(args)


if __name__ == "__main__":
    main()
