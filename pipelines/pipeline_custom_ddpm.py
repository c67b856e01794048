"""`CustomDDPMPipeline`: sampling by Algorithm 2 (S1), unconditional or class-conditional with guidance.

This file imports nothing of the package when it is loaded, and is saved at the root of every model repository, so that
`DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)` works where the package is not installed.
"""

import copy
import importlib
import inspect
import json
import math
import numbers
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import (
    DDPMParallelScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.utils import logging
from diffusers.utils.dynamic_modules_utils import get_relative_import_files
from diffusers.utils.torch_utils import randn_tensor

logger = logging.get_logger(__name__)
_STOCK_DDPM = (DDPMScheduler, DDPMParallelScheduler)
_SAID: set[tuple[int, str]] = set()  # how numbers of steps are made, where that was told of
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# They are saved with every model, beside this file.
EDITING_FILES = (
    "pictures.py",
    "pipeline_custom_ddpm_img2img.py",
    "pipeline_custom_ddpm_inpaint.py",
    "pipeline_custom_ddpm_interpolate.py",
)
# These step from t to t − T // n, whatever their next timestep is.
_STEP_BY_RATIO = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMInverseScheduler",
    "PNDMScheduler",
    "CogVideoXDDIMScheduler",
)
LOADING_OPTIONS = (
    "unet scheduler id2label custom_pipeline trust_remote_code "
    "revision token cache_dir local_files_only force_download "
    "torch_dtype dtype variant use_safetensors output_loading_info device_map max_memory offload_folder "
    "offload_state_dict low_cpu_mem_usage ignore_mismatched_sizes disable_mmap quantization_config parallel_config"
).split()


@dataclass
class Trajectory:
    """The reverse process at K of its steps, from noise to the result, which is the last of them.

    Args:
        timesteps: float32 (K,): t before each step; of the result −1, or where a callback interrupted the call its t.
        samples: float32 (K, B, C, H, W): x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε for every scheduler, also for those that step
            with samples of another size.
        pred_original_samples: float32 (K, B, C, H, W): x̂_0 of the model at x_t (R5), before the scheduler clips it; of
            the result, the result.
    """

    timesteps: torch.Tensor
    samples: torch.Tensor
    pred_original_samples: torch.Tensor


@dataclass
class CustomDDPMPipelineOutput(ImagePipelineOutput):
    """Output of the pipeline.

    Args:
        images: as `output_type` says.
        trajectory: the states that `return_trajectory` chose; None if it chose none.
    """

    trajectory: Trajectory | None = None


class CustomDDPMPipeline(DiffusionPipeline):
    """Pipeline for image generation with DDPM.

    Args:
        unet: `CustomUNet2DModel` or `UNet2DModel`; its prediction is of the scheduler's `prediction_type`.
        scheduler: `CustomDDPMScheduler`, or any compatible scheduler of diffusers.
        id2label: class names by label, for a class-conditional model. If the model has one class embedding more than
            there are names, it was trained with label dropout and the last embedding means "no class", which guidance
            requires.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, id2label: dict | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self._guidance_scale, self._num_timesteps, self._interrupt = 1.0, 0, False
        self._guidance_interval: tuple[float, float] | None = None
        self._start = 0  # place of the present call's first step among the scheduler's timesteps
        self._recorded_steps: frozenset[int] = frozenset()
        self._recorded: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        # The keys are strings after loading from JSON.
        self.register_to_config(id2label=id2label and {int(label): str(name) for label, name in id2label.items()})

    # ---- sampling ----

    @property
    def guidance_scale(self) -> float:
        """w of the present call; a callback may change it by setting `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of the scheduler's steps in the present call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the present call stops before its next step; a callback sets `_interrupt`."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: int | str | Sequence[int] | Sequence[str] | np.ndarray | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int | None = None,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_interval: tuple[float, float] | None = None,
        return_trajectory: bool | int | Sequence[int] = False,
    ) -> CustomDDPMPipelineOutput | tuple:
        """Generate images (Algorithm 2, S1).

        A call steps with its own copy of the scheduler, so it does not depend on other calls, also of other threads.

        Args:
            batch_size: number of images; taken from `class_labels` or `latents` if those are given per image.
            class_labels: class name or label, one for all images or one per image; a label may be text if no class name
                is a number. Without it, a class-conditional model trained with label dropout samples unconditionally.
            guidance_scale: w of classifier-free guidance, ε̂ = ε(∅) + w (ε(c) − ε(∅)) (Ho & Salimans 2022,
                arXiv:2207.12598); 1.0 for no guidance.
            num_inference_steps: number of steps of the reverse process; None for all T of the training.
            eta: 1 for DDPM, 0 for DDIM; None for the scheduler's default. See `CustomDDPMScheduler.step` for clipping.
            generator: one for the batch, or one per image; with one per image, an image does not depend on its batch.
            latents: x_T, (B, C, H, W), of variance 1 for every scheduler; drawn from `generator` if None.
            output_type: "pil", "np" ((B, H, W, C) float32 in [0, 1]), "pt" ((B, C, H, W), the same range) or "latent"
                (x_0 as it is, (B, C, H, W) float32, nominally in [−1, 1]).
            return_dict: whether to return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called as f(pipeline, step, timestep, {"latents": x}) after each step; may return
                {"latents": ...} to replace them. `pipeline` is this call's shallow copy, with its scheduler.
            callback_on_step_end_tensor_inputs: keys of that dictionary; only "latents" is available.
            guidance_interval: (low, high), fractions of T: guidance only at low ≤ t/T < high (Kynkäänniemi et al. 2024,
                arXiv:2404.07724), and the model is evaluated once elsewhere; None for all timesteps.
            return_trajectory: whether to return x_t and x̂_0 before every step; or their number, spread evenly over the
                steps, with the first and the result; or the steps, from 0, negative ones from the end.

        Returns:
            `CustomDDPMPipelineOutput` with `.images`, gray ones of PIL mode "L", and `.trajectory` if it was asked for.

        Raises:
            ValueError: an argument does not match the model, the scheduler or another argument.
        """
        self._check_arguments(output_type, guidance_scale, num_inference_steps, eta, callback_on_step_end_tensor_inputs)
        class_labels, batch_size = _count_images(class_labels, latents, batch_size)
        _check_generator(generator, batch_size)
        labels = self._check_labels(class_labels, batch_size, guidance_scale)
        call = self._begin(guidance_scale, num_inference_steps, guidance_interval, eta)
        call._check_timesteps(latents is None)
        call._record(return_trajectory)
        latents = call._prepare_latents(latents, batch_size, generator)
        options = call._step_options(eta, generator)
        latents = call._denoise(latents, labels, options, callback_on_step_end, callback_on_step_end_tensor_inputs)
        return self._end(call, self._to_output(latents, output_type), return_dict)

    def _end(self, call: "CustomDDPMPipeline", images: Any, return_dict: bool) -> CustomDDPMPipelineOutput | tuple:
        """The output of a call, with the trajectory that it recorded."""
        for name in ("_guidance_scale", "_num_timesteps", "_interrupt"):
            setattr(self, name, getattr(call, name))
        self.maybe_free_model_hooks()
        trajectory = Trajectory(*map(torch.stack, zip(*call._recorded, strict=True))) if call._recorded else None
        output = CustomDDPMPipelineOutput(images=images, trajectory=trajectory)
        return output if return_dict else output.to_tuple()

    def _begin(
        self,
        guidance_scale: float,
        num_inference_steps: int | None,
        guidance_interval: tuple[float, float] | None = None,
        eta: float | None = None,
    ) -> Any:
        """A shallow copy of the pipeline with the state of one call, so that calls cannot disturb each other."""
        _check_interval(guidance_interval, guidance_scale)
        call = copy.copy(self)
        call.scheduler = self._sampler()
        call._guidance_scale, call._interrupt, call._recorded = float(guidance_scale), False, []
        call._guidance_interval = guidance_interval
        n = num_inference_steps or call.scheduler.config.num_train_timesteps
        call.scheduler.set_timesteps(n, device=self._execution_device)
        call._start, call._num_timesteps = 0, len(call.scheduler.timesteps)
        tuned = getattr(call.scheduler, "tuned_for", lambda n, eta: None)(n, eta)
        if tuned is not None and (n, tuned) not in _SAID:
            _SAID.add((n, tuned))
            logger.warning(f"{n} {tuned}")
        return call

    def _sampler(self) -> Any:
        """The scheduler of one call."""
        return copy.deepcopy(self.scheduler)

    def _first_order_sampler(self) -> Any:
        """The scheduler of one call, without what was tuned and without earlier predictions."""
        scheduler = copy.deepcopy(self.scheduler)
        if type(scheduler).__name__ != "CustomDDPMScheduler":
            return scheduler
        return scheduler.from_config(scheduler.config, tuned=None, solver_order=1, corrector=False)

    def _denoise(
        self,
        latents: torch.Tensor,
        labels: list[int] | None,
        step_options: dict[str, Any],
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None,
        tensor_inputs: Sequence[str],
    ) -> torch.Tensor:
        """The loop of Algorithm 2, from x_T to x_0; `step_options` are arguments of the scheduler's `step`."""
        class_labels = None if labels is None else torch.tensor(labels, device=latents.device)
        end = torch.tensor(-1.0, device=latents.device)
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps[self._start :])):
            if self.interrupt:
                end = t
                break
            latents = self._step(i, t, latents, class_labels, step_options)
            if callback_on_step_end is not None:
                inputs = {"latents": latents} if tensor_inputs else {}
                latents = (callback_on_step_end(self, i, t, inputs) or {}).get("latents", latents)
        if self._recorded_steps:
            x_t = latents if end < 0 else self.scheduler.scale_model_input(latents, end)
            self._recorded.append((end.float().to(latents.device), x_t.float(), x_t.float()))
        return latents

    def _step(
        self,
        i: int,
        t: torch.Tensor,
        latents: torch.Tensor,
        class_labels: torch.Tensor | None,
        step_options: dict[str, Any],
    ) -> torch.Tensor:
        """Step i of this call, at timestep t: x_t to x_s."""
        is_last = i == self._num_timesteps - 1
        if "prev_timestep" in step_options:
            step_options["prev_timestep"] = None if is_last else self.scheduler.timesteps[self._start + i + 1]
        model_output = self._predict(latents, t, class_labels)
        if i in self._recorded_steps:
            self._recorded.append(self._state(latents, t, model_output))
        try:
            stepped = self.scheduler.step(model_output, t, latents, return_dict=False, **step_options)
        except NotImplementedError as error:
            raise ValueError(f"{type(self.scheduler).__name__} cannot step this model: {error}") from error
        # x̂_0 is the mean of the last step; diffusers' DDPM adds noise to it if that step is not from t = 0.
        return stepped[1 if is_last and isinstance(self.scheduler, _STOCK_DDPM) else 0]

    # ---- the trajectory ----

    def _record(self, chosen: Any) -> None:
        """Choose the steps whose states are returned; `chosen` is `return_trajectory`."""
        n = self._num_timesteps
        if isinstance(chosen, bool | np.bool_):
            steps = range(n if chosen else 0)
        elif isinstance(chosen, numbers.Integral):
            if chosen < 2:
                raise ValueError(f"return_trajectory is {chosen}; as a number of states it must be at least 2")
            steps = np.linspace(0, n, min(int(chosen), n + 1)).round().astype(int).tolist()[:-1]
        elif not isinstance(chosen, Iterable):
            raise ValueError(f"return_trajectory is {chosen!r}; it must be True, a number of states or a list of steps")
        else:
            steps = list(chosen)
            wrong = [i for i in steps if not isinstance(i, numbers.Integral) or not -n <= i < n]
            if wrong:
                raise ValueError(f"return_trajectory has {wrong[0]!r}; with {n} steps it must be in [{-n}, {n})")
        self._recorded_steps = frozenset(int(i) % n for i in steps)
        kind = self.scheduler.config.prediction_type
        if self._recorded_steps and kind not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(f"return_trajectory needs a model that predicts ε, x_0 or v, and this predicts {kind!r}")

    def _state(self, latents: torch.Tensor, t: torch.Tensor, model_output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """t, x_t and x̂_0 (R5) before a step; x_t as the model sees it, which is the same for all schedulers."""
        x_t = self.scheduler.scale_model_input(latents, t).float()
        prediction, kind = model_output[:, : x_t.shape[1]], self.scheduler.config.prediction_type
        alpha_bar = self.scheduler.alphas_cumprod.to(x_t.device, torch.float32)[t.round().long().to(x_t.device)]
        root, sigma = alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()
        if kind == "sample":
            x_0 = prediction
        else:
            x_0 = (x_t - sigma * prediction) / root if kind == "epsilon" else root * x_t - sigma * prediction
        return t.float().to(x_t.device), x_t, x_0

    def _predict(self, latents: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        """Model output at the scheduler's x_t, as the scheduler takes it."""
        output = self._evaluate(self.scheduler.scale_model_input(latents, t), t, class_labels)
        return output if self._takes_learned_variance() else output[:, : self.unet.config.in_channels]

    def _evaluate(self, x_t: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        """Model output at x_t in float32, with guidance if `guidance_scale` is not 1."""
        model_input = x_t.to(self.unet.dtype)
        C = self.unet.config.in_channels  # the channels after these are a learned variance
        if class_labels is None:
            return self.unet(model_input, t).sample.float()
        if self.guidance_scale == 1.0 or not self._is_guided(t):
            return self.unet(model_input, t, class_labels=class_labels).sample.float()
        both = torch.cat([torch.full_like(class_labels, self._null_label()), class_labels])
        output = self.unet(torch.cat([model_input, model_input]), t, class_labels=both).sample.float()
        without, with_class = output.chunk(2)
        guided = without[:, :C] + self.guidance_scale * (with_class[:, :C] - without[:, :C])
        return torch.cat([guided, with_class[:, C:]], dim=1)  # the variance is not extrapolated

    def _is_guided(self, t: torch.Tensor) -> bool:
        if self._guidance_interval is None:  # the usual case, in which nothing may wait for the device
            return True
        low, high = self._guidance_interval
        return low <= float(t) / self.scheduler.config.num_train_timesteps < high

    # ---- what the scheduler takes ----

    def _takes_learned_variance(self) -> bool:
        """Whether the scheduler's `step` takes the channels of a learned variance (of our schedulers, DDPM, UnCLIP)."""
        variance = inspect.signature(getattr(self.scheduler, "_get_variance", len)).parameters
        known = hasattr(self.scheduler, "split_model_output") or "predicted_variance" in variance
        return known and self.scheduler.config.variance_type in ("learned", "learned_range")

    def _step_options(self, eta: float | None, generator: Any) -> dict[str, Any]:
        """The arguments that the scheduler's `step` takes beside the model output, the timestep and x_t."""
        if generator is not None and hasattr(self.scheduler, "noise_sampler_seed"):  # DPMSolverSDE draws by a seed
            one = isinstance(generator, torch.Generator)
            seeds = [
                int(torch.randint(2**62, (), generator=g, device=g.device)) for g in ([generator] if one else generator)
            ]
            self.scheduler.noise_sampler_seed = seeds[0] if one else seeds
        kind = self.scheduler.config.get("variance_type") or ""
        if not self._takes_learned_variance() and kind.startswith("learned"):
            # DPM-Solvers would cut the prediction to three channels.
            self.scheduler.register_to_config(variance_type=None)
        options = {"generator": generator, "prev_timestep": None}
        known = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in options.items() if name in known} | ({} if eta is None else {"eta": eta})

    def _check_scheduler(self) -> None:
        """Raise ValueError for a scheduler that cannot step this model."""
        scheduler, name = self.scheduler, type(self.scheduler).__name__
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(f"{name} is not for a model that predicts ε, x_0 or v at timesteps 0 … T−1; use another")
        extra = list(inspect.signature(scheduler.step).parameters.values())
        needed = {p.name for p in extra if p.default is p.empty} - {"model_output", "timestep", "sample"}
        if needed:
            raise ValueError(f"the step of {name} needs {', '.join(sorted(needed))}, which this pipeline does not have")
        kind = scheduler.config.get("variance_type")
        if isinstance(scheduler, _STOCK_DDPM) and kind in ("zero", "analytic", "fixed_large_log"):
            raise ValueError(f"{name} has no variance_type {kind!r}; use CustomDDPMScheduler or another variance_type")
        out, C = self.unet.config.out_channels, self.unet.config.in_channels
        if out != 2 * C and (out != C or self._takes_learned_variance()):
            raise ValueError(
                f"the model has {out} output channels; with {C} channels and variance_type {kind!r} "
                f"it must have {2 * C if self._takes_learned_variance() else C}"
            )

    def _check_timesteps(self, drawn: bool) -> None:
        """Warn of timesteps that do not lead from pure noise to an image; `drawn`: whether x_T is drawn by the call."""
        scheduler, name, config = self.scheduler, type(self.scheduler).__name__, self.scheduler.config
        T, n, first = config.num_train_timesteps, scheduler.num_inference_steps, float(scheduler.timesteps[0])
        if first < float(scheduler.timesteps[-1]):
            if drawn:
                raise ValueError(f"{name} steps from images to noise; give the images as latents, (B, C, H, W)")
            return
        signal, least = (float(scheduler.alphas_cumprod[t]) ** 0.5 for t in (min(round(first), T - 1), T - 1))
        if drawn and (signal - least > 0.01 or (config.get("rescale_betas_zero_snr") and first < T - 1)):
            logger.warning(
                f"{name} starts from pure noise at t = {first:g} of {T - 1}, where the model expects {signal:.1%} of "
                f"the image, so the images will be off; set timestep_spacing='trailing', or other steps than {n}"
            )
        if name in _STEP_BY_RATIO and T % n > T // 20:
            logger.warning(
                f"{name} goes {T // n} timesteps at a step, so {n} steps are not the whole of {T} and the images will "
                f"be off; take a number of steps that divides {T}"
            )

    # ---- checking and preparing the arguments of a call ----

    def _check_arguments(
        self, output_type: str, guidance_scale: float, steps: Any, eta: float | None, tensor_inputs: Sequence[str]
    ) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; it must be one of {', '.join(OUTPUT_TYPES)}")
        if not set(tensor_inputs) <= set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs is {tensor_inputs}; only 'latents' is available")
        if steps is not None:
            _check_count("num_inference_steps", steps)
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale is {guidance_scale}; it must be a finite number")
        self._check_scheduler()
        if eta is not None and "eta" not in inspect.signature(self.scheduler.step).parameters:
            raise ValueError(f"eta is {eta}, but {type(self.scheduler).__name__} has no eta; leave it out")
        if eta is not None and not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta is {eta}; it must be between 0 (DDIM) and 1 (DDPM)")

    def _picture_size(self) -> tuple[int, int] | None:
        """Height and width of the pictures that the model was trained on; None if its config does not say."""
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else size and tuple(size)

    def _prepare_latents(
        self,
        latents: torch.Tensor | None,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """x_T in float32 on the execution device: the given one, checked, or one drawn from `generator`."""
        device, config = self._execution_device, self.unet.config
        if latents is None:
            size = self._picture_size()
            if size is None:
                raise ValueError("the model's config has no sample_size; give latents of the size you want")
            shape = (batch_size, config.in_channels, *size)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.ndim != 4 or latents.shape[:2] != (batch_size, config.in_channels):
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}; "
                f"this call needs ({batch_size}, {config.in_channels}, height, width)"
            )
        # x_t stays in float32 for any dtype of the model, because T small steps accumulate in it.
        return latents.to(device=device, dtype=torch.float32) * self.scheduler.init_noise_sigma

    def _null_label(self) -> int | None:
        """The label that stands for "no class"; None if the model was not trained with label dropout."""
        embeddings, id2label = self.unet.config.num_class_embeds, self.config.id2label
        return embeddings - 1 if embeddings and id2label and embeddings == len(id2label) + 1 else None

    def _check_labels(self, class_labels: Any, batch_size: int, guidance_scale: float) -> list[int] | None:
        """One label per image, or None for an unconditional model; raises ValueError for labels that do not match."""
        embeddings, null = self.unet.config.num_class_embeds, self._null_label()
        if not embeddings:
            if class_labels is not None:
                raise ValueError("class_labels were given, but this model is unconditional; leave them out")
            if guidance_scale != 1.0:
                raise ValueError(
                    f"guidance_scale is {guidance_scale}, but this model is unconditional; leave it at 1.0"
                )
            return None
        if class_labels is None:
            if null is None:
                raise ValueError(f"this model needs class_labels: integers in [0, {embeddings}) or class names")
            if guidance_scale != 1.0:
                raise ValueError(f"guidance_scale is {guidance_scale}, but guidance needs class_labels; none are given")
            return [null] * batch_size
        if guidance_scale != 1.0 and null is None:
            raise ValueError(
                f"guidance_scale is {guidance_scale}, but this model was trained without label dropout, so guidance is "
                "not possible; leave it at 1.0"
            )
        entries = list(class_labels) if isinstance(class_labels, list | tuple) else [class_labels] * batch_size
        if len(entries) != batch_size:
            raise ValueError(f"there are {len(entries)} class_labels for batch_size {batch_size}; give one per image")
        return [self._label(entry, embeddings if null is None else null) for entry in entries]

    def _label(self, entry: Any, count: int) -> int:
        """The label, below `count`, of a class name or label; a text is a name first, and only if names are numbers."""
        label_of = {name: label for label, name in (self.config.id2label or {}).items()}
        numbered = any(name.isdecimal() for name in label_of)
        label = entry.item() if hasattr(entry, "item") else entry
        if isinstance(label, str):
            label = label_of.get(label, int(label) if label.isdecimal() and not numbered else label)
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < count:
            choices = [] if numbered and isinstance(entry, str) else [f"an integer in [0, {count})"]
            some = ", ".join(list(label_of)[:10]) + (", …" if len(label_of) > 10 else "")
            choices += [f"one of {some}"] if label_of else []
            raise ValueError(f"class label {entry!r} is unknown; use {' or '.join(choices)}")
        return label

    @staticmethod
    def _to_output(latents: torch.Tensor, output_type: str) -> torch.Tensor | np.ndarray | list[PIL.Image.Image]:
        """Images in the output type (inverse of F1): [−1, 1] to [0, 1], and to 8 bits for PIL."""
        if output_type == "latent":
            return latents
        images = (latents / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return arrays
        pixels = (arrays * 255).round().astype(np.uint8)
        return [PIL.Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in pixels]

    # ---- saving and loading ----

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does (safetensors only), together with the code files of the custom classes.

        The folder loads with this package (`CustomDDPMPipeline.from_pretrained`, which executes none of its files) and
        without it (`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`).

        Args:
            save_directory: output folder; created if it does not exist.
            *args, **kwargs: as in `DiffusionPipeline.save_pretrained`.

        Raises:
            ValueError: `safe_serialization=False`.
        """
        if kwargs.get("safe_serialization", args[0] if args else True) is False:
            raise ValueError("safe_serialization=False would write a pickle; leave it at True")
        push_to_hub = kwargs.pop("push_to_hub", False)
        push_options = {
            name: kwargs.pop(name)
            for name in ("repo_id", "commit_message", "private", "token", "create_pr")
            if name in kwargs
        }
        super().save_pretrained(save_directory, *args, **kwargs)

        folder = Path(save_directory)
        index_file = folder / self.config_name
        for file in (index_file, *folder.glob("*/*config.json")):
            # The path that a model was loaded from is private information and does not describe the model.
            saved = json.loads(file.read_text())
            if saved.pop("_name_or_path", None) is not None:
                file.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
        index = json.loads(index_file.read_text())
        index["_class_name"] = _copy_code(type(self), folder)
        _copy_siblings(Path(inspect.getfile(CustomDDPMPipeline)), folder)
        for name, component in self.components.items():
            if not type(component).__module__.startswith("diffusers."):
                index[name] = _copy_code(type(component), folder / name)
        if not type(self.unet).__module__.startswith("diffusers."):
            # Where AutoModel.from_pretrained(..., trust_remote_code=True) looks for the class: in the index if it is
            # given a subfolder, otherwise in the configuration.
            index["auto_map"] = {"AutoModel": ".".join(index["unet"])}
            config_file = folder / "unet" / self.unet.config_name
            config = json.loads(config_file.read_text()) | {"auto_map": index["auto_map"]}
            config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        if push_to_hub:
            push_options.setdefault("repo_id", folder.resolve().name)
            self.push_to_hub(**push_options)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """As in diffusers, without the entry for `AutoModel`, of which diffusers would warn."""
        config_dict = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "CustomDDPMPipeline":
        """A pipeline with the components of another one, which are shared, not copied; as in diffusers.

        Args:
            pipeline: of this class, or a stock one such as `DDPMPipeline`.
            **kwargs: as in `DiffusionPipeline.from_pipe`; `unet`, `scheduler`, `id2label` replace those of `pipeline`.
        """
        # Passed by name, because diffusers takes over a model only if its class is exactly the annotated one.
        shared = {name: part for name, part in pipeline.components.items() if name in ("unet", "scheduler")}
        return super().from_pipe(pipeline, **{**shared, **kwargs})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Load with the classes of the installed package; no code of the repository is executed.

        Accepts a folder or a Hub repository saved by this pipeline or by diffusers' `DDPMPipeline`, whose `UNet2DModel`
        and `DDPMScheduler` are converted to `CustomUNet2DModel` and `CustomDDPMScheduler`. It is read and judged before
        anything is built: from the Hub, the weights are downloaded last.

        Args:
            pretrained_model_name_or_path: folder or "user/model".
            **kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`; `torch_dtype` (or `dtype`;
                also a dictionary by component), `variant`, `device_map` and other arguments of
                `ModelMixin.from_pretrained`; `unet`, `scheduler`, `id2label` to replace the saved ones.

        Returns:
            The pipeline; with `output_loading_info=True` also the dictionary of `ModelMixin.from_pretrained`.

        Raises:
            custom_ddpm.hub.ModelError: (an OSError and a ValueError) there is no such folder or repository; a component
                is neither of this package nor of diffusers; a file is missing, malformed or of implausible size; the
                weights are not in safetensors or do not fit the configuration. The message names the file.
            TypeError: an unknown argument.
            ValueError: `custom_pipeline` or `trust_remote_code` is given; `use_safetensors` is False.
        """
        kwargs = _check_loading_options(kwargs)
        parts = {name: kwargs.pop(name) for name in ("unet", "scheduler", "id2label") if name in kwargs}
        hub = ("revision", "token", "cache_dir", "local_files_only", "force_download")
        hub_options = {name: kwargs.pop(name) for name in hub if name in kwargs}
        models = importlib.import_module("custom_ddpm.hub.folder")
        given = [name for name in ("unet", "scheduler") if name in parts]
        model = models.open_model(
            pretrained_model_name_or_path, skip=given, variant=kwargs.get("variant"), **hub_options
        )
        parts.setdefault("id2label", model.index.get("id2label"))
        info: dict[str, Any] = {}
        output_loading_info = kwargs.pop("output_loading_info", False)
        if "unet" not in parts:
            parts["unet"], info = models.load_unet(model, **kwargs)
        parts.setdefault("scheduler", model.scheduler)
        return (cls(**parts), info) if output_loading_info else cls(**parts)


def _check_loading_options(options: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `from_pretrained`, checked, with the U-Net's dtype if they give one for each component."""
    for name in ("custom_pipeline", "trust_remote_code"):
        if options.get(name):
            raise ValueError(f"{name} runs code of the repository; use DiffusionPipeline.from_pretrained for that")
    if options.get("use_safetensors", True) is False:
        raise ValueError("use_safetensors is False; pickles are not read, leave it out")
    checked = {}
    for name, value in options.items():
        if name not in LOADING_OPTIONS:
            raise TypeError(f"CustomDDPMPipeline.from_pretrained() got an unexpected keyword argument {name!r}")
        if name in ("torch_dtype", "dtype") and isinstance(value, dict):
            value = value.get("unet", value.get("default"))
        if name not in ("custom_pipeline", "trust_remote_code", "use_safetensors"):
            checked[name] = value
    return checked


def _copy_code(component_class: type, folder: Path) -> list[str]:
    """Copy the file of a class and its relative imports into `folder`; returns its entry in model_index.json."""
    source = Path(inspect.getfile(component_class))
    folder.mkdir(parents=True, exist_ok=True)
    for file in (source, *map(Path, get_relative_import_files(source))):
        target = folder / file.name
        if file.resolve() != target.resolve():
            shutil.copyfile(file, target)
    return [source.stem, component_class.__name__]


def _copy_siblings(source: Path, folder: Path) -> None:
    """Copy the pipelines beside this one, so that a saved model can be edited too: `custom_pipeline=` their name."""
    for name in EDITING_FILES:
        file, target = source.with_name(name), folder / name
        if file.is_file() and file.resolve() != target.resolve():
            shutil.copyfile(file, target)


def _check_count(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")


def _count_images(class_labels: Any, latents: torch.Tensor | None, batch_size: Any) -> tuple[Any, int]:
    """Labels without tensors and arrays, and the number of images, from the arguments that are given per image."""
    class_labels = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
    if batch_size == 1:
        for per_image in (class_labels, latents):
            batch_size = len(per_image) if isinstance(per_image, list | tuple | torch.Tensor) else batch_size
    _check_count("batch_size", batch_size)
    return class_labels, batch_size


def _check_interval(interval: Any, guidance_scale: float) -> None:
    """Raise ValueError for a guidance interval that is empty, out of [0, 1] or has no use."""
    if interval is not None and not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"guidance_interval is {tuple(interval)}; it must be 0 <= low < high <= 1, fractions of T")
    if interval is not None and guidance_scale == 1.0:
        raise ValueError("guidance_interval is given, but guidance_scale is 1, which is no guidance")


def _check_generator(generator: Any, batch_size: int) -> None:
    """Raise ValueError unless `generator` is None, a torch.Generator or one per image."""
    entries = generator if isinstance(generator, list | tuple) else [generator]
    if generator is not None and not all(isinstance(entry, torch.Generator) for entry in entries):
        raise ValueError(f"generator is {generator!r}; it must be a torch.Generator or a list of one per image")
    if entries is generator and len(entries) != batch_size:
        raise ValueError(f"generator has {len(entries)} entries for batch_size {batch_size}; give one per image")
