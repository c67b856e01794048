"""Metrics of a set of pictures against a reference set, as a table and as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .collect import FeatureSet, collect, collect_cached
from .distances import (
    Estimate,
    Moments,
    bootstrap_error,
    check_rank,
    clip_distance,
    frechet_distance,
    frechet_distance_infinity,
    kernel_distance,
    neighbourhoods,
)
from .features import Features
from .pictures import Pictures

LARGE = 512  # features; from here on every Fréchet distance takes seconds, and fewer resamples are drawn


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation.

    Args:
        name: with the features in it, such as "FD (digits classifier)".
        value: None if it was refused.
        standard_error: None if it has none.
        note: what limits it, or why it was refused.
    """

    name: str
    value: float | None
    standard_error: float | None = None
    note: str = ""

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval, value ± 1.96 standard errors."""
        if self.value is None or self.standard_error is None:
            return None
        return self.value - 1.96 * self.standard_error, self.value + 1.96 * self.standard_error


def frechet_name(features: Features) -> str:
    """What the Fréchet distance is called with these features: FID and FD-DINOv2 are those that papers report."""
    return {"Inception": "FID", "DINOv2": "FD-DINOv2"}.get(features.name, f"FD ({features.name})")


def frechet_metrics(generated: FeatureSet, reference: FeatureSet, name: str) -> list[Metric]:
    """The Fréchet distance of the set as it is, and extrapolated to infinitely many pictures."""
    moments, other, kept = generated.moments, reference.moments, generated.kept.double()
    large = moments.dim >= LARGE
    try:
        check_rank(other, "the reference")
    except ValueError as error:
        return [Metric(name, None, note=f"refused: {error}")]

    def distance(features: Any) -> float:
        return frechet_distance(Moments.of(features), other)

    results = []
    try:
        check_rank(moments, "the set")
        # The error falls with √N; all N count, though the features of some are no longer there.
        spread = bootstrap_error(distance, kept, 10 if large else 100) * (len(kept) / moments.count) ** 0.5
        note = f"biased upwards at N = {moments.count:,}"
        results.append(Metric(name, frechet_distance(moments, other), spread, note))
    except ValueError as refusal:
        results.append(Metric(name, None, note=f"refused: {refusal}"))
    try:
        endless = frechet_distance_infinity(kept, other, 6 if large else 15)
        note = "extrapolated to infinitely many pictures"
        note += "" if results[0].value is not None else f", roughly: from N = {len(kept):,} <= D = {moments.dim:,}"
        results.append(Metric(f"{name}, N → ∞", endless.value, endless.error, note))
    except ValueError as refusal:
        results.append(Metric(f"{name}, N → ∞", None, note=f"refused: {refusal}"))
    return results


def compare(generated: FeatureSet, reference: FeatureSet, features: Features) -> list[Metric]:
    """All metrics of a set against the reference; the reference is taken as exact in the standard errors.

    Args:
        generated, reference: features of both sets.
        features: their extractor, for the names.
    """
    results = frechet_metrics(generated, reference, frechet_name(features))
    try:
        kid = kernel_distance(generated.kept, reference.kept)
        results.append(Metric(f"KID ({features.name})", kid.value, kid.error, "unbiased; 0 for equal distributions"))
    except ValueError as refusal:
        results.append(Metric(f"KID ({features.name})", None, note=f"refused: {refusal}"))
    if features.name.split()[0] == "CLIP":
        distance = clip_distance(generated.kept, reference.kept)
        results.append(Metric(features.name.replace("CLIP", "CMMD", 1), distance, note="unbiased; times 1000"))
    counts = f"{len(generated.kept):,} against {len(reference.kept):,} pictures"
    try:
        found: Mapping[str, Estimate | tuple[None, None]] = neighbourhoods(generated.kept, reference.kept)
        note = counts
    except ValueError as refusal:
        found = dict.fromkeys(("precision", "recall", "density", "coverage"), (None, None))
        note = f"refused: {refusal}"
    return results + [Metric(f"{name} ({features.name})", each[0], each[1], note) for name, each in found.items()]


def evaluate(
    pictures: Pictures,
    reference: Pictures,
    extractors: Sequence[Features],
    *,
    batch_size: int = 64,
    cache_dir: str | None = None,
) -> dict[str, Any]:
    """Compare a set of pictures with a reference set, in the space of each of the features.

    Must be called by all processes.

    Args:
        pictures: the set; it is read, or drawn, once.
        reference: what it should be like; its statistics are cached.
        extractors: the features.
        batch_size: pictures at once.
        cache_dir: as in `open_images`.

    Returns:
        Description of both sets and the metrics, ready for JSON.

    Raises:
        ValueError: the pictures of both sets differ in shape, or do not fit the features.
    """
    shapes = [(each.channels, each.height, each.width) for each in (pictures, reference)]
    if shapes[0] != shapes[1]:
        one, other = ("x".join(map(str, shape)) for shape in shapes)
        raise ValueError(
            f"the pictures of {pictures.description} are {one} (channels x height x width), those of "
            f"{reference.description} are {other}; they must be equal"
        )
    # The reference first: what is wrong with it or with the features shows before pictures are drawn.
    stored = [collect_cached(reference, features, batch_size, cache_dir=cache_dir) for features in extractors]
    found = collect(pictures, extractors, batch_size)
    results: list[Metric] = []
    for ours, theirs, features in zip(found, stored, extractors, strict=True):
        results += compare(ours, theirs, features)
    return {
        "pictures": _describe(pictures),
        "reference": _describe(reference),
        "features": {features.name: features.identity for features in extractors},
        "metrics": [{**asdict(metric), "interval": metric.interval} for metric in results],
    }


def _describe(pictures: Pictures) -> dict[str, Any]:
    return {
        "description": pictures.description,
        "num_images": pictures.num_images,
        "shape": [pictures.channels, pictures.height, pictures.width],
        "fingerprint": pictures.fingerprint,
    }


def table(result: Mapping[str, Any]) -> str:
    """The result of `evaluate` as text."""
    lines = []
    for role, title in (("pictures", "pictures:"), ("reference", "against: ")):
        each = result[role]
        lines.append(f"{title} {each['description']} ({each['num_images']:,} of {'x'.join(map(str, each['shape']))})")
    width = max(len(metric["name"]) for metric in result["metrics"])
    lines.append(f"{'':{width}}  {'value':>10}  {'std. error':>10}")
    for metric in result["metrics"]:
        value, error = ("–" if each is None else f"{each:.4g}" for each in (metric["value"], metric["standard_error"]))
        lines.append(f"{metric['name']:{width}}  {value:>10}  {error:>10}  {metric['note']}")
    return "\n".join(lines)


def write_json(result: Mapping[str, Any], file: str | Path) -> None:
    """Write a result to a file, whose folder is created if it does not exist."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
