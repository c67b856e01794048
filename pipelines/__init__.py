"""Pipelines, installed as `custom_ddpm.pipelines`; each file can also be loaded on its own as a `custom_pipeline`."""

from .pipeline_custom_ddpm import CustomDDPMPipeline

__all__ = ["CustomDDPMPipeline"]
