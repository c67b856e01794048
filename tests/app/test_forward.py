import math
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from custom_ddpm.app import examples, forward, noising, svg
from custom_ddpm.app.limits import Limits, open_upload
from custom_ddpm.schedules import BETA_SCHEDULES

from .shared import T, alpha_bars, formula_numbers, parsed, placeholders

DIGITS = Path(__file__).parents[2] / "examples" / "digits" / "train.parquet"
COLOURS = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "exp"])
@pytest.mark.parametrize("t", [1, 2, 371, 999, 1000])
def test_coefficients(schedule, t):
    a = alpha_bars(schedule)
    alpha = a[t] / a[t - 1]
    expected = [alpha**0.5, (1 - alpha) ** 0.5, a[t] ** 0.5, (1 - a[t]) ** 0.5, a[t] / (1 - a[t])]
    np.testing.assert_allclose(noising.coefficients(schedule, t), np.array(expected, float), rtol=2e-6)


@pytest.mark.parametrize("t", [1, 19, 20, 41, 300, 1000])
def test_the_chain_has_the_distribution_of_the_closed_form(t):
    picture = np.full((64, 64), 204, np.uint8)  # 0.6
    a = float(alpha_bars("linear")[t])
    for x_t in (noising.chain(picture, t, "linear", 5), noising.closed_form(picture, t, "linear", 5)):
        mean, variance, n = float(x_t.double().mean()), float(x_t.double().var()), x_t.numel()
        assert abs(mean - 0.6 * a**0.5) < 4 * math.sqrt((1 - a) / n)
        assert abs(variance - (1 - a)) < 4 * (1 - a) * math.sqrt(2 / n)


@pytest.mark.parametrize("t", [1, 20, 21, 40, 777, 1000])
def test_the_chain_goes_step_by_step(t):
    """What a step adds has variance β_t, and has nothing to do with the step before."""
    a = alpha_bars("linear")

    def added(t):
        after, before = (noising.chain(COLOURS, k, "linear", 3).double().numpy() for k in (t, t - 1))
        return (after - float(a[t] / a[t - 1]) ** 0.5 * before) / float(1 - a[t] / a[t - 1]) ** 0.5

    noise, n = added(t).ravel(), COLOURS.size
    assert abs(noise.mean()) < 4 / math.sqrt(n) and abs(noise.var() - 1) < 4 * math.sqrt(2 / n)
    if t > 1:
        assert abs(np.corrcoef(noise, added(t - 1).ravel())[0, 1]) < 4 / math.sqrt(n)


def test_other_noise_is_other_noise_and_the_same_is_the_same():
    one, again, other = (noising.chain(COLOURS, 33, "linear", seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_noise_in_a_noised_picture():
    x_t = noising.closed_form(COLOURS, 500, "linear", 0)
    a = float(alpha_bars("linear")[500])
    noise = (x_t.double().numpy()[0].transpose(1, 2, 0) - a**0.5 * (COLOURS / 127.5 - 1)) / (1 - a) ** 0.5
    np.testing.assert_allclose(noising.noise_in(COLOURS, x_t, 500, "linear"), (noise.mean(), noise.var()), atol=1e-3)


@pytest.mark.parametrize("t", [1, 150, 1000])
def test_expected_density_is_that_of_the_mixture(t):
    picture = examples.example(3)
    a = float(alpha_bars("linear")[t])
    values = picture.ravel() / 127.5 - 1
    fine = np.linspace(-4, 4, 64 * 200 + 1)
    middle = (fine[1:] + fine[:-1]) / 2
    density = np.zeros_like(middle)
    for value, count in zip(*np.unique(values, return_counts=True), strict=True):
        density += count / values.size * np.exp(-((middle - a**0.5 * value) ** 2) / (2 * (1 - a)))
    density /= math.sqrt(2 * math.pi * (1 - a))
    np.testing.assert_allclose(
        noising.expected_density(picture, t, "linear"), density.reshape(64, 200).mean(1), rtol=2e-3, atol=1e-4
    )


def test_histogram_counts_pixels():
    pixels = torch.tensor([[[[-1.0, -0.99, 0.5, 9.0]]]])  # 9 is not in the range
    heights = noising.histogram(pixels)
    assert heights[24] == 2 / 4 / 0.125 and heights[36] == 1 / 4 / 0.125 and heights.sum() == 3 / 4 / 0.125


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("t", [2, 3, 600, 1000])
def test_two_steps_and_the_merged_one(schedule, t):
    a = alpha_bars(schedule)
    now, before = a[t] / a[t - 1], a[t - 1] / a[t - 2]
    found = noising.two_steps(schedule, t, seed=1)
    exact = [(now * before) ** 0.5, now * (1 - before), 1 - now, (now * before) ** 0.5, 1 - now * before]
    np.testing.assert_allclose(found[:5], np.array(exact, float), rtol=1e-6)
    mean, variance, n = 0.6 * float(exact[0]), float(exact[4]), 10_000
    for draws in (found.twice, found.merged):
        assert draws.shape == (n,)
        assert abs(draws.mean(dtype=float) - mean) < 4 * math.sqrt(variance / n)
        assert abs(draws.var(dtype=float) - variance) < 4 * variance * math.sqrt(2 / n)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("t", [1, 2, 1000, None, -3, 10**9])
def test_every_t_makes_a_whole_page(language, t):
    for schedule, picture in zip(
        BETA_SCHEDULES, [COLOURS[:9, :5], COLOURS[:1, :1], *map(examples.example, range(4))], strict=True
    ):
        html = forward.page(language, picture, t, schedule, 0)
        root = parsed(html)
        assert {"F3", "F6", "F8", "F9"} <= formula_numbers(root)
        assert not re.search(r"\b(nan|inf)\b", re.sub(r'base64,[^"]*', "", html))
        drawings = [each for each in root.iter("svg") if each.get("role") == "img"]
        assert len(drawings) == 8 and all(each.get("aria-label") for each in drawings)


def test_the_numbers_shown_are_those_of_the_formulas():
    a = alpha_bars("linear")
    html = forward.page("en", examples.example(0), 200, "linear", 0)
    for value in (a[200] ** 0.5, (1 - a[200]) ** 0.5, a[200], a[200] / (1 - a[200]), (a[200] / a[199]) ** 0.5):
        assert f"{float(value):.5g}" in html


def test_the_point_is_on_its_curve():
    root = parsed(forward.page("en", examples.example(0), 400, "linear", 0))
    plot = next(each for each in root.iter("svg") if each.get("aria-label", "").startswith("ᾱ"))
    dots = [(float(each.get("cx")), float(each.get("cy"))) for each in plot.iter("circle")]
    assert len(dots) == len(BETA_SCHEDULES)
    x, y = dots[0]  # in a drawing of 312 x 168
    assert x == pytest.approx(0.4 * 312, abs=0.1)
    assert y == pytest.approx(168 * (1 - float(alpha_bars("linear")[400])), abs=0.1)


@pytest.mark.parametrize("module", [forward, examples])
def test_both_languages_say_the_same(module):
    english, chinese = placeholders(module.TEXTS if module is forward else module.WORDS)
    assert english == chinese


def test_built_in_digits_are_those_of_the_project():
    parquet = pytest.importorskip("pyarrow.parquet")
    import io

    rows = parquet.read_table(DIGITS).to_pylist()
    for label in range(10):
        png = next(row["image"]["bytes"] for row in rows if row["label"] == label)
        np.testing.assert_array_equal(examples.digit(label), np.asarray(PIL.Image.open(io.BytesIO(png))))


def test_uploads_are_fitted(tmp_path):
    def uploaded(file):
        return examples.fitted(open_upload(file, Limits(), "en"))

    PIL.Image.new("RGB", (300, 200), (10, 200, 30)).save(tmp_path / "wide.jpg")
    wide = uploaded(tmp_path / "wide.jpg")
    assert wide.shape == (43, 64, 3) and abs(wide.reshape(-1, 3).mean(0) - [10, 200, 30]).max() < 3
    PIL.Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (uploaded(tmp_path / "clear.png") == 255).all()
    PIL.Image.fromarray(np.full((5, 7), 257 * 100, np.uint16)).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(uploaded(tmp_path / "deep.png"), np.full((5, 7), 100))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-0.0, "0"),
        (-0.25, "−0.25"),
        (123456, "123456"),
        (1.5e-7, "1.500·10⁻⁷"),
        (math.inf, "∞"),
        (0.99995, "1"),
    ],
)
def test_numbers(value, text):
    assert svg.number(value) == text


def test_numbers_beyond_floats():
    assert svg.number_from_log(math.log(10) * -5000.5) == "3.162·10⁻⁵⁰⁰¹"
    assert svg.number_from_log(math.log(0.25)) == "0.25"
    assert svg.with_error(-0.12345, 0.004) == "−0.123 ± 0.004"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.5, 3.5), (0.59, 0.61), (0, 1000), (-9, 5)])
def test_ticks_are_few_and_inside(low, high):
    ticks = svg.ticks(low, high)
    assert 2 <= len(ticks) <= 7 and low - 1e-9 <= ticks[0] and ticks[-1] <= high + 1e-9
    assert np.ptp(np.diff(ticks)) < 1e-9


def test_formulas_become_mathml():
    root = parsed(svg.formula("F5", r"x_{t−1} = \frac{\sqrt{α_t}}{2}"))
    assert [each.tag for each in root.find(".//mfrac")] == ["mrow", "mrow"] and root.find(".//mfrac//msqrt") is not None
    assert "".join(root.find(".//msub").itertext()) == "xt−1"


def test_the_tab_is_built():
    gradio = pytest.importorskip("gradio")
    with gradio.Blocks() as blocks:
        for language in ("en", "zh"):
            with gradio.Tab(language):
                forward.tab(language, Limits())
    moves = [each for each in blocks.fns.values() if each.targets[0][1] == "change" and len(each.inputs) == 4]
    assert len(moves) == 8  # t, schedule, picture and noise, in both languages
    for each in moves:
        assert not each.queue and each.show_progress == "hidden" and each.trigger_mode == "always_last"
        html = each.fn(examples.example(1), T, "exp", 0)
        assert "t = 1000" in html


def test_a_drawing_becomes_the_picture():
    gradio = pytest.importorskip("gradio")
    with gradio.Blocks() as blocks:
        examples.picture_input("en", Limits())
    draw = next(each.fn for each in blocks.fns.values() if isinstance(each.inputs[0], gradio.Sketchpad))
    drawing = PIL.Image.new("RGB", (256, 256), "white")
    drawing.paste("black", (0, 0, 128, 256))
    pixels = draw({"background": None, "layers": [], "composite": drawing})
    assert pixels.shape == (64, 64) and (pixels[:, :30] == 0).all() and (pixels[:, 34:] == 255).all()
