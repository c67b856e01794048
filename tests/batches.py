"""Schedulers without clipping and noised batches, for the tests of the likelihood and of the objective."""

import torch

from custom_ddpm.scheduler import CustomDDPMScheduler


def make(T=1000, **kwargs):
    """A scheduler without clipping."""
    return CustomDDPMScheduler(T, **{"clip_sample": False, **kwargs})


def batch(scheduler, timesteps, seed=0, dtype=torch.float64, channels=2):
    """x_0 on the 8-bit grid, ε and x_t."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(timesteps), channels, 4, 4)
    x_0 = (torch.randint(0, 256, shape, generator=generator).double() / 127.5 - 1.0).to(dtype)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return x_0, noise, scheduler.add_noise(x_0, noise, timesteps)
