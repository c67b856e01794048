"""What part of a training step is not the model's forward, backward and optimiser.

`python benchmarks/bench_training.py [--steps 60] [--warmup 10]`

Runs `train` itself, on the digits, with a clock around each of its parts: of CPU time, which other programs do not
lengthen; on a GPU of real time, and it waits for the device, which a run does not. Printed are medians over the steps:
of each part, and of the share that is not forward, backward (with what autograd does for the loss) and optimiser (with
clipping). The target is 3% or less for a model worth training; the smaller the model, the larger the share.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel

from custom_ddpm.flags import parse_config
from custom_ddpm.scheduler import CustomDDPMScheduler
from custom_ddpm.training import loop, parts, train
from custom_ddpm.training.metrics import MetricsLogger
from custom_ddpm.unet import CustomUNet2DModel

EXAMPLES = Path(__file__).parent.parent / "examples"
MODEL = ("forward", "backward", "optimiser")
PARTS: dict[str, list[tuple[Any, str]]] = {
    "forward": [(CustomUNet2DModel, "__call__")],
    "backward": [(Accelerator, "backward")],
    "optimiser": [
        (Accelerator, "clip_grad_norm_"),
        (AcceleratedOptimizer, "step"),
        (AcceleratedOptimizer, "zero_grad"),
    ],
    "average of the weights": [(EMAModel, "step")],
    "noise and loss": [(loop, "normalise"), (CustomDDPMScheduler, "add_noise"), (parts, "diffusion_loss")],
    "random draws": [(loop, "draw")],
    "metrics": [(MetricsLogger, "add_losses"), (MetricsLogger, "add_step")],
}
WIDE = (
    "--block_out_channels 32 64 128 --layers_per_block 2 --resolution 32 --image_mode RGB --train_batch_size 32".split()
)
CASES = {
    "the default: digits at 16x16": [],
    "the same at 28x28": ["--resolution", "28"],
    "RGB at 32x32, 3.9 million parameters, batch 32": WIDE,
    "RGB at 32x32 in bf16": [*WIDE, "--mixed_precision", "bf16"],
}


def clocked(function: Callable[..., Any], spent: dict[str, float], part: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        begin = now()
        try:
            return function(*arguments, **options)
        finally:
            spent[part] += now() - begin

    return call


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(flags: list[str], steps: int, warmup: int) -> list[dict[str, float]]:
    """Seconds of each part, in each step after the warm-up; "step" is the whole."""
    spent: dict[str, float] = defaultdict(float)
    records: list[dict[str, float]] = []
    kept = {(owner, name): getattr(owner, name) for places in PARTS.values() for owner, name in places}
    for part, places in PARTS.items():
        for owner, name in places:
            setattr(owner, name, clocked(kept[owner, name], spent, part))
    add_step = MetricsLogger.add_step
    last = [0.0]

    def end_of_step(metrics: MetricsLogger, grad_norm: torch.Tensor, skipped: torch.Tensor, waited: float) -> None:
        add_step(metrics, grad_norm, skipped, waited)
        end = now()
        records.append({**spent, "waiting for pictures": waited, "step": end - last[0]})
        spent.clear()
        last[0] = now()

    MetricsLogger.add_step = end_of_step  # type: ignore[method-assign]
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            words = ["--config", str(EXAMPLES / "configs" / "digits.yaml"), "--dataset_name", str(EXAMPLES / "digits")]
            words += ["--output_dir", folder, "--max_train_steps", str(steps + warmup), "--eval_batch_size", "1"]
            words += ["--ddpm_num_inference_steps", "1", "--logging_steps", "1000000", *flags]
            train(parse_config(words))
    finally:
        MetricsLogger.add_step = add_step  # type: ignore[method-assign]
        for (owner, name), function in kept.items():
            setattr(owner, name, function)
    return records[warmup:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=10)
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}; medians of {args.steps} steps")
    for name, flags in CASES.items():
        records = measure(flags, args.steps, args.warmup)
        print(f"\n{name}", flush=True)
        for part in [*PARTS, "waiting for pictures"]:
            median = statistics.median(record.get(part, 0.0) for record in records)
            share = statistics.median(record.get(part, 0.0) / record["step"] for record in records)
            print(f"  {part:24}{1e3 * median:9.2f} ms {share:7.1%}")
        print(f"  {'the step':24}{1e3 * statistics.median(record['step'] for record in records):9.2f} ms")
        shares = [1 - sum(record[part] for part in MODEL) / record["step"] for record in records]
        print(f"  not forward, backward, optimiser: {statistics.median(shares):.1%}")


if __name__ == "__main__":
    sys.exit(main())
