"""custom_ddpm/data/labels.py: numbering of the classes, choice of the columns."""

import datasets
import pytest

from custom_ddpm.data import open_images
from data.images import encoded, make, numbered


def labelled(tmp_path, values, dtype, **options):
    folder = make(tmp_path / "d", numbered(len(values)), label=(values, dtype))
    data = open_images(dataset_name=folder, resolution=4, class_conditional=True, **options)
    return data.take(99)[1].tolist(), data.id2label


@pytest.mark.parametrize(
    ("values", "dtype", "labels", "id2label"),
    [
        ([9, 3, 7, 3, 10], datasets.Value("int64"), [2, 0, 1, 0, 3], {0: "3", 1: "7", 2: "9", 3: "10"}),
        (["dog", "cat", "dog"], datasets.Value("string"), [1, 0, 1], {0: "cat", 1: "dog"}),
        (["dog", "cat", "dog"], datasets.Value("large_string"), [1, 0, 1], {0: "cat", 1: "dog"}),
        ([True, False], datasets.Value("bool"), [1, 0], {0: "False", 1: "True"}),
        ([4, 1, 4], datasets.ClassLabel(names=["z", "y", "x", "w", "v"]), [1, 0, 1], {0: "y", 1: "v"}),
    ],
)
def test_labels_are_numbered_without_gaps(tmp_path, values, dtype, labels, id2label):
    assert labelled(tmp_path, values, dtype) == (labels, id2label)


def test_a_held_out_split_uses_the_numbering_of_the_training_split(tmp_path):
    id2label = {0: "3", 1: "7", 2: "9"}
    assert labelled(tmp_path, [9, 7], datasets.Value("int64"), id2label=id2label) == ([2, 1], id2label)
    with pytest.raises(ValueError, match="row 1 has the label 8"):
        labelled(tmp_path, [9, 8], datasets.Value("int64"), id2label=id2label)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([0, 1, None], datasets.Value("int64")), ([0, 1, -1], datasets.ClassLabel(2)), ([-1] * 3, datasets.ClassLabel(2))],
)
def test_a_row_without_a_label_raises(tmp_path, values, dtype):
    with pytest.raises(ValueError, match=r"row \d has the label (None|-1), which is not one of the"):
        labelled(tmp_path, values, dtype)


def test_a_classlabel_column_is_preferred_and_labels_are_optional(tmp_path):
    folder = make(
        tmp_path / "d", numbered(2),
        label=([0.5, 1.5], datasets.Value("float32")), kind=([1, 0], datasets.ClassLabel(names=["a", "b"])),
    )  # fmt: skip
    data = open_images(dataset_name=folder, resolution=4, class_conditional=True)
    assert data.take(2)[1].tolist() == [1, 0]
    assert open_images(dataset_name=folder, resolution=4).id2label is None


def test_columns_can_be_named(tmp_path):
    rows = {"a": [encoded(i) for i in numbered(2)], "n": [encoded(i) for i in numbered(4)[2:]], "kind": [5, 3]}
    (tmp_path / "d").mkdir()
    datasets.Dataset.from_dict(rows).cast_column("a", datasets.Image()).to_parquet(tmp_path / "d" / "train.parquet")
    for streaming in (False, True):  # "n" holds plain bytes, used as images only if named
        data = open_images(dataset_name=str(tmp_path / "d"), image_column="n", resolution=4, streaming=streaming)
        assert data.take(2)[0][:, 0, 0, 0].tolist() == [2, 3]
    data = open_images(dataset_name=str(tmp_path / "d"), label_column="kind", class_conditional=True, resolution=4)
    assert data.take(2)[1].tolist() == [1, 0]


def test_errors_where_columns_are_missing(tmp_path):
    (tmp_path / "d").mkdir()
    datasets.Dataset.from_dict({"text": ["x"]}).to_parquet(tmp_path / "d" / "train.parquet")
    with pytest.raises(ValueError, match=r"image_column: no column is suitable; the columns are text \(string\)"):
        open_images(dataset_name=str(tmp_path / "d"), resolution=4)
    folder = make(tmp_path / "e", numbered(2), caption=(["x", "y"], datasets.Value("string")))
    message = r"label_column: no column is suitable; the columns are image .*, caption \(string\)"
    with pytest.raises(ValueError, match=message):
        open_images(dataset_name=folder, resolution=4, class_conditional=True)
