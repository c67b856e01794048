"""Quality for the same time: this package and its peers train on Fashion-MNIST for as many minutes, one after another.

    python examples/make_fashion_mnist.py FOLDER fashion-mnist
    custom-ddpm features train fashion-mnist --resolution 28 --output_dir features
    python benchmarks/quality_per_minute.py fashion-mnist features --minutes 3 --threads 1

Every contender is a process of its own, with the same number of threads. After the minutes are over it draws the same
number of pictures with few steps of the sampler that its own examples use, and these are compared with the test split.
Peers are measured where they are installed: `pip install denoising-diffusion-pytorch smalldiffusion`. They run as plain
loops with the models and settings of their examples, because their own programs cannot be stopped by time.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).parent.parent
OURS: dict[str, list[str]] = {
    "default": [],
    # The recipe that was found by hand for this dataset, before there was a default one.
    "by hand": "--recipe stock --class_conditional --block_out_channels 32 64 64 --layers_per_block 1 "
    "--norm_num_groups 8 --down_block_types DownBlock2D DownBlock2D AttnDownBlock2D --train_batch_size 64 "
    "--learning_rate 1e-3 --lr_warmup_steps 100 --ema_max_decay 0.995 --mixed_precision no".split(),
    "stock": "--recipe stock --mixed_precision no".split(),
}
Peer = tuple[Any, Callable[[Any], Any], Any, Callable[[int], Any]]  # network, loss, optimiser, draw


def _batches(folder: str, size: int) -> Iterator[Any]:
    """Endless batches of normalised pictures, padded with black from 28x28 to 32x32."""
    import torch

    from custom_ddpm.data import normalise, open_images

    data = open_images(dataset_name=folder, resolution=28)
    positions = (range(start, start + size) for start in range(0, 10**9, size))
    for images, _ in data.batches(positions):
        yield torch.nn.functional.pad(normalise(images), (2, 2, 2, 2), value=-1.0)


def diffusers_script() -> Peer:
    """The model, loss and settings of diffusers' `train_unconditional.py`, on one gray channel."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel

    down = ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4
    net = UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=down,
        up_block_types=up,
    )
    scheduler = DDPMScheduler()

    def loss(images: Any) -> Any:
        noise, t = torch.randn_like(images), torch.randint(0, 1000, (len(images),))
        return (net(scheduler.add_noise(images, noise, t), t).sample - noise).square().mean()

    def draw(count: int) -> Any:
        sampler = DPMSolverMultistepScheduler.from_config(scheduler.config, thresholding=True, sample_max_value=1.0)
        pipeline = DDPMPipeline(net, sampler)
        return (
            torch.from_numpy(pipeline(batch_size=count, num_inference_steps=20, output_type="np").images)[..., 0] * 2
            - 1
        )

    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    return net, loss, optimizer, draw


def lucidrains() -> Peer:
    """denoising-diffusion-pytorch with the settings of its README."""
    import torch
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    net = Unet(dim=64, dim_mults=(1, 2, 4, 8), channels=1)
    diffusion = GaussianDiffusion(net, image_size=32, timesteps=1000, sampling_timesteps=20)
    optimizer = torch.optim.Adam(diffusion.parameters(), 8e-5, betas=(0.9, 0.99))
    return net, lambda images: diffusion((images + 1) / 2), optimizer, lambda n: diffusion.sample(n)[:, 0] * 2 - 1


def smalldiffusion() -> Peer:
    """smalldiffusion with the settings of its Fashion-MNIST example."""
    import torch
    from smalldiffusion import ScheduleDDPM, Unet, generate_train_sample, samples

    schedule = ScheduleDDPM(beta_start=0.0001, beta_end=0.02, N=1000)
    net = Unet(32, 1, 1, ch=64, ch_mult=(1, 1, 2), attn_resolutions=(16,))

    def loss(images: Any) -> Any:
        images, sigma, noise, cond = generate_train_sample(images, schedule)
        return net.get_loss(images, sigma, noise, cond=cond)

    def draw(count: int) -> Any:
        *_, last = samples(net, schedule.sample_sigmas(20), gam=1.6, batchsize=count)
        return last[:, 0]

    return net, loss, torch.optim.Adam(net.parameters(), 7e-4), draw


GRIDS = "--preview_sampler dpmsolver++ --ddpm_num_inference_steps 20 --save_images_steps 1000000".split()
PEERS: dict[str, tuple[Callable[[], Peer], int]] = {  # with the batch size
    "diffusers": (diffusers_script, 16),
    "denoising-diffusion-pytorch": (lucidrains, 32),
    "smalldiffusion": (smalldiffusion, 128),
}


def train_peer(name: str, data: str, minutes: float, count: int, file: Path) -> dict[str, Any]:
    """Train a peer for some minutes, counted from the start of the process, and draw pictures into an NPZ file."""
    import torch
    from diffusers.training_utils import EMAModel

    start = psutil.Process().create_time()
    build, size = PEERS[name]
    torch.manual_seed(0)
    net, loss, optimizer, draw = build()
    average = EMAModel(net.parameters(), use_ema_warmup=True, power=0.75)
    steps = 0
    for images in _batches(data, size):
        loss(images).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(net.parameters())
        steps += 1
        if time.time() - start > 60 * minutes:
            break
    average.copy_to(net.parameters())
    net.eval()
    with torch.no_grad():
        drawn = torch.cat([draw(min(100, count - i)) for i in range(0, count, 100)])
    pixels = ((drawn[:, 2:-2, 2:-2] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    np.savez(file, arr_0=pixels.numpy())
    return {"steps": steps, "pictures": steps * size, "parameters": sum(p.numel() for p in net.parameters())}


def train_ours(name: str, data: str, minutes: float, count: int, file: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The same for a recipe of this package, by its commands."""
    run = file.with_suffix("")
    words = ["--dataset_name", data, "--time_budget", str(minutes), "--output_dir", str(run), *OURS[name]]
    size = [] if name == "default" else ["--resolution", "28", *GRIDS]
    start = time.time()
    subprocess.run([sys.executable, str(ROOT / "train_ddpm.py"), *words, *size], check=True, **options)
    seconds = time.time() - start
    words = ["-n", str(count), "--num_inference_steps", "20", "--scheduler", "DPMSolverMultistepScheduler"]
    words += ["--scheduler_options", "thresholding=true", "sample_max_value=1.0", "timestep_spacing=trailing"]
    command = [sys.executable, "-m", "custom_ddpm.cli", "sample", str(run), *words, "--format", "npz"]
    subprocess.run([*command, "--output_dir", f"{run}-samples"], check=True, **options)
    os.replace(f"{run}-samples/samples.npz", file)
    settings = json.loads(next(run.glob("checkpoint-*/metadata.json")).read_text())
    parameters = sum(map(math.prod, _shapes(run / "unet" / "diffusion_pytorch_model.safetensors")))
    return {"steps": settings["step"], "pictures": settings["samples_seen"], "parameters": parameters, "took": seconds}


def _shapes(file: Path) -> Iterator[list[int]]:
    with file.open("rb") as content:
        header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
    return (entry["shape"] for name, entry in header.items() if name != "__metadata__")


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train, draw and evaluate one contender."""
    file = Path(args.output_dir, f"{name.replace(' ', '-')}-{args.minutes:g}.npz").resolve()
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    if name in OURS:
        found = train_ours(name, args.data, args.minutes, args.num_images, file, {"env": environment})
    else:
        words = [args.data, args.features, "--peer", name, "--minutes", str(args.minutes), "--output_dir", str(file)]
        command = [sys.executable, __file__, *words, "--num_images", str(args.num_images)]
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        if process.returncode:
            return {"name": name, "problem": process.stderr.strip().splitlines()[-1]}
        found = json.loads(process.stdout.splitlines()[-1])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    scores = file.with_suffix(".json")
    words = [str(file), "--against", args.data, "--split", "test", "--features", args.features, "--output", str(scores)]
    subprocess.run([sys.executable, "-m", "custom_ddpm.cli", "evaluate", *words], check=True, env=environment)
    metrics = {
        each["name"]: [each["value"], each["standard_error"]] for each in json.loads(scores.read_text())["metrics"]
    }
    return {"name": name, "minutes": args.minutes, "cpu_seconds": after.ru_utime - before.ru_utime, **found, **metrics}


def main() -> None:
    """Measure all contenders, and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of examples/make_fashion_mnist.py")
    parser.add_argument("features", help="folder of `custom-ddpm features train`")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--contenders", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS])
    parser.add_argument("--output_dir", default="quality-per-minute")
    parser.add_argument("--peer", help=argparse.SUPPRESS)  # the process of a peer
    args = parser.parse_args()
    if args.peer:
        print(json.dumps(train_peer(args.peer, args.data, args.minutes, args.num_images, Path(args.output_dir))))
        return
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    for name in args.contenders:
        line = json.dumps(measure(name, args))
        print(line, flush=True)
        with Path(args.output_dir, "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
