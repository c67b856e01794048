"""Runs made sick on purpose, one for each finding, and healthy ones; `python sick_runs.py FOLDER` prints the table."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from custom_ddpm.data.sources import open_images

sys.path.insert(0, str(Path(__file__).parents[1]))
from runs import DIGITS, run

HEALTHY: dict[str, Any] = {
    "block_out_channels": [16, 32],
    "max_train_steps": 600,
    "train_batch_size": 32,
    "ddpm_num_steps": 1000,
    "lr_warmup_steps": 50,
    "learning_rate": 3e-3,
    "ema_max_decay": 0.98,
    "checkpointing_steps": 10**6,
    "logging_steps": 20,
    "ddpm_num_inference_steps": 50,
    "eval_batch_size": 16,
}
HELD_OUT = {"split": "train[:90%]", "validation_split": "train[90%:]"}
HEALTHY_RUNS: dict[str, dict[str, Any]] = {
    "seed 0": HELD_OUT,
    "seed 1": {"seed": 1},
    "seed 2, flips": {"seed": 2, "random_flip": True},
    "cosine schedule": {"ddpm_beta_schedule": "squaredcos_cap_v2"},
    "v-prediction": {"prediction_type": "v_prediction", **HELD_OUT},
    "x_0-prediction": {"prediction_type": "sample"},
    "classes": {"class_conditional": True, **HELD_OUT},
    "min-SNR": {"loss_weighting": "min_snr"},
    "zero terminal SNR": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "T = 200, learned variance": {"ddpm_num_steps": 200, "loss_type": "hybrid", "variance_type": "learned_range"},
}
SHORT = {"max_train_steps": 300}
SICK_RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "average of 0.9999 over 300 steps": (
        "average too long",
        {**SHORT, "ema_inv_gamma": 1e-6, "ema_power": 1.0, "ema_max_decay": 0.9999},
    ),
    "learning rate 1.0": ("learning rate too high", {**SHORT, "learning_rate": 1.0}),
    "learning rate 1e-7": ("loss has not begun to fall", {**SHORT, "learning_rate": 1e-7}),
    "warm-up of 500 steps in 300": ("warm-up too long", {**SHORT, "lr_warmup_steps": 500}),
    "100 steps at 5e-4": (
        "too few steps",
        {"max_train_steps": 100, "logging_steps": 5, "lr_scheduler": "constant", "learning_rate": 5e-4},
    ),
    "4 channels": ("worse than linear", {"block_out_channels": [4, 4], "max_train_steps": 400}),
    "30 pictures, held out": (
        "overfitting",
        {
            "split": "train[:30]",
            "validation_split": "train[90%:]",
            "max_train_steps": 900,
            "block_out_channels": [32, 64],
        },
    ),
    "30 pictures": (
        "remembers the training set",
        {"split": "train[:30]", "max_train_steps": 900, "block_out_channels": [32, 64]},
    ),
    "pictures in [0, 1]": ("range or mode of the training pictures", {**SHORT, "pictures": "unit"}),
    "blue is 0": ("range or mode of the training pictures", {**SHORT, "pictures": "no blue"}),
    "gray as RGB": ("range or mode of the training pictures", {**SHORT, "image_mode": "RGB"}),
    "schedule laplace": ("x_T shows the picture", {"ddpm_beta_schedule": "laplace"}),
    "labels drawn at random": ("labels not used", {**SHORT, "pictures": "random labels", "class_conditional": True}),
    "5 sampling steps": ("too few sampling steps", {**SHORT, "ddpm_num_inference_steps": 5}),
}


def write_pictures(folder: Path, kind: str) -> Path:
    """Digits whose pixels are 0 … 1, coloured without blue, or in the folders of classes that are not theirs."""
    folder.mkdir(parents=True)
    labels = np.random.default_rng(0).integers(0, 10, 400)
    for i, image in enumerate(open_images(dataset_name=DIGITS, resolution=8).take(400)[0].numpy()):
        pixels = {
            "unit": image[0] // 128,
            "no blue": np.stack([image[0], 255 - image[0], 0 * image[0]], -1),
            "random labels": image[0],
        }[kind]
        place = folder / str(labels[i]) if kind == "random labels" else folder
        place.mkdir(exist_ok=True)
        PIL.Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


def run_one(folder: Path, name: str, **changes: Any) -> Path:
    settings = {**HEALTHY, **changes}
    if kind := settings.pop("pictures", None):
        settings |= {"dataset_name": None, "train_data_dir": str(write_pictures(folder / f"{name} pictures", kind))}
    return run(folder / name, **settings)


def main(folder: Path) -> None:
    from custom_ddpm.evaluation.diagnosis import diagnose, in_words

    runs = [(name, "nothing", changes) for name, changes in HEALTHY_RUNS.items()]
    runs += [(name, expected, changes) for name, (expected, changes) in SICK_RUNS.items()]
    for name, _, changes in runs:
        if not (folder / name / "model_index.json").exists():
            run_one(folder, name, **changes)
    for name, expected, _ in runs:
        findings = diagnose(folder / name)
        names = [finding.name for finding in findings]
        right = expected in names if expected != "nothing" else not names
        print(f"| {name} | {expected} | {', '.join(names) or 'nothing found'} | {'yes' if right else 'NO'} |")
        print(*in_words(findings), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
