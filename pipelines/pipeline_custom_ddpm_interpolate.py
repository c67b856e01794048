"""`CustomDDPMInterpolationPipeline`: pictures between two pictures, by inversion to noise and back.

`DiffusionPipeline.from_pretrained(model, custom_pipeline=...)` loads it, given this file, or only its name where it is
saved with the model. It needs pipeline_custom_ddpm.py and pictures.py beside it.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch

from .pictures import read_pictures
from .pipeline_custom_ddpm import CustomDDPMPipeline, CustomDDPMPipelineOutput, _check_count, _count_images


class CustomDDPMInterpolationPipeline(CustomDDPMPipeline):
    """Pipeline that goes from pictures to the noise that the model draws them from, and back, without random numbers.

    Both ways are the probability-flow equation dx/dφ = v(x, φ), with x = cos φ x_0 + sin φ ε and
    v = cos φ ε − sin φ x_0 (Salimans & Ho 2022, arXiv:2202.00512): by DDIM's step (`order` 1, Song et al. 2021,
    arXiv:2010.02502), or by Heun's method (`order` 2, two evaluations of the model at a step). The scheduler gives the
    noise levels only, so it may be any one whose model predicts ε, x_0 or v.

    Args:
        unet, scheduler, id2label: as of `CustomDDPMPipeline`.
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: PIL.Image.Image | np.ndarray | torch.Tensor | Sequence,
        num_images: int = 8,
        class_labels: int | str | Sequence[int] | Sequence[str] | np.ndarray | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 100,
        order: int = 2,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_interval: tuple[float, float] | None = None,
        return_trajectory: bool | int | Sequence[int] = False,
    ) -> CustomDDPMPipelineOutput | tuple:
        """Draw pictures from the first one to the second: inverted, on the great circle between their noises, and back.

        Args:
            image: two pictures, of the kinds that `CustomDDPMImg2ImgPipeline` takes.
            num_images: number of pictures, with both ends, which are the two after inversion and back.
            class_labels: one for both, or one for each; a picture between has the class of the nearer one.
            guidance_scale, guidance_interval: as of `CustomDDPMPipeline`, on both ways.
            num_inference_steps: steps of each way.
            order: 1 or 2, of the method.
            output_type, return_dict: as of `CustomDDPMPipeline`.
            return_trajectory: as of `CustomDDPMPipeline`, on the way back.

        Returns:
            `CustomDDPMPipelineOutput` with `num_images` images.

        Raises:
            ValueError: an argument does not match the model or another argument.
        """
        self._check_arguments(output_type, guidance_scale, num_inference_steps, None, ())
        _check_count("num_images", num_images)
        pictures = read_pictures(image, self.unet.config.in_channels, self._picture_size())
        if len(pictures) != 2:
            raise ValueError(f"image has {len(pictures)} pictures; interpolation is between two")
        call, labels = self._open(class_labels, 2, guidance_scale, guidance_interval, num_inference_steps, order)
        call._record(return_trajectory)
        first, second = call._flow(pictures.to(self._execution_device), labels, forward=True)
        weights = torch.linspace(0, 1, num_images).tolist()
        latents = torch.stack([spherical_mean(first, second, weight) for weight in weights])
        between = None if labels is None else [labels[round(weight)] for weight in weights]
        pictures = call._flow(latents, between, forward=False)
        return self._end(call, self._to_output(pictures, output_type), return_dict)

    @torch.no_grad()
    def invert(
        self,
        image: PIL.Image.Image | np.ndarray | torch.Tensor | Sequence,
        class_labels: Any = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 100,
        order: int = 2,
        guidance_interval: tuple[float, float] | None = None,
    ) -> torch.Tensor:
        """The noise x_T that `restore` makes these pictures from; arguments as of the call.

        Returns:
            float32 (B, C, H, W), of variance 1 as far as the model is right.
        """
        self._check_arguments("latent", guidance_scale, num_inference_steps, None, ())
        pictures = read_pictures(image, self.unet.config.in_channels, self._picture_size())
        settings = (guidance_scale, guidance_interval, num_inference_steps, order)
        call, labels = self._open(class_labels, len(pictures), *settings)
        latents = call._flow(pictures.to(self._execution_device), labels, forward=True)
        self.maybe_free_model_hooks()
        return latents

    @torch.no_grad()
    def restore(
        self,
        latents: torch.Tensor,
        class_labels: Any = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 100,
        order: int = 2,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_interval: tuple[float, float] | None = None,
        return_trajectory: bool | int | Sequence[int] = False,
    ) -> CustomDDPMPipelineOutput | tuple:
        """The pictures of noises x_T, (B, C, H, W), such as `invert` returns; arguments as of the call."""
        self._check_arguments(output_type, guidance_scale, num_inference_steps, None, ())
        settings = (guidance_scale, guidance_interval, num_inference_steps, order)
        if latents.ndim != 4 or latents.shape[1] != self.unet.config.in_channels:
            needed = f"(B, {self.unet.config.in_channels}, H, W)"
            raise ValueError(f"latents have shape {tuple(latents.shape)}; this model needs {needed}")
        call, labels = self._open(class_labels, len(latents), *settings)
        call._record(return_trajectory)
        pictures = call._flow(latents.to(self._execution_device, torch.float32), labels, forward=False)
        return self._end(call, self._to_output(pictures, output_type), return_dict)

    def _open(
        self,
        class_labels: Any,
        count: int,
        guidance_scale: float,
        guidance_interval: tuple[float, float] | None,
        num_inference_steps: int,
        order: int,
    ) -> tuple[Any, list[int] | None]:
        """The state of one call, with its noise levels, and the labels."""
        _check_count("num_inference_steps", num_inference_steps)
        if order not in (1, 2):
            raise ValueError(f"order is {order}; it must be 1 (DDIM) or 2 (Heun)")
        T, kind = self.scheduler.config.num_train_timesteps, self.scheduler.config.prediction_type
        if not 2 <= num_inference_steps < T:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be between 2 and {T - 1}")
        if kind not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(f"the model predicts {kind!r}; inversion needs one that predicts ε, x_0 or v")
        class_labels, _ = _count_images(class_labels, None, 1)
        if isinstance(class_labels, list | tuple) and len(class_labels) == 1:
            class_labels = class_labels[0]
        labels = self._check_labels(class_labels, count, guidance_scale)
        call = self._begin(guidance_scale, 1, guidance_interval)
        call._num_timesteps, call._order = num_inference_steps, order
        call._timesteps = np.linspace(0, T - 1, num_inference_steps + 1).round().astype(int).tolist()
        with np.errstate(divide="ignore"):  # log ᾱ = −∞ where ᾱ = 0
            logs = np.cumsum(np.log1p(-self.scheduler.betas.double().cpu().numpy()))[call._timesteps]
        call._angles = np.arctan2(np.sqrt(-np.expm1(logs)), np.exp(logs / 2)).tolist()
        return call, labels

    def _sampler(self) -> Any:
        """The scheduler of one call; its noise levels alone are used."""
        return self._first_order_sampler()

    def _flow(self, x: torch.Tensor, labels: list[int] | None, forward: bool) -> torch.Tensor:
        """Integrate from the picture at the lowest noise level to the noise at the highest, or back."""
        class_labels = None if labels is None else torch.tensor(labels, device=x.device)
        points = list(zip(torch.tensor(self._timesteps, device=x.device), self._angles, strict=True))
        if not forward:
            points.reverse()
        for i, ((t, angle), (s, next_angle)) in enumerate(self.progress_bar(list(itertools.pairwise(points)))):
            delta = next_angle - angle
            velocity = self._velocity(x, t, angle, class_labels)
            if not forward and i in self._recorded_steps:
                self._recorded.append((t.float(), x, math.cos(angle) * x - math.sin(angle) * velocity))
            reached = math.cos(delta) * x + math.sin(delta) * velocity
            if self._order == 2:
                reached = x + delta / 2 * (velocity + self._velocity(reached, s, next_angle, class_labels))
            x = reached
        if self._recorded:
            self._recorded.append((torch.tensor(-1.0, device=x.device), x, x))
        return x

    def _velocity(
        self, x: torch.Tensor, t: torch.Tensor, angle: float, class_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """v̂ from the model output (F9), whatever the model predicts."""
        prediction = self._evaluate(x, t, class_labels)[:, : x.shape[1]]
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return (prediction - math.sin(angle) * x) / math.cos(angle)
        if kind == "sample":
            return (math.cos(angle) * x - prediction) / math.sin(angle)
        return prediction


def spherical_mean(first: torch.Tensor, second: torch.Tensor, weight: float) -> torch.Tensor:
    """The point at a share `weight` of the way from one noise to another on the great circle between them.

    A straight mean of two noises has less variance than noise; this one has as much.
    """
    a, b = first.flatten().double(), second.flatten().double()
    cosine = (a @ b / (a.norm() * b.norm())).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if float(angle) < 1e-4:
        return torch.lerp(first, second, weight)
    of_first, of_second = torch.sin((1 - weight) * angle), torch.sin(weight * angle)
    return ((of_first * a + of_second * b) / torch.sin(angle)).float().view_as(first)


del CustomDDPMPipeline  # diffusers takes the one pipeline class that it finds in a file
