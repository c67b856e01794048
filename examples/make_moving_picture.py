"""Make docs/images/denoising.webp, with which the README begins, from the model of the README's first command.

    python examples/make_moving_picture.py ddpm-digits docs/images/denoising.webp

A digit of each class while it is denoised: x_t at the left, at the right x̂_0, which the network predicts from it.
"""

import sys

import torch

from custom_ddpm import CustomDDPMPipeline
from custom_ddpm.trajectory import save_animation, trajectory_frames

STATES = 37
LEVELS = 32  # of gray: the file is half as large, and noise looks the same


def main(model: str, file: str) -> None:
    pipeline = CustomDDPMPipeline.from_pretrained(model)
    labels = sorted(pipeline.config.id2label)
    trajectory = pipeline(
        class_labels=labels,
        guidance_scale=1.5,
        num_inference_steps=100,
        generator=[torch.Generator().manual_seed(seed) for seed in labels],
        return_trajectory=STATES,
        output_type="latent",
    ).trajectory
    step = 255 / (LEVELS - 1)
    frames = [
        frame.point([round(round(level / step) * step) for level in range(256)])
        for frame in trajectory_frames(trajectory, columns=5)
    ]
    save_animation(frames, file, seconds=4.0)


if __name__ == "__main__":
    main(*sys.argv[1:])
