"""Does a model copy its training pictures? The distances of generated and of held-out pictures to the training set.

A held-out picture has a nearest training picture too. A model that has learnt the distribution is as far from the
training set as held-out pictures are; one that copies is nearer (Meehan et al. 2020, arXiv:2004.05675). But blurred or
plain pictures are near to all pictures. So the distance to the nearest training picture is taken relative to the mean
distance to the next ones (Carlini et al. 2023, arXiv:2301.13188), which only a copy makes small.

The number is the share of generated pictures whose relative distance is below the 5 % quantile of held-out ones: 5 %
without copying, 100 % if every picture is a copy.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from ..sampling import image_grid
from .distances import Estimate, _squared_distances
from .features import Features
from .pictures import NumberedBatch, Pictures

QUANTILE = 0.05  # of the held-out pictures' relative distances
NEIGHBOURS = 10
PIXELS = "pixels"


@dataclass(frozen=True)
class Memorization:
    """The result in one space.

    Args:
        share: of generated pictures whose relative distance is below the `QUANTILE` of held-out ones; its standard
            error is that without copying.
        generated, held_out: distances to the nearest training picture, (M,) and (H,).
        relative_generated, relative_held_out: the same divided by the mean distance to the next NEIGHBOURS − 1.
        neighbours: positions of the nearest training pictures of each generated one, (M, NEIGHBOURS).
    """

    share: Estimate
    generated: np.ndarray
    held_out: np.ndarray
    relative_generated: np.ndarray
    relative_held_out: np.ndarray
    neighbours: np.ndarray

    @property
    def copies(self) -> bool:
        """Whether the share is above `QUANTILE` by more than three standard errors."""
        return self.share.value > QUANTILE + 3 * self.share.error


class PixelFeatures:
    """The pixels themselves, so that distances are root mean squares in gray levels of 0 … 255."""

    name, identity = PIXELS, "pixels"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels divided by √(C·H·W), float32 (B, C·H·W)."""
        return images.flatten(1).float() / math.sqrt(images[0].numel())


def nearest(
    queries: torch.Tensor, bank: Iterable[tuple[Iterable[int], torch.Tensor]], k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest vectors of a bank that is read in batches, of which every process gives its share.

    Args:
        queries: (Q, D), the same on every process.
        bank: (positions, vectors (B, D)).
        k: number of neighbours.

    Returns:
        Distances, float64 (Q, k), ascending, and positions, int64 (Q, k); where the bank has fewer vectors inf and −1.
    """
    wide = torch.float32 if queries.device.type == "mps" else torch.float64
    queries = queries.to(wide)
    best = torch.full((len(queries), k), torch.inf, dtype=wide, device=queries.device)
    place = torch.full((len(queries), k), -1, dtype=torch.int64, device=queries.device)
    for positions, vectors in bank:
        numbers = torch.tensor(list(positions), dtype=torch.int64, device=queries.device)
        found = _squared_distances(queries, vectors.to(queries))
        best, place = _smallest(torch.cat([best, found], 1), torch.cat([place, numbers.expand_as(found)], 1), k)
    parts = gather_object([(best.cpu(), place.cpu())])
    best, place = _smallest(torch.cat([each for each, _ in parts], 1), torch.cat([each for _, each in parts], 1), k)
    return best.double().sqrt(), place


def _smallest(distances: torch.Tensor, positions: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, columns = distances.topk(k, dim=1, largest=False)
    return values, positions.gather(1, columns)


def relative_distances(distances: torch.Tensor) -> torch.Tensor:
    """The nearest distance divided by the mean of the others: (Q, k), ascending -> (Q,); 0 where all are 0."""
    return distances[:, 0] / distances[:, 1:].mean(1).clamp(min=1e-12)


def _vectors(batches: Iterable[NumberedBatch], features: Features) -> Iterable[tuple[Iterable[int], torch.Tensor]]:
    for positions, images, _ in batches:
        if len(images):
            yield positions, features(images)


def gather_images(pictures: Pictures, batch_size: int) -> torch.Tensor:
    """All pictures of a set in one tensor, uint8 (N, C, H, W), on every process, in the order of their positions."""
    own = [(list(positions), images.cpu()) for positions, images, _ in pictures.batches(batch_size) if len(images)]
    parts = sorted((each for each in gather_object(own)), key=lambda part: part[0][0])
    return torch.cat([images for _, images in parts])


def memorization(
    generated: torch.Tensor,
    held_out: torch.Tensor,
    training: Pictures,
    features: Features,
    *,
    batch_size: int = 256,
) -> Memorization:
    """Compare the distances of generated and held-out pictures to the training set.

    Args:
        generated: uint8 (M, C, H, W).
        held_out: uint8 (H, C, H, W), of the same distribution as the training pictures but none of them.
        training: the training set, which is read once.
        features: the space of the distances; `PixelFeatures()` for pixels.
        batch_size: pictures at once.

    Raises:
        ValueError: fewer than 20 generated, held-out or training pictures.
    """
    counts = len(generated), len(held_out), training.num_images
    if min(counts) < 20:
        raise ValueError(
            f"there are {counts[0]} generated, {counts[1]} held-out and {counts[2]} training pictures; at least 20 of "
            "each are needed"
        )
    queries = [features(part) for images in (generated, held_out) for part in images.split(batch_size)]
    distances, places = nearest(torch.cat(queries), _vectors(training.batches(batch_size), features), NEIGHBOURS)
    first, relative = distances[:, 0].numpy(), relative_distances(distances).numpy()
    split = len(generated)
    share = float(np.mean(relative[:split] < np.quantile(relative[split:], QUANTILE)))
    # The share of M pictures beyond a quantile that is estimated from H, if nothing is copied.
    error = math.sqrt(QUANTILE * (1 - QUANTILE) * (1 / counts[0] + 1 / counts[1]))
    return Memorization(
        Estimate(share, error), first[:split], first[split:], relative[:split], relative[split:], places[:split].numpy()
    )


def as_json(results: dict[str, Memorization]) -> dict[str, Any]:
    """The numbers of each space, ready for JSON."""
    return {
        name: {
            "share": each.share._asdict(),
            "expected": QUANTILE,
            "copies": each.copies,
            "num_images": len(each.generated),
            "num_held_out_images": len(each.held_out),
            "identical": int((each.generated == 0).sum()),
        }
        for name, each in results.items()
    }


def draw_distances(results: dict[str, Memorization], file: Path) -> None:
    """Draw the distributions of the distances of generated and held-out pictures, one row for each space."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(results), 2, figsize=(11, 3.6 * len(results)), squeeze=False)
    for (left, right), (name, each) in zip(axes, results.items(), strict=True):
        pairs = (each.held_out, each.generated), (each.relative_held_out, each.relative_generated)
        for panel, pair in zip((left, right), pairs, strict=True):
            edges = np.linspace(0, max(values.max() for values in pair), 50)
            for values, label in zip(pair, ("held-out", "generated"), strict=True):
                panel.hist(values, edges, density=True, alpha=0.55, label=f"{label} ({len(values):,})")
            panel.legend()
        left.set(title=name, xlabel="distance to the nearest training picture")
        right.set(xlabel=f"the same, relative to the next {NEIGHBOURS - 1}")
        right.axvline(np.quantile(each.relative_held_out, QUANTILE), color="black", linestyle="--", linewidth=1)
        right.set_title(f"{each.share.value:.1%} left of the line, {QUANTILE:.0%} without copying", fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def draw_neighbours(
    generated: torch.Tensor, result: Memorization, training: Pictures, file: Path, rows: int = 12, k: int = 4
) -> None:
    """Save a picture with the generated pictures most like copies, each followed by its k nearest training pictures.

    Must be called by all processes.
    """
    order = np.argsort(result.relative_generated, kind="stable")[:rows]
    wanted = {int(place) for place in result.neighbours[order, :k].flatten()}
    own = {
        number: images[i].cpu()
        for numbers, images, _ in training.batches(256)
        for i, number in enumerate(numbers)
        if number in wanted
    }
    found = {number: image for part in gather_object([own]) for number, image in part.items()}
    cells = []
    for row in order.tolist():
        cells += [generated[row].cpu(), *(found[int(place)] for place in result.neighbours[row, :k])]
    image_grid(torch.stack(cells), columns=1 + k).save(file)
