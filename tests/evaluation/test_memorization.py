"""Copies are found, fresh pictures are not."""

import json

import datasets
import numpy as np
import pytest
import torch
from runs import DIGITS, needs_forkserver, on_processes

from custom_ddpm.cli import main
from custom_ddpm.evaluation.features import RandomConvolutionFeatures
from custom_ddpm.evaluation.memorization import PixelFeatures, draw_distances, draw_neighbours, memorization, nearest
from custom_ddpm.evaluation.pictures import ArrayPictures, open_dataset
from custom_ddpm.sampling import process_state


@pytest.fixture(scope="module", autouse=True)
def one_process(digits_cache):
    process_state()


@pytest.fixture(scope="module")
def digits(digits_cache):
    """Training, held-out and fresh pictures of one distribution."""
    images = open_dataset(DIGITS, resolution=[8]).data.take(1797)[0]
    images = images[torch.randperm(1797, generator=torch.Generator().manual_seed(0))]
    return images[:1000], images[1000:1400], images[1400:]


def noisy(images, std=8.0):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)) * std
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


SPACES = [PixelFeatures(), RandomConvolutionFeatures()]


@pytest.mark.parametrize("features", SPACES, ids=lambda each: each.name)
def test_a_memorised_set_is_found_and_a_fresh_one_is_not(digits, features):
    training, held_out, fresh = digits
    bank = ArrayPictures(training, "training")
    copied = memorization(training[300:600], held_out, bank, features)
    assert copied.share.value == 1 and copied.copies and (copied.generated < 1e-6).all()
    assert copied.neighbours[:, 0].tolist() == list(range(300, 600))
    honest = memorization(fresh, held_out, bank, features)
    assert abs(honest.share.value - 0.05) < 4 * honest.share.error and not honest.copies


def test_a_fifth_of_noisy_copies_is_found(digits):
    training, held_out, fresh = digits
    mixed = torch.cat([noisy(training[:80]), fresh[:317]])
    result = memorization(mixed, held_out, ArrayPictures(training, "training"), PixelFeatures())
    assert result.copies and 0.18 < result.share.value < 0.35


def test_blurred_fresh_pictures_are_not_taken_for_copies(digits):
    """They are near to everything, training set or not."""
    training, held_out, fresh = digits
    flat = fresh.flatten(1).double()
    like = torch.cdist(flat, flat).topk(5, largest=False).indices  # itself and the four most like it
    plain = fresh[like].float().mean(1).to(torch.uint8)
    result = memorization(plain, held_out, ArrayPictures(training, "training"), PixelFeatures())
    assert np.mean(result.generated < np.quantile(result.held_out, 0.05)) > 0.15 and not result.copies


def test_nearest_is_brute_force_in_any_batches():
    generator = torch.Generator().manual_seed(0)
    queries, bank = torch.randn(7, 3, generator=generator), torch.randn(20, 3, generator=generator)
    expected = torch.cdist(queries.double(), bank.double()).sort(dim=1)
    for size in (1, 6, 20):
        batches = [(range(i, min(i + size, 20)), bank[i : i + size]) for i in range(0, 20, size)]
        distances, places = nearest(queries, batches, 4)
        torch.testing.assert_close(distances, expected.values[:, :4])
        assert torch.equal(places, expected.indices[:, :4])
    distances, places = nearest(queries, [([5], bank[5:6])], 2)
    assert places.tolist() == [[5, -1]] * 7 and torch.isinf(distances[:, 1]).all()


def on_each(cache, folder, images):
    datasets.config.HF_DATASETS_CACHE = cache
    state = process_state()
    training, held_out, fresh = images
    result = memorization(fresh, held_out, ArrayPictures(training, "training"), PixelFeatures(), batch_size=64)
    torch.save([result.generated, result.neighbours, *result.share], folder / f"{state.process_index}.pt")


@needs_forkserver
def test_two_processes_find_what_one_finds(tmp_path, digits):
    images = [each[:200] for each in digits]
    on_processes(2, on_each, datasets.config.HF_DATASETS_CACHE, tmp_path, images)
    one = memorization(images[2], images[1], ArrayPictures(images[0], "training"), PixelFeatures())
    for rank in range(2):
        generated, neighbours, value, error = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        np.testing.assert_allclose(generated, one.generated, rtol=1e-9)
        assert np.array_equal(neighbours, one.neighbours) and (value, error) == one.share


def test_the_figures_are_drawn(digits, tmp_path):
    import PIL.Image

    training, held_out, fresh = digits
    bank = ArrayPictures(training, "training")
    result = memorization(torch.cat([fresh, training[7:8]]), held_out, bank, PixelFeatures())
    draw_distances({"pixels": result, "again": result}, tmp_path / "distances.png")
    assert PIL.Image.open(tmp_path / "distances.png").size == (1320, 864)
    draw_neighbours(torch.cat([fresh, training[7:8]]), result, bank, tmp_path / "neighbours.png", rows=2)
    sheet = np.asarray(PIL.Image.open(tmp_path / "neighbours.png"))
    # The copy comes first, with the picture itself as its nearest; 8 times enlarged, gaps of 4.
    first, second = sheet[4:68:8, 4:68:8], sheet[4:68:8, 72:136:8]
    assert np.array_equal(first, training[7, 0]) and np.array_equal(second, training[7, 0])


def test_too_few_pictures_are_refused(digits):
    training, held_out, fresh = digits
    with pytest.raises(ValueError, match="5 generated, 400 held-out and 1000 training pictures; at least 20"):
        memorization(fresh[:5], held_out, ArrayPictures(training, "training"), PixelFeatures())
    with pytest.raises(ValueError, match="19 training pictures"):
        memorization(fresh, held_out, ArrayPictures(training[:19], "training"), PixelFeatures())


def test_the_command_finds_pictures_of_the_training_set(tmp_path, capsys):
    words = ["memorization", DIGITS, "--source_split", "train[:300]", "--against", DIGITS, "--split", "train[:900]"]
    words += ["--held_out_split", "train[900:]", "--resolution", "8", "--output_dir", str(tmp_path / "out")]
    main([*words, "--features", "random"])
    printed = capsys.readouterr().out
    assert printed.count("it copies") == 2 and "pixels: 100.0%" in printed
    result = json.loads((tmp_path / "out" / "memorization.json").read_text())
    assert result["pixels"]["copies"] is True and result["pixels"]["identical"] == 300
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        "distances.png",
        "memorization.json",
        "neighbours-pixels.png",
        "neighbours-random-convolutions.png",
    }
