"""What a run carries from step to step: weights, the optimiser's moments, averages, the history of the sampler of t.

A checkpoint holds it as whole tensors in safetensors, one file each, by the names of the weights: it does not tell on
how many processes the run was, nor how the model lay on them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .likelihood import ImportanceSampler
from .posthoc_ema import PostHocEMA, save_snapshot
from .sharding import forget_whole, join, local_part, part_of
from .unet import CustomUNet2DModel

UNET_FILE = "unet.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
EMA_FILE = "ema.safetensors"
POSTHOC_EMA_FILE = "posthoc_ema.safetensors"
SAMPLER_FILE = "timestep_sampler.safetensors"

# By name, what this process has of a tensor; and one that lies on the processes as it does.
Parts = dict[str, tuple[torch.Tensor, torch.Tensor]]


class TrainingState:
    """The parts of a run, all of them on this process's device. All processes call its methods together.

    Args:
        accelerator: the run's, which has prepared `unet` and `optimizer`.
        unet: the model, not what accelerate may have wrapped it in.
        optimizer: torch's, of `unet.parameters()`.
        ema: their average that is shown and saved as the pipeline, if any.
        posthoc_ema: the two that others are made of after the run, if any.
        sampler: of t, if it learns from the losses.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        unet: CustomUNet2DModel,
        optimizer: torch.optim.Optimizer,
        ema: EMAModel | None = None,
        posthoc_ema: PostHocEMA | None = None,
        sampler: ImportanceSampler | None = None,
    ):
        self.accelerator, self.unet, self.optimizer = accelerator, unet, optimizer
        self.ema, self.posthoc_ema, self.sampler = ema, posthoc_ema, sampler

    def step_averages(self) -> None:
        """Take the weights after an optimiser step into the averages."""
        weights = [local_part(w) for w in self.unet.parameters()]
        for average in (self.ema, self.posthoc_ema):
            if average is not None:
                average.step(weights)

    @contextmanager
    def averaged(self) -> Iterator[CustomUNet2DModel]:
        """The model with its averaged weights in place, ready to sample."""
        self.unet.eval()
        weights = [local_part(w) for w in self.unet.parameters()]
        if self.ema is not None:
            self.ema.store(weights)
            self.ema.copy_to(weights)
        forget_whole(self.unet)
        try:
            yield self.unet
        finally:
            if self.ema is not None:
                self.ema.restore(weights)
            forget_whole(self.unet)
            self.unet.train()

    def whole_unet(self) -> CustomUNet2DModel | None:
        """The model as it stands, whole and on the CPU of the main process, to be saved at once; None on others."""
        weights = self._gather(self._files()[UNET_FILE])
        if not self.accelerator.is_main_process:
            return None
        with torch.device("meta"):  # builds without drawing random numbers that would be thrown away
            unet: CustomUNet2DModel = CustomUNet2DModel.from_config(self.unet.config)
        unet.load_state_dict(weights, assign=True)
        return unet

    def save(self, folder: Path) -> None:
        """Write all of it into a folder.

        Raises:
            OSError, SafetensorError: on the main process, when all of it is gathered: no other is left waiting for it.
        """
        failure: Exception | None = None
        for file, parts in self._files().items():
            tensors = self._gather(parts)
            if self.accelerator.is_main_process and failure is None:
                try:
                    save_file(tensors, folder / file)
                except (OSError, SafetensorError) as error:
                    failure = error
        if failure is not None:
            raise failure
        if self.sampler is not None and self.accelerator.is_main_process:
            save_file(self.sampler.state_dict(), folder / SAMPLER_FILE)

    def metadata(self) -> dict[str, Any]:
        """What belongs to it and is no tensor, for JSON."""
        scaler = self.accelerator.scaler
        return {"ema_step": self.ema and self.ema.optimization_step, "scaler": scaler and scaler.state_dict()}

    @torch.no_grad()
    def load(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Take over what `save` wrote and `metadata` told, with `step`, the number of optimiser steps done."""
        parameters = dict(self.unet.named_parameters())
        with safe_open(folder / OPTIMIZER_FILE, "pt") as saved:
            for name in saved.keys():  # noqa: SIM118 - no mapping, but has keys()
                weight, kind = name.rsplit(".", 1)
                parameter = parameters[weight]
                # A moment is of the weight's shape and layout, the count of steps one number.
                like = parameter if saved.get_slice(name).get_shape() else torch.zeros((), device=parameter.device)
                self.optimizer.state[parameter][kind] = torch.zeros_like(like)
        for file, parts in self._files().items():
            with safe_open(folder / file, "pt") as saved:
                for name, (part, like) in parts.items():
                    part.copy_(part_of(saved.get_tensor(name), like))
        forget_whole(self.unet)
        if self.ema is not None:
            self.ema.optimization_step = metadata["ema_step"]
        if self.posthoc_ema is not None:
            self.posthoc_ema.optimization_step = metadata["step"]
        if self.sampler is not None:
            self.sampler.load_state_dict(load_file(folder / SAMPLER_FILE))
        if self.accelerator.scaler is not None and metadata["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(metadata["scaler"])

    def save_posthoc_snapshot(self, run: Path) -> None:
        """Store the averages that others will be made of in the folder of the run, see `posthoc_ema.py`."""
        assert self.posthoc_ema is not None
        averages = self._gather(self._files()[POSTHOC_EMA_FILE])
        if self.accelerator.is_main_process:
            save_snapshot(run, self.posthoc_ema.optimization_step, averages)

    def _files(self) -> dict[str, Parts]:
        """What `save` writes, but the sampler's, which is whole everywhere."""
        forget_whole(self.unet)
        weights = dict(self.unet.named_parameters())
        moments = {f"{name}.{kind}": m for name, w in weights.items() for kind, m in self.optimizer.state[w].items()}
        files = {
            UNET_FILE: {name: (local_part(w), w) for name, w in weights.items()},
            OPTIMIZER_FILE: {name: (local_part(m), m) for name, m in moments.items()},
        }
        if self.ema is not None:
            averages = zip(weights.items(), self.ema.shadow_params, strict=True)
            files[EMA_FILE] = {name: (part, w) for (name, w), part in averages}
        if self.posthoc_ema is not None:
            files[POSTHOC_EMA_FILE] = {
                f"{sigma_rel}/{name}": (part, w)
                for sigma_rel, average in self.posthoc_ema.averages.items()
                for (name, w), part in zip(weights.items(), average.shadow_params, strict=True)
            }
        return files

    def _gather(self, parts: Parts) -> dict[str, torch.Tensor]:
        """Whole tensors on the CPU of the main process, one after the other; nothing on others."""
        gathered = {}
        for name, (part, like) in parts.items():
            tensor = join(part.detach(), like)
            if self.accelerator.is_main_process:
                gathered[name] = tensor.cpu().contiguous()
        return gathered
