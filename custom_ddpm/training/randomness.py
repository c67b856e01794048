"""Random draws of a training step, as functions of (seed, step, position in the global batch) and of nothing else.

So a run is the same on one process with two batches a step as on two processes with one, and a resumed run continues
as if it had not been interrupted.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch


class Draws(NamedTuple):
    """Random draws for the B samples of a batch; see `draw`."""

    timestep: torch.Tensor  # float32 (B,) in [0, 1)
    flip: torch.Tensor  # float32 (B,) in [0, 1)
    label: torch.Tensor  # float32 (B,) in [0, 1)
    noise: torch.Tensor  # float32 (B, C, H, W), ε of F2
    dropout_seed: int  # for the whole batch: that of its first sample


def draw(seed: int, step: int, positions: range, shape: Sequence[int], device: torch.device) -> Draws:
    """Draw all random numbers of the samples at `positions` of the global batch of optimiser step `step`.

    Args:
        seed: seed of the run, >= 0.
        step: optimiser step, >= 0.
        positions: positions in the global batch, >= 0, consecutive.
        shape: (C, H, W) of a sample.
        device: device of the returned tensors.

    Returns:
        Row i depends on (seed, step, positions[i]) only; ε depends on the type of the device too.
    """
    # Five 64-bit words per sample, counted from the first sample of the global batch on every process.
    words = np.random.Philox(np.random.SeedSequence([seed, step])).random_raw((positions.stop, 5))[positions.start :]
    uniforms = (words[:, :3].T >> 40).astype(np.float32, order="C") / 2**24
    noise = torch.empty((len(positions), *shape), device=device)
    generator = torch.Generator(device)
    for row, word in zip(noise, words[:, 3].tolist(), strict=True):
        row.normal_(generator=generator.manual_seed(word))
    timestep, flip, label = torch.from_numpy(uniforms).to(device, non_blocking=True).unbind()
    return Draws(timestep, flip, label, noise, words[0, 4].item())


class UniformSampler:
    """t ~ Uniform{0, …, T−1} (T2), with the interface of `likelihood.ImportanceSampler`.

    Args:
        num_train_timesteps: T.
    """

    def __init__(self, num_train_timesteps: int):
        self.num_train_timesteps = num_train_timesteps

    def sample(self, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps from uniform random numbers.

        Args:
            uniforms: float32 (B,) in [0, 1).

        Returns:
            timesteps, int64 (B,); weights of the losses, float32 (B,), all 1.
        """
        return (uniforms * self.num_train_timesteps).long(), torch.ones_like(uniforms)
