"""Averages of the weights of any length, chosen after the run (Karras et al. 2024, arXiv:2312.02696, section 3).

A run keeps two averages with power-function profiles and saves snapshots of both at intervals. The profile of any other
average is fitted, by least squares, as a linear combination of the saved profiles.

The profile of an average that ends at step t is p_γ,t(τ) = (γ+1) τ^γ / t^(γ+1) over τ in [0, t] (eq. 1 and 2).
Its length is σ_rel, the standard deviation of p relative to t.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file

SIGMA_RELS = (0.05, 0.1)  # lengths of the two averages; the paper's choice
FOLDER = "posthoc_ema"
MAX_ERROR = 0.05  # largest relative error of a fitted profile; with 20 snapshots it is 0.01


def gamma_of(sigma_rel: float) -> float:
    """γ of the profile of relative length σ_rel, in (0, 0.288…): σ_rel² = (γ+1) / ((γ+2)² (γ+3)) (eq. 3)."""
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class PowerEMA(EMAModel):
    """diffusers' `EMAModel` with a power-function profile: decay (1 − 1/t)^(γ+1) at step t (eq. 2)."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], sigma_rel: float):
        super().__init__(parameters, foreach=True)
        self.gamma = gamma_of(sigma_rel)

    def get_decay(self, optimization_step: int) -> float:
        """Weight of the previous average at step t (eq. 2)."""
        return (1 - 1 / optimization_step) ** (self.gamma + 1)


class PostHocEMA:
    """The two averages that a run keeps.

    Args:
        parameters: parameters of the model; their present values have no weight in the averages.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]):
        parameters = list(parameters)
        self.averages = {sigma_rel: PowerEMA(parameters, sigma_rel) for sigma_rel in SIGMA_RELS}

    @property
    def optimization_step(self) -> int:
        """Number of optimiser steps in the averages."""
        return self.averages[SIGMA_RELS[0]].optimization_step

    @optimization_step.setter
    def optimization_step(self, step: int) -> None:
        for average in self.averages.values():
            average.optimization_step = step

    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Update the averages with the parameters after an optimiser step."""
        parameters = list(parameters)
        for average in self.averages.values():
            average.step(parameters)


def snapshot_file(run: Path, step: int) -> Path:
    """The file of the snapshot after optimiser step `step`, in the output folder of a run."""
    return run / FOLDER / f"step-{step:07d}.safetensors"


def save_snapshot(run: Path, step: int, averages: Mapping[str, torch.Tensor]) -> None:
    """Save averages that end at `step`, named "<σ_rel>/<weight>", in half precision as in the paper."""
    file = snapshot_file(run, step)
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(".tmp")
    save_file({name: value.half() for name, value in averages.items()}, partial)
    partial.replace(file)


def _products(gammas: np.ndarray, steps: np.ndarray, gamma: np.ndarray, step: np.ndarray) -> np.ndarray:
    """∫ p_γi,ti p_γj,tj dτ. Both are powers of τ up to the smaller t; computed in logarithms to avoid overflow."""
    g, t, h, s = gammas[:, None], np.log(steps)[:, None], gamma[None, :], np.log(step)[None, :]
    log_integral = (g + h + 1) * np.minimum(t, s) - (g + 1) * t - (h + 1) * s
    return (g + 1) * (h + 1) / (g + h + 1) * np.exp(log_integral)


def fit_profile(gammas: Sequence[float], steps: Sequence[float], gamma: float, step: float) -> tuple[np.ndarray, float]:
    """Fit p_γ,t by a linear combination of profiles p_γi,ti in least squares (section 3.2).

    Args:
        gammas, steps: γ and last step of each given profile.
        gamma, step: γ and last step of the profile to fit.

    Returns:
        The coefficients; the distance of the fit to the profile, relative to the norm of the profile.
    """
    there, wanted = (np.asarray(gammas), np.asarray(steps, float)), (np.array([gamma]), np.array([float(step)]))
    products, target = _products(*there, *there), _products(*there, *wanted)
    factors = np.linalg.lstsq(products, target, rcond=1e-12)[0]
    norm = _products(*wanted, *wanted)
    error = norm - 2 * factors.T @ target + factors.T @ products @ factors
    return factors[:, 0], float(np.sqrt(max(0.0, (error / norm).item())))


def reconstruct(run: str | Path, sigma_rel: float, step: int | None = None) -> dict[str, torch.Tensor]:
    """Compute the average of relative length `sigma_rel` from the snapshots of a run with --posthoc_ema_steps.

    `pipeline.unet.load_state_dict(reconstruct("my-model", 0.15))` loads it into a pipeline of the run.

    Args:
        run: output folder of the run.
        sigma_rel: standard deviation of the profile relative to the number of steps; useful values are 0.02 … 0.25.
        step: last step of the average; that of the last snapshot if None.

    Returns:
        float32 weights by name.

    Raises:
        FileNotFoundError: there are no snapshots up to `step`.
        ValueError: `sigma_rel` is out of range, or cannot be fitted by these snapshots.
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel is {sigma_rel}; it must be between 0 and {12**-0.5:.3f}, that of a plain mean")
    files = {int(re.findall(r"\d+", file.stem)[0]): file for file in Path(run, FOLDER).glob("step-*.safetensors")}
    ends = sorted(end for end in files if step is None or end <= step)
    if not ends:
        raise FileNotFoundError(f"{run} holds no snapshots up to step {step}; train with --posthoc_ema_steps")
    step = step or ends[-1]
    pairs = [(end, kept) for end in ends for kept in SIGMA_RELS]
    factors, error = fit_profile(
        [gamma_of(kept) for _, kept in pairs], [end for end, _ in pairs], gamma_of(sigma_rel), step
    )
    if error > MAX_ERROR:
        raise ValueError(
            f"sigma_rel {sigma_rel} at step {step} cannot be reconstructed from the {len(ends)} snapshots in {run}: "
            f"relative error {error:.0%}; choose one nearer to 0.05 … 0.1, or a step that was stored"
        )
    weights: dict[str, torch.Tensor] = {}
    for (end, kept), factor in zip(pairs, factors.tolist(), strict=True):
        with safe_open(files[end], framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                of, name = key.split("/", 1)
                if of == str(kept):
                    part = factor * file.get_tensor(key).double()
                    weights[name] = weights[name] + part if name in weights else part
    return {name: value.float() for name, value in weights.items()}
