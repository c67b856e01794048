"""The tab Generate: new pictures, while they are denoised, and the Python lines that make exactly these."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..messages import quoted
from ..pipelines.pipeline_custom_ddpm import CustomDDPMPipeline
from ..sampling import sample_images
from .drawing import cancel_button, follow, on_click, result_parts
from .limits import Limits, check_request, refusal
from .settings import (
    class_field,
    guidance_field,
    labels_of,
    options_of,
    samplers_of,
    seed_field,
    steps_field,
)
from .texts import say
from .worker import STATES, Model

TAB = "generate"


@dataclass(frozen=True)
class Wish:
    """A checked request for pictures.

    Args:
        labels: one for each picture, or None.
        sampler: name of its class.
        seeds: one for each picture.
        options: further arguments of `sample_images`.
    """

    labels: list[Any] | None
    sampler: str
    seeds: list[int]
    options: dict[str, Any]


def read_wish(
    model: Model,
    limits: Limits,
    language: str,
    label: int | None,
    guidance: float,
    sampler: str,
    steps: float,
    seed: float,
    number: float,
) -> Wish:
    """The settings of the page as arguments of `sample_images`.

    Raises:
        ValueError: a setting is out of its limits.
    """
    steps, number, seed = check_request(limits, language, model.size, steps, number, seed)
    if sampler not in samplers_of(model):
        raise ValueError(f"{say(language, 'sampler')}: {sampler}")
    options = {"num_inference_steps": steps} | options_of(model, language, label, guidance)
    return Wish(labels_of(model, label, number), sampler, [seed + i for i in range(number)], options)


def python_lines(model: Model, wish: Wish) -> str:
    """A program that draws the same pictures, pixel for pixel, on the same kind of device."""
    device, sampler = model.pipeline.device.type, wish.sampler
    place = "" if device == "cpu" else f".to({quoted(device)})"
    own = type(model.pipeline.scheduler).__name__ == sampler
    labels = [quoted(each) if isinstance(each, str) else str(each) for each in wish.labels or ()]
    arguments = {"seeds": f"range({wish.seeds[0]}, {wish.seeds[-1] + 1})"}
    if labels:
        alike = len(set(labels)) == 1
        arguments["class_labels"] = f"[{labels[0]}] * {len(labels)}" if alike else f"[{', '.join(labels)}]"
    arguments |= {name: repr(value) for name, value in wish.options.items()}
    ours = sampler == "CustomDDPMScheduler"
    lines = [] if own or ours else [f"from diffusers import {sampler}", ""]
    lines += [
        f"from custom_ddpm import CustomDDPMPipeline{f', {sampler}' if ours and not own else ''}",
        f"from custom_ddpm.sampling import image_grid, sample_images{'' if own or ours else ', untuned'}",
        "",
        f"pipeline = CustomDDPMPipeline.from_pretrained({quoted(model.name)}){place}",
    ]
    config = "pipeline.scheduler.config" if ours else "untuned(pipeline.scheduler.config)"
    lines += [] if own else [f"pipeline.scheduler = {sampler}.from_config({config})"]
    lines += ["images = sample_images(", "    pipeline,"]
    lines += [f"    {name}={value}," for name, value in arguments.items()]
    return "\n".join([*lines, ")", 'image_grid(images).save("pictures.png")', ""])


def draw(
    model: Model, limits: Limits, language: str, stop: threading.Event, *settings: Any
) -> Iterator[tuple[Any, Any, Any, Any]]:
    """What the page shows while pictures are drawn: view, result, download, Python lines."""
    try:
        wish = read_wish(model, limits, language, *settings)
        pipeline = model.pipeline_of(CustomDDPMPipeline, wish.sampler)
    except ValueError as error:
        raise refusal(language, error) from error
    states = min(STATES, wish.options["num_inference_steps"] + 1)

    def call(callback: Any) -> Any:
        watched = {"callback_on_step_end": callback, "return_trajectory": states}
        return sample_images(pipeline, wish.seeds, wish.labels, len(wish.seeds), **wish.options, **watched)

    lines = python_lines(model, wish)
    for shown in follow(model, limits, language, stop, call):
        yield *shown, gr.update(value=lines, visible=True)


def tab(language: str, model: Model, limits: Limits) -> None:
    """The fields of the tab, and what its buttons do."""
    most = limits.pictures_of(model.size)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            label = class_field(model, language, all_classes=True)
            number = gr.Slider(1, max(2, most), value=min(9, most), step=1, label=say(language, "number"), buttons=[])
            steps = steps_field(language, limits)
            guidance = guidance_field(model, language)
            names = samplers_of(model)
            sampler = gr.Dropdown(names, value=names[0], label=say(language, "sampler"), filterable=False)
            seed = seed_field(language)
            with gr.Row():
                button = gr.Button(say(language, "draw"), variant="primary", elem_id=f"draw-{TAB}-{language}")
                place = gr.Column(min_width=100)
        with gr.Column(scale=2, min_width=280):
            view, result, download = result_parts(language)
            lines = gr.Code(
                language="python",
                label=say(language, "lines"),
                interactive=False,
                visible=False,
                show_line_numbers=False,
                wrap_lines=True,
            )

    def on_draw(stop: threading.Event, *settings: Any) -> Iterator[tuple[Any, Any, Any, Any]]:
        yield from draw(model, limits, language, stop, *settings)

    outputs = [view, result, download, lines]
    on_click(button, language, TAB, on_draw, [label, guidance, sampler, steps, seed, number], outputs)
    with place:
        cancel_button(language, TAB, view)
