"""Pictures per second of the data path on one core, beside that of diffusers' `train_unconditional.py`.

`python benchmarks/bench_data.py [--pictures 10000] [--rounds 7]`

The peer decodes and transforms every picture anew in every epoch: `datasets` with `set_transform` and torchvision's
Resize, crop, ToTensor and Normalize in a DataLoader, as the script has it (where torchvision is absent, the same steps
on PIL and torch). Both read the same parquet file in random order, in one process on one core; ours with its thread
that prepares ahead. Rounds are interleaved; printed are medians, and the median and range of the ratios to the peer
within a round. (`datasets` pauses for 5 seconds at the end of each epoch of a parquet stream: that is the low end.)
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch

from custom_ddpm.data import normalise, open_images

try:
    from torchvision import transforms as torchvision_transforms
except ImportError:
    torchvision_transforms = None

BATCH = 128
CASES = {
    # name: (height, width of the files, their format, resolution)
    "like CIFAR-10: PNG 32x32 -> 32x32": (32, 32, "PNG", 32),
    "photographs: JPEG 240x320 -> 64x64": (240, 320, "JPEG", 64),
}


def write_dataset(folder: Path, number: int, height: int, width: int, kind: str) -> None:
    """Smooth random colour fields with a little noise, whose files are about as large as those of photographs."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(number):
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        smooth = np.asarray(coarse.resize((width, height), PIL.Image.Resampling.BICUBIC), np.int16)
        noisy = (smooth + rng.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        PIL.Image.fromarray(noisy).save(buffer, kind)
        rows.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": rows}, features).to_parquet(folder / "train.parquet")


def peer_transform(resolution: int) -> Callable[[PIL.Image.Image], torch.Tensor]:
    """Resize (bilinear), random crop, to [-1, 1]: the script's defaults."""
    if torchvision_transforms is not None:
        v = torchvision_transforms
        resize = v.Resize(resolution, interpolation=v.InterpolationMode.BILINEAR)
        return v.Compose([resize, v.RandomCrop(resolution), v.ToTensor(), v.Normalize([0.5], [0.5])])

    def transform(image: PIL.Image.Image) -> torch.Tensor:
        scale = resolution / min(image.size)
        if scale != 1:
            size = (round(image.width * scale), round(image.height * scale))
            image = image.resize(size, PIL.Image.Resampling.BILINEAR)
        left = int(torch.randint(image.width - resolution + 1, ()))
        top = int(torch.randint(image.height - resolution + 1, ()))
        if image.size != (resolution, resolution):
            image = image.crop((left, top, left + resolution, top + resolution))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32).div(255).sub_(0.5).div_(0.5)

    return transform


def peer_batches(folder: Path, resolution: int) -> Iterator[torch.Tensor]:
    dataset = datasets.load_dataset(str(folder), split="train")
    transform = peer_transform(resolution)
    dataset.set_transform(lambda rows: {"input": [transform(image.convert("RGB")) for image in rows["image"]]})
    while True:
        for batch in torch.utils.data.DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=0):
            yield batch["input"]


def our_batches(folder: Path, resolution: int, ready: bool, **options: object) -> Iterator[torch.Tensor]:
    data = open_images(dataset_name=str(folder), resolution=resolution, **options)
    for images, _ in data.batches(range(p, p + BATCH) for p in range(0, 10**12, BATCH)):
        yield normalise(images) if ready else images


def rate(batches: Iterator[torch.Tensor], seconds: float) -> float:
    """Pictures per second over at least so many seconds."""
    start, pictures = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        pictures += len(next(batches))
    return pictures / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one measurement")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

    peer = f"diffusers' script ({'torchvision' if torchvision_transforms else 'its steps on PIL'})"
    for case, (height, width, kind, resolution) in CASES.items():
        number = args.pictures * 32 * 32 // (resolution * resolution)
        with tempfile.TemporaryDirectory() as temporary:
            datasets.config.HF_DATASETS_CACHE = Path(temporary) / "cache"
            folder = Path(temporary) / "pictures"
            folder.mkdir()
            write_dataset(folder, number, height, width, kind)
            start = time.perf_counter()
            open_images(dataset_name=str(folder), resolution=resolution)
            print(f"\n{case}, {number:,} pictures; decoded once in {time.perf_counter() - start:.1f} s")
            paths = {
                peer: peer_batches(folder, resolution),
                "cached, uint8": our_batches(folder, resolution, ready=False),
                "cached, normalised here": our_batches(folder, resolution, ready=True),
                "streamed, normalised here": our_batches(folder, resolution, ready=True, streaming=True),
            }
            for batches in paths.values():
                rate(batches, 0.2)
            rounds = [
                {name: rate(batches, args.seconds) for name, batches in paths.items()} for _ in range(args.rounds)
            ]
            for name in paths:
                ratios = sorted(measured[name] / measured[peer] for measured in rounds)
                median = statistics.median(measured[name] for measured in rounds)
                spread = f"x{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"
                print(f"  {name:40} {median:10,.0f} pictures/s   {spread}")
            for batches in paths.values():
                batches.close()


if __name__ == "__main__":
    main()
