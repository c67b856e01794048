"""What code written for diffusers' own classes expects of ours: keywords, `from_pipe`, `AutoModel`, remote code."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from accelerate import init_empty_weights
from conftest import make_pipeline
from diffusers import (
    AutoModel,
    DDIMPipeline,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)
from diffusers.training_utils import EMAModel

from custom_ddpm import CustomDDPMPipeline, CustomDDPMScheduler, CustomUNet2DModel
from custom_ddpm.hub.verify import verify_repository

SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


def same_pictures(first, second):
    images = [
        pipeline(generator=torch.Generator().manual_seed(1), num_inference_steps=5, output_type="np").images
        for pipeline in (first, second)
    ]
    assert images[0].std() > 0.05
    return abs(images[0] - images[1]).max() < 1e-5


# ---- the U-Net ----


def test_a_unet_is_built_from_a_saved_configuration(tmp_path):
    unet = CustomUNet2DModel(**SMALL)
    unet.save_pretrained(tmp_path / "unet")
    for built in (
        CustomUNet2DModel.from_config(tmp_path / "unet"),
        CustomUNet2DModel.from_config(str(tmp_path), subfolder="unet"),
        CustomUNet2DModel.from_config(pretrained_model_name_or_path=tmp_path / "unet"),
    ):
        assert built.state_dict().keys() == unet.state_dict().keys()
    UNet2DModel(**SMALL, act_fn="gelu").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="act_fn='gelu'"):
        CustomUNet2DModel.from_config(tmp_path / "other")


def test_averages_are_saved_and_loaded_as_the_stock_training_script_does(tmp_path):
    unet = CustomUNet2DModel(**SMALL)
    ema = EMAModel(unet.parameters(), decay=0.5, model_cls=CustomUNet2DModel, model_config=unet.config)
    for _ in range(3):
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter += 1.0
        ema.step(unet.parameters())
    ema.save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, CustomUNet2DModel)
    assert (loaded.decay, loaded.optimization_step) == (0.5, 3)
    for mean, expected in zip(loaded.shadow_params, ema.shadow_params, strict=True):
        assert torch.equal(mean, expected)


@pytest.mark.parametrize("head_dim", [3, 5, 7])
def test_heads_that_do_not_divide_the_channels_compute_what_the_stock_unet_does(head_dim):
    torch.manual_seed(0)
    stock = UNet2DModel(**{**SMALL, "attention_head_dim": head_dim}).eval()
    ours = CustomUNet2DModel.from_diffusers(stock)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t).sample, stock(x, t).sample, atol=1e-5, rtol=1e-5)
    assert ours.down_blocks[1].attentions[0].to_q.weight.shape == (16 // head_dim * head_dim, 16)


def test_heads_wider_than_their_block_are_refused():
    with pytest.raises(ValueError, match="attention_head_dim 17 must not be more than the 16 channels of its block"):
        CustomUNet2DModel(**{**SMALL, "attention_head_dim": 17})


def test_settings_of_the_stock_unet_are_accepted_at_their_defaults_only():
    stock_only = {
        "act_fn": "silu",
        "center_input_sample": False,
        "class_embed_type": None,
        "downsample_type": "conv",
        "mid_block_type": "UNetMidBlock2D",
        "num_train_timesteps": 1000,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
        "upsample_type": "conv",
    }
    unet = CustomUNet2DModel(**SMALL, **stock_only)
    assert dict(unet.config) | {"_use_default_values": 0} == dict(CustomUNet2DModel(**SMALL).config) | {
        "_use_default_values": 0
    }
    for name, other in {**stock_only, "act_fn": "gelu", "mid_block_type": None, "downsample_type": "resnet"}.items():
        if other != stock_only[name]:
            with pytest.raises(ValueError, match=f"cannot express these settings of UNet2DModel: {name}={other!r}"):
                CustomUNet2DModel(**SMALL, **{name: other})
    with pytest.raises(TypeError, match="unexpected keyword argument 'dropuot'"):
        CustomUNet2DModel(**SMALL, dropuot=0.1)


# ---- the scheduler ----


@pytest.mark.parametrize("options", [{}, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}])
def test_a_scheduler_does_not_depend_on_the_default_device(options):
    expected = CustomDDPMScheduler(**options)
    variances = {"variance_type": "analytic", "original_sample_variances": [0.5] * 1000}
    for context in (torch.device("meta"), init_empty_weights(include_buffers=True)):
        with context:
            scheduler = CustomDDPMScheduler(**options)
            CustomDDPMScheduler(**variances)
            scheduler.set_timesteps(10)
        assert torch.equal(scheduler.alphas_cumprod, expected.alphas_cumprod)
        assert scheduler.timesteps.device.type == "cpu"
        x = torch.ones(1, 1, 2, 2)
        assert torch.equal(scheduler.add_noise(x, x, 500), expected.add_noise(x, x, 500))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_samples_that_are_no_floating_point_numbers_are_refused(dtype):
    scheduler = CustomDDPMScheduler()
    x = torch.ones(1, 1, 2, 2, dtype=dtype)
    noise = torch.randn(1, 1, 2, 2)
    calls = [
        lambda: scheduler.add_noise(x, noise, 5),
        lambda: scheduler.forward_step(x, 5, noise),
        lambda: scheduler.get_velocity(x, noise, 5),
        lambda: scheduler.step(noise, 5, x),
        lambda: scheduler.predict_original_sample(noise, 5, x, "sample"),
        lambda: scheduler.predict_epsilon(noise, 5, x, "epsilon"),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=f"samples are of dtype {dtype}; they must be floating point") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_scheduler_is_loaded_from_the_folder_of_another_kind(tmp_path):
    DPMSolverMultistepScheduler(num_train_timesteps=50).save_pretrained(tmp_path)
    ours, stock = (each.from_pretrained(tmp_path) for each in (CustomDDPMScheduler, DDPMScheduler))
    assert ours.config.variance_type == "fixed_small"
    x, eps = torch.randn(2, 1, 1, 4, 4)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    for t in (ours.timesteps[0], ours.timesteps[4]):
        expected = stock.step(eps, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
        got = ours.step(eps, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


# ---- keywords of from_pretrained ----


def test_keywords_of_from_pretrained_mean_what_they_mean_in_diffusers(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    load = CustomDDPMPipeline.from_pretrained
    for options in ({}, {"use_safetensors": True}, {"use_safetensors": None}, {"output_loading_info": False}):
        assert load(tmp_path, **options).unet.dtype == torch.float32
    for options in (
        {"torch_dtype": torch.float16},
        {"dtype": torch.float16},
        {"torch_dtype": {"unet": torch.float16}},
        {"torch_dtype": {"default": torch.float16}},
        {"dtype": {"unet": torch.float16, "default": torch.bfloat16}},
    ):
        assert load(tmp_path, **options).unet.dtype == torch.float16
    assert load(tmp_path, torch_dtype={"vae": torch.float16}).unet.dtype == torch.float32
    loaded, info = load(tmp_path, output_loading_info=True)
    assert isinstance(loaded, CustomDDPMPipeline) and info["missing_keys"] == []
    with pytest.raises(ValueError, match="use_safetensors is False; pickles are not read"):
        load(tmp_path, use_safetensors=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'torch_dtpe'"):
        load(tmp_path, torch_dtpe=torch.float16)


def test_keywords_of_from_pretrained_for_a_stock_pipeline(pipeline, tmp_path):
    DDPMPipeline(UNet2DModel(**SMALL, sample_size=8), DDPMScheduler()).save_pretrained(tmp_path)
    load = CustomDDPMPipeline.from_pretrained
    assert load(tmp_path, use_safetensors=True).unet.dtype == torch.float32
    assert load(tmp_path, torch_dtype={"unet": torch.float16}).unet.dtype == torch.float16
    with pytest.raises(TypeError, match="unexpected keyword argument 'safety'"):
        load(tmp_path, safety=None)
    unet = CustomUNet2DModel(**SMALL)
    assert load(tmp_path, unet=unet).unet is unet


# ---- other pipelines ----


def test_from_pipe_takes_the_components(class_pipeline):
    other = CustomDDPMPipeline.from_pipe(class_pipeline)
    assert other.unet is class_pipeline.unet and other.scheduler is class_pipeline.scheduler
    assert other.config.id2label == class_pipeline.config.id2label
    stock = DDPMPipeline(UNet2DModel(**SMALL, sample_size=8), DDPMScheduler(num_train_timesteps=20))
    assert CustomDDPMPipeline.from_pipe(stock).unet is stock.unet
    replaced = CustomDDPMScheduler(num_train_timesteps=20)
    assert CustomDDPMPipeline.from_pipe(stock, scheduler=replaced).scheduler is replaced


def test_stock_pipelines_take_our_unet(pipeline):
    # diffusers compares the exact class of a model, so the U-Net must be named.
    assert DDIMPipeline.from_pipe(pipeline, unet=pipeline.unet).unet is pipeline.unet
    assert DDPMPipeline.from_pipe(pipeline, unet=pipeline.unet).unet is pipeline.unet


@pytest.mark.parametrize("stock_class", [DDPMPipeline, DDIMPipeline])
def test_a_stock_pipeline_that_holds_our_unet_is_loaded(pipeline, tmp_path, stock_class):
    stock_class(pipeline.unet, pipeline.scheduler).save_pretrained(tmp_path)
    loaded = CustomDDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.unet) is CustomUNet2DModel
    for name, value in loaded.unet.state_dict().items():
        assert torch.equal(value, pipeline.unet.state_dict()[name])
    if stock_class is DDPMPipeline:
        assert same_pictures(pipeline, loaded)


# ---- remote code ----


def in_a_new_process(code, cache, *arguments):
    """Run code where the package is not found and remote code has a cache of its own."""
    words = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    result = subprocess.run(
        words, env={"HF_MODULES_CACHE": str(cache), "OMP_NUM_THREADS": "1"}, cwd=cache, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result


AUTO_MODEL = """
    import sys
    sys.modules["custom_ddpm"] = None
    import torch
    from diffusers import AutoModel, DiffusionPipeline
    folder = sys.argv[1]
    unet = AutoModel.from_pretrained(folder, subfolder="unet", trust_remote_code=True)
    again = AutoModel.from_pretrained(folder + "/unet", trust_remote_code=True)
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    for name, value in pipeline.unet.state_dict().items():
        assert torch.equal(unet.state_dict()[name], value) and torch.equal(again.state_dict()[name], value)
    assert type(unet).__name__ == "CustomUNet2DModel", type(unet)
    pipeline.save_pretrained(folder + "-again")
"""


def test_auto_model_finds_the_unet(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    result = in_a_new_process(AUTO_MODEL, tmp_path, tmp_path / "model")
    assert "not expected" not in result.stderr
    for folder in ("model", "model-again"):
        assert verify_repository(tmp_path / folder) == []
        assert same_pictures(pipeline, CustomDDPMPipeline.from_pretrained(tmp_path / folder))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModel.from_pretrained(tmp_path / "model", subfolder="unet")


@pytest.mark.parametrize(
    "auto_map",
    [{"AutoModel": "other.CustomUNet2DModel"}, {"AutoModel": "user/repo--unet.X"}, {"Auto": "unet.X"}, "unet", []],
)
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_another_auto_map_is_reported(pipeline, tmp_path, name, auto_map):
    pipeline.save_pretrained(tmp_path)
    config = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text(json.dumps(config | {"auto_map": auto_map}))
    assert any("auto_map names other code to load" in problem for problem in verify_repository(tmp_path))


TWO_VERSIONS = """
    import sys
    sys.modules["custom_ddpm"] = None
    from diffusers import DiffusionPipeline
    for folder in sys.argv[1:]:
        pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        print(pipeline.scheduler.alphas_cumprod[-1].item())
"""


def test_two_folders_with_different_schedules_in_one_process(tmp_path):
    make_pipeline(beta_schedule="exp").save_pretrained(tmp_path / "one")
    make_pipeline(beta_schedule="exp").save_pretrained(tmp_path / "two")
    for folder in ("one", "two"):  # both compute β from their own code
        config = tmp_path / folder / "scheduler" / "scheduler_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"trained_betas": None}))
    file = tmp_path / "two" / "scheduler" / "schedules.py"
    text = file.read_text()
    assert "-12.0 * u" in text
    file.write_text(text.replace("-12.0 * u", "-6.0 * u"))
    result = in_a_new_process(TWO_VERSIONS, tmp_path, *(tmp_path / each for each in ("one", "two", "one")))
    first, second, third = map(float, result.stdout.split())
    assert first == third == pytest.approx(6.14e-6, rel=1e-2)  # e^-12
    assert second == pytest.approx(2.48e-3, rel=1e-2)  # e^-6


def test_a_pipeline_of_remote_code_is_taken_by_from_pipe(pipeline, tmp_path, monkeypatch):
    pipeline.save_pretrained(tmp_path)
    remote = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(remote.unet) is not CustomUNet2DModel
    assert type(remote).from_pipe(remote).unet is remote.unet
