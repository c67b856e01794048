"""Common interface of cached and streamed images, the order of the samples, and prefetching.

Samples are numbered p = 0, 1, 2, … without end. For a cached dataset of N images, position p belongs to epoch
e = p // N and is image `sample_order(seed, e, N)[p % N]`: a function of (seed, p) alone. Therefore any number of
processes sees the same order, and a run that restarts at position p neither repeats nor skips a sample. Random crops
are functions of (seed, p) as well.
"""

import hashlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .pixels import MODES, Transform

Batch = tuple[torch.Tensor, torch.Tensor | None]

STREAM_PEEK = 16  # number of first images of a stream that determine its mode


def sample_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return the order in which an epoch visits the images.

    Args:
        seed: seed of the run, >= 0.
        epoch: number of the epoch, >= 0.
        n: number of images.

    Returns:
        A permutation of 0 … n-1, int64. NumPy's SeedSequence hashes (seed, epoch) as a pair, so that the orders of
        (0, 1) and (1, 0) are independent.
    """
    return np.random.default_rng([seed, epoch]).permutation(n)


def fingerprint(*parts: Any) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 hash of the parts' repr."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Request:
    """The arguments of `open_images` that concern reading, other than the dataset and the transform.

    Args:
        image_column: column with the images.
        label_column: column with the class labels; None without `class_conditional`.
        id2label: numbering of the classes (class id -> name) to use; None: derive it from the data.
        seed: seed of the order and the random crops, >= 0.
        num_workers: number of processes that decode; 0: the calling process.
        skip: whether rows without a readable image are left out; if not, they raise an error.
    """

    image_column: str
    label_column: str | None
    id2label: Mapping[int, str] | None
    seed: int
    num_workers: int
    skip: bool


class ImageData:
    """Images of one mode and size in an endless order, made by `open_images`; subclasses store or read the pixels.

    Attributes:
        num_images: number N of readable images, or None for a stream.
        mode, channels, height, width: PIL mode and shape of every image returned.
        id2label: class id -> name for the ids 0 … K-1, or None without `class_conditional`.
        fingerprint: hash that is equal for equal images, labels and crops (for a stream: equal source and settings).
        num_skipped: number of unreadable images left out (for a stream: replaced so far, by this process).
        notes: lines about the files of the dataset: found, used, and left out with the reasons.
    """

    num_images: int | None = None
    id2label: dict[int, str] | None = None
    fingerprint: str
    num_skipped: int = 0
    notes: list[str]

    def __init__(self, transform: Transform, channels: int, found_modes: Mapping[str, int], request: Request):
        self.channels, self.height, self.width, self.mode = channels, transform.height, transform.width, MODES[channels]
        self._transform, self._found_modes, self._request = transform, found_modes, request
        self.notes = []

    def describe(self) -> str:
        """Return lines for the log: `notes`, then the images found, and the mode, size and crop applied to them."""
        number = f"a stream, its first {STREAM_PEEK}" if self.num_images is None else f"{self.num_images:,}"
        found = ", ".join(f"{count:,} {mode}" for mode, count in sorted(self._found_modes.items()))
        alpha = "kept" if self.mode == "RGBA" else f"over {self._transform.background}"
        crop = "centre" if self._transform.center_crop else "random"
        text = f"images: {number} ({found}) -> {self.mode}, transparency {alpha}; "
        text += f"{self.height}x{self.width} (height x width), {crop} crop"
        text += "" if self.id2label is None else f"; {len(self.id2label)} classes"
        text += f"; {self.num_skipped:,} unreadable left out" if self.num_skipped else ""
        return "\n".join([*self.notes, text])

    def batches(self, positions: Iterable[Sequence[int]], pin_memory: bool = False) -> Generator[Batch, None, None]:
        """Yield one batch for each sequence of sample positions.

        A background thread prepares two batches ahead, and also iterates over `positions`. Its exceptions are raised
        here; closing the generator stops it.

        Args:
            positions: 1-D sequences of sample positions, >= 0. For a stream they must not decrease.
            pin_memory: whether to copy the batches to pinned memory, for faster copies to a GPU.

        Yields:
            Images, uint8 (B, C, H, W), and labels, int64 (B,), or None without `class_conditional`.
        """
        return prefetch(self._read(positions), pin_memory)

    def take(self, n: int) -> Batch:
        """Return the first `n` images (all, if there are fewer) as one batch.

        They are in the order of the dataset, not shuffled, and cropped at the centre.
        """
        raise NotImplementedError

    def label_counts(self) -> list[int] | None:
        """Number of images of each class id; None for a stream, or without `class_conditional`."""
        return None

    def _read(self, positions: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Yield the batches for `batches`, in the thread that iterates."""
        raise NotImplementedError


def prefetch(batches: Iterator[Batch], pin_memory: bool) -> Generator[Batch, None, None]:
    """Iterate over batches in a background thread, two ahead.

    Args:
        batches: the batches to yield; exceptions of the iterator are raised here, in their place.
        pin_memory: whether to copy the batches to pinned memory, in the thread.
    """

    def prepare() -> Batch | None:
        batch = next(batches, None)
        if batch is None or not pin_memory:
            return batch
        images, labels = batch
        return images.pin_memory(), None if labels is None else labels.pin_memory()

    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="images")
    try:
        pending = deque(pool.submit(prepare) for _ in range(2))
        while (batch := pending.popleft().result()) is not None:
            pending.append(pool.submit(prepare))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
