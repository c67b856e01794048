"""DDPM on diffusers, from the formulas: noise scheduler, U-Net, pipeline and training.

The public names are imported when they are first used, as in diffusers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .pipelines import CustomDDPMPipeline
    from .scheduler import CustomDDPMScheduler
    from .unet import CustomUNet2DModel

__all__ = ["CustomDDPMPipeline", "CustomDDPMScheduler", "CustomUNet2DModel", "__version__"]

_MODULES = {
    "CustomDDPMPipeline": "pipelines",
    "CustomDDPMScheduler": "scheduler",
    "CustomUNet2DModel": "unet",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
