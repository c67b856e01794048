"""Conversion to and from diffusers' `UNet2DModel`, `DDPMScheduler` and `DDPMPipeline`.

Both sides have the same settings and the same tensors, so nothing is computed here; a setting that the other side does
not have is an error that names it. The networks convert themselves: see `CustomUNet2DModel.from_diffusers`.
"""

import inspect
import os
from typing import Any

from diffusers import DDPMPipeline, DDPMScheduler

from ..pipelines import CustomDDPMPipeline
from ..scheduler import CustomDDPMScheduler
from ..unet import CustomUNet2DModel


def scheduler_from_diffusers(scheduler: DDPMScheduler) -> CustomDDPMScheduler:
    """Convert a `DDPMScheduler`: same noise schedule, same reverse step.

    Raises:
        TypeError: `scheduler` is not a `DDPMScheduler`.
        ValueError: a setting that `CustomDDPMScheduler` does not accept ("epsilon" with rescale_betas_zero_snr).
    """
    if not isinstance(scheduler, DDPMScheduler):
        raise TypeError(f"scheduler must be a DDPMScheduler, got {type(scheduler).__name__}")
    return CustomDDPMScheduler.from_config(scheduler.config)  # type: ignore[attr-defined]


def scheduler_to_diffusers(scheduler: CustomDDPMScheduler) -> DDPMScheduler:
    """Convert to a `DDPMScheduler`: same noise schedule, same reverse step.

    A schedule that diffusers has no name for is passed as `trained_betas`.

    Raises:
        TypeError: `scheduler` is not a `CustomDDPMScheduler`.
        ValueError: a `variance_type` that `DDPMScheduler` does not have, or for which it returns NaN.
    """
    if not isinstance(scheduler, CustomDDPMScheduler):
        raise TypeError(f"scheduler must be a CustomDDPMScheduler, got {type(scheduler).__name__}")
    variance_type = scheduler.config.variance_type
    if variance_type in ("zero", "analytic"):
        raise ValueError(f"DDPMScheduler has no variance_type {variance_type!r}; use 'fixed_small' or 'fixed_large'")
    if variance_type == "fixed_large_log":
        raise ValueError(
            "DDPMScheduler gives NaN for variance_type 'fixed_large_log'; use 'fixed_large', which is the same variance"
        )
    known = inspect.signature(DDPMScheduler.__init__).parameters
    return DDPMScheduler(**{name: value for name, value in scheduler.config.items() if name in known})


def pipeline_from_diffusers(source: str | os.PathLike | DDPMPipeline, **hub_options: Any) -> CustomDDPMPipeline:
    """Convert a `DDPMPipeline`, given in memory or as a saved one, to a `CustomDDPMPipeline`.

    Older repositories are supported: weights at the root, attention weights under their former names. A scheduler other
    than `DDPMScheduler` is kept as it is.

    Args:
        source: a folder, a Hub repository such as "google/ddpm-cifar10-32", or the pipeline itself (its tensors are
            copied).
        **hub_options: `revision`, `token`, `cache_dir`, `variant`, `torch_dtype` and other arguments of
            `CustomDDPMPipeline.from_pretrained`, which reads the saved one.

    Raises:
        ModelError: (an OSError and a ValueError) there is no pipeline, or something is wrong with its files.
        TypeError: the network of a pipeline in memory is not a `UNet2DModel`.
        ValueError: a setting that the custom classes do not have; the message names it.
    """
    if not isinstance(source, DDPMPipeline):
        return CustomDDPMPipeline.from_pretrained(source, **hub_options)
    stock: Any = source
    scheduler = stock.scheduler
    if isinstance(scheduler, DDPMScheduler):
        scheduler = scheduler_from_diffusers(scheduler)
    return CustomDDPMPipeline(unet=CustomUNet2DModel.from_diffusers(stock.unet), scheduler=scheduler)


def pipeline_to_diffusers(pipeline: CustomDDPMPipeline) -> DDPMPipeline:
    """Convert to a `DDPMPipeline`, which generates the same images and loads without this package.

    A scheduler other than `CustomDDPMScheduler` is kept as it is.

    Raises:
        ValueError: something that `DDPMPipeline` does not support: class labels, a `sample_size` that is None or not
            divisible at every level, or what `scheduler_to_diffusers` raises for.
    """
    config, scheduler = pipeline.unet.config, pipeline.scheduler
    if config.num_class_embeds is not None:
        raise ValueError(
            f"DDPMPipeline does not support class labels; this model has num_class_embeds={config.num_class_embeds} "
            "(unet.to_diffusers() converts the network alone)"
        )
    stride, size = 2 ** (len(config.block_out_channels) - 1), config.sample_size
    if size is None:
        raise ValueError("DDPMPipeline needs the unet's sample_size as the image size; this unet has none")
    if any(side % stride for side in ([size] if isinstance(size, int) else size)):
        raise ValueError(f"UNet2DModel does not pad: sample_size {size} is not a multiple of {stride}")
    if isinstance(scheduler, CustomDDPMScheduler):
        scheduler = scheduler_to_diffusers(scheduler)
    return DDPMPipeline(unet=pipeline.unet.to_diffusers(), scheduler=scheduler)
