"""Opening of image datasets: from the Hub, from folders of images, or from local dataset files."""

import errno
import functools
import glob
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import datasets
from PIL import ImageColor

from ..messages import one_line
from .base import ImageData, Request
from .cache import CachedImages
from .folder import Folder, list_folder
from .folder_dataset import open_folder
from .labels import find_image_column, find_label_column, usable_label_column
from .pixels import MODES, Transform, natural_resolution
from .stream import StreamedImages

AnyDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset


def _open(
    path: str | None,
    train_data_dir: str | Folder | None,
    class_conditional: bool,
    label_column: str | None,
    options: dict[str, Any],
) -> tuple[AnyDataset, list[str]]:
    """Return the dataset, and lines for the log about its files; `options` are those of `load_dataset`."""
    if train_data_dir and not path:
        folder = train_data_dir if isinstance(train_data_dir, Folder) else list_folder(train_data_dir)
        own = {name: options[name] for name in ("split", "cache_dir", "streaming")}
        return open_folder(folder, class_conditional=class_conditional, label=label_column, **own)
    if train_data_dir or not path:
        raise ValueError("give either dataset_name or train_data_dir")
    dataset = _load(path, **options)
    if dataset.features is None:
        raise ValueError("this stream does not declare the types of its columns; open it without streaming")
    return dataset, _dropped(path, options["split"], dataset) + _unfinished(path)


def _load(path: str, **options: Any) -> AnyDataset:
    """Call `load_dataset`, also for single files and `save_to_disk` folders; its errors become one-line ValueErrors."""
    folder = Path(path)
    if folder.exists() and glob.has_magic(str(folder.resolve())):
        raise ValueError(
            f"cannot open the dataset {path!r}: its path must not contain *, ? or [, which datasets takes for "
            f"patterns that may match other files; it is {str(folder.resolve())!r}"
        )
    try:
        if folder.is_file():
            return datasets.load_dataset(str(folder.parent), data_files=folder.name, **options)
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
            files = {split: f"{folder}/{split}/data-*.arrow" for split in splits}
            return datasets.load_dataset("arrow", data_files=files, **options)
        if (folder / "state.json").is_file():
            return datasets.load_dataset("arrow", data_files=f"{folder}/data-*.arrow", **options)
        return datasets.load_dataset(path, **options)
    except Exception as error:  # readers of many formats raise exceptions of any type on damaged files
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
            error = error.__cause__  # this error's own message does not state the reason
        hint = f"; for the pictures in it give --train_data_dir {path}" if _count_pictures(path) else ""
        raise ValueError(f"cannot open the dataset {path!r}: {one_line(error)}{hint}") from error


def _count_pictures(path: str) -> int:
    """Return the number of picture files in a local folder; 0 if it is none."""
    try:
        return len(list_folder(path).pictures)
    except (ValueError, OSError):
        return 0


def _dropped(path: str, split: str, dataset: AnyDataset) -> list[str]:
    """Return a line for the log if `load_dataset` did not take all pictures of a local folder."""
    if dataset.info.builder_name != "imagefolder" or not os.path.isdir(path) or "[" in split:
        return []
    stream = isinstance(dataset, datasets.IterableDataset)
    rows = sum(1 for _ in dataset.decode(False)) if stream else len(dataset)
    number = _count_pictures(path)
    if rows >= number:
        return []
    return [
        f"{path}: split {split} holds {rows:,} of the folder's {number:,} pictures, by the rules of datasets "
        f"for names of files and folders; --train_data_dir {path} takes all"
    ]


def _unfinished(path: str) -> list[str]:
    """Return a line for the log for each local tar file without the block of zeros that ends a whole one.

    A cut between two files, or in the header of one, is taken for the end by `tarfile`.
    """
    local = Path(path)
    files = [local] if local.is_file() else sorted(local.rglob("*.tar")) if local.is_dir() else []
    notes = []
    for file in files:
        if file.suffix == ".tar" and file.is_file():
            with file.open("rb") as content:
                content.seek(max(0, file.stat().st_size - 512))
                if content.read() != bytes(512):
                    notes.append(f"{file} has no end mark: it may have been cut short, and pictures may be missing")
    return notes


def _height_width(resolution: int | Sequence[int]) -> tuple[int, int]:
    """Return a resolution as (height, width)."""
    sides = [resolution] if isinstance(resolution, int) else list(resolution)
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError(f"resolution must be one or two numbers of pixels, at least 1, not {resolution}")
    return sides[0], sides[-1]


def _check_arguments(
    image_mode: str | None,
    on_bad_image: str,
    background: str,
    seed: int,
    label_column: str | None,
    class_conditional: bool | None,
) -> None:
    """Raise ValueError for the first invalid argument of `open_images`."""
    if image_mode not in (None, *MODES.values()):
        raise ValueError(f"image_mode must be one of {', '.join(MODES.values())}, not {image_mode!r}")
    if on_bad_image not in ("raise", "skip"):
        raise ValueError(f"on_bad_image must be raise or skip, not {on_bad_image!r}")
    try:
        ImageColor.getcolor(background, "RGB")
    except ValueError as error:
        raise ValueError(f"background must be the name of a colour or #rrggbb, not {background!r}") from error
    if seed < 0:
        raise ValueError(f"seed must not be negative, not {seed}")
    if label_column is not None and class_conditional is False:
        raise ValueError(f"label_column {label_column!r} requires class_conditional")


def _label_column(
    dataset: AnyDataset, name: str | None, class_conditional: bool | None, notes: list[str]
) -> str | None:
    """The column of labels, or None; a choice that was left to the data is noted for the log."""
    if class_conditional is False:
        return None
    if class_conditional is None and name is None:
        name = usable_label_column(dataset)
        notes += [f"the labels of the column {name} are used; --class_conditional false leaves them out"] * bool(name)
        return name
    return find_label_column(dataset.features, name)


def _names_full_disk(function: Callable[..., ImageData]) -> Callable[..., ImageData]:
    """Decorate `open_images`: where the disk of the cache is full, the error names the cache folder."""

    @functools.wraps(function)
    def wrapper(**arguments: Any) -> ImageData:
        try:
            return function(**arguments)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and getattr(cause, "errno", None) != errno.ENOSPC:
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            folder = arguments.get("cache_dir") or datasets.config.HF_DATASETS_CACHE
            raise OSError(
                f"the disk of the cache folder {folder} is full: free some space, or choose another folder by "
                "--cache_dir"
            ) from error

    return wrapper


@_names_full_disk
def open_images(
    *,
    dataset_name: str | None = None,
    train_data_dir: str | Folder | None = None,
    dataset_config_name: str | None = None,
    dataset_revision: str | None = None,
    split: str = "train",
    cache_dir: str | None = None,
    streaming: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    class_conditional: bool | None = False,
    id2label: Mapping[int, str] | None = None,
    on_bad_image: Literal["raise", "skip"] = "raise",
    image_mode: str | None = None,
    background: str = "white",
    resolution: int | Sequence[int] | None,
    center_crop: bool = False,
    num_workers: int = 0,
    seed: int = 0,
) -> ImageData:
    """Open an image dataset and, unless it is streamed, decode and resize it into the cache.

    Args:
        dataset_name: name on the Hub (private datasets: log in or set HF_TOKEN), or path of a dataset folder, of a
            parquet, arrow or webdataset (tar) file, or of a folder written by `save_to_disk`.
        train_data_dir: alternative to `dataset_name`: a local folder of image files, in one sub-folder per class: its
            path, or a `Folder` from `list_folder`. The only split is "train".
        dataset_config_name, dataset_revision, cache_dir: `name`, `revision`, `cache_dir` of `datasets.load_dataset`.
        split: split expression such as "train[:90%]" (streams of datasets: names only, such as "train+test").
        streaming: whether to decode the images at every visit instead of caching them.
        image_column, label_column: chosen by type if None, see `find_image_column`, `find_label_column`.
        class_conditional: whether to read labels, numbered 0 … K-1; None: see `labels.usable_label_column`.
        id2label: numbering to use instead; for a held-out split that of the training split, with its `mode`.
        on_bad_image: for a row without a readable image: "raise" an error that names it, or "skip" it.
        image_mode: "L", "RGB" or "RGBA", or None for the rules in `custom_ddpm.data.pixels`.
        background: colour under transparent pixels: any name or #rrggbb known to Pillow.
        resolution: side, or (height, width), in pixels; None: see `pixels.natural_resolution`.
        center_crop: whether to crop at the centre (recommended for a held-out split) instead of at random.
        num_workers: number of processes that decode; 0: the calling process.
        seed: seed of the order and of the random crops, >= 0.

    Raises:
        ValueError: one line with the argument, its value and what is valid.
    """
    size = None if resolution is None else _height_width(resolution)
    _check_arguments(image_mode, on_bad_image, background, seed, label_column, class_conditional)
    options: dict[str, Any] = {"name": dataset_config_name, "revision": dataset_revision, "split": split}
    options |= {"cache_dir": cache_dir, "streaming": streaming}
    dataset, notes = _open(dataset_name, train_data_dir, bool(class_conditional), label_column, options)
    image_column = find_image_column(dataset.features, image_column)
    label_column = _label_column(dataset, label_column, class_conditional, notes)
    transform = Transform(*(size or natural_resolution(dataset, image_column)), center_crop, image_mode, background)
    request = Request(image_column, label_column, id2label, seed, num_workers, on_bad_image == "skip")
    folder = os.fspath(train_data_dir) if train_data_dir else None
    source = [dataset_name, folder, dataset_config_name, dataset_revision, split]
    streamed = functools.partial(StreamedImages, source=source)
    data: ImageData = (streamed if streaming else CachedImages)(dataset, transform, request)
    data.notes = notes
    return data
