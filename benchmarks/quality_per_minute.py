"""Quality for the same time: this package and its peers train on the same pictures for as many minutes, on one core.

    python examples/make_fashion_mnist.py FOLDER fashion-mnist
    custom-ddpm features train fashion-mnist --resolution 28 --output_dir features
    taskset -c 0 python benchmarks/quality_per_minute.py fashion-mnist features --size 28 --test_split test

Every contender has one thread. Runs of this package are of `--time_budget` minutes of wall clock, from the start of the
process to its end; a peer has as many minutes of CPU time, and goes on from one point of time to the next. 256 pictures
of each are drawn in 20 steps of the sampler of its own examples, or of DPM-Solver++, and compared with the pictures of
the split, in the features of a classifier. A line of JSON for each goes to `results.jsonl`;
`benchmarks/quality_tables.py` makes tables and figures of it.
"""

import argparse
import itertools
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
from peers import PEERS, Peer

ROOT = Path(__file__).parent.parent
OURS: dict[str, list[str]] = {
    "default": [],
    # The recipe that was found by hand for Fashion-MNIST, before there was a default one.
    "by hand": "--recipe stock --class_conditional --block_out_channels 32 64 64 --layers_per_block 1 "
    "--norm_num_groups 8 --down_block_types DownBlock2D DownBlock2D AttnDownBlock2D --train_batch_size 64 "
    "--learning_rate 1e-3 --lr_warmup_steps 100 --ema_max_decay 0.995".split(),
    "stock": ["--recipe", "stock"],
    # The last grid, 64 pictures, would take most of fifteen minutes.
    "ddpm": ["--recipe", "ddpm", "--eval_batch_size", "4"],
}
GRIDS = "--preview_sampler dpmsolver++ --ddpm_num_inference_steps 20 --save_images_steps 1000000".split()


def _batches(args: argparse.Namespace, peer: Peer) -> Iterator[torch.Tensor]:
    """Endless batches of normalised pictures, of the size that the network of a peer takes."""
    from custom_ddpm.data import normalise, open_images

    data = open_images(dataset_name=args.data, resolution=args.size)
    for images, _ in data.batches(range(i, i + peer.batch_size) for i in itertools.count(0, peer.batch_size)):
        yield _fitted(normalise(images), peer.size)


def _fitted(images: torch.Tensor, size: int) -> torch.Tensor:
    """Padded with black to a size a little larger; every pixel repeated for a size more than twice as large."""
    times, border = size // images.shape[-1], (size % images.shape[-1]) // 2
    return F.pad(images.repeat_interleave(times, 2).repeat_interleave(times, 3), (border,) * 4, value=-1.0)


def _fitted_back(images: torch.Tensor, size: int) -> torch.Tensor:
    times, border = images.shape[-1] // size, (images.shape[-1] % size) // 2
    inside = images[..., border : border + times * size, border : border + times * size]
    return F.avg_pool2d(inside, times)


def _flops(net: torch.nn.Module, loss: Any, channels: int, size: int) -> float:
    """Operations of a training step for one picture: forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        loss(torch.randn(2, channels, size, size)).backward()
    net.zero_grad()
    return counter.get_total_flops() / 2


def train_peer(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train a peer; at each number of minutes, in CPU time, draw pictures into an NPZ file and tell of it."""
    from diffusers.training_utils import EMAModel

    torch.manual_seed(args.seed)
    peer = PEERS[name](args.channels, args.size)
    found = {
        "parameters": sum(parameter.numel() for parameter in peer.net.parameters()),
        "flops_per_picture": _flops(peer.net, peer.loss, args.channels, peer.size),
    }
    average = EMAModel(peer.net.parameters(), decay=peer.decay or 0.9999, use_ema_warmup=True, power=0.75)
    batches, steps, elsewhere = _batches(args, peer), 0, time.process_time()
    for minutes in args.minutes:
        while time.process_time() - elsewhere < 60 * minutes:
            peer.loss(next(batches)).backward()
            torch.nn.utils.clip_grad_norm_(peer.net.parameters(), 1.0)
            peer.optimizer.step()
            peer.optimizer.zero_grad()
            average.step(peer.net.parameters())
            steps += 1
        start = time.process_time()
        average.store(peer.net.parameters())
        average.copy_to(peer.net.parameters())
        peer.net.eval()
        with torch.no_grad():
            drawn = torch.cat([peer.draw(min(64, args.num_images - i)) for i in range(0, args.num_images, 64)])
        average.restore(peer.net.parameters())
        peer.net.train()
        _save(_fitted_back(drawn.float(), args.size), _file(name, minutes, args))
        elsewhere += time.process_time() - start
        yield {"minutes": minutes, "steps": steps, "pictures": steps * peer.batch_size, **found}


def _save(pictures: torch.Tensor, file: Path) -> None:
    pixels = ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1)
    np.savez(file, arr_0=(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).numpy())


def _file(name: str, minutes: float, args: argparse.Namespace) -> Path:
    words = "".join(letter if letter.isalnum() else "-" for letter in name)
    return Path(args.output_dir, f"{words}-{minutes:g}-{args.seed}.npz").resolve()


def train_ours(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Runs of this package, by its commands: one for each number of minutes."""
    size = [] if args.own_size and name == "default" else ["--resolution", str(args.size)]
    flags = [*OURS[name], *size, "--seed", str(args.seed), *([] if name == "default" else GRIDS)]
    for minutes in args.minutes:
        file = _file(name, minutes, args)
        run = file.with_suffix("")
        words = ["--dataset_name", args.data, "--time_budget", str(minutes), "--output_dir", str(run), *flags]
        start, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run([sys.executable, str(ROOT / "train_ddpm.py"), *words], check=True, stdout=sys.stderr)
        took = time.time() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        words = ["-n", str(args.num_images), "--num_inference_steps", "20", "--format", "npz", "--output_dir"]
        sampler = ["--scheduler", "DPMSolverMultistepScheduler", "--scheduler_options", "thresholding=true"]
        sampler += ["sample_max_value=1.0", "timestep_spacing=trailing"]
        command = [sys.executable, "-m", "custom_ddpm.cli", "sample", str(run), *words, f"{run}-samples", *sampler]
        subprocess.run(command, check=True, stdout=sys.stderr)
        os.replace(f"{run}-samples/samples.npz", file)
        state = max((json.loads(each.read_text()) for each in run.glob("checkpoint-*/metadata.json")), key=_step)
        found = {"steps": state["step"], "pictures": state["samples_seen"], **_cost(run, args)}
        yield {"minutes": minutes, "seconds": took, "cpu_seconds": used, **found}


def _step(state: dict[str, Any]) -> int:
    return int(state["step"])


def _cost(run: Path, args: argparse.Namespace) -> dict[str, float]:
    from custom_ddpm import CustomUNet2DModel

    net = CustomUNet2DModel.from_pretrained(run, subfolder="unet")
    labels = None if net.config.num_class_embeds is None else torch.zeros(2, dtype=torch.long)

    def loss(images: torch.Tensor) -> torch.Tensor:
        return net(images, torch.zeros(2), class_labels=labels).sample.square().mean()

    flops = _flops(net, loss, args.channels, args.size)
    return {"parameters": sum(math.prod(p.shape) for p in net.parameters()), "flops_per_picture": flops}


def evaluate(name: str, found: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The distances of the pictures of one contender, with what was found while it was trained."""
    file = _file(name, found["minutes"], args)
    scores = file.with_suffix(".json")
    words = [str(file), "--against", args.data, "--split", args.test_split, "--features", args.features]
    command = [sys.executable, "-m", "custom_ddpm.cli", "evaluate", *words, "--output", str(scores)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    metrics = json.loads(scores.read_text())["metrics"]
    values = {each["name"]: [each["value"], each["standard_error"]] for each in metrics}
    machine = {"machine": platform.processor() or platform.machine(), "torch": version("torch")}
    return {"name": name, "data": Path(args.data).name, "seed": args.seed, **found, **values, **machine}


def main() -> None:
    """Measure contenders one after another, and print a line of JSON for each and each number of minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="dataset, as train_ddpm.py --dataset_name takes it")
    parser.add_argument("features", help="folder of `custom-ddpm features train`")
    parser.add_argument("--size", type=int, required=True, help="height and width of the pictures")
    parser.add_argument("--own_size", action="store_true", help="the default recipe is not told the size")
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--test_split", default="train", help="split that the pictures are compared with")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 2, 5, 15])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_images", type=int, default=256)
    parser.add_argument("--contenders", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS])
    parser.add_argument("--output_dir", default="quality-per-minute")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    for name in args.contenders:
        for found in (train_ours if name in OURS else train_peer)(name, args):
            line = json.dumps(evaluate(name, found, args))
            print(line, flush=True)
            with Path(args.output_dir, "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
