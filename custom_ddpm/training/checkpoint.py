"""Checkpoints: written atomically, verified by checksums when read, and deleted only after a newer one is saved.

The output folder holds checkpoints under the names that diffusers' training scripts use:

    checkpoint-<step>/
        metadata.json      what is needed before anything is loaded: `step`, settings, ...
        ...                what the caller wrote: weights, optimizer state, ...
        manifest.json      the SHA-256 of each of the other files

A checkpoint is written under the name `.checkpoint-<step>.tmp`, flushed to the disk, and then renamed. It is deleted in
the reverse order: renamed, then removed. So a process that is killed at any moment never leaves an incomplete
checkpoint under its final name; `lock_output_dir` removes the temporary folders when the next run starts.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from ..messages import one_line

if os.name == "posix":
    import fcntl

logger = logging.getLogger(__name__)

METADATA = "metadata.json"
MANIFEST = "manifest.json"
LOCK = ".lock"


@contextmanager
def lock_output_dir(output_dir: str | Path, resumed_from: Path | None = None) -> Iterator[None]:
    """Hold an exclusive lock on the output folder of a run, and prepare the folder.

    To be entered by one process, before the first step. Creates the folder and deletes incomplete checkpoints of a run
    that was killed. Damaged checkpoints of steps after `resumed_from` are deleted: the run saves these steps again.

    Args:
        output_dir: the folder that `save_checkpoint` will be given.
        resumed_from: the checkpoint that the run resumes from, as `find_checkpoint` returned it; `None` for a new run.

    Raises:
        OSError: the folder cannot be created or written to.
        BlockingIOError: another process holds the lock.
        FileExistsError: the folder holds a checkpoint that the run does not resume from: any, for a run that is new or
            resumes from another folder; a complete one of a later step, otherwise.
    """
    output_dir = Path(output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        # Never deleted: another process may have opened the file, and would then lock one that is no longer there.
        lock = (output_dir / LOCK).open("a")
    except OSError as error:
        raise OSError(f"cannot write to the output folder {output_dir}: {error.strerror}") from error
    with lock:
        _lock(lock, output_dir)
        _clear(output_dir, resumed_from)
        yield


def _lock(file: TextIO, output_dir: Path) -> None:
    """Lock a file until this process ends. Child processes, which may outlive it, do not inherit the lock."""
    if os.name != "posix":
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(f"another run is using {output_dir}: stop it, or choose another folder") from error
        logger.warning(
            f"{output_dir} is on a file system without locks ({error.strerror}): make sure that no other run uses it"
        )


def _clear(output_dir: Path, resumed_from: Path | None) -> None:
    """Delete incomplete checkpoints, and damaged ones of steps that will be saved again; refuse other checkpoints."""
    checkpoints = list_checkpoints(output_dir)
    resumed_step = None
    if resumed_from is not None:
        resumed_step = next((step for step, path in checkpoints.items() if path.samefile(resumed_from)), None)
    later = [path for step, path in checkpoints.items() if resumed_step is None or step > resumed_step]
    damaged = [path for path in later if resumed_step is not None and _damage(path)]
    other = [path for path in later if path not in damaged]
    if other:
        raise FileExistsError(
            f"{output_dir} holds {other[-1].name}, which this run does not resume from: "
            "resume from that one, or choose another output folder"
        )
    for path in damaged:
        logger.warning(f"Deleting the damaged {path}")
        delete_checkpoint(path)
    for leftover in output_dir.glob(".checkpoint-*.tmp"):
        _remove(leftover)


def save_checkpoint(
    output_dir: str | Path,
    step: int,
    write: Callable[[Path], None],
    *,
    metadata: Mapping[str, Any],
    accelerator: Accelerator,
    total_limit: int | None = None,
    keep: Collection[int] = (),
) -> Path:
    """Save a checkpoint atomically, then delete old ones beyond `total_limit`.

    Must be called by all processes, which must see the same `output_dir`. A checkpoint of this step that exists already
    is left as it is.

    Args:
        output_dir: output folder of the run, see `lock_output_dir`.
        step: number of optimizer steps done.
        write: writes the files into the folder that it is given. It is called on every process, since the state may be
            sharded; it decides itself which process writes what.
        metadata: written to `metadata.json` together with `step`; values that JSON can hold.
        accelerator: the run's accelerator.
        total_limit: number of checkpoints that are kept, `None` for all. The oldest are deleted first, but never the
            one just saved nor those in `keep`, even if there are more of these.
        keep: steps whose checkpoints are not deleted, such as the best one.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: on all processes, if anything failed on one of them; earlier checkpoints are unchanged.
    """
    output_dir = Path(output_dir)
    path = output_dir / f"checkpoint-{step}"
    partial = _temporary(path)
    if broadcast_object_list([path.exists()])[0]:
        return path
    _together(lambda: _new_folder(partial), path, accelerator, main_process_only=True)
    _together(lambda: _require_folder(partial), path, accelerator)
    _together(lambda: write(partial), path, accelerator)
    _together(lambda: _complete(partial, path, {**metadata, "step": step}), path, accelerator, main_process_only=True)
    if accelerator.is_main_process and total_limit is not None:
        prune_checkpoints(output_dir, step, total_limit, keep)
    return path


def _together(
    action: Callable[[], None], path: Path, accelerator: Accelerator, main_process_only: bool = False
) -> None:
    """Do one part of the saving of `path`; if it fails on one process, raise on all and remove what was written."""
    error = None
    try:
        if accelerator.is_main_process or not main_process_only:
            action()
    except Exception as caught:  # any: the other processes would otherwise wait forever
        error = caught
    failures = [text for text in gather_object([error and _cause(error, path.parent)]) if text]
    if failures:
        if accelerator.is_main_process:
            shutil.rmtree(_temporary(path), ignore_errors=True)
        raise OSError(f"could not save {path.name} in {path.parent}: {failures[0]}") from error


def _new_folder(partial: Path) -> None:
    if partial.exists() or partial.is_symlink():
        _remove(partial)
    partial.mkdir(parents=True)


def _require_folder(partial: Path) -> None:
    if not partial.is_dir():
        raise NotADirectoryError(f"{partial.parent} is not the same folder for all processes")


def _complete(partial: Path, path: Path, metadata: Mapping[str, Any]) -> None:
    """Add metadata and checksums, flush everything to the disk, and give the checkpoint its name."""
    (partial / METADATA).write_text(json.dumps(metadata, indent=2), encoding="utf-8")
    files = sorted(file for file in partial.rglob("*") if file.is_file())
    digests = {file.relative_to(partial).as_posix(): _sha256(file) for file in files}
    (partial / MANIFEST).write_text(json.dumps(digests, indent=2), encoding="utf-8")
    for entry in [*partial.rglob("*"), partial]:
        _flush(entry)
    partial.rename(path)
    _flush(path.parent)


def find_checkpoint(
    output_dir: str | Path, which: str | Path = "latest", before: int | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """Find a checkpoint and verify the checksums of its files.

    Args:
        output_dir: output folder of the run.
        which: `"latest"`, the name of a checkpoint in `output_dir`, or the path of one. For `"latest"`, damaged
            checkpoints are skipped with a warning that names them.
        before: for `"latest"`, only checkpoints of earlier steps count; `None` for all.

    Returns:
        The folder of the checkpoint and its metadata, which includes `step`; `None` for `"latest"` if there are no
        checkpoints.

    Raises:
        FileNotFoundError: there is no checkpoint of that name.
        ValueError: the checkpoint is damaged; for `"latest"`, all are.
    """
    if which == "latest":
        paths = [path for step, path in list_checkpoints(output_dir).items() if before is None or step < before]
        for path in reversed(paths):
            damage = _damage(path)
            if damage is None:
                return path, _read_json(path / METADATA)
            logger.warning(f"{path} is damaged ({damage}), looking for the one before")
        if paths:
            raise ValueError(f"all checkpoints in {output_dir} are damaged: choose another output folder to start anew")
        return None
    path = Path(output_dir, which)
    if not path.is_dir():
        path = Path(which)
    if not path.is_dir():
        names = ", ".join(path.name for path in list_checkpoints(output_dir).values())
        raise FileNotFoundError(f"there is no checkpoint {which}; {output_dir} has {names or 'none'}")
    if damage := _damage(path):
        raise ValueError(f"{path} is damaged ({damage}), or was not written by this program")
    return path, _read_json(path / METADATA)


def list_checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """The checkpoints in a folder, damaged or not, by ascending step; empty if there is no such folder."""
    named = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    return dict(sorted((int(name[1]), path) for name, path in named if name and path.is_dir()))


def differing_settings(saved: Mapping[str, Any], current: Mapping[str, Any], must_match: Iterable[str]) -> list[str]:
    """Compare the settings of a run with those of the checkpoint that it resumes from.

    Args:
        saved: settings in the metadata of the checkpoint; a missing one counts as `None`.
        current: settings of the run, as values that JSON can hold.
        must_match: names of the settings to compare.

    Returns:
        A line `"<name>: saved <value>, now <value>"` for each that differs, in the order of `must_match`.
    """
    lines = []
    for name in must_match:
        # Through JSON like the saved value, which turns a tuple into a list.
        value = json.loads(json.dumps(current.get(name)))
        if saved.get(name) != value:
            lines.append(f"{name}: saved {saved.get(name)!r}, now {value!r}")
    return lines


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} does not contain a JSON object")
    return value


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or `None`."""
    try:
        if not (path / MANIFEST).is_file():
            return f"it has no {MANIFEST}"
        manifest = _read_json(path / MANIFEST)
    except (OSError, ValueError, RecursionError) as error:
        return f"{MANIFEST} cannot be read: {_named(error)}"
    if METADATA not in manifest:
        return f"{MANIFEST} does not list {METADATA}"
    for name, digest in manifest.items():
        # Only what `save_checkpoint` writes: reading a device or a FIFO might never end.
        parts = PurePosixPath(name).parts
        if "\0" in name or not parts or parts[0] == "/" or ".." in parts or not (path / name).is_file():
            return f"{name!r} is not a file in it"
        try:
            if _sha256(path / name) != digest:
                return f"{name} is not what was saved"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    try:
        step = _read_json(path / METADATA).get("step")
    except (OSError, ValueError, RecursionError) as error:
        return f"{METADATA} cannot be read: {_named(error)}"
    named = re.fullmatch(r"checkpoint-(\d+)", path.name)
    if type(step) is not int or (named and int(named[1]) != step):
        return f"{METADATA} says step {step!r}"
    return None


def prune_checkpoints(output_dir: Path, step: int, total_limit: int, keep: Collection[int]) -> None:
    """Delete the oldest checkpoints beyond `total_limit`, but not that of `step` nor those in `keep`."""
    checkpoints = list_checkpoints(output_dir)
    removable = [path for number, path in checkpoints.items() if number not in {step, *keep}]
    for path in removable[: max(0, len(checkpoints) - total_limit)]:
        try:
            delete_checkpoint(path)
        except OSError as error:  # the new checkpoint is safe, so the run goes on
            logger.warning(f"Could not delete {path}: {_named(error)}")


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint; one that is a link to another place is only unlinked."""
    _remove(path.rename(_temporary(path)))


def _remove(path: Path) -> None:
    path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    if os.name != "posix":  # Windows opens no folders, and its files only for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(error: Exception, folder: Path) -> str:
    """An error in one line, with the remark that the disk is full where it is."""
    # Not every library that writes files reports a full disk as such.
    full = folder.is_dir() and shutil.disk_usage(folder).free < 1 << 20
    return ("the disk is full, " if full else "") + _named(error)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
