"""Does a model copy its training pictures? The distances of generated and of held-out pictures to the training set.

A held-out picture has a nearest training picture too. A model that has learnt the distribution is as far from the
training set as held-out pictures are; one that copies is nearer (the test of Meehan et al. 2020, arXiv:2004.05675).

The number is the share of generated pictures that are nearer to the training set than the 5 % nearest held-out ones:
5 % without copying, 100 % if every picture is a copy. Blurred or too plain pictures are near to everything, training
set or not. So there is a second condition: a generated picture is nearer to training pictures than to equally many
held-out ones in half of the cases, unless it was copied.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object

from ..sampling import image_grid
from .distances import Estimate, _squared_distances
from .features import Features
from .pictures import NumberedBatch, Pictures

QUANTILE = 0.05  # of the held-out pictures' distances
PIXELS = "pixels"


@dataclass(frozen=True)
class Memorization:
    """The result in one space.

    Args:
        share: of generated pictures that are nearer to the training set than the `QUANTILE` nearest held-out ones.
        nearer: share of generated pictures nearer to training pictures than to equally many held-out ones.
        generated, held_out: distances to the nearest training picture, (M,) and (H,).
        neighbours: positions of the k nearest training pictures of each generated one, (M, k).
    """

    share: Estimate
    nearer: Estimate
    generated: np.ndarray
    held_out: np.ndarray
    neighbours: np.ndarray

    @property
    def copies(self) -> bool:
        """Whether both numbers are beyond their expectation by more than three standard errors."""
        far = self.share.value > QUANTILE + 3 * self.share.error
        return far and self.nearer.value > 0.5 + 3 * self.nearer.error


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


def compare(
    to_training: np.ndarray, held_out_to_training: np.ndarray, to_part: np.ndarray, to_held_out: np.ndarray
) -> tuple[Estimate, Estimate]:
    """The two numbers, from distances to the nearest picture.

    Args:
        to_training: of generated pictures to the training set, (M,).
        held_out_to_training: of held-out pictures to the training set, (H,).
        to_part: of generated pictures to H training pictures, (M,).
        to_held_out: of generated pictures to the H held-out pictures, (M,).

    Returns:
        `share` and `nearer` of `Memorization`, with standard errors from M and H.
    """
    threshold = np.quantile(held_out_to_training, QUANTILE)
    share = float(np.mean(to_training < threshold))
    counts = 1 / len(to_training), 1 / len(held_out_to_training)
    # As if nothing was copied: the share of M pictures, beyond a quantile that is estimated from H.
    share_error = math.sqrt(QUANTILE * (1 - QUANTILE) * sum(counts))
    nearer = float(np.mean(to_part < to_held_out) + np.mean(to_part == to_held_out) / 2)
    return Estimate(share, share_error), Estimate(nearer, 0.5 * math.sqrt(sum(counts)))


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
    k: int = 3,
    batch_size: int = 256,
) -> Memorization:
    """Compare the distances of generated and held-out pictures to the training set.

    Args:
        generated: uint8 (M, C, H, W).
        held_out: uint8 (H, C, H, W), of the same distribution as the training pictures but none of them.
        training: the training set, which is read once.
        features: the space of the distances; `PixelFeatures()` for pixels.
        k: number of neighbours.
        batch_size: pictures at once.

    Raises:
        ValueError: fewer than 20 generated or held-out pictures, or fewer training pictures than held-out ones.
    """
    if min(len(generated), len(held_out)) < 20:
        raise ValueError(f"there are {len(generated)} generated and {len(held_out)} held-out pictures, not 20 of each")
    if training.num_images < len(held_out):
        raise ValueError(
            f"there are {training.num_images} training pictures and {len(held_out)} held-out ones; take fewer of these"
        )
    drawn, others = (
        torch.cat([features(part) for part in images.split(batch_size)]) for images in (generated, held_out)
    )
    queries, count = torch.cat([drawn, others]), len(held_out)
    first = nearest(queries, _vectors(training.batches(batch_size, 0, count), features), k)
    rest = nearest(queries, _vectors(training.batches(batch_size, count), features), k)
    distances, places = _smallest(torch.cat([first[0], rest[0]], 1), torch.cat([first[1], rest[1]], 1), k)
    to_held_out, _ = nearest(drawn, [(range(count), others)], 1)
    to_training = distances[:, 0].numpy()
    split = len(drawn)
    share, nearer = compare(
        to_training[:split], to_training[split:], first[0][:split, 0].numpy(), to_held_out[:, 0].numpy()
    )
    return Memorization(share, nearer, to_training[:split], to_training[split:], places[:split].numpy())


def draw_distances(results: dict[str, Memorization], file: Path) -> None:
    """Draw the distributions of the distances of generated and held-out pictures, one panel for each space."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(5.5 * len(results), 3.6), squeeze=False)
    for panel, (name, result) in zip(axes[0], results.items(), strict=True):
        edges = np.linspace(0, max(result.generated.max(), result.held_out.max()), 50)
        for values, label in ((result.held_out, "held-out"), (result.generated, "generated")):
            panel.hist(values, edges, density=True, alpha=0.55, label=f"{label} ({len(values):,})")
        panel.axvline(np.quantile(result.held_out, QUANTILE), color="black", linestyle="--", linewidth=1)
        panel.set_title(f"{name}: {result.share.value:.1%} left of the line, {QUANTILE:.0%} expected", fontsize=10)
        panel.set_xlabel("distance to the nearest training picture")
        panel.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def draw_neighbours(
    generated: torch.Tensor, result: Memorization, training: Pictures, file: Path, rows: int = 12
) -> None:
    """Save a picture with the generated pictures nearest to the training set, each followed by its neighbours.

    Must be called by all processes.
    """
    order = np.argsort(result.generated, kind="stable")[:rows]
    wanted = {int(place) for place in result.neighbours[order].flatten()}
    own = {
        number: images[i].cpu()
        for numbers, images, _ in training.batches(256)
        for i, number in enumerate(numbers)
        if number in wanted
    }
    found = {number: image for part in gather_object([own]) for number, image in part.items()}
    cells = []
    for row in order.tolist():
        cells += [generated[row].cpu(), *(found[int(place)] for place in result.neighbours[row])]
    image_grid(torch.stack(cells), columns=1 + result.neighbours.shape[1]).save(file)
