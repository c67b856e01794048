"""custom_ddpm/data/base.py: the endless order, the same for cache and stream, and prefetching."""

import itertools
import multiprocessing
import threading

import datasets
import numpy as np
import pytest
import torch

from custom_ddpm.data import open_images, sample_order
from data.images import make, numbered, visited


def test_sample_order_is_a_different_permutation_for_every_seed_and_epoch():
    orders = [tuple(sample_order(seed, epoch, 50)) for seed in range(6) for epoch in range(6)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(orders)) == 36


def test_sample_order_is_uniform():
    firsts = np.bincount([sample_order(3, epoch, 5)[0] for epoch in range(2000)])
    assert np.abs(firsts - 400).max() < 90  # 5 standard deviations


def test_batches_follow_sample_order(tmp_path):
    n = 23
    folder = make(tmp_path / "d", numbered(n), label=([i * i for i in range(n)], datasets.Value("int32")))
    data = open_images(dataset_name=folder, resolution=4, seed=11, class_conditional=True)
    positions = [[0, 1, 2], [22, 23, 24], [5], list(range(100, 180)), [10**9]]
    batches = list(data.batches(positions))
    for batch, (images, labels) in zip(positions, batches, strict=True):
        expected = [sample_order(11, p // n, n)[p % n] for p in batch]
        assert images[:, 0, 0, 0].tolist() == expected
        assert labels.dtype == torch.int64 and labels.tolist() == expected
        assert images.shape == (len(batch), 1, 4, 4) and images.dtype == torch.uint8


@pytest.mark.parametrize("streaming", [False, True])
def test_each_epoch_visits_each_image_once_in_a_new_order(tmp_path, streaming):
    data = open_images(dataset_name=make(tmp_path / "d", numbered(20)), resolution=4, streaming=streaming)
    order = visited(data, [range(p, p + 8) for p in range(0, 80, 8)])  # batches cross the borders of epochs
    epochs = [order[i : i + 20] for i in range(0, 80, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_order_is_the_same_for_any_number_of_processes_and_after_a_restart(tmp_path, streaming):
    folder = make(tmp_path / "d", numbered(20))

    def fresh():
        return open_images(dataset_name=folder, resolution=4, seed=3, streaming=streaming)

    whole = visited(fresh(), [range(p, p + 6) for p in range(0, 90, 6)])
    parts = [visited(fresh(), [range(p + 3 * rank, p + 3 * rank + 3) for p in range(0, 90, 6)]) for rank in (0, 1)]
    merged = [sample for p in range(0, 45, 3) for part in parts for sample in part[p : p + 3]]
    assert merged == whole
    assert visited(fresh(), [range(p, p + 6) for p in range(48, 90, 6)]) == whole[48:]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_batch_may_be_larger_than_the_dataset(tmp_path, streaming):
    for n in (1, 3):
        folder = make(tmp_path / f"d{n}", numbered(n))
        order = visited(open_images(dataset_name=folder, resolution=4, streaming=streaming), [range(30)])
        assert np.bincount(order).tolist() == [30 // n] * n


def test_positions_may_be_arrays_and_tensors(tmp_path):
    data = open_images(dataset_name=make(tmp_path / "d", numbered(9)), resolution=4)
    expected = visited(data, [[3, 4, 5]])
    assert visited(data, [np.array([3, 4, 5])]) == visited(data, [torch.tensor([3, 4, 5])]) == expected


@pytest.mark.parametrize(("streaming", "num_workers"), [(False, 0), (True, 0), (True, 2)])
def test_closing_the_generator_stops_thread_and_workers(tmp_path, streaming, num_workers):
    folder = make(tmp_path / "d", numbered(9))
    data = open_images(dataset_name=folder, resolution=4, streaming=streaming, num_workers=num_workers)
    batches = data.batches([p, p + 1] for p in itertools.count(0, 2))
    next(batches)
    assert any(thread.name.startswith("images") for thread in threading.enumerate())
    assert len(multiprocessing.active_children()) == num_workers
    batches.close()
    assert not any(thread.name.startswith("images") for thread in threading.enumerate())
    assert not multiprocessing.active_children()


def test_errors_of_the_background_thread_are_raised_in_order(tmp_path):
    def positions():
        yield [0]
        raise RuntimeError("no more positions")

    batches = open_images(dataset_name=make(tmp_path / "d", numbered(2)), resolution=4).batches(positions())
    next(batches)
    with pytest.raises(RuntimeError, match="no more positions"):
        next(batches)


def test_batches_are_pinned_on_request(tmp_path, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    folder = make(tmp_path / "d", numbered(3), label=([0, 1, 0], datasets.ClassLabel(2)))
    data = open_images(dataset_name=folder, resolution=4, class_conditional=True)
    list(data.batches([[0, 1]]))
    assert not pinned
    ((images, labels),) = data.batches([[0, 1]], pin_memory=True)
    assert torch.equal(images, pinned[0]) and torch.equal(labels, pinned[1])
