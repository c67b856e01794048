"""The model card; the test double of the Hub validates its metadata."""

import importlib.metadata
import shutil

import pytest
import torch
from conftest import make_pipeline
from huggingface_hub import ModelCard

from custom_ddpm.hub import write_model_card
from hub.shared import STEPS

FACTS = {
    "license": "cc-by-4.0",
    "base_model": "google/ddpm-cifar10-32",
    "dataset": "user/digits",
    "num_images": 1797,
    "recipe": {"learning_rate": 1e-4, "resolution": [8], "max_train_steps": None, "output_dir": "runs/secret-place"},
    "steps": 12000,
    "metrics": {"fid": 3.25, "kid": 0.001, "note": "text", "is_nothing": None},
    "evaluation": {"num_samples": 1000},
    "command": "accelerate launch train_ddpm.py --dataset_name user/digits",
}


def test_card_shows_all_facts(hub, run):
    half = run / "unet" / "diffusion_pytorch_model.fp16.safetensors"  # a variant: the same parameters again
    shutil.copyfile(run / "unet" / "diffusion_pytorch_model.safetensors", half)
    card = write_model_card(run, FACTS)
    assert (run / "README.md").read_text() == str(card)
    card.validate()
    data = ModelCard.load(run / "README.md").data
    assert (data.license, data.library_name) == ("cc-by-4.0", "diffusers")
    assert data.pipeline_tag == "unconditional-image-generation"
    assert data.datasets == ["user/digits"] and data.base_model == "google/ddpm-cifar10-32"
    assert {(r.metric_type, r.metric_value) for r in data.eval_results} == {("fid", 3.25), ("kid", 0.001)}
    assert {r.dataset_type for r in data.eval_results} == {"user/digits"} and data.model_name == "run"
    parameters = sum(p.numel() for p in make_pipeline(num_train_timesteps=STEPS).unet.parameters())
    for text in (
        f"{parameters:,} parameters",
        "gray pictures, 8x8 pixels",
        f"{STEPS} steps",
        "linear",
        "![Samples](samples.png)",
        "(loss_curve.png)",
        "1,797 pictures",
        "learning_rate: 0.0001",
        "12,000 optimiser steps",
        "| fid | 3.25 |",
        "num_samples 1000",
        FACTS["command"],
        *(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "accelerate", "datasets")),
    ):
        assert text in card.text, text
    assert "secret-place" not in card.text and "max_train_steps" not in card.text


@pytest.mark.parametrize("installed, imported", [("2.14.1", "2.14.1+cu130"), ("2.14.1+cu130", "2.14.1")])
def test_card_shows_the_installed_versions(run, monkeypatch, installed, imported):
    # A torch wheel's metadata may or may not have the local part of torch.__version__; the card shows the metadata's.
    versions = {"torch": installed, "diffusers": "0.42.0", "accelerate": "1.6.0", "datasets": "4.0.0"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    monkeypatch.setattr(torch, "__version__", imported)
    text = write_model_card(run, {}).text
    assert f", torch {installed}, diffusers 0.42.0, accelerate 1.6.0, datasets 4.0.0, Python 3." in text


def test_card_does_not_mention_missing_facts(hub, tmp_path):
    make_pipeline(num_train_timesteps=STEPS).save_pretrained(tmp_path)
    card = write_model_card(tmp_path, {})
    card.validate()
    assert card.data.eval_results is None and card.data.datasets is None and card.data.license == "unknown"
    assert "Nothing was measured." in card.text and ".png" not in card.text
    assert "model-index" not in str(card)


def test_local_dataset_is_named_without_its_path(run, tmp_path):
    (tmp_path / "my-images").mkdir()
    card = write_model_card(run, {"dataset": str(tmp_path / "my-images"), "base_model": str(run)})
    assert card.data.datasets is None and card.data.base_model is None
    assert "`my-images`" in card.text and str(tmp_path) not in str(card)


def test_home_folder_in_the_command_is_hidden(run, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    card = write_model_card(run, {"command": "train_ddpm.py --output_dir /home/someone/runs/a"})
    assert "train_ddpm.py --output_dir ~/runs/a" in card.text and "someone" not in str(card)


def test_token_in_command_or_recipe_is_hidden(hub, run):
    facts = {"command": f"train_ddpm.py --hub_token {hub.token}", "recipe": {"note": hub.token}}
    assert hub.token not in str(write_model_card(run, facts))


def test_card_of_class_conditional_model_lists_its_classes(hub, tmp_path):
    make_pipeline(classes=2).save_pretrained(tmp_path)
    card = write_model_card(tmp_path, {})
    assert "0 (class 0), 1 (class 1)" in card.text and "class_labels=[0, 1, 0, 1]" in card.text
    assert "class-conditional" in card.data.tags and 'revision="diffusers"' not in card.text


def test_names_of_classes_bring_no_markup(hub, tmp_path):
    names = ["<script>x</script>", "[a](http://b.c)", "![i](j)", "a\n\n# b", "\x1b[31m", "`c`", "*d*", "e" * 10**6]
    pipeline = make_pipeline(classes=len(names))
    pipeline.register_to_config(id2label=dict(enumerate(names)))
    pipeline.save_pretrained(tmp_path)
    card = write_model_card(tmp_path, {})
    card.validate()
    (line,) = [line for line in card.text.splitlines() if line.startswith("Classes: ")]
    assert len(line) < 1000 and line.isprintable()
    assert r"0 (\<script\>x\</script\>), 1 (\[a\](http\://b.c)), 2 (\!\[i\](j)), 3 (a\\n\\n\# b)" in line
    assert r"5 (\`c\`), 6 (\*d\*), 7 (eee" in line


def test_text_of_a_command_or_setting_does_not_end_its_block(run):
    card = write_model_card(run, {"command": "train '```\n# heading\n```'", "recipe": {"note": "```\n# heading"}})
    assert "````bash" in card.text and "````yaml" in card.text


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("train --cache_dir /home/someone", "train --cache_dir ~"),
        ("train --cache_dir=/home/someone", "train --cache_dir=~"),
        ("train --train_data_dir '/home/someone/my pictures'", "train --train_data_dir '~/my pictures'"),
        ("train --train_data_dir '/data/a b/someone/pictures'", "train --train_data_dir /path/to/pictures"),
        ("train --cache_dir /scratch/someone", "train --cache_dir /path/to/user"),
        ("train --cache_dir ~someone/x ../someone/y", "train --cache_dir ~/x ../user/y"),
        ("train --dataset_name user/digits --lr 0.5", "train --dataset_name user/digits --lr 0.5"),
    ],
)
def test_paths_in_the_command_do_not_name_the_user(run, monkeypatch, given, shown):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("LOGNAME", "someone")
    card = write_model_card(run, {"command": given, "dataset": "/home/someone", "recipe": {"x": "/home/someone/gone"}})
    assert f"```bash\n{shown}\n```" in card.text and "someone" not in str(card)
