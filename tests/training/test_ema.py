"""custom_ddpm/training/ema.py: profiles by quadrature and by brute force, and averages that nobody kept."""

import numpy as np
import pytest
import scipy.integrate
import torch
from runs import RANDOM, differences, run, run_killed_at
from safetensors.torch import load_file

from custom_ddpm import CustomDDPMPipeline
from custom_ddpm.training.ema import (
    FOLDER,
    SIGMA_RELS,
    PostHocEMA,
    PowerEMA,
    fit_profile,
    gamma_of,
    reconstruct,
    save_snapshot,
)

pytestmark = pytest.mark.usefixtures("digits_cache")


def profile(gamma, end, times):
    return np.where(times <= end, (gamma + 1) * times**gamma / end ** (gamma + 1), 0.0)


def part_of_each_step(sigma_rel, steps):
    """What the weights of each step 1 … `steps` count in the average, by running it on unit vectors."""
    parameter = torch.nn.Parameter(torch.zeros(steps, dtype=torch.float64))
    average = PowerEMA([parameter], sigma_rel)
    for step in range(steps):
        with torch.no_grad():
            parameter.zero_()[step] = 1.0
        average.step([parameter])
    return average.shadow_params[0].numpy()


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_the_profile_has_the_length_it_is_named_by(sigma_rel):
    gamma = gamma_of(sigma_rel)

    def moment(power):
        return scipy.integrate.quad(lambda t: t**power * profile(gamma, 1.0, t), 0, 1, epsabs=1e-12)[0]

    assert moment(0) == pytest.approx(1, abs=1e-9)
    assert np.sqrt(moment(2) - moment(1) ** 2) == pytest.approx(sigma_rel, rel=1e-6)


def test_the_papers_numbers():
    """Section 3.1 gives γ = 16.97 and 6.94 for lengths of 5% and 10%."""
    assert [round(gamma_of(sigma_rel), 2) for sigma_rel in SIGMA_RELS] == [16.97, 6.94]


@pytest.mark.parametrize("sigma_rel", SIGMA_RELS)
def test_the_average_follows_its_profile(sigma_rel):
    steps = 400
    parts = part_of_each_step(sigma_rel, steps)
    assert parts.sum() == pytest.approx(1)
    middle = np.arange(steps) + 0.5
    np.testing.assert_allclose(steps * parts, steps * profile(gamma_of(sigma_rel), steps, middle), atol=0.15)
    # The first weights count for nothing, so that no initialisation is left over.
    assert parts[: steps // 4].sum() < 1e-3


@pytest.mark.parametrize("snapshots", [5, 20, 50])
@pytest.mark.parametrize("sigma_rel", [0.03, 0.075, 0.15, 0.2])
def test_the_fit_is_the_least_squares_fit(snapshots, sigma_rel):
    """Against dense least squares on a grid of times, which knows nothing of the integrals."""
    ends = np.linspace(0, 1, snapshots + 1)[1:]
    gammas, stops = np.repeat([gamma_of(s) for s in SIGMA_RELS], snapshots), np.tile(ends, 2)
    times = (np.arange(100_000) + 0.5) / 100_000
    there = np.stack([profile(g, end, times) for g, end in zip(gammas, stops, strict=True)], axis=1)
    wanted = profile(gamma_of(sigma_rel), 1.0, times)
    factors, error = fit_profile(gammas, stops, gamma_of(sigma_rel), 1.0)
    best = np.linalg.lstsq(there, wanted, rcond=None)[0]
    misses = [np.linalg.norm(there @ f - wanted) / np.linalg.norm(wanted) for f in (factors, best)]
    assert error == pytest.approx(misses[0], abs=1e-4)
    assert misses[0] == pytest.approx(misses[1], abs=1e-4)


def test_what_is_kept_is_found_and_longer_runs_do_not_overflow():
    factors, error = fit_profile([17.0, 7.0, 17.0, 7.0], [4e5, 4e5, 8e5, 8e5], 7.0, 8e5)
    np.testing.assert_allclose(factors, [0, 0, 0, 1], atol=1e-9)
    assert error < 1e-6


def snapshot(run_folder, averages, model):
    """As a run stores them."""
    tensors = {
        f"{sigma_rel}/{name}": value
        for sigma_rel, average in averages.averages.items()
        for (name, _), value in zip(model.named_parameters(), average.shadow_params, strict=True)
    }
    save_snapshot(run_folder, averages.optimization_step, tensors)


@pytest.mark.parametrize(("sigma_rel", "step"), [(0.05, None), (0.1, 300), (0.075, None), (0.15, None), (0.15, 320)])
def test_an_average_that_nobody_kept_comes_out_of_the_snapshots(tmp_path, sigma_rel, step):
    model = torch.nn.Linear(6, 5)
    averages, generator = PostHocEMA(model.parameters()), torch.Generator().manual_seed(0)
    kept = PowerEMA(model.parameters(), sigma_rel)
    for now in range(1, 401):
        with torch.no_grad():
            for parameter in model.parameters():  # on its way from somewhere, with noise
                parameter.mul_(0.99).add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        averages.step(model.parameters())
        if now <= (step or 400):
            kept.step(model.parameters())
        if now % 20 == 0:
            snapshot(tmp_path, averages, model)
    assert len(list((tmp_path / FOLDER).iterdir())) == 20
    weights = reconstruct(tmp_path, sigma_rel, step)
    assert weights.keys() == dict(model.named_parameters()).keys()
    for (name, last), expected in zip(model.named_parameters(), kept.shadow_params, strict=True):
        value = weights[name]
        assert value.dtype == torch.float32
        # Half precision has 11 bits; the fit of a profile is good to one in a hundred.
        assert (value - expected).norm() < 0.02 * expected.norm()
        assert (value - last).norm() > 0.2 * expected.norm()


def test_what_the_snapshots_do_not_hold_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no snapshots .* train with --posthoc_ema_steps"):
        reconstruct(tmp_path, 0.1)
    model = torch.nn.Linear(2, 2)
    averages = PostHocEMA(model.parameters())
    for _ in range(4):
        averages.step(model.parameters())
        snapshot(tmp_path, averages, model)
    for sigma_rel in (0.0, 0.3, -1.0):
        with pytest.raises(ValueError, match=f"sigma_rel is {sigma_rel}; it must be between 0 and 0.289"):
            reconstruct(tmp_path, sigma_rel)
    with pytest.raises(
        ValueError, match=r"sigma_rel 0.01 at step 4 cannot be reconstructed from the 4 snapshots .*relative error \d+%"
    ):
        reconstruct(tmp_path, 0.01)
    with pytest.raises(FileNotFoundError, match="up to step 0"):
        reconstruct(tmp_path, 0.1, step=0)


def test_a_run_keeps_them_through_interruptions_to_the_bit(tmp_path, monkeypatch):
    changes = {**RANDOM, "posthoc_ema_steps": 3, "max_train_steps": 11}
    run(tmp_path / "straight", **changes)
    run_killed_at(monkeypatch, 6, tmp_path / "killed", **changes)
    run(tmp_path / "killed", **changes, resume_from_checkpoint="latest")
    assert differences(tmp_path / "straight" / "checkpoint-11", tmp_path / "killed" / "checkpoint-11") == []
    names = [f"step-{step:07d}.safetensors" for step in (3, 6, 9, 11)]
    assert sorted(file.name for file in (tmp_path / "killed" / FOLDER).iterdir()) == names
    for name in names:
        one, other = (load_file(tmp_path / folder / FOLDER / name) for folder in ("straight", "killed"))
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    # They are of the weights of the run, and fit its model.
    unet = CustomDDPMPipeline.from_pretrained(tmp_path / "straight").unet
    unet.load_state_dict(reconstruct(tmp_path / "straight", 0.1))
    kept = load_file(tmp_path / "straight" / "checkpoint-11" / "posthoc_ema.safetensors")
    for name, value in unet.state_dict().items():
        torch.testing.assert_close(value, kept[f"0.1/{name}"], rtol=1e-3, atol=1e-5)


def test_without_the_flag_nothing_is_kept(tmp_path):
    run(tmp_path, max_train_steps=1)
    assert not (tmp_path / FOLDER).exists()
    assert not (tmp_path / "checkpoint-1" / "posthoc_ema.safetensors").exists()
