"""The Hugging Face Hub: convert, verify, describe and push saved pipelines."""

from .card import write_model_card
from .convert import (
    pipeline_from_diffusers,
    pipeline_to_diffusers,
    scheduler_from_diffusers,
    scheduler_to_diffusers,
)
from .errors import HubError
from .folder import ModelError
from .push import BackgroundPush, push_pipeline
from .verify import release_code, verify_repository

__all__ = [
    "BackgroundPush",
    "HubError",
    "ModelError",
    "pipeline_from_diffusers",
    "pipeline_to_diffusers",
    "push_pipeline",
    "release_code",
    "scheduler_from_diffusers",
    "scheduler_to_diffusers",
    "verify_repository",
    "write_model_card",
]
