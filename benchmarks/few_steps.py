"""Quality against network evaluations, for our steps and the samplers of diffusers, on a trained model.

    python benchmarks/few_steps.py MODEL --against DATASET --features FOLDER [--steps 5 8 10 …] [--figure FILE]

The Fréchet distance of the pictures of each sampler at each number of steps, from the same seeds, against a split of
a dataset, and CPU seconds per picture; as Markdown. A model that `custom-ddpm tune` has measured has a row of its own.
Where the number of pictures is small the distances are biased upwards, all of them alike.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import diffusers
import torch

from custom_ddpm import CustomDDPMPipeline, CustomDDPMScheduler
from custom_ddpm.evaluation.collect import collect, collect_cached
from custom_ddpm.evaluation.distances import frechet_distance
from custom_ddpm.evaluation.features import load_features
from custom_ddpm.evaluation.pictures import ModelPictures, open_dataset
from custom_ddpm.sampling import clipping

TRAILING = {"timestep_spacing": "trailing"}


def samplers(own: CustomDDPMScheduler) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Each sampler with the options of its call, by name."""
    plain = {"tuned": None, "prediction_errors": None}

    def ours(**options: Any) -> Any:
        return CustomDDPMScheduler.from_config(own.config, **{**plain, **TRAILING, **options})

    def theirs(name: str, **options: Any) -> Any:
        config = {
            k: v for k, v in own.config.items() if k not in ("tuned", "prediction_errors", "solver_order", "corrector")
        }
        limits = {} if name == "DDIMScheduler" else clipping(own)
        return getattr(diffusers, name).from_config(config, **{**TRAILING, **limits, **options})

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
        "ours, order 2": (ours(solver_order=2), {"eta": 0.0}),
        "ours, order 3": (ours(solver_order=3), {"eta": 0.0}),
        "ours, order 2, corrected": (ours(solver_order=2, corrector=True), {"eta": 0.0}),
        "ours, order 2, corrected, η = 1": (ours(solver_order=2, corrector=True), {"eta": 1.0}),
        "ours, order 2, η = 1": (ours(solver_order=2), {"eta": 1.0}),
    }
    errors = own.config.get("prediction_errors")
    if errors is not None:
        found["ours, order 2, best timesteps"] = (ours(solver_order=2, prediction_errors=errors), {"eta": 0.0})
    if own.config.get("tuned") is not None:
        found["**ours, tuned**"] = (own, {})
    return found


def figure(table: dict[str, dict[int, float]], steps: list[int], path: str) -> None:
    """Draw the distances against the number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, row in table.items():
        plain = name.strip("*")
        axes.plot(steps, [row[n] for n in steps], "-" if plain.startswith("ours") else ":", marker=".", label=plain)
    axes.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="Fréchet distance")
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.minorticks_off()
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a pipeline")
    parser.add_argument("--against", required=True, help="dataset, folder of pictures, or NPZ file")
    parser.add_argument("--split", default="test", help="split of it")
    parser.add_argument("--features", default="random", help="as of `custom-ddpm evaluate`")
    parser.add_argument("--num_images", type=int, default=512, help="pictures of each sampler")
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 8, 10, 15, 20, 50], help="numbers of steps")
    parser.add_argument("--seed", type=int, default=100_000, help="of the first picture; not one that tuning has seen")
    parser.add_argument("--full", action="store_true", help="also all T ancestral steps")
    parser.add_argument("--figure", default=None, help="PNG file to write")
    args = parser.parse_args()

    pipeline = CustomDDPMPipeline.from_pretrained(Path(args.model))
    pipeline.set_progress_bar_config(disable=True)
    own, features = pipeline.scheduler, load_features(args.features, torch.device("cpu"))
    like = ModelPictures(pipeline, args.model, 1)
    reference = open_dataset(args.against, args.split, resolution=[like.height, like.width], channels=like.channels)
    known = collect_cached(reference, features, 64).moments

    def distance(scheduler: Any, n: int, options: dict[str, Any]) -> tuple[float, float]:
        pipeline.scheduler = scheduler
        start = time.process_time()
        drawn = ModelPictures(pipeline, "", args.num_images, args.seed, {"num_inference_steps": n, **options})
        found = collect(drawn, [features], 64)[0].moments
        return float(frechet_distance(found, known)), (time.process_time() - start) / args.num_images

    print(f"{args.num_images} pictures for each number, against {known.count:,}; {features.name}\n")
    print("| steps | " + " | ".join(map(str, args.steps)) + " |\n|---|" + "---|" * len(args.steps))
    table, seconds = {}, dict.fromkeys(args.steps, 0.0)
    for name, (scheduler, options) in samplers(own).items():
        row = {}
        for n in args.steps:
            row[n], seconds[n] = distance(scheduler, n, options)
        table[name] = row
        print(f"| {name} | " + " | ".join(f"{row[n]:.2f}" for n in args.steps) + " |", flush=True)
    print("| seconds per picture | " + " | ".join(f"{seconds[n]:.3f}" for n in args.steps) + " |")
    if args.full:
        plain = CustomDDPMScheduler.from_config(own.config, tuned=None, prediction_errors=None)
        value, each = distance(plain, len(plain), {})
        print(f"\nAll {len(plain)} ancestral steps: {value:.2f}, {each:.2f} seconds per picture.")
    if args.figure:
        figure(table, args.steps, args.figure)


if __name__ == "__main__":
    main()
