"""Images that are streamed: read and decoded at every visit, for datasets too large to cache."""

import itertools
import signal
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import torch

from ..messages import one_line
from .base import STREAM_PEEK, Batch, ImageData, Request, fingerprint
from .labels import label_id, number_labels
from .pixels import MODES, Row, Transform, UnreadableImageError, crop

STREAM_BUFFER = 1000  # number of undecoded rows in the shuffle buffer
STREAM_LOOKAHEAD = 8  # number of consecutive unreadable images that `skip` can replace

Window = list[tuple[int, list[Row]]]  # the positions of a batch, each with its row and the rows that may replace it
Result = str | tuple[torch.Tensor, torch.Tensor | None, int]  # an error, or images, labels, number of replaced images


def _rows(dataset: datasets.IterableDataset) -> Iterator[Row]:
    """Iterate over a stream, with errors as ValueErrors of one line.

    Readers of many formats raise exceptions of any type where a file is damaged.
    """
    rows = iter(dataset)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise ValueError(f"cannot read the dataset further: {one_line(error)}") from error
        yield row


class StreamedImages(ImageData, torch.utils.data.Dataset):
    """Images read from a stream and decoded by worker processes.

    Every process reads all rows undecoded, in the same order, and decodes those at the positions requested from it.
    Therefore the order does not depend on the number of processes, and a restart reads up to its position without
    decoding. Each epoch has the order of `IterableDataset.shuffle`: files shuffled, then rows within a buffer; it may
    change between versions of `datasets`. With `request.skip` an unreadable image is replaced by the next readable one
    of the stream, which is also a function of (seed, position).

    Args:
        dataset: stream of rows of images, and of labels if the request names a label column.
        transform: decoding of the images.
        request: columns, seed, number of workers and treatment of unreadable images.
        source: the arguments that identify the dataset, for the fingerprint.

    Raises:
        ValueError: if none of the images is readable, or the label column is not a ClassLabel, which alone makes all
            classes known in advance.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        transform: Transform,
        request: Request,
        source: Sequence[str | None],
    ):
        image, label, features = request.image_column, request.label_column, dataset.features
        # decode(False) also removes the decoding threads that `datasets` sets up for remote files.
        dataset = dataset.decode(False).cast_column(image, datasets.Image(decode=False))
        self._dataset = dataset.select_columns([image] if label is None else [image, label])
        self._ids = dict[Any, int]()
        if label is not None:
            feature = features[label]
            if not isinstance(feature, datasets.ClassLabel):
                raise ValueError(f"label column {label!r} of a stream must be a ClassLabel, not {feature}")
            self._ids, self.id2label = number_labels(range(feature.num_classes), feature, request.id2label)

        self._transform, self._request = transform, request
        first = [(mode, len(pixels)) for mode, pixels, _ in itertools.islice(self._in_sequence(), STREAM_PEEK)]
        if not first:
            raise ValueError("the stream holds no readable images")
        channels = max(channels for _, channels in first)
        transform = replace(transform, image_mode=MODES[channels])
        super().__init__(transform, channels, Counter(mode for mode, _ in first), request)
        self.fingerprint = fingerprint(*source, image, label, transform, self.id2label)

    def take(self, n: int) -> Batch:
        """Return the first `n` images (all, if there are fewer), see `ImageData.take`."""
        return self._stack([(pixels, None, label) for _, pixels, label in itertools.islice(self._in_sequence(), n)])

    def _read(self, positions: Iterable[Sequence[int]]) -> Iterator[Batch]:
        # The loader's "indices" are undecoded rows: they are read once, in this process, and its workers run
        # __getitem__ on them.
        loader = torch.utils.data.DataLoader(
            self,
            sampler=self._windows(positions),
            batch_size=None,
            num_workers=self._request.num_workers,
            worker_init_fn=_ignore_stop_signals,
        )
        return self._receive(iter(loader))  # iter() starts the workers, here in the caller's thread

    def _receive(self, results: Iterator[Result]) -> Iterator[Batch]:
        """Yield the workers' batches, count replaced images and raise errors."""
        try:
            for result in results:
                if isinstance(result, str):
                    raise ValueError(result)
                images, labels, replaced = result
                self.num_skipped += replaced
                yield images, labels
        finally:
            del results  # stops the workers now, even if a traceback keeps this frame alive

    def _windows(self, positions: Iterable[Sequence[int]]) -> Iterator[Window]:
        """Yield the undecoded rows of each batch."""
        epochs = (np.random.default_rng([self._request.seed, epoch]) for epoch in itertools.count())
        orders = (self._dataset.shuffle(generator=rng, buffer_size=STREAM_BUFFER) for rng in epochs)
        rows = (row for order in orders for row in _rows(order))
        ahead, start = deque[Row](), 0  # `ahead` holds the rows from position `start` on
        for batch in positions:
            windows = []
            for position in map(int, batch):
                if position < start:
                    raise ValueError(f"a stream can only be read forwards: position {position} requested after {start}")
                for _ in range(start, position):
                    ahead.popleft() if ahead else next(rows)
                start = position
                while len(ahead) < 1 + (STREAM_LOOKAHEAD if self._request.skip else 0):
                    ahead.append(next(rows))
                windows.append((position, list(ahead)))
            yield windows

    def __getitem__(self, windows: Window) -> Result:
        """Decode a batch, in a worker; errors are returned as text, since the loader would add a traceback to them."""
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
        """Return the mode found, the pixels and the class id of a row."""
        label = None
        if self._request.label_column is not None:
            label = label_id(row[self._request.label_column], self._ids, "the row")
        return *self._transform(row[self._request.image_column]), label

    def _in_sequence(self) -> Iterator[tuple[str, np.ndarray, int | None]]:
        """Decode the rows from the first one on, in the order of the dataset."""
        for index, row in enumerate(_rows(self._dataset)):
            try:
                yield self._decode(row)
            except UnreadableImageError as error:
                if not self._request.skip:
                    raise UnreadableImageError(f"row {index}: {error}") from error

    def _stack(self, samples: Sequence[tuple[np.ndarray, int | None, int | None]]) -> Batch:
        """Crop (pixels, position, class id) and collect them into a batch."""
        shape = self.height, self.width, self._request.seed
        images = np.stack([crop(pixels, *shape, position) for pixels, position, _ in samples])
        labels = torch.tensor([label for _, _, label in samples]) if self._ids else None
        return torch.from_numpy(images), labels


def _ignore_stop_signals(worker: int) -> None:
    """Let a worker outlive a signal to the whole process group, so that the main process can end in order."""
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
