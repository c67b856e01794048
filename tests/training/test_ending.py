"""custom_ddpm/training/ending.py: the last losses are those of the weights, on the same pictures and noise."""

import json
import math

import numpy as np
import pytest
import torch
from runs import DIGITS, needs_forkserver, run, run_on_processes
from safetensors.torch import load_file

from custom_ddpm import CustomDDPMPipeline
from custom_ddpm.data.sources import open_images
from custom_ddpm.training.randomness import draw

pytestmark = pytest.mark.usefixtures("digits_cache")
HELD_OUT = {"split": "train[:90%]", "validation_split": "train[90%:]"}


def final(folder):
    return json.loads((folder / "final_loss.json").read_text())


def losses_by_hand(unet, scheduler, images, labels=None):
    losses = []
    for i, image in enumerate(images):
        condition = {} if labels is None else {"class_labels": torch.tensor([labels[i]])}
        noise = draw(0, 0, range(i, i + 1), image.shape, torch.device("cpu")).noise
        t = math.floor((i + 0.5) / len(images) * len(scheduler))
        a = scheduler.alphas_cumprod[t]
        with torch.no_grad():
            output = unet(a.sqrt() * (image / 127.5 - 1) + (1 - a).sqrt() * noise, t, **condition).sample
        losses.append((output - noise).square().mean().item())
    return np.array(losses)


def test_averaged_and_raw_weights_are_measured_on_the_same_noise(tmp_path):
    run(tmp_path, **HELD_OUT, max_train_steps=24, train_batch_size=10, dropout=0.3, learning_rate=1e-2)
    found, pipeline = final(tmp_path), CustomDDPMPipeline.from_pretrained(tmp_path)
    assert (found["step"], found["pictures"]) == (24, 24)
    averaged, raw = pipeline.unet, type(pipeline.unet).from_config(pipeline.unet.config).eval()
    raw.load_state_dict(load_file(tmp_path / "checkpoint-24" / "unet.safetensors"))
    for split, name in (("train[:90%]", "training"), ("train[90%:]", "validation")):
        data = open_images(dataset_name=DIGITS, split=split, resolution=8)
        batches = data.batches([range(24)])  # the run's seed is 0, and its order the same
        images, _ = next(batches)
        batches.close()
        of_averaged, of_raw = (losses_by_hand(unet, pipeline.scheduler, images) for unet in (averaged, raw))
        assert found[name] == pytest.approx(of_averaged.mean(), rel=1e-5)
        level = np.arange(24) * 10 // 24
        assert found[f"{name}_by_timestep"] == pytest.approx(
            [of_averaged[level == i].mean() for i in range(10)], rel=1e-5
        )
        spread = sum(of_averaged[level == i].var(ddof=1) * (level == i).sum() for i in range(10))
        assert found[f"{name}_error"] == pytest.approx(math.sqrt(spread) / 24, rel=1e-4)
        if name == "training":
            assert found["raw"] == pytest.approx(of_raw.mean(), rel=1e-5) != found["training"]


def test_without_an_average_or_held_out_pictures_there_is_one_loss(tmp_path):
    run(tmp_path, use_ema=False, ddpm_num_inference_steps=None)
    assert final(tmp_path).keys() == {"step", "pictures", "training", "training_by_timestep", "training_error"}


@pytest.mark.parametrize("held_out", [True, False])
def test_the_loss_with_wrong_labels_is_that_of_other_classes(tmp_path, held_out):
    splits = {"split": "train[:50%]", "validation_split": "train[50%:]"} if held_out else {}
    run(tmp_path, class_conditional=True, learning_rate=1e-2, train_batch_size=64, max_train_steps=41, **splits)
    found, pipeline = final(tmp_path), CustomDDPMPipeline.from_pretrained(tmp_path)
    assert found["label_pictures"] == found["pictures"] == 262
    data = open_images(
        dataset_name=DIGITS, split="train[50%:]" if held_out else "train", resolution=8, class_conditional=True
    )
    batches = data.batches([range(262)])
    images, labels = next(batches)
    batches.close()
    wrong = [(int(label) + 1 + i % 9) % 10 for i, label in enumerate(labels)]
    assert all(a != b for a, b in zip(wrong, labels.tolist(), strict=True)) and set(wrong) == set(range(10))
    losses = [losses_by_hand(pipeline.unet, pipeline.scheduler, images, taken) for taken in (labels.tolist(), wrong)]
    difference = losses[1] - losses[0]
    assert found["wrong_minus_right_labels"] == pytest.approx(difference.mean(), rel=1e-3, abs=1e-7)
    level = np.arange(262) * 10 // 262
    spread = sum(difference[level == i].var(ddof=1) * (level == i).sum() for i in range(10))
    assert found["wrong_minus_right_labels_error"] == pytest.approx(math.sqrt(spread) / 262, rel=1e-3)


def test_pictures_are_compared_with_those_of_twice_the_steps(tmp_path):
    options = {"class_conditional": True, "label_dropout": 0.2, "guidance_scale": 2.0, "eval_batch_size": 20}
    run(tmp_path, **options, ddpm_num_inference_steps=6, seed=3, learning_rate=1e-2)
    found, pipeline = final(tmp_path), CustomDDPMPipeline.from_pretrained(tmp_path)
    few, many = (
        np.stack(
            [
                pipeline(
                    class_labels=i % 10,
                    guidance_scale=2.0,
                    num_inference_steps=n,
                    eta=0.0,
                    generator=torch.Generator().manual_seed(3 + i),
                    output_type="np",
                ).images[0]
                for i in range(16)
            ]
        )
        for n in (6, 12)
    )
    change = np.sqrt(((few - many) ** 2).mean((1, 2, 3))) / (math.sqrt(2) * many.std())
    assert found["sampling_steps"] == [6, 12]
    assert found["sampling_change"] == pytest.approx(np.median(change), rel=0.02)  # of pictures with 256 values


@pytest.mark.parametrize(("steps", "compared"), [(15, [15, 20]), (20, None), (None, None)])
def test_no_more_than_all_steps_are_compared(tmp_path, steps, compared):
    run(tmp_path, ddpm_num_inference_steps=steps)
    assert final(tmp_path).get("sampling_steps") == compared


def test_it_changes_nothing_in_the_run_and_a_failure_is_a_warning(tmp_path, monkeypatch, caplog, capsys):
    run(tmp_path / "measured")
    monkeypatch.setattr("custom_ddpm.training.ending.cached_bounds", lambda *a, **k: 1 / 0)
    monkeypatch.setattr("custom_ddpm.training.ending.diagnose", lambda *a: 1 / 0)
    capsys.readouterr()
    run(tmp_path / "not")
    assert "bounds of the loss could not be computed: ZeroDivisionError" in caplog.text
    assert "could not be diagnosed: ZeroDivisionError" in caplog.text
    assert "Done. In" in (told := capsys.readouterr().out) and "Diagnosis" not in told
    assert not (tmp_path / "not" / "loss_bounds.json").exists()
    for name in ("unet/diffusion_pytorch_model.safetensors", "samples.png"):
        assert (tmp_path / "measured" / name).read_bytes() == (tmp_path / "not" / name).read_bytes()


def test_a_stream_says_why_it_has_no_bounds(tmp_path, caplog):
    caplog.set_level("INFO")
    run(tmp_path, streaming=True)
    assert "--streaming reads a stream" in caplog.text and not (tmp_path / "loss_bounds.json").exists()
    assert final(tmp_path)["training"] > 0


@needs_forkserver
@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    options = {**HELD_OUT, "max_train_steps": 24}
    run(tmp_path / "one", gradient_accumulation_steps=2, **options)
    run_on_processes(2, tmp_path / "two", **options)
    one, two = final(tmp_path / "one"), final(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in ("training", "validation", "raw"):
        assert one[name] == pytest.approx(two[name], rel=1e-4)
    assert (tmp_path / "one" / "loss_bounds.json").read_bytes() == (tmp_path / "two" / "loss_bounds.json").read_bytes()
