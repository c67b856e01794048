"""What a run costs against the number of rows, the resolution, the batch and the number of timesteps T.

    taskset -c 0 python benchmarks/scale.py --output docs/images/scale.png

One thread, CPU seconds, medians of several repetitions; the network is that of the default recipe for the size. Each
column is printed with the exponent k of the best power law, cost ~ n^k: 0 is a cost that does not grow, 1 one that
grows with the work.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from datasets import Dataset, Features, Image
from PIL import Image as PILImage

from custom_ddpm import CustomDDPMScheduler, CustomUNet2DModel
from custom_ddpm.config import TrainingConfig
from custom_ddpm.data import open_images
from custom_ddpm.objective import diffusion_loss
from custom_ddpm.recipe import Facts, complete
from custom_ddpm.training.parts import build_optimizer, build_scheduler


def median_seconds(function: Callable[[], Any], repetitions: int) -> float:
    """Median CPU time of a call, after one that is not counted."""
    spent = []
    for _ in range(repetitions + 1):
        begin = time.process_time()
        function()
        spent.append(time.process_time() - begin)
    return statistics.median(spent[1:])


def network(side: int) -> tuple[CustomUNet2DModel, CustomDDPMScheduler, torch.optim.Optimizer]:
    """Network, schedule and optimiser of the default recipe for colour pictures without classes."""
    config = complete(TrainingConfig(max_train_steps=1), Facts(side, side, None, "cpu"))
    assert config.block_out_channels is not None
    levels = len(config.block_out_channels)
    torch.manual_seed(0)
    unet = CustomUNet2DModel(
        sample_size=side,
        patch_size=config.patch_size,
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        resnet_time_scale_shift=config.resnet_time_scale_shift,
    )
    return unet, build_scheduler(config), build_optimizer(config, unet)


def step_cost(side: int = 32, batch: int = 16) -> float:
    """Seconds of an optimiser step."""
    unet, scheduler, optimizer = network(side)
    x_0, t = torch.rand(batch, 3, side, side) * 2 - 1, torch.randint(0, 1000, (batch,))

    def step() -> None:
        noise = torch.randn_like(x_0)
        x_t = scheduler.add_noise(x_0, noise, t)
        diffusion_loss(scheduler, unet(x_t, t).sample, x_0, noise, x_t, t).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return median_seconds(step, 7)


def timesteps_cost(number: int) -> float:
    """Seconds to build a scheduler with T timesteps, to set 20 inference steps and to do one."""

    def sample() -> None:
        scheduler = CustomDDPMScheduler(number)
        scheduler.set_timesteps(min(20, number))
        scheduler.step(torch.zeros(1, 3, 32, 32), scheduler.timesteps[0], torch.zeros(1, 3, 32, 32))

    return median_seconds(sample, 7)


def rows_cost(rows: int) -> tuple[float, float]:
    """Seconds to open a dataset of 8x8 pictures that is in the cache, and to read 100 random batches of 16."""
    with tempfile.TemporaryDirectory() as folder:
        pixels = np.random.default_rng(0).integers(0, 256, (rows, 8, 8), dtype=np.uint8)
        data_folder = Path(folder, "data")
        data_folder.mkdir()
        write_pictures(pixels, data_folder / "train.parquet")
        options: dict[str, Any] = {"dataset_name": str(data_folder), "resolution": 8, "cache_dir": f"{folder}/cache"}
        data = open_images(**options)
        order = np.random.default_rng(1).integers(0, rows, (100, 16))
        opened = median_seconds(lambda: open_images(**options), 3)
        read = median_seconds(lambda: [*data.batches(iter(order.tolist()))], 3)
        return opened, read


def write_pictures(pixels: np.ndarray, file: Path) -> None:
    """A parquet file with a column of PNG pictures."""

    def encoded(array: np.ndarray) -> dict[str, Any]:
        buffer = io.BytesIO()
        PILImage.fromarray(array).save(buffer, "PNG", compress_level=0)
        return {"bytes": buffer.getvalue(), "path": None}

    features = Features({"image": Image()})
    Dataset.from_dict({"image": [encoded(each) for each in pixels]}, features=features).to_parquet(file)


def exponent(numbers: list[int], costs: list[float]) -> float:
    """Slope of the cost against the number, both as logarithms."""
    return float(np.polyfit(np.log(numbers), np.log(costs), 1)[0])


def draw(measured: dict[str, tuple[list[int], list[float]]], file: Path) -> None:
    """Each cost against its number, all in decades of the same height."""
    figure, axes = plt.subplots(1, len(measured), figsize=(2.7 * len(measured), 3.4), sharey=True, layout="constrained")
    for axis, (name, (numbers, costs)) in zip(axes, measured.items(), strict=True):
        axis.loglog(numbers, [1000 * cost for cost in costs], "o-")
        axis.set_title(name.replace(": ", ":\n"), fontsize=9)
        axis.set_xlabel("n")
        axis.set_xticks(numbers, [f"{number:,}" for number in numbers], fontsize=7)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("CPU milliseconds")
    figure.savefig(file, dpi=110)


def main() -> None:
    """Print a table for each dimension and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("scale.png"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [rows_cost(number) for number in args.rows]
    sides, batches, timesteps = [16, 32, 64, 128], [1, 4, 16, 64], [10, 100, 1_000, 10_000]
    measured = {
        "rows: opening the cached data": (args.rows, [opened for opened, _ in rows]),
        "rows: 100 random batches of 16": (args.rows, [read for _, read in rows]),
        "side in pixels: optimiser step": (sides, [step_cost(side=side) for side in sides]),
        "batch: optimiser step": (batches, [step_cost(batch=batch) for batch in batches]),
        "T: scheduler and a sampling step": (timesteps, [timesteps_cost(number) for number in timesteps]),
    }
    print("| what | " + " | ".join(["n: milliseconds"] * 4) + " | exponent |\n|---|" + "---:|" * 5)
    for name, (numbers, costs) in measured.items():
        cells = [f"{number:,}: {1000 * cost:,.1f}" for number, cost in zip(numbers, costs, strict=True)]
        print(f"| {name} | {' | '.join(cells)} | {exponent(numbers, costs):.2f} |", flush=True)
    draw(measured, args.output)


if __name__ == "__main__":
    main()
