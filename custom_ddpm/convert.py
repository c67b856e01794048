"""To and from diffusers' own `UNet2DModel`, `DDPMScheduler` and `DDPMPipeline`.

Both sides have the same settings and the same tensors, so nothing is computed here: what one side can be told and the
other cannot is refused by name. The networks convert themselves, see `CustomUNet2DModel.from_diffusers`.
"""

import inspect
import os
from typing import Any

from diffusers import DDPMPipeline, DDPMScheduler

from .pipelines import CustomDDPMPipeline
from .scheduler import CustomDDPMScheduler
from .unet import CustomUNet2DModel


def scheduler_from_diffusers(scheduler: DDPMScheduler) -> CustomDDPMScheduler:
    """The same noise schedule and the same reverse step.

    Raises:
        TypeError: `scheduler` is no `DDPMScheduler`.
        ValueError: a setting that `CustomDDPMScheduler` refuses ("epsilon" with rescale_betas_zero_snr).
    """
    if not isinstance(scheduler, DDPMScheduler):
        raise TypeError(f"scheduler must be a DDPMScheduler, got {type(scheduler).__name__}")
    return CustomDDPMScheduler.from_config(scheduler.config)  # type: ignore[attr-defined]


def scheduler_to_diffusers(scheduler: CustomDDPMScheduler) -> DDPMScheduler:
    """The same noise schedule and the same reverse step; a schedule that diffusers has no name for goes as its betas.

    Raises:
        TypeError: `scheduler` is no `CustomDDPMScheduler`.
        ValueError: a `variance_type` that `DDPMScheduler` does not have, or has and returns NaN for.
    """
    if not isinstance(scheduler, CustomDDPMScheduler):
        raise TypeError(f"scheduler must be a CustomDDPMScheduler, got {type(scheduler).__name__}")
    variance_type = scheduler.config.variance_type
    if variance_type in ("zero", "analytic"):
        raise ValueError(f"DDPMScheduler has no variance_type {variance_type!r}; use 'fixed_small' or 'fixed_large'")
    if variance_type == "fixed_large_log":
        raise ValueError("DDPMScheduler gives NaN for variance_type 'fixed_large_log'; use its equal, 'fixed_large'")
    known = inspect.signature(DDPMScheduler.__init__).parameters
    return DDPMScheduler(**{name: value for name, value in scheduler.config.items() if name in known})


def pipeline_from_diffusers(source: str | os.PathLike | DDPMPipeline, **hub_options: Any) -> CustomDDPMPipeline:
    """A stock DDPM as a `CustomDDPMPipeline`, in memory or read from where it was saved.

    Older repositories are read too: weights at their root, attention weights under their old names. A scheduler other
    than `DDPMScheduler` stays what it is.

    Args:
        source: a folder, a Hub repository such as "google/ddpm-cifar10-32", or the pipeline itself (its tensors are
            copied).
        **hub_options: `revision`, `token`, `cache_dir`, `variant`, `torch_dtype` and others of
            `DiffusionPipeline.from_pretrained`.

    Raises:
        OSError: there is no pipeline, or none whose weights are safetensors; pickles are not read.
        TypeError: its network is no `UNet2DModel`.
        ValueError: a setting that our classes cannot express, by name.
    """
    stock: Any = source
    if not isinstance(source, DDPMPipeline):
        stock = DDPMPipeline.from_pretrained(os.fspath(source), use_safetensors=True, **hub_options)
    scheduler = stock.scheduler
    if isinstance(scheduler, DDPMScheduler):
        scheduler = scheduler_from_diffusers(scheduler)
    return CustomDDPMPipeline(unet=CustomUNet2DModel.from_diffusers(stock.unet), scheduler=scheduler)


def pipeline_to_diffusers(pipeline: CustomDDPMPipeline) -> DDPMPipeline:
    """The same pictures from diffusers' own classes, which load without any code of ours.

    A scheduler other than `CustomDDPMScheduler` stays what it is.

    Raises:
        ValueError: what `DDPMPipeline` cannot do: class labels, a picture size that does not halve evenly or is not
            set, and what `scheduler_to_diffusers` refuses.
    """
    config, scheduler = pipeline.unet.config, pipeline.scheduler
    if config.num_class_embeds is not None:
        raise ValueError(
            f"DDPMPipeline cannot pass class labels on; this model has num_class_embeds={config.num_class_embeds} "
            "(unet.to_diffusers() converts the network alone)"
        )
    stride, size = 2 ** (len(config.block_out_channels) - 1), config.sample_size
    if size is None:
        raise ValueError("DDPMPipeline draws pictures of the unet's sample_size only; this unet has none")
    if any(side % stride for side in ([size] if isinstance(size, int) else size)):
        raise ValueError(f"UNet2DModel does not pad: sample_size {size} is no multiple of {stride}")
    if isinstance(scheduler, CustomDDPMScheduler):
        scheduler = scheduler_to_diffusers(scheduler)
    return DDPMPipeline(unet=pipeline.unet.to_diffusers(), scheduler=scheduler)
