"""custom_ddpm/evaluation/tune.py: every candidate is measured, the best is saved and taken."""

import itertools
import json
import re
from types import SimpleNamespace

import matplotlib.axes
import pytest
import torch
from runs import run

from custom_ddpm import CustomDDPMPipeline
from custom_ddpm.cli import main
from custom_ddpm.evaluation import tune
from custom_ddpm.evaluation.collect import collect, collect_cached
from custom_ddpm.evaluation.distances import frechet_distance
from custom_ddpm.evaluation.pictures import ModelPictures

pytestmark = pytest.mark.usefixtures("digits_cache")
WORDS = ["--features", "runs:small_features", "--num_images", "60", "--num_error_images", "16"]


@pytest.fixture
def model(tmp_path):
    return run(tmp_path / "run")


def test_the_best_of_all_candidates_is_saved_and_taken(model, monkeypatch, capsys):
    measured = []
    distance = tune._distance

    def told(pipeline, reference, entry, guidance_scale):  # the real numbers but those that decide
        value = distance(pipeline, reference, entry, guidance_scale) if not measured else 9.0
        measured.append(entry)
        return {"3 2 0 optimal": 0.0, "14 1 1 trailing": 0.0}.get(entry, value + 1)

    monkeypatch.setattr(tune, "_distance", told)
    main(["tune", str(model), "--steps", "14", "3", "100", *WORDS])
    output = capsys.readouterr().out
    assert "first the error of the model on 16 training pictures" in output
    assert "15 of 20, about " in output and "20 of 20\n" in output
    first = [entry for entry in measured if entry.startswith("3 ")]
    combinations = itertools.product(["1", "2", "2c", "3"], "01", ["optimal", "trailing"])
    assert sorted(first) == sorted(" ".join(["3", *each]) for each in combinations)
    assert next(entry for entry in measured if entry.startswith("14 ")) == "14 2 0 optimal"
    assert len(measured) == 16 + tune.FINALISTS  # of many steps only the best of before
    assert "FD (runs:small_features), 60 pictures against 1,797 training pictures" in output
    assert "best:        3 2 0 optimal  0" in output

    scheduler = CustomDDPMPipeline.from_pretrained(model).scheduler
    stored = json.loads((model / "tuned.json").read_text())
    assert stored["guidance_scale"] == 1.0
    assert stored["tuned"] == scheduler.config.tuned and len(stored["distances"]) == len(measured)
    assert scheduler.config.tuned[0] == "3 2 0 optimal" and len(scheduler.config.tuned) == 2
    errors = torch.tensor(scheduler.config.prediction_errors)
    assert len(errors) == 20 and (errors > 0).all()
    assert scheduler.tuned_for(3).startswith("steps of order 2, eta 0, optimal")


def test_the_time_left_is_that_of_the_network_evaluations_left(model, monkeypatch, capsys):
    """A clock by which a network evaluation takes a second: 16 candidates of 1 step and of 5, then 4 of 15."""
    clock = [1000.0]

    def one_second_each(pipeline, reference, entry, guidance_scale):
        clock[0] += int(entry.split()[0])
        return 1.0

    monkeypatch.setattr(tune, "_distance", one_second_each)
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    main(["tune", str(model), "--steps", "1", "5", "15", *WORDS])
    told = re.findall(r"(\d+) of 36(?:, about (.*) left)?\n", capsys.readouterr().out)
    left = [155 - i for i in range(16)] + [135 - 5 * i for i in range(16)] + [45, 30, 15]
    words = [f"{round(seconds / 60)} minutes" if seconds >= 90 else f"{seconds} seconds" for seconds in left]
    assert told == [*((str(i + 1), each) for i, each in enumerate(words)), ("36", "")]


def test_from_twelve_steps_on_only_the_best_are_measured():
    assert tune.num_candidates([3, 11, 12]) == {3: 16, 11: 16, 12: 4}
    assert tune.num_candidates([12, 50]) == {12: 16, 50: 4}  # of the first number there is no best yet


def test_the_distance_is_that_of_the_setting(model, capsys):
    """One candidate is drawn by hand."""
    main(["tune", str(model), "--steps", "4", *WORDS])
    stored = json.loads((model / "tuned.json").read_text())
    from runs import DIGITS, small_features

    from custom_ddpm.evaluation.distances import Moments, frechet_distance
    from custom_ddpm.evaluation.pictures import open_dataset
    from custom_ddpm.sampling import sample_images
    from custom_ddpm.scheduler import CustomDDPMScheduler

    pipeline = CustomDDPMPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = CustomDDPMScheduler.from_config(
        pipeline.scheduler.config, tuned=None, prediction_errors=None, solver_order=2, timestep_spacing="trailing"
    )
    images = sample_images(pipeline, range(60), num_inference_steps=4, eta=0.0)
    data = open_dataset(DIGITS, resolution=[8])
    everything = torch.cat([batch for _, batch, _ in data.batches(500)])
    expected = frechet_distance(Moments.of(small_features(images)), Moments.of(small_features(everything)))
    assert stored["distances"]["4 2 0 trailing"] == pytest.approx(float(expected), rel=1e-5)
    assert stored["tuned"] == [min(stored["distances"], key=stored["distances"].get)]


def test_an_interrupted_command_goes_on(model, monkeypatch, capsys):
    distance, calls, errors = tune._distance, [], tune.measure_errors

    def dies_at_third(pipeline, reference, entry, guidance_scale):
        calls.append(entry)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return distance(pipeline, reference, entry, guidance_scale)

    monkeypatch.setattr(tune, "_distance", dies_at_third)
    with pytest.raises(KeyboardInterrupt):
        main(["tune", str(model), "--steps", "3", *WORDS])
    assert CustomDDPMPipeline.from_pretrained(model).scheduler.config.get("tuned") is None
    before = json.loads((model / "tuned.json").read_text())["distances"]
    assert list(before) == calls[:2]
    monkeypatch.setattr(tune, "measure_errors", None)  # known from before
    main(["tune", str(model), "--steps", "3", *WORDS])
    assert len(calls) == 17 and len(set(calls)) == 16
    stored = json.loads((model / "tuned.json").read_text())
    assert {entry: stored["distances"][entry] for entry in before} == before
    monkeypatch.setattr(tune, "measure_errors", errors)
    assert stored["tuned"] == CustomDDPMPipeline.from_pretrained(model).scheduler.config.tuned

    # Other settings, other weights: all anew. Once more: nothing.
    for words, measured in ((["--seed", "1"], 16), (["--seed", "1"], 0)):
        calls[:] = ["-"] * 3
        main(["tune", str(model), "--steps", "3", *WORDS, *words])
        assert len(calls) - 3 == measured
    pipeline = CustomDDPMPipeline.from_pretrained(model)
    next(pipeline.unet.parameters()).data += 0.01
    pipeline.unet.save_pretrained(model / "unet")
    calls[:] = ["-"] * 3
    main(["tune", str(model), "--steps", "3", *WORDS, "--seed", "1"])
    assert len(calls) - 3 == 16


def test_the_report_shows_what_was_tuned(model):
    """Every candidate is a point of the figure, and the best are in the tables, in both languages."""
    from custom_ddpm.evaluation import report_page
    from custom_ddpm.evaluation.report import Report, ReportSettings

    settings = ReportSettings(features=("runs:small_features",), num_images=60)
    assert report_page._candidates(Report(model, settings)) is None
    main(["tune", str(model), "--steps", "3", "14", *WORDS])
    stored = json.loads((model / "tuned.json").read_text())
    (model / "report").mkdir()
    drawn = {}
    plot = matplotlib.axes.Axes.plot

    def seen(self, x, y, *args, **kwargs):
        drawn.update({(n, value): None for n, value in zip(x, y, strict=True)} if len(x) else {})
        return plot(self, x, y, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.axes.Axes, "plot", seen)
        page = report_page._candidates(Report(model, settings))
    assert set(drawn) == {(int(entry.split()[0]), value) for entry, value in stored["distances"].items()}
    assert page["uri"] == report_page.data_uri(model / "report" / "candidates.png")
    assert page["metric"] == "FD (runs:small_features)" and page["count"] == "60"
    assert [row["steps"] for row in page["rows"]] == ["3", "14"]
    _, order, eta, spacing = stored["tuned"][0].split()
    corrected = ", corrected" if order == "2c" else ""
    assert page["rows"][0]["en"] == f"order {order[0]}{corrected}, η = {eta}, {spacing} timesteps"

    written = report_page.write_report(Report(model, settings), "zh")
    assert page["uri"] in written[0].read_text() and page["rows"][0]["en"] in written[0].read_text()
    assert f"| 3 | {page['rows'][0]['zh']} | {page['rows'][0]['value']} |" in written[1].read_text()
    (model / "tuned.json").write_text(json.dumps({**stored, "tuned": ["3 1 0 leading"]}))  # of another model
    assert report_page._candidates(Report(model, settings)) is None


def test_the_report_compares_what_was_tuned_with_the_plain_samplers(model, monkeypatch):
    from custom_ddpm.evaluation.report import SAMPLERS, TUNED, Report, ReportSettings

    settings = ReportSettings(features=["runs:small_features"], num_images=60)
    plain = Report(model, settings)
    assert plain.samplers == list(SAMPLERS)
    reference = plain.extractors[0], collect_cached(plain.training, plain.extractors[0], 64)
    expected = [plain._point(name, 5, 60, reference[1])[:2] for name in SAMPLERS]
    pipeline = CustomDDPMPipeline.from_pretrained(model)
    errors = [0.1] * len(pipeline.scheduler)
    tuned = pipeline.scheduler.from_config(
        pipeline.scheduler.config, prediction_errors=errors, tuned=["5 2 0.5 optimal"]
    )
    tuned.save_pretrained(model / "scheduler")
    report = Report(model, settings)
    assert report.samplers == [*SAMPLERS, TUNED]
    monkeypatch.setattr(Report, "_point", lambda self, name, n, *rest: (1.0, 0.1, ""))
    points = [(point["sampler"], point["steps"]) for point in report.by_steps()["points"]]
    assert points == [*((name, n) for name in SAMPLERS for n in (5, 10, 20)), (TUNED, 5), (TUNED, 10)]
    monkeypatch.undo()
    assert [report._point(name, 5, 60, reference[1])[:2] for name in SAMPLERS] == expected
    pipeline.scheduler = tuned
    pictures = ModelPictures(pipeline, "", 60, settings.seed, {"num_inference_steps": 5})
    found = collect(pictures, [report.extractors[0]], 64)[0].moments
    value, _, note = report._point(TUNED, 5, 60, reference[1])
    assert value == pytest.approx(frechet_distance(found, reference[1].moments)) and note == ""


def test_what_cannot_be_tuned(model):
    for words, message in (
        (["--steps", "0"], "--steps is \\[0\\]; it must have numbers from 1 to 19"),
        (["--steps", "20", "30"], "it must have numbers from 1 to 19"),
        (
            ["--features", "runs:all_pixels", "--num_images", "64"],
            "--num_images is 64; the Fréchet distance in 64 features needs more than 64",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["tune", str(model), *WORDS, *words])
