"""The one door for saved models: read and judged before anything of them is built or sent.

`CustomDDPMPipeline.from_pretrained`, and through it every command and `--init_from`, opens models with `open_model`; a
push and a verification judge theirs with `judge_model`. No code of the folder is run and no pickle is read.
"""

import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.utils import HfHubHTTPError, validate_repo_id
from safetensors import SafetensorError, safe_open

from ..messages import one_line, shown, shown_value
from ..scheduler import CustomDDPMScheduler
from ..unet import CustomUNet2DModel
from .errors import NETWORK_ERRORS, failure_reason
from .settings import MAX_READ, component_class, config_problem, index_problem, read_json

WEIGHTS = "diffusion_pytorch_model"
FLOATS = ("F64", "F32", "F16", "BF16")
# Names of the attention's weights before diffusers 0.13, which it still renames when it loads one file.
FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
CONFIG_FILES = {"unet": "config.json", "scheduler": "scheduler_config.json"}


class ModelError(OSError, ValueError):
    """A model folder or repository is not there, or cannot be used; the message is one line that names the file.

    It is both an `OSError` and a `ValueError`, as diffusers raises either.
    """


@dataclass
class ModelFolder:
    """A model folder as it was judged.

    Args:
        folder: the folder, or the snapshot of the repository in the cache.
        source: folder or name of the repository, as the caller gave it.
        sizes: name -> bytes of its files; None for what is not a regular file.
    """

    folder: Path
    sizes: Mapping[str, int | None]
    index: dict[str, Any] = field(default_factory=dict)
    classes: dict[str, Any] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    scheduler: Any = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of the U-Net's tensors, by its configuration
    weights: list[str] = field(default_factory=list)
    source: str = ""
    judged: set[str] = field(default_factory=set)  # the JSON files that have been judged
    problems: list[str] = field(default_factory=list)  # one line each, beginning with the file's name

    def place(self, name: str) -> str:
        """Where a component's files are: "unet/", or "" in repositories that are older than these folders."""
        return f"{name}/" if any(file.startswith(f"{name}/") for file in self.sizes) else ""

    def has(self, name: str) -> bool:
        """Whether there is a regular file of this name that is not too large to be read; notes a problem if not."""
        if name not in self.sizes:
            self.problems.append(f"{name} is missing")
        elif (size := self.sizes[name]) is None:
            self.problems.append(f"{name} is not a regular file")
        elif size > MAX_READ and not name.endswith(".safetensors"):
            self.problems.append(f"{name} has {size} bytes; at most {MAX_READ} are allowed")
        else:
            return True
        return False

    def json(self, name: str) -> dict[str, Any] | None:
        """The mapping in a JSON file; None, with the problem noted, if it cannot be had."""
        self.judged.add(name)
        if not self.has(name):
            return None
        try:
            content = read_json(self.folder / name)
        except ValueError as error:
            self.problems.append(f"{name} {error}")
            return None
        if not isinstance(content, dict):
            self.problems.append(f"{name} is {shown_value(content)}, which is not a mapping")
            return None
        return content


def open_model(
    source: str | os.PathLike, skip: Sequence[str] = (), variant: str | None = None, **hub_options: Any
) -> ModelFolder:
    """Read and judge a model before it is built.

    From the Hub, the JSON files are downloaded and judged first, and then the weights.

    Args:
        source: a folder, or "user/model" on the Hub.
        skip: "unet" or "scheduler", if the caller has one already.
        variant: of the weights, such as "fp16".
        **hub_options: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

    Returns:
        The folder; its `classes` and `scheduler` are what to load its `folder` with.

    Raises:
        ModelError: it is not there, or something is wrong with it.
    """
    text, is_folder = shown(os.fspath(source), 300) or "''", False
    try:
        is_folder = os.fspath(source) != "" and Path(source).is_dir()
        if is_folder:
            model = judge_model(Path(source), local_sizes(Path(source)), skip, variant)
        elif os.fspath(source) != "" and Path(source).exists():
            raise ModelError(f"{text} is not a folder, so it holds no pipeline")
        else:
            validate_repo_id(str(source))
            model = _open_repository(str(source), skip, variant, **hub_options)
    except ModelError:
        raise
    except HfHubHTTPError as error:
        raise ModelError(f"{text} cannot be read: {failure_reason(error)}") from error
    except ValueError as error:  # by `validate_repo_id`, or a NUL in the path
        raise ModelError(f"{text} is neither a folder nor the name of a repository (user/model)") from error
    except NETWORK_ERRORS as error:
        reason = one_line(error) if is_folder else failure_reason(error)
        raise ModelError(f"{text} cannot be read: {shown(reason, 500)}") from error
    if model.problems:
        raise ModelError(f"{text} cannot be loaded: {'; '.join(model.problems[:3])}")
    model.source = os.fspath(source)
    return model


def local_sizes(folder: Path) -> dict[str, int | None]:
    """The files of a folder where a pipeline has any: name -> bytes; None for what is not a regular file."""
    sizes: dict[str, int | None] = {}
    for place in ("", "unet/", "scheduler/"):
        if place and not (folder / place).is_dir():
            continue
        for entry in os.scandir(folder / place):
            try:
                status = entry.stat()
            except OSError:  # a broken link, or a loop of links
                sizes[f"{place}{entry.name}"] = None
                continue
            if not stat.S_ISDIR(status.st_mode):
                sizes[f"{place}{entry.name}"] = status.st_size if stat.S_ISREG(status.st_mode) else None
    return sizes


def _open_repository(repo_id: str, skip: Sequence[str], variant: str | None, **options: Any) -> ModelFolder:
    """`open_model` for a repository: into the Hub's cache, or from there without a connection."""
    where: dict[str, Any] = {name: options.get(name) for name in ("token", "cache_dir")}
    revision = options.get("revision")
    local: dict[str, Any] = {"revision": revision, "cache_dir": where["cache_dir"], "local_files_only": True}
    if options.get("local_files_only"):
        folder = Path(snapshot_download(repo_id, **local))
        return judge_model(folder, local_sizes(folder), skip, variant)
    try:
        info = HfApi(token=where["token"]).model_info(repo_id, revision=revision, files_metadata=True)
    except HfHubHTTPError:
        raise
    except NETWORK_ERRORS as failed:
        try:
            folder = Path(snapshot_download(repo_id, **local))
        except NETWORK_ERRORS:
            raise failed from None
        return judge_model(folder, local_sizes(folder), skip, variant)

    sizes: dict[str, int | None] = {file.rfilename: file.size or 0 for file in info.siblings or []}
    model = ModelFolder(Path(), sizes)
    if not model.has("model_index.json"):
        return model
    where["force_download"] = options.get("force_download", False)
    # A download by branch also notes in the cache which commit the branch was at, for work without a connection.
    folder = Path(hf_hub_download(repo_id, "model_index.json", revision=revision, **where)).parent
    if folder.name != info.sha:
        raise ModelError(f"{repo_id} changed while it was read; try again")
    files = [f"{model.place(name)}{file}" for name, file in CONFIG_FILES.items()]
    files += [f"{model.place('unet')}{name}" for name in _index_names(variant)]
    for name in files:
        if name in sizes and model.has(name):
            hf_hub_download(repo_id, name, revision=info.sha, **where)
    model = judge_model(folder, sizes, skip, variant, weights_are_here=False)
    if not model.problems:
        for name in model.weights:
            hf_hub_download(repo_id, name, revision=info.sha, **where)
        _judge_weights(model)
    return model


def judge_model(
    folder: Path,
    sizes: Mapping[str, int | None],
    skip: Sequence[str] = (),
    variant: str | None = None,
    weights_are_here: bool = True,
) -> ModelFolder:
    """Judge a model's files: index, configurations, and names, shapes and types of the weights.

    What the configurations describe is built without memory for the weights (on the device "meta"), and compared with
    the headers of the safetensors files.

    Args:
        folder: holds the JSON files that are not larger than `MAX_READ`, and the weights if they are here.
        sizes: name -> bytes of the model's files; None for what is not a regular file.
        skip, variant: see `open_model`.
        weights_are_here: False if only the names and sizes of the weights are known.
    """
    model = ModelFolder(folder, sizes)
    if "model_index.json" not in sizes:
        model.problems.append("model_index.json is missing, so this is not a pipeline")
        return model
    index = model.json("model_index.json")
    if index is not None and (problem := index_problem(index, skip)):
        model.problems.append(f"model_index.json: {problem}")
        index = None
    model.index = index or {}
    for name in CONFIG_FILES:
        if name not in skip:
            own = CustomUNet2DModel if name == "unet" else CustomDDPMScheduler
            model.classes[name] = component_class(name, model.index.get(name)) or own
            _judge_component(model, name)
    if model.problems:
        return model
    if "unet" not in skip:
        _judge_together(model)
        model.weights = _weights_files(model, variant)
        if model.weights and weights_are_here:
            _judge_weights(model)
        elif model.weights:
            _judge_weights_size(model)
    return model


def _judge_component(model: ModelFolder, name: str) -> None:
    """Read and judge the configuration of the U-Net or of the scheduler, and build what it describes."""
    file, cls = f"{model.place(name)}{CONFIG_FILES[name]}", model.classes[name]
    config = model.json(file)
    if config is None:
        return
    if problem := config_problem(name, config, cls):
        model.problems.append(f"{file}: {problem}"[:290])
        return
    model.configs[name] = config
    settings = {key: value for key, value in config.items() if key != "auto_map"}
    try:
        if name == "unet":
            with torch.device("meta"):
                unet = CustomUNet2DModel.from_config(settings)
            model.shapes = {key: tuple(tensor.shape) for key, tensor in unet.state_dict().items()}
        else:
            scheduler = cls.from_config(settings)
            stock = cls is DDPMScheduler
            model.scheduler = CustomDDPMScheduler.from_config(scheduler.config) if stock else scheduler
            betas = getattr(model.scheduler, "betas", None)
            if isinstance(betas, torch.Tensor) and not ((betas >= 0) & (betas <= 1)).all():
                raise ValueError(f"its betas run from {betas.min():g} to {betas.max():g}; each must be in [0, 1]")
    except Exception as error:
        # Settings that pass the checks above but do not go together end in any exception of diffusers' constructors.
        model.problems.append(f"{file} describes no {cls.__name__}: {one_line(error)}"[:290])


def _judge_together(model: ModelFolder) -> None:
    """Whether index, U-Net and scheduler fit each other."""
    unet, place = model.configs["unet"], f"{model.place('unet')}config.json"
    classes = unet.get("num_class_embeds")
    if any(int(label) >= (classes or 0) for label in model.index.get("id2label") or {}):
        model.problems.append(f"model_index.json: id2label has labels for which {place} has no class: {classes}")
    if model.scheduler is not None:
        channels, outs = unet.get("in_channels", 3), unet.get("out_channels", 3)
        learned = str(model.scheduler.config.get("variance_type")).startswith("learned")
        if outs not in {True: (2 * channels,), False: (channels,)}[learned] and not (
            outs == 2 * channels and not isinstance(model.scheduler, CustomDDPMScheduler)
        ):
            needed = f"{channels * (1 + learned)}" + (" with a learned variance" if learned else "")
            model.problems.append(f"{place}: out_channels is {outs}; for in_channels {channels} it must be {needed}")


def _index_names(variant: str | None) -> list[str]:
    """The names that diffusers looks for when weights are in several files, in its order."""
    name = f"{WEIGHTS}.safetensors.index"
    return [f"{name}.{variant}.json", f"{WEIGHTS}.safetensors.{variant}.index.json"] if variant else [f"{name}.json"]


def _weights_files(model: ModelFolder, variant: str | None) -> list[str]:
    """The safetensors files of the U-Net; empty, with the problem noted, if there are none."""
    place = model.place("unet")
    index = next((name for name in _index_names(variant) if place + name in model.sizes), None)
    names = [f"{WEIGHTS}.{variant}.safetensors" if variant else f"{WEIGHTS}.safetensors"]
    if index is not None:
        content = model.json(place + index)
        if content is None:
            return []
        shards = content.get("weight_map")
        if not (isinstance(shards, dict) and shards and isinstance(content.get("metadata"), dict)):
            model.problems.append(f"{place}{index} has no weight_map or no metadata")
            return []
        for shard in shards.values():
            if not (isinstance(shard, str) and re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard)):
                model.problems.append(f"{place}{index}: weight_map names {shown_value(shard)}, which is no such file")
                return []
        names = sorted(set(shards.values()))
        if set(shards) != set(model.shapes):
            odd = sorted(set(shards) ^ set(model.shapes))[0]
            model.problems.append(f"{place}{index}: weight_map does not fit the configuration, such as {shown(odd)}")
            return []
    elif place + names[0] not in model.sizes:
        pickles = [name for name in model.sizes if PurePosixPath(name).match(f"{place}{WEIGHTS}*.bin")]
        hint = f"; {shown(pickles[0])} is a pickle, which is not read" if pickles else ""
        model.problems.append(f"{place}{names[0]} is missing: there are no safetensors weights{hint}")
        return []
    return [place + name for name in names] if all([model.has(place + name) for name in names]) else []


def _judge_weights_size(model: ModelFolder) -> None:
    """Whether files of these sizes can hold the tensors; their content is not here."""
    needed = sum(torch.Size(shape).numel() for shape in model.shapes.values()) * 2  # bytes of half precision
    size = sum(model.sizes[name] or 0 for name in model.weights)
    if size < needed:
        model.problems.append(f"{model.weights[0]}: the weights have {size} bytes, the configuration needs {needed}")


def _judge_weights(model: ModelFolder) -> None:
    """Compare the headers of the weights with the shapes that the configuration implies."""
    found: dict[str, tuple[int, ...]] = {}
    for name in model.weights:
        try:
            with (model.folder / name).open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
            if length > MAX_READ:
                raise ValueError(f"its header of {length} bytes is too long")
            with safe_open(model.folder / name, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118
                    tensor = weights.get_slice(key)
                    if tensor.get_dtype() not in FLOATS:
                        raise ValueError(f"{shown(key)} is of type {tensor.get_dtype()}, not of floating point")
                    found[key] = tuple(tensor.get_shape())
        except (OSError, ValueError, SafetensorError, OverflowError) as error:
            model.problems.append(f"{name} cannot be read: {one_line(error)}"[:290])
            return
    first = model.weights[0]
    if len(model.weights) == 1:
        found = {_current_name(key): shape for key, shape in found.items()}
    for words, keys in (
        ("lacks", model.shapes.keys() - found.keys()),
        ("has beside the model's tensors", found.keys() - model.shapes.keys()),
    ):
        if keys:
            model.problems.append(f"{first} {words} {len(keys)} tensors, such as {shown(min(keys))}")
            return
    for key, shape in model.shapes.items():
        if found[key] != shape:
            model.problems.append(f"{first}: {key} has shape {found[key]}, the configuration needs {shape}")
            return


def _current_name(key: str) -> str:
    path = key.split(".")
    if len(path) > 2 and path[-3].isdigit() and path[-2] in FORMER_NAMES:
        path[-2] = FORMER_NAMES[path[-2]]
    return ".".join(path)


def load_unet(model: ModelFolder, **options: Any) -> tuple[CustomUNet2DModel, dict[str, Any]]:
    """The U-Net of a judged folder; `UNet2DModel` is converted.

    Args:
        model: as `open_model` returns it.
        **options: of `ModelMixin.from_pretrained`, such as `torch_dtype`.

    Returns:
        The U-Net; the loading info of `ModelMixin.from_pretrained`.
    """
    cls = model.classes["unet"]
    folder = model.folder / model.place("unet")
    try:
        unet, info = cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    except SafetensorError as error:
        raise ModelError(f"{shown(str(folder), 300)} cannot be read: {one_line(error)}") from error
    unet = CustomUNet2DModel.from_diffusers(unet) if cls is UNet2DModel else unet
    unet.register_to_config(_name_or_path=model.source)  # not the folder of the cache
    return unet, info
