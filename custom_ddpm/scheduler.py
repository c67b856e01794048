"""`CustomDDPMScheduler`: the forward process, its Bayes posterior and the reverse step, line by line from the formulas.

Formula numbers (F3 … S1) are those of docs/derivation.md. Time runs t = 0 … T−1 in code; "before the first step" is
t = −1, where ᾱ = 1 and the picture is x_0. This file needs only `schedules.py` beside it: both are shipped in every
model repository.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .schedules import log_alphas_cumprod, make_betas, rescale_zero_terminal_snr

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
# Schedules that most of diffusers' other schedulers do not know by name; they get the numbers instead.
_SPELLED_OUT_SCHEDULES = ("sigmoid", "laplace", "exp")
_SMALLEST_VARIANCE = 1e-20  # keeps the logarithm finite


@dataclass
class CustomDDPMSchedulerOutput(BaseOutput):
    """What `step` returns.

    Args:
        prev_sample: x_s, same shape and dtype as the sample given; s is the next timestep of the schedule.
        pred_original_sample: the x̂_0 that was used, after clipping or thresholding.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


def _require(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


class CustomDDPMScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """DDPM (Ho, Jain, Abbeel 2020, arXiv:2006.11239) with arguments and methods of diffusers' `DDPMScheduler`.

    Every coefficient is computed in float64 from log ᾱ and rounded once to the precision of the tensors it multiplies
    (on a device without float64, such as MPS, it is computed in float32). Methods take timesteps as an int, a 0-d
    tensor, or one per sample (B,); they never wait for the device and have no branch on a tensor's value.

    Args:
        num_train_timesteps: T.
        beta_start: β_1 of the schedules that have a range.
        beta_end: β_T of the schedules that have a range.
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace" or "exp" (F4).
        trained_betas: β_1 … β_T themselves, each in (0, 1), the last in (0, 1]; the three arguments above are then
            unused.
        variance_type: σ² of the reverse step. "fixed_small": β̃ (R4); "fixed_large": β; the same two with "_log";
            "learned": the second half of the model's channels is σ²; "learned_range": it interpolates between log β̃ and
            log β (Nichol & Dhariwal 2021, eq. 15); "zero": none; "analytic": the optimal one (Bao et al. 2022,
            arXiv:2201.06503), which needs `original_sample_variances`.
        clip_sample: clip x̂_0 to ±`clip_sample_range`.
        prediction_type: what the model predicts: "epsilon" (T1), "sample" (x_0) or "v_prediction"
            (v = √ᾱ ε − √(1−ᾱ) x_0, Salimans & Ho 2022, arXiv:2202.00512).
        thresholding: dynamic thresholding of x̂_0 (Saharia et al. 2022, arXiv:2205.11487) in place of clipping.
        dynamic_thresholding_ratio: the quantile of |x̂_0| that it takes.
        clip_sample_range: see `clip_sample`.
        sample_max_value: upper bound of that quantile.
        timestep_spacing: "leading", "linspace" or "trailing" (Lin et al. 2024, table 2).
        steps_offset: added to the timesteps of "leading".
        rescale_betas_zero_snr: rescale β so that ᾱ_T = 0 (Lin et al. 2024); not possible with "epsilon".
        original_sample_variances: T numbers E[Var(x_0 | x_t)] per pixel, for variance_type "analytic"; see
            `likelihood.estimate_original_sample_variances`.

    Attributes:
        betas, alphas, alphas_cumprod: float32 (T,) on the CPU: β_t, α_t = 1−β_t, ᾱ_t.
        timesteps: int64, the descending schedule of the reverse process; T−1 … 0 until `set_timesteps`.

    Raises:
        ValueError: an argument out of range, named with its value.
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
        variance_type: str = "fixed_small",
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
    ):
        _require("variance_type", variance_type, VARIANCE_TYPES)
        _require("prediction_type", prediction_type, PREDICTION_TYPES)
        _require("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps is {num_train_timesteps}; it must be at least 1")

        if trained_betas is not None:
            betas = torch.as_tensor(trained_betas, dtype=torch.float64)
            if betas.shape != (num_train_timesteps,):
                raise ValueError(
                    f"trained_betas has shape {tuple(betas.shape)}; num_train_timesteps={num_train_timesteps} needs "
                    f"({num_train_timesteps},)"
                )
        else:
            betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
        if not bool((betas > 0).all() and (betas[:-1] < 1).all() and betas[-1] <= 1):
            raise ValueError(
                f"betas run from {betas.min().item():g} to {betas.max().item():g}; each must be in (0, 1), the last in "
                "(0, 1] (F4)"
            )
        if trained_betas is not None or beta_schedule in _SPELLED_OUT_SCHEDULES:
            self.register_to_config(trained_betas=betas.tolist())
        # Other schedulers have other defaults (β_T = 0.012, say): `from_config` of theirs shall get ours.
        self.register_to_config(_use_default_values=[])
        if rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)

        # Position t+1 holds log ᾱ_t; position 0 is t = −1, where ᾱ = 1. Every coefficient comes from this one table.
        self._log_alphas_cumprod = torch.cat([torch.zeros(1, dtype=torch.float64), log_alphas_cumprod(betas)])
        if prediction_type == "epsilon" and torch.isneginf(self._log_alphas_cumprod[-1]):
            raise ValueError(
                "prediction_type 'epsilon' cannot recover x_0 where ᾱ = 0 (rescale_betas_zero_snr=True, or a β of 1); "
                "use 'v_prediction' or 'sample'"
            )
        self._log_table = self._log_alphas_cumprod  # its copy on the device in use
        beta_bars = -torch.expm1(self._log_alphas_cumprod[1:3])
        self._smallest_posterior_variance = float(beta_bars[0] / beta_bars[-1] * betas[: len(beta_bars)][-1])
        self.betas = betas.float()
        self.alphas = (1.0 - betas).float()
        self.alphas_cumprod = self._log_alphas_cumprod[1:].exp().float()

        variances = torch.as_tensor(
            [] if original_sample_variances is None else original_sample_variances, dtype=torch.float64
        )
        if variance_type == "analytic" and (variances.shape != (num_train_timesteps,) or not (variances >= 0).all()):
            raise ValueError(
                f"variance_type 'analytic' needs original_sample_variances: {num_train_timesteps} numbers >= 0, one a "
                f"timestep; got {len(variances)}"
            )
        self._original_sample_variances = variances
        if original_sample_variances is None:
            # Other schedulers warn of an argument that they do not know; it is in the configuration where it is used.
            self._internal_dict = FrozenDict(
                {name: value for name, value in self.config.items() if name != "original_sample_variances"}
            )

        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.custom_timesteps = False
        self._use_timesteps(np.arange(num_train_timesteps)[::-1].copy(), device=None)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # ---- which timesteps ----

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the timesteps that the reverse process visits.

        Args:
            num_inference_steps: how many, 1 … T, spaced by `timestep_spacing`.
            device: where `self.timesteps` shall lie.
            timesteps: the very timesteps, strictly descending, each in [0, T); in place of `num_inference_steps`.

        Raises:
            ValueError: both or neither given; too many; not descending; out of range.
        """
        T = self.config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Can only pass one of `num_inference_steps` or `timesteps`, and one is needed.")
        chosen: np.ndarray
        if num_inference_steps is None:
            chosen = np.asarray(timesteps, dtype=np.int64)
            if chosen.size == 0 or not (np.diff(chosen) < 0).all():
                raise ValueError("`timesteps` must be in descending order, with at least one.")
        else:
            n = num_inference_steps
            if not 1 <= n <= T:
                raise ValueError(
                    f"`num_inference_steps` is {n}; it must be between 1 and num_train_timesteps, {T}, since the model "
                    "knows only the timesteps that it was trained on."
                )
            step = np.arange(n)
            if self.config.timestep_spacing == "linspace":
                chosen = np.round(np.linspace(0, T - 1, n))[::-1].astype(np.int64)
            elif self.config.timestep_spacing == "leading":
                chosen = (step * (T // n))[::-1] + self.config.steps_offset
            else:
                chosen = np.round((n - step) * T / n).astype(np.int64) - 1
        if chosen[0] >= T or chosen[-1] < 0:
            raise ValueError(
                f"`timesteps` must lie in [0, {T}), num_train_timesteps; they run from {chosen[0]} to {chosen[-1]}"
                f" (steps_offset is {self.config.steps_offset})."
            )
        self.num_inference_steps = len(chosen)
        self.custom_timesteps = timesteps is not None
        self._use_timesteps(chosen, device)

    def _use_timesteps(self, chosen: np.ndarray, device: str | torch.device | None) -> None:
        self.timesteps = torch.from_numpy(chosen.copy()).to(device)
        # For every t the next lower scheduled timestep, −1 after the last: x_{t} steps to x_{previous[t]}.
        ascending = np.concatenate([[-1], chosen[::-1]])
        position = np.searchsorted(ascending, np.arange(self.config.num_train_timesteps)) - 1
        self._previous_table = torch.from_numpy(ascending[position]).to(device)

    def previous_timestep(self, timestep: int | torch.Tensor) -> int | torch.Tensor:
        """The timestep that `step` goes to from `timestep`; −1 is x_0. An int gives an int, a tensor a tensor."""
        if isinstance(timestep, torch.Tensor):
            return self._previous(timestep.reshape(-1)).view_as(timestep)
        return int(self._previous_table[timestep])

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Returns the sample unchanged; other schedulers of diffusers scale it."""
        return sample

    # ---- looking up log ᾱ, one value per sample, shaped to multiply the samples ----

    @staticmethod
    def _as_index(timesteps: int | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if isinstance(timesteps, torch.Tensor):
            return timesteps.to(like.device).reshape(-1)
        return torch.full((1,), int(timesteps), device=like.device)

    def _log_alpha_bar(self, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if self._log_table.device != like.device:
            dtype = torch.float32 if like.device.type == "mps" else torch.float64
            self._log_table = self._log_alphas_cumprod.to(device=like.device, dtype=dtype)
        # index_select, not [...]: a timestep below −1 must be an error, not a value counted from the end.
        return self._per_sample(self._log_table.index_select(0, timesteps + 1), like)

    @staticmethod
    def _per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return values.view(-1, *[1] * (like.ndim - 1))

    def _previous(self, timesteps: torch.Tensor) -> torch.Tensor:
        if self._previous_table.device != timesteps.device:
            self._previous_table = self._previous_table.to(timesteps.device)
        return self._previous_table.index_select(0, timesteps)

    @staticmethod
    def _mix(dtype: torch.dtype, a: torch.Tensor, x: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """a·x + b·y in at least float32, returned in `dtype`."""
        working = torch.promote_types(dtype, torch.float32)
        return torch.addcmul(a.to(working) * x, b.to(working), y.to(working)).to(dtype)

    # ---- forward: adding noise ----

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: int | torch.Tensor,
        prev_timesteps: int | torch.Tensor = -1,
    ) -> torch.Tensor:
        """F9, the closed form: x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε; from any s < t: x_t = √(ᾱ_t/ᾱ_s) x_s + √(1−ᾱ_t/ᾱ_s) ε.

        Args:
            original_samples: (B, ...) floating, x_0 (or x_s where `prev_timesteps` is given).
            noise: ε ~ N(0, I), same shape (F2).
            timesteps: t in [0, T): int, 0-d, or (B,).
            prev_timesteps: s in [−1, t): int, 0-d, or (B,); −1 is x_0.

        Returns:
            x_t, shape and dtype of `original_samples`.

        Raises:
            IndexError: a timestep out of range (on CUDA: a device-side assertion).
        """
        log_t = self._log_alpha_bar(self._as_index(timesteps, original_samples), original_samples)
        log_s = self._log_alpha_bar(self._as_index(prev_timesteps, original_samples), original_samples)
        log_ratio = log_t - log_s
        keep, add = (0.5 * log_ratio).exp(), (-torch.expm1(log_ratio)).sqrt()
        return self._mix(original_samples.dtype, keep, original_samples, add, noise)

    def forward_step(self, sample: torch.Tensor, timesteps: int | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """F3, F5, one step of the chain: x_t = √α_t x_{t−1} + √(1−α_t) ε.

        Args:
            sample: x_{t−1}, (B, ...) floating; for t = 0 it is x_0.
            timesteps: t in [0, T): int, 0-d, or (B,).
            noise: ε ~ N(0, I), same shape.

        Returns:
            x_t, shape and dtype of `sample`.
        """
        return self.add_noise(sample, noise, timesteps, prev_timesteps=timesteps - 1)

    def snr(self, timesteps: int | torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio ᾱ_t/(1−ᾱ_t): float32 of the shape of `timesteps`, on its device."""
        timesteps = torch.as_tensor(timesteps)
        like = torch.empty((), dtype=torch.float32, device=timesteps.device)
        log_t = self._log_alpha_bar(timesteps.reshape(-1), like).reshape(timesteps.shape)
        return (log_t.exp() / -torch.expm1(log_t)).float()

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor) -> torch.Tensor:
        """v_t = √ᾱ_t ε − √(1−ᾱ_t) x_0 (Salimans & Ho 2022, section 4).

        Args:
            sample: x_0, (B, ...) floating.
            noise: ε, same shape.
            timesteps: t in [0, T): int, 0-d, or (B,).

        Returns:
            v_t, shape and dtype of `sample`.
        """
        log_t = self._log_alpha_bar(self._as_index(timesteps, sample), sample)
        return self._mix(sample.dtype, (0.5 * log_t).exp(), noise, -(-torch.expm1(log_t)).sqrt(), sample)

    # ---- x_0, ε, v and the score from each other ----

    def predict_original_sample(
        self,
        model_output: torch.Tensor,
        timesteps: int | torch.Tensor,
        sample: torch.Tensor,
        prediction_type: str | None = None,
    ) -> torch.Tensor:
        """x̂_0 from what the model says (R5): x_0 = (x_t − √(1−ᾱ_t) ε)/√ᾱ_t. Not clipped.

        Args:
            model_output: (B, ...), what `prediction_type` names.
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
            return model_output.to(sample.dtype)
        log_t = self._log_alpha_bar(self._as_index(timesteps, sample), sample)
        root, beta_bar = (0.5 * log_t).exp(), -torch.expm1(log_t)
        if prediction_type == "epsilon":
            return self._mix(sample.dtype, 1.0 / root, sample, -beta_bar.sqrt() / root, model_output)
        if prediction_type == "score":
            return self._mix(sample.dtype, 1.0 / root, sample, beta_bar / root, model_output)
        return self._mix(sample.dtype, root, sample, -beta_bar.sqrt(), model_output)

    def predict_epsilon(
        self,
        model_output: torch.Tensor,
        timesteps: int | torch.Tensor,
        sample: torch.Tensor,
        prediction_type: str | None = None,
    ) -> torch.Tensor:
        """ε̂ from what the model says: F9 solved for ε, ε = (x_t − √ᾱ_t x_0)/√(1−ᾱ_t). Arguments as above."""
        prediction_type = prediction_type or self.config.prediction_type
        _require("prediction_type", prediction_type, (*PREDICTION_TYPES, "score"))
        if prediction_type == "epsilon":
            return model_output.to(sample.dtype)
        log_t = self._log_alpha_bar(self._as_index(timesteps, sample), sample)
        root, sigma = (0.5 * log_t).exp(), (-torch.expm1(log_t)).sqrt()
        if prediction_type == "sample":
            return self._mix(sample.dtype, 1.0 / sigma, sample, -root / sigma, model_output)
        if prediction_type == "score":
            return self._mix(sample.dtype, -sigma, model_output, torch.zeros_like(sigma), sample)
        return self._mix(sample.dtype, sigma, sample, root, model_output)

    def predict_velocity(
        self,
        model_output: torch.Tensor,
        timesteps: int | torch.Tensor,
        sample: torch.Tensor,
        prediction_type: str | None = None,
    ) -> torch.Tensor:
        """v̂ = √ᾱ_t ε̂ − √(1−ᾱ_t) x̂_0. Arguments as for `predict_original_sample`."""
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
        """∇ log q(x_t) = −ε̂/√(1−ᾱ_t) (Song et al. 2021, arXiv:2011.13456). Arguments as above."""
        epsilon = self.predict_epsilon(model_output, timesteps, sample, prediction_type)
        log_t = self._log_alpha_bar(self._as_index(timesteps, sample), sample)
        scale = -1.0 / (-torch.expm1(log_t)).sqrt()
        return self._mix(sample.dtype, scale, epsilon, torch.zeros_like(scale), sample)

    # ---- reverse: Bayes ----

    def _posterior_coefficients(
        self, timesteps: torch.Tensor, prev_timesteps: torch.Tensor, like: torch.Tensor, eta: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Coefficient of x_0, coefficient of x_t, variance η²β̃, and β_{t|s} = 1−ᾱ_t/ᾱ_s, of q_η(x_s | x_t, x_0)."""
        log_t = self._log_alpha_bar(timesteps, like)
        log_s = self._log_alpha_bar(prev_timesteps, like)
        alpha, beta = (log_t - log_s).exp(), -torch.expm1(log_t - log_s)  # R7: α_t -> ᾱ_t/ᾱ_s
        beta_bar_t, beta_bar_s = -torch.expm1(log_t), -torch.expm1(log_s)

        variance = eta**2 * beta_bar_s / beta_bar_t * beta
        # √((1−ᾱ_s−η²β̃)/(1−ᾱ_t)) of DDIM, without the subtraction; η = 1 makes it √α (1−ᾱ_s)/(1−ᾱ_t), as R4 says.
        of_sample = (beta_bar_s * ((1.0 - eta**2) * beta + alpha * beta_bar_s)).sqrt() / beta_bar_t
        # The rest of √ᾱ_s is what x_0 must bring; η = 1 makes it √ᾱ_s β/(1−ᾱ_t), as R4 says.
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
        """Mean and variance of q(x_s | x_t, x_0) (R4; R7 for any s < t).

            β̃ = (1−ᾱ_s)/(1−ᾱ_t) · β        μ̃ = √ᾱ_s β/(1−ᾱ_t) · x_0 + √α (1−ᾱ_s)/(1−ᾱ_t) · x_t
            with α = ᾱ_t/ᾱ_s and β = 1−α

        `eta` widens it to the family that has the same marginals (Song et al. 2021, DDIM, arXiv:2010.02502, eq. 7 and
        16): η = 1 is the Bayes posterior, η = 0 has no variance, and between them the variance is η²β̃.

        Args:
            original_samples: x_0, (B, ...) floating.
            sample: x_t, same shape.
            timesteps: t in [0, T): int, 0-d, or (B,).
            prev_timesteps: s in [−1, t), same forms; t−1 if None; −1 is x_0 itself (variance 0).
            eta: in [0, 1].

        Returns:
            mean of the shape and dtype of `sample`; variance in at least float32, of shape (B or 1, 1, ..., 1).
        """
        t = self._as_index(timesteps, sample)
        s = t - 1 if prev_timesteps is None else self._as_index(prev_timesteps, sample)
        of_original, of_sample, variance, _ = self._posterior_coefficients(t, s, sample, eta)
        mean = self._mix(sample.dtype, of_original, original_samples, of_sample, sample)
        return mean, variance.to(torch.promote_types(sample.dtype, torch.float32))

    def _log_variance(
        self,
        predicted_variance: torch.Tensor | None,
        timesteps: torch.Tensor,
        last_step: torch.Tensor,
        of_original: torch.Tensor,
        posterior: torch.Tensor,
        large: torch.Tensor,
        eta: float,
    ) -> torch.Tensor:
        kind = self.config.variance_type
        if kind == "zero":
            return torch.full_like(posterior, -torch.inf)
        # The posterior of the last step has no variance; the smallest that is not 0 stands in for it (Nichol & Dhariwal
        # 2021), so that the last likelihood term has a scale. `step` adds no noise there.
        small = torch.where(last_step, eta**2 * self._smallest_posterior_variance, posterior)
        if kind in ("fixed_small", "fixed_small_log"):
            return small.log()
        if kind in ("fixed_large", "fixed_large_log"):
            return large.log()
        if kind == "analytic":
            # Law of total variance: that of the posterior, plus that of x_0 carried over by the posterior's mean.
            self._original_sample_variances = self._original_sample_variances.to(small)
            of_x0 = self._per_sample(self._original_sample_variances.index_select(0, timesteps), small)
            return (posterior + of_original**2 * of_x0).clamp(min=_SMALLEST_VARIANCE).log()
        assert predicted_variance is not None  # `split_model_output` saw to it
        predicted = predicted_variance.to(torch.promote_types(predicted_variance.dtype, torch.float32))
        if kind == "learned":
            # A network's output has no sign of its own.
            return (eta**2 * predicted).clamp(min=_SMALLEST_VARIANCE).log()
        weight = (predicted + 1.0) / 2.0
        return weight * large.log().to(predicted) + (1.0 - weight) * small.log().to(predicted)

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
        """p_θ(x_s | x_t) = N(mean, σ²): x̂_0 of the model (R5), limited, in the place of x_0 in the posterior (R4, R7).

        With ε-prediction and no limit the mean is R6, (x_t − β/√(1−ᾱ_t) ε̂)/√α.

        Args:
            model_output: (B, C, ...), or (B, 2C, ...) for a learned variance.
            timesteps: t in [0, T): int, 0-d, or (B,).
            sample: x_t, (B, C, ...).
            prev_timesteps: s in [−1, t); t−1 if None.
            eta: in [0, 1]; see `posterior_mean_variance`.
            limit: False leaves x̂_0 unclipped, so that a loss on it has a gradient everywhere.

        Returns:
            mean, shape and dtype of `sample`; log σ² by `variance_type`, in at least float32 and broadcastable to it
            (−inf where nothing is added; at s = −1 the smallest β̃ that is not 0 stands for 0); x̂_0.

        Raises:
            ValueError: a model output whose shape does not fit the sample and `variance_type`.
        """
        t = self._as_index(timesteps, sample)
        s = t - 1 if prev_timesteps is None else self._as_index(prev_timesteps, sample)
        prediction, predicted_variance = self.split_model_output(model_output, sample)
        original_sample = self.predict_original_sample(prediction, t, sample)
        if limit:
            original_sample = self._limit(original_sample)
        of_original, of_sample, posterior, beta = self._posterior_coefficients(t, s, sample, eta)
        mean = self._mix(sample.dtype, of_original, original_sample, of_sample, sample)
        last_step = self._per_sample(s < 0, sample)
        log_variance = self._log_variance(predicted_variance, t, last_step, of_original, posterior, eta**2 * beta, eta)
        return mean, log_variance.to(torch.promote_types(sample.dtype, torch.float32)), original_sample

    def split_model_output(
        self, model_output: torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the model says of x_0, (B, C, ...), and of the variance: (B, C, ...) if it is learned, None if not.

        Raises:
            ValueError: `model_output` is not (B, 2C, ...) for a learned variance, or not of the sample's shape else.
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

    def _limit(self, original_sample: torch.Tensor) -> torch.Tensor:
        if self.config.thresholding:
            flat = original_sample.flatten(1).to(torch.promote_types(original_sample.dtype, torch.float32))
            bound = torch.quantile(flat.abs(), self.config.dynamic_thresholding_ratio, dim=1, keepdim=True)
            bound = bound.clamp(min=1.0, max=self.config.sample_max_value)
            limited = flat.clamp(-bound, bound) / bound
            return limited.view_as(original_sample).to(original_sample.dtype)
        if self.config.clip_sample:
            return original_sample.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return original_sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
        *,
        eta: float = 1.0,
    ) -> CustomDDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """S1, one step of the reverse process: x_t -> x_s, s the next timestep of the schedule.

        x̂_0 from the model (R5), put into the posterior (R4, R7), plus σ z; the step that arrives at x_0 adds no noise,
        whatever the spacing.

        Args:
            model_output: (B, C, ...), or (B, 2C, ...) for a learned variance.
            timestep: t: int, 0-d tensor, or one per sample (B,).
            sample: x_t, (B, C, ...).
            generator: for z; a list has one per image, so that a picture does not depend on its batch.
            variance_noise: z itself, in place of `generator`.
            return_dict: False gives the tuple (prev_sample, pred_original_sample).
            eta: in [0, 1]; 1 is DDPM (ancestral), 0 is DDIM (deterministic but for variance_type "analytic").

        Returns:
            `CustomDDPMSchedulerOutput`, tensors of the shape and dtype of `sample`.

        Raises:
            ValueError: a model output whose shape does not fit the sample and `variance_type`.
        """
        t = self._as_index(timestep, sample)
        s = self._previous(t)
        mean, log_variance, original_sample = self.predict_mean_log_variance(model_output, t, sample, s, eta=eta)

        prev_sample = mean
        kind = self.config.variance_type
        if kind != "zero" and (eta > 0 or kind == "analytic"):
            if variance_noise is None:
                variance_noise = randn_tensor(
                    sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
                )
            adds_noise = self._per_sample(s >= 0, sample)
            sigma = torch.where(adds_noise, (0.5 * log_variance).exp(), 0.0)
            prev_sample = torch.addcmul(mean.to(sigma), sigma, variance_noise.to(sigma)).to(sample.dtype)

        if not return_dict:
            return prev_sample, original_sample
        return CustomDDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=original_sample)
