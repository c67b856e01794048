"""What the JSON files of a model folder may hold: classes, types and sizes, judged before anything is built."""

import inspect
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
from diffusers import SchedulerMixin, UNet2DModel

from ..messages import one_line, shown, shown_value
from ..scheduler import CustomDDPMScheduler
from ..unet import CustomUNet2DModel

MAX_READ = 32 * 2**20  # bytes of a JSON or code file, and of the header of a file of weights
MAX_PARAMETERS = 5e10
MAX_LEVELS = 32
MAX_BLOCKS = 2000  # residual blocks of a U-Net
MAX_NUMBER = 1_000_000  # whole number of any other setting; numbers in a list
MAX_WHOLE = 2**53  # whole numbers in place of fractions: those that are exact as such
MAX_REAL = 1e38  # fractions: what float32 can hold
MAX_VALUES = {  # the largest value of a setting of the U-Net; for a list, of each of its items
    "sample_size": 8192,
    "in_channels": 4096,
    "out_channels": 4096,
    "block_out_channels": 65536,
    "layers_per_block": 256,
    "attention_head_dim": 65536,
    "norm_num_groups": 65536,
    "attn_norm_num_groups": 65536,
    "num_class_embeds": 10_000_000,
    "patch_size": 64,
    "num_train_timesteps": MAX_NUMBER,
}
OWN_CODE = {
    "unet": ("unet", CustomUNet2DModel.__name__),
    "scheduler": ("scheduler", CustomDDPMScheduler.__name__),
}
PIPELINE_CLASSES = ("CustomDDPMPipeline", "DDPMPipeline", "DDIMPipeline")
OWN_PIPELINES = [
    ["pipeline_custom_ddpm", "CustomDDPMPipeline"],
    ["pipeline_custom_ddpm_img2img", "CustomDDPMImg2ImgPipeline"],
    ["pipeline_custom_ddpm_inpaint", "CustomDDPMInpaintPipeline"],
    ["pipeline_custom_ddpm_interpolate", "CustomDDPMInterpolationPipeline"],
]


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: the file cannot be read, is too large or is not JSON; without its name.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_READ + 1)
        if len(data) > MAX_READ:
            raise ValueError(f"more than {MAX_READ} bytes")
        return json.loads(data.decode("utf-8"))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {one_line(error)}"[:200]) from error


def component_class(place: str, entry: Any) -> type | None:
    """The class that model_index.json names for "unet" or "scheduler"; None if none such may stand there.

    Args:
        place: "unet" or "scheduler".
        entry: [library, class]. For the U-Net ours or `UNet2DModel`; for the scheduler ours or a scheduler of
            `diffusers.schedulers` that can be loaded here.
    """
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(item, str) for item in entry)):
        return None
    library, name = entry
    module, own = OWN_CODE[place]
    if name == own and library in (module, "custom_ddpm", f"custom_ddpm.{module}"):
        return CustomUNet2DModel if place == "unet" else CustomDDPMScheduler
    if library != "diffusers":
        return None
    if place == "unet":
        return UNet2DModel if name == UNet2DModel.__name__ else None
    return stock_scheduler(name)


def stock_scheduler(name: str) -> type | None:
    """The class of diffusers' schedulers module of this name that can drive a pipeline; None if there is none."""
    try:
        found = getattr(diffusers.schedulers, name)
    except Exception:  # the module imports on access, so this is any failure of a dependency
        return None
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin) and found is not SchedulerMixin):
        return None
    usable = all(hasattr(found, method) for method in ("set_timesteps", "scale_model_input", "step"))
    return found if usable and found.__module__.startswith("diffusers.schedulers.") else None


def index_problem(index: Mapping[str, Any], skip: Sequence[str] = ()) -> str | None:
    """What is wrong in model_index.json: a class that may not stand there, a missing component, odd names of classes.

    Args:
        index: content of the file.
        skip: components that are not asked for.
    """
    name = index.get("_class_name")
    if not (name in PIPELINE_CLASSES if isinstance(name, str) else name in OWN_PIPELINES):
        return f"_class_name is {shown_value(name)}, which is a class of neither custom-ddpm nor diffusers for pictures"
    if not is_own_code("unet", index.get("auto_map", {})):
        return f"auto_map names other code to load: {shown_value(index['auto_map'])}"
    for key, entry in {"unet": None, "scheduler": None, **index}.items():
        if key in OWN_CODE and key not in skip and component_class(key, entry) is None:
            stock = "a UNet2DModel" if key == "unet" else "a scheduler of diffusers that can be loaded here"
            return f"{key} is {shown_value(entry)}; it must be a {OWN_CODE[key][1]} or {stock}"
        if (
            key not in OWN_CODE
            and key not in ("_class_name", "auto_map", "id2label")
            and isinstance(entry, list | dict)
        ):
            return f"{shown(key)} is {shown_value(entry)}; the pipeline has no such component"
    names = index.get("id2label")
    if names is not None and not (
        isinstance(names, dict)
        and all(re.fullmatch(r"\d{1,9}", label, re.ASCII) and isinstance(text, str) for label, text in names.items())
    ):
        return f"id2label is {shown_value(names)}; it must give the name of the class for each label"
    return None


def is_own_code(place: str, auto_map: Any) -> bool:
    """Whether an auto_map, from which AutoModel takes the file to load, names the code of this package only."""
    return isinstance(auto_map, dict) and all(value == ".".join(OWN_CODE[place]) for value in auto_map.values())


def config_problem(place: str, config: Mapping[str, Any], cls: type) -> str | None:
    """What is wrong in the configuration of a component: other code, wrong types, implausible sizes.

    Args:
        place: "unet" or "scheduler".
        config: content of the file.
        cls: class that it is for; the types are those of its constructor.
    """
    if not is_own_code(place, config.get("auto_map", {})):
        return f"auto_map names other code to load: {shown_value(config['auto_map'])}"
    name = config.get("_class_name", OWN_CODE[place][1])
    known = isinstance(name, str) and component_class(place, ["diffusers", name]) is not None
    if name != OWN_CODE[place][1] and not known:
        return f"_class_name is {shown_value(name)}, which is no class for the {place}"
    parameters = _parameters(cls)
    for key, value in config.items():
        if key in ("auto_map", "_class_name"):
            continue
        problem = size_problem(key, value)
        if problem is None and key in parameters:
            default, hint = parameters[key]
            same = value == default and isinstance(value, bool) == isinstance(default, bool)  # True == 1
            if not (same or _fits(value, hint)):
                problem = f"{key} is {shown_value(value)}; it must be {_hint_text(hint)}"
        elif problem is None and not _is_harmless(key, value):
            problem = f"{shown(key)} is {shown_value(value)}, which is no setting of {cls.__name__}"
        if problem is not None:
            return problem
    return _total_problem(config) if place == "unet" else None


def size_problem(key: str, values: Any) -> str | None:
    """Whether a setting that is a size lies out of its range; other settings and None have no problem."""
    largest = MAX_VALUES.get(key)
    if largest is None or values is None:
        return None
    for value in values if isinstance(values, list) else [values]:
        if not (isinstance(value, int) and not isinstance(value, bool) and 0 < value <= largest):
            return f"{key} is {shown_value(values)}; it must be a whole number, at least 1 and at most {largest}"
    return None


def _total_problem(config: Mapping[str, Any]) -> str | None:
    """Whether the U-Net as a whole is implausibly large."""
    channels, layers = config.get("block_out_channels", []), config.get("layers_per_block", 2)
    # Two 3x3 convolutions in each residual block, in the encoder and in the decoder.
    parameters = sum(4 * 9 * layers * width**2 for width in channels)
    too_deep = len(channels) > MAX_LEVELS or len(channels) * (2 * layers + 1) > MAX_BLOCKS
    if too_deep or parameters > MAX_PARAMETERS:
        return f"implausible size: layers_per_block {layers} with block_out_channels {shown_value(channels)}"
    return None


def _parameters(cls: Any) -> dict[str, tuple[Any, Any]]:
    """Default and type of each argument of a class's constructor."""
    signature = inspect.signature(cls.__init__).parameters.values()
    return {
        each.name: (each.default, each.annotation)
        for each in signature
        if each.name != "self" and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    }


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of a type as annotated in a constructor; numbers must be finite and in range."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if value is None or hint is None or hint is type(None):
        return value is None and hint in (None, type(None), Any)
    if origin is typing.Literal:
        return isinstance(value, str)
    if isinstance(value, list):
        items = arguments or (float,)
        if origin is tuple and len(items) > 1 and items[-1] is not Ellipsis and len(items) != len(value):
            return False
        listed = hint is np.ndarray or hint in (list, tuple) or origin in (list, tuple, Sequence)
        return listed and len(value) <= MAX_NUMBER and all(_fits(item, items[0]) for item in value)
    if hint is str:
        return isinstance(value, str)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER
    if hint is float:
        return not isinstance(value, bool) and _is_number(value)
    # Some arguments of diffusers are annotated as bool and take numbers.
    return (hint is bool or hint is inspect.Parameter.empty) and _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= (MAX_WHOLE if isinstance(value, int) else MAX_REAL)


def _hint_text(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _is_harmless(key: str, value: Any) -> bool:
    """Whether a setting that the class does not have may be passed over: diffusers prints these to the log."""
    if not re.fullmatch(r"[A-Za-z_]\w{0,63}", key, re.ASCII):
        return False
    if isinstance(value, str):
        return len(value) <= 1000 and value.isprintable()
    if isinstance(value, list):
        return len(value) <= MAX_NUMBER and all(
            not isinstance(item, list) and _is_harmless("_", item) for item in value
        )
    return value is None or isinstance(value, int | float)
