"""Figures of the report: bits per dimension by timestep, quality against network evaluations, what was tuned."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, NullFormatter

BINS = 24  # of log t


def draw_bits_by_timestep(variances: Mapping[str, Any], file: Path) -> None:
    """Plot the terms of the bound against the timestep, and what the timesteps up to t add up to.

    Args:
        variances: name -> as in `bits_per_dim.as_json`.
        file: the picture.
    """
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, result in variances.items():
        values = np.array([np.nan if value is None else value for value in result["timesteps"]], float)
        t = np.arange(len(values)) + 1
        edges = np.unique(np.geomspace(1, len(values) + 1, BINS + 1).round())
        # Every bin counts its drawn timesteps only, and stands for all of its own.
        groups = [values[(t >= low) & (t < high)] for low, high in itertools.pairwise(edges)]
        known = [np.isfinite(group).any() for group in groups]
        means = np.array([np.nanmean(group) if any_ else 0.0 for group, any_ in zip(groups, known, strict=True)])
        sizes = np.diff(edges)
        centres = np.sqrt(edges[:-1] * (edges[1:] - 1))
        left.plot(centres[known], means[known], marker="o", markersize=3, label=name)
        right.plot(edges[1:] - 1, np.cumsum(means * sizes), marker="o", markersize=3, label=name)
    left.set(xlabel="timestep t", ylabel="bits per dimension", title="Term of timestep t")
    left.set(xscale="log", yscale="log")
    right.set(xlabel="timestep t", title="Sum of the terms up to t", xscale="log", ylim=(0, None))
    for axes in (left, right):
        axes.grid(True, alpha=0.25)
    left.legend()
    figure.savefig(file, dpi=110)


def draw_by_steps(result: Mapping[str, Any], file: Path) -> None:
    """Plot the Fréchet distance against the number of network evaluations, with 95% intervals, for each sampler.

    Args:
        result: of `Report.by_steps`.
        file: the picture.
    """
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(point["sampler"] for point in result["points"]))
    lows: list[float] = []
    highs: list[float] = []
    for i, name in enumerate(names):
        points = sorted(
            (point["steps"], point["value"], point["error"] or 0.0)
            for point in result["points"]
            if point["sampler"] == name and point["value"] is not None
        )
        if not points:
            continue
        steps, values, errors = np.array(points, float).T
        # Beside each other, so that intervals do not hide each other.
        places = steps * 1.015 ** (i - (len(names) - 1) / 2)
        axes.errorbar(places, values, 1.96 * errors, marker="o", markersize=4, capsize=2, label=name)
        lows, highs = [*lows, values.min()], [*highs, values.max()]
    all_steps = sorted({point["steps"] for point in result["points"]})
    axes.set(xscale="log", xlabel="network evaluations for each picture", ylabel=result["metric"])
    axes.set_xticks(all_steps, [str(n) for n in all_steps])
    axes.xaxis.set_minor_formatter(NullFormatter())
    if lows and 0 < 5 * min(lows) < max(highs):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, None)
    axes.set_title(f"Quality against number of steps ({result['num_images']:,} pictures for each point)")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    figure.savefig(file, dpi=110)


def draw_candidates(distances: Mapping[str, float], tuned: Sequence[str], metric: str, file: Path) -> None:
    """Plot the Fréchet distance of each candidate of `custom-ddpm tune` against the number of network evaluations.

    Args:
        distances: entry, as "10 2c 0 optimal", -> distance.
        tuned: the entries that were the best.
        metric: name of the distance.
        file: the picture.
    """
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[tuple[str, ...], list[tuple[int, float]]] = {}
    for entry, distance in distances.items():
        steps, *how = entry.split()
        lines.setdefault(tuple(how), []).append((int(steps), distance))
    orders, etas, spacings = (sorted({how[i] for how in lines}) for i in range(3))
    colours = {order: f"C{i}" for i, order in enumerate(orders)}
    styles: dict[str, Any] = dict(zip(etas, itertools.cycle(["--", "-", ":"]), strict=False))
    markers = dict(zip(spacings, itertools.cycle("o^s"), strict=False))
    for (order, eta, spacing), points in sorted(lines.items()):
        shown: dict[str, Any] = {
            "color": colours[order],
            "linestyle": styles[eta],
            "marker": markers[spacing],
            "markersize": 4,
        }
        axes.plot(*zip(*sorted(points), strict=True), linewidth=1, **shown)
    best = [(int(entry.split()[0]), distances[entry]) for entry in tuned]
    axes.plot(*zip(*best, strict=True), "o", markersize=12, markerfacecolor="none", markeredgecolor="black")
    handles = [
        Line2D([], [], color=colours[order], label=f"order {order.replace('c', ', corrected')}") for order in orders
    ]
    handles += [Line2D([], [], color="gray", linestyle=styles[eta], label=f"η = {eta}") for eta in etas]
    handles += [Line2D([], [], color="gray", ls="", marker=markers[name], label=name) for name in spacings]
    handles += [Line2D([], [], color="black", ls="", marker="o", ms=9, mfc="none", label="the best, saved")]
    axes.legend(handles=handles, ncols=2, fontsize="small")
    all_steps = sorted({n for points in lines.values() for n, _ in points})
    axes.set(xscale="log", xlabel="network evaluations for each picture", ylabel=metric)
    if 0 < 5 * min(distances.values()) < max(distances.values()):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)))
    axes.set_xticks(all_steps, [str(n) for n in all_steps])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="both", alpha=0.25)
    figure.savefig(file, dpi=110)
