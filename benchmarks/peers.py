"""Networks, losses, optimisers and samplers of other projects, with the settings of their own examples.

They run as plain loops, because the projects' own programs cannot be stopped by time. Every contender is measured where
it is installed: `pip install denoising-diffusion-pytorch smalldiffusion`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class Peer:
    """One contender.

    Args:
        net: its network.
        loss: pictures in [-1, 1], (B, C, size, size) -> loss of the batch, with gradients.
        optimizer: of the network's parameters.
        draw: number of pictures -> pictures in [-1, 1], (B, C, size, size), in 20 steps.
        size: of the pictures of the network.
        batch_size: pictures of an optimiser step.
        decay: of the average of the weights; None for diffusers' schedule up to 0.9999.
    """

    net: nn.Module
    loss: Callable[[torch.Tensor], torch.Tensor]
    optimizer: torch.optim.Optimizer
    draw: Callable[[int], torch.Tensor]
    size: int
    batch_size: int
    decay: float | None = None


def _stock(channels: int, layout: dict[str, Any], noise: dict[str, Any], rate: float, batch: int, **more: Any) -> Peer:
    """A network, loss and sampler as in diffusers' `train_unconditional.py`, at 32x32."""
    from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel

    net = UNet2DModel(sample_size=32, in_channels=channels, out_channels=channels, **layout)
    scheduler = DDPMScheduler(**noise)
    sampler = DPMSolverMultistepScheduler.from_config(
        scheduler.config, thresholding=True, sample_max_value=1.0, timestep_spacing="trailing"
    )
    pipeline = DDPMPipeline(net, sampler)
    pipeline.set_progress_bar_config(disable=True)

    def loss(images: torch.Tensor) -> torch.Tensor:
        eps, t = torch.randn_like(images), torch.randint(0, 1000, (len(images),), device=images.device)
        return (net(scheduler.add_noise(images, eps, t), t).sample - eps).square().mean()

    def draw(count: int) -> torch.Tensor:
        pictures = pipeline(batch_size=count, num_inference_steps=20, output_type="np").images
        return torch.from_numpy(pictures).movedim(-1, 1) * 2 - 1

    optimizer = torch.optim.AdamW(net.parameters(), rate, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    return Peer(net, loss, optimizer, draw, 32, batch, **more)


def diffusers_defaults(channels: int, size: int) -> Peer:
    """The script without any flag but the resolution."""
    layout = {
        "layers_per_block": 2,
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    }
    return _stock(channels, layout, {}, 1e-4, 16)


def diffusers_best(channels: int, size: int) -> Peer:
    """The script with a small network (--model_config_name_or_path) and the flags that suit a short run."""
    layout = {
        "layers_per_block": 1,
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
    }
    return _stock(channels, layout, {"beta_schedule": "squaredcos_cap_v2"}, 1e-3, 64, decay=0.995)


def lucidrains(channels: int, size: int) -> Peer:
    """denoising-diffusion-pytorch with the settings of its README, at 32x32."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    net = Unet(dim=64, dim_mults=(1, 2, 4, 8), channels=channels)
    diffusion = GaussianDiffusion(net, image_size=32, timesteps=1000, sampling_timesteps=20)
    optimizer = torch.optim.Adam(diffusion.parameters(), 8e-5, betas=(0.9, 0.99))

    def loss(images: torch.Tensor) -> torch.Tensor:
        return diffusion((images + 1) / 2)

    return Peer(net, loss, optimizer, lambda count: diffusion.sample(count) * 2 - 1, 32, 32, 0.995)


def _smalldiffusion(net: Any, schedule: Any, rate: float, size: int, decay: float) -> Peer:
    from smalldiffusion import generate_train_sample, samples

    def loss(images: torch.Tensor) -> torch.Tensor:
        images, sigma, noise, cond = generate_train_sample(images, schedule)
        return net.get_loss(images, sigma, noise, cond=cond)

    def draw(count: int) -> torch.Tensor:
        *_, last = samples(net, schedule.sample_sigmas(20), gam=1.6, batchsize=count)
        return last

    return Peer(net, loss, torch.optim.Adam(net.parameters(), rate), draw, size, 128, decay)


def smalldiffusion_unet(channels: int, size: int) -> Peer:
    """smalldiffusion's `fashion_mnist_unet.py`, with batches of 128 rather than 1024."""
    from smalldiffusion import Scaled, ScheduleLogLinear, Unet

    net = Scaled(Unet)(size, channels, channels, ch=64, ch_mult=(1, 1, 2), attn_resolutions=(size // 2,))
    return _smalldiffusion(net, ScheduleLogLinear(sigma_min=0.01, sigma_max=20, N=800), 7e-4, size, 0.999)


def smalldiffusion_dit(channels: int, size: int) -> Peer:
    """smalldiffusion's `fashion_mnist_dit.py`, with batches of 128 rather than 1024."""
    from smalldiffusion import DiT, ScheduleDDPM

    net = DiT(in_dim=size, channels=channels, patch_size=2, depth=6, head_dim=32, num_heads=6, mlp_ratio=4.0)
    return _smalldiffusion(net, ScheduleDDPM(beta_start=0.0001, beta_end=0.02, N=1000), 1e-3, size, 0.99)


PEERS: dict[str, Callable[[int, int], Peer]] = {  # number of channels, size of the pictures -> contender
    "diffusers, defaults": diffusers_defaults,
    "diffusers, best flags": diffusers_best,
    "denoising-diffusion-pytorch": lucidrains,
    "smalldiffusion, U-Net": smalldiffusion_unet,
    "smalldiffusion, DiT": smalldiffusion_dit,
}
