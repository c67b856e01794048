"""`CustomDDPMImg2ImgPipeline`: variations of a picture, noised to a strength and denoised (SDEdit).

`DiffusionPipeline.from_pretrained(model, custom_pipeline=...)` loads it, given this file, or only its name where it is
saved with the model. It needs pipeline_custom_ddpm.py and pictures.py beside it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils.torch_utils import randn_tensor

from .pictures import read_pictures
from .pipeline_custom_ddpm import CustomDDPMPipeline, CustomDDPMPipelineOutput, _check_generator, _count_images

# Their first step needs predictions that are made at the beginning of the chain only.
_FROM_THE_BEGINNING = ("PNDMScheduler",)


class CustomDDPMImg2ImgPipeline(CustomDDPMPipeline):
    """Pipeline for variations of a picture (SDEdit, Meng et al. 2021, arXiv:2108.01073).

    Args:
        unet, scheduler, id2label: as of `CustomDDPMPipeline`; of this package or of diffusers.
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: PIL.Image.Image | np.ndarray | torch.Tensor | Sequence,
        strength: float = 0.5,
        class_labels: int | str | Sequence[int] | Sequence[str] | np.ndarray | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int | None = None,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_interval: tuple[float, float] | None = None,
        return_trajectory: bool | int | Sequence[int] = False,
    ) -> CustomDDPMPipelineOutput | tuple:
        """Noise pictures to x_t (F9), t at a share `strength` of the steps, and denoise them from there (S1).

        Args:
            image: one picture or several: PIL of any mode, NumPy (H, W), (H, W, C) or (B, H, W, C), torch (H, W),
                (C, H, W) or (B, C, H, W); uint8, or floating point in [0, 1]. Resized to the model's size as in
                training. One picture is used for all labels.
            strength: share of the steps that are done, in (0, 1]: near 0 the picture stays as it is, 1 is a new one.
            num_inference_steps: steps of the whole chain, of which `strength` are done; None for all T.
            class_labels, guidance_scale, eta, generator, output_type, return_dict, callback_on_step_end,
                callback_on_step_end_tensor_inputs, guidance_interval, return_trajectory: as of `CustomDDPMPipeline`.

        Returns:
            `CustomDDPMPipelineOutput`.

        Raises:
            ValueError: an argument does not match the model, the scheduler or another argument.
        """
        self._check_arguments(output_type, guidance_scale, num_inference_steps, eta, callback_on_step_end_tensor_inputs)
        pictures = read_pictures(image, self.unet.config.in_channels, self._picture_size())
        class_labels, count = _count_images(class_labels, None, 1)
        count = max(count, len(pictures))
        if len(pictures) not in (1, count):
            raise ValueError(f"there are {len(pictures)} pictures for {count} class_labels; give one, or one per label")
        _check_generator(generator, count)
        labels = self._check_labels(class_labels, count, guidance_scale)
        call = self._begin(guidance_scale, num_inference_steps, guidance_interval, eta)
        call._begin_at(strength)
        call._record(return_trajectory)
        pictures = pictures.to(self._execution_device).expand(count, -1, -1, -1)
        noise = randn_tensor(pictures.shape, generator=generator, device=pictures.device, dtype=torch.float32)
        first = call.scheduler.timesteps[call._start : call._start + 1]
        latents = call.scheduler.add_noise(pictures, noise, first)
        options = call._step_options(eta, generator)
        latents = call._denoise(latents, labels, options, callback_on_step_end, callback_on_step_end_tensor_inputs)
        return self._end(call, self._to_output(latents, output_type), return_dict)

    def _begin_at(self, strength: float) -> None:
        """Leave out the steps before the last `strength` of them."""
        scheduler, name = self.scheduler, type(self.scheduler).__name__
        if not 0 < strength <= 1:
            raise ValueError(f"strength is {strength}; it must be more than 0 and at most 1")
        if name in _FROM_THE_BEGINNING or float(scheduler.timesteps[0]) < float(scheduler.timesteps[-1]):
            raise ValueError(f"{name} cannot begin at a noised picture; use another scheduler, such as DDIMScheduler")
        n = scheduler.num_inference_steps
        steps = round(n * strength)
        if steps == 0:
            raise ValueError(f"strength {strength} of {n} steps is less than one step; raise it or num_inference_steps")
        # Schedulers of second order have each timestep but the first twice.
        self._start = (n - steps) * getattr(scheduler, "order", 1)
        self._num_timesteps = len(scheduler.timesteps) - self._start
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self._start)
        self._check_timesteps(drawn=False)


del CustomDDPMPipeline  # diffusers takes the one pipeline class that it finds in a file
