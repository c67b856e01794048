"""Pipelines, installed as `custom_ddpm.pipelines`; each file can also be loaded on its own as a `custom_pipeline`."""

from .pipeline_custom_ddpm import CustomDDPMPipeline
from .pipeline_custom_ddpm_img2img import CustomDDPMImg2ImgPipeline
from .pipeline_custom_ddpm_inpaint import CustomDDPMInpaintPipeline
from .pipeline_custom_ddpm_interpolate import CustomDDPMInterpolationPipeline

__all__ = [
    "CustomDDPMImg2ImgPipeline",
    "CustomDDPMInpaintPipeline",
    "CustomDDPMInterpolationPipeline",
    "CustomDDPMPipeline",
]
