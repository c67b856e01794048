"""Images as uint8 batches: any dataset that 🤗 Datasets can open, read in an endless seeded order.

`open_images` decodes and resizes every picture **once**, into an Arrow file in the cache of `datasets` that is named
by a fingerprint of data and transform, memory-mapped, and shared by all processes of a machine. Training then only
copies bytes. What does not fit on the disk is streamed, and decoded by worker processes (`streaming=True`).

**Order.** Samples are numbered p = 0, 1, 2, … without end. Position p belongs to epoch e = p // N and is the picture
`sample_order(seed, e, N)[p % N]`: a function of (seed, p) alone. So any number of processes sees the same order, and
a run that restarts at p replays and skips nothing. Random crops are functions of (seed, p) too.

**Modes.** Gray pictures (1, L, LA, 16 bits) become L, all others (RGB, RGBA, palette, CMYK, …) RGB; where one dataset
holds both, all become RGB (of a stream, the first pictures decide). Transparency is composed over `background`,
16 bits are scaled to 8, the EXIF orientation is applied. `image_mode` forces L, RGB, or RGBA, which keeps alpha.

**Size.** A picture is resized, bicubic with antialiasing and in proportion, until it just covers `resolution`, and
what juts out is cropped: in the centre with `center_crop`, else at random, anew at every visit.
"""

import hashlib
import itertools
import json
import zlib
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import PIL.Image
import torch
from PIL import ImageColor, ImageOps

Row = dict[str, Any]
Batch = tuple[torch.Tensor, torch.Tensor | None]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels
GRAY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}
LABEL_NAMES = {"label", "labels", "class", "cls", "class_label", "fine_label", "coarse_label", "category", "target"}
STREAM_PEEK = 16  # first pictures of a stream, which decide its mode
STREAM_BUFFER = 1000  # undecoded rows among which a stream is shuffled
STREAM_LOOKAHEAD = 8  # unreadable rows in a row that skipping in a stream gets over


class UnreadableImageError(ValueError):
    """A row that holds no picture, or one that cannot be decoded."""


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Map uint8 pixels [0, 255] to float32 [-1, 1] by x / 127.5 - 1 (F1), on the device where they are."""
    return images.to(torch.float32) / 127.5 - 1


def denormalise(images: torch.Tensor) -> torch.Tensor:
    """Map floats [-1, 1] to uint8 [0, 255], rounded and clipped: exactly undoes `normalise`."""
    return ((images.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def sample_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation of 0 … n-1 (int64) in which epoch `epoch` >= 0 visits `n` pictures.

    NumPy's SeedSequence mixes the pair, so that (seed, epoch) = (0, 1) and (1, 0) have nothing in common.
    """
    return np.random.default_rng([seed, epoch]).permutation(n)


_recent_order = lru_cache(maxsize=2)(sample_order)


def _crop(pixels: np.ndarray, height: int, width: int, seed: int, position: int | None) -> np.ndarray:
    """Cut (C, height, width) out of what just covers it: at random, or from the centre if `position` is None."""
    # Only one axis can jut out, so one number places the crop. The third word keeps it apart from sample_order's.
    where = 0.5 if position is None else np.random.default_rng([seed, position, 1]).random()
    top, left = int(where * (pixels.shape[1] - height + 1)), int(where * (pixels.shape[2] - width + 1))
    return pixels[:, top : top + height, left : left + width]


def _eight_bit(image: PIL.Image.Image, image_mode: str | None, background: str) -> PIL.Image.Image:
    """The rule for modes of the module's docstring, for one picture: L, RGB, or the forced mode."""
    gray = image.mode in GRAY_MODES
    if image.mode == "F":
        raise ValueError("float pixels have no fixed range; store 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels of {values.min()} … {values.max()}; 16 bits hold 0 … 65535")
        image = PIL.Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("LA" if gray else "RGBA").convert("RGBA")
        if image_mode != "RGBA":
            # Under a gray picture the background counts as gray, so that transparency adds no colour.
            colour = ImageColor.getcolor(background, "L" if gray else "RGB")
            canvas = PIL.Image.new("L" if gray else "RGB", image.size, colour)
            image = PIL.Image.alpha_composite(canvas.convert("RGBA"), image)
    return image.convert(image_mode or ("L" if gray else "RGB"))


@dataclass(frozen=True)
class _Transform:
    """From a row of `datasets.Image(decode=False)` to pixels. Its fields go into the fingerprint of the cache."""

    height: int
    width: int
    center_crop: bool
    image_mode: str | None
    background: str
    version: int = 1  # raise it with every change of the pixels that come out, to disown old caches

    def __call__(self, raw: Row | None) -> tuple[str, np.ndarray]:
        """Return the mode that was found and uint8 pixels (C, h, w), larger than H x W if the crop is still to come.

        Whatever is wrong with the picture raises UnreadableImageError.
        """
        try:
            if raw is None:
                raise ValueError("the row is empty")
            found = datasets.Image().decode_example(raw)  # applies the EXIF orientation
            resize = ImageOps.fit if self.center_crop else ImageOps.cover
            image = _eight_bit(found, self.image_mode, self.background)
            image = resize(image, (self.width, self.height), method=PIL.Image.Resampling.BICUBIC)
        except Exception as error:  # decoders fed with broken files raise anything
            path = f"{raw['path']!r}, " if raw and raw["path"] else ""
            cause = f"{path}{type(error).__name__}: {_one_line(error)}"
            raise UnreadableImageError(f"no readable image ({cause}); --on_bad_image skip passes over it") from error
        pixels = np.asarray(image).reshape(image.height, image.width, -1)
        return found.mode, np.ascontiguousarray(pixels.transpose(2, 0, 1))


@dataclass(frozen=True)
class _Request:
    """What `open_images` was asked for, beside the dataset and the transform."""

    image_column: str
    label_column: str | None  # None without class_conditional
    id2label: Mapping[int, str] | None
    seed: int
    num_workers: int
    skip: bool


class ImageData:
    """Pictures of one shape in an endless order (see the module). Made by `open_images`; a subclass holds the pixels.

    Attributes:
        num_images: number N of readable pictures, or None for a stream.
        mode, channels, height, width: PIL mode and shape of every picture that comes out.
        id2label: class id -> name for the ids 0 … K-1, or None without `class_conditional`.
        fingerprint: the same for the same pictures, labels and crops (of a stream: the same source and settings).
        num_skipped: unreadable pictures left out (of a stream: replaced so far, by this process).
    """

    num_images: int | None = None
    id2label: dict[int, str] | None = None
    fingerprint: str
    num_skipped: int = 0

    def __init__(self, transform: _Transform, channels: int, found_modes: Mapping[str, int], request: _Request):
        self.channels, self.height, self.width, self.mode = channels, transform.height, transform.width, MODES[channels]
        self._transform, self._found_modes, self._request = transform, found_modes, request

    def describe(self) -> str:
        """One line for the start of a run: what was found and what is made of it."""
        number = f"a stream, its first {STREAM_PEEK}" if self.num_images is None else f"{self.num_images:,}"
        found = ", ".join(f"{count:,} {mode}" for mode, count in sorted(self._found_modes.items()))
        alpha = "kept" if self.mode == "RGBA" else f"over {self._transform.background}"
        crop = "centre" if self._transform.center_crop else "random"
        text = f"images: {number} ({found}) -> {self.mode}, transparency {alpha}; "
        text += f"{self.height}x{self.width} (height x width), {crop} crop"
        text += "" if self.id2label is None else f"; {len(self.id2label)} classes"
        return text + (f"; {self.num_skipped:,} unreadable left out" if self.num_skipped else "")

    def batches(self, positions: Iterable[Sequence[int]], pin_memory: bool = False) -> Generator[Batch, None, None]:
        """Yield for each 1-D sequence of sample positions: images uint8 (B, C, H, W) and labels int64 (B,) or None.

        Two batches are prepared ahead in a background thread, which also draws from `positions`; what it raises
        surfaces here, and closing the generator ends it. A stream is read forwards: its positions must not go back.
        """
        return _prefetch(self._read(positions), pin_memory)

    def take(self, n: int) -> Batch:
        """One batch of the first `n` pictures (or all, if fewer), in the dataset's own order and centre-cropped."""
        raise NotImplementedError

    def _read(self, positions: Iterable[Sequence[int]]) -> Iterator[Batch]:
        raise NotImplementedError


def _prefetch(batches: Iterator[Batch], pin_memory: bool) -> Generator[Batch, None, None]:
    def prepare() -> Batch | None:
        batch = next(batches, None)
        if batch is None or not pin_memory:
            return batch
        images, labels = batch
        return images.pin_memory(), None if labels is None else labels.pin_memory()

    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="images")
    try:
        pending = deque(pool.submit(prepare) for _ in range(2))
        while (batch := pending.popleft().result()) is not None:
            pending.append(pool.submit(prepare))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def _decode_row(raw: Row | None, index: int, transform: _Transform, skip: bool) -> Row:
    try:
        mode, pixels = transform(raw)
    except UnreadableImageError as error:
        if not skip:
            raise UnreadableImageError(f"row {index}: {error}") from error
        mode, pixels = "", np.empty((0, 0, 0), np.uint8)
    row = dict(zip(("channels", "height", "width"), pixels.shape, strict=True), mode=mode, pixels=pixels.tobytes())
    return row | {"checksum": zlib.crc32(row["pixels"])}


class _CachedImages(ImageData):
    """All pictures decoded and resized in a memory-mapped Arrow file, where gray ones take one channel."""

    num_images: int

    def __init__(self, dataset: datasets.Dataset, transform: _Transform, request: _Request):
        types = {"channels": "int32", "height": "int32", "width": "int32", "mode": "string", "checksum": "uint32"}
        types["pixels"] = "large_binary"
        # `map` writes to a temporary name and renames: processes that race here repeat each other's work, no more.
        table = (
            dataset.select_columns(request.image_column)
            .cast_column(request.image_column, datasets.Image(decode=False))
            .map(
                _decode_row,
                with_indices=True,
                input_columns=request.image_column,
                remove_columns=request.image_column,
                fn_kwargs={"transform": transform, "skip": request.skip},
                features=datasets.Features({name: datasets.Value(dtype) for name, dtype in types.items()}),
                writer_batch_size=min(1000, 1 + 2**26 // (transform.height * transform.width)),  # bounds the memory
                num_proc=min(request.num_workers, len(dataset)) if request.num_workers > 1 else None,
                desc="Decoding and resizing images, once",
            )
            .data
        )
        self._shapes = np.stack([table.column(name).to_numpy() for name in ("channels", "height", "width")], axis=1)
        self._rows = np.flatnonzero(self._shapes[:, 0])  # unreadable rows have no channels
        self.num_images, self.num_skipped = len(self._rows), len(dataset) - len(self._rows)
        if self.num_images == 0:
            raise ValueError(f"the dataset holds no images: none of its {len(dataset)} rows is readable")
        found = {item["values"]: item["counts"] for item in table.column("mode").value_counts().to_pylist()}
        found.pop("", None)
        super().__init__(transform, int(self._shapes[:, 0].max()), found, request)

        self._pixels = table.column("pixels")
        self._labels = None
        if request.label_column is not None:
            values = dataset[request.label_column][:]
            ids, self.id2label = _label_ids((values[row] for row in self._rows), dataset.features, request)
            self._labels = np.array([_label_id(values[row], ids, f"row {row}") for row in self._rows], np.int64)
        contents = (table.column("checksum").to_numpy()[self._rows], self._shapes[self._rows], self._labels)
        checksums = [None if array is None else zlib.crc32(array.tobytes()) for array in contents]
        self.fingerprint = _hash(self.mode, self.height, self.width, self.id2label, checksums)

    def take(self, n: int) -> Batch:
        return self._gather(np.arange(min(n, self.num_images)), positions=None)

    def _read(self, positions: Iterable[Sequence[int]]) -> Iterator[Batch]:
        for batch in positions:
            epochs, places = np.divmod(np.asarray(batch, dtype=np.int64), self.num_images)
            indices = np.empty_like(places)
            for epoch in np.unique(epochs).tolist():
                now = epochs == epoch
                indices[now] = _recent_order(self._request.seed, epoch, self.num_images)[places[now]]
            yield self._gather(indices, batch)

    def _gather(self, indices: np.ndarray, positions: Sequence[int] | None) -> Batch:
        rows = self._rows[indices]
        out = np.empty((len(rows), self.channels, self.height, self.width), np.uint8)
        for i, (row, shape) in enumerate(zip(rows.tolist(), self._shapes[rows].tolist(), strict=True)):
            pixels = np.frombuffer(self._pixels[row].as_buffer(), np.uint8).reshape(shape)
            if shape[1:] != [self.height, self.width]:
                position = None if positions is None else int(positions[i])
                pixels = _crop(pixels, self.height, self.width, self._request.seed, position)
            out[i] = pixels  # one gray channel spreads over three
        return torch.from_numpy(out), None if self._labels is None else torch.from_numpy(self._labels[indices])


class _StreamedImages(ImageData, torch.utils.data.Dataset):
    """Every process reads all rows undecoded, in the same order, and decodes those at the positions it is asked for.

    So the order does not depend on the number of processes, and a restart reads up to its position without decoding.
    Each epoch has the order of `IterableDataset.shuffle`: files shuffled, then rows within a buffer; it may change
    with the version of `datasets`. An unreadable picture is replaced by the next readable one of the stream, which is
    again a function of (seed, position). All classes must be known beforehand, from a ClassLabel column.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        transform: _Transform,
        request: _Request,
        source: Sequence[str | None],
    ):
        image, label, features = request.image_column, request.label_column, dataset.features
        # decode(False) also takes back the decoding threads that `datasets` sets up for remote files.
        dataset = dataset.decode(False).cast_column(image, datasets.Image(decode=False))
        self._dataset = dataset.select_columns([image] if label is None else [image, label])
        self._ids = dict[Any, int]()
        if label is not None:
            if not isinstance(features[label], datasets.ClassLabel):
                raise ValueError(f"label column {label!r} of a stream must be a ClassLabel, not {features[label]}")
            self._ids, self.id2label = _label_ids(range(features[label].num_classes), features, request)

        self._transform, self._request = transform, request
        first = [(mode, len(pixels)) for mode, pixels, _ in itertools.islice(self._in_sequence(), STREAM_PEEK)]
        if not first:
            raise ValueError("the stream holds no readable images")
        channels = max(channels for _, channels in first)
        transform = replace(transform, image_mode=MODES[channels])
        super().__init__(transform, channels, Counter(mode for mode, _ in first), request)
        self.fingerprint = _hash(*source, image, label, transform, self.id2label)

    def take(self, n: int) -> Batch:
        return self._stack([(pixels, None, label) for _, pixels, label in itertools.islice(self._in_sequence(), n)])

    def _read(self, positions: Iterable[Sequence[int]]) -> Iterator[Batch]:
        # The loader's "indices" are raw rows: they are read once, here, and its workers run __getitem__ on them.
        loader = torch.utils.data.DataLoader(
            self, sampler=self._windows(positions), batch_size=None, num_workers=self._request.num_workers
        )
        return self._receive(iter(loader))  # iter() starts the workers, from the caller's thread

    def _receive(self, results: Iterator[str | tuple[torch.Tensor, torch.Tensor | None, int]]) -> Iterator[Batch]:
        try:
            for result in results:
                if isinstance(result, str):
                    raise ValueError(result)
                images, labels, replaced = result
                self.num_skipped += replaced
                yield images, labels
        finally:
            del results  # ends the workers now, also where a traceback keeps this frame

    def _windows(self, positions: Iterable[Sequence[int]]) -> Iterator[list[tuple[int, list[Row]]]]:
        """For each batch: its positions, each with its raw row and after it those that may replace it."""
        epochs = (np.random.default_rng([self._request.seed, epoch]) for epoch in itertools.count())
        rows = (row for rng in epochs for row in self._dataset.shuffle(generator=rng, buffer_size=STREAM_BUFFER))
        ahead, start = deque[Row](), 0  # `ahead` holds the rows from position `start` on
        for batch in positions:
            windows = []
            for position in map(int, batch):
                if position < start:
                    raise ValueError(f"a stream is read forwards: position {position} was asked for after {start}")
                for _ in range(start, position):
                    ahead.popleft() if ahead else next(rows)
                start = position
                while len(ahead) < 1 + (STREAM_LOOKAHEAD if self._request.skip else 0):
                    ahead.append(next(rows))
                windows.append((position, list(ahead)))
            yield windows

    def __getitem__(self, windows: list[tuple[int, list[Row]]]) -> str | tuple[torch.Tensor, torch.Tensor | None, int]:
        """Decode a batch, in a worker. Errors go back as text, without the traceback that the loader would add."""
        samples, replaced = [], 0
        for position, rows in windows:
            for tried, row in enumerate(rows):
                try:
                    _, pixels, label = self._decode(row)
                    break
                except UnreadableImageError as error:
                    if tried == len(rows) - 1:
                        return f"position {position} of the stream: {error}"
                except ValueError as error:
                    return f"position {position} of the stream: {error}"
            replaced += tried > 0
            samples.append((pixels, position, label))
        return *self._stack(samples), replaced

    def _decode(self, row: Row) -> tuple[str, np.ndarray, int | None]:
        label = None
        if self._request.label_column is not None:
            label = _label_id(row[self._request.label_column], self._ids, "the row")
        return *self._transform(row[self._request.image_column]), label

    def _in_sequence(self) -> Iterator[tuple[str, np.ndarray, int | None]]:
        for index, row in enumerate(self._dataset):
            try:
                yield self._decode(row)
            except UnreadableImageError as error:
                if not self._request.skip:
                    raise UnreadableImageError(f"row {index}: {error}") from error

    def _stack(self, samples: Sequence[tuple[np.ndarray, int | None, int | None]]) -> Batch:
        shape = self.height, self.width, self._request.seed
        images = np.stack([_crop(pixels, *shape, position) for pixels, position, _ in samples])
        labels = torch.tensor([label for _, _, label in samples]) if self._ids else None
        return torch.from_numpy(images), labels


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _label_ids(
    values: Iterable[Any], features: datasets.Features, request: _Request
) -> tuple[dict[Any, int], dict[int, str]]:
    """Number the labels that occur 0 … K-1 in their own order, or as `id2label` of another split has them."""
    feature = features[request.label_column]
    is_class = isinstance(feature, datasets.ClassLabel)
    known = sorted(value for value in set(values) if value is not None and not (is_class and value < 0))
    names = {value: feature.int2str(value) if is_class else str(value) for value in known}
    id2label = dict(request.id2label or enumerate(names.values()))
    ids = {name: i for i, name in id2label.items()}
    return {value: ids[name] for value, name in names.items() if name in ids}, id2label


def _label_id(value: Any, ids: dict[Any, int], where: str) -> int:
    if value not in ids:
        raise ValueError(f"{where} has the label {value!r}, which is none of the {len(ids)} classes")
    return ids[value]


def _is(feature: Any, *types: str) -> bool:
    """Whether a feature holds plain values of one of these types, of any width."""
    return isinstance(feature, datasets.Value) and feature.dtype.removeprefix("large_").startswith(types)


def _column(features: datasets.Features, option: str, name: str | None, found: list[str], usable: list[str]) -> str:
    """The named column if its type is usable, or else the one that was found."""
    if name is None and len(found) > 1:
        raise ValueError(f"{option}: several columns fit, name one of {', '.join(found)}")
    if name is None and found:
        return found[0]
    if name is None or name not in usable:
        problem = "no column fits" if name is None else f"{name!r} is no column of a type that fits"
        columns = (f"{column} ({getattr(feature, 'dtype', 'nested')})" for column, feature in features.items())
        raise ValueError(f"{option}: {problem}; there are {', '.join(columns)}")
    return name


def _image_column(features: datasets.Features, name: str | None) -> str:
    found = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    plain = [column for column, feature in features.items() if _is(feature, "string", "binary")]
    return _column(features, "image_column", name, found, found + plain)


def _label_column(features: datasets.Features, name: str | None) -> str:
    classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    plain = [column for column, feature in features.items() if _is(feature, "int", "uint", "string", "bool")]
    found = classes or [column for column in plain if column in LABEL_NAMES]
    return _column(features, "label_column", name, found, classes + plain)


def _load(path: str | None, image_folder: str | None, **options: Any) -> datasets.Dataset | datasets.IterableDataset:
    """`load_dataset`, for single files and for what `save_to_disk` wrote as well; its errors in one line."""
    folder = Path(path or "")
    try:
        if image_folder is not None:
            return datasets.load_dataset("imagefolder", data_dir=image_folder, **options)
        if folder.is_file():
            return datasets.load_dataset(str(folder.parent), data_files=folder.name, **options)
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
            files = {split: f"{folder}/{split}/data-*.arrow" for split in splits}
            return datasets.load_dataset("arrow", data_files=files, **options)
        if (folder / "state.json").is_file():
            return datasets.load_dataset("arrow", data_files=f"{folder}/data-*.arrow", **options)
        return datasets.load_dataset(path, **options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
            error = error.__cause__  # it alone says what went wrong
        raise ValueError(f"cannot open the dataset {path or image_folder!r}: {_one_line(error)}") from error


def open_images(
    *,
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    dataset_config_name: str | None = None,
    dataset_revision: str | None = None,
    split: str = "train",
    cache_dir: str | None = None,
    streaming: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    class_conditional: bool = False,
    id2label: Mapping[int, str] | None = None,
    on_bad_image: Literal["raise", "skip"] = "raise",
    image_mode: str | None = None,
    background: str = "white",
    resolution: int | Sequence[int],
    center_crop: bool = False,
    num_workers: int = 0,
    seed: int = 0,
) -> ImageData:
    """Open a dataset of images and, unless it is streamed, decode and resize it into the cache.

    Args:
        dataset_name: name on the Hub (private datasets: log in or set HF_TOKEN), or path of a dataset's folder, of a
            single parquet, arrow or webdataset (tar) file, or of a folder that `save_to_disk` wrote.
        train_data_dir: instead of it, a folder of image files, whose sub-folders are classes.
        split: any split expression, as "train[:90%]" (a stream: names only, as "train+test").
        image_column, label_column: found by type if None: the only Image; the only ClassLabel or else the only column
            of integers or strings with a name like "label" (LABEL_NAMES).
        class_conditional: whether there are labels. Those that occur are numbered 0 … K-1, gaps closed.
        id2label: the numbering to take instead. For a held-out split pass that of the training data, with
            `image_mode=train.mode` and `center_crop=True`.
        on_bad_image: what to do about rows that are no readable picture: stop and name the first, or pass over them.
        image_mode: "L", "RGB" or "RGBA", or None for the rule in the module's docstring.
        background: colour under transparent pixels, any name or #rrggbb that Pillow knows.
        resolution: one side, or (height, width), in pixels.
        num_workers: processes that decode, for the cache or a stream; 0 decodes in this process.
        seed: of the order and the crops, >= 0.

    Raises:
        ValueError: one line that names the argument, the value, and what would be right.
    """
    sides = [resolution] if isinstance(resolution, int) else list(resolution)
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError(f"resolution must be one or two numbers of pixels, at least 1, not {resolution}")
    if image_mode not in (None, *MODES.values()):
        raise ValueError(f"image_mode must be one of {', '.join(MODES.values())}, not {image_mode!r}")
    if on_bad_image not in ("raise", "skip"):
        raise ValueError(f"on_bad_image must be raise or skip, not {on_bad_image!r}")
    try:
        ImageColor.getcolor(background, "RGB")
    except ValueError as error:
        raise ValueError(f"background must be a colour's name or #rrggbb, not {background!r}") from error
    if seed < 0:
        raise ValueError(f"seed must not be negative, not {seed}")
    if bool(dataset_name) == bool(train_data_dir):
        raise ValueError("give either dataset_name or train_data_dir")
    if label_column is not None and not class_conditional:
        raise ValueError(f"label_column {label_column!r} is of use only with class_conditional")

    options = {"name": dataset_config_name, "revision": dataset_revision, "split": split}
    dataset = _load(dataset_name, train_data_dir, cache_dir=cache_dir, streaming=streaming, **options)
    if dataset.features is None:
        raise ValueError("this stream does not declare the types of its columns; open it without streaming")
    image_column = _image_column(dataset.features, image_column)
    if class_conditional:
        label_column = _label_column(dataset.features, label_column)
    transform = _Transform(sides[0], sides[-1], center_crop, image_mode, background)
    request = _Request(image_column, label_column, id2label, seed, num_workers, on_bad_image == "skip")
    if not streaming:
        return _CachedImages(dataset, transform, request)
    source = [dataset_name, train_data_dir, dataset_config_name, dataset_revision, split]
    return _StreamedImages(dataset, transform, request, source)
