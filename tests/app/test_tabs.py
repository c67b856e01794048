"""Edit and Train without a browser."""

import json
import time

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from conftest import make_pipeline

gr = pytest.importorskip("gradio")
from custom_ddpm.pipelines import CustomDDPMInterpolationPipeline  # noqa: E402

from custom_ddpm.app import edit, runs, trainer  # noqa: E402
from custom_ddpm.app.limits import Limits  # noqa: E402
from custom_ddpm.app.runs import find_runs, run_folder, run_html, stamp  # noqa: E402
from custom_ddpm.app.train_tab import watched  # noqa: E402
from custom_ddpm.app.worker import Model  # noqa: E402

LIMITS = Limits(steps=20, pictures=9)
SETTINGS = (1, 1.5, 4, 0)  # class, guidance, steps, seed


@pytest.fixture
def model():
    return Model("model", make_pipeline(classes=3))


def picture(seed=0, side=8):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side), np.uint8)
    return PIL.Image.fromarray(pixels)


def quiet(*_):
    return {}


# ---- Edit ----


def test_variations_stay_near_the_picture_at_low_strength(model):
    given = torch.from_numpy(np.asarray(picture()).astype(float))
    near, far = (
        (edit.variations(model, LIMITS, "en", picture(), strength, 2, *SETTINGS)(quiet).double()[:, 0] - given)
        .abs()
        .mean()
        for strength in (0.25, 1.0)
    )
    assert near < far / 2


def test_inpainting_keeps_what_is_not_painted_and_changes_the_rest(model):
    layer = np.zeros((80, 80, 4), np.uint8)
    layer[40:] = 255  # a canvas of ten times the model's size: its lower half is painted
    background = picture().resize((80, 80), PIL.Image.Resampling.NEAREST)
    painted = {"background": background, "layers": [PIL.Image.fromarray(layer)]}
    images = edit.inpaint(model, LIMITS, "en", painted, 2, 3, *SETTINGS)(quiet).numpy()
    assert images.shape == (3, 1, 8, 8)
    given = edit._at_model_size(model, background).numpy()[0] * 255
    assert np.array_equal(images[:, :, :4], np.broadcast_to(given[:, :4].round(), (3, 1, 4, 8)))
    assert len({image.tobytes() for image in images[:, :, 4:]}) == 3


def test_interpolation_ends_at_both_pictures_as_they_are_restored(model):
    pictures = [picture(0), picture(1)]
    images = edit.between(model, LIMITS, "en", *pictures, 5, -2, 1.0, 10, 0)(quiet).numpy()
    assert len({image.tobytes() for image in images}) == 5
    pipeline = model.pipeline_of(CustomDDPMInterpolationPipeline)
    for image, given in zip((images[0], images[-1]), pictures, strict=True):
        noise = pipeline.invert(given, num_inference_steps=10)
        (restored,) = pipeline.restore(noise, num_inference_steps=10).images
        assert np.abs(image[0].astype(int) - np.asarray(restored)).max() <= 1


@pytest.mark.parametrize("language", ["en", "zh"])
def test_what_is_missing_is_said(model, language):
    words = {"en": ("upload one", "painted"), "zh": ("上传", "涂抹")}[language]
    with pytest.raises(ValueError, match=words[0]):
        edit.variations(model, LIMITS, language, None, 0.5, 1, *SETTINGS)
    with pytest.raises(ValueError, match=words[0]):
        edit.inpaint(model, LIMITS, language, None, 1, 1, *SETTINGS)
    with pytest.raises(ValueError, match=words[0]):
        edit.between(model, LIMITS, language, picture(), None, 2, *SETTINGS)
    empty = {"background": picture(), "layers": [PIL.Image.new("RGBA", (8, 8))]}
    with pytest.raises(ValueError, match=words[1]):
        edit.inpaint(model, LIMITS, language, empty, 1, 1, *SETTINGS)


@pytest.mark.parametrize(("repeats", "number", "steps"), [(21, 1, 4), (1, 10, 4), (1, 1, 21)])
def test_editing_has_limits_too(model, repeats, number, steps):
    painted = {"background": picture(), "layers": [PIL.Image.new("RGBA", (8, 8), "red")]}
    with pytest.raises(ValueError, match=r"10|21"):
        edit.inpaint(model, LIMITS, "en", painted, repeats, number, 1, 1.5, steps, 0)


# ---- Train ----


def make_run(folder, steps=2):
    """The files that a run has written after some steps."""
    (folder / "samples").mkdir(parents=True)
    settings = {"train_data_dir": "pictures", "max_train_steps": 100, "learning_rate": 1e-3, "lr_warmup_steps": 0}
    (folder / "training_config.yaml").write_text(yaml.safe_dump(settings))
    lines = [{"step": 10 * i, "loss": 1 / i, "loss_by_timestep": [1 / i] * 10} for i in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture(side=32).save(folder / "samples" / "step-0000010.png")
    return folder


def test_runs_are_found_inside_the_folder_only(tmp_path):
    root, outside = tmp_path / "runs", make_run(tmp_path / "secret")
    make_run(root / "a")
    make_run(root / "group" / "b")
    (root / "link").symlink_to(outside)
    assert set(find_runs(root)) == {"a", "group/b"}
    assert run_folder(root, "a") == root.resolve() / "a"
    for name in ("link", "../secret", str(outside), "nothing", None):
        assert run_folder(root, name) is None


def test_grids_that_are_links_out_of_the_run_are_not_shown(tmp_path):
    run = make_run(tmp_path / "run")
    picture(side=64).save(tmp_path / "secret.png")
    (run / "samples" / "step-0000020.png").symlink_to(tmp_path / "secret.png")
    assert stamp(run)[-1] == "step-0000010.png"


@pytest.mark.parametrize(
    ("language", "words"), [("en", ("Step 20 of 100", "Diagnosis")), ("zh", ("第 20 步，共 100 步", "诊断"))]
)
def test_a_run_is_shown_with_losses_grid_and_diagnosis(tmp_path, language, words):
    run = make_run(tmp_path / "run")
    page = run_html(run, language, stamp(run))
    assert page.count("<img") == 2 and all(word in page for word in words)
    for name in ("training_config.yaml", "metrics.jsonl"):
        (run / name).write_text("<script>")
    assert "<script>" not in run_html(run, language, stamp(run))


def test_a_run_is_sent_again_only_when_it_has_changed(tmp_path):
    run = make_run(tmp_path / "run")
    of_page = trainer.Trainer(tmp_path)
    _, first, seen = watched(tmp_path, "en", of_page, "run", None)
    assert "Step 20" in first
    assert not isinstance(watched(tmp_path, "en", of_page, "run", seen)[1], str)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 30, "loss": 0.1, "loss_by_timestep": [0.1] * 10}) + "\n")
    assert "Step 30" in watched(tmp_path, "en", of_page, "run", seen)[1]


def test_a_diagnosis_that_failed_is_tried_again(tmp_path):
    run = make_run(tmp_path / "run")
    of_page, config = trainer.Trainer(tmp_path), (run / "training_config.yaml").read_text()
    (run / "training_config.yaml").write_text(config[: len(config) // 2] + "\nbroken")  # while it is being written
    _, first, seen = watched(tmp_path, "en", of_page, "run", None)
    assert "no configuration" in first
    (run / "training_config.yaml").write_text(config)
    assert "no configuration" not in watched(tmp_path, "en", of_page, "run", seen)[1]


def test_a_diagnosis_that_failed_is_not_kept(tmp_path, monkeypatch):
    run, calls = make_run(tmp_path / "run"), []

    def diagnose(folder):
        calls.append(folder)
        if len(calls) == 1:
            raise OSError("the disk is away")
        return []

    monkeypatch.setattr(runs, "diagnose", diagnose)
    pages = [run_html(run, "en", stamp(run)) for _ in range(3)]
    assert ["the disk is away" in page for page in pages] == [True, False, False] and len(calls) == 2


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A program in the place of the training."""
    monkeypatch.setattr(trainer, "CLONE", tmp_path)
    (tmp_path / "train_ddpm.py").write_text(
        "import sys, time\nif '--fail' in sys.argv: sys.exit('no pictures')\ntime.sleep(60)\n"
    )
    return trainer.Trainer(tmp_path)


def test_one_training_at_a_time_that_can_be_stopped(script, tmp_path):
    (tmp_path / "ddpm-digits").mkdir()
    folder = script.start()
    assert folder == tmp_path.resolve() / "ddpm-digits-2"
    with pytest.raises(RuntimeError, match="ddpm-digits-2"):
        script.start()
    assert script.is_running and script.ended() is None
    script.end()
    assert not script.is_running and script.ended()[0] != 0 and not script.stop()


def test_why_a_training_ended_is_told(script):
    script.start("--fail")
    for _ in range(600):
        if not script.is_running:
            break
        time.sleep(0.1)
    assert script.ended() == (1, "no pictures")


@pytest.mark.slow
def test_the_default_run_trains_and_saves_a_checkpoint_when_stopped(tmp_path):
    of_page = trainer.Trainer(tmp_path)
    folder = of_page.start("--max_train_steps", "100000")
    while of_page.is_running and not (folder / "metrics.jsonl").exists():
        time.sleep(0.5)
    of_page.end()
    assert of_page.ended()[0] == 0 and list(folder.glob("checkpoint-*"))
