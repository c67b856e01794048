"""The model card: README.md of a saved pipeline, with the metadata that the Hub reads."""

import contextlib
import getpass
import importlib.metadata
import json
import math
import platform
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from .._version import __version__
from ..messages import in_markdown, shown

TASK = "unconditional-image-generation"
STOCK_BRANCH = "diffusers"
LIBRARIES = ("torch", "diffusers", "accelerate", "datasets")
# Placeholders for what is known only at the push: the repository's name, and whether it has the stock branch. Cards
# that are on disk already hold these texts, so they must not change.
PLACE = "path/to/this/folder"
MAX_NAMES = 1000  # classes that are listed
STOCK_PLACE = "<!-- the push tells here of the branch `diffusers` -->"


def write_model_card(folder: str | Path, facts: Mapping[str, Any]) -> ModelCard:
    """Write the model card of a saved pipeline to README.md in its folder.

    The model's size, schedule and classes are read from the folder; `facts` gives the rest. A fact that is missing is
    not mentioned, and no path of this machine is written to the card.

    Args:
        folder: output of `CustomDDPMPipeline.save_pretrained`. `samples.png` and `loss_curve.png` are shown if they
            are in it.
        facts: any of these:
            license: licence of the weights, one of the Hub's identifiers.
            base_model: pipeline from which the training started: "user/model", or a path.
            dataset: "user/dataset", or a path.
            num_images: number of training images.
            recipe: training settings, name -> value.
            steps: number of optimiser steps.
            metrics: results, name -> number; they become the Hub's model-index.
            evaluation: settings of the evaluation, name -> value.
            command: command line of the training; the home folder is written as ~.

    Returns:
        The card as written.

    Raises:
        OSError, KeyError: the folder does not hold a saved pipeline.
    """
    folder = Path(folder)
    index, model, noise = (
        json.loads((folder / file).read_text(encoding="utf-8"))
        for file in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
    )
    names = index.get("id2label") or {}
    metrics = {key: value for key, value in facts.get("metrics", {}).items() if isinstance(value, int | float)}
    data = _metadata(folder, model, facts, metrics)
    paragraphs = [
        *_introduction(folder, model, noise),
        *_loading(model, names),
        *_training_data(names, facts),
        *_training(folder, facts),
        *_results(metrics, facts),
        *_limits(model, data.license),
        *_versions(facts),
    ]
    text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
    # A command or a setting may hold a token, and the card is public.
    text = re.sub(r"\bhf_[A-Za-z0-9]{16,}", "hf_***", text)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")
    card.save(folder / "README.md")
    return card


def complete_card(card: Path, repo_id: str, has_stock: bool) -> None:
    """Fill the placeholders of a card file for a push.

    Args:
        card: README.md, next to the pipeline's other files.
        repo_id: "user/model", written into the snippets.
        has_stock: whether the repository has the branch `STOCK_BRANCH`.
    """
    noise = json.loads((card.parent / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    call = f"batch_size=4, num_inference_steps={noise['num_train_timesteps']}"
    stock = (
        "As a stock `DDPMPipeline`; no remote code at all:\n\n"
        + _snippet("diffusers", "DiffusionPipeline", f'"{PLACE}", revision="{STOCK_BRANCH}"', call)
        + "\n\n"
    )
    text = card.read_text(encoding="utf-8").replace(f"{STOCK_PLACE}\n\n", stock if has_stock else "")
    card.write_text(text.replace(PLACE, repo_id), encoding="utf-8")


def _metadata(
    folder: Path, model: Mapping[str, Any], facts: Mapping[str, Any], metrics: Mapping[str, float]
) -> ModelCardData:
    """The card's YAML front matter."""
    dataset, dataset_id = public_name(facts.get("dataset"))
    _, base_model = public_name(facts.get("base_model"))
    about = dict(facts.get("evaluation", {})) or None
    results = [
        EvalResult(TASK, dataset_id or "image", dataset or "unknown", *pair, metric_args=about)
        for pair in metrics.items()
    ]
    return ModelCardData(
        license=facts.get("license") or "unknown",
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["ddpm", "custom-ddpm", *(["class-conditional"] if _by_class(model) else [])],
        datasets=dataset_id and [dataset_id],
        base_model=base_model,
        model_name=_last_name(str(folder)),
        eval_results=results or None,
    )


# Each section is a list of paragraphs, its heading first; paragraphs that are empty, None or False are left out.


def _introduction(folder: Path, model: Mapping[str, Any], noise: Mapping[str, Any]) -> list[Any]:
    kind, size = _image_format(model)
    return [
        f"# DDPM of {kind} pictures, {size}",
        f"A denoising diffusion probabilistic model ([Ho et al. 2020](https://arxiv.org/abs/2006.11239)) of {kind} "
        f"pictures, {size} pixels{', conditioned on the class' if _by_class(model) else ''}. Its U-Net has "
        f"{_count_parameters(folder / 'unet'):,} parameters and predicts "
        f"{in_markdown(str(noise.get('prediction_type', 'epsilon')))}; noise is added in "
        f"{noise['num_train_timesteps']} steps with the {in_markdown(str(noise.get('beta_schedule')))} schedule.",
        (folder / "samples.png").is_file() and "![Samples](samples.png)",
    ]


def _loading(model: Mapping[str, Any], names: Mapping[str, str]) -> list[Any]:
    call = f"class_labels={[i % len(names or [0]) for i in range(4)]}" if _by_class(model) else "batch_size=4"
    return [
        "## How to load it",
        "With diffusers alone; the code files beside the weights are run:",
        _snippet("diffusers", "DiffusionPipeline", f'"{PLACE}", trust_remote_code=True', call),
        "With the package `custom-ddpm`; no file from here is run:",
        _snippet("custom_ddpm", "CustomDDPMPipeline", f'"{PLACE}"', call),
        STOCK_PLACE,
    ]


def _training_data(names: Mapping[str, str], facts: Mapping[str, Any]) -> list[Any]:
    dataset, _ = public_name(facts.get("dataset"))
    classes = ", ".join(f"{label} ({in_markdown(text)})" for label, text in list(names.items())[:MAX_NAMES])
    classes += f" and {len(names) - MAX_NAMES:,} more" * (len(names) > MAX_NAMES)
    return [
        "## Training data",
        f"`{shown(dataset).replace('`', chr(39))}`." if dataset else "Not recorded.",
        facts.get("num_images") and f"{facts['num_images']:,} pictures.",
        classes and f"Classes: {classes}.",
    ]


def _training(folder: Path, facts: Mapping[str, Any]) -> list[Any]:
    recipe = {key: value for key, value in facts.get("recipe", {}).items() if _is_public(key, value)}
    return [
        "## Training",
        facts.get("steps") and f"{facts['steps']:,} optimiser steps.",
        recipe and _fenced("yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)),
        (folder / "loss_curve.png").is_file() and "![Loss over the training](loss_curve.png)",
    ]


def _results(metrics: Mapping[str, float], facts: Mapping[str, Any]) -> list[Any]:
    rows = ["| metric | value |", "|---|---|", *(f"| {key} | {value:.6g} |" for key, value in metrics.items())]
    evaluation = ", ".join(f"{key} {value}" for key, value in facts.get("evaluation", {}).items())
    return [
        "## Results",
        "\n".join(rows) if metrics else "Nothing was measured.",
        evaluation and f"Measured with {evaluation}.",
    ]


def _limits(model: Mapping[str, Any], license: str | None) -> list[Any]:
    kind, size = _image_format(model)
    return [
        "## Limits",
        f"It draws {size} {kind} pictures like those that it was trained on, and no others. Errors and biases of the "
        "training data appear in its pictures too; they are not filtered. A model trained for long on few pictures can "
        "reproduce some of them.",
        license == "unknown"
        and "The licence of the weights was not stated: ask who published them before you use them.",
    ]


def _versions(facts: Mapping[str, Any]) -> list[Any]:
    command = _public_command(facts.get("command", ""))
    versions = [
        f"custom-ddpm {__version__}",
        *(f"{library} {importlib.metadata.version(library)}" for library in LIBRARIES),
        f"Python {platform.python_version()}",
    ]
    return ["## How it was made", command and _fenced("bash", f"{command}\n"), f"{', '.join(versions)}."]


def _by_class(model: Mapping[str, Any]) -> bool:
    return model.get("num_class_embeds") is not None


def _image_format(model: Mapping[str, Any]) -> tuple[str, str]:
    """The images' colour mode, and their size as "HxW"."""
    size, channels = model["sample_size"], model["in_channels"]
    height, width = size if isinstance(size, list) else (size, size)
    return {1: "gray", 3: "RGB", 4: "RGBA"}.get(channels, f"{channels}-channel"), f"{height}x{width}"


def _snippet(package: str, pipeline: str, source: str, call: str) -> str:
    return (
        f"```python\nfrom {package} import {pipeline}\n\n"
        f"pipeline = {pipeline}.from_pretrained({source})\nimages = pipeline({call}).images\n```"
    )


def public_name(name: str | None) -> tuple[str | None, str | None]:
    """The name of a model or dataset without its path, and its id on the Hub (None if it is a local path)."""
    if not name:
        return None, None
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).exists():
        return name, name
    return _last_name(name), None


def _is_public(setting: str, value: Any) -> bool:
    """Whether a training setting goes on the card: not if it is unset, a path, or about output folders or the Hub."""
    place = setting.endswith(("_dir", "_from_checkpoint")) or "hub" in setting
    path = isinstance(value, str) and "/" in value and (Path(value).exists() or value.startswith(("/", "~", ".")))
    return not place and not path and value not in (None, [])


def _user_names() -> set[str]:
    """What this machine calls its user."""
    names = {Path.home().name}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a user without a name, as in some containers
        names.add(getpass.getuser())
    return names - {""}


def _last_name(path: str) -> str:
    """The name of a local file or folder without its path; not that of the user's own folder."""
    name = Path(path).name or Path(path).resolve().name
    return "local" if name in _user_names() or name.startswith("~") else name


def _public_path(path: str) -> str:
    """A path without what it tells of this machine; other text unchanged.

    The home folder is written as ~, other absolute paths as their last name, and a folder with the user's name as
    "user".
    """
    home = str(Path.home())
    if path.startswith("//") or not (path.startswith(("/", "~", ".")) or ("/" in path and Path(path).exists())):
        return path  # an address, a dataset's name, a number
    if path == home or path.startswith(f"{home}/"):
        path = "~" + path[len(home) :]
    elif path.startswith("/"):
        path = f"/path/to/{Path(path).name}"
    elif path.startswith("~"):
        path = "/".join(["~", *path.split("/")[1:]])
    return "/".join("user" if part in _user_names() else part for part in path.split("/"))


def _public_command(command: str) -> str:
    """A command line with `_public_path` in place of its paths, alone or after "=", ":" or "," in an argument."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    words = ["".join(map(_public_path, re.split(r"([=:,])", word))) for word in words]
    return " ".join(word if re.fullmatch(r"[\w@%+=:,./~-]+", word) else shlex.quote(word) for word in words)


def _fenced(language: str, text: str) -> str:
    """A block of code that the text in it cannot end: its fence is longer than any row of backticks in it."""
    longest = max((len(row) for row in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    lines = (shown(line, 2000) for line in text.splitlines())
    return "\n".join([f"{fence}{language}", *lines, fence])


def _count_parameters(folder: Path) -> int:
    """The number of parameters in a folder's safetensors files."""
    total = 0
    for path in folder.glob("diffusion_pytorch_model*.safetensors"):
        if "." in path.stem:  # a variant, such as fp16, holds the same parameters again
            continue
        with safe_open(path, framework="pt") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total
