"""Training of the small classifier whose features compare pictures of labelled data."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F

from ..data.base import ImageData
from .features import CONFIG_FILE, WEIGHTS_FILE, Classifier

MOST_IMAGES = 100_000  # kept in memory; more do not make better features


def _load(data: ImageData, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to `most` pictures with their labels, in a random order."""
    assert data.num_images is not None
    count = min(data.num_images, most)
    batches = list(data.batches(range(start, min(start + 1024, count)) for start in range(0, count, 1024)))
    labels = [labels for _, labels in batches if labels is not None]
    return torch.cat([images for images, _ in batches]), torch.cat(labels)


def _accuracy(model: Classifier, images: torch.Tensor, labels: torch.Tensor, device: torch.device) -> float:
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=device)
    with torch.no_grad():
        for start in range(0, len(images), 1024):
            logits = model(images[start : start + 1024].to(device))
            right += (logits.argmax(1) == labels[start : start + 1024].to(device)).sum()
    return int(right) / len(images)


def fit_classifier(
    images: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    *,
    steps: int = 1000,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Train a `Classifier` on pictures in memory, with AdamW and one cycle of the learning rate.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,) in [0, num_classes).
        num_classes: number of classes.
        steps, batch_size, learning_rate: of the optimisation; the learning rate is the highest of the cycle.
        seed: seed of the weights and of the order.
        device: device to train on.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        channels, height, width = images.shape[1:]
        model = Classifier(channels, height, width, num_classes)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        chosen, order = order[:batch_size], order[batch_size:]
        loss = F.cross_entropy(model(images[chosen].to(device)), labels[chosen].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def train_classifier(
    data: ImageData, name: str, output_dir: str | Path, *, steps: int = 1000, seed: int = 0, device: Any = "cpu"
) -> dict[str, Any]:
    """Train a classifier on nine tenths of labelled pictures, measure it on the rest, and save it.

    Args:
        data: cached pictures with labels.
        name: name of the features, printed with every number.
        output_dir: folder to write; created if it does not exist.
        steps: optimiser steps.
        seed: seed of the weights and of the order.
        device: device to train on.

    Returns:
        What is written to features.json, with the held-out accuracy.

    Raises:
        ValueError: the data has no labels, only one class, or fewer than 20 pictures.
    """
    if data.id2label is None or len(data.id2label) < 2:
        raise ValueError("a classifier needs pictures with labels of at least two classes; use --features random")
    if data.num_images is None or data.num_images < 20:
        raise ValueError(f"a classifier needs at least 20 pictures, not {data.num_images}")
    images, labels = _load(data, MOST_IMAGES)
    held_out = max(1, len(images) // 10)
    model = fit_classifier(
        images[held_out:], labels[held_out:], len(data.id2label), steps=steps, seed=seed, device=device
    )
    facts = {
        "name": name,
        "channels": data.channels,
        "height": data.height,
        "width": data.width,
        "classes": [data.id2label[i] for i in range(len(data.id2label))],
        "held_out_accuracy": _accuracy(model, images[:held_out], labels[:held_out], torch.device(device)),
        "num_train_images": len(images) - held_out,
        "num_held_out_images": held_out,
        "data_fingerprint": data.fingerprint,
        "steps": steps,
        "seed": seed,
    }
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(weights, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return facts
