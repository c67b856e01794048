"""The repository that is pushed: weights, code, card, pictures. And whether one that was pushed can be trusted.

`main` holds the pipeline with its code files, as `CustomDDPMPipeline.save_pretrained` laid them; the branch `diffusers`
holds the same model as a stock `DDPMPipeline`, which loads without any remote code. Both are one commit a push.
"""

import importlib.metadata
import inspect
import json
import logging
import math
import platform
import re
import shlex
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # the built-in one only from Python 3.11 on
from pathlib import Path, PurePosixPath
from typing import Any

import diffusers
import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from safetensors import safe_open

from . import pipelines, scheduler, schedules, unet
from ._version import __version__
from .convert import pipeline_to_diffusers

logger = logging.getLogger(__name__)

STOCK_BRANCH = "diffusers"
TASK = "unconditional-image-generation"
# What a card holds until the push knows the repository's name and whether there is a stock export.
PLACE = "path/to/this/folder"
STOCK_PLACE = "<!-- the push tells here of the branch `diffusers` -->"

# All that a push sends, and all that it deletes where it is stale. `*` does not cross folders.
PIPELINE_FILES = (
    "model_index.json",
    "README.md",
    "samples.png",
    "loss_curve.png",
    "pipeline_*.py",
    "unet/config.json",
    "unet/*.safetensors",
    "unet/*.safetensors.index.json",
    "unet/*.py",
    "scheduler/scheduler_config.json",
    "scheduler/*.py",
)

# Whatever stands between this machine and the Hub raises one of these: the client its HTTPError (OSError in some of
# its versions), wrapped in a RuntimeError where it uploads from threads, ValueError where an answer is malformed.
_NETWORK_ERRORS = (HTTPError, OSError, RuntimeError, ValueError)

_REASONS = {
    401: "the token is missing or not accepted (401); log in with `hf auth login` or set HF_TOKEN",
    403: "the token may not write there (403); take one with write permission, or another repository",
    404: "the repository or its branch is not there, or not for this token (404)",
    409: "something else is being pushed there at the same time (409)",
    412: "something else is being pushed there at the same time (412)",
    429: "the Hub asks for fewer requests (429)",
}


class HubError(RuntimeError):
    """The Hub, or the way to it, failed. One line: the reason, what is still on disk, how to repeat."""


# ---- push ----


def push_pipeline(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Push pipeline",
    stock_branch: bool = True,
    timeout: float = 3600.0,
) -> str:
    """Push a saved pipeline: its own files to `main`, the stock export to the branch `diffusers`, one commit each.

    Only `PIPELINE_FILES` are sent; checkpoints, logs and caches beside them are not. The files are copied first, so the
    folder may be written to meanwhile. What the repository already holds is not sent again: after a broken upload, call
    this again.

    Args:
        folder: what `CustomDDPMPipeline.save_pretrained` wrote; other files may lie beside.
        repo_id: "user/model", or "model" for the user that the token belongs to; made if it is not there.
        private: whether a repository that is made is private; None leaves it to the Hub. True is refused for a
            repository that is there and public.
        token: the user's token; None takes the one logged in with.
        commit_message: title of the commits.
        stock_branch: False leaves the branch `diffusers` as it is. It is left so, with a line in the log, where the
            model cannot be expressed as a `DDPMPipeline`.
        timeout: seconds after which a push that has not ended is given up.

    Returns:
        The repository's address.

    Raises:
        ValueError: the folder holds no pipeline of ours, or something that `verify_repository` refuses, or the token.
        HubError: the Hub or the network failed.
    """
    push = _prepare(folder, repo_id, private, token, commit_message, stock_branch)
    try:
        return _in_thread(push).result(timeout)
    except FutureTimeoutError:
        raise HubError(_failure(folder, repo_id, private, f"it has not ended after {timeout:.0f} s")) from None


class BackgroundPush:
    """Pushes while training goes on: one at a time, in a daemon thread. A failure is a line in the log, never raised.

    Args:
        repo_id, private, token: as in `push_pipeline`.

    Raises:
        ValueError: a name that no repository can have, or no token: before the training, not after it.
    """

    def __init__(self, repo_id: str, private: bool | None = None, token: str | None = None):
        validate_repo_id(repo_id)
        if not _clean(token):
            raise ValueError("there is no token to push with; log in with `hf auth login` or set HF_TOKEN")
        # Bars of uploads would be drawn over the training's own.
        disable_progress_bars()
        self.repo_id, self.private, self.token = repo_id, private, token
        self._running: Future[str] | None = None

    def push(self, folder: str | Path, commit_message: str) -> None:
        """Copy the pipeline's files and start the push; left out, with a line in the log, if one is under way."""
        if self._running is not None and not self._running.done():
            logger.warning("%r is not pushed: the push before it is still under way", commit_message)
            return
        try:
            push = _prepare(folder, self.repo_id, self.private, self.token, commit_message)
        except (OSError, ValueError) as error:
            logger.warning("%s", _failure(folder, self.repo_id, self.private, _one_line(error)))
            return
        self._running = _in_thread(lambda: self._reported(push))

    def finish(self, folder: str | Path, commit_message: str, timeout: float = 3600.0) -> None:
        """Push for the last time, after the one under way; give up after `timeout` seconds for each."""
        self._wait(folder, timeout)
        self.push(folder, commit_message)
        self._wait(folder, timeout)

    def _wait(self, folder: str | Path, timeout: float) -> None:
        try:
            if self._running is not None:
                self._running.exception(timeout)
        except FutureTimeoutError:
            logger.warning(
                "%s", _failure(folder, self.repo_id, self.private, f"it has not ended after {timeout:.0f} s")
            )

    @staticmethod
    def _reported(push: Callable[[], str]) -> str:
        try:
            address = push()
        except HubError as error:
            logger.warning("%s", error)
            raise
        logger.info("pushed to %s", address)
        return address


def _in_thread(function: Callable[[], str]) -> Future[str]:
    """Run in a daemon thread: unlike an executor's, it does not hold up the end of the program when the Hub hangs."""
    future: Future[str] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, name="push-to-hub", daemon=True).start()
    return future


def _prepare(
    folder: str | Path,
    repo_id: str,
    private: bool | None,
    token: str | None,
    commit_message: str,
    stock_branch: bool = True,
) -> Callable[[], str]:
    """Check what is to be pushed, copy it, and give the function that pushes the copy."""
    folder = Path(folder)
    validate_repo_id(repo_id)
    token = _clean(token)
    names = {path.relative_to(folder).as_posix() for pattern in PIPELINE_FILES for path in folder.glob(pattern)}
    files = {name: folder / name for name in sorted(names) if (folder / name).is_file()}
    problems = _problems({name: path.stat().st_size for name, path in files.items()}, folder)
    if not any(name.endswith(".safetensors") for name in files):
        problems.append("there are no safetensors weights in unet/")
    for name, path in files.items():
        if token and name.endswith((".py", ".json", ".md")) and token.encode() in path.read_bytes():
            problems.append(f"{name} holds the token")
    if problems:
        raise ValueError(f"{folder} cannot be pushed: {'; '.join(problems)}")

    copy = tempfile.TemporaryDirectory(prefix="push-")
    main, stock = Path(copy.name) / "main", Path(copy.name) / "stock"
    for name, path in files.items():
        (main / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, main / name)
    if "README.md" not in files:
        write_model_card(main, {})
    # Here and not in the thread: while diffusers loads a model, all modules that other threads make are left empty.
    has_stock = stock_branch and _export_stock(main, stock)

    def push() -> str:
        with copy:
            try:
                api = HfApi(token=token or False, library_name="custom-ddpm", library_version=__version__)
                repo = api.create_repo(repo_id, private=private, exist_ok=True)
                full_id = repo.repo_id
                if private and not api.model_info(full_id).private:
                    raise HubError(f"{full_id} is there and public; make it private on the Hub, or take another name")
                _fill_in(main / "README.md", full_id, has_stock)
                _commit(api, full_id, "main", main, commit_message)
                if has_stock:
                    shutil.copyfile(main / "README.md", stock / "README.md")
                    api.create_branch(full_id, branch=STOCK_BRANCH, exist_ok=True)
                    _commit(api, full_id, STOCK_BRANCH, stock, commit_message)
            except _NETWORK_ERRORS as error:
                raise HubError(_failure(folder, repo_id, private, _reason(error))) from error
            return str(repo)

    return push


def _clean(token: str | None) -> str:
    """The token given or logged in with, or "". One that no header can carry would be shown by the error it makes."""
    token = (token or get_token() or "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise ValueError("the token holds characters that no token has; set HF_TOKEN anew")
    return token


def _export_stock(main: Path, stock: Path) -> bool:
    """Save the pipeline in `main` as a stock `DDPMPipeline` in `stock`; False where it cannot be expressed as one."""
    try:
        pipeline: Any = pipeline_to_diffusers(pipelines.CustomDDPMPipeline.from_pretrained(main))
    except ValueError as error:
        logger.warning("the branch %r is left out: %s", STOCK_BRANCH, _one_line(error))
        return False
    pipeline.save_pretrained(stock)
    for name in ("samples.png", "loss_curve.png"):
        if (main / name).is_file():
            shutil.copyfile(main / name, stock / name)
    return True


def _commit(api: HfApi, repo_id: str, branch: str, folder: Path, message: str) -> None:
    """Make a branch hold exactly these files of a pipeline, in one commit, or in none if it does already."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    stale = [
        name
        for name in api.list_repo_files(repo_id, revision=branch)
        if name not in names and any(_matches(name, pattern) for pattern in PIPELINE_FILES)
    ]
    additions = [CommitOperationAdd(name, folder / name) for name in names]
    deletions = [CommitOperationDelete(name) for name in stale]
    api.create_commit(repo_id, [*additions, *deletions], commit_message=message, revision=branch)


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and PurePosixPath(name).match(pattern)


def _reason(error: BaseException) -> str:
    """Why the Hub was not reached or did not do as asked, in one line without addresses."""
    cause: BaseException = error
    while not isinstance(cause, HfHubHTTPError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, HubError):
        return _one_line(cause)
    if not isinstance(cause, HfHubHTTPError):
        return f"the connection to the Hub broke ({type(cause).__name__}: {_one_line(cause)})"
    status = cause.response.status_code
    reason = _REASONS.get(status, f"the Hub has an error of its own ({status})")
    if status < 500 and status not in _REASONS:
        reason = f"the Hub refuses it ({status}: {_one_line(error)})"
    if seconds := cause.response.headers.get("Retry-After"):
        reason += f"; wait {seconds} s"
    return reason


def _failure(folder: str | Path, repo_id: str, private: bool | None, reason: str) -> str:
    again = shlex.join(["custom-ddpm", "push", str(folder), repo_id, *(["--private"] if private else [])])
    return f"pushing to {repo_id} failed: {reason}. The pipeline is whole in {folder}; push it again with: {again}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---- model card ----


def write_model_card(folder: str | Path, facts: Mapping[str, Any]) -> ModelCard:
    """Write README.md beside a saved pipeline. What is in the folder is read there, `facts` say the rest.

    Args:
        folder: what `CustomDDPMPipeline.save_pretrained` wrote. `samples.png` and `loss_curve.png` are shown if
            they are there.
        facts: any of these; what is not given is not claimed, and what names a place on this machine is not told.
            license: of the weights, one of the Hub's identifiers.
            base_model: pipeline that the training started from: "user/model", or a path.
            dataset: "user/dataset", or a path.
            num_images: number of pictures trained on.
            recipe: settings of the training, name -> value.
            steps: optimiser steps taken.
            metrics: what was measured, name -> number; it becomes the Hub's model-index.
            evaluation: how it was measured, name -> value.
            command: the command line that made the model; told with ~ for the home folder.

    Returns:
        The card, as written.

    Raises:
        OSError, KeyError: the folder holds no saved pipeline.
    """
    folder = Path(folder)
    index, model, noise = (
        json.loads((folder / file).read_text(encoding="utf-8"))
        for file in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
    )
    license = facts.get("license") or "unknown"
    dataset, dataset_id = _hub_id(facts.get("dataset"))
    _, base_model = _hub_id(facts.get("base_model"))
    metrics = {key: value for key, value in facts.get("metrics", {}).items() if isinstance(value, int | float)}
    by_class = model.get("num_class_embeds") is not None
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["ddpm", "custom-ddpm", *(["class-conditional"] if by_class else [])],
        datasets=dataset_id and [dataset_id],
        base_model=base_model,
        model_name=folder.resolve().name,
        eval_results=[EvalResult(TASK, dataset_id or "image", dataset or "unknown", *pair) for pair in metrics.items()]
        or None,
    )

    size = model["sample_size"]
    height, width = size if isinstance(size, list) else (size, size)
    colours = {1: "gray", 3: "RGB", 4: "RGBA"}.get(model["in_channels"], f"{model['in_channels']}-channel")
    names = index.get("id2label") or {}
    classes = ", ".join(f"{label} ({text})" for label, text in names.items())
    recipe = {key: value for key, value in facts.get("recipe", {}).items() if _is_told(key, value)}
    evaluation = ", ".join(f"{key} {value}" for key, value in facts.get("evaluation", {}).items())
    command = re.sub(rf"{re.escape(str(Path.home()))}(?=/)", "~", facts.get("command", ""))
    libraries = ("torch", "diffusers", "accelerate", "datasets")
    versions = [
        f"custom-ddpm {__version__}",
        *(f"{library} {importlib.metadata.version(library)}" for library in libraries),
    ]
    draw = f"class_labels={[i % len(names or [0]) for i in range(4)]}" if by_class else "batch_size=4"
    paragraphs = [
        f"# DDPM of {colours} pictures, {height}x{width}",
        f"A denoising diffusion probabilistic model ([Ho et al. 2020](https://arxiv.org/abs/2006.11239)) of {colours} "
        f"pictures, {height}x{width} pixels{', drawn by class' if by_class else ''}. Its U-Net has "
        f"{_count_parameters(folder / 'unet'):,} parameters and predicts {noise['prediction_type']}; noise is added in "
        f"{noise['num_train_timesteps']} steps with the {noise['beta_schedule']} schedule.",
        (folder / "samples.png").is_file() and "![Samples](samples.png)",
        "## How to load it",
        "With diffusers alone; the code files beside the weights are run:",
        _snippet("diffusers", "DiffusionPipeline", f'"{PLACE}", trust_remote_code=True', draw),
        "With the package `custom-ddpm`; no file from here is run:",
        _snippet("custom_ddpm", "CustomDDPMPipeline", f'"{PLACE}"', draw),
        STOCK_PLACE,
        "## Training data",
        f"`{dataset}`." if dataset else "Not recorded.",
        facts.get("num_images") and f"{facts['num_images']:,} pictures.",
        classes and f"Classes: {classes}.",
        "## Training",
        facts.get("steps") and f"{facts['steps']:,} optimiser steps.",
        recipe and f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```",
        (folder / "loss_curve.png").is_file() and "![Loss over the training](loss_curve.png)",
        "## Results",
        "\n".join(["| metric | value |", "|---|---|", *(f"| {key} | {value:.6g} |" for key, value in metrics.items())])
        if metrics
        else "Nothing was measured.",
        evaluation and f"Measured with {evaluation}.",
        "## Limits",
        f"It draws {height}x{width} {colours} pictures like those that it was trained on, and knows nothing else. "
        "What is wrong or one-sided in them is in its pictures too; nothing filters them. A model trained long on few "
        "pictures can give some of them back.",
        license == "unknown"
        and "The licence of the weights was not stated: ask who published them before you use them.",
        "## How it was made",
        command and f"```bash\n{command}\n```",
        f"{', '.join(versions)}, Python {platform.python_version()}.",
    ]
    text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
    # A command or a setting may hold a token, and a card is read by everyone.
    text = re.sub(r"\bhf_[A-Za-z0-9]{16,}", "hf_***", text)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")
    card.save(folder / "README.md")
    return card


def _snippet(package: str, pipeline: str, source: str, call: str) -> str:
    return (
        f"```python\nfrom {package} import {pipeline}\n\n"
        f"pipeline = {pipeline}.from_pretrained({source})\nimages = pipeline({call}).images\n```"
    )


def _fill_in(card: Path, repo_id: str, has_stock: bool) -> None:
    """Put into a card what is known at the push only."""
    noise = json.loads((card.parent / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    call = f"batch_size=4, num_inference_steps={noise['num_train_timesteps']}"
    stock = (
        "As a stock `DDPMPipeline`; no remote code at all:\n\n"
        + _snippet("diffusers", "DiffusionPipeline", f'"{PLACE}", revision="{STOCK_BRANCH}"', call)
        + "\n\n"
    )
    text = card.read_text(encoding="utf-8").replace(f"{STOCK_PLACE}\n\n", stock if has_stock else "")
    card.write_text(text.replace(PLACE, repo_id), encoding="utf-8")


def _hub_id(name: str | None) -> tuple[str | None, str | None]:
    """How a model or dataset may be called in public, and its id on the Hub, if it is there and not on this machine."""
    if not name:
        return None, None
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).exists():
        return name, name
    return Path(name).name, None


def _is_told(setting: str, value: Any) -> bool:
    """Whether a setting says how a model was made; the others say where, on whose machine, or nothing."""
    place = setting.endswith(("_dir", "_from_checkpoint")) or "hub" in setting
    path = isinstance(value, str) and "/" in value and Path(value).exists()
    return not place and not path and value not in (None, [])


def _count_parameters(folder: Path) -> int:
    total = 0
    for path in folder.glob("diffusion_pytorch_model*.safetensors"):
        if "." in path.stem:  # a variant, such as fp16, of the same weights
            continue
        with safe_open(path, framework="pt") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total


# ---- trust ----

PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
CODE = (".dll", ".dylib", ".ipynb", ".py", ".pyc", ".pyd", ".sh", ".so")
MAX_READ = 32 * 2**20  # bytes
MAX_PARAMETERS = 5e10
MAX_VALUES = {  # the largest value that a config may give; of each entry, if it is a list
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
    """Path in a repository -> file of this release, for every code file that a repository may hold."""
    files = {
        "unet/unet.py": Path(inspect.getfile(unet)),
        "scheduler/scheduler.py": Path(inspect.getfile(scheduler)),
        "scheduler/schedules.py": Path(inspect.getfile(schedules)),
    }
    return files | {path.name: path for path in Path(inspect.getfile(pipelines)).parent.glob("pipeline_*.py")}


def verify_repository(repo_or_folder: str | Path, revision: str | None = None, token: str | None = None) -> list[str]:
    """Whether a repository can be loaded with `trust_remote_code=True`: what speaks against it, one line each.

    Refused are: code that is not, byte for byte, a file of this release; pickles; names and links that lead out of the
    repository; a model_index.json that names other classes; configs with absurd sizes. No file is run or unpickled, and
    of a repository on the Hub only the code and JSON files are downloaded.

    Args:
        repo_or_folder: folder, or "user/model" on the Hub.
        revision: branch, tag or commit on the Hub.
        token: as in `push_pipeline`.

    Returns:
        The problems; empty if there are none.

    Raises:
        ValueError: neither a folder nor a name that a repository can have.
        HubError: the Hub or the network failed.
    """
    if Path(repo_or_folder).is_dir():
        folder = Path(repo_or_folder).resolve()
        # A snapshot in the Hub's cache is made of links to the blobs beside it.
        inside = folder.parent.parent if folder.parent.name == "snapshots" else folder
        sizes, problems = {}, []
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if not path.resolve().is_relative_to(inside):
                problems.append(f"{name} is a link that leads out of the folder")
            elif path.is_file():
                sizes[name] = path.stat().st_size
        return problems + _problems(sizes, folder)

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
        except _NETWORK_ERRORS as error:
            raise HubError(f"{repo_id} could not be verified: {_reason(error)}") from error
        return _problems(sizes, Path(downloaded))


def _is_read(name: str) -> bool:
    """Whether a file's content is checked; of the others, only the name."""
    return not _leads_out(name) and (name.lower().endswith(".json") or name in release_code())


def _leads_out(name: str) -> bool:
    return name.startswith("/") or "\\" in name or ":" in name or ".." in PurePosixPath(name).parts


def _problems(sizes: Mapping[str, int], folder: Path) -> list[str]:
    """What speaks against files with these names and sizes in bytes; the code and JSON files are read in `folder`."""
    problems = []
    code = release_code()
    for name, size in sizes.items():
        suffix = PurePosixPath(name).suffix.lower()
        if _leads_out(name):
            problems.append(f"{name!r} leads out of the repository")
        elif suffix in PICKLES:
            problems.append(f"{name} is a pickle, which can run code when it is loaded")
        elif suffix in CODE and name not in code:
            problems.append(f"{name} is code, but no file of custom-ddpm {__version__}")
        elif _is_read(name) and size > MAX_READ:
            problems.append(f"{name} has {size} bytes; more than {MAX_READ} make no sense")
        elif suffix in CODE and (folder / name).read_bytes() != code[name].read_bytes():
            problems.append(
                f"{name} is not the file of custom-ddpm {__version__}; CustomDDPMPipeline.save_pretrained lays that"
            )
        elif suffix == ".json":
            try:
                config = json.loads((folder / name).read_bytes())
            except (ValueError, RecursionError) as error:
                problems.append(f"{name} is not JSON: {_one_line(error)}")
                continue
            check = _index_problems if name == "model_index.json" else _config_problems
            problems += [f"{name}: {problem}" for problem in check(config)]
    if "model_index.json" not in sizes:
        problems.append("model_index.json is missing, so this is no pipeline")
    return problems


def _index_problems(index: Any) -> Iterator[str]:
    """Classes that model_index.json must not name: with other names diffusers would import other code."""
    if not isinstance(index, dict):
        yield "it is not a mapping"
        return
    ours = {
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
            known = stock or value == ours.get(key)
        else:
            continue
        if not known:
            yield f"{key} is {value!r}, which is neither ours nor of diffusers"


def _config_problems(config: Any) -> Iterator[str]:
    if not isinstance(config, dict):
        return
    if "auto_map" in config:
        yield "auto_map names code to load"
    shards = config.get("weight_map")
    for shard in sorted({str(shard) for shard in shards.values()} if isinstance(shards, dict) else ()):
        if _leads_out(shard):
            yield f"weight_map leads out of the repository, to {shard!r}"
    for key, largest in MAX_VALUES.items():
        values = config.get(key)
        for value in values if isinstance(values, list) else [] if values is None else [values]:
            if not (isinstance(value, int) and 0 < value <= largest):
                yield f"{key} is {values!r}; it must be at least 1 and at most {largest}"[:200]
                return
    channels = config.get("block_out_channels")
    channels = channels if isinstance(channels, list) else []
    layers = config.get("layers_per_block")
    # Two convolutions of 3x3 in each residual block, on the way down and on the way up.
    parameters = sum(4 * 9 * (layers if isinstance(layers, int) else 1) * width**2 for width in channels)
    if len(channels) > MAX_LEVELS or parameters > MAX_PARAMETERS:
        yield f"absurd size: layers_per_block {layers} with block_out_channels {channels!r}"[:200]
