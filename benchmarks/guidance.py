"""Classifier-free guidance in few steps: intervals, rescaling, and guidance every second step.

    python benchmarks/guidance.py MODEL FEATURES --against DATASET [--split train] [--steps 5 8 10]

prints, as Markdown, for each way and number of steps the network evaluations for a picture, the share of the pictures
that the classifier of FEATURES (of `custom-ddpm features train`) recognises as their class, and their Fréchet distance.
All are drawn with the same seeds, in steps of second order with η = 1.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from recognition import load_classifier

from custom_ddpm import CustomDDPMPipeline, CustomDDPMScheduler
from custom_ddpm.evaluation.collect import collect, collect_cached
from custom_ddpm.evaluation.distances import frechet_distance
from custom_ddpm.evaluation.features import load_features
from custom_ddpm.evaluation.pictures import ArrayPictures, ModelPictures, open_dataset

RESCALE = 0.7  # of Lin et al. 2024 (arXiv:2305.08891), section 3.4


class Guided(CustomDDPMPipeline):
    """The pipeline with ways of guidance that it does not have."""

    way = "all"
    evaluations = 0

    def _evaluate(self, x_t: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        assert class_labels is not None
        step = int((self.scheduler.timesteps == t).nonzero()[0])

        def network(labels: torch.Tensor) -> torch.Tensor:
            Guided.evaluations += len(labels)
            return self.unet(x_t, t, class_labels=labels).sample.float()

        with_class = network(class_labels)
        guided = self.guidance_scale != 1.0 and self._is_guided(t)
        if not guided or (self.way == "every second, none between" and step % 2):
            return with_class
        if self.way == "every second, kept between" and step % 2:
            difference = self.kept
        else:
            difference = self.kept = with_class - network(torch.full_like(class_labels, self._null_label()))
        output = with_class + (self.guidance_scale - 1.0) * difference
        if self.way == "rescaled":
            sizes = [each.flatten(1).std(dim=1).view(-1, 1, 1, 1) for each in (with_class, output)]
            output = output * (RESCALE * sizes[0] / sizes[1] + 1.0 - RESCALE)
        return output


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("all", {"guidance_scale": 1.0}),
    "every step": ("all", {}),
    "interval 0.2 ≤ t/T < 0.8": ("all", {"guidance_interval": (0.2, 0.8)}),
    "interval t/T < 0.5": ("all", {"guidance_interval": (0.0, 0.5)}),
    "interval t/T ≥ 0.5": ("all", {"guidance_interval": (0.5, 1.0)}),
    "every step, rescaled by 0.7": ("rescaled", {}),
    "every second step, none between": ("every second, none between", {}),
    "every second step, its difference kept": ("every second, kept between", {}),
}


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a class-conditional pipeline")
    parser.add_argument("features", help="folder of `custom-ddpm features train`")
    parser.add_argument("--against", required=True, help="dataset, folder of pictures, or NPZ file")
    parser.add_argument("--split", default="train", help="split of it")
    parser.add_argument("--num_images", type=int, default=512)
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 8, 10])
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[1.5, 3.0])
    args = parser.parse_args()

    pipeline = Guided.from_pretrained(Path(args.model))
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.scheduler.config
    pipeline.scheduler = CustomDDPMScheduler.from_config(config, solver_order=2, timestep_spacing="trailing")
    judge, features = load_classifier(args.features), load_features(args.features, torch.device("cpu"))
    like = ModelPictures(pipeline, args.model, 1)
    size = [like.height, like.width]
    reference = open_dataset(args.against, args.split, resolution=size, channels=like.channels)
    known = collect_cached(reference, features, 64).moments

    heads = [f"{n} steps" for n in args.steps]
    print("| guidance | w | " + " | ".join(heads) + " |\n|---|---|" + "---|" * len(heads))
    for scale in args.guidance_scale:
        for name, (way, options) in WAYS.items():
            if name == "none" and scale != args.guidance_scale[0]:
                continue
            pipeline.way, cells = way, []
            for n in args.steps:
                Guided.evaluations = 0
                call = {"guidance_scale": scale, **options, "num_inference_steps": n, "eta": 1.0}
                with torch.autocast("cpu", torch.bfloat16):
                    parts = list(ModelPictures(pipeline, "", args.num_images, 100_000, call).batches(64))
                images = torch.cat([images for _, images, _ in parts])
                labels = torch.cat([labels for _, _, labels in parts if labels is not None])
                with torch.no_grad():
                    share = float((judge(images).argmax(1) == labels).float().mean())
                found = collect(ArrayPictures(images, ""), [features], 64)[0].moments
                error = math.sqrt(share * (1 - share) / len(labels))
                cells.append(
                    f"{Guided.evaluations / args.num_images:g}: {share:.1%} ± {error:.1%}, "
                    f"{float(frechet_distance(found, known)):.3f}"
                )
            print(f"| {name} | {call['guidance_scale']:g} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
