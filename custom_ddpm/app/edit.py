"""The tab Edit: variations of a picture, inpainting with a brush, and pictures between two pictures."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
import numpy as np
import PIL.Image
import torch

from ..data.pixels import denormalise
from ..pipelines.pictures import read_pictures
from ..pipelines.pipeline_custom_ddpm_img2img import CustomDDPMImg2ImgPipeline
from ..pipelines.pipeline_custom_ddpm_inpaint import CustomDDPMInpaintPipeline
from ..pipelines.pipeline_custom_ddpm_interpolate import CustomDDPMInterpolationPipeline
from .drawing import cancel_button, follow, on_click, result_parts
from .limits import Limits, check_request, check_value, checked_upload, refusal
from .settings import class_field, guidance_field, labels_of, options_of, seed_field, steps_field
from .texts import say
from .worker import STATES, Model

MAX_REPEATS = 20
BETWEEN_STEPS = 50
SIDE = 320  # pixels of the picture to paint on


def variations(
    model: Model, limits: Limits, language: str, picture: Any, strength: float, number: float, *settings: Any
) -> Callable[[Any], torch.Tensor]:
    """The call that draws variations of a picture; `settings` are class, guidance, steps, seed.

    Raises:
        ValueError: there is no picture, or a setting is out of its limits.
    """
    picture = _given(language, picture)
    strength = check_value(language, "strength", strength, 0.05, 1)
    labels, options, steps, seeds = _read(model, limits, language, number, *settings)
    pipeline = model.pipeline_of(CustomDDPMImg2ImgPipeline)
    pictures = [picture] * len(seeds)

    def call(callback: Any) -> torch.Tensor:
        return _pixels(pipeline(pictures, strength, labels, **_watched(pipeline, seeds, steps, callback), **options))

    return call


def inpaint(
    model: Model, limits: Limits, language: str, painted: Any, repeats: float, number: float, *settings: Any
) -> Callable[[Any], torch.Tensor]:
    """The call that draws anew what is painted over; `painted` is the value of the editor."""
    if not painted or painted["background"] is None:
        raise ValueError(say(language, "no_picture"))
    repeats = round(check_value(language, "repeats", repeats, 1, MAX_REPEATS))
    labels, options, steps, seeds = _read(model, limits, language, number, *settings)
    picture, mask = _at_model_size(model, painted["background"]), _mask(model, painted["layers"])
    if mask is None:
        raise ValueError(say(language, "no_mask"))
    pipeline = model.pipeline_of(CustomDDPMInpaintPipeline)

    def call(callback: Any) -> torch.Tensor:
        given = {"jump_n_sample": repeats, "class_labels": labels, **_watched(pipeline, seeds, steps, callback)}
        return _pixels(pipeline(picture.expand(len(seeds), -1, -1, -1), mask, **given, **options))

    return call


def between(
    model: Model, limits: Limits, language: str, first: Any, second: Any, number: float, *settings: Any
) -> Callable[[Any], torch.Tensor]:
    """The call that draws pictures between two pictures; the seed has no effect."""
    pictures = [_given(language, picture) for picture in (first, second)]
    labels, options, steps, seeds = _read(model, limits, language, number, *settings)
    pipeline = model.pipeline_of(CustomDDPMInterpolationPipeline)
    labels = labels and labels[:1]

    def call(callback: Any) -> torch.Tensor:
        given = {"num_images": len(seeds), "num_inference_steps": steps, "output_type": "pt"}
        return _pixels(pipeline(pictures, class_labels=labels, return_trajectory=2, **given, **options))

    return call


def _given(language: str, picture: PIL.Image.Image | None) -> PIL.Image.Image:
    if picture is None:
        raise ValueError(say(language, "no_picture"))
    return picture


def _read(
    model: Model,
    limits: Limits,
    language: str,
    number: float,
    label: int | None,
    guidance: float,
    steps: float,
    seed: float,
) -> tuple[list[Any] | None, dict[str, Any], int, list[int]]:
    """Labels, guidance, steps and one seed per picture."""
    steps, number, seed = check_request(limits, language, model.size, steps, number, seed)
    labels = labels_of(model, label, number)
    return labels, options_of(model, language, label, guidance), steps, [seed + i for i in range(number)]


def _watched(pipeline: Any, seeds: list[int], steps: int, callback: Any) -> dict[str, Any]:
    device = pipeline._execution_device
    return {
        "num_inference_steps": steps,
        "generator": [torch.Generator(device).manual_seed(seed) for seed in seeds],
        "output_type": "pt",
        "callback_on_step_end": callback,
        "return_trajectory": STATES,
    }


def _pixels(output: Any) -> torch.Tensor:
    return denormalise(output.images * 2 - 1)


def _at_model_size(model: Model, picture: PIL.Image.Image) -> torch.Tensor:
    """A picture as the model takes it, (1, C, H, W) in [0, 1]."""
    return read_pictures(picture, model.pipeline.unet.config.in_channels, model.size) / 2 + 0.5


def _mask(model: Model, layers: list[PIL.Image.Image]) -> torch.Tensor | None:
    """Where the layers are painted on, as (1, 1, H, W) of 0 and 1 in the model's size; None if nowhere.

    A pixel of the model is drawn anew if half of it is painted.
    """
    painted = [np.asarray(layer.convert("RGBA"))[..., 3] > 0 for layer in layers]
    if not painted or not np.any(painted):
        return None
    mask = read_pictures(np.any(painted, axis=0), 1, model.size) >= 0
    return mask.float() if bool(mask.any()) else None


# ---- the tab ----


def tab(language: str, model: Model, limits: Limits) -> None:
    """Three ways to edit, each a tab of its own."""
    with gr.Tabs():
        with gr.Tab(say(language, "variations")), gr.Row(), gr.Column(scale=1, min_width=280):
            picture = _picture_field(language, limits, "picture")
            strength = gr.Slider(
                0.05,
                1,
                0.5,
                step=0.05,
                label=say(language, "strength"),
                info=say(language, "strength_info"),
                buttons=[],
            )
            _form("variations", variations, language, model, limits, [picture, strength])
        with gr.Tab(say(language, "inpaint")), gr.Row(), gr.Column(scale=1, min_width=280):
            gr.Markdown(say(language, "inpaint_info"))
            painted = _editor(language, model, limits)
            repeats = gr.Slider(
                1,
                MAX_REPEATS,
                5,
                step=1,
                label=say(language, "repeats"),
                info=say(language, "repeats_info"),
                buttons=[],
            )
            _form("inpaint", inpaint, language, model, limits, [painted, repeats])
        if limits.pictures_of(model.size) < 2:
            return
        with gr.Tab(say(language, "between")), gr.Row(), gr.Column(scale=1, min_width=280):
            ends = [_picture_field(language, limits, name) for name in ("first_picture", "second_picture")]
            _form("between", between, language, model, limits, ends)


def _picture_field(language: str, limits: Limits, name: str) -> gr.Image:
    return checked_upload(
        gr.Image(
            label=say(language, name),
            sources=["upload", "clipboard"],
            type="pil",
            image_mode=None,
            height=220,
            buttons=[],
            alt_text=say(language, name),
            elem_id=f"{name}-{language}",
        ),
        limits,
        language,
    )


def _editor(language: str, model: Model, limits: Limits) -> gr.ImageEditor:
    height, width = model.size
    scale = SIDE / max(height, width)
    return checked_upload(
        gr.ImageEditor(
            label=say(language, "picture"),
            type="pil",
            sources=["upload", "clipboard"],
            brush=gr.Brush(default_size=SIDE // 8, colors=["#f97316"], color_mode="fixed"),
            eraser=gr.Eraser(default_size=SIDE // 8),
            transforms=[],
            layers=gr.LayerOptions(allow_additional_layers=False, disabled=True),
            canvas_size=(round(width * scale), round(height * scale)),
            fixed_canvas=True,
            buttons=[],
            elem_id=f"editor-{language}",
        ),
        limits,
        language,
    )


def _form(
    name: str,
    make: Callable[..., Callable[[Any], torch.Tensor]],
    language: str,
    model: Model,
    limits: Limits,
    own: list[Any],
) -> None:
    """The settings after the form's own, its buttons, and beside them the result."""
    most = limits.pictures_of(model.size)
    first = min(8 if make is between else 4, most)
    number = gr.Slider(
        2 if make is between else 1, max(3, most), first, step=1, label=say(language, "number"), buttons=[]
    )
    label, guidance = class_field(model, language, all_classes=False), guidance_field(model, language)
    steps = steps_field(language, limits, BETWEEN_STEPS)
    seed = seed_field(language) if make is not between else gr.State(0)
    with gr.Row():
        button = gr.Button(say(language, "draw"), variant="primary", elem_id=f"draw-{name}-{language}")
        place = gr.Column(min_width=100)
    # The form stands in the left column of a row.
    column = gr.context.Context.block
    assert column is not None and column.parent is not None
    with column.parent, gr.Column(scale=2, min_width=280):
        view, result, download = result_parts(language)

    def on_draw(stop: threading.Event, *settings: Any) -> Iterator[tuple[Any, Any, Any]]:
        try:
            call = make(model, limits, language, *settings)
        except ValueError as error:
            raise refusal(language, error) from error
        yield from follow(model, limits, language, stop, call)

    inputs = [*own, number, label, guidance, steps, seed]
    on_click(button, language, name, on_draw, inputs, [view, result, download])
    with place:
        cancel_button(language, name, view)
