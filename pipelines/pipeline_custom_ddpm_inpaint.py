"""`CustomDDPMInpaintPipeline`: inpainting, outpainting and super-resolution by RePaint.

`DiffusionPipeline.from_pretrained(model, custom_pipeline=...)` loads it, given this file, or only its name where it is
saved with the model. It needs pipeline_custom_ddpm.py and pictures.py beside it.
"""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils.torch_utils import randn_tensor

from .pictures import picture_sizes, read_mask, read_pictures
from .pipeline_custom_ddpm import (
    CustomDDPMPipeline,
    CustomDDPMPipelineOutput,
    _check_count,
    _check_generator,
    _count_images,
)

# Samplers whose step depends on x_t only: others keep predictions of steps that resampling undoes.
SAMPLERS = ("CustomDDPMScheduler", "DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler")
_CLIPPING_ROUNDS = 50  # of the projections on the known means and on [−1, 1] at the end of super-resolution


class CustomDDPMInpaintPipeline(CustomDDPMPipeline):
    """Pipeline for pictures of which a part is known (RePaint, Lugmayr et al. 2022, arXiv:2201.09865).

    What is known is a linear projection P of the picture: its pixels outside a mask, or the means of its blocks. Each
    step goes from x_t to x_s as always, and then replaces P x_s by P of the known picture noised to s (F9). The step is
    repeated `jump_n_sample` times with x_t noised again from x_s (F9 from any s < t), so that what is drawn comes to
    agree with what is known.

    With the variance σ² = β of the step ("fixed_large") the result tends to the true conditional distribution with more
    repetitions and more steps; with β̃ its mean does, but it becomes too narrow (docs/editing.md). So "fixed_small" is
    replaced by "fixed_large" here.

    Args:
        unet, scheduler, id2label: as of `CustomDDPMPipeline`; the scheduler must be one of `SAMPLERS`.
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: PIL.Image.Image | np.ndarray | torch.Tensor | Sequence,
        mask_image: PIL.Image.Image | np.ndarray | torch.Tensor | Sequence | None = None,
        *,
        padding: tuple[int, int, int, int] | None = None,
        scale_factor: int | None = None,
        jump_n_sample: int = 10,
        class_labels: int | str | Sequence[int] | Sequence[str] | np.ndarray | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int | None = 100,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_interval: tuple[float, float] | None = None,
        return_trajectory: bool | int | Sequence[int] = False,
    ) -> CustomDDPMPipelineOutput | tuple:
        """Draw what is not known of a picture. One of `mask_image`, `padding` and `scale_factor` says what is known.

        Args:
            image: one picture or several, of the kinds that `CustomDDPMImg2ImgPipeline` takes. One is used for all
                masks and labels.
            mask_image: white (1/2 or more) where the picture is drawn anew, of the size of `image`, of the same kinds;
                all other pixels of the result are exactly those of the picture in the model's size.
            padding: (left, top, right, bottom): outpainting. The picture is resized to the model's size without these
                borders, which are drawn.
            scale_factor: super-resolution. The picture is resized to the model's size divided by this; the mean of each
                block of scale_factor² pixels of the result is its pixel.
            jump_n_sample: how often each step is done; the cost is `num_inference_steps` × `jump_n_sample`.
            num_inference_steps: steps of the chain; None for all T.
            class_labels, guidance_scale, eta, generator, output_type, return_dict, callback_on_step_end,
                callback_on_step_end_tensor_inputs, guidance_interval, return_trajectory: as of `CustomDDPMPipeline`.

        Returns:
            `CustomDDPMPipelineOutput`.

        Raises:
            ValueError: an argument does not match the model, the scheduler or another argument.
        """
        self._check_arguments(output_type, guidance_scale, num_inference_steps, eta, callback_on_step_end_tensor_inputs)
        _check_count("jump_n_sample", jump_n_sample)
        given, mask = self._read_known(image, mask_image, padding, scale_factor)
        class_labels, count = _count_images(class_labels, None, 1)
        count = _common_count(count, given, mask)
        _check_generator(generator, count)
        labels = self._check_labels(class_labels, count, guidance_scale)
        call = self._begin(guidance_scale, num_inference_steps, guidance_interval, eta)
        call._check_timesteps(drawn=True)
        call._record(return_trajectory)
        call._given, call._scale = given.to(self._execution_device).expand(count, -1, -1, -1), scale_factor
        call._known = None if mask is None else ~mask.to(self._execution_device)
        call._repeats, call._generator = jump_n_sample, generator
        call._find_levels()
        latents = call._noise(call._given)
        options = call._step_options(eta, generator)
        latents = call._denoise(latents, labels, options, callback_on_step_end, callback_on_step_end_tensor_inputs)
        return self._end(call, self._to_output(call._finish(latents), output_type), return_dict)

    def _read_known(
        self, image: Any, mask_image: Any, padding: Any, scale_factor: int | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The known picture in the model's size and the mask of what is drawn; no mask for super-resolution."""
        if sum(each is not None for each in (mask_image, padding, scale_factor)) != 1:
            raise ValueError("give one of mask_image (inpainting), padding (outpainting), scale_factor (more pixels)")
        name = type(self.scheduler).__name__
        if name not in SAMPLERS:
            raise ValueError(f"{name} keeps what earlier steps predicted, or its own noise levels; use {SAMPLERS[0]}")
        channels, size = self.unet.config.in_channels, self._picture_size()
        if mask_image is not None:
            given, mask = read_pictures(image, channels, size), read_mask(mask_image, size)
            sizes, of_mask = picture_sizes(image), picture_sizes(mask_image)
            alike = len(sizes) == len(of_mask) and list(sizes) == list(of_mask)
            if len({*sizes, *of_mask}) > 1 and not alike:
                shown = [" and ".join(f"{w}x{h}" for h, w in dict.fromkeys(each)) for each in (of_mask, sizes)]
                raise ValueError(f"mask_image is {shown[0]}, image is {shown[1]}; they must have one size")
            if not bool(mask.flatten(1).any(1).all()):
                raise ValueError("mask_image has no white pixel (at least 1/2, or 128 of 255), so nothing is to draw")
            return given, mask
        if size is None:
            raise ValueError("the model's config has no sample_size; draw with mask_image instead")
        height, width = size
        if padding is not None:
            borders = padding if isinstance(padding, list | tuple) and len(padding) == 4 else (0, 0, 0, 0)
            left, top, right, bottom = (each if isinstance(each, numbers.Integral) else -1 for each in borders)
            inner = (height - top - bottom, width - left - right)
            if min(left, top, right, bottom) < 0 or max(left, top, right, bottom) == 0 or min(inner) < 1:
                raise ValueError(
                    f"padding is {padding!r}; it must be (left, top, right, bottom) of a picture of {width}x{height}"
                )
            picture = read_pictures(image, channels, inner)
            given = torch.nn.functional.pad(picture, (left, right, top, bottom))
            mask = torch.nn.functional.pad(torch.zeros_like(picture[:1, :1]), (left, right, top, bottom), value=1) > 0
            return given, mask
        _check_count("scale_factor", scale_factor)
        assert scale_factor is not None
        if scale_factor == 1 or height % scale_factor or width % scale_factor:
            raise ValueError(f"scale_factor is {scale_factor}; it must be at least 2 and divide {width}x{height}")
        small = read_pictures(image, channels, (height // scale_factor, width // scale_factor))
        return small.repeat_interleave(scale_factor, 2).repeat_interleave(scale_factor, 3), None

    def _sampler(self) -> Any:
        """The scheduler of one call: resampling undoes what earlier steps predicted, and needs steps with noise."""
        return self._first_order_sampler()

    def _find_levels(self) -> None:
        """For each step the noise level that it goes to, and the way back: √ᾱ_s, √(1−ᾱ_s), √(ᾱ_t/ᾱ_s), √(1−ᾱ_t/ᾱ_s)."""
        scheduler = self.scheduler
        timesteps = scheduler.timesteps.tolist()
        if type(scheduler).__name__.startswith("DDIM"):
            ratio = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
            after = [max(t - ratio, -1) for t in timesteps]
        else:
            after = [*timesteps[1:], -1]
            if scheduler.config.variance_type in ("fixed_small", "fixed_small_log"):
                kind = "fixed_large"
                scheduler.register_to_config(variance_type=kind)
                scheduler.variance_type = kind  # of diffusers' DDPMScheduler
        with np.errstate(divide="ignore"):  # log ᾱ = −∞ where ᾱ = 0
            logs = np.concatenate([[0.0], np.cumsum(np.log1p(-scheduler.betas.double().cpu().numpy()))])
            self._levels = [
                (
                    float(np.exp(logs[s + 1] / 2)),
                    float(np.sqrt(-np.expm1(logs[s + 1]))),
                    float(np.exp((logs[t + 1] - logs[s + 1]) / 2)),
                    float(np.sqrt(-np.expm1(logs[t + 1] - logs[s + 1]))),
                )
                for t, s in zip(timesteps, after, strict=True)
            ]

    def _step(
        self,
        i: int,
        t: torch.Tensor,
        latents: torch.Tensor,
        class_labels: torch.Tensor | None,
        step_options: dict[str, Any],
    ) -> torch.Tensor:
        """Step i, repeated: x_t to x_s, the known part replaced, and back by the forward process."""
        root, sigma, keep, add = self._levels[i]
        recorded = len(self._recorded)
        repeats = self._repeats if sigma > 0 else 1
        for repeat in range(repeats):
            del self._recorded[recorded:]  # the last repetition is shown
            latents = super()._step(i, t, latents, class_labels, step_options)
            known = self._given if sigma == 0 else root * self._given + sigma * self._noise(latents)
            latents = self._with_known(latents, known)
            if repeat < repeats - 1:
                latents = keep * latents + add * self._noise(latents)
        return latents

    def _noise(self, like: torch.Tensor) -> torch.Tensor:
        return randn_tensor(like.shape, generator=self._generator, device=like.device, dtype=like.dtype)

    def _with_known(self, x: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """x + P (known − x): the known part of x replaced."""
        if self._known is not None:
            return torch.where(self._known, known, x)
        means = torch.nn.functional.avg_pool2d(known - x, self._scale)
        return x + means.repeat_interleave(self._scale, 2).repeat_interleave(self._scale, 3)

    def _finish(self, x: torch.Tensor) -> torch.Tensor:
        """x_0 with its known part exact; for known means also within [−1, 1], by projecting on both in turn."""
        if self._known is None:
            for _ in range(_CLIPPING_ROUNDS):
                x = self._with_known(x, self._given).clamp(-1, 1)
        x = self._with_known(x, self._given)
        if self._recorded and self._recorded[-1][0] < 0:  # the trajectory ends with the result
            self._recorded[-1] = (self._recorded[-1][0], x, x)
        return x


def _common_count(labels: int, given: torch.Tensor, mask: torch.Tensor | None) -> int:
    """The number of images to draw, from the arguments that are given once or per image."""
    count = max(labels, len(given), 1 if mask is None else len(mask))
    for name, each in (("pictures", given), ("masks", mask)):
        if each is not None and len(each) not in (1, count):
            raise ValueError(f"there are {len(each)} {name} for {count} images; give one, or one per image")
    return count


del CustomDDPMPipeline  # diffusers takes the one pipeline class that it finds in a file
