"""A listed folder of pictures as a dataset of `datasets`: paths, class labels and the columns of its metadata."""

import csv
import dataclasses
import itertools
import os
import re
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from ..messages import one_line
from .base import fingerprint
from .folder import NO_FILE_NAME, SPLIT_NAMES, UNLISTED, Folder, Picture, natural, shown
from .labels import LABEL_NAMES

# A stream is shuffled by its shards, then in a small buffer. `datasets` takes 0.1 ms for a shard at each shuffle.
STREAM_SHARDS = 4096


def open_folder(
    folder: Folder, *, split: str, streaming: bool, cache_dir: str | None, class_conditional: bool, label: str | None
) -> tuple[datasets.Dataset | datasets.IterableDataset, list[str]]:
    """Make a dataset of the pictures of a folder.

    Args:
        folder: from `list_folder`.
        split: "train", all pictures, or parts of it such as "train[90%:]".
        streaming: whether to return a stream, which can be shuffled by single pictures.
        cache_dir: folder for the table of paths, and for what is computed from it; that of `datasets` if None.
        class_conditional: whether labels are needed.
        label: name of the column of labels, if given.

    Returns:
        Dataset with the columns "image", "label" (if there are sub-folders, or from the metadata) and others from the
        metadata; and lines about what was found, for the log.

    Raises:
        ValueError: the split does not exist, the metadata cannot be read, or there are no classes but they are needed.
    """
    folder, extra = _with_metadata(folder)
    pictures = folder.pictures
    notes = [folder.describe()]
    labels_from_folders = LABEL_NAMES.isdisjoint(extra.column_names)
    if labels_from_folders:
        notes += _class_notes(folder, extra.column_names)
        if class_conditional and label in (None, "label"):
            _check_classes(folder)
    features, table = _table(folder, extra, labels_from_folders)

    ranges = _ranges(split, len(pictures))
    rows = [row for start, stop in ranges for row in range(start, stop)]
    if not rows:
        raise ValueError(f"split {split!r} holds no pictures: {folder.describe()}")
    if split != "train":
        notes.append(f"split {split}: {len(rows):,} of these pictures, which are in the order of their names")
        names = [{folder.class_name(pictures[row].path) for row in part} for part in (rows, range(len(pictures)))]
        if class_conditional and labels_from_folders and len(names[0]) < len(names[1]):
            notes.append(f"split {split} holds pictures of {len(names[0])} of the {len(names[1])} classes only")
        table = pa.concat_tables([table.slice(start, stop - start) for start, stop in ranges])

    if streaming:
        starts = np.linspace(0, len(rows), min(len(rows), STREAM_SHARDS) + 1).astype(int).tolist()
        shards = list(itertools.pairwise(starts))
        return datasets.IterableDataset.from_generator(_rows, features, {"shards": shards, "table": table}), notes
    parts = [pictures[row] for row in rows], table.drop_columns("image").to_pylist(), features
    return _on_disk(table, fingerprint("pictures", *parts), cache_dir), notes


def _rows(shards: list[tuple[int, int]], table: pa.Table) -> Iterator[dict[str, Any]]:
    """Yield the rows of ranges of a table; `datasets` shuffles the lists among a generator's arguments."""
    for start, stop in shards:
        yield from table.slice(start, stop - start).to_pylist()


def _table(folder: Folder, extra: pa.Table, labels_from_folders: bool) -> tuple[datasets.Features, pa.Table]:
    """Return the types and the values of the columns."""
    pictures = folder.pictures
    paths = pa.array([picture.path for picture in pictures], pa.string())
    image = pa.StructArray.from_arrays([pa.nulls(len(pictures), pa.binary()), paths], ["bytes", "path"])
    columns: dict[str, Any] = {"image": image}
    types: dict[str, Any] = {"image": datasets.Image()}
    names = [folder.class_name(picture.path) for picture in pictures] if labels_from_folders else []
    if any(names):
        classes = sorted({name for name in names if name is not None}, key=natural)
        ids = {name: i for i, name in enumerate(classes)}
        columns["label"] = pa.array([None if name is None else ids[name] for name in names], pa.int64())
        types["label"] = datasets.ClassLabel(names=classes)
    for name in extra.column_names:
        columns.setdefault(name, extra[name])
    types = {**datasets.Features.from_arrow_schema(extra.schema), **types}
    features = datasets.Features({name: types[name] for name in columns})
    return features, pa.table(columns).cast(features.arrow_schema)


def _on_disk(table: pa.Table, name: str, cache_dir: str | None) -> datasets.Dataset:
    """Return a table as a dataset in a file, beside which `datasets` then keeps what is computed from it.

    Args:
        table: columns, with their `datasets.Features` in the schema.
        name: hash of the contents, also of the pictures that the table names.
        cache_dir: folder for the file; that of `datasets` if None.
    """
    directory = Path(cache_dir or datasets.config.HF_DATASETS_CACHE, "picture_folders", name).expanduser()
    file = directory / "pictures.arrow"
    if not file.exists():
        directory.mkdir(parents=True, exist_ok=True)
        part = directory / f"{uuid.uuid4().hex}.part"  # renamed, so that no process finds half a file
        try:
            with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
    # `Dataset.from_file` alone would make the time at which the file was written a part of the fingerprint.
    return datasets.Dataset(datasets.Dataset.from_file(str(file)).data, fingerprint=name)


def _ranges(split: str, number: int) -> list[tuple[int, int]]:
    """Return the ranges of rows, start and stop, that a split expression consists of."""
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({"train": number})
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"split {split!r} is not one of a folder of pictures, which are all in train; a part of them is "
            f"train[90%:], for example"
        ) from error
    return [(part.from_, max(part.from_, part.to)) for part in parts]


def overlap(split: str, other: str, number: int) -> int:
    """Return how many of a folder's pictures two split expressions have in common."""
    rows = [{row for start, stop in _ranges(each, number) for row in range(start, stop)} for each in (split, other)]
    return len(rows[0] & rows[1])


def _class_notes(folder: Folder, columns: list[str]) -> Iterator[str]:
    """Yield lines about sub-folders that a user may have meant in another way."""
    relative = [folder.relative(picture.path).split(os.sep) for picture in folder.pictures]
    classes = sorted({parts[0] for parts in relative if len(parts) > 1}, key=natural)
    splits = [name for name in classes if name.lower() in SPLIT_NAMES]
    if splits:
        path = os.path.join(folder.path, "train" if "train" in splits else splits[0])
        yield (
            f"the pictures of all sub-folders are used, {', '.join(map(shown, splits))} among them; "
            f"--train_data_dir {path} takes those of one alone"
        )
    elif len(classes) == 1 and all(len(parts) > 2 for parts in relative):
        path = os.path.join(folder.path, classes[0])
        yield f"the only class is {shown(classes[0])}; --train_data_dir {path} makes classes of its sub-folders"
    if columns and classes:
        yield f"the metadata have no column of labels ({', '.join(map(shown, columns))}): sub-folders are the classes"


def _check_classes(folder: Folder) -> None:
    """Raise ValueError unless each picture lies in the sub-folder of a class."""
    loose = [picture.path for picture in folder.pictures if folder.class_name(picture.path) is None]
    if len(loose) == len(folder.pictures):
        raise ValueError(
            f"--class_conditional needs a sub-folder for each class, or labels in a metadata.csv: {folder.path} has no "
            "sub-folders with pictures"
        )
    if loose:
        raise ValueError(
            f"{len(loose):,} pictures lie beside the sub-folders of the classes in {folder.path}, such as "
            f"{shown(os.path.basename(loose[0]))}: move them into one, or train without --class_conditional"
        )


# ---- metadata ----


def _with_metadata(folder: Folder) -> tuple[Folder, pa.Table]:
    """Return the folder with the pictures that its metadata list, and the other columns; without metadata, all."""
    left_out = {reason: list(paths) for reason, paths in folder.left_out.items()}
    metadata, folder = folder.metadata, dataclasses.replace(folder, metadata=[], left_out=left_out)
    known = {picture.path: picture for picture in folder.pictures}
    tables, listed = [], list[Picture]()
    for file in metadata:
        table = _read(file)
        if "file_name" not in table.column_names:
            folder.leave_out(file, NO_FILE_NAME)
            continue
        paths = [_path(file, name) for name in table["file_name"].to_pylist()]
        listed += [known.get(path) or _picture(path) for path in paths]
        folder.metadata.append(file)
        tables.append(table.drop_columns("file_name"))
    if not tables:
        return folder, pa.table({})
    used = {picture.path for picture in listed}
    for path in known:
        if path not in used:
            folder.leave_out(path, UNLISTED)
    left_out = {reason: [path for path in paths if path not in used] for reason, paths in folder.left_out.items()}
    folder.left_out = {reason: paths for reason, paths in left_out.items() if paths}
    folder.pictures = listed
    try:
        return folder, pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"the metadata of {folder.path} differ in their columns: {one_line(error)}") from error


def _picture(path: str) -> Picture:
    """Return a file that is listed, but not a picture by its name; one that is not there becomes an unreadable row."""
    try:
        status = os.stat(path)
    except OSError:
        return Picture(path, -1, -1)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{shown(path)} is listed in the metadata, but is not a regular file")
    return Picture(path, status.st_size, status.st_mtime_ns)


def _read(file: str) -> pa.Table:
    """Return the columns of a metadata file."""
    try:
        if file.endswith(".csv"):
            return _read_csv(file)
        if file.endswith(".jsonl"):
            size = max(1 << 20, os.path.getsize(file))  # a line must fit in a block
            return pyarrow.json.read_json(file, pyarrow.json.ReadOptions(block_size=size))
        return pyarrow.parquet.read_table(file)
    except (pa.ArrowException, csv.Error, OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {one_line(error)}") from error


def _read_csv(file: str) -> pa.Table:
    """Return columns of integers where all values are written as integers are, and of text otherwise; empty: None.

    Other readers make one class of the labels 01 and 1, and none of the label NA.
    """
    with open(file, newline="", encoding="utf-8-sig") as content:
        header, *rows = [row for row in csv.reader(content) if row] or [[]]
    if len(set(header)) < len(header) or any(len(row) != len(header) for row in rows):
        raise ValueError("its rows must have as many values as the first, which must have the names of the columns")
    columns = dict[str, pa.Array]()
    for i, name in enumerate(header):
        values = [row[i] or None for row in rows]
        whole = name != "file_name" and all(
            value is None or re.fullmatch(r"0|-?[1-9]\d{0,17}", value) for value in values
        )
        numbers = [None if value is None else int(value) for value in values] if whole else None
        columns[name] = pa.array(values, pa.string()) if numbers is None else pa.array(numbers, pa.int64())
    return pa.table(columns)


def _path(file: str, name: Any) -> str:
    """Return the path of a picture that a metadata file lists, which must lie beside or below it."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"{file} has the file_name {name!r} in a row; it must be the name of a picture")
    path = os.path.normpath(name.replace("\\", "/"))
    if os.path.isabs(path) or path.split(os.sep)[0] == ".." or "://" in name:
        raise ValueError(f"{file} lists {shown(name)}, which is not inside the folder of that file")
    return os.path.join(os.path.dirname(file), path)
