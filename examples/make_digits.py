"""Write `examples/digits`: the UCI handwritten digits as a dataset that `load_dataset` opens.

The repository holds the result already; this script is its record. It needs scikit-learn, which ships the digits:

    python examples/make_digits.py

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49, CC BY 4.0; the 1,797 pictures of its test set, in scikit-learn's order.
"""

from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits


def digits() -> Dataset:
    """The 1,797 gray 8x8 pictures and their labels.

    A pixel of the source counts the inked dots of a 4x4 cell, 0 to 16; it is stored as `round(count * 255 / 16)`,
    bright ink on black, so that the range of a PNG is used in full and the count can be had back.
    """
    counts, labels = load_digits(return_X_y=True)
    pixels = np.rint(counts.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    columns = {"image": [PILImage.fromarray(picture) for picture in pixels], "label": labels}
    return Dataset.from_dict(columns, features=features)


if __name__ == "__main__":
    digits().to_parquet(Path(__file__).parent / "digits" / "train.parquet")
