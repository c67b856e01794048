"""A model small enough to sample in milliseconds, its weights random but not the zeros it is born with."""

import pytest
import torch

from custom_ddpm import CustomDDPMPipeline, CustomDDPMScheduler, CustomUNet2DModel


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
