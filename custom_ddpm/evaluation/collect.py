"""Features of sets of pictures, over all processes, and their cache."""

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object

from ..data.base import fingerprint
from ..sampling import process_state
from .distances import Moments, merge_all
from .features import Features
from .pictures import Pictures

KEPT = 10_000  # pictures whose features are kept, for what moments do not give
VERSION = 1  # to be increased with every change of what is cached


@dataclass(frozen=True)
class FeatureSet:
    """What is known of a set of pictures in the space of its features.

    Args:
        moments: of all pictures, on the CPU.
        kept: features of the first pictures by position, float32 (K, D), on the CPU.
    """

    moments: Moments
    kept: torch.Tensor


def collect(pictures: Pictures, extractors: Sequence[Features], batch_size: int, kept: int = KEPT) -> list[FeatureSet]:
    """Compute features of all pictures, batch by batch, of which every process does its share.

    Args:
        pictures: the set; it is read, or drawn, once.
        extractors: the features.
        batch_size: pictures at once.
        kept: number of pictures whose features are returned; of the others only the moments.

    Returns:
        One for each of the extractors, the same on every process.

    Raises:
        ValueError: the features of a picture are not finite.
    """
    moments: list[Moments | None] = [None] * len(extractors)
    rows: list[list[torch.Tensor]] = [[] for _ in extractors]
    positions: list[int] = []
    for numbers, images, _ in pictures.batches(batch_size):
        if not len(images):
            continue
        mine = sum(number < kept for number in numbers)
        positions += numbers[:mine]
        for i, features in enumerate(extractors):
            values = features(images)
            part = Moments.of(values.cpu() if values.device.type == "mps" else values)  # which has no float64
            before = moments[i]
            moments[i] = part if before is None else before.merge(part)
            rows[i].append(values[:mine].cpu())
    order = np.argsort([number for own in gather_object([positions]) for number in own], kind="stable")
    results = []
    for features, own, own_rows in zip(extractors, moments, rows, strict=True):
        on_cpu = None if own is None else Moments(own.count, own.mean.cpu(), own.scatter.cpu())
        parts = gather_object([(on_cpu, own_rows)])
        merged = merge_all(each for each, _ in parts if each is not None)  # a process may have had no pictures
        if not bool(torch.isfinite(merged.mean).all()):
            raise ValueError(f"features of {pictures.description} by {features.name} are not finite")
        everything = torch.cat([row for _, found in parts for row in found])
        results.append(FeatureSet(merged, everything[torch.from_numpy(order)]))
    return results


def cache_file(pictures: Pictures, features: Features, kept: int = KEPT, cache_dir: str | None = None) -> Path | None:
    """File of the cached features of a set; None if the pictures or the features cannot be identified.

    The fingerprint of a dataset is that of its pixels after decoding, resizing and cropping, and so covers these.
    """
    if pictures.fingerprint is None or features.identity is None:
        return None
    key = fingerprint(VERSION, pictures.fingerprint, features.identity, kept)
    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "custom_ddpm_features" / f"{key}.npz"


def collect_cached(
    pictures: Pictures, features: Features, batch_size: int, kept: int = KEPT, cache_dir: str | None = None
) -> FeatureSet:
    """`collect`, from the cache if it is there; a damaged file is replaced."""
    state, file = process_state(), cache_file(pictures, features, kept, cache_dir)
    if file is None:
        return collect(pictures, [features], batch_size, kept)[0]
    found = _read(file)
    if all(gather_object([found is not None])):  # on every machine
        assert found is not None
        return found
    result = collect(pictures, [features], batch_size, kept)[0]
    if state.is_main_process:
        _write(file, result)
    state.wait_for_everyone()
    return result


def _read(file: Path) -> FeatureSet | None:
    try:
        with np.load(file, allow_pickle=False) as stored:
            mean, scatter, rows = (torch.from_numpy(stored[name]) for name in ("mean", "scatter", "kept"))
            return FeatureSet(Moments(int(stored["count"]), mean, scatter), rows)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(file: Path, result: FeatureSet) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with partial.open("wb") as target:
        moments = result.moments
        np.savez(target, count=moments.count, mean=moments.mean, scatter=moments.scatter, kept=result.kept)
    partial.replace(file)
