"""The states of the reverse process that the pipeline returns, and the pictures made of them."""

import numpy as np
import PIL.Image
import pytest
import reference
import torch
from conftest import make_pipeline
from test_cli import refused
from test_samplers import CLASSES, DRIVEN, build

from custom_ddpm.cli import main
from custom_ddpm.scheduler import PREDICTION_TYPES
from custom_ddpm.trajectory import save_animation, trajectory_frames, trajectory_strip

X_0 = -0.4
SAMPLERS = sorted(name for name in DRIVEN if name in CLASSES and "Inverse" not in name)


def draw(pipeline, **options):
    return pipeline(2, generator=torch.Generator().manual_seed(0), output_type="latent", **options)


# ---- the states ----


@pytest.mark.parametrize(
    ("name", "prediction_type"),
    [(name, "epsilon") for name in SAMPLERS] + [("CustomDDPMScheduler", kind) for kind in PREDICTION_TYPES[1:]],
)
def test_states_of_every_sampler_where_the_data_are_one_picture(name, prediction_type):
    """The exact model knows x_0, so x̂_0 is x_0 in every state, and x_t is √ᾱ_t x_0 and noise of variance 1−ᾱ_t."""
    pipeline = build(name, prediction_type, world=(X_0, 0.0))
    curve = reference.betas(pipeline.scheduler.config.beta_schedule)
    bars = reference.floats(reference.alphas_cumprod(curve))
    trajectory = pipeline(
        2, num_inference_steps=20, generator=torch.Generator().manual_seed(0), output_type="latent", return_trajectory=6
    ).trajectory
    assert trajectory.samples.shape == trajectory.pred_original_samples.shape == (6, 2, 1, 64, 64)
    assert trajectory.timesteps[0] > 900 and trajectory.timesteps[-1] == -1
    assert (trajectory.timesteps.diff() < 0).all()
    np.testing.assert_allclose(trajectory.pred_original_samples[:-1].numpy(), X_0, atol=0.03)
    for t, x_t in zip(trajectory.timesteps[:-1].tolist(), trajectory.samples, strict=False):
        noise = (x_t - bars[round(t)] ** 0.5 * X_0) / (1 - bars[round(t)]) ** 0.5
        assert abs(float(noise.mean())) < 0.06 and abs(float(noise.std()) - 1) < 0.06


def test_the_states_are_those_that_a_callback_sees():
    pipeline, seen = make_pipeline(), []

    def keep(pipeline, step, timestep, inputs):
        seen.append((int(timestep), inputs["latents"].clone()))
        return {}

    output = draw(pipeline, num_inference_steps=5, callback_on_step_end=keep, return_trajectory=True)
    trajectory = output.trajectory
    assert trajectory.timesteps.tolist() == [*(t for t, _ in seen), -1]
    assert torch.equal(trajectory.samples[1:], torch.stack([x for _, x in seen]))
    assert torch.equal(trajectory.samples[-1], output.images)
    assert torch.equal(trajectory.pred_original_samples[-1], output.images)
    assert torch.equal(output.images, draw(pipeline, num_inference_steps=5).images)  # looking changes nothing


@pytest.mark.parametrize(
    ("chosen", "steps"),
    [(True, range(10)), (3, [0, 5]), (99, range(10)), ([0, 4], [0, 4]), ([-1, 4, 4], [4, 9]), (range(2, 4), [2, 3])],
)
def test_steps_are_chosen_by_number_or_one_by_one(chosen, steps):
    pipeline = make_pipeline()
    everything = draw(pipeline, num_inference_steps=10, return_trajectory=True).trajectory
    some = draw(pipeline, num_inference_steps=10, return_trajectory=chosen).trajectory
    for field in ("timesteps", "samples", "pred_original_samples"):
        assert torch.equal(getattr(some, field), getattr(everything, field)[[*steps, 10]])


def test_without_it_there_is_none():
    pipeline = make_pipeline()
    assert draw(pipeline, num_inference_steps=2).trajectory is None
    assert draw(pipeline, num_inference_steps=2, return_trajectory=[]).trajectory is None
    assert len(draw(pipeline, num_inference_steps=2, return_dict=False)) == 1
    assert len(draw(pipeline, num_inference_steps=2, return_dict=False, return_trajectory=True)) == 2


@pytest.mark.parametrize(
    ("chosen", "message"),
    [(1, "as a number of states it must be at least 2"), ([10], "has 10; with 10 steps"), ([0.5], "has 0.5; with 10")],
)
def test_steps_that_there_are_not(chosen, message):
    with pytest.raises(ValueError, match=message):
        draw(make_pipeline(), num_inference_steps=10, return_trajectory=chosen)


def test_a_model_with_a_learned_variance_and_an_interrupted_call():
    pipeline = build("CustomDDPMScheduler", "epsilon", "learned", world=(X_0, 0.0))

    def stop(pipeline, step, timestep, inputs):
        pipeline._interrupt = step == 2
        return {}

    options = {"num_inference_steps": 10, "return_trajectory": True, "callback_on_step_end": stop}
    output = draw(pipeline, **options)
    trajectory = output.trajectory
    assert trajectory.timesteps.tolist() == [999, 899, 799, 699]
    np.testing.assert_allclose(trajectory.pred_original_samples[:-1].numpy(), X_0, atol=0.03)
    assert torch.equal(trajectory.samples[-1], output.images)  # the result, which is x_t at t = 699
    whole = draw(pipeline, num_inference_steps=10, return_trajectory=True).trajectory
    assert torch.equal(trajectory.samples, whole.samples[:4])


def test_an_interrupted_call_ends_with_x_t_for_every_scheduler():
    pipeline = build("EulerDiscreteScheduler", "epsilon", world=(X_0, 0.0))

    def stop(pipeline, step, timestep, inputs):
        pipeline._interrupt = step == 2
        return {}

    options = {"num_inference_steps": 10, "return_trajectory": True}
    whole = draw(pipeline, **options).trajectory
    stopped = draw(pipeline, **options, callback_on_step_end=stop).trajectory
    assert torch.equal(stopped.timesteps, whole.timesteps[:4])
    assert torch.equal(stopped.samples, whole.samples[:4])


# ---- pictures of them ----


@pytest.fixture
def trajectory():
    return draw(make_pipeline(channels=3), num_inference_steps=10, return_trajectory=True).trajectory


def pixels(images):
    return ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def test_every_picture_of_a_strip(trajectory):
    strip = np.asarray(trajectory_strip(trajectory, pictures=2, states=5, min_size=8))
    gap, head = 2, strip.shape[0] - 4 * 10 - 2
    assert strip.shape == (head + 4 * 10 + 2, 5 * 10 + 2, 3)
    chosen = [0, 2, 5, 8, 10]
    for row, part in enumerate([trajectory.samples[:, 0], trajectory.pred_original_samples[:, 0]] * 2):
        part = part if row < 2 else [trajectory.samples, trajectory.pred_original_samples][row - 2][:, 1]
        for column, picture in enumerate(pixels(part[chosen])):
            top, left = head + gap + row * 10, gap + column * 10
            assert np.array_equal(strip[top : top + 8, left : left + 8], picture)


@pytest.mark.parametrize("suffix", [".png", ".apng", ".webp", ".gif"])
def test_a_moving_picture_has_every_state_and_waits_at_the_last(trajectory, tmp_path, suffix):
    frames = trajectory_frames(trajectory, columns=1, min_size=8)
    assert len(frames) == 11
    save_animation(frames, tmp_path / f"a{suffix}", seconds=1.0, hold=1.5)
    with PIL.Image.open(tmp_path / f"a{suffix}") as moving:
        assert (moving.n_frames, moving.size) == (11, frames[0].size)
        durations = []
        for i, frame in enumerate(frames):
            moving.seek(i)
            shown = np.asarray(moving.convert("RGB")).astype(int)
            limit = 60 if suffix == ".gif" else 0  # which has 256 colours
            assert abs(shown - np.asarray(frame)).max() <= limit
            durations.append(moving.info["duration"])
        assert durations[:10] == [100] * 10 and durations[10] == 1500


def test_a_frame_has_x_t_at_the_left_and_its_x_0_at_the_right(trajectory):
    frame = np.asarray(trajectory_frames(trajectory, columns=1, min_size=8)[3])
    for left, part in ((0, trajectory.samples), (frame.shape[1] - 12, trajectory.pred_original_samples)):
        first = frame[-20:-12, left + 2 : left + 10]
        assert np.array_equal(first, pixels(part[3, :1])[0])


@pytest.mark.parametrize("name", ["a.jpg", "a"])
def test_a_suffix_that_does_not_move(trajectory, tmp_path, name):
    with pytest.raises(ValueError, match=r"a moving picture is \.gif, \.png, \.apng, \.webp"):
        save_animation(trajectory_frames(trajectory), tmp_path / name)


# ---- the command ----


def test_sample_writes_the_trajectory_of_its_first_pictures(tmp_path, capsys):
    make_pipeline(classes=3).save_pretrained(tmp_path / "model")
    words = ["sample", tmp_path / "model", "--output_dir", tmp_path / "p", "-n", 3, "--num_inference_steps", 5]
    main([str(word) for word in [*words, "--trajectory", tmp_path / "way.webp"]])
    with PIL.Image.open(tmp_path / "way.webp") as moving, PIL.Image.open(tmp_path / "p" / "seed-0.png") as result:
        assert moving.n_frames == 6
        moving.seek(5)
        factor, last = 8, np.asarray(moving.convert("L"))
        assert np.array_equal(last[18 + 4 : 18 + 4 + 64 : factor, 4 : 4 + 64 : factor], np.asarray(result))
    with PIL.Image.open(tmp_path / "way-strip.png") as strip:
        assert strip.size == (6 * 68 + 4, 18 + 4 * 68 + 4)
    assert f"trajectory: {tmp_path / 'way.webp'} and {tmp_path / 'way-strip.png'}" in capsys.readouterr().out
    message = refused(*words, "--trajectory", tmp_path / "way.jpg")
    assert "a moving picture is .gif, .png, .apng, .webp" in message and "\n" not in message
    assert "whose folder does not exist" in refused(*words, "--trajectory", tmp_path / "none" / "way.gif")
