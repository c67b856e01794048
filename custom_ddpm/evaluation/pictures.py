"""Sets of pictures to evaluate: drawn by a model, or read from a dataset, a folder of pictures or an NPZ file.

Every set is numbered by positions 0 … N−1 in a random order (a model's by its seeds), and is read in batches of which
every process gets its share.
"""

import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..data.base import Batch, ImageData, fingerprint
from ..data.folder import Folder, list_folder
from ..data.pixels import MODES
from ..data.sources import open_images
from ..messages import one_line
from ..pipelines.pipeline_custom_ddpm import CustomDDPMPipeline
from ..sampling import process_state, sample_images

NumberedBatch = tuple[Sequence[int], torch.Tensor, torch.Tensor | None]


class Pictures(Protocol):
    """A set of pictures of one size.

    Attributes:
        description: what it is, for the report.
        num_images: number of pictures.
        channels, height, width: shape of each.
        fingerprint: equal for equal pictures; None if that is not known.
    """

    description: str
    num_images: int
    channels: int
    height: int
    width: int
    fingerprint: str | None

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[NumberedBatch]:
        """Yield (positions, uint8 pictures, labels or None) of this process, for the positions start … stop−1.

        Must be iterated to the end by all processes. A batch may be empty.
        """


def _shares(batch_size: int, start: int, stop: int) -> Iterator[range]:
    """The positions of this process, in batches; every process gets equally many batches."""
    state = process_state()
    for first in range(start, stop, batch_size * state.num_processes):
        begin = first + state.process_index * batch_size
        yield range(min(begin, stop), min(begin + batch_size, stop))


@dataclass
class DatasetPictures:
    """The first `num_images` pictures of a dataset in its random order; all if None."""

    data: ImageData
    description: str
    limit: int | None = None
    num_images: int = field(init=False)

    def __post_init__(self) -> None:
        assert self.data.num_images is not None  # not a stream
        self.num_images = min(self.data.num_images, self.limit or self.data.num_images)
        self.channels, self.height, self.width = self.data.channels, self.data.height, self.data.width
        # The order, and with it the choice of a part, is that of seed 0.
        self.fingerprint: str | None = fingerprint(self.data.fingerprint, self.num_images)

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[NumberedBatch]:
        """See `Pictures`."""
        stop = self.num_images if stop is None else min(stop, self.num_images)
        shares = list(_shares(batch_size, start, stop))
        read: Iterator[Batch] = self.data.batches(share for share in shares if len(share))
        for share in shares:
            if len(share):
                yield (share, *next(read))
            else:
                yield share, torch.empty(0, self.channels, self.height, self.width, dtype=torch.uint8), None


@dataclass
class ArrayPictures:
    """Pictures in memory, uint8 (N, C, H, W), in the given order."""

    images: torch.Tensor
    description: str
    labels: torch.Tensor | None = None
    fingerprint: str | None = field(init=False)

    def __post_init__(self) -> None:
        self.num_images, self.channels, self.height, self.width = self.images.shape
        self.fingerprint = fingerprint(tuple(self.images.shape), self.images.contiguous().numpy().tobytes())

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[NumberedBatch]:
        """See `Pictures`."""
        for share in _shares(batch_size, start, self.num_images if stop is None else min(stop, self.num_images)):
            chosen = slice(share.start, share.stop)
            yield share, self.images[chosen], None if self.labels is None else self.labels[chosen]


@dataclass
class ModelPictures:
    """Pictures that a model draws, one for each seed; the classes in turn for a class-conditional model."""

    pipeline: CustomDDPMPipeline
    description: str
    num_images: int
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        config = self.pipeline.unet.config
        size: int | list[int] = config.sample_size
        self.channels: int = config.in_channels
        self.height, self.width = (size, size) if isinstance(size, int) else size
        names = self.pipeline.config.id2label
        self._classes = len(names) if names else config.num_class_embeds

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[NumberedBatch]:
        """See `Pictures`."""
        state = process_state()
        stop = self.num_images if stop is None else min(stop, self.num_images)
        for first in range(start, stop, batch_size * state.num_processes):
            every = range(first, min(first + batch_size * state.num_processes, stop))
            labels = [i % self._classes for i in every] if self._classes else None
            images = sample_images(
                self.pipeline, [self.seed + i for i in every], labels, batch_size=batch_size, **self.options
            )
            begin = min(state.process_index * batch_size, len(every))
            mine = slice(begin, min(begin + batch_size, len(every)))
            yield every[mine], images[mine], None if labels is None else torch.tensor(labels[mine])


def is_model(path: str) -> bool:
    """Whether a local folder, or a repository on the Hub that is no local path, holds a pipeline."""
    if os.path.exists(path):
        return Path(path, "model_index.json").is_file()
    try:
        hf_hub_download(path, "model_index.json")
    except (LocalEntryNotFoundError, HfHubHTTPError, EntryNotFoundError, HFValidationError, OSError):
        return False  # a dataset, or nothing: opening it says what is wrong
    return True


def open_model(
    path: str, num_images: int, seed: int, options: Mapping[str, Any], device: torch.device
) -> ModelPictures:
    """The pictures that a model draws with the seeds seed … seed + num_images − 1.

    Raises:
        OSError, ValueError: the model cannot be loaded.
    """
    pipeline = CustomDDPMPipeline.from_pretrained(path).to(device)
    pipeline.set_progress_bar_config(disable=True)
    settings = "".join(f", {name} {value}" for name, value in options.items())
    description = f"{path}, seeds {seed} to {seed + num_images - 1}{settings}"
    return ModelPictures(pipeline, description, num_images, seed, options)


def _picture_folder(path: str) -> Folder | None:
    """The listing of a folder of pictures, without the grid that `custom-ddpm sample` puts beside them."""
    if not os.path.isdir(path):
        return None
    try:
        folder = list_folder(path)
    except (ValueError, OSError):
        return None  # a dataset, or nothing: opening it says what is wrong
    names = [os.path.basename(picture.path) for picture in folder.pictures]
    if any(name.startswith("seed-") for name in names):
        for picture in [picture for picture in folder.pictures if os.path.basename(picture.path) == "grid.png"]:
            folder.pictures.remove(picture)
            folder.leave_out(picture.path, "grid of the others")
    return folder if folder.pictures else None


def _open_npz(path: str) -> ArrayPictures:
    """Pictures of an NPZ file: `arr_0`, uint8 (N, H, W, C) or (N, H, W), as evaluation suites exchange them."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file["arr_0"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no NPZ file of pictures with an array arr_0: {one_line(error)}") from error
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in MODES or not len(images):
        raise ValueError(
            f"{path} has an array of {images.dtype} {images.shape}; pictures are uint8 (N, height, width, channels)"
        )
    return ArrayPictures(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), path)


def open_dataset(
    path: str,
    split: str = "train",
    *,
    num_images: int | None = None,
    resolution: Sequence[int] | None = None,
    channels: int | None = None,
    class_conditional: bool = False,
    id2label: Mapping[int, str] | None = None,
    cache_dir: str | None = None,
) -> DatasetPictures | ArrayPictures:
    """Open a dataset, a folder of pictures or an NPZ file, resized and cropped at the centre.

    Args:
        path: as `dataset_name` of `open_images`, or a folder of pictures, or a file NAME.npz.
        split: split expression.
        num_images: number of pictures, chosen at random; all if None or if there are fewer.
        resolution: one number, or height and width; None: that of the first picture of a folder or an NPZ file; with
            `class_conditional`, the size that a run would train at.
        channels: 1, 3 or 4 to convert to; None: those of the pictures.
        class_conditional, id2label, cache_dir: see `open_images`.

    Raises:
        ValueError: one line with what is wrong.
    """
    if path.endswith(".npz") and os.path.isfile(path):
        pictures = _open_npz(path)
        if resolution is not None and (pictures.height, pictures.width) != (resolution[0], resolution[-1]):
            size = f"{pictures.height}x{pictures.width}"
            raise ValueError(f"{path} has pictures of {size}; they are not resized, resolution is {list(resolution)}")
        return ArrayPictures(pictures.images[:num_images], path)
    folder = _picture_folder(path)
    if folder is not None and resolution is None and not class_conditional:
        with PIL.Image.open(folder.pictures[0].path) as first:
            resolution = (first.height, first.width)
    if resolution is None and not class_conditional:
        raise ValueError(f"the size of the pictures of {path} is not known; give it with --resolution")
    source: dict[str, Any] = {"dataset_name": path} if folder is None else {"train_data_dir": folder}
    with process_state().local_main_process_first():
        data = open_images(
            **source,
            split=split,
            resolution=resolution,
            center_crop=True,
            image_mode=None if channels is None else MODES[channels],
            class_conditional=class_conditional,
            id2label=id2label,
            cache_dir=cache_dir,
        )
    return DatasetPictures(data, f"{path}, split {split}", num_images)
