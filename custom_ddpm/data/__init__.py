"""Image datasets as uint8 batches: any dataset that 🤗 Datasets can open, in an endless order given by a seed.

`open_images` decodes and resizes every image once, into a memory-mapped Arrow file in the cache of `datasets` that all
processes of a machine share. With `streaming=True` images are decoded while they are read, and nothing is cached.

Modules:
    pixels: normalisation to [-1, 1] (F1), image modes, resizing and cropping.
    labels: choice of the image and label columns, numbering of the classes.
    base: the common interface `ImageData`, the order of the samples, prefetching.
    cache, stream: images read from the cache, or streamed.
    folder, folder_dataset: listing of a local folder of pictures, and a dataset of the paths.
    sources: `open_images`.
"""

from .base import Batch, ImageData, sample_order

# The cache file's name is a hash of the pickled function and transform, which contains the names under which these two
# are importable. They keep the names of version 0.1, so that existing cache files remain valid.
from .cache import CachedImages, _decode_row  # noqa: F401
from .pixels import Transform as _Transform  # noqa: F401
from .pixels import UnreadableImageError, denormalise, normalise
from .sources import open_images
from .stream import StreamedImages

__all__ = [
    "Batch",
    "CachedImages",
    "ImageData",
    "StreamedImages",
    "UnreadableImageError",
    "denormalise",
    "normalise",
    "open_images",
    "sample_order",
]
