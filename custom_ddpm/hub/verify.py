"""Verification of a model repository before its code is run with `trust_remote_code=True`.

Names and code files are checked here, the model itself by `folder.judge_model`; nothing is run or unpickled. A push
makes the same checks.
"""

import inspect
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from .. import pipelines, scheduler, schedules, unet
from .._version import __version__
from ..messages import one_line, shown, shown_value
from .errors import NETWORK_ERRORS, HubError, failure_reason
from .folder import ModelFolder, judge_model
from .settings import MAX_READ, is_own_code, read_json, size_problem

PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
CODE = (".dll", ".dylib", ".ipynb", ".py", ".pyc", ".pyd", ".sh", ".so")


@dataclass
class Verification:
    """What was found in a repository or folder.

    Args:
        problems: one line each, beginning with the file's name; empty if there are none.
        checked: what was checked, one line each: the code, the configurations, the weights.
    """

    problems: list[str]
    checked: list[str]


def release_code() -> dict[str, Path]:
    """The code files that a repository may hold: path in the repository -> the file of this release."""
    files = {
        "unet/unet.py": Path(inspect.getfile(unet)),
        "scheduler/scheduler.py": Path(inspect.getfile(scheduler)),
        "scheduler/schedules.py": Path(inspect.getfile(schedules)),
    }
    beside = Path(inspect.getfile(pipelines)).parent
    return files | {path.name: path for path in (*beside.glob("pipeline_*.py"), beside / "pictures.py")}


def verify_repository(repo_or_folder: str | Path, revision: str | None = None, token: str | None = None) -> list[str]:
    """Find what makes a repository unsafe to load with `trust_remote_code=True`, or impossible to load.

    Reported are: code that differs from this release's file by a single byte or is not part of the release; pickles;
    names and links that point outside the repository; what is no regular file; a model_index.json that names other
    classes or lacks one; configurations that are malformed or of implausible sizes; weights that are missing or do not
    fit the configuration. Nothing is run or unpickled. From the Hub only the code and JSON files are downloaded, so of
    the weights only names and sizes are checked.

    Args:
        repo_or_folder: a folder, or "user/model" on the Hub.
        revision: branch, tag or commit on the Hub.
        token: access token; None uses the one logged in with.

    Returns:
        The problems, one line each; empty if there are none. `verification` also tells what was checked.

    Raises:
        ValueError: neither a folder nor a valid repository name.
        HubError: the Hub or the connection to it failed.
    """
    return verification(repo_or_folder, revision, token).problems


def verification(repo_or_folder: str | Path, revision: str | None = None, token: str | None = None) -> Verification:
    """`verify_repository`, with what was checked."""
    if Path(repo_or_folder).is_dir():
        folder = Path(repo_or_folder).resolve()
        sizes, problems = _folder_files(folder)
        found = check_files(sizes, folder)
        return Verification(problems + found.problems, found.checked)

    repo_id = str(repo_or_folder)
    validate_repo_id(repo_id)
    api = HfApi(token=token or None, library_name="custom-ddpm", library_version=__version__)
    with tempfile.TemporaryDirectory(prefix="verify-") as downloaded:
        try:
            info = api.model_info(repo_id, revision=revision, files_metadata=True)
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
            for name in filter(_is_read, sizes):
                if (sizes[name] or 0) <= MAX_READ:
                    api.hf_hub_download(repo_id, name, revision=info.sha, local_dir=downloaded)
        except NETWORK_ERRORS as error:
            raise HubError(f"{repo_id} could not be verified: {failure_reason(error)}") from error
        return check_files(sizes, Path(downloaded), weights_are_here=False)


def check_files(sizes: Mapping[str, int | None], folder: Path, weights_are_here: bool = True) -> Verification:
    """Check the files of a repository: names, code, JSON files, and the model.

    Args:
        sizes: path in the repository -> size in bytes, of every file; None for what is not a regular file.
        folder: holds the code and JSON files among them that are not larger than `MAX_READ`.
        weights_are_here: whether the folder holds the weights too.
    """
    problems = []
    code = release_code()
    model = judge_model(folder, sizes, weights_are_here=weights_are_here)
    for name, size in sizes.items():
        suffix = PurePosixPath(name).suffix.lower()
        if _points_outside(name):
            problems.append(f"{shown_value(name)} points outside the repository")
        elif suffix in PICKLES:
            problems.append(f"{shown(name)} is a pickle, which can run code when it is loaded")
        elif suffix in CODE and name not in code:
            problems.append(f"{shown(name)} is code that is not part of custom-ddpm {__version__}")
        elif name in model.judged or size is None:
            continue  # told by the model's problems, or by `_folder_files`
        elif _is_read(name) and size > MAX_READ:
            problems.append(f"{shown(name)} has {size} bytes; at most {MAX_READ} are allowed")
        elif suffix in CODE and (folder / name).read_bytes() != code[name].read_bytes():
            problems.append(
                f"{name} differs from the file of custom-ddpm {__version__}, which "
                "CustomDDPMPipeline.save_pretrained writes"
            )
        elif suffix == ".json":
            problems += [f"{shown(name)}{problem}" for problem in _json_problems(folder / name)]
    return Verification([*problems, *model.problems], _what_was_checked(model, weights_are_here))


def _what_was_checked(model: ModelFolder, weights_are_here: bool) -> list[str]:
    code = [name for name in release_code() if name in model.sizes]
    if code:
        lines = [f"code: each of its {len(code)} files is this release's, custom-ddpm {__version__}, byte for byte"]
    else:
        lines = ["code: there is none"]
    classes = [cls.__name__ for cls in model.classes.values()]
    lines.append(f"configuration: it describes a {' and a '.join(classes)}, and names no other code")
    if weights_are_here:
        names = f"{len(model.weights)} safetensors file{'s' * (len(model.weights) != 1)}"
        lines.append(f"weights: {names}, with the names, shapes and types of the configuration; not their values")
    else:
        lines.append("weights: in safetensors files, of a plausible size; they were not downloaded")
    return [*lines, "other files: their names only"]


def _folder_files(folder: Path) -> tuple[dict[str, int | None], list[str]]:
    """Name -> size of each file in a local folder, and the problems with its links and special files."""
    # A snapshot in the Hub's cache consists of links to the blobs next to it.
    allowed = folder.parent.parent if folder.parent.name == "snapshots" else folder
    sizes: dict[str, int | None] = {}
    problems: list[str] = []

    def unreadable(error: OSError) -> None:
        problems.append(f"{shown(str(error.filename), 300)} cannot be read: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=unreadable):
        folders.sort()
        for path in sorted(Path(parent, entry) for entry in [*folders, *files]):
            name = path.relative_to(folder).as_posix()
            try:
                inside, status = path.resolve(strict=True).is_relative_to(allowed), path.stat()
            except (OSError, RuntimeError) as error:  # a broken link, or a loop of links
                problems.append(f"{shown(name)} cannot be read: {one_line(error)}"[:290])
                continue
            if not inside:
                problems.append(f"{shown(name)} is a link that points outside the folder")
            elif stat.S_ISREG(status.st_mode):
                sizes[name] = status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                problems.append(f"{shown(name)} is not a regular file")
    return sizes, sorted(problems)


def _is_read(name: str) -> bool:
    """Whether the content of a file is checked; of other files only the name is."""
    return not _points_outside(name) and (name.lower().endswith(".json") or name in release_code())


def _points_outside(name: str) -> bool:
    return name.startswith("/") or "\\" in name or ":" in name or ".." in PurePosixPath(name).parts


def _json_problems(path: Path) -> list[str]:
    """Entries of a JSON file without a place in the pipeline that load other code or files, or give odd sizes."""
    try:
        config = read_json(path)
    except ValueError as error:
        return [f" {error}"]
    if not isinstance(config, dict):
        return []
    if not is_own_code("unet", config.get("auto_map", {})):
        return [": auto_map names other code to load"]
    shards = config.get("weight_map")
    for shard in shards.values() if isinstance(shards, dict) else ():
        if not isinstance(shard, str) or _points_outside(shard):
            return [f": weight_map points outside the repository, to {shown_value(shard)}"]
    return [f": {problem}" for key, values in config.items() if (problem := size_problem(key, values))][:1]
