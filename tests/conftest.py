"""A model small enough to sample in milliseconds, its weights random but not the zeros it is born with."""

import gc
import os

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState

from custom_ddpm import CustomDDPMPipeline, CustomDDPMScheduler, CustomUNet2DModel

# A process that is forked from one with OpenMP threads hangs when it computes; and some tests start several processes.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """A run collects garbage as it ends; the million objects that were imported need not be looked at every time."""
    gc.collect()
    gc.freeze()


def make_pipeline(channels: int = 1, classes: int | None = None, null_class: bool = True, **scheduler_options):
    torch.manual_seed(0)
    unet = CustomUNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=None if classes is None else classes + null_class,
    )
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    scheduler = CustomDDPMScheduler(**{"num_train_timesteps": 20, **scheduler_options})
    id2label = None if classes is None else {i: f"class {i}" for i in range(classes)}
    pipeline = CustomDDPMPipeline(unet, scheduler, id2label=id2label)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline():
    return make_pipeline()


@pytest.fixture
def class_pipeline():
    return make_pipeline(classes=3)


@pytest.fixture(scope="module")
def digits_cache(tmp_path_factory):
    """Runs of a module decode their pictures once, not into the user's cache; no process group is left after them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        # A pause of seconds at the end of every stream.
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
