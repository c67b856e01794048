"""Training runs of a second, on 8x8 digits, for the tests; and what is left of them, to compare."""

import json
import math
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, get_fsdp2_grad_scaler

from custom_ddpm.config import TrainingConfig
from custom_ddpm.recipe import STOCK
from custom_ddpm.training import loop, parts, train
from custom_ddpm.training.randomness import Draws

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "examples" / "digits")
SCRIPT = str(ROOT / "train_ddpm.py")
TINY = {
    "recipe": "stock",
    **{name: value for name, value in STOCK.items() if name not in ("num_epochs", "guidance_scale")},
    "dataset_name": DIGITS,
    "resolution": [8],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "ddpm_num_steps": 20,
    "train_batch_size": 4,
    "max_train_steps": 12,
    "lr_warmup_steps": 3,
    "learning_rate": 1e-3,
    "checkpointing_steps": 4,
    "save_images_steps": 1_000_000,
    "eval_batch_size": 2,
    "ddpm_num_inference_steps": 1,
    "logging_steps": 5,
}
# Everything random, except importance sampling of t.
RANDOM = {
    "dropout": 0.2,
    "random_flip": True,
    "augment_share": 0.5,
    "class_conditional": True,
    "label_dropout": 0.3,
    "gradient_accumulation_steps": 2,
}


def small_features(images: torch.Tensor) -> torch.Tensor:
    """The mean of each row, for --eval_features runs:small_features: eight numbers, of which metrics are quick."""
    return images.float().mean((1, 3)) / 255


def all_pixels(images: torch.Tensor) -> torch.Tensor:
    """For --features runs:all_pixels: 64 numbers of a picture of 8x8."""
    return images.float().flatten(1) / 255


class Killed(BaseException):
    """A process that ends where it stands, as far as a test can play it: nothing catches this."""


def tiny(output_dir: Path, **changes: Any) -> TrainingConfig:
    return TrainingConfig(**{**TINY, "output_dir": str(output_dir), **changes})


def flags(output_dir: Path, **changes: Any) -> list[str]:
    """The same as words of the command line."""
    words = []
    for name, value in {**TINY, "output_dir": str(output_dir), **changes}.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run(output_dir: Path, **changes: Any) -> Path:
    """Train in this process, as if it had just started."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return train(tiny(output_dir, **changes))


def run_killed_at(monkeypatch: Any, step: int, output_dir: Path, **changes: Any) -> None:
    """Train, and be killed in optimiser step `step`, counted from 0."""
    steps_begun = iter(range(10**6))
    draw = loop.draw

    def draw_or_die(seed: int, at: int, *arguments: Any) -> Draws:
        if at == step and next(steps_begun) == changes.get("gradient_accumulation_steps", 1) - 1:
            raise Killed
        return draw(seed, at, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "draw", draw_or_die)
        try:
            run(output_dir, **changes)
        except Killed:
            return
    raise AssertionError(f"the run never came to step {step}")


# Processes with the imports done, and none of the threads of this one, whose locks a plain fork would copy.
SERVER = multiprocessing.get_context("forkserver") if "forkserver" in multiprocessing.get_all_start_methods() else None
if SERVER is not None:
    SERVER.set_forkserver_preload(["custom_ddpm.training"])
needs_forkserver = pytest.mark.skipif(SERVER is None, reason="needs processes to be forked")


def _one_process(rank: int, processes: int, port: int, function: Callable[..., Any], arguments: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    function(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def on_processes(processes: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function on several processes, with the environment that a launcher would give them."""
    assert SERVER is not None
    port = free_port()
    each = [(rank, processes, port, function, arguments) for rank in range(processes)]
    workers = [SERVER.Process(target=_one_process, args=words, daemon=True) for words in each]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    exitcodes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    assert exitcodes == [0] * processes


def _run(cache: str, output_dir: Path, changes: dict[str, Any]) -> None:
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    run(output_dir, **changes)


def run_on_processes(processes: int, output_dir: Path, **changes: Any) -> None:
    """Train on several processes."""
    on_processes(processes, _run, str(datasets.config.HF_DATASETS_CACHE), output_dir, changes)


def split(plugin_options: dict[str, Any], cache: str, output_dir: Path, changes: dict[str, Any]) -> None:
    """Train with FSDP on this process and its like, which only ever run this once.

    accelerate sets it up for GPUs only, torch has it for CPUs too: what accelerate does there is done here.
    """

    class SplitOnCPU(parts.Accelerator):
        def __init__(self, **options: Any):
            super().__init__(**options)
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.state.fsdp_plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **plugin_options})
            if options["mixed_precision"] != "no":
                self.state.fsdp_plugin.set_mixed_precision(options["mixed_precision"])
            super().__init__(**options)
            if options["mixed_precision"] == "fp16":
                self.native_amp, self.scaler = True, get_fsdp2_grad_scaler(device="cpu")

    parts.Accelerator = SplitOnCPU  # type: ignore[misc]
    _run(cache, output_dir, changes)


def run_split(processes: int, output_dir: Path, plugin_options: dict[str, Any], **changes: Any) -> None:
    """Train on several processes with FSDP."""
    on_processes(processes, split, plugin_options, str(datasets.config.HF_DATASETS_CACHE), output_dir, changes)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights, averages, optimiser state, history of the sampler of t."""
    tensors = {}
    for file in checkpoint.glob("*.safetensors"):
        tensors |= {f"{file.stem}/{name}": value for name, value in safetensors.torch.load_file(file).items()}
    tensors["EMA step"] = torch.tensor(json.loads((checkpoint / "metadata.json").read_text())["ema_step"] or 0)
    return tensors


def differences(one: Path, other: Path) -> list[str]:
    """The names of the tensors that are not the same in every bit."""
    one_state, other_state = state(one), state(other)
    assert one_state.keys() == other_state.keys()
    return [name for name, value in one_state.items() if not torch.equal(value, other_state[name])]


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without what is a matter of time."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")} for line in lines]


def assert_the_seventh_of_eight_steps_was_left_out(output_dir: Path) -> None:
    """Of a run with `logging_steps` and `checkpointing_steps` 1: weights and optimiser stayed, the rest went on."""
    before, after, later = (state(output_dir / f"checkpoint-{step}") for step in (6, 7, 8))
    for name, tensor in before.items():
        if name.startswith(("unet", "optimizer")):
            assert torch.equal(tensor, after[name]), name
    assert not torch.equal(after["unet/conv_in.weight"], later["unet/conv_in.weight"])
    assert all(torch.isfinite(tensor).all() for tensor in later.values())
    # Its own count of steps is the optimiser's, for the bias correction; the others go on.
    assert later["optimizer/conv_in.weight.step"] == 7 and later["EMA step"] == 8
    lines = metrics(output_dir)
    assert [line["skipped_steps"] for line in lines] == [0] * 6 + [1, 0]
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)


def python_environment(**changes: str) -> dict[str, str]:
    """For a program of its own: one thread, no pause, and nothing of a launcher that the tests may run under."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "MASTER_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **changes}


PYTHON = sys.executable
LAUNCH = [PYTHON, "-m", "accelerate.commands.accelerate_cli", "launch"]
