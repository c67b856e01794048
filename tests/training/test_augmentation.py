"""custom_ddpm/training/augmentation.py, on pictures whose pixels say where they came from."""

import numpy as np
import torch
from test_loop import pictures, prepared

from custom_ddpm.objective import diffusion_loss
from custom_ddpm.training import training_steps
from custom_ddpm.training.augmentation import augmented
from custom_ddpm.training.randomness import draw

NUMBER, SIDE = 2000, 32


def changes(seed, step, positions):
    return draw(seed, step, positions, (1, 1, 1), torch.device("cpu")).changes


def places(number=NUMBER):
    """Pictures of two channels: the x and the y of each pixel, in [-1, 1] over the whole picture."""
    line = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    picture = torch.stack([line.expand(SIDE, SIDE), line.view(-1, 1).expand(SIDE, SIDE)])
    return picture.expand(number, 2, SIDE, SIDE).contiguous()


def fitted(images):
    """Slope and offset of x against x and of y against y in the middle of each picture, (2, number) each."""
    middle, x = slice(SIDE // 4, -SIDE // 4), places(1)[0, 0, 0].numpy()
    lines = (images[:, 0, SIDE // 2, middle].numpy(), images[:, 1, middle, SIDE // 2].numpy())
    fits = [np.polyfit(x[middle], line.T, 1, full=True) for line in lines]
    assert max(squares.max() for _, squares, *_ in fits) < 1e-8  # straight lines: nothing else happens to a picture
    slopes, offsets = np.stack([coefficients for coefficients, *_ in fits], axis=1)
    return slopes, offsets


def test_pictures_are_mirrored_shifted_and_scaled_as_often_and_as_far_as_it_says():
    slopes, offsets = fitted(augmented(places(), changes(0, 7, range(NUMBER))))
    within = 4 * 0.5 / NUMBER**0.5
    assert abs((slopes[0] < 0).mean() - 0.5) < within and (slopes[1] > 0).all()
    np.testing.assert_allclose(abs(slopes[0]), slopes[1], atol=1e-5)
    scaled, shifted = abs(slopes[1] - 1) > 1e-5, abs(offsets) > 1e-5
    assert abs(scaled.mean() - 0.3) < within and (abs(shifted.mean(1) - 0.3) < within).all()
    assert abs((scaled & shifted[0]).mean() - 0.09) < within  # independently
    assert 0.19 < abs(np.log2(slopes[1])).max() <= 0.2 + 1e-5
    # x from -1 to 1 is twice as long as the picture is wide.
    assert (abs(offsets).max(1) > 0.24).all() and abs(offsets).max() <= 0.25 + 1e-5
    assert abs(offsets.mean()) < 0.01 and abs(np.log2(slopes[1]).mean()) < 0.01  # to both sides


def test_pictures_stay_in_their_range():
    images = torch.rand(64, 3, 20, 12) * 2 - 1
    changed = augmented(images, changes(1, 2, range(64)))
    assert changed.shape == images.shape and changed.dtype == images.dtype
    assert changed.min() >= -1 and changed.max() <= 1


def test_what_happens_depends_on_seed_step_and_position_only():
    images = places(8)
    whole = augmented(images, changes(3, 5, range(8, 16)))
    assert torch.equal(augmented(images[:3], changes(3, 5, range(13, 16))), whole[5:])
    for other in ((4, 5, range(8, 16)), (3, 6, range(8, 16)), (3, 5, range(8))):
        assert not torch.equal(augmented(images, changes(*other)), whole)


def test_the_last_part_of_a_run_sees_the_pictures_as_they_are():
    model, scheduler, optimizer, lr_scheduler, accelerator = prepared()
    seen = []

    def loss(scheduler, output, x_0, *others):
        seen.append(x_0)
        return diffusion_loss(scheduler, output, x_0, *others)

    parts = (model, scheduler, optimizer, lr_scheduler, pictures(), accelerator, loss, 5)
    list(training_steps(*parts, seed=2, augment_share=0.6))
    plain = next(pictures())[0] / 127.5 - 1
    assert [torch.allclose(x_0, plain, atol=1e-6) for x_0 in seen] == [False] * 3 + [True] * 2
    for step, x_0 in enumerate(seen[:3]):
        torch.testing.assert_close(x_0, augmented(plain, changes(2, step, range(4))))
