"""Pipelines; installed as `custom_ddpm.pipelines`. Each file stands alone and loads as a `custom_pipeline`."""

from .pipeline_custom_ddpm import CustomDDPMPipeline

__all__ = ["CustomDDPMPipeline"]
