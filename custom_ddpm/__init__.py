"""DDPM on diffusers, from the formulas: scheduler, U-Net, pipeline and training."""

from ._version import __version__
from .pipelines import CustomDDPMPipeline
from .scheduler import CustomDDPMScheduler
from .unet import CustomUNet2DModel

__all__ = ["CustomDDPMPipeline", "CustomDDPMScheduler", "CustomUNet2DModel", "__version__"]
