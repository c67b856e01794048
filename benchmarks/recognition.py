"""How many guided samples of a class-conditional model a classifier of the real data recognises as their class.

    custom-ddpm features train examples/digits --resolution 16 --output_dir digit-features
    python benchmarks/recognition.py ddpm-digits digit-features

prints the share, with its standard error, for several guidance scales, beside the classifier's own accuracy on held-out
pictures: no sampler can be judged to be better than its judge.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from custom_ddpm import CustomDDPMPipeline
from custom_ddpm.evaluation.features import Classifier
from custom_ddpm.sampling import fast_sampler, sample_images


def load_classifier(folder: str) -> Classifier:
    """The classifier itself, of whose features the package makes use."""
    known = json.loads(Path(folder, "features.json").read_text(encoding="utf-8"))
    classifier = Classifier(known["channels"], known["height"], known["width"], len(known["classes"]))
    classifier.load_state_dict(load_file(Path(folder, "features.safetensors")))
    return classifier.eval()


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub repository of a class-conditional model")
    parser.add_argument("features", help="folder of `custom-ddpm features train`")
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    args = parser.parse_args()
    pipeline = CustomDDPMPipeline.from_pretrained(args.model)
    pipeline.scheduler = fast_sampler(pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    judge = load_classifier(args.features)
    known = json.loads(Path(args.features, "features.json").read_text(encoding="utf-8"))
    size = pipeline.unet.config.sample_size
    if ([*size] if isinstance(size, (list, tuple)) else [size] * 2) != [known["height"], known["width"]]:
        parser.error(
            f"the model draws pictures of {size}, the classifier was trained on {known['height']}x{known['width']}"
        )
    labels = [i % len(known["classes"]) for i in range(args.num_images)]
    held_out = f"{known['held_out_accuracy']:.2%} of {known['num_held_out_images']:,} held-out pictures"
    print(f"{known['name']}: {held_out}\n")
    print("| guidance scale | recognised | ± |\n|---:|---:|---:|")
    for scale in args.guidance_scale:
        right = 0
        for start in range(0, args.num_images, 100):
            chosen = labels[start : start + 100]
            images = sample_images(
                pipeline,
                range(start, start + len(chosen)),
                batch_size=100,
                class_labels=chosen,
                guidance_scale=scale,
                num_inference_steps=args.num_inference_steps,
            )
            with torch.no_grad():
                right += int((judge(images).argmax(1) == torch.tensor(chosen)).sum())
        share = right / args.num_images
        print(f"| {scale:g} | {share:.1%} | {math.sqrt(share * (1 - share) / args.num_images):.1%} |", flush=True)


if __name__ == "__main__":
    main()
