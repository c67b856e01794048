"""Turn the IDX files of Fashion-MNIST into a dataset that `load_dataset` opens, with splits `train` and `test`.

    python examples/make_fashion_mnist.py <folder with the four IDX files, as they are or gzipped> <new folder>

The files come from https://github.com/zalandoresearch/fashion-mnist, or on Debian and Ubuntu from
`apt install dataset-fashion-mnist`, which puts them into `/usr/share/datasets/fashion-mnist`.

Fashion-MNIST is the work of Zalando SE (H. Xiao, K. Rasul and R. Vollgraf, 2017, https://arxiv.org/abs/1708.07747),
under the MIT licence.
"""

import argparse
import gzip
import math
import sys
import zlib
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]

CARD = """\
---
pretty_name: Fashion-MNIST
license: mit
---

# Fashion-MNIST

60,000 training and 10,000 test pictures of clothes, gray, 28x28, in 10 classes. Copyright 2017 Zalando SE, MIT licence,
<https://github.com/zalandoresearch/fashion-mnist>.
"""


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped if its name ends in `.gz`.

    The format: the bytes 0, 0, 8 (unsigned byte), `ndim`; then `ndim` lengths as big-endian 32-bit integers; then the
    values, last axis fastest.

    Returns:
        A uint8 array of `ndim` axes.

    Raises:
        ValueError: if the file is no such array, or is cut short, or too long.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    magic, start = bytes([0, 0, 8, ndim]), 4 + 4 * ndim
    if data[:4] != magic or len(data) < start:
        raise ValueError(
            f"{path} does not begin like an IDX file of bytes with {ndim} axes: "
            f"{data[:4].hex()} instead of {magic.hex()}"
        )
    shape = [int(length) for length in np.frombuffer(data[4:start], ">u4")]
    if len(data) - start != math.prod(shape):
        raise ValueError(f"{path} holds {len(data) - start} values, its header says {shape}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def fashion_mnist(folder: Path, prefix: str) -> Dataset:
    """The pictures (mode L) and labels of the files in `folder` whose names begin with `prefix`: `train` or `t10k`."""

    def read(name: str, ndim: int) -> np.ndarray:
        path = folder / f"{prefix}-{name}"
        return read_idx(path if path.exists() else path.with_name(path.name + ".gz"), ndim)

    pictures, labels = read("images-idx3-ubyte", 3), read("labels-idx1-ubyte", 1)
    if len(pictures) != len(labels):
        raise ValueError(f"{folder} has {len(pictures)} pictures but {len(labels)} labels for {prefix}")
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    columns = {"image": [PILImage.fromarray(picture) for picture in pictures], "label": labels}
    return Dataset.from_dict(columns, features=features)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with the four IDX files")
    parser.add_argument("output", type=Path, help="folder to make")
    arguments = parser.parse_args()
    try:
        splits = {
            name: fashion_mnist(arguments.source, prefix) for name, prefix in [("train", "train"), ("test", "t10k")]
        }
        arguments.output.mkdir(parents=True)
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")
    for name, split in splits.items():
        split.to_parquet(arguments.output / f"{name}.parquet")
    (arguments.output / "README.md").write_text(CARD)
