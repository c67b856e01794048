"""The training state: weights, the optimiser's moments, averages of the weights, the loss history of the sampler of t.

It is saved as full tensors in safetensors files, by the names of the weights, independently of the number of processes
and of sharding.
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

from ..likelihood import ImportanceSampler
from ..messages import one_line
from ..unet import CustomUNet2DModel
from .ema import SIGMA_RELS, PostHocEMA, save_snapshot
from .sharding import join, local_part, part_of, reshard, weights_of

UNET_FILE = "unet.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
MOMENTS = ({"exp_avg", "exp_avg_sq", "step"}, {"momentum", "step"})  # of AdamW, and of Muon
EMA_FILE = "ema.safetensors"
POSTHOC_EMA_FILE = "posthoc_ema.safetensors"
SAMPLER_FILE = "timestep_sampler.safetensors"

# Name -> this process's shard of a tensor, and a tensor that is sharded in the same way.
Shards = dict[str, tuple[torch.Tensor, torch.Tensor]]


class TrainingState:
    """Everything that changes from step to step, on this process's device. All processes must call its methods.

    Args:
        accelerator: the run's accelerator, which has prepared `unet` and `optimizer`.
        unet: the model itself, not accelerate's wrapper around it.
        optimizer: torch's optimiser of `unet.parameters()`.
        ema: average of the weights that is sampled from and saved as the pipeline, if any.
        posthoc_ema: averages from which others are made after the run, if any.
        sampler: sampler of t, if it learns from the losses.
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
        """Update the averages; to be called after each optimiser step."""
        weights = [local_part(w) for w in weights_of(self.optimizer)]
        for average in (self.ema, self.posthoc_ema):
            if average is not None:
                average.step(weights)

    @contextmanager
    def averaged(self) -> Iterator[CustomUNet2DModel]:
        """Context in which the model has its averaged weights and is in evaluation mode."""
        self.unet.eval()
        weights = [local_part(w) for w in self.unet.parameters()]
        if self.ema is not None:
            self.ema.store(weights)
            self.ema.copy_to(weights)
        reshard(self.unet)
        try:
            yield self.unet
        finally:
            if self.ema is not None:
                self.ema.restore(weights)
            reshard(self.unet)
            self.unet.train()

    def whole_unet(self) -> CustomUNet2DModel | None:
        """The full model with its present weights, on the CPU of the main process, to be saved; None on the others."""
        weights = self._gather(self._files()[UNET_FILE])
        if not self.accelerator.is_main_process:
            return None
        with torch.device("meta"):  # builds without drawing random weights
            unet: CustomUNet2DModel = CustomUNet2DModel.from_config(self.unet.config)
        unet.load_state_dict(weights, assign=True)
        return unet

    def save(self, folder: Path) -> None:
        """Write the state into a folder.

        Raises:
            OSError, SafetensorError: on the main process, after everything was gathered, so that no process is left
                waiting for it.
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
        """The part of the state that is not tensors, as values for JSON."""
        scaler = self.accelerator.scaler
        return {"ema_step": self.ema and self.ema.optimization_step, "scaler": scaler and scaler.state_dict()}

    @torch.no_grad()
    def load(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Restore what `save` wrote and `metadata` returned, with `step`, the optimiser steps done."""
        parameters = dict(self.unet.named_parameters())
        with safe_open(folder / OPTIMIZER_FILE, "pt") as saved:
            for name in saved.keys():  # noqa: SIM118 - not a mapping
                weight, kind = name.rsplit(".", 1)
                parameter = parameters[weight]
                # A moment has the shape and layout of its weight, the number of steps is a scalar.
                like = parameter if saved.get_slice(name).get_shape() else torch.zeros((), device=parameter.device)
                self.optimizer.state[parameter][kind] = torch.zeros_like(like)
        for file, parts in self._files().items():
            with safe_open(folder / file, "pt") as saved:
                for name, (part, like) in parts.items():
                    part.copy_(part_of(saved.get_tensor(name), like))
        reshard(self.unet)
        if self.ema is not None:
            self.ema.optimization_step = metadata["ema_step"]
        if self.posthoc_ema is not None:
            self.posthoc_ema.optimization_step = metadata["step"]
        if self.sampler is not None:
            self.sampler.load_state_dict(load_file(folder / SAMPLER_FILE))
        if self.accelerator.scaler is not None and metadata["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(metadata["scaler"])

    def save_posthoc_snapshot(self, run: Path) -> None:
        """Save a snapshot of the post-hoc averages in the output folder; see `ema.py`."""
        assert self.posthoc_ema is not None
        averages = self._gather(self._files()[POSTHOC_EMA_FILE])
        if self.accelerator.is_main_process:
            save_snapshot(run, self.posthoc_ema.optimization_step, averages)

    def _files(self) -> dict[str, Shards]:
        """The tensors that `save` writes, by file, without those of the sampler, which is never sharded."""
        reshard(self.unet)
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

    def _gather(self, parts: Shards) -> dict[str, torch.Tensor]:
        """Full tensors on the CPU of the main process, gathered one by one; an empty dict on the others."""
        gathered = {}
        for name, (part, like) in parts.items():
            tensor = join(part.detach(), like)
            if self.accelerator.is_main_process:
                gathered[name] = tensor.cpu().contiguous()
        return gathered


def find_problem(
    folder: Path, unet: CustomUNet2DModel, ema: bool, posthoc_ema: bool, sampler: ImportanceSampler | None
) -> str | None:
    """Compare the files of a saved state with the model that it is to be loaded into, before anything is loaded.

    Args:
        folder: the folder that `TrainingState.save` was given.
        unet: the model, not sharded.
        ema, posthoc_ema: whether the state has these averages.
        sampler: the importance sampler, if any.

    Returns:
        What does not fit, in one line; None if everything does.
    """
    shapes = {name: list(weight.shape) for name, weight in unet.named_parameters()}
    expected = {UNET_FILE: shapes}
    if ema:
        expected[EMA_FILE] = shapes
    if posthoc_ema:
        expected[POSTHOC_EMA_FILE] = {f"{kept}/{name}": shape for kept in SIGMA_RELS for name, shape in shapes.items()}
    if sampler is not None:
        expected[SAMPLER_FILE] = {name: list(value.shape) for name, value in sampler.state_dict().items()}
    try:
        for file, wanted in expected.items():
            found = _shapes(folder / file)
            for name in sorted(found.keys() | wanted.keys()):
                if found.get(name) != wanted.get(name):
                    has, needs = found.get(name, "not there"), wanted.get(name, "none")
                    return f"{file}: {name} has the shape {has}, the model needs {needs}"
        return _optimizer_problem(_shapes(folder / OPTIMIZER_FILE), shapes)
    except (OSError, SafetensorError) as error:
        return one_line(error)


def _optimizer_problem(found: dict[str, list[int]], shapes: dict[str, list[int]]) -> str | None:
    """Every weight must have all moments of one of its optimisers: scalars, or tensors of the shape of the weight."""
    kinds: dict[str, set[str]] = {weight: set() for weight in shapes}
    for name in found:
        kinds.setdefault(name.rpartition(".")[0], set()).add(name.rpartition(".")[2])
    if kinds.keys() != shapes.keys() or any(each not in MOMENTS for each in kinds.values()):
        return f"{OPTIMIZER_FILE}: {len(found)} tensors, which are not the moments of {len(shapes)} weights"
    for name, shape in found.items():
        if shape not in ([], shapes[name.rpartition(".")[0]]):
            return f"{OPTIMIZER_FILE}: {name} has the shape {shape}"
    return None


def _shapes(file: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors in a safetensors file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file.name} is missing")
    with safe_open(file, "pt") as saved:
        return {name: list(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118 - not a mapping
