"""custom_ddpm/evaluation/tune.py: every candidate is measured, the best is saved and taken."""

import json

import pytest
import torch
from runs import run

from custom_ddpm import CustomDDPMPipeline
from custom_ddpm.cli import main
from custom_ddpm.evaluation import tune

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
    first = [entry for entry in measured if entry.startswith("3 ")]
    assert len(first) == len(set(first)) == 16
    assert next(entry for entry in measured if entry.startswith("14 ")) == "14 2 0 optimal"
    assert len(measured) == 16 + tune.FINALISTS  # of many steps only the best of before
    assert "FD (runs:small_features), 60 pictures against 1,797 training pictures" in output
    assert "best:        3 2 0 optimal  0" in output

    scheduler = CustomDDPMPipeline.from_pretrained(model).scheduler
    stored = json.loads((model / "tuned.json").read_text())
    assert stored["tuned"] == scheduler.config.tuned and len(stored["distances"]) == len(measured)
    assert scheduler.config.tuned[0] == "3 2 0 optimal" and len(scheduler.config.tuned) == 2
    errors = torch.tensor(scheduler.config.prediction_errors)
    assert len(errors) == 20 and (errors > 0).all()
    assert scheduler.tuned_for(3).startswith("steps of order 2, eta 0, optimal")


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


def test_what_cannot_be_tuned(model):
    for words, message in (
        (["--steps", "0"], "--steps is \\[0\\]; it must have numbers from 1 to 19"),
        (["--steps", "30"], "it must have numbers from 1 to 19"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["tune", str(model), *words, *WORDS])
