import math
import re

import mpmath
import numpy as np
import pytest

from custom_ddpm.app import bayes, examples
from custom_ddpm.app import posterior as mathematics
from custom_ddpm.app.limits import Limits
from custom_ddpm.schedules import BETA_SCHEDULES, make_betas

from .shared import T, alpha_bars, formula_numbers, parsed, placeholders

CASES = [(2, 1, 0.9, -0.8), (4, 3, 0.9, -0.8), (300, 150, 0.6, -0.8), (300, 299, -1.0, 3.0), (1000, 1, 1.0, -3.0)]


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "exp"])
@pytest.mark.parametrize(("t", "s", "x_0", "x_t"), CASES)
def test_posterior_is_the_product_of_prior_and_likelihood(schedule, t, s, x_0, x_t):
    """Brute force: both densities on a grid, multiplied and divided by their sum."""
    a = alpha_bars(schedule).astype(float)
    alpha, found = a[t] / a[s], mathematics.bayes(schedule, t, s, x_0, x_t)
    x = np.linspace(-6, 6, 400_001)
    log = -((x_t - alpha**0.5 * x) ** 2) / (2 * (1 - alpha)) - (x - a[s] ** 0.5 * x_0) ** 2 / (2 * (1 - a[s]))
    log -= 0.5 * math.log(2 * math.pi * (1 - alpha)) + 0.5 * math.log(2 * math.pi * (1 - a[s]))
    weights = np.exp(log - log.max())
    mean = (weights * x).sum() / weights.sum()
    variance = (weights * (x - mean) ** 2).sum() / weights.sum()
    assert found.mean == pytest.approx(mean, abs=1e-6)
    assert found.variance == pytest.approx(variance, rel=1e-6)
    assert found.log_evidence == pytest.approx(log.max() + math.log(weights.sum() * (x[1] - x[0])), rel=1e-6)
    # The grid of the page has other points, and must find the same.
    product = mathematics.measured(found)
    assert product.mean == pytest.approx(mean, abs=1e-6)
    assert product.variance == pytest.approx(variance, rel=1e-6)
    assert product.log_area == pytest.approx(found.log_evidence, rel=1e-6)


@pytest.mark.parametrize(("t", "s", "x_0", "x_t"), CASES)
def test_the_completed_square(t, s, x_0, x_t):
    with mpmath.workdps(40):
        betas = [mpmath.mpf("0.0001") + (mpmath.mpf("0.02") - mpmath.mpf("0.0001")) * i / (T - 1) for i in range(T)]
        bar_s = mpmath.fprod(1 - beta for beta in betas[:s])
        alpha = mpmath.fprod(1 - beta for beta in betas[s:t])
        x_0, x_t = mpmath.mpf(x_0), mpmath.mpf(x_t)
        A = alpha / (1 - alpha) + 1 / (1 - bar_s)
        B = mpmath.sqrt(alpha) * x_t / (1 - alpha) + mpmath.sqrt(bar_s) * x_0 / (1 - bar_s)
        weight = mpmath.sqrt(bar_s) * (1 - alpha) / (1 - bar_s * alpha)
    found = mathematics.bayes("linear", t, s, float(x_0), float(x_t))
    expected = [A, B, 1 / A, B / A, weight]
    actual = [found.A, found.B, found.variance, found.mean, found.of_original]
    np.testing.assert_allclose(actual, [float(value) for value in expected], rtol=1e-9)
    assert found.name == ("R4" if t - s == 1 else "R7")


def test_the_posterior_by_simulation():
    """Draw x_s and then x_t many times; those whose x_t came out near the given one are draws of the posterior."""
    t, s, x_0, x_t = 300, 150, 0.6, -0.3
    a = alpha_bars("linear").astype(float)
    rng = np.random.default_rng(0)
    before = a[s] ** 0.5 * x_0 + (1 - a[s]) ** 0.5 * rng.standard_normal(2_000_000)
    after = (a[t] / a[s]) ** 0.5 * before + (1 - a[t] / a[s]) ** 0.5 * rng.standard_normal(len(before))
    kept = before[abs(after - x_t) < 0.02]
    found = mathematics.bayes("linear", t, s, x_0, x_t)
    assert abs(kept.mean() - found.mean) < 4 * math.sqrt(found.variance / len(kept))
    assert abs(kept.var() - found.variance) < 4 * found.variance * math.sqrt(2 / len(kept))


def test_before_the_first_step_is_the_picture():
    found = mathematics.bayes("linear", 700, 0, 0.4, -2.0)
    assert (found.mean, found.variance, found.A, found.B) == (0.4, 0.0, math.inf, math.inf)
    assert found.prior_variance == 0


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_the_grid_is_fine_enough_everywhere(schedule):
    """Against the sum of precisions, for corners and draws of t, s, x_0 and x_t."""
    a = np.concatenate([[1.0], np.cumprod(1 - make_betas(schedule).numpy())])
    rng = np.random.default_rng(1)
    cases = [(2, 1), (T, T - 1), (T, 1), *(sorted(rng.choice(np.arange(1, T + 1), 2, False))[::-1] for _ in range(20))]
    for t, s in cases:
        x_0, x_t = rng.choice([-1.0, 1.0]), rng.uniform(-3, 3)
        alpha, beta = a[t] / a[s], 1 - a[t] / a[s]
        precisions = alpha / beta, 1 / (1 - a[s])
        mean = (precisions[0] * x_t / alpha**0.5 + precisions[1] * a[s] ** 0.5 * x_0) / sum(precisions)
        product = mathematics.measured(mathematics.bayes(schedule, int(t), int(s), x_0, x_t))
        assert product.mean == pytest.approx(mean, abs=2e-5), (t, s)
        assert product.variance == pytest.approx(1 / sum(precisions), rel=1e-4), (t, s)


def test_the_dots_of_the_product_lie_on_the_drawn_posterior():
    found = mathematics.bayes("linear", 300, 150, 0.6, -0.8)
    plot = parsed(bayes.bells_plot(bayes.TEXTS["en"], found, False))
    dots = np.array([(float(each.get("cx")), float(each.get("cy"))) for each in plot.iter("circle")])
    assert len(dots) > 10
    a = alpha_bars("linear").astype(float)
    precisions = a[300] / (a[150] - a[300]), 1 / (1 - a[150])
    mean = (precisions[0] * -0.8 * (a[150] / a[300]) ** 0.5 + precisions[1] * a[150] ** 0.5 * 0.6) / sum(precisions)
    x = dots[:, 0] / 312 * 7 - 3.5
    y = (1 - dots[:, 1] / 208) * 1.5
    np.testing.assert_allclose(y, np.exp(-((x - mean) ** 2) * sum(precisions) / 2), atol=0.006)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("zoom", [False, True])
def test_extreme_sliders_make_a_whole_page(language, zoom):
    picture = examples.example(2)
    for schedule in BETA_SCHEDULES:
        for t, s, x_0, x_t in [
            (1, 0, 1, 3),
            (1, 999, -1, -3),
            (T, 0, 0, 0),
            (T, 999, 1, -3),
            (2, 1, 1, -3),
            (None,) * 4,
        ]:
            for follows in (False, True):
                html = bayes.page(language, t, s, follows, x_0, x_t, zoom, schedule)
                html += bayes.pixel_page(language, t, s, follows, zoom, schedule, picture, 100, None, 0)
                assert {"R2", "R3"} <= formula_numbers(parsed(html)), (t, s)
                assert not re.search(r"\b(nan|inf)\b", re.sub(r'base64,[^"]*', "", html))


def test_s_stays_below_t():
    assert mathematics.steps(5, 900, False) == (5, 4) and "must be less than t" in bayes.page(
        "en", 5, 900, False, 0, 0, False, "linear"
    )
    assert mathematics.steps(5, 2, False) == (5, 2)
    assert mathematics.steps(5, 2, True) == (5, 4)
    assert mathematics.steps(0, -7, False) == (1, 0)


def test_evidence_smaller_than_any_float():
    # 16/(2·(1 − ᾱ_2)) with 1 − ᾱ_2 = 2.2e-4: e^−36000.
    html = bayes.page("en", 2, 1, False, 1.0, -3.0, False, "linear")
    a = float(alpha_bars("linear")[2])
    exponent = math.floor(
        (-((-3 - a**0.5) ** 2) / (2 * (1 - a)) - 0.5 * math.log(2 * math.pi * (1 - a))) / math.log(10)
    )
    assert f"·10{str(exponent).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}" in html


def test_the_pixel_shown_is_the_pixel_chosen():
    picture = np.zeros((20, 30, 3), np.uint8)
    picture[6, 11] = 204  # gray, 0.6
    root = parsed(bayes.pixel_page("en", 50, 20, False, False, "linear", picture, 32, 38, 0))  # 6 of 19, 11 of 29
    captions = ["".join(each.itertext()) for each in root.iter("figcaption")]
    assert captions[0].endswith("0.6")
    frame = next(root.iter("rect"))
    x, y, side = (float(frame.get(name)) for name in ("x", "y", "width"))
    assert x < 11 and x + side > 12 and y < 6 and y + side > 7
    x_t = float(captions[1].split()[-1].replace("−", "-"))
    a = alpha_bars("linear").astype(float)
    alpha = a[50] / a[20]
    mean = (a[20] ** 0.5 * (1 - alpha) * 0.6 + alpha**0.5 * (1 - a[20]) * x_t) / (1 - a[50])
    assert float(captions[2].split()[-1].replace("−", "-")) == pytest.approx(mean, abs=5e-4)


def test_formulas_name_the_symbols_of_one_step_or_of_more():
    one = bayes.page("en", 9, 8, False, 0, 0, False, "linear")
    more = bayes.page("en", 9, 4, False, 0, 0, False, "linear")
    assert "R7" not in formula_numbers(parsed(one)) and "R4" in formula_numbers(parsed(one))
    assert "R7" in formula_numbers(parsed(more)) and "R4" not in formula_numbers(parsed(more))


def test_both_languages_say_the_same():
    english, chinese = placeholders(bayes.TEXTS)
    assert english == chinese


def test_gray():
    colours = np.zeros((2, 2, 3), np.uint8)
    colours[..., 1] = 200
    assert (bayes.as_gray(colours) == round(0.587 * 200)).all()


def test_the_tab_is_built():
    gradio = pytest.importorskip("gradio")
    with gradio.Blocks() as blocks:
        for language in ("en", "zh"):
            with gradio.Tab(language):
                bayes.tab(language, Limits())
    moves = [each for each in blocks.fns.values() if each.targets[0][1] == "change" and len(each.inputs) > 2]
    assert sorted(len(each.inputs) for each in moves) == [7] * 4 + [9] * 8 + [11] * 10
    for each in moves:
        assert not each.queue and each.show_progress == "hidden" and each.trigger_mode == "always_last"
    both = moves[0].fn(7, 3, False, False, "linear", 0.5, 0.5, examples.example(0), 1, 1, 0)
    assert len(both) == 2 and all("t = 7" in html for html in both)


def test_an_emptied_number_field_is_the_lowest_value():
    gradio = pytest.importorskip("gradio")
    with gradio.Blocks():
        slider = examples.slider(-3, 3, 1.5, 0.01, "x")
    assert [slider.preprocess(value) for value in (None, 0.25, -9, 9)] == [-3, 0.25, -3, 3]
