"""Small image datasets for the tests, written as parquet files."""

import io

import datasets
import numpy as np
import PIL.Image


def encoded(image, **options):
    """Encode an image as PNG, or as TIFF if PNG does not support its mode."""
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if image.mode in ("CMYK", "F") else "PNG", **options)
    return buffer.getvalue()


def image_of(pixels, mode=None):
    """Return a PIL image of these pixels, converted to a mode if one is given."""
    image = PIL.Image.fromarray(np.asarray(pixels))
    return image if mode is None else image.convert(mode)


def make(folder, images, split="train", **columns):
    """Write a parquet dataset: images (PIL, encoded bytes, or None: an empty row) and other columns (values, type)."""
    rows = [None if i is None else {"bytes": i if isinstance(i, bytes) else encoded(i), "path": None} for i in images]
    features = {"image": datasets.Image()} | {name: dtype for name, (_, dtype) in columns.items()}
    data = {"image": rows} | {name: values for name, (values, _) in columns.items()}
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(data, datasets.Features(features)).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def numbered(n, size=4):
    """Return n constant grayscale images; all pixels of the i-th are i."""
    return [image_of(np.full((size, size), i, np.uint8)) for i in range(n)]


def visited(data, batches):
    """Return the numbers of the `numbered` images in the order of the batches."""
    return [int(image[0, 0, 0]) for images, _ in data.batches(batches) for image in images]


# The first bytes of a PNG file.
TRUNCATED = encoded(image_of(np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)))[:300]
