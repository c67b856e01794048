"""Choice of the image and label columns of a dataset, and numbering of its classes."""

from collections.abc import Iterable, Mapping
from typing import Any

import datasets

LABEL_NAMES = {"label", "labels", "class", "cls", "class_label", "fine_label", "coarse_label", "category", "target"}


def number_labels(
    values: Iterable[Any], feature: Any, id2label: Mapping[int, str] | None
) -> tuple[dict[Any, int], dict[int, str]]:
    """Number the labels that occur from 0 to K-1 in sorted order, or as a given `id2label` numbers them.

    Args:
        values: values of the label column; None, and -1 in a ClassLabel column, mean "no label".
        feature: type of the label column.
        id2label: class id -> name to use instead, e.g. that of the training split for a held-out split.

    Returns:
        Mappings value -> class id and class id -> name. Values without a name in `id2label` are missing in the first.
    """
    is_class = isinstance(feature, datasets.ClassLabel)
    known = sorted(value for value in set(values) if value is not None and not (is_class and value < 0))
    names = {value: feature.int2str(value) if is_class else str(value) for value in known}
    id2label = dict(id2label or enumerate(names.values()))
    ids = {name: i for i, name in id2label.items()}
    return {value: ids[name] for value, name in names.items() if name in ids}, id2label


def label_id(value: Any, ids: Mapping[Any, int], where: str) -> int:
    """Look up the class id of a label.

    Args:
        value: value of the label column.
        ids: value -> class id, from `number_labels`.
        where: the row in words, for the error message.

    Raises:
        ValueError: if the label is missing or belongs to no class.
    """
    if value not in ids:
        raise ValueError(f"{where} has the label {value!r}, which is not one of the {len(ids)} classes")
    return ids[value]


def find_image_column(features: datasets.Features, name: str | None) -> str:
    """Return the column with the images.

    Args:
        features: column types of the dataset.
        name: a column of type Image, or of paths (strings) or encoded images (bytes); None: the only column of type
            Image or, without any, the only one of Image's storage type {"bytes", "path"}, which parquet files without
            metadata of `datasets` have.

    Raises:
        ValueError: if `name` is not such a column, or None and there is not exactly one candidate.
    """
    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    stored = [column for column, feature in features.items() if _is_image_storage(feature)]
    plain = [column for column, feature in features.items() if _has_type(feature, "string", "binary")]
    return _column(features, "image_column", name, images or stored, images + stored + plain)


def find_label_column(features: datasets.Features, name: str | None) -> str:
    """Return the column with the class labels.

    Args:
        features: column types of the dataset.
        name: a column of type ClassLabel, integer, string or bool; None: the only ClassLabel column or, without any,
            the only one of the other types with a name in `LABEL_NAMES`.

    Raises:
        ValueError: if `name` is not such a column, or None and there is not exactly one candidate.
    """
    classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    plain = [column for column, feature in features.items() if _has_type(feature, "int", "uint", "string", "bool")]
    found = classes or [column for column in plain if column in LABEL_NAMES]
    return _column(features, "label_column", name, found, classes + plain)


def usable_label_column(dataset: datasets.Dataset | datasets.IterableDataset) -> str | None:
    """The column of labels of a dataset whose owner did not ask for classes; None if there is none that makes sense.

    There must be one suitable column, as `find_label_column` takes it; in a dataset that is no stream, every picture
    must have a label, there must be two classes or more, and ten pictures or more for each on average.
    """
    assert dataset.features is not None
    try:
        column = find_label_column(dataset.features, None)
    except ValueError:
        return None
    if isinstance(dataset, datasets.IterableDataset):
        return column if isinstance(dataset.features[column], datasets.ClassLabel) else None
    values = dataset.unique(column)
    usable = None not in values and 2 <= len(values) <= len(dataset) / 10
    return column if usable else None


def _has_type(feature: Any, *types: str) -> bool:
    """Whether a feature is a scalar of one of these types, of any width."""
    return isinstance(feature, datasets.Value) and feature.dtype.removeprefix("large_").startswith(types)


def _is_image_storage(feature: Any) -> bool:
    """Whether a feature is a struct of an image's bytes and, perhaps, its path."""
    return (
        isinstance(feature, dict)
        and feature.keys() in ({"bytes"}, {"bytes", "path"})
        and _has_type(feature["bytes"], "binary")
        and _has_type(feature.get("path", datasets.Value("string")), "string", "null")
    )


def _column(features: datasets.Features, option: str, name: str | None, found: list[str], usable: list[str]) -> str:
    """Return the named column if its type is usable; without a name, the only candidate in `found`."""
    if name is None and len(found) > 1:
        raise ValueError(f"{option}: several columns are suitable, choose one of {', '.join(found)}")
    if name is None and found:
        return found[0]
    if name is None or name not in usable:
        problem = "no column is suitable" if name is None else f"{name!r} is not a column of a suitable type"
        columns = (f"{column} ({getattr(feature, 'dtype', 'nested')})" for column, feature in features.items())
        raise ValueError(f"{option}: {problem}; the columns are {', '.join(columns)}")
    return name
