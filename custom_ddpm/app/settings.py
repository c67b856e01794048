"""The settings that all drawing has: class, guidance, sampler, steps, seed."""

from typing import Any

import gradio as gr

from .limits import MAX_SEED, Limits, check_value
from .texts import say
from .worker import Model

# As `custom-ddpm sample --scheduler`; after the model's own.
SAMPLERS = (
    "CustomDDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
)
ALL, NONE = -1, -2  # instead of a class
MAX_GUIDANCE = 10.0
FIRST_STEPS = 25


def samplers_of(model: Model) -> list[str]:
    """Names of samplers, the model's own first."""
    own = type(model.pipeline.scheduler).__name__
    return list(dict.fromkeys([own, *SAMPLERS]))


def class_choices(model: Model, language: str, all_classes: bool) -> list[tuple[str, int]]:
    """What the class may be: name and label; all in turn where there are several pictures; none where it is trained."""
    choices = [(name, label) for label, name in model.classes.items()]
    if all_classes:
        choices.insert(0, (say(language, "all_classes"), ALL))
    if model.guides:
        choices.append((say(language, "no_class"), NONE))
    return choices


def class_field(model: Model, language: str, all_classes: bool) -> gr.Dropdown:
    """A list of the class names; hidden for a model without classes."""
    choices = class_choices(model, language, all_classes)
    first = (NONE if model.guides and not all_classes else choices[0][1]) if choices else None
    return gr.Dropdown(choices, value=first, label=say(language, "class"), visible=bool(choices), filterable=False)


def guidance_field(model: Model, language: str) -> gr.Slider:
    """A slider for the guidance scale; hidden for a model that cannot be guided."""
    return gr.Slider(
        1.0,
        MAX_GUIDANCE,
        value=2.0 if model.guides else 1.0,
        step=0.1,
        label=say(language, "guidance"),
        info=say(language, "guidance_info"),
        visible=model.guides,
        buttons=[],
    )


def steps_field(language: str, limits: Limits, first: int = FIRST_STEPS) -> gr.Slider:
    """A slider for the number of steps."""
    return gr.Slider(2, limits.steps, value=min(first, limits.steps), step=1, label=say(language, "steps"), buttons=[])


def seed_field(language: str) -> gr.Number:
    """A field for the seed."""
    return gr.Number(
        0, precision=0, minimum=0, maximum=MAX_SEED, label=say(language, "seed"), info=say(language, "seed_info")
    )


def labels_of(model: Model, label: int | None, number: int) -> list[Any] | None:
    """A class name for each of a number of pictures, or a label where names are not unique; None for no class."""
    classes = model.classes
    if not classes or label is None or label == NONE:
        return None
    named = len(set(classes.values())) == len(classes) and model.pipeline.config.id2label
    names: list[Any] = list(classes.values()) if named else list(classes)
    if label == ALL:
        return [names[i % len(names)] for i in range(number)]
    return [names[list(classes).index(label)]] * number


def options_of(model: Model, language: str, label: int | None, guidance: float) -> dict[str, Any]:
    """`guidance_scale` of a call; empty without guidance, and where there is no class to guide to."""
    guidance = check_value(language, "guidance", guidance, 0, MAX_GUIDANCE)
    guided = model.guides and label not in (None, NONE) and guidance != 1.0
    return {"guidance_scale": guidance} if guided else {}
