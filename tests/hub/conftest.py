"""Fixtures of the Hub's tests: a saved pipeline, a training's output folder, and the test double of the Hub."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_pipeline
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import _http
from PIL import Image

from custom_ddpm.hub import write_model_card
from hub.server import HubServer
from hub.shared import STEPS


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline's folder as a finished training leaves it."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    make_pipeline(num_train_timesteps=STEPS).save_pretrained(folder)
    for gray, name in enumerate(("samples.png", "loss_curve.png")):
        Image.fromarray(np.full((4, 4), gray, np.uint8)).save(folder / name)
    write_model_card(folder, {"license": "cc-by-4.0", "num_images": 12})
    return folder


@pytest.fixture
def run(saved, tmp_path):
    """A training's output folder: the pipeline, and files that must never be pushed."""
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    for name in (
        "checkpoints/000010/optimizer.bin",
        "checkpoints/000010/model.safetensors",
        "logs/events.out.tfevents",
        "logs/log.txt",
        "unet/__pycache__/unet.cpython-311.pyc",
        "unet/old/config.json",
        ".cache/x.json",
        "training_config.yaml",
        "metrics.json",
        "random_states_0.pkl",
        "notes.txt",
        "secret.env",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not for the Hub")
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The test double as this process's Hub; the client does not sleep between its attempts."""
    with HubServer() as server:
        # The client derives these from HF_ENDPOINT when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
        yield server
