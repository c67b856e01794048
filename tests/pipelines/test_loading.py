"""The editing pipelines are loaded by diffusers alone, on stock models and on ours, and are saved with every model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import custom_ddpm.pipelines
import pytest
import torch
from conftest import make_pipeline
from custom_ddpm.pipelines import (
    CustomDDPMImg2ImgPipeline,
    CustomDDPMInpaintPipeline,
    CustomDDPMInterpolationPipeline,
    CustomDDPMPipeline,
)
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from custom_ddpm.hub.verify import verify_repository

FILES = Path(custom_ddpm.pipelines.__file__).parent
EDITING = {
    "pipeline_custom_ddpm_img2img": (CustomDDPMImg2ImgPipeline, "p(image, 0.5, num_inference_steps=4)"),
    "pipeline_custom_ddpm_inpaint": (CustomDDPMInpaintPipeline, "p(image, image > 0.5, num_inference_steps=4)"),
    "pipeline_custom_ddpm_interpolate": (
        CustomDDPMInterpolationPipeline,
        "p([image, image], 3, num_inference_steps=4)",
    ),
}
ALONE = """
import json, sys
sys.modules["custom_ddpm"] = None  # as where it is not installed
import numpy as np
from diffusers import DiffusionPipeline

image = np.linspace(0, 1, 64).reshape(8, 8)
for model, custom_pipeline, call in json.loads(sys.argv[1]):
    options = {"custom_pipeline": custom_pipeline} if custom_pipeline else {}
    p = DiffusionPipeline.from_pretrained(model, trust_remote_code=True, **options)
    print(type(p).__name__, eval(call).images[0].size)
"""


def alone(cases, folder):
    """What a process without this package prints of each (model, custom_pipeline, call)."""
    command = [
        sys.executable,
        "-c",
        ALONE,
        json.dumps([[str(each) if each else None for each in case] for case in cases]),
    ]
    environment = {**os.environ, "HF_HOME": str(folder / "huggingface"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture
def stock(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20)).save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


@pytest.mark.slow
def test_diffusers_alone_loads_each_file_and_calls_it(stock, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "ours")
    cases, expected = [], []
    for name, (pipeline_class, call) in EDITING.items():
        pipeline_class.from_pipe(make_pipeline()).save_pretrained(tmp_path / name)
        cases += [
            (stock, FILES / f"{name}.py", call),
            (tmp_path / "ours", name, call),
            (tmp_path / name, None, call),
        ]
        expected += [f"{pipeline_class.__name__} (8, 8)"] * 3
    assert alone(cases, tmp_path) == expected


@pytest.mark.parametrize("name", EDITING)
def test_what_is_saved_passes_the_door_and_loads_with_the_package(tmp_path, name):
    pipeline_class, _ = EDITING[name]
    pipeline_class.from_pipe(make_pipeline(classes=3)).save_pretrained(tmp_path)
    assert verify_repository(tmp_path) == []
    assert {"pictures.py", *(f"{each}.py" for each in EDITING)} <= {file.name for file in tmp_path.iterdir()}
    for each in (CustomDDPMPipeline, *(cls for cls, _ in EDITING.values())):
        loaded = each.from_pretrained(tmp_path)
        assert type(loaded) is each and loaded.config.id2label == {0: "class 0", 1: "class 1", 2: "class 2"}
    (tmp_path / "pictures.py").write_text("import os\n")
    assert [line for line in verify_repository(tmp_path) if line.startswith("pictures.py differs")]


def test_the_files_are_those_that_are_saved():
    listed = custom_ddpm.pipelines.pipeline_custom_ddpm.EDITING_FILES
    assert {*listed, "pipeline_custom_ddpm.py", "__init__.py"} == {file.name for file in FILES.glob("*.py")}
