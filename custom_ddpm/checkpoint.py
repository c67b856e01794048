"""Checkpoints that are complete or absent, checked when they are read, and never all deleted.

The folder of a run holds its checkpoints under the names that diffusers' training scripts give them:

    checkpoint-<step>/
        metadata.json      what the caller asks before it loads anything: `step`, settings, ...
        ...                what the caller wrote: weights, optimizer state, ...
        manifest.json      the SHA-256 of each of the other files

A checkpoint is written under the name `.checkpoint-<step>.tmp`, flushed to the disk, and only then given its name.
It is deleted the other way round: first it loses its name. So a process that is killed, at whatever moment, leaves
nothing half done under the name of a checkpoint, and `claim_output_dir` clears up the rest when the next run starts.
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
from pathlib import Path
from typing import Any, TextIO

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

if os.name == "posix":
    import fcntl

logger = logging.getLogger(__name__)

METADATA = "metadata.json"
MANIFEST = "manifest.json"
LOCK = ".lock"


@contextmanager
def claim_output_dir(output_dir: str | Path, resumed_from: Path | None = None) -> Iterator[None]:
    """Have the folder of a run for oneself, ready, and with no other run's checkpoints in the way.

    To be entered by one process, before the first step. Creates the folder, and deletes what a killed run left half
    written. In a folder that is resumed from, checkpoints after `resumed_from` are deleted if they are damaged: the run
    comes to their steps again.

    Args:
        output_dir: the folder that `save_checkpoint` will be given.
        resumed_from: the checkpoint that the run goes on from, as `find_checkpoint` returned it; `None` for a new run.

    Raises:
        OSError: if the folder cannot be made, or written to.
        BlockingIOError: if another process has it.
        FileExistsError: if it holds a checkpoint that the run does not go on from: any, for a run that is new or
            resumed from elsewhere; a complete one of a later step, otherwise.
    """
    output_dir = Path(output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        # Stays there, empty: to delete what others may have opened would let two of them have the folder.
        lock = (output_dir / LOCK).open("a")
    except OSError as error:
        raise OSError(f"cannot write to the output folder {output_dir}: {error.strerror}") from error
    with lock:
        _lock(lock, output_dir)
        _clear(output_dir, resumed_from)
        yield


def _lock(file: TextIO, output_dir: Path) -> None:
    """Ends with the process, however it ends, and is not handed down to its children: those may outlive it."""
    if os.name != "posix":
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(
                f"another run is going on in {output_dir}: end it, or choose another folder"
            ) from error
        logger.warning(f"{output_dir} is on a disk without locks ({error.strerror}): see that no other run uses it")


def _clear(output_dir: Path, resumed_from: Path | None) -> None:
    checkpoints = list_checkpoints(output_dir)
    resumed_step = None
    if resumed_from is not None:
        resumed_step = next((step for step, path in checkpoints.items() if path.samefile(resumed_from)), None)
    later = [path for step, path in checkpoints.items() if resumed_step is None or step > resumed_step]
    damaged = [path for path in later if resumed_step is not None and _damage(path)]
    other = [path for path in later if path not in damaged]
    if other:
        raise FileExistsError(
            f"{output_dir} holds {other[-1].name}, which this run does not go on from: "
            "resume from that one, or choose another output folder"
        )
    for path in damaged:
        logger.warning(f"Deleting the damaged {path}")
        _delete(path)
    for leftover in output_dir.glob(".checkpoint-*.tmp"):
        shutil.rmtree(leftover)


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
    """Save a checkpoint, whole or not at all, then delete old ones beyond `total_limit`.

    To be called by all processes, which must see the same `output_dir`. If the run has saved this step already, that
    checkpoint stays as it is.

    Args:
        output_dir: the folder of the run, see `claim_output_dir`.
        step: the number of optimizer steps done.
        write: writes the files into the folder it is given; called on every process, as what is to be written may lie
            on all of them. What only one process should write is its own affair.
        metadata: goes into `metadata.json` with `step`; anything that JSON can hold.
        accelerator: the run's.
        total_limit: how many checkpoints may lie in the folder, `None` for any number. The oldest go first; never the
            one just saved, nor those in `keep`, though there be more of them.
        keep: steps whose checkpoints are not to be deleted, say the best so far.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: on all processes, if anything failed on one of them; earlier checkpoints are as they were.
    """
    output_dir = Path(output_dir)
    path = output_dir / f"checkpoint-{step}"
    partial = _temporary(path)

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def see() -> None:
        if not partial.is_dir():
            raise NotADirectoryError(f"{output_dir} is not the same folder for all processes")

    def fill() -> None:
        write(partial)

    def complete() -> None:
        (partial / METADATA).write_text(json.dumps({**metadata, "step": step}, indent=2), encoding="utf-8")
        files = sorted(file for file in partial.rglob("*") if file.is_file())
        digests = {file.relative_to(partial).as_posix(): _sha256(file) for file in files}
        (partial / MANIFEST).write_text(json.dumps(digests, indent=2), encoding="utf-8")
        for entry in [*partial.rglob("*"), partial]:
            _flush(entry)
        partial.rename(path)
        _flush(output_dir)

    if broadcast_object_list([path.exists()])[0]:
        return path
    for action in [prepare, see, fill, complete]:
        error = None
        try:
            if action in (see, fill) or accelerator.is_main_process:
                action()
        except Exception as caught:  # whatever it is, the other processes must hear of it, or they wait for ever
            error = caught
        failures = [text for text in gather_object([error and _cause(error, output_dir)]) if text]
        if failures:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError(f"could not save {path.name} in {output_dir}: {failures[0]}") from error
    if accelerator.is_main_process and total_limit is not None:
        _prune(output_dir, step, total_limit, keep)
    return path


def find_checkpoint(output_dir: str | Path, which: str | Path = "latest") -> tuple[Path, dict[str, Any]] | None:
    """Find a checkpoint and check that each of its files is what was saved.

    Args:
        output_dir: the folder of the run.
        which: `"latest"`, the name of a checkpoint in `output_dir`, or the path of one. For the latest, damaged ones
            are passed over with a warning that names them.

    Returns:
        The checkpoint's folder and its metadata, which holds `step`; `None` if the latest is asked for and there are no
        checkpoints.

    Raises:
        FileNotFoundError: if there is no checkpoint of that name.
        ValueError: if it is damaged; for the latest, if all are.
    """
    if which == "latest":
        paths = list(list_checkpoints(output_dir).values())
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
        raise ValueError(f"{path} is damaged ({damage}), or no checkpoint of this program")
    return path, _read_json(path / METADATA)


def list_checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """The checkpoints in a folder by their steps, ascending, damaged or not; none if there is no such folder."""
    named = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    return dict(sorted((int(name[1]), path) for name, path in named if name and path.is_dir()))


def differing_settings(saved: Mapping[str, Any], current: Mapping[str, Any], must_match: Iterable[str]) -> list[str]:
    """Say which settings of a run are not those of the checkpoint that it is to go on from.

    Args:
        saved: the settings in the checkpoint's metadata; one that is missing counts as `None`.
        current: the settings of the run, as values that JSON can hold.
        must_match: the names to compare.

    Returns:
        A line `"<name>: saved <value>, now <value>"` for each that differs, in the order of `must_match`.
    """
    lines = []
    for name in must_match:
        # Through JSON, as the saved value went: there a tuple is a list.
        value = json.loads(json.dumps(current.get(name)))
        if saved.get(name) != value:
            lines.append(f"{name}: saved {saved.get(name)!r}, now {value!r}")
    return lines


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no mapping")
    return value


def _damage(path: Path) -> str | None:
    """What is wrong with the checkpoint, or `None`."""
    try:
        manifest = _read_json(path / MANIFEST)
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read: {_one_line(error)}"
    if METADATA not in manifest:
        return f"{MANIFEST} does not list {METADATA}"
    for name, digest in manifest.items():
        try:
            if _sha256(path / name) != digest:
                return f"{name} is not what was saved"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _prune(output_dir: Path, step: int, total_limit: int, keep: Collection[int]) -> None:
    checkpoints = list_checkpoints(output_dir)
    removable = [path for number, path in checkpoints.items() if number not in {step, *keep}]
    for path in removable[: max(0, len(checkpoints) - total_limit)]:
        try:
            _delete(path)
        except OSError as error:  # no reason to end a run whose checkpoint is safe
            logger.warning(f"Could not delete {path}: {_one_line(error)}")


def _delete(path: Path) -> None:
    shutil.rmtree(path.rename(_temporary(path)))


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
    # Not all that write files say that the disk is full.
    full = folder.is_dir() and shutil.disk_usage(folder).free < 1 << 20
    return ("the disk is full, " if full else "") + _one_line(error)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
