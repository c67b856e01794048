"""Listing of a local folder of pictures: one walk in which every file is used, or left out with a reason.

The path is taken literally, links are followed, and entries are in natural order (2 before 10). A file is a picture if
Pillow reads the format of its extension or, for other extensions, recognises its content. The class of a picture is
the first level of sub-folders that it lies in.
"""

import os
import re
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import datasets
import PIL.Image
import PIL.ImageFile

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Words for a split, at which a user may expect that only one of the folders is read.
SPLIT_NAMES = set("train training test testing val valid validation dev eval evaluation".split())
ARCHIVES = set(".zip .tar .tgz .gz .bz2 .xz .zst .7z .rar".split())
TABLES = set(".parquet .arrow .tar .csv .json .jsonl .zip".split())  # what --dataset_name reads

# Reasons for leaving a file out: the words for one file, and for several if they differ.
HIDDEN = "hidden"
NO_PICTURE = "not a picture|not pictures"
ARCHIVE = "archive, not unpacked|archives, not unpacked"
BROKEN_LINK = "broken link|broken links"
LOOP = "link back to a folder above|links back to a folder above"
IRREGULAR = "not a regular file|not regular files"
NOT_UTF_8 = "not named in UTF-8"
UNLISTED = "not listed in the metadata"
NO_FILE_NAME = "metadata without a column file_name"


class Picture(NamedTuple):
    """A file that is taken for a picture; size and time of the last change tell whether it was edited."""

    path: str
    size: int
    mtime_ns: int


@dataclass
class Folder:
    """The files of a folder.

    Attributes:
        path: the folder, as given.
        pictures: the pictures, in natural order of their paths.
        metadata: paths of files with columns for the pictures beside them, see `METADATA`.
        left_out: reason -> the paths of all other files.
    """

    path: str
    pictures: list[Picture] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def __fspath__(self) -> str:
        return self.path

    def relative(self, path: str) -> str:
        """Return a path in the folder relative to it."""
        return path.removeprefix(os.path.join(os.path.abspath(self.path), ""))

    def class_name(self, path: str) -> str | None:
        """Return the first level of sub-folders of a path in the folder; None for a file at its root."""
        first, separator, _ = self.relative(path).partition(os.sep)
        return first if separator else None

    def leave_out(self, path: str, reason: str) -> None:
        """Note a file that is not used."""
        self.left_out.setdefault(reason, []).append(path)

    def describe(self) -> str:
        """Return one line: the files found, used, and left out with the reasons and up to three names for each."""
        others = sum(map(len, self.left_out.values()))
        used = len({picture.path for picture in self.pictures})  # metadata may list one several times
        found = used + len(self.metadata) + others
        text = f"{self.path}: {found:,} file{'s'[: found != 1]} found, {used:,} picture{'s'[: used != 1]} used"
        text += f", {len(self.metadata):,} of metadata" if self.metadata else ""
        parts = []
        for reason, paths in self.left_out.items():
            # Names with different extensions say more than the first ones.
            names = list({os.path.splitext(path)[1]: path for path in reversed(paths)}.values())[::-1]
            names = [shown(self.relative(path)) for path in names[:3]]
            one, _, many = reason.partition("|")
            more = ", ..." if len(paths) > len(names) else ""
            parts.append(f"{len(paths):,} {many if many and len(paths) > 1 else one} ({', '.join(names)}{more})")
        return text + (f"; left out: {', '.join(parts)}" if parts else "")


def shown(name: str) -> str:
    """Return a name in quotes for a message: shortened, and with line breaks and control characters escaped."""
    return repr(name if len(name) <= 60 else f"{name[:40]}...{name[-17:]}")


def natural(name: str) -> tuple[list[str | int], str]:
    """Return a sorting key that orders the numbers in names by their values."""
    parts: list[str | int] = list(re.split(r"(\d+)", name))
    parts[1::2] = [int(number) for number in parts[1::2]]
    return parts, name


def list_folder(path: str) -> Folder:
    """List a folder of pictures, each of its sub-folders once.

    Args:
        path: path of a local folder.

    Raises:
        ValueError: it does not exist or is no folder, or no file in it is a picture.
        OSError: the folder itself cannot be read.
    """
    if not os.path.exists(path):
        raise ValueError(f"--train_data_dir {path!r} does not exist")
    if not os.path.isdir(path):
        raise ValueError(f"--train_data_dir {path!r} is a file; it must be a folder of pictures")
    folder = Folder(path)
    with datasets.utils.tqdm(desc=f"Listing {path}", unit=" files", delay=1) as progress:
        for file, found in _walk(os.path.abspath(path)):
            progress.update()
            if isinstance(found, str):
                folder.leave_out(file, found)
            elif os.path.basename(file) in METADATA:
                folder.metadata.append(file)
            elif _is_picture(file):
                folder.pictures.append(Picture(file, found.st_size, found.st_mtime_ns))
            else:
                archive = os.path.splitext(file)[1].lower() in ARCHIVES
                folder.leave_out(file, ARCHIVE if archive else NO_PICTURE)
    if not folder.pictures:
        others = [file for files in folder.left_out.values() for file in files]
        tables = any(os.path.splitext(file)[1].lower() in TABLES for file in others)
        hint = f"; --dataset_name {path} reads datasets of other kinds" if tables else ""
        raise ValueError(f"--train_data_dir holds no pictures: {folder.describe()}{hint}")
    return folder


def _walk(top: str) -> Iterator[tuple[str, os.stat_result | str]]:
    """Yield each file below a folder in natural order, with its status, or with the reason for leaving it out.

    A folder that is not entered counts as a file.
    """
    # The folders from the top to the present one: device and inode, and the entries still to be visited.
    above: list[tuple[tuple[int, int], Iterator[os.DirEntry[str]]]] = []

    def enter(path: str, status: os.stat_result) -> None:
        with os.scandir(path) as entries:
            listed = sorted(entries, key=lambda entry: natural(entry.name))
        above.append(((status.st_dev, status.st_ino), iter(listed)))

    enter(top, os.stat(top))
    while above:
        entry = next(above[-1][1], None)
        if entry is None:
            above.pop()
            continue
        try:
            if reason := _reason(entry):
                yield entry.path, reason
                continue
            status = os.stat(entry.path)  # not entry.stat(), which has no inode on Windows
            if not stat.S_ISDIR(status.st_mode):
                yield entry.path, status if stat.S_ISREG(status.st_mode) else IRREGULAR
            elif (status.st_dev, status.st_ino) in [identity for identity, _ in above]:
                yield entry.path, LOOP
            else:
                enter(entry.path, status)
        except FileNotFoundError:
            yield entry.path, BROKEN_LINK
        except OSError as error:
            yield entry.path, f"unreadable: {error.strerror}"


def _reason(entry: os.DirEntry[str]) -> str | None:
    """Return the reason for leaving an entry out because of its name alone, if there is one."""
    if entry.name.startswith("."):
        return HIDDEN
    try:
        entry.path.encode()
    except UnicodeEncodeError:  # a table of paths, in Arrow, is in UTF-8
        return NOT_UTF_8
    return None


@cache
def _formats() -> tuple[set[str], list[str]]:
    """Return the extensions of the formats that Pillow reads, and the formats that it recognises by their content."""
    extensions = PIL.Image.registered_extensions()
    readable = {}
    for name, (factory, accept) in PIL.Image.OPEN.items():
        stub = isinstance(factory, type) and issubclass(factory, PIL.ImageFile.StubImageFile)
        if not stub and name != "MPEG":  # formats that are recognised, but whose pixels are not read
            readable[name] = accept
    by_content = [name for name, accept in readable.items() if accept is not None]
    return {suffix for suffix, name in extensions.items() if name in readable}, by_content


def _is_picture(path: str) -> bool:
    """Whether Pillow reads the format of a file's extension, or else recognises its content."""
    suffixes, by_content = _formats()
    if os.path.splitext(path)[1].lower() in suffixes:
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            PIL.Image.open(path, formats=by_content).close()
        return True
    except Exception:  # decoders raise exceptions of any type on what is not theirs
        return False
