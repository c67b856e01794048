"""Tables and figures of `benchmarks/quality_per_minute.py`.

    python benchmarks/quality_tables.py quality-per-minute/results.jsonl --output_dir docs/images --name fashion-mnist

prints a table in Markdown, and writes `quality-NAME.png`, the distance against minutes, pictures and operations, and
`beside-peers-NAME.png`, the pictures of every contender after the same minutes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

OURS = ("default", "by hand", "stock", "ddpm")
Row = dict[str, Any]


def _distance(row: Row) -> tuple[float, float]:
    """The Fréchet distance and its standard error."""
    name = next(key for key in row if key.startswith("FD") and "→" not in key)
    return tuple(row[name])


def _shown(name: str) -> str:
    """A recipe of this package by its full name, a peer by its own."""
    return f"custom-ddpm, {name}" if name in OURS else name


def _place(name: str) -> tuple[bool, bool, str]:
    """Where a contender stands: the default recipe first, then the others of this package."""
    return name != "default", name not in OURS, name


def _file(folder: Path, name: str, minutes: float) -> Path:
    """The pictures of a contender after a number of minutes."""
    words = "".join(letter if letter.isalnum() else "-" for letter in name)
    return folder / f"{words}-{minutes:g}-0.npz"


def table(rows: list[Row]) -> str:
    """One line for each contender and number of minutes, with the ratio of its distance to the default recipe's."""
    ours = {row["minutes"]: _distance(row)[0] for row in rows if row["name"] == "default" and row["seed"] == 0}
    lines = ["| contender | parameters | minutes | pictures seen | TFLOP | FD | ± | FD / ours |", "|---|" + "---:|" * 7]
    for row in sorted(rows, key=lambda row: (*_place(row["name"]), row["minutes"], row["seed"])):
        value, error = _distance(row)
        ratio = f"{value / ours[row['minutes']]:.1f}" if row["minutes"] in ours else "–"
        seed = f", seed {row['seed']}" if row["seed"] else ""
        work = row["pictures"] * row["flops_per_picture"] / 1e12
        cells = [_shown(row["name"]) + seed, f"{row['parameters']:,}", f"{row['minutes']:g}", f"{row['pictures']:,}"]
        cells += [f"{work:.1f}", f"{value:.1f}", f"{error:.1f}", ratio]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curves(rows: list[Row], file: Path) -> None:
    """The distance of each contender against minutes, pictures seen and counted operations."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), sharey=True, layout="constrained")
    costs = {
        "minutes on one core": lambda row: row["minutes"],
        "pictures seen": lambda row: row["pictures"],
        "floating point operations": lambda row: row["pictures"] * row["flops_per_picture"],
    }
    names = sorted({row["name"] for row in rows}, key=_place)
    for axis, (label, cost) in zip(axes, costs.items(), strict=True):
        for index, name in enumerate(names):
            mine = [row for row in rows if row["name"] == name and row["pictures"]]
            first = min(row["seed"] for row in mine)
            points = sorted((cost(row), *_distance(row)) for row in mine if row["seed"] == first)
            x, y, error = zip(*points, strict=True)
            style = {"color": f"C{index}", "marker": "osDv^<>pP"[index], "markersize": 5}
            axis.errorbar(x, y, error, label=_shown(name), linewidth=2.5 if name == "default" else 1.2, **style)
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.grid(alpha=0.3)
        axis.minorticks_off()
    axes[0].set_ylabel("Fréchet distance (lower is better)")
    axes[0].set_xticks(
        sorted({row["minutes"] for row in rows}), [f"{m:g}" for m in sorted({r["minutes"] for r in rows})]
    )
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def pictures(rows: list[Row], folder: Path, file: Path, columns: int = 5, lines: int = 3) -> None:
    """Samples of the contenders (down) and numbers of minutes (across) of which there is something to compare."""
    names, minutes = sorted({row["name"] for row in rows}, key=_place), sorted({row["minutes"] for row in rows})
    there = {(name, each) for name in names for each in minutes if _file(folder, name, each).is_file()}
    names = [name for name in names if sum(name == other for other, _ in there) > 1]
    minutes = [each for each in minutes if sum(each == other for _, other in there) > 2]
    size = (2.5 * len(minutes), 1.62 * len(names) + 0.3)
    figure, axes = plt.subplots(len(names), len(minutes), figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for i, name in enumerate(names):
        axes[i, 0].set_ylabel(_shown(name).replace(", ", ",\n").replace("-diffusion-", "-\ndiffusion-"), fontsize=9)
        for j, each in enumerate(minutes):
            if i == 0:
                axes[i, j].set_title(f"{each:g} min", fontsize=10)
            if (name, each) not in there:
                axes[i, j].text(0.5, 0.5, "not measured", ha="center", va="center", color="gray", fontsize=8)
                continue
            drawn = np.load(_file(folder, name, each))["arr_0"][: columns * lines]
            field = drawn.reshape(lines, columns, *drawn.shape[1:]).swapaxes(1, 2)
            field = field.reshape(lines * drawn.shape[1], columns * drawn.shape[2], *drawn.shape[3:])
            axes[i, j].imshow(field, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    """Read the results of one dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.results.read_text(encoding="utf-8").splitlines()]
    print(table(rows))
    curves(rows, args.output_dir / f"quality-{args.name}.png")
    pictures(rows, args.results.parent, args.output_dir / f"beside-peers-{args.name}.png")


if __name__ == "__main__":
    main()
