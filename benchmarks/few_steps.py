"""Quality against network evaluations, for our steps and the samplers of diffusers, on a trained model.

    python benchmarks/few_steps.py MODEL --against DATASET --features FOLDER --results FILE.jsonl [--steps 5 8 10 …]

measures what the file lacks, one line for each sampler and number of steps: the Fréchet distance of its pictures, from
the same seeds, and CPU seconds per picture. A model that `custom-ddpm tune` has measured has a row of its own. Where
the number of pictures is small the distances are biased upwards, all of them alike; a number of steps that is too slow
for many pictures is compared with others of as few. Then

    python benchmarks/few_steps.py --results FILE.jsonl --page docs/benchmarks.md

writes the table and the targets between the page's two comments with the name of the file, and the figure
docs/images/few-steps-FILE.png.
"""

import argparse
import json
import textwrap
import time
from pathlib import Path
from typing import Any

import diffusers
import torch

from custom_ddpm import CustomDDPMPipeline, CustomDDPMScheduler
from custom_ddpm.evaluation.collect import collect, collect_cached
from custom_ddpm.evaluation.distances import Moments, bootstrap_error, frechet_distance
from custom_ddpm.evaluation.features import load_features
from custom_ddpm.evaluation.pictures import ArrayPictures, ModelPictures, open_dataset
from custom_ddpm.sampling import clipping, untuned

TRAILING = {"timestep_spacing": "trailing"}
STEPS = [5, 8, 10, 15, 20, 50, 100]
TUNED = "ours, tuned"
WIDTH = 125  # of lines of the page
DIFFUSERS = ["ancestral, β̃", "ancestral, β", "DDIM", "DPM-Solver++ 2M", "DPM-Solver++ 3M", "DPM-Solver++ 2M, SDE"]
DIFFUSERS += ["DEIS", "UniPC"]
ORDER = [
    *DIFFUSERS[:2],
    "ancestral, analytic",
    *DIFFUSERS[2:],
    "ours, order 2, η = 1",
    "ours, order 2, corrected",
    TUNED,
]
COLORS = ["C0", "C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9", "navy", "black"]
Row = dict[str, Any]


def samplers(own: CustomDDPMScheduler) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Each sampler with the options of its call, by name."""
    errors = own.config.get("prediction_errors")
    plain = {"tuned": None, "prediction_errors": None}

    def ours(**options: Any) -> Any:
        return CustomDDPMScheduler.from_config(own.config, **{**plain, **TRAILING, **options})

    def theirs(name: str, **options: Any) -> Any:
        limits = {} if name == "DDIMScheduler" else clipping(own)
        return getattr(diffusers, name).from_config(untuned(own.config), **{**TRAILING, **limits, **options})

    dpm = "DPMSolverMultistepScheduler"
    found: dict[str, tuple[Any, dict[str, Any]]] = {
        "ancestral, β̃": (ours(variance_type="fixed_small"), {}),
        "ancestral, β": (ours(variance_type="fixed_large"), {}),
        "DDIM": (theirs("DDIMScheduler"), {}),
        "DPM-Solver++ 2M": (theirs(dpm, solver_order=2), {}),
        "DPM-Solver++ 3M": (theirs(dpm, solver_order=3), {}),
        "DPM-Solver++ 2M, SDE": (theirs(dpm, solver_order=2, algorithm_type="sde-dpmsolver++"), {}),
        "DEIS": (theirs("DEISMultistepScheduler"), {}),
        "UniPC": (theirs("UniPCMultistepScheduler"), {}),
        "ours, order 2, η = 1": (ours(solver_order=2), {"eta": 1.0}),
        "ours, order 2, corrected": (ours(solver_order=2, corrector=True), {"eta": 0.0}),
    }
    if errors is not None:
        found["ancestral, analytic"] = (ours(variance_type="analytic", original_sample_variances=errors), {})
    if own.config.get("tuned") is not None:
        found[TUNED] = (own, {})
    return found


def measure(args: argparse.Namespace) -> None:
    """Measure every sampler at every number of steps that the file of results lacks."""
    file = Path(args.results)
    done = {(row["sampler"], row["steps"], row["num_images"]) for row in read(file)}
    pipeline = CustomDDPMPipeline.from_pretrained(Path(args.model))
    pipeline.set_progress_bar_config(disable=True)
    own, features = pipeline.scheduler, load_features(args.features, torch.device("cpu"))
    like = ModelPictures(pipeline, args.model, 1)
    reference = open_dataset(args.against, args.split, resolution=[like.height, like.width], channels=like.channels)
    known = collect_cached(reference, features, 64).moments

    def distance(values: torch.Tensor) -> float:
        return float(frechet_distance(Moments.of(values), known))

    for n in args.steps:
        for name, (scheduler, options) in samplers(own).items():
            if (name, n, args.num_images) in done or (args.samplers and name not in args.samplers):
                continue
            if name == TUNED and n < len(own) and own.tuned_for(n) is None:
                continue
            pipeline.scheduler = scheduler
            call = {"num_inference_steps": n, **options}
            start = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                drawn = [x for _, x, _ in ModelPictures(pipeline, "", args.num_images, args.seed, call).batches(64)]
            seconds = (time.process_time() - start) / args.num_images
            found = collect(ArrayPictures(torch.cat(drawn), ""), [features], 64)[0].kept
            row = {"sampler": name, "steps": n, "seconds": seconds, "num_images": args.num_images}
            row |= {"distance": distance(found), "error": bootstrap_error(distance, found.double(), 20)}
            row |= {"how": own.tuned_for(n) if name == TUNED else None, "reference": f"{known.count:,}"}
            with file.open("a") as out:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            print(f"{name}, {n}: {row['distance']:.3f} ± {row['error']:.3f}, {seconds:.3f} s", flush=True)


def read(file: Path) -> list[Row]:
    """The lines of a file of results; none if there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


# ---- the page ----


def targets(every: list[Row], rows: dict[tuple[str, int], Row]) -> list[str]:
    """What the numbers say of each target, as lines of a list."""
    name_of_ours = TUNED if any(name == TUNED for name, _ in rows) else "ours, order 2, corrected"
    ours = {n: row for (name, n), row in rows.items() if name == name_of_ours}
    theirs = {n: [row for (name, m), row in rows.items() if m == n and name in DIFFUSERS] for n in ours}
    best = {n: min(each, key=lambda row: row["distance"]) for n, each in theirs.items() if each}
    lines = []
    pairs = [
        (row, other)
        for row in every
        for other in every
        if (row["sampler"], row["steps"], other["steps"]) == (TUNED, 10, 1000)
        and row["num_images"] == other["num_images"]
    ]
    for row, other in pairs[-1:]:
        ratio, spread = row["distance"] / other["distance"], 2 * other["error"] / other["distance"]
        verdict = "held" if ratio <= 1.05 else "missed"
        lines.append(
            f"- 10 evaluations within 5% of 1000 ancestral steps: **{verdict}**: {row['distance']:.3g} against "
            f"{other['distance']:.3g} ({other['sampler']}), {ratio:.2f} ± {spread:.2f} times it, with "
            f"{row['num_images']} pictures each."
        )
    if 5 in ours and 8 in best:
        mine, other = ours[5]["distance"], best[8]["distance"]
        lines.append(
            f"- 5 evaluations better than every sampler of diffusers at 8: **{'held' if mine < other else 'missed'}**: "
            f"{mine:.3g} against {other:.3g} ({best[8]['sampler']})."
        )
    worse = {n: ours[n]["distance"] - best[n]["distance"] for n in sorted(best)}
    bad = [
        f"at {n} {ours[n]['distance']:.3g} against {best[n]['distance']:.3g} ({best[n]['sampler']}; "
        f"{gap / (ours[n]['error'] ** 2 + best[n]['error'] ** 2) ** 0.5:.1f} standard errors)"
        for n, gap in worse.items()
        if gap > 0
    ]
    good = ", ".join(str(n) for n, gap in worse.items() if gap <= 0)
    verdict = "; ".join(
        [*([f"**missed** {'; '.join(bad)}"] if bad else []), *([f"**held** at {good}"] if good else [])]
    )
    lines.append(f"- Never worse than the best of diffusers at the same number: {verdict}.")
    if name_of_ours != TUNED:
        lines.insert(0, f"This model was not tuned; the targets are those of “{name_of_ours}”.\n")
    return [
        line for text in lines for line in textwrap.wrap(text, WIDTH, subsequent_indent="  ") + [""] * ("\n" in text)
    ]


def table(rows: dict[tuple[str, int], Row]) -> list[str]:
    """The distances with CPU milliseconds per picture, one line for each sampler."""
    names, steps = list(dict.fromkeys(name for name, _ in rows)), sorted({n for _, n in rows})
    most = max(row["num_images"] for row in rows.values())
    columns = {n: [row for (_, m), row in rows.items() if m == n] for n in steps}
    alike = {n: len(column) > 1 and len({row["num_images"] for row in column}) == 1 for n, column in columns.items()}
    least = {n: min(row["distance"] for row in column) if alike[n] else 0.0 for n, column in columns.items()}
    lines = ["| network evaluations | " + " | ".join(map(str, steps)) + " |", "|---|" + "---|" * len(steps)]
    for name in sorted(names, key=ORDER.index):
        cells = []
        for n in steps:
            row = rows.get((name, n))
            if row is None:
                cells.append("")
                continue
            value = f"{row['distance']:.3g}"
            value = f"**{value}**" if row["distance"] == least[n] else value
            fewer = f"; {row['num_images']} pictures" if row["num_images"] < most else ""
            cells.append(f"{value} ({1000 * row['seconds']:.0f} ms{fewer})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    how = "; ".join(f"{n}: {row['how'].partition(', as')[0]}" for (name, n), row in sorted(rows.items()) if row["how"])
    errors = sorted(row["error"] for row in rows.values())
    words = f"Standard errors, from resamples: {errors[len(errors) // 2]:.2g} in the middle."
    return [*lines, "", *textwrap.wrap(words + (f" Tuned: {how}." if how else ""), WIDTH)]


def figure(every: list[Row], file: Path) -> None:
    """Draw the distances against the number of steps, of the number of pictures that was measured most often."""
    counts = [row["num_images"] for row in every]
    most = max(counts, key=counts.count)
    rows = {(row["sampler"], row["steps"]): row for row in every if row["num_images"] == most}
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    steps = sorted({n for _, n in rows})
    for index, name in enumerate(sorted({name for name, _ in rows}, key=ORDER.index)):
        mine = sorted((n, row["distance"]) for (each, n), row in rows.items() if each == name)
        style = "-" if name.startswith("ours") else "--" if name.startswith("ancestral") else ":"
        axes.plot(
            *zip(*mine, strict=True),
            style,
            marker=".",
            label=name,
            lw=2.5 if name == TUNED else 1.2,
            color=COLORS[index],
        )
    axes.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel=f"Fréchet distance of {most} pictures")
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(LogLocator(subs=[1.5, 2, 3, 4, 6, 8]))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(True, alpha=0.25)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(file, dpi=110)


def write_page(args: argparse.Namespace) -> None:
    """Write the table, the targets and the figure into the page."""
    name, page = Path(args.results).stem, Path(args.page)
    every = sorted(read(Path(args.results)), key=lambda row: row["num_images"])
    rows = {(row["sampler"], row["steps"]): row for row in every}  # of the most pictures
    picture = page.parent / "images" / f"few-steps-{name}.png"
    figure(every, picture)
    text = page.read_text()
    begin, end = f"<!-- few steps: {name} -->\n", f"<!-- end of few steps: {name} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{page} lacks the comments {begin.strip()} and {end}")
    title = f"![Distance against network evaluations, {name}](images/{picture.name})"
    lines = ["", *table(rows), "", *targets(every, rows), "", title, "", ""]
    page.write_text(before + begin + "\n".join(lines) + end + after)


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of a pipeline")
    parser.add_argument("--results", required=True, help="file to add lines to")
    parser.add_argument("--page", default=None, help="Markdown file to write the results into; nothing is measured")
    parser.add_argument("--against", help="dataset, folder of pictures, or NPZ file")
    parser.add_argument("--split", default="test", help="split of it")
    parser.add_argument("--features", default="random", help="as of `custom-ddpm evaluate`")
    parser.add_argument("--num_images", type=int, default=512, help="pictures of each sampler")
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS, help="numbers of steps")
    parser.add_argument("--samplers", nargs="+", default=None, help="names of those to measure; all if not given")
    parser.add_argument("--seed", type=int, default=100_000, help="of the first picture; not one that tuning has seen")
    parser.add_argument("--bf16", action="store_true", help="autocast of the network, as in training with bf16")
    args = parser.parse_args()
    if args.page:
        write_page(args)
    else:
        measure(args)


if __name__ == "__main__":
    main()
