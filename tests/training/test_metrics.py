"""custom_ddpm/training/metrics.py: what is told is the plain mean of what happened, and the pictures show it."""

import json
import math

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator

from custom_ddpm.training.metrics import LEVELS, MetricsLogger, draw_loss_by_timestep, draw_loss_curve, read_metrics


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator()


@pytest.fixture
def logger(accelerator, tmp_path):
    logger = MetricsLogger(
        accelerator, tmp_path, num_train_timesteps=1000, start_step=0, max_train_steps=9, images_per_step=6
    )
    yield logger
    logger.close()


def step(logger, losses, timesteps, norm=1.0, skipped=0.0, waited=0.0):
    logger.add_losses(torch.tensor(losses), torch.tensor(timesteps))
    logger.add_step(torch.tensor(norm), torch.tensor(skipped), waited)


def test_means_are_plain_means_over_all_samples_since_the_last_line(logger, tmp_path):
    generator = np.random.default_rng(0)
    for first in (0, 3):
        losses, timesteps, norms = generator.random((3, 6)), generator.integers(1000, size=(3, 6)), generator.random(3)
        for i in range(3):
            # One step of two batches.
            logger.add_losses(torch.tensor(losses[i, :4]), torch.tensor(timesteps[i, :4]))
            logger.add_losses(torch.tensor(losses[i, 4:]), torch.tensor(timesteps[i, 4:]))
            logger.add_step(torch.tensor(norms[i]), torch.tensor(0.0), 0.0)
        line = logger.log(first + 3, learning_rate=0.5)
        assert line == read_metrics(tmp_path)[-1]
        assert (line["step"], line["learning_rate"], line["skipped_steps"]) == (first + 3, 0.5, 0)
        assert line["loss"] == pytest.approx(losses.mean(), rel=1e-6)
        assert line["grad_norm"] == pytest.approx(norms.mean(), rel=1e-6)
        for level, told in enumerate(line["loss_by_timestep"]):
            inside = (timesteps >= 100 * level) & (timesteps < 100 * (level + 1))
            assert told == (pytest.approx(losses[inside].mean(), rel=1e-6) if inside.any() else None)


@pytest.mark.parametrize("T", [1, 4, 15, 1000])
def test_every_timestep_has_its_tenth(accelerator, tmp_path, T):
    logger = MetricsLogger(accelerator, tmp_path, T, 0, 1, 1)
    step(logger, [float(t) for t in range(T)], list(range(T)))
    told = logger.log(1, 0.0)["loss_by_timestep"]
    for level in range(LEVELS):
        inside = [t for t in range(T) if level <= t / T * LEVELS < level + 1]
        assert told[level] == (pytest.approx(np.mean(inside)) if inside else None)
    logger.close()


def test_what_is_not_finite_is_counted_and_in_no_mean(logger):
    step(logger, [1.0, math.nan, 3.0], [0, 0, 999], norm=math.nan, skipped=1.0)
    step(logger, [5.0, math.inf, 6.0], [0, 999, 999], norm=2.0)
    line = logger.log(2, 0.0)
    assert (line["loss"], line["grad_norm"], line["skipped_steps"]) == (3.75, 2.0, 1)
    assert line["loss_by_timestep"] == [3.0] + [None] * 8 + [4.5]


def test_nothing_but_not_finite_is_no_number_and_no_end(logger, tmp_path):
    step(logger, [math.nan], [0], norm=math.nan, skipped=1.0)
    assert logger.log(1, 0.0)["loss"] is None
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    step(logger, [1.0], [0])
    logger.log(2, 0.0)
    logger.draw()


def test_throughput_and_waiting_are_of_the_time_of_training(logger, monkeypatch, caplog):
    clock = [100.0]
    monkeypatch.setattr("custom_ddpm.training.metrics.time.perf_counter", lambda: clock[0])
    logger.restart_clock(0)
    for _ in range(4):
        step(logger, [1.0], [0], waited=0.1)
        clock[0] += 2.0
    line = logger.log(4, 0.0)
    assert line["images_per_second"] == pytest.approx(4 * 6 / 8)
    assert line["data_wait"] == pytest.approx(0.4 / 8)
    assert "waiting" not in caplog.text
    clock[0] += 1000.0  # a checkpoint, a grid
    logger.restart_clock(4)
    step(logger, [1.0], [0], waited=1.5)
    clock[0] += 3.0
    assert logger.log(5, 0.0)["images_per_second"] == pytest.approx(6 / 3)
    assert "step 5: 50% of the time was spent waiting for pictures" in caplog.text


def test_a_resumed_run_tells_its_steps_once(accelerator, tmp_path):
    lines = [{"step": s, "loss": float(s)} for s in (2, 4, 6)] + [{"step": 4, "validation_loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    MetricsLogger(accelerator, tmp_path, 10, 4, 9, 1).close()
    assert read_metrics(tmp_path) == [lines[0], lines[1], lines[3]]
    MetricsLogger(accelerator, tmp_path, 10, 0, 9, 1).close()
    assert read_metrics(tmp_path) == []
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', "{", '{"step": 3}'])
def test_a_line_cut_short_is_passed_over(tmp_path, rest):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n' + rest)
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    assert read_metrics(tmp_path / "not there") == []


# Pictures


def told(steps, loss):
    return [
        {"step": s, "loss": loss(s), "loss_by_timestep": [loss(s) / (i + 1) for i in range(LEVELS)], "lr": 0}
        for s in steps
    ]


def drawn(monkeypatch, function, lines, file):
    """Draw, and return the axes that were drawn in."""
    kept = []
    savefig = function.__globals__["matplotlib"].figure.Figure.savefig
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda self, *a, **k: (kept.append(self.axes[0]), savefig(self, *a, **k))
    )
    function(lines, file)
    assert np.asarray(PIL.Image.open(file).convert("L")).std() > 10
    return kept[0]


def ink(axes):
    return {label.get_text() for label in axes.get_yticklabels(which="both") if label.get_text()}


@pytest.mark.parametrize("loss", [lambda s: 1 / s, lambda s: 0.6 + 1 / (s + 5), lambda s: 3e-4 + 1 / s**3])
def test_the_loss_curve_shows_the_losses_with_plain_numbers(tmp_path, monkeypatch, loss):
    lines = told(range(10, 410, 10), loss)
    lines += [{"step": s, "validation_loss": 0.5} for s in (100, 200)]
    axes = drawn(monkeypatch, draw_loss_curve, lines, tmp_path / "curve.png")
    raw, smooth, validation = axes.get_lines()
    np.testing.assert_array_equal(raw.get_xydata(), [(s, loss(s)) for s in range(10, 410, 10)])
    # Over a twentieth of 40 lines.
    np.testing.assert_allclose(smooth.get_ydata()[5], (loss(60) + loss(70)) / 2)
    assert smooth.get_xdata()[5] == 70
    np.testing.assert_array_equal(validation.get_xydata(), [(100, 0.5), (200, 0.5)])
    labels = ink(axes)
    assert len(labels) >= 3
    # The exponent of what matplotlib writes as 2e−05 has a minus sign of its own.
    assert all(float(label.replace("−", "-")) > 0 for label in labels), labels


def test_the_loss_by_timestep_shows_three_parts_of_the_run(tmp_path, monkeypatch):
    lines = told(range(1, 10), lambda s: 1 / s)
    lines[4]["loss_by_timestep"][7] = None
    for line in lines:
        line["loss_by_timestep"][9] = None
    axes = drawn(monkeypatch, draw_loss_by_timestep, lines, tmp_path / "by_timestep.png")
    assert [line.get_label() for line in axes.get_lines()] == ["steps to 3", "steps to 6", "steps to 9"]
    for part, line in enumerate(axes.get_lines()):
        steps = [3 * part + 1, 3 * part + 2, 3 * part + 3]
        assert line.get_ydata()[0] == pytest.approx(np.mean([1 / s for s in steps]))
        assert math.isnan(line.get_ydata()[9])
    assert axes.get_lines()[1].get_ydata()[7] == pytest.approx(np.mean([1 / 4, 1 / 6]) / 8)
    assert axes.get_lines()[0].get_xdata()[[0, 9]] == pytest.approx([0.05, 0.95])


def test_the_bounds_and_the_held_out_loss_are_drawn_with_it(tmp_path, monkeypatch):
    bounds = {"linear": [0.5] * 9 + [None], "memorised": [1e-9] * 5 + [0.4] * 5}
    final = {"validation_by_timestep": [0.1 * i for i in range(1, 11)]}

    def draw(lines, file):
        draw_loss_by_timestep(lines, file, bounds, final)

    monkeypatch.setitem(draw.__globals__, "matplotlib", draw_loss_by_timestep.__globals__["matplotlib"])
    axes = drawn(monkeypatch, draw, told([1], lambda s: 1.0), tmp_path / "by_timestep.png")
    curves = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    np.testing.assert_array_equal(curves["held-out pictures"], final["validation_by_timestep"])
    np.testing.assert_array_equal(curves["best linear denoiser"], [0.5] * 9 + [math.nan])
    np.testing.assert_array_equal(curves["memorised training set"], [math.nan] * 5 + [0.4] * 5)
    assert axes.get_ylim()[0] > 1e-3


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_first_lines_of_a_run_can_be_drawn(tmp_path, count):
    lines = told(range(1, count + 1), lambda s: 1.0)
    draw_loss_curve(lines, tmp_path / "curve.png")
    draw_loss_by_timestep(lines, tmp_path / "by_timestep.png")
    assert len(list(tmp_path.iterdir())) == (2 if count else 0)


@pytest.mark.parametrize(
    ("speed", "said"), [(1e6, []), (100.0, ["16 minutes"]), (1.0, ["1,600 minutes", "--time_budget"])]
)
def test_the_time_to_the_end_is_told_once(tmp_path, caplog, monkeypatch, speed, said):
    logger = MetricsLogger(Accelerator(cpu=True), tmp_path, 10, 0, 25_000, 4)
    with caplog.at_level("INFO"):
        for step in (1000, 2000):
            logger._tell_time_left(step, speed)
    logger.close()
    assert len(caplog.messages) == bool(said)
    assert all(words in caplog.messages[0] for words in said)
