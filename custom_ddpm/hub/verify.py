"""Verification of a model repository before its code is run with `trust_remote_code=True`.

Names, code files and configs are checked without running or unpickling anything. A push makes the same checks.
"""

import inspect
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import diffusers
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from .. import pipelines, scheduler, schedules, unet
from .._version import __version__
from ..messages import one_line
from .errors import NETWORK_ERRORS, HubError, failure_reason

PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
CODE = (".dll", ".dylib", ".ipynb", ".py", ".pyc", ".pyd", ".sh", ".so")
MAX_READ = 32 * 2**20  # bytes
MAX_PARAMETERS = 5e10
MAX_VALUES = {  # the largest value of a config entry; for a list, of each of its items
    "sample_size": 8192,
    "in_channels": 4096,
    "out_channels": 4096,
    "block_out_channels": 65536,
    "layers_per_block": 256,
    "attention_head_dim": 65536,
    "norm_num_groups": 65536,
    "num_class_embeds": 10_000_000,
    "num_train_timesteps": 1_000_000,
}
MAX_LEVELS = 32


def release_code() -> dict[str, Path]:
    """The code files that a repository may hold: path in the repository -> the file of this release."""
    files = {
        "unet/unet.py": Path(inspect.getfile(unet)),
        "scheduler/scheduler.py": Path(inspect.getfile(scheduler)),
        "scheduler/schedules.py": Path(inspect.getfile(schedules)),
    }
    return files | {path.name: path for path in Path(inspect.getfile(pipelines)).parent.glob("pipeline_*.py")}


def verify_repository(repo_or_folder: str | Path, revision: str | None = None, token: str | None = None) -> list[str]:
    """Find what makes a repository unsafe to load with `trust_remote_code=True`.

    Reported are: code that differs from this release's file by a single byte or is not part of the release; pickles;
    names and links that point outside the repository; a model_index.json that names other classes; configs with
    implausible sizes. Nothing is run or unpickled, and from the Hub only the code and JSON files are downloaded.

    Args:
        repo_or_folder: a folder, or "user/model" on the Hub.
        revision: branch, tag or commit on the Hub.
        token: access token; None uses the one logged in with.

    Returns:
        The problems, one line each; empty if there are none.

    Raises:
        ValueError: neither a folder nor a valid repository name.
        HubError: the Hub or the connection to it failed.
    """
    if Path(repo_or_folder).is_dir():
        return _folder_problems(Path(repo_or_folder).resolve())

    repo_id = str(repo_or_folder)
    validate_repo_id(repo_id)
    api = HfApi(token=token or None, library_name="custom-ddpm", library_version=__version__)
    with tempfile.TemporaryDirectory(prefix="verify-") as downloaded:
        try:
            info = api.model_info(repo_id, revision=revision, files_metadata=True)
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
            for name in filter(_is_read, sizes):
                if sizes[name] <= MAX_READ:
                    api.hf_hub_download(repo_id, name, revision=info.sha, local_dir=downloaded)
        except NETWORK_ERRORS as error:
            raise HubError(f"{repo_id} could not be verified: {failure_reason(error)}") from error
        return find_problems(sizes, Path(downloaded))


def find_problems(sizes: Mapping[str, int], folder: Path) -> list[str]:
    """Find the problems of a pipeline's files, one line each.

    Args:
        sizes: path in the repository -> size in bytes, of every file.
        folder: holds the code and JSON files among them that are not larger than `MAX_READ`; the others may be absent.
    """
    problems = []
    code = release_code()
    for name, size in sizes.items():
        suffix = PurePosixPath(name).suffix.lower()
        if _points_outside(name):
            problems.append(f"{name!r} points outside the repository")
        elif suffix in PICKLES:
            problems.append(f"{name} is a pickle, which can run code when it is loaded")
        elif suffix in CODE and name not in code:
            problems.append(f"{name} is code that is not part of custom-ddpm {__version__}")
        elif _is_read(name) and size > MAX_READ:
            problems.append(f"{name} has {size} bytes; at most {MAX_READ} are allowed")
        elif suffix in CODE and (folder / name).read_bytes() != code[name].read_bytes():
            problems.append(
                f"{name} differs from the file of custom-ddpm {__version__}, which "
                "CustomDDPMPipeline.save_pretrained writes"
            )
        elif suffix == ".json":
            try:
                config = json.loads((folder / name).read_bytes())
            except (ValueError, RecursionError) as error:
                problems.append(f"{name} is not JSON: {one_line(error)}")
                continue
            check = _index_problems if name == "model_index.json" else _config_problems
            problems += [f"{name}: {problem}" for problem in check(config)]
    if "model_index.json" not in sizes:
        problems.append("model_index.json is missing, so this is not a pipeline")
    return problems


def _folder_problems(folder: Path) -> list[str]:
    """The problems of a local folder, links that point outside it included."""
    # A snapshot in the Hub's cache consists of links to the blobs next to it.
    allowed = folder.parent.parent if folder.parent.name == "snapshots" else folder
    sizes, problems = {}, []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.resolve().is_relative_to(allowed):
            problems.append(f"{name} is a link that points outside the folder")
        elif path.is_file():
            sizes[name] = path.stat().st_size
    return problems + find_problems(sizes, folder)


def _is_read(name: str) -> bool:
    """Whether the content of a file is checked; of other files only the name is."""
    return not _points_outside(name) and (name.lower().endswith(".json") or name in release_code())


def _points_outside(name: str) -> bool:
    return name.startswith("/") or "\\" in name or ":" in name or ".." in PurePosixPath(name).parts


def _index_problems(index: Any) -> Iterator[str]:
    """Classes in model_index.json that are not allowed: diffusers would import other code for them."""
    if not isinstance(index, dict):
        yield "it is not a mapping"
        return
    yield from _auto_map_problems(index)
    own_classes = {
        "unet": [unet.__name__.rpartition(".")[2], unet.CustomUNet2DModel.__name__],
        "scheduler": [scheduler.__name__.rpartition(".")[2], scheduler.CustomDDPMScheduler.__name__],
    }
    for key, value in {"_class_name": None, **index}.items():
        if key == "_class_name" and isinstance(value, str):
            known = hasattr(diffusers, value)
        elif key == "_class_name":
            known = isinstance(value, list) and len(value) == 2 and f"{value[0]}.py" in release_code()
        elif isinstance(value, list):
            stock = len(value) == 2 and value[0] == "diffusers" and hasattr(diffusers, str(value[1]))
            known = stock or value == own_classes.get(key)
        else:
            continue
        if not known:
            yield f"{key} is {value!r}, which is a class of neither custom-ddpm nor diffusers"


def _auto_map_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """An auto_map other than the one that `CustomDDPMPipeline.save_pretrained` writes."""
    own = {"AutoModel": f"{unet.__name__.rpartition('.')[2]}.{unet.CustomUNet2DModel.__name__}"}
    if config.get("auto_map", own) != own:
        yield "auto_map names code to load"


def _config_problems(config: Any) -> Iterator[str]:
    """Entries of a config file that load other code or other files, or give implausible sizes."""
    if not isinstance(config, dict):
        return
    yield from _auto_map_problems(config)
    shards = config.get("weight_map")
    for shard in sorted({str(shard) for shard in shards.values()} if isinstance(shards, dict) else ()):
        if _points_outside(shard):
            yield f"weight_map points outside the repository, to {shard!r}"
    for key, largest in MAX_VALUES.items():
        values = config.get(key)
        for value in values if isinstance(values, list) else [] if values is None else [values]:
            if not (isinstance(value, int) and 0 < value <= largest):
                yield f"{key} is {values!r}; it must be at least 1 and at most {largest}"[:200]
                return
    channels = config.get("block_out_channels")
    channels = channels if isinstance(channels, list) else []
    layers = config.get("layers_per_block")
    # Two 3x3 convolutions in each residual block, in the encoder and in the decoder.
    parameters = sum(4 * 9 * (layers if isinstance(layers, int) else 1) * width**2 for width in channels)
    if len(channels) > MAX_LEVELS or parameters > MAX_PARAMETERS:
        yield f"implausible size: layers_per_block {layers} with block_out_channels {channels!r}"[:200]
