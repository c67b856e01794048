"""`CustomDDPMScheduler`: the forward process, its posterior and the reverse step.

Formula numbers (F3 … S3) refer to docs/derivation.md. Timesteps run t = 0 … T−1 in code; t = −1 is the state before the
first step, where ᾱ = 1 and the sample is x_0. This file imports only `schedules.py` from its folder: both files are
saved in every model repository.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

if __name__.startswith("diffusers_modules."):
    # Run as remote code: diffusers copies the files of every model into one package, where Python would give the module
    # schedules of the model loaded before.
    sys.modules.pop(f"{__package__}.schedules", None)

from .schedules import log_alphas_cumprod, make_betas, optimal_timesteps, rescale_zero_terminal_snr

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
VARIANCE_TYPES = (
    "fixed_small",
    "fixed_small_log",
    "fixed_large",
    "fixed_large_log",
    "learned",
    "learned_range",
    "zero",
    "analytic",
)
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")
# Schedules whose names most other schedulers of diffusers do not know; their configuration stores the values of β.
_SPELLED_OUT_SCHEDULES = ("sigmoid", "laplace", "exp")
_SMALLEST_VARIANCE = 1e-20  # lower bound that keeps the logarithm finite


@dataclass
class CustomDDPMSchedulerOutput(BaseOutput):
    """Output of `CustomDDPMScheduler.step`.

    Args:
        prev_sample: x_s, shape and dtype of the input sample; s is the next timestep of the reverse process.
        pred_original_sample: x̂_0 after clipping or thresholding, as used for `prev_sample`.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


def _require(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def _require_floating_point(dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise TypeError(f"samples are of dtype {dtype}; they must be floating point")


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in for samples of a dtype: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _as(dtype: torch.dtype, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a dtype; without a call of torch where it is so already, which is most of the time."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _draw(like: torch.Tensor, generator: Any) -> torch.Tensor:
    """z ~ N(0, I), of the shape, dtype and device of a tensor."""
    if generator is None or (isinstance(generator, torch.Generator) and generator.device.type == like.device.type):
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)


class Setting(NamedTuple):
    """How a number of steps is made; see `tuned` of `CustomDDPMScheduler`."""

    solver_order: int
    corrects: bool
    eta: float
    spacing: str


def _parse_tuned(tuned: Sequence[str], has_errors: bool) -> dict[int, Setting]:
    """The entries of `tuned` by their number of steps, checked."""
    if isinstance(tuned, str) or not isinstance(tuned, Sequence):
        raise ValueError(f"tuned is {tuned!r}; it must be a list of entries, such as ['10 2 0 trailing'], or None")
    settings = {}
    for entry in tuned:
        try:
            steps, order, eta, spacing = entry.split()
            corrects = order == "2c"
            settings[int(steps)] = setting = Setting(2 if corrects else int(order), corrects, float(eta), spacing)
            spacings = (*TIMESTEP_SPACINGS, "optimal") if has_errors else TIMESTEP_SPACINGS
            valid = (
                int(steps) > 0 and setting.solver_order in (1, 2, 3) and 0 <= setting.eta <= 1 and spacing in spacings
            )
        except (ValueError, AttributeError):
            valid = False
        if not valid:
            raise ValueError(
                f"tuned has {entry!r}; an entry is STEPS SOLVER_ORDER ETA SPACING, such as '10 2 0 trailing'"
            )
    return settings


def _check_arguments(config: Any) -> None:
    _require("variance_type", config.variance_type, VARIANCE_TYPES)
    _require("prediction_type", config.prediction_type, PREDICTION_TYPES)
    _require("timestep_spacing", config.timestep_spacing, TIMESTEP_SPACINGS)
    if config.solver_order not in (1, 2, 3):
        raise ValueError(f"solver_order is {config.solver_order}; it must be 1, 2 or 3")
    if config.corrector and config.solver_order != 2:
        raise ValueError(f"corrector is True, but solver_order is {config.solver_order}; it must be 2")
    if config.num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps is {config.num_train_timesteps}; it must be at least 1")


def _make_betas(config: Any) -> torch.Tensor:
    """β_1 … β_T in float64: `trained_betas` or the named schedule, checked, before any rescaling."""
    if config.trained_betas is not None:
        betas = torch.as_tensor(config.trained_betas, dtype=torch.float64)
        if betas.shape != (config.num_train_timesteps,):
            raise ValueError(
                f"trained_betas has shape {tuple(betas.shape)}; num_train_timesteps={config.num_train_timesteps} needs "
                f"({config.num_train_timesteps},)"
            )
    else:
        betas = make_betas(config.beta_schedule, config.num_train_timesteps, config.beta_start, config.beta_end)
    if not bool((betas > 0).all() and (betas[:-1] < 1).all() and betas[-1] <= 1):
        raise ValueError(
            f"betas run from {betas.min().item():g} to {betas.max().item():g}; each must be in (0, 1), the last in "
            "(0, 1] (F4)"
        )
    return betas


def _make_errors(name: str, user: str, config: Any, needed: bool) -> torch.Tensor:
    """`original_sample_variances` or `prediction_errors` in float64, (T,); empty if None, checked if they are used."""
    values = torch.as_tensor([] if config[name] is None else config[name], dtype=torch.float64)
    T = config.num_train_timesteps
    if needed and (values.shape != (T,) or not ((values >= 0) & values.isfinite()).all()):
        raise ValueError(f"{user} {name}: {T} numbers >= 0, one per timestep; got {len(values)}")
    return values


class CustomDDPMScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """DDPM scheduler (Ho, Jain, Abbeel 2020, arXiv:2006.11239) with the interface of diffusers' `DDPMScheduler`.

    Every coefficient is computed in float64 from log ᾱ and rounded once to the precision of the tensors it multiplies
    (in float32 on devices without float64, such as MPS). `step` and `add_noise` take them from tables, which are made
    once for a schedule, a device and a precision. Methods accept timesteps as an int, a 0-d tensor, or one per sample
    (B,). They never synchronise with the device and do not branch on tensor values.

    Args:
        num_train_timesteps: T.
        beta_start: β_1, for the schedules defined by a range.
        beta_end: β_T, for the schedules defined by a range.
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace" or "exp" (F4).
        trained_betas: β_1 … β_T, each in (0, 1), the last in (0, 1]; the three arguments above are then not used.
        variance_type: σ² of the reverse step. "fixed_small": β̃ (R4). "fixed_large": β. The same two with "_log" are
            synonyms. "learned": the second half of the model's output channels. "learned_range": the second half
            interpolates between log β̃ and log β (Nichol & Dhariwal 2021, eq. 15). "zero": no noise. "analytic": the
            optimal variance (Bao et al. 2022, arXiv:2201.06503), which needs `original_sample_variances`. None, as in
            configurations of schedulers without a variance: "fixed_small".
        clip_sample: whether to clip x̂_0 to ±`clip_sample_range`.
        prediction_type: what the model predicts: "epsilon" (T1), "sample" (x_0) or "v_prediction"
            (v = √ᾱ ε − √(1−ᾱ) x_0, Salimans & Ho 2022, arXiv:2202.00512).
        thresholding: whether to apply dynamic thresholding to x̂_0 (Saharia et al. 2022, arXiv:2205.11487) instead of
            clipping.
        dynamic_thresholding_ratio: quantile of |x̂_0| used as the threshold.
        clip_sample_range: see `clip_sample`.
        sample_max_value: upper bound of the dynamic threshold.
        timestep_spacing: "leading", "linspace" or "trailing" (Lin et al. 2024, table 2). "leading" of n steps is
            ⌊i T/n⌋, spread over all of T also where n does not divide T; with `rescale_betas_zero_snr` it is
            "trailing", since sampling must start where ᾱ = 0.
        steps_offset: added to the timesteps of "leading".
        rescale_betas_zero_snr: whether to rescale β so that ᾱ_T = 0 (Lin et al. 2024); not possible with "epsilon".
        original_sample_variances: T numbers E[Var(x_0 | x_t)] per pixel, for variance_type "analytic"; see
            `likelihood.estimate_original_sample_variances`.
        solver_order: 1: a step takes x̂_0 as constant (R4, R7). 2 or 3: a polynomial through the last 2 or 3 x̂_0 of the
            run, in log-SNR (S3); for η = 0, η = 1 and between. The first steps, and the last ones, have a lower order.
            From 2 on a scheduler steps one batch at a time: batches that are stepped in turn need a copy each
            (`copy.deepcopy`), or x̂_0 of one would go into the other.
        prediction_errors: T numbers E|x_0 − x̂_0(x_t)|² per pixel, from `likelihood.estimate_original_sample_variances`:
            any number of steps is then where the steps leave out least (S4), instead of by `timestep_spacing`.
        tuned: what was best for a number of steps, as measured by `custom-ddpm tune`: "STEPS SOLVER_ORDER ETA SPACING",
            such as "10 2 0 optimal"; SPACING is "optimal", by `prediction_errors`, or one of `timestep_spacing`.
            `set_timesteps` takes the nearest, if it is not less than half, `step` its η; all T steps are Algorithm 2.
        corrector: for `solver_order` 2, whether a step first corrects x_t by the x̂_0 that the model has there, as the
            step that led to x_t could not (S3; Zhao et al. 2023, arXiv:2302.04867). In `tuned` it is order "2c".

    Attributes:
        betas, alphas, alphas_cumprod: float32 (T,) on the CPU: β_t, α_t = 1−β_t, ᾱ_t.
        timesteps: int64, the descending timesteps of the reverse process; T−1 … 0 until `set_timesteps` is called.

    Raises:
        ValueError: an argument is out of range.
        NotImplementedError: unknown `beta_schedule`.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1
    config: Any

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str | None = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        original_sample_variances: list[float] | None = None,
        solver_order: int = 1,
        prediction_errors: list[float] | None = None,
        tuned: list[str] | None = None,
        corrector: bool = False,
    ):
        if variance_type is None:
            self.register_to_config(variance_type="fixed_small")
        _check_arguments(self.config)
        with torch.device("cpu"):  # whatever the default device is
            betas = _make_betas(self.config)
            self._build_tables(rescale_zero_terminal_snr(betas) if rescale_betas_zero_snr else betas)
            self._original_sample_variances = _make_errors(
                "original_sample_variances", "variance_type 'analytic' needs", self.config, variance_type == "analytic"
            )
            _make_errors("prediction_errors", "the timesteps need", self.config, prediction_errors is not None)
        if trained_betas is not None or beta_schedule in _SPELLED_OUT_SCHEDULES:
            self.register_to_config(trained_betas=betas.tolist())
        # Other schedulers have other defaults (β_T = 0.012, for example): their `from_config` must receive our values.
        defaults = self.config.get("_use_default_values", [])
        self.register_to_config(_use_default_values=[])
        own = {"original_sample_variances": original_sample_variances is None, "solver_order": solver_order == 1}
        own |= {"prediction_errors": prediction_errors is None, "tuned": tuned is None, "corrector": not corrector}
        left_out = {name for name, is_default in own.items() if is_default}
        if left_out:
            # Other schedulers warn of arguments that they do not know, or have another default for them (multistep
            # solvers for solver_order), so these are in the configuration only when used.
            if {*defaults} <= left_out:  # a loaded configuration, which has every value
                left_out.add("_use_default_values")
            self._internal_dict = FrozenDict(
                {name: value for name, value in self.config.items() if name not in left_out}
            )

        self._solver_order = self._given_order = solver_order  # not always in the configuration
        self._corrects = self._given_corrector = corrector
        self._eta = 1.0  # of `step` where none is given
        self._tuned = _parse_tuned(() if tuned is None else tuned, prediction_errors is not None)
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.custom_timesteps = False
        self._use_timesteps(np.arange(num_train_timesteps)[::-1].copy(), device=None)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers; of another scheduler's file `solver_order` and `corrector` are not taken over.

        What is given goes before what was tuned: with `solver_order`, `corrector` or `timestep_spacing` and without
        `tuned` there is no `tuned`, with `timestep_spacing` alone no `prediction_errors` either.
        """
        if isinstance(config, dict):
            if config.get("_class_name", cls.__name__) != cls.__name__:
                config = {name: value for name, value in config.items() if name not in ("solver_order", "corrector")}
            if config.get("tuned") is not None and {"solver_order", "corrector", "timestep_spacing"} & kwargs.keys():
                kwargs.setdefault("tuned", None)
            if config.get("prediction_errors") is not None and "timestep_spacing" in kwargs:
                kwargs.setdefault("prediction_errors", None)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def _build_tables(self, betas: torch.Tensor) -> None:
        """Build the tables of β, α, ᾱ and log ᾱ from β_1 … β_T in float64."""
        # Index t+1 holds log ᾱ_t; index 0 is t = −1, where ᾱ = 1. Every coefficient is computed from this table.
        self._log_alphas_cumprod = torch.cat([torch.zeros(1, dtype=torch.float64), log_alphas_cumprod(betas)])
        if self.config.prediction_type == "epsilon" and torch.isneginf(self._log_alphas_cumprod[-1]):
            raise ValueError(
                "prediction_type 'epsilon' cannot recover x_0 where ᾱ = 0 (rescale_betas_zero_snr=True, or a β of 1); "
                "use 'v_prediction' or 'sample'"
            )
        self._log_table = self._log_alphas_cumprod  # cached copy on the device in use
        self._level_tables: dict[Any, torch.Tensor] = {}  # and tables by name, device and dtype
        beta_bars = -torch.expm1(self._log_alphas_cumprod[1:3])
        self._smallest_posterior_variance = float(beta_bars[0] / beta_bars[-1] * betas[: len(beta_bars)][-1])
        self.betas = betas.float()
        self.alphas = (1.0 - betas).float()
        self.alphas_cumprod = self._log_alphas_cumprod[1:].exp().float()

    def __getstate__(self) -> dict[str, Any]:
        """Copies begin without the predictions of earlier steps, which may hold a graph of gradients."""
        return {**self.__dict__, "_history": [], "_last_timesteps": torch.empty(0), "_known": torch.empty(0)}

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # ---- timesteps ----

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Set the timesteps of the reverse process.

        Args:
            num_inference_steps: number of steps, 1 … T, by `tuned`, `prediction_errors` or `timestep_spacing`.
            device: device of `self.timesteps`.
            timesteps: custom timesteps, strictly descending, each in [0, T); instead of `num_inference_steps`.

        Raises:
            ValueError: both or neither given; more steps than T; not descending; out of range.
        """
        T = self.config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Can only pass one of `num_inference_steps` or `timesteps`, and one is needed.")
        chosen: np.ndarray
        setting = self._setting(num_inference_steps)
        if num_inference_steps is None:
            chosen = np.asarray(timesteps, dtype=np.int64)
            if chosen.size == 0 or not (np.diff(chosen) < 0).all():
                raise ValueError("`timesteps` must be in descending order, with at least one.")
        else:
            chosen = self._spaced(num_inference_steps, setting.spacing)
        if chosen[0] >= T or chosen[-1] < 0:
            raise ValueError(
                f"`timesteps` must lie in [0, {T}), num_train_timesteps; they run from {chosen[0]} to {chosen[-1]}"
                f" (steps_offset is {self.config.steps_offset})."
            )
        self.num_inference_steps = len(chosen)
        self.custom_timesteps = timesteps is not None
        self._solver_order, self._corrects, self._eta = setting[:3]
        self._use_timesteps(chosen, device)

    def _setting(self, num_inference_steps: int | None) -> Setting:
        """Order, η and spacing for a number of steps: the nearest of `tuned`, or those of the configuration."""
        if self._tuned and num_inference_steps == self.config.num_train_timesteps:
            return Setting(1, False, 1.0, self.config.timestep_spacing)  # Algorithm 2
        spacing = self.config.timestep_spacing if self.config.get("prediction_errors") is None else "optimal"
        plain = Setting(self._given_order, self._given_corrector, 1.0, spacing)
        return self._tuned_setting(num_inference_steps) or plain

    def _tuned_setting(self, num_inference_steps: int | None) -> Setting | None:
        if not self._tuned or num_inference_steps is None or num_inference_steps < 1:
            return None
        nearest = min(self._tuned, key=lambda n: abs(math.log(n / num_inference_steps)))
        # What is best in few steps says nothing of many more.
        return None if num_inference_steps > 2 * nearest else self._tuned[nearest]

    def tuned_for(self, num_inference_steps: int | None, eta: float | None = None) -> str | None:
        """In words, what `tuned` has for a number of steps; None where the configuration alone decides.

        Args:
            num_inference_steps: as of `set_timesteps`.
            eta: the one that is given to `step`, which goes before the tuned one.
        """
        setting = self._tuned_setting(num_inference_steps)
        if setting is None or num_inference_steps == self.config.num_train_timesteps:
            return None
        order, corrects, tuned_eta, spacing = setting
        kind = f"{order}{', corrected' if corrects else ''}"
        shown = f"eta {tuned_eta:g}, " if eta is None else ""
        given = "" if eta is None else f"; eta {eta:g} as given"
        return f"steps of order {kind}, {shown}{spacing} timesteps, as tuned for this model{given}"

    def _spaced(self, num_inference_steps: int, spacing: str) -> np.ndarray:
        """A number of timesteps by a spacing: "optimal", by `prediction_errors`, or one of `timestep_spacing`."""
        T, n = self.config.num_train_timesteps, num_inference_steps
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or not 1 <= n <= T:
            raise ValueError(
                f"`num_inference_steps` is {n}; it must be between 1 and num_train_timesteps, {T}, the number of "
                "timesteps that the model was trained with, and an integer."
            )
        step = np.arange(int(n))
        if spacing == "optimal":
            return optimal_timesteps(self._log_alphas_cumprod[1:], self.config.prediction_errors, int(n))
        if spacing == "linspace":
            return np.round(np.linspace(0, T - 1, n))[::-1].astype(np.int64)
        if spacing == "leading" and not self.config.rescale_betas_zero_snr:
            # Not step · (T // n): 501 of 1000 steps would then start from pure noise at t = 500.
            return (step * T // n)[::-1] + self.config.steps_offset
        return np.round((n - step) * T / n).astype(np.int64) - 1

    def _use_timesteps(self, chosen: np.ndarray, device: str | torch.device | None) -> None:
        self._chosen = torch.from_numpy(chosen.copy())  # stays on the CPU
        self.timesteps = self._chosen.to(device, copy=True)
        # For every t, the next lower scheduled timestep, or −1 after the last: `step` goes from x_t to x_{previous[t]}.
        ascending = np.concatenate([[-1], chosen[::-1]])
        position = np.searchsorted(ascending, np.arange(self.config.num_train_timesteps)) - 1
        self._previous_table = torch.from_numpy(ascending[position])
        # For every scheduled t but the first, the scheduled timestep before it; −2 for all others.
        preceding = np.full(self.config.num_train_timesteps, -2)
        preceding[chosen[1:]] = chosen[:-1]
        self._preceding_table = torch.from_numpy(preceding).to(device)
        self._history: list[torch.Tensor] = []  # x̂_0 of the last steps, the last first
        self._last_timesteps = self._known = torch.empty(0)  # t of the last step, and how many before it led there
        self._step_tables: dict[Any, torch.Tensor] = {}
        # The usual one now, so that `step` need not bring it to the device.
        self._step_table(self._eta, torch.empty(0, 0, 0, 0, dtype=torch.float32, device=self.timesteps.device))

    def previous_timestep(self, timestep: int | torch.Tensor) -> int | torch.Tensor:
        """The timestep that `step` goes to from `timestep`; −1 is x_0.

        Args:
            timestep: t in [0, T): int, or tensor of any shape.

        Returns:
            An int for an int, a tensor of the same shape for a tensor.
        """
        if isinstance(timestep, torch.Tensor):
            return self._previous_table.to(timestep.device).index_select(0, timestep.reshape(-1)).view_as(timestep)
        return int(self._previous_table[timestep])

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Return the sample unchanged; for compatibility with schedulers that scale the model input."""
        return sample

    # ---- table look-up: one value per sample, shaped to multiply the samples ----

    @staticmethod
    def _as_index(timesteps: int | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if isinstance(timesteps, torch.Tensor):
            return timesteps.to(like.device).reshape(-1)
        return torch.full((1,), int(timesteps), device=like.device)

    @staticmethod
    def _per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return values.view(-1, *[1] * (like.ndim - 1))

    def _log_alpha_bar(self, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """log ᾱ_t in float64, for the coefficients of any pair (t, s)."""
        if self._log_table.device != like.device:
            dtype = torch.float32 if like.device.type == "mps" else torch.float64
            self._log_table = self._log_alphas_cumprod.to(device=like.device, dtype=dtype)
        # index_select, not [...]: a timestep below −1 must raise an error rather than index from the end.
        return self._per_sample(self._log_table.index_select(0, timesteps + 1), like)

    @staticmethod
    def _rounded(columns: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Columns (T,) in float64 as a table (columns, T, 1, ..., 1) for `_look_up`, rounded to what `like` needs."""
        with torch.inference_mode(False):  # or a backward pass could not use a table that was made in that mode
            table = torch.stack(tuple(columns)).to(_working_dtype(like.dtype)).to(like.device)
            return table.view(*table.shape, *[1] * (like.ndim - 1))

    @staticmethod
    def _look_up(table: torch.Tensor, timesteps: int | torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The columns of a table at t: (B or 1, 1, ..., 1) each."""
        if isinstance(timesteps, torch.Tensor):
            if timesteps.device != table.device:
                timesteps = timesteps.to(table.device)
            return table.index_select(1, timesteps.reshape(-1)).unbind(0)
        t, T = int(timesteps), table.shape[1]
        if not 0 <= t < T:  # a negative one would count from the end
            raise IndexError(f"timestep {t} is out of range; it must be in [0, {T})")
        return table.narrow(1, t, 1).unbind(0)

    def _level_coefficients(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The two coefficients of a linear combination at one noise level: float64 (T,) each.

        "x_t": of x_0 and ε (F9). "v": of ε and x_0. "<wanted> from <given>": of x_t and the given prediction.
        """
        log = self._log_alphas_cumprod[1:]
        root, beta_bar = (0.5 * log).exp(), -torch.expm1(log)
        sigma, zero = beta_bar.sqrt(), torch.zeros_like(log)
        combinations = {
            "x_t": (root, sigma),
            "v": (root, -sigma),
            "x_0 from sample": (zero, zero + 1.0),
            "x_0 from epsilon": (1.0 / root, -sigma / root),
            "x_0 from score": (1.0 / root, beta_bar / root),
            "x_0 from v_prediction": (root, -sigma),
            "epsilon from sample": (1.0 / sigma, -root / sigma),
            "epsilon from score": (zero, -sigma),
            "epsilon from v_prediction": (sigma, root),
            "score from epsilon": (zero, -1.0 / sigma),
        }
        return combinations[name]

    def _combine(
        self, name: str, timesteps: int | torch.Tensor, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """a·x + b·y with the coefficients called `name`, in at least float32, returned in `dtype`."""
        _require_floating_point(dtype)
        key = (name, x.device, dtype, x.ndim)
        table = self._level_tables.get(key)
        if table is None:
            table = self._level_tables[key] = self._rounded(self._level_coefficients(name), x.to(dtype))
        a, b = self._look_up(table, timesteps)
        return self._mix(dtype, a, x, b, y)

    @staticmethod
    def _mix(dtype: torch.dtype, a: torch.Tensor, x: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """a·x + b·y in at least float32, returned in `dtype`."""
        _require_floating_point(dtype)
        working = _working_dtype(dtype)
        a, x, b, y = (_as(working, each) for each in (a, x, b, y))
        return _as(dtype, torch.mul(a, x).addcmul_(b, y))

    # ---- forward process ----

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: int | torch.Tensor,
        prev_timesteps: int | torch.Tensor = -1,
    ) -> torch.Tensor:
        """Add noise to samples (F9): x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε.

        From any s < t: x_t = √(ᾱ_t/ᾱ_s) x_s + √(1−ᾱ_t/ᾱ_s) ε.

        Args:
            original_samples: x_0, (B, ...) floating point; x_s if `prev_timesteps` is given.
            noise: ε ~ N(0, I), same shape (F2).
            timesteps: t in [0, T): int, 0-d, or (B,).
            prev_timesteps: s in [−1, t): int, 0-d, or (B,); −1 is x_0.

        Returns:
            x_t, shape and dtype of `original_samples`.

        Raises:
            IndexError: a timestep is out of range (RuntimeError for a tensor, on CUDA a device-side assertion).
            TypeError: `original_samples` are not of a floating-point dtype.
        """
        if isinstance(prev_timesteps, int) and prev_timesteps == -1:
            return self._combine("x_t", timesteps, original_samples, noise, original_samples.dtype)
        log_t = self._log_alpha_bar(self._as_index(timesteps, original_samples), original_samples)
        log_s = self._log_alpha_bar(self._as_index(prev_timesteps, original_samples), original_samples)
        log_ratio = log_t - log_s
        keep, add = (0.5 * log_ratio).exp(), (-torch.expm1(log_ratio)).sqrt()
        return self._mix(original_samples.dtype, keep, original_samples, add, noise)

    def forward_step(self, sample: torch.Tensor, timesteps: int | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """One step of the forward process (F3, F5): x_t = √α_t x_{t−1} + √(1−α_t) ε.

        Args:
            sample: x_{t−1}, (B, ...) floating point; for t = 0 it is x_0.
            timesteps: t in [0, T): int, 0-d, or (B,).
            noise: ε ~ N(0, I), same shape.

        Returns:
            x_t, shape and dtype of `sample`.
        """
        return self.add_noise(sample, noise, timesteps, prev_timesteps=timesteps - 1)

    def snr(self, timesteps: int | torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio ᾱ_t/(1−ᾱ_t).

        Args:
            timesteps: t in [0, T): int, or tensor of any shape.

        Returns:
            float32, shape and device of `timesteps`.
        """
        timesteps = torch.as_tensor(timesteps)
        like = torch.empty((), dtype=torch.float32, device=timesteps.device)
        log_t = self._log_alpha_bar(timesteps.reshape(-1), like).reshape(timesteps.shape)
        return (log_t.exp() / -torch.expm1(log_t)).float()

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor) -> torch.Tensor:
        """The target of v-prediction, v_t = √ᾱ_t ε − √(1−ᾱ_t) x_0 (Salimans & Ho 2022, section 4).

        Args:
            sample: x_0, (B, ...) floating point.
            noise: ε, same shape.
            timesteps: t in [0, T): int, 0-d, or (B,).

        Returns:
            v_t, shape and dtype of `sample`.
        """
        return self._combine("v", timesteps, noise, sample, sample.dtype)

    # ---- conversion between x_0, ε, v and the score ----

    def predict_original_sample(
        self,
        model_output: torch.Tensor,
        timesteps: int | torch.Tensor,
        sample: torch.Tensor,
        prediction_type: str | None = None,
    ) -> torch.Tensor:
        """x̂_0 from the model output (R5), without clipping: x_0 = (x_t − √(1−ᾱ_t) ε)/√ᾱ_t.

        Args:
            model_output: (B, ...), the quantity named by `prediction_type`.
            timesteps: t in [0, T): int, 0-d, or (B,).
            sample: x_t, same shape.
            prediction_type: "epsilon", "sample", "v_prediction" or "score" (∇ log q(x_t)); the configured one if None.

        Returns:
            x̂_0, shape and dtype of `sample`.

        Raises:
            ValueError: unknown `prediction_type`.
        """
        prediction_type = prediction_type or self.config.prediction_type
        _require("prediction_type", prediction_type, (*PREDICTION_TYPES, "score"))
        if prediction_type == "sample":
            _require_floating_point(sample.dtype)
            return model_output.to(sample.dtype)
        return self._combine(f"x_0 from {prediction_type}", timesteps, sample, model_output, sample.dtype)

    def predict_epsilon(
        self,
        model_output: torch.Tensor,
        timesteps: int | torch.Tensor,
        sample: torch.Tensor,
        prediction_type: str | None = None,
    ) -> torch.Tensor:
        """ε̂ from the model output (F9): ε = (x_t − √ᾱ_t x_0)/√(1−ᾱ_t). Arguments of `predict_original_sample`."""
        prediction_type = prediction_type or self.config.prediction_type
        _require("prediction_type", prediction_type, (*PREDICTION_TYPES, "score"))
        if prediction_type == "epsilon":
            _require_floating_point(sample.dtype)
            return model_output.to(sample.dtype)
        return self._combine(f"epsilon from {prediction_type}", timesteps, sample, model_output, sample.dtype)

    def predict_velocity(
        self,
        model_output: torch.Tensor,
        timesteps: int | torch.Tensor,
        sample: torch.Tensor,
        prediction_type: str | None = None,
    ) -> torch.Tensor:
        """v̂ from the model output: v = √ᾱ_t ε − √(1−ᾱ_t) x_0. Arguments of `predict_original_sample`."""
        prediction = (model_output, timesteps, sample, prediction_type)
        return self.get_velocity(
            self.predict_original_sample(*prediction), self.predict_epsilon(*prediction), timesteps
        )

    def predict_score(
        self,
        model_output: torch.Tensor,
        timesteps: int | torch.Tensor,
        sample: torch.Tensor,
        prediction_type: str | None = None,
    ) -> torch.Tensor:
        """The score from the model output, ∇ log q(x_t) = −ε̂/√(1−ᾱ_t) (Song et al. 2021, arXiv:2011.13456).

        Arguments of `predict_original_sample`.
        """
        epsilon = self.predict_epsilon(model_output, timesteps, sample, prediction_type)
        return self._combine("score from epsilon", timesteps, sample, epsilon, sample.dtype)

    # ---- reverse process ----

    @staticmethod
    def _posterior_coefficients(
        log_t: torch.Tensor, log_s: torch.Tensor, eta: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Coefficients of q_η(x_s | x_t, x_0) from log ᾱ_t and log ᾱ_s: of x_0, of x_t, the variance η²β̃; and β."""
        alpha, beta = (log_t - log_s).exp(), -torch.expm1(log_t - log_s)  # R7: α_t -> ᾱ_t/ᾱ_s
        beta_bar_t, beta_bar_s = -torch.expm1(log_t), -torch.expm1(log_s)

        variance = eta**2 * beta_bar_s / beta_bar_t * beta
        # √((1−ᾱ_s−η²β̃)/(1−ᾱ_t)) of DDIM, rewritten to avoid cancellation; for η = 1 it is √α (1−ᾱ_s)/(1−ᾱ_t) of R4.
        of_sample = (beta_bar_s * ((1.0 - eta**2) * beta + alpha * beta_bar_s)).sqrt() / beta_bar_t
        # The coefficient of x_0 follows from E[x_s|x_0] = √ᾱ_s x_0; for η = 1 it is √ᾱ_s β/(1−ᾱ_t) of R4.
        of_original = (0.5 * log_s).exp() - of_sample * (0.5 * log_t).exp()
        return of_original, of_sample, variance, beta

    def posterior_mean_variance(
        self,
        original_samples: torch.Tensor,
        sample: torch.Tensor,
        timesteps: int | torch.Tensor,
        prev_timesteps: int | torch.Tensor | None = None,
        *,
        eta: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of the posterior q(x_s | x_t, x_0) (R4; R7 for any s < t).

            β̃ = (1−ᾱ_s)/(1−ᾱ_t) · β        μ̃ = √ᾱ_s β/(1−ᾱ_t) · x_0 + √α (1−ᾱ_s)/(1−ᾱ_t) · x_t
            with α = ᾱ_t/ᾱ_s and β = 1−α

        `eta` selects a member of the family with the same marginals (Song et al. 2021, DDIM, arXiv:2010.02502, eq. 7
        and 16): η = 1 is the Bayes posterior, η = 0 is deterministic, and in general the variance is η²β̃.

        Args:
            original_samples: x_0, (B, ...) floating point.
            sample: x_t, same shape.
            timesteps: t in [0, T): int, 0-d, or (B,).
            prev_timesteps: s in [−1, t): int, 0-d, or (B,); t−1 if None; −1 is x_0 (variance 0).
            eta: in [0, 1].

        Returns:
            mean: shape and dtype of `sample`.
            variance: (B or 1, 1, ..., 1) in at least float32.
        """
        t = self._as_index(timesteps, sample)
        s = t - 1 if prev_timesteps is None else self._as_index(prev_timesteps, sample)
        log_t, log_s = self._log_alpha_bar(t, sample), self._log_alpha_bar(s, sample)
        of_original, of_sample, variance, _ = self._posterior_coefficients(log_t, log_s, eta)
        mean = self._mix(sample.dtype, of_original, original_samples, of_sample, sample)
        return mean, variance.to(_working_dtype(sample.dtype))

    def _log_variance_range(
        self,
        timesteps: torch.Tensor,
        prev_timesteps: torch.Tensor,
        of_original: torch.Tensor,
        posterior: torch.Tensor,
        beta: torch.Tensor,
        eta: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log σ², twice; for "learned_range" the two between which the model interpolates, log η²β̃ and log η²β.

        Args:
            timesteps, prev_timesteps: t and s, int64 (N,).
            of_original, posterior, beta: as from `_posterior_coefficients`, (N, ...) with N numbers.
            eta: in [0, 1].
        """
        kind = self.config.variance_type
        # The posterior variance of the last step is 0. It is replaced by the smallest non-zero one (Nichol & Dhariwal
        # 2021), so that the last likelihood term is finite. `step` adds no noise there.
        is_last = (prev_timesteps < 0).view(posterior.shape[0] if len(prev_timesteps) > 1 else 1, *posterior.shape[1:])
        small = torch.where(is_last, eta**2 * self._smallest_posterior_variance, posterior).log()
        large = (eta**2 * beta).log()
        if kind == "zero":
            small = large = torch.full_like(posterior, -torch.inf)
        elif kind in ("fixed_large", "fixed_large_log"):
            small = large
        elif kind == "analytic":
            # Law of total variance: the posterior variance, plus the variance of the posterior mean over x_0.
            of_x0 = self._original_sample_variances.to(posterior).index_select(0, timesteps)
            of_x0 = of_x0.view(-1, *posterior.shape[1:])
            small = large = (posterior + of_original**2 * of_x0).clamp(min=_SMALLEST_VARIANCE).log()
        elif kind != "learned_range":
            large = small
        return small, large

    def _log_variance(
        self, predicted_variance: torch.Tensor | None, eta: float, small: torch.Tensor, large: torch.Tensor
    ) -> torch.Tensor:
        """log σ² by `variance_type`, from the model's output for it and `_log_variance_range`."""
        if predicted_variance is None:
            return small
        predicted = predicted_variance.to(_working_dtype(predicted_variance.dtype))
        if self.config.variance_type == "learned":
            # The network output may be negative.
            return (eta**2 * predicted).clamp(min=_SMALLEST_VARIANCE).log()
        weight = (predicted + 1.0) / 2.0
        return weight * large.to(predicted) + (1.0 - weight) * small.to(predicted)

    def predict_mean_log_variance(
        self,
        model_output: torch.Tensor,
        timesteps: int | torch.Tensor,
        sample: torch.Tensor,
        prev_timesteps: int | torch.Tensor | None = None,
        *,
        eta: float = 1.0,
        limit: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean and log-variance of p_θ(x_s | x_t) = N(mean, σ²).

        The mean is the posterior mean (R4, R7) with the clipped x̂_0 of the model (R5) as x_0. With ε-prediction and
        without clipping it is R6, (x_t − β/√(1−ᾱ_t) ε̂)/√α.

        Args:
            model_output: (B, C, ...), or (B, 2C, ...) for a learned variance.
            timesteps: t in [0, T): int, 0-d, or (B,).
            sample: x_t, (B, C, ...).
            prev_timesteps: s in [−1, t): int, 0-d, or (B,); t−1 if None.
            eta: in [0, 1]; see `posterior_mean_variance`.
            limit: whether to clip x̂_0; False gives a loss a non-zero gradient everywhere.

        Returns:
            mean: shape and dtype of `sample`.
            log_variance: log σ² by `variance_type`, in at least float32, broadcastable to `sample`; −inf for "zero". At
                s = −1 a posterior variance of 0 is replaced by the smallest non-zero β̃.
            pred_original_sample: x̂_0, shape and dtype of `sample`.

        Raises:
            ValueError: the shape of `model_output` does not match `sample` and `variance_type`.
        """
        t = self._as_index(timesteps, sample)
        s = t - 1 if prev_timesteps is None else self._as_index(prev_timesteps, sample)
        prediction, predicted_variance = self.split_model_output(model_output, sample)
        original_sample = self.predict_original_sample(prediction, t, sample)
        if limit:
            original_sample = self._limit(original_sample)
        log_t, log_s = self._log_alpha_bar(t, sample), self._log_alpha_bar(s, sample)
        of_original, of_sample, posterior, beta = self._posterior_coefficients(log_t, log_s, eta)
        mean = self._mix(sample.dtype, of_original, original_sample, of_sample, sample)
        small, large = self._log_variance_range(t, s, of_original, posterior, beta, eta)
        log_variance = self._log_variance(predicted_variance, eta, small, large)
        return mean, log_variance.to(_working_dtype(sample.dtype)), original_sample

    def split_model_output(
        self, model_output: torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Split the model output into the prediction and the learned variance.

        Args:
            model_output: (B, C, ...), or (B, 2C, ...) for a learned variance.
            sample: x_t, (B, C, ...).

        Returns:
            prediction: (B, C, ...), of `prediction_type`.
            predicted_variance: (B, C, ...) for a learned variance, otherwise None.

        Raises:
            ValueError: the shape of `model_output` does not match `sample` and `variance_type`.
        """
        shape = list(sample.shape)
        learned = self.config.variance_type in ("learned", "learned_range")
        if learned:
            shape[1] *= 2
        if list(model_output.shape) != shape:
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)}; with variance_type {self.config.variance_type!r} "
                f"and a sample of shape {tuple(sample.shape)} it must have {tuple(shape)}"
            )
        if learned:
            prediction, predicted_variance = model_output.chunk(2, dim=1)
            return prediction, predicted_variance
        return model_output, None

    def _limit(self, original_sample: torch.Tensor, in_place: bool = False) -> torch.Tensor:
        """x̂_0, clipped or thresholded."""
        if self.config.thresholding:
            flat = original_sample.flatten(1).to(_working_dtype(original_sample.dtype))
            # The quantile by linear interpolation. torch.quantile is limited to 2**24 numbers.
            ordered, last = flat.abs().sort(dim=1).values, flat.shape[1] - 1
            rank = self.config.dynamic_thresholding_ratio * last
            below, above = ordered[:, int(rank), None], ordered[:, min(int(rank) + 1, last), None]
            bound = torch.lerp(below, above, rank - int(rank))
            bound = bound.clamp(min=1.0, max=self.config.sample_max_value)
            limited = flat.clamp(-bound, bound) / bound
            return limited.view_as(original_sample).to(original_sample.dtype)
        if self.config.clip_sample:
            bound = self.config.clip_sample_range
            return original_sample.clamp_(-bound, bound) if in_place else original_sample.clamp(-bound, bound)
        return original_sample

    def _step_table(self, eta: float, like: torch.Tensor) -> torch.Tensor:
        """All that `step` multiplies with, for every t and its next timestep: (columns, T, 1, ..., 1).

        For x̂_0 the coefficients of x_t and of the model's prediction (R5); for x_s those of x̂_0 and of x_t (R4, R7); σ;
        for a higher order those of earlier x̂_0 (S3). Where the model's output decides on σ it is 1, and 0 at the last
        step, and the last two are the range of log σ² of "learned_range".
        """
        # Settings may be changed after `set_timesteps`, by `register_to_config`.
        settings = self.config.variance_type, self.config.prediction_type
        key = (float(eta), like.device, like.dtype, like.ndim, *settings)
        table = self._step_tables.get(key)
        if table is None:
            t, s = torch.arange(len(self), device="cpu"), self._previous_table
            log_t, log_s = (self._log_alphas_cumprod[i + 1] for i in (t, s))
            of_original, of_sample, posterior, beta = self._posterior_coefficients(log_t, log_s, eta)
            ends = self._log_variance_range(t, s, of_original, posterior, beta, eta)
            learned = self.config.variance_type in ("learned", "learned_range")
            sigma = torch.where(s < 0, 0.0, torch.ones_like(posterior) if learned else (0.5 * ends[0]).exp())
            prediction = self._level_coefficients(f"x_0 from {self.config.prediction_type}")
            multistep = self._multistep_weights(eta) if self._solver_order > 1 else ()
            known = self._solver_order * 2 - 3  # weights of x̂_0 in this step; the others are complete
            columns = (*prediction, of_original, of_sample, sigma, *(of_original * w for w in multistep[:known]))
            columns += multistep[known:]
            columns += tuple(ends) if learned else ()
            table = self._step_tables[key] = self._rounded(columns, like)
        return table

    def _multistep_weights(self, eta: float) -> tuple[torch.Tensor, ...]:
        """What earlier x̂_0 weigh in the mean of x̂_0 over a step (S3), float64 (T,) each.

        For order 2 the last one. For order 3 this as well, where no more are known, then the last and the one before.
        A polynomial in u = λ − λ_t is averaged over the step with the weight e^{(1+η²)u}. The weights are 0 where the
        schedule has no timesteps before t, and at the end, where the order falls to 1: x_0 is infinitely far.
        """
        order = self._solver_order
        log_snr = 0.5 * (self._log_alphas_cumprod - (-torch.expm1(self._log_alphas_cumprod)).log())  # λ; index t+1
        k = 1.0 + eta**2
        t, s = self._chosen, self._previous_table[self._chosen]
        at = log_snr[t + 1]
        h, back = log_snr[s + 1] - at, at.diff(prepend=at[:1])  # to the next, and from the one before
        further = back.roll(1)
        whole = -torch.expm1(-k * h)
        first = (h - whole / k) / whole  # the means of u and u²
        second = (h**2 - 2.0 / k * (h - whole / k)) / whole
        one = -first / back
        two = [
            -(second + (back + further) * first) / (back * further),
            (second + back * first) / ((back + further) * further),
        ]
        place = torch.arange(len(t), device="cpu")
        left = len(t) - place  # steps to go, this one among them
        usable = (place >= 2) & (left >= 3) & further.isfinite()
        one = torch.where((place >= 1) & (left >= 2), one, 0.0)
        two = [torch.where(usable, two[0], one), torch.where(usable, two[1], 0.0)]
        weights = [one] if order == 2 else [one, *two]
        if self._corrects:
            # Of the step that led to t: the line, or the parabola, to x̂_0 at t in the place of what was known before.
            before = place >= 1
            share = (0.5 * self._log_alphas_cumprod[s + 1]).exp() * whole  # what x̂_0 weighs in that step
            line = share * first / h
            newest = share * (second + back * first) / (h * (h + back))
            oldest = share * ((second - h * first) / (back * (h + back)) - one)
            # From ᾱ = 0, infinitely far away, a step cannot be corrected; of the next one the parabola is the line.
            line = torch.where(h.isfinite(), line, 0.0)
            newest = torch.where(back.isfinite(), newest, line)
            oldest = torch.where(back.isfinite(), oldest, 0.0)
            more = [torch.where(before, each.roll(1), 0.0) for each in (line, newest, oldest)]
            weights += [more[0], *(torch.where(place >= 2, each, 0.0) for each in more[1:])]
        return tuple(torch.zeros(len(self), dtype=w.dtype, device=w.device).index_copy(0, t, w) for w in weights)

    def _terms(
        self,
        timestep: int | torch.Tensor,
        original: tuple[torch.Tensor, torch.Tensor],
        sample: tuple[torch.Tensor, torch.Tensor],
        weights: Sequence[torch.Tensor],
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Coefficients and tensors whose products add up to x_s: x̂_0 of this step and the last ones, and x_t (S3).

        `original` and `sample` are those of first order, of x̂_0 and of x_t.

        A step takes up the last ones only if they were those of the scheduled timesteps before t; for each sample, and
        without looking at a value, which would wait for the device.
        """
        (of_original, original_sample), (of_sample, x_t) = original, sample
        t, history = self._as_index(timestep, original_sample), self._history
        if self._preceding_table.device != t.device:
            self._preceding_table = self._preceding_table.to(t.device)
        if history and history[0].shape == original_sample.shape and history[0].device == original_sample.device:
            known = torch.where(self._preceding_table.index_select(0, t) == self._last_timesteps, self._known + 1, 0)
        else:
            history, known = [], torch.zeros_like(t)
        # A copy: the one that is returned may be changed, or be the memory of the model's output.
        self._history = [original_sample.clone(), *history][: self._solver_order - 1 + self._corrects]
        self._last_timesteps, self._known = t, known
        known = self._per_sample(known, original_sample)
        used = [torch.where(known >= 1, weights[0], 0.0)]
        if self._solver_order == 3:
            used = [torch.where(known >= 2, weights[1], used[0]), torch.where(known >= 2, weights[2], 0.0)]
        terms = list(zip(used, history, strict=False))
        for weight, _ in terms:
            of_original = of_original - weight
        if self._corrects and history:
            x_t = self._corrected(x_t, [original_sample, *history], known, weights[1:4])
        return [(of_original, original_sample), *terms, (of_sample, x_t)]

    @staticmethod
    def _corrected(
        x_t: torch.Tensor, predictions: list[torch.Tensor], known: torch.Tensor, weights: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """x_t, corrected by x̂_0 at t, which the step that led there did not have.

        Args:
            x_t: in the precision to compute in.
            predictions: x̂_0 at t, of the last step, and of the one before if there is one.
            known: number of steps that led to t, of each sample.
            weights: of the first difference of the predictions, where one step is known; of the first and the second
                difference, where more are.
        """
        line, newest, oldest = weights
        weight = torch.where(known >= 2, newest, torch.where(known >= 1, line, 0.0))
        x_t = x_t + weight * (predictions[0] - predictions[1])
        if len(predictions) > 2:
            x_t += torch.where(known >= 2, oldest, 0.0) * (predictions[2] - predictions[1])
        return x_t

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
        *,
        eta: float | None = None,
    ) -> CustomDDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step of the reverse process (S1): x_t -> x_s, where s is the next timestep of the schedule.

        x_s is the posterior mean (R4, R7) with x̂_0 from the model (R5, S3), plus σ z. The step to x_0 adds no noise.

        Args:
            model_output: (B, C, ...), or (B, 2C, ...) for a learned variance.
            timestep: t: int, 0-d tensor, or one per sample (B,).
            sample: x_t, (B, C, ...).
            generator: random generator for z; with a list of one per image, an image does not depend on its batch.
            variance_noise: z, instead of drawing it from `generator`.
            return_dict: whether to return a `CustomDDPMSchedulerOutput` rather than a tuple.
            eta: in [0, 1]; 1 is DDPM (default, unless `tuned` has another), 0 is DDIM (no noise but for "analytic").
                Where x̂_0 is clipped, ε̂ is recomputed from it (`use_clipped_model_output=True` of diffusers' DDIM).

        Returns:
            `CustomDDPMSchedulerOutput`, or (prev_sample, pred_original_sample); shape and dtype of `sample`.

        Raises:
            ValueError: the shape of `model_output` does not match `sample` and `variance_type`.
        """
        _require_floating_point(sample.dtype)
        eta = self._eta if eta is None else eta
        prediction, predicted_variance = self.split_model_output(model_output, sample)
        row = self._look_up(self._step_table(eta, sample), timestep)
        x_of_sample, x_of_output, of_original, of_sample, sigma, *others = row
        dtype, working = sample.dtype, _working_dtype(sample.dtype)
        x_t = _as(working, sample)
        if self.config.prediction_type == "sample":
            original_sample = self._limit(_as(dtype, prediction))
        else:
            original_sample = self._limit(self._mix(dtype, x_of_sample, x_t, x_of_output, prediction), in_place=True)
        if predicted_variance is not None:
            log_variance = self._log_variance(predicted_variance, eta, *others[-2:])
            sigma = sigma * _as(working, (0.5 * log_variance).exp())
        terms = [(of_original, original_sample), (of_sample, x_t)]
        if self._solver_order > 1:
            terms = self._terms(timestep, terms[0], terms[1], others)
        if self.config.variance_type != "zero" and (eta > 0 or self.config.variance_type == "analytic"):
            z = _draw(sample, generator) if variance_noise is None else variance_noise.expand(sample.shape).clone()
            x_s = _as(working, z).mul_(sigma)  # summed up in the memory of the noise
        else:
            x_s = torch.mul(*terms.pop(0))
        for coefficient, x in terms:
            x_s.addcmul_(_as(working, x), coefficient)
        prev_sample = _as(dtype, x_s)
        if not return_dict:
            return prev_sample, original_sample
        return CustomDDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=original_sample)
