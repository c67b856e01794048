"""Upload of a saved pipeline to the Hub.

The branch `main` gets the pipeline with its code files, as `CustomDDPMPipeline.save_pretrained` writes them; the branch
`diffusers` gets the same model as a stock `DDPMPipeline`, which loads without any remote code. A push is one commit on
each.
"""

import logging
import re
import shlex
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # the built-in one only since Python 3.11
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from .._version import __version__
from ..messages import one_line, shown
from ..pipelines import CustomDDPMPipeline
from .card import STOCK_BRANCH, complete_card, write_model_card
from .convert import pipeline_to_diffusers
from .errors import NETWORK_ERRORS, HubError, failure_reason
from .settings import MAX_READ
from .verify import check_files

logger = logging.getLogger(__name__)

# The only files that a push sends, and that it deletes from the repository when the folder no longer has them.
# `*` does not match "/".
PIPELINE_FILES = (
    "model_index.json",
    "README.md",
    "samples.png",
    "loss_curve.png",
    "pipeline_*.py",
    "pictures.py",
    "unet/config.json",
    "unet/*.safetensors",
    "unet/*.safetensors.index.json",
    "unet/*.py",
    "scheduler/scheduler_config.json",
    "scheduler/*.py",
)


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
    """Push a saved pipeline to `main` and its stock export to the branch `diffusers`, in one commit each.

    Only `PIPELINE_FILES` are sent, not checkpoints, logs or caches in the same folder. The files are copied first, so
    the folder may change during the upload. Files that the repository already holds are not sent again: to resume an
    interrupted push, call this function again.

    Args:
        folder: output of `CustomDDPMPipeline.save_pretrained`; it may hold other files as well.
        repo_id: "user/model", or "model" for the token's own user; created if it does not exist.
        private: whether a repository that is created is private; None uses the Hub's default. True is an error if the
            repository exists and is public.
        token: access token; None uses the one logged in with.
        commit_message: title of the commits.
        stock_branch: False does not touch the branch `diffusers`. It is not touched either, with a warning in the log,
            if the model cannot be converted to a `DDPMPipeline`.
        timeout: seconds after which an unfinished push is abandoned.

    Returns:
        The URL of the repository.

    Raises:
        ValueError: the folder does not hold a pipeline that passes `verify_repository`, or the token is malformed or in
            one of the files.
        HubError: the Hub or the connection to it failed.
    """
    push = _prepare(folder, repo_id, private, token, commit_message, stock_branch)
    try:
        return _in_thread(push).result(timeout)
    except FutureTimeoutError:
        raise HubError(_timeout_message(folder, repo_id, private, timeout)) from None


class BackgroundPush:
    """Pushes during training, one at a time, in a daemon thread. Failures are logged as warnings and never raised.

    Args:
        repo_id, private, token: as in `push_pipeline`.

    Raises:
        ValueError: an invalid repository name, or no token; raised here so that it shows before the training.
    """

    def __init__(self, repo_id: str, private: bool | None = None, token: str | None = None):
        validate_repo_id(repo_id)
        if not _resolve_token(token):
            raise ValueError("there is no token to push with; log in with `hf auth login` or set HF_TOKEN")
        # Upload bars would be drawn over the training's own bar.
        disable_progress_bars()
        self.repo_id, self.private, self.token = repo_id, private, token
        self._running: Future[str] | None = None

    def push(self, folder: str | Path, commit_message: str) -> None:
        """Copy the pipeline's files and start the push; skip it, with a warning, if one is still running.

        Args:
            folder, commit_message: as in `push_pipeline`.
        """
        if self._running is not None and not self._running.done():
            logger.warning("%r is not pushed: the previous push is still running", commit_message)
            return
        try:
            push = _prepare(folder, self.repo_id, self.private, self.token, commit_message)
        except (OSError, ValueError) as error:
            logger.warning("%s", _failure_message(folder, self.repo_id, self.private, one_line(error)))
            return
        self._running = _in_thread(lambda: self._logged(push))

    def finish(self, folder: str | Path, commit_message: str, timeout: float = 3600.0) -> None:
        """Wait for the running push, then push for the last time and wait for that.

        Args:
            folder, commit_message: as in `push_pipeline`.
            timeout: seconds to wait for each of the two pushes.
        """
        self._wait(folder, timeout)
        self.push(folder, commit_message)
        self._wait(folder, timeout)

    def _wait(self, folder: str | Path, timeout: float) -> None:
        try:
            if self._running is not None:
                self._running.exception(timeout)
        except FutureTimeoutError:
            logger.warning("%s", _timeout_message(folder, self.repo_id, self.private, timeout))

    @staticmethod
    def _logged(push: Callable[[], str]) -> str:
        try:
            address = push()
        except HubError as error:
            logger.warning("%s", error)
            raise
        logger.info("pushed to %s", address)
        return address


def _in_thread(function: Callable[[], str]) -> Future[str]:
    """Run in a daemon thread: unlike an executor's thread, it does not delay the program's exit when the Hub hangs."""
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
    """Check the pipeline, copy its files, and return the function that uploads the copy."""
    folder = Path(folder)
    validate_repo_id(repo_id)
    token = _resolve_token(token)
    files = _pipeline_files(folder)
    copy = tempfile.TemporaryDirectory(prefix="push-")
    main, stock = Path(copy.name) / "main", Path(copy.name) / "stock"
    main.mkdir()
    for name, path in files.items():
        (main / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, main / name)
    _check(main, folder, token)
    if "README.md" not in files:
        write_model_card(main, {})
    # Not in the thread: while diffusers loads a model, modules that other threads create get no weights.
    has_stock = stock_branch and _export_stock(main, stock)

    def push() -> str:
        with copy:
            try:
                api = HfApi(token=token or False, library_name="custom-ddpm", library_version=__version__)
                repo = api.create_repo(repo_id, private=private, exist_ok=True)
                full_id = repo.repo_id
                if private and not api.model_info(full_id).private:
                    raise HubError(f"{full_id} exists and is public; make it private on the Hub, or use another name")
                complete_card(main / "README.md", full_id, has_stock)
                _commit(api, full_id, "main", main, commit_message)
                if has_stock:
                    shutil.copyfile(main / "README.md", stock / "README.md")
                    api.create_branch(full_id, branch=STOCK_BRANCH, exist_ok=True)
                    _commit(api, full_id, STOCK_BRANCH, stock, commit_message)
            except NETWORK_ERRORS as error:
                raise HubError(_failure_message(folder, repo_id, private, failure_reason(error))) from error
            return str(repo)

    return push


def _pipeline_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that a push sends: name -> path.

    Raises:
        ValueError: one of them is no regular file, is too large, or is a link to a file outside the folder: what is
            there is the user's own, and a push would publish it.
    """
    real = folder.resolve()
    # A snapshot in the Hub's cache consists of links to the blobs next to it.
    allowed = real.parent.parent if real.parent.name == "snapshots" else real
    names = {path.relative_to(folder).as_posix() for pattern in PIPELINE_FILES for path in folder.glob(pattern)}
    problems = []
    for name in sorted(names):
        path = folder / name
        if not path.resolve().is_relative_to(allowed):
            problems.append(f"{shown(name)} is a link that points outside the folder")
        elif not path.is_file():
            problems.append(f"{shown(name)} is not a regular file")
        elif path.stat().st_size > MAX_READ and not name.endswith(".safetensors"):
            problems.append(f"{shown(name)} has {path.stat().st_size} bytes; at most {MAX_READ} are allowed")
    if problems:
        raise ValueError(_refusal(folder, problems))
    return {name: folder / name for name in sorted(names)}


def _check(copy: Path, folder: Path, token: str) -> None:
    """Raise ValueError if the files that were copied from `folder` are not a complete pipeline, safe to publish."""
    paths = {path.relative_to(copy).as_posix(): path for path in sorted(copy.rglob("*")) if path.is_file()}
    problems = check_files({name: path.stat().st_size for name, path in paths.items()}, copy).problems
    for name, path in paths.items():
        if token and name.endswith((".py", ".json", ".md")) and token.encode() in path.read_bytes():
            problems.append(f"{name} contains the token")
    if problems:
        raise ValueError(_refusal(folder, problems))


def _refusal(folder: Path, problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    return f"{folder} cannot be pushed: {'; '.join(problems[:5])}{more}"


def _resolve_token(token: str | None) -> str:
    """The given token or the one logged in with, or ""."""
    token = (token or get_token() or "").strip()
    # The client's error for a token that is not a valid header value would show the token.
    if not re.fullmatch(r"[!-~]*", token):
        raise ValueError("the token contains characters that are not allowed in a token; set HF_TOKEN again")
    return token


def _export_stock(main: Path, stock: Path) -> bool:
    """Save the pipeline in `main` as a stock `DDPMPipeline` in `stock`; return False if it cannot be converted."""
    try:
        pipeline: Any = pipeline_to_diffusers(CustomDDPMPipeline.from_pretrained(main))
    except ValueError as error:
        logger.warning("the branch %r is not pushed: %s", STOCK_BRANCH, one_line(error))
        return False
    pipeline.save_pretrained(stock)
    for name in ("samples.png", "loss_curve.png"):
        if (main / name).is_file():
            shutil.copyfile(main / name, stock / name)
    return True


def _commit(api: HfApi, repo_id: str, branch: str, folder: Path, message: str) -> None:
    """Commit a folder's files to a branch and delete its other pipeline files; no commit if nothing changes."""
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


def _timeout_message(folder: str | Path, repo_id: str, private: bool | None, timeout: float) -> str:
    return _failure_message(folder, repo_id, private, f"it did not finish within {timeout:.0f} s")


def _failure_message(folder: str | Path, repo_id: str, private: bool | None, reason: str) -> str:
    again = shlex.join(["custom-ddpm", "push", str(folder), repo_id, *(["--private"] if private else [])])
    return f"pushing to {repo_id} failed: {reason}. The pipeline is still complete in {folder}; push it again: {again}"
