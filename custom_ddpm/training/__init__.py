"""Training: Algorithm 1 (T2) on Accelerate.

`train` runs a whole training from a configuration; `training_steps` is the loop alone.
"""

from ..config import TrainingConfig
from .loop import TrainingStep, training_steps
from .run import train

__all__ = ["TrainingConfig", "TrainingStep", "train", "training_steps"]
