"""Random draws of a training step, as functions of (seed, step, position in the global batch) and of nothing else.

So a run is the same on one process with two batches a step as on two processes with one, and a resumed run continues
as if it had not been interrupted.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator


class Draws(NamedTuple):
    """Random draws for the B samples of a batch; see `draw`."""

    timestep: torch.Tensor  # float32 (B,) in [0, 1)
    flip: torch.Tensor  # float32 (B,) in [0, 1)
    label: torch.Tensor  # float32 (B,) in [0, 1)
    noise: torch.Tensor  # float32 (B, C, H, W), ε of F2
    dropout_seed: int  # for the whole batch: that of its first sample
    changes: torch.Tensor  # float32 (B, 7) in [0, 1), for `augmentation.augmented`; on the CPU


def draw(seed: int, step: int, positions: range, shape: Sequence[int], device: torch.device, strata: int = 0) -> Draws:
    """Draw all random numbers of the samples at `positions` of the global batch of optimiser step `step`.

    Args:
        seed: seed of the run, >= 0.
        step: optimiser step, >= 0.
        positions: positions in the global batch, >= 0, consecutive.
        shape: (C, H, W) of a sample.
        device: device of the returned tensors.
        strata: size N of the global batch, for stratified timesteps: one uniform number u is drawn for the whole batch,
            and the sample at position i gets (u + i/N) mod 1 (Kingma et al. 2021, arXiv:2107.00630, appendix I.1). Each
            is uniform in [0, 1), and together they are evenly spaced. 0: independent ones.

    Returns:
        Row i depends on (seed, step, positions[i]) only; ε depends on the type of the device too.
    """
    # Five 64-bit words per sample, counted from the first sample of the global batch on every process.
    every = np.random.Philox(np.random.SeedSequence([seed, step])).random_raw((positions.stop, 5))
    words = every[positions.start :]
    uniforms = (words[:, :3].T >> 40).astype(np.float32, order="C") / 2**24
    if strata:
        first = int(every[0, 0] >> 40)
        uniforms[0] = [(first + i * 2**24 // strata) % 2**24 / 2**24 for i in positions]
    noise = torch.empty((len(positions), *shape), device=device)
    generator = torch.Generator(device)
    for row, word in zip(noise, words[:, 3].tolist(), strict=True):
        row.normal_(generator=generator.manual_seed(word))
    timestep, flip, label = torch.from_numpy(uniforms).to(device, non_blocking=True).unbind()
    # The third word separates these draws from the others, to which they were added later.
    every = np.random.Philox(np.random.SeedSequence([seed, step, 1])).random_raw((positions.stop, 7))
    changes = torch.from_numpy((every[positions.start :] >> 40).astype(np.float32) / 2**24)
    return Draws(timestep, flip, label, noise, words[0, 4].item(), changes)


def sample_positions(accelerator: Accelerator, batch_size: int, start: int) -> Iterator[range]:
    """Positions of this process's batches in the infinite order of samples.

    Args:
        accelerator: of the run.
        batch_size: pictures in a batch of one process.
        start: position of the first sample of the first global batch.
    """
    batches, processes = accelerator.gradient_accumulation_steps, accelerator.num_processes
    while True:
        for batch in range(batches):
            first = start + (batch * processes + accelerator.process_index) * batch_size
            yield range(first, first + batch_size)
        start += batches * processes * batch_size


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
