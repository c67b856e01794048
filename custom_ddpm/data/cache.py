"""Images decoded and resized once, into a memory-mapped Arrow file in the cache of `datasets`."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import datasets
import numpy as np
import torch

from .base import Batch, ImageData, Request, fingerprint, sample_order
from .labels import label_id, number_labels
from .pixels import Row, Transform, UnreadableImageError, crop

_recent_order = lru_cache(maxsize=2)(sample_order)


def _decode_row(raw: Row | None, index: int, transform: Transform, skip: bool) -> Row:
    """Decode one image to a row of the cache file; an unreadable one, with `skip`, to a row with 0 channels."""
    try:
        mode, pixels = transform(raw)
    except UnreadableImageError as error:
        if not skip:
            raise UnreadableImageError(f"row {index}: {error}") from error
        mode, pixels = "", np.empty((0, 0, 0), np.uint8)
    row = dict(zip(("channels", "height", "width"), pixels.shape, strict=True), mode=mode, pixels=pixels.tobytes())
    return row | {"checksum": zlib.crc32(row["pixels"])}


_decode_row.__module__ = "custom_ddpm.data"  # part of the cache file's name, see there


class CachedImages(ImageData):
    """Images decoded and resized once into a memory-mapped Arrow file, which later runs reuse.

    The file's name is a hash of dataset and transform, and all processes of a machine share it. Grayscale images are
    stored with one channel, also where the batches have three.

    Args:
        dataset: rows of images, and of labels if the request names a label column.
        transform: decoding of the images.
        request: columns, seed and treatment of unreadable images.

    Raises:
        UnreadableImageError: for the first unreadable image, unless `request.skip`.
        ValueError: if no image is readable, or a label is missing.
    """

    num_images: int

    def __init__(self, dataset: datasets.Dataset, transform: Transform, request: Request):
        table = self._decode(dataset, transform, request)
        self._shapes = np.stack([table.column(name).to_numpy() for name in ("channels", "height", "width")], axis=1)
        self._rows = np.flatnonzero(self._shapes[:, 0])  # unreadable rows have 0 channels
        self.num_images, self.num_skipped = len(self._rows), len(dataset) - len(self._rows)
        if self.num_images == 0:
            raise ValueError(f"the dataset holds no images: none of its {len(dataset)} rows is readable")
        found = {item["values"]: item["counts"] for item in table.column("mode").value_counts().to_pylist()}
        found.pop("", None)
        super().__init__(transform, int(self._shapes[:, 0].max()), found, request)

        self._pixels = table.column("pixels")
        self._labels = None
        if request.label_column is not None:
            values, feature = dataset[request.label_column][:], dataset.features[request.label_column]
            ids, self.id2label = number_labels((values[row] for row in self._rows), feature, request.id2label)
            self._labels = np.array([label_id(values[row], ids, f"row {row}") for row in self._rows], np.int64)
        contents = (table.column("checksum").to_numpy()[self._rows], self._shapes[self._rows], self._labels)
        checksums = [None if array is None else zlib.crc32(array.tobytes()) for array in contents]
        self.fingerprint = fingerprint(self.mode, self.height, self.width, self.id2label, checksums)

    @staticmethod
    def _decode(dataset: datasets.Dataset, transform: Transform, request: Request) -> datasets.table.Table:
        """Return the decoded rows, from the cache file if it exists."""
        types = {"channels": "int32", "height": "int32", "width": "int32", "mode": "string", "checksum": "uint32"}
        types["pixels"] = "large_binary"
        # `map` writes to a temporary file and renames it: concurrent processes at worst repeat each other's work.
        return (
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

    def take(self, n: int) -> Batch:
        """Return the first `n` images (all, if there are fewer), see `ImageData.take`."""
        return self._gather(np.arange(min(n, self.num_images)), positions=None)

    def label_counts(self) -> list[int] | None:
        """Number of images of each class id, see `ImageData.label_counts`."""
        return None if self._labels is None else np.bincount(self._labels, minlength=len(self.id2label or ())).tolist()

    def _read(self, positions: Iterable[Sequence[int]]) -> Iterator[Batch]:
        for batch in positions:
            epochs, places = np.divmod(np.asarray(batch, dtype=np.int64), self.num_images)
            indices = np.empty_like(places)
            for epoch in np.unique(epochs).tolist():
                now = epochs == epoch
                indices[now] = _recent_order(self._request.seed, epoch, self.num_images)[places[now]]
            yield self._gather(indices, batch)

    def _gather(self, indices: np.ndarray, positions: Sequence[int] | None) -> Batch:
        """Copy images, given by their indices among the readable ones, into a batch, and crop them."""
        rows = self._rows[indices]
        out = np.empty((len(rows), self.channels, self.height, self.width), np.uint8)
        for i, (row, shape) in enumerate(zip(rows.tolist(), self._shapes[rows].tolist(), strict=True)):
            pixels = np.frombuffer(self._pixels[row].as_buffer(), np.uint8).reshape(shape)
            if shape[1:] != [self.height, self.width]:
                position = None if positions is None else int(positions[i])
                pixels = crop(pixels, self.height, self.width, self._request.seed, position)
            out[i] = pixels  # one gray channel broadcasts to three
        return torch.from_numpy(out), None if self._labels is None else torch.from_numpy(self._labels[indices])
