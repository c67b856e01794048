"""The U-Net compared with diffusers' `UNet2DModel`, or with its definition where that has no counterpart."""

import ast
import importlib.util
import inspect
import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from custom_ddpm import unet as unet_module
from custom_ddpm.unet import (
    CustomUNet2DModel,
    GroupNormSiLU,
    ResidualBlock,
    SelfAttention,
    UpsampledConv2d,
    timestep_embedding,
)

CIFAR10 = {  # google/ddpm-cifar10-32, the paper's network
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": None,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
}
SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
THREE_LEVELS = {
    **SMALL,
    "block_out_channels": (8, 24, 16),
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
}
LAYOUTS = {
    "small": SMALL,
    "three levels": THREE_LEVELS,
    "one level": {
        **SMALL,
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",),
    },
    "one head": {**SMALL, "attention_head_dim": None},
    "heads of four": {**SMALL, "attention_head_dim": 4},
    "paper's time and padding": {
        **SMALL,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "norm_eps": 1e-3,
    },
    "scale and shift": {**SMALL, "resnet_time_scale_shift": "scale_shift"},
    "scale and shift, normed attention": {
        **SMALL,
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 2,
    },
    "other groups in the middle": {**SMALL, "attn_norm_num_groups": 8},
    "no attention in the middle": {**SMALL, "add_attention": False},
    "scaled middle": {**SMALL, "mid_block_scale_factor": math.sqrt(2)},
    "classes": {**SMALL, "num_class_embeds": 5},
    "gray, learned variance": {**SMALL, "in_channels": 1, "out_channels": 2},
    "four channels": {**SMALL, "in_channels": 4, "out_channels": 4},
    "lists, as JSON gives them": {name: list(v) if isinstance(v, tuple) else v for name, v in THREE_LEVELS.items()},
    "odd embedding": {**SMALL, "block_out_channels": (9, 12), "norm_num_groups": 3, "attention_head_dim": 6},
}


def scramble(model, seed=0):
    """Set every parameter to a random value: with zero layers or unit norms, different networks could agree."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(offset + spread * torch.randn(parameter.shape, generator=generator))
    return model


def make_pair(layout, seed=0):
    stock = scramble(UNet2DModel(**layout), seed)
    custom = CustomUNet2DModel(**layout)
    custom.load_state_dict(stock.state_dict())
    return custom, stock


def make_inputs(layout, size=(8, 8), batch_size=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(batch_size, layout.get("in_channels", 3), *size, generator=generator)
    timestep = torch.randint(0, 1000, (batch_size,), generator=generator)
    classes = layout.get("num_class_embeds")
    labels = None if classes is None else torch.randint(0, classes, (batch_size,), generator=generator)
    return sample, timestep, labels


def output_and_gradients(model, sample, *conditions):
    sample = sample.clone().requires_grad_()
    model.zero_grad()
    output = model(sample, *conditions).sample
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output.detach(), {"sample": sample.grad, **gradients}


def assert_same_network(custom, stock, *inputs, tolerance=1e-5):
    output, gradients = output_and_gradients(custom, *inputs)
    expected, expected_gradients = output_and_gradients(stock, *inputs)
    assert expected.std() > 1e-2
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        # A constant added to every key does not change the softmax, so the gradient of that bias is 0 up to rounding.
        scale = 1.0 if name.endswith("to_k.bias") else gradient.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(gradients[name] / scale, gradient / scale, rtol=0, atol=tolerance, msg=name)


# ---- equal to UNet2DModel ----


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_outputs_and_gradients_equal_those_of_diffusers(layout):
    custom, stock = make_pair(layout)
    assert_same_network(custom, stock, *make_inputs(layout))


def test_outputs_and_gradients_equal_those_of_diffusers_in_the_cifar10_layout():
    custom, stock = make_pair(CIFAR10)
    assert sum(parameter.numel() for parameter in custom.parameters()) == 35_746_307
    assert_same_network(custom, stock, *make_inputs(CIFAR10, size=(32, 32), batch_size=1))


def test_dropout_equals_that_of_diffusers_under_the_same_seed():
    # Without attention, since diffusers' attention draws random numbers even for a dropout of 0.
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    custom, stock = make_pair({**SMALL, **blocks, "dropout": 0.3})
    inputs = make_inputs(SMALL)
    outputs = []
    for model in (custom.train(), stock.train()):
        torch.manual_seed(0)
        outputs.append(model(*inputs).sample)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs[0], custom.eval()(*inputs).sample, atol=1e-2)


@st.composite
def layouts(draw):
    levels = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 4]))
    head_dim = draw(st.sampled_from([None, 2, 4]))
    unit = math.lcm(groups, head_dim or 1, 4)
    pick = st.sampled_from(["", "Attn"])
    return {
        "in_channels": draw(st.integers(1, 4)),
        "out_channels": draw(st.integers(1, 6)),
        "freq_shift": draw(st.sampled_from([0, 1])),
        "flip_sin_to_cos": draw(st.booleans()),
        "down_block_types": tuple(draw(pick) + "DownBlock2D" for _ in range(levels)),
        "up_block_types": tuple(draw(pick) + "UpBlock2D" for _ in range(levels)),
        "block_out_channels": tuple(unit * draw(st.integers(1, 3)) for _ in range(levels)),
        "layers_per_block": draw(st.integers(1, 3)),
        "mid_block_scale_factor": draw(st.sampled_from([1, 1.5])),
        "downsample_padding": draw(st.sampled_from([0, 1])),
        "attention_head_dim": head_dim,
        "norm_num_groups": groups,
        "attn_norm_num_groups": draw(st.sampled_from([None, groups])),
        "norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "resnet_time_scale_shift": draw(st.sampled_from(["default", "scale_shift"])),
        "add_attention": draw(st.booleans()),
        "num_class_embeds": draw(st.sampled_from([None, 3])),
    }


@settings(max_examples=30, deadline=None)
@given(layout=layouts(), rows=st.integers(1, 3), columns=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_any_layout_equals_that_of_diffusers(layout, rows, columns, seed):
    # In float64, since a group norm over few pixels divides by a small variance, which amplifies rounding errors.
    custom, stock = (model.double() for model in make_pair(layout, seed))
    stride = 2 ** (len(layout["block_out_channels"]) - 1)
    sample, *conditions = make_inputs(layout, size=(stride * rows, stride * columns), seed=seed)
    with torch.no_grad():
        output, expected = (model(sample.double(), *conditions).sample for model in (custom, stock))
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)


def test_groups_of_one_value_are_those_of_diffusers():
    """A batch of two at 1x1, one channel in a group: the norm of a value is zero."""
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (4,)}
    options = {"norm_num_groups": 4, "resnet_time_scale_shift": "scale_shift", "add_attention": False}
    custom, stock = make_pair({**blocks, **options})
    sample = torch.randn(2, 3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(custom(sample, 5).sample, stock(sample, 5).sample)


def test_the_default_layout_is_the_cifar10_network_with_the_other_defaults_of_diffusers():
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (CustomUNet2DModel, UNet2DModel))
    layout = {"down_block_types", "up_block_types", "block_out_channels"}
    for name in ours.keys() - {"self", "kwargs", "patch_size"}:  # which theirs does not have
        assert ours[name].default == (CIFAR10[name] if name in layout else theirs[name].default), name


# ---- conversion ----


def public(config):
    return {name: value for name, value in config.items() if not name.startswith("_")}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_conversion_there_and_back_changes_nothing(layout):
    stock = scramble(UNet2DModel(**layout))
    custom = CustomUNet2DModel.from_diffusers(stock)
    back = custom.to_diffusers()
    assert public(back.config) == public(stock.config)
    assert public(custom.config).items() <= public(stock.config).items()
    assert isinstance(custom, CustomUNet2DModel) and isinstance(back, UNet2DModel)
    for model in (custom, back):
        tensors = model.state_dict()
        assert tensors.keys() == stock.state_dict().keys()
        for name, tensor in stock.state_dict().items():
            assert torch.equal(tensors[name], tensor), name


def test_conversion_copies_keeps_dtype_mode_and_gradients_and_draws_nothing():
    stock = scramble(UNet2DModel(**SMALL)).to(torch.bfloat16).eval()
    stock.conv_in.requires_grad_(False)
    before = torch.get_rng_state()
    custom = CustomUNet2DModel.from_diffusers(stock)
    assert torch.equal(torch.get_rng_state(), before)
    assert custom.dtype == torch.bfloat16 and not custom.training
    assert all(parameter.device.type == "cpu" for parameter in custom.parameters())
    kept = stock.conv_out.weight.clone()
    with torch.no_grad():
        custom.conv_out.weight.add_(1)
    assert torch.equal(stock.conv_out.weight, kept)
    assert custom.train().to_diffusers().training
    assert custom.conv_out.weight.requires_grad


def test_the_default_network_of_diffusers_keeps_its_own_layout():
    with torch.device("meta"):
        stock = UNet2DModel()
        assert CustomUNet2DModel.from_config(stock.config).config.block_out_channels == (224, 448, 672, 896)
        assert CustomUNet2DModel.from_diffusers(stock).state_dict().keys() == stock.state_dict().keys()


REFUSED = {
    "center_input_sample": True,
    "time_embedding_type": "fourier",
    "time_embedding_dim": 24,
    "mid_block_type": None,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "act_fn": "gelu",
    "class_embed_type": "timestep",
    "down_block_types": ("DownBlock2D", "SkipDownBlock2D"),
    "up_block_types": ("SkipUpBlock2D", "UpBlock2D"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_settings_raise_with_name_and_value(name):
    with pytest.raises(ValueError, match="cannot express") as error:
        CustomUNet2DModel.from_diffusers(UNet2DModel(**{**SMALL, name: REFUSED[name]}))
    assert f"{name}={REFUSED[name]!r}" in str(error.value)
    assert not any(f"{other}=" in str(error.value) for other in REFUSED if other != name)


def test_all_unsupported_settings_are_listed_at_once():
    theirs = inspect.signature(UNet2DModel.__init__).parameters.keys()
    ours = inspect.signature(CustomUNet2DModel.__init__).parameters.keys()
    assert theirs - ours <= REFUSED.keys() | {"num_train_timesteps"}
    assert ours - {"kwargs", "patch_size"} <= theirs
    with pytest.raises(ValueError) as error:
        CustomUNet2DModel.from_config({**SMALL, **REFUSED})
    assert all(f"{name}={value!r}" in str(error.value) for name, value in REFUSED.items())
    assert "\n" not in str(error.value)


def test_a_saved_network_with_unsupported_settings_raises(tmp_path):
    UNet2DModel(**SMALL, center_input_sample=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="center_input_sample=True"):
        CustomUNet2DModel.from_pretrained(tmp_path)


def test_learned_embedding_length_alone_is_accepted():
    stock = UNet2DModel(**SMALL, num_train_timesteps=1000)
    assert CustomUNet2DModel.from_diffusers(stock).config.block_out_channels == (8, 16)


def test_from_diffusers_accepts_only_a_unet():
    with pytest.raises(TypeError, match="got Linear"):
        CustomUNet2DModel.from_diffusers(nn.Linear(1, 1))


# ---- sizes that are not multiples of the stride ----


@pytest.mark.parametrize("size", [(7, 13), (1, 1), (1, 9), (5, 4), (28, 28)])
def test_any_size_is_padded_with_its_border_and_cropped_back(size):
    layout = {
        **SMALL,
        "block_out_channels": (8, 8, 8, 8),
        "down_block_types": ("DownBlock2D",) * 4,
        "up_block_types": ("UpBlock2D",) * 4,
    }
    custom, stock = make_pair(layout)
    sample, timestep, _ = make_inputs(layout, size)
    missing = [math.ceil(side / 8) * 8 - side for side in size]
    before = [count // 2 for count in missing]
    widths = [(0, 0), (0, 0), *((b, count - b) for b, count in zip(before, missing, strict=True))]
    padded = torch.from_numpy(np.pad(sample.numpy(), widths, mode="edge"))
    with torch.no_grad():
        output = custom(sample, timestep).sample
        expected = stock(padded, timestep).sample
    assert output.shape == sample.shape
    expected = expected[:, :, before[0] : before[0] + size[0], before[1] : before[1] + size[1]]
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


# ---- time ----


@pytest.mark.parametrize(("dim", "freq_shift"), [(2, 0), (7, 0), (7, 1), (32, 0), (32, 1), (128, 1)])
@pytest.mark.parametrize("flip_sin_to_cos", [True, False])
def test_timestep_embedding_is_its_formula(dim, freq_shift, flip_sin_to_cos):
    half = dim // 2
    t = np.array([0.0, 1.0, 17.0, 999.0])
    angles = t[:, None] * 10000.0 ** (-np.arange(half) / (half - freq_shift))
    waves = [np.cos(angles), np.sin(angles)] if flip_sin_to_cos else [np.sin(angles), np.cos(angles)]
    expected = np.concatenate([*waves, np.zeros((4, dim % 2))], axis=1)
    embedding = timestep_embedding(torch.tensor(t).long(), dim, flip_sin_to_cos, freq_shift)
    assert embedding.dtype == torch.float32
    np.testing.assert_allclose(embedding.numpy(), expected, atol=3e-4)  # float32 rounding of 999


def test_a_timestep_comes_as_number_tensor_or_one_per_sample():
    model = scramble(CustomUNet2DModel(**SMALL))
    sample, _, _ = make_inputs(SMALL)
    with torch.no_grad():
        expected = model(sample, torch.full((3,), 7)).sample
        for timestep in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor(7.0), torch.full((3,), 7).int()):
            assert torch.equal(model(sample, timestep).sample, expected)
        each = model(sample, torch.tensor([7, 300, 999])).sample
    torch.testing.assert_close(each[:1], expected[:1], rtol=1e-5, atol=1e-5)
    assert (each[1:] - expected[1:]).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_timesteps_are_embedded_in_float32_for_every_dtype(dtype):
    model = scramble(CustomUNet2DModel(**SMALL)).to(dtype)
    seen = []
    model.time_embedding.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    sample, _, _ = make_inputs(SMALL, size=(7, 8))
    output = model(sample.to(dtype), torch.tensor([997, 998, 999])).sample
    assert output.dtype == dtype and output.isfinite().all()
    assert torch.equal(seen[0], timestep_embedding(torch.tensor([997, 998, 999]), 8).to(dtype))
    assert len(seen[0].unique(dim=0)) == 3


# ---- initialisation ----


def test_a_new_network_predicts_zero_and_its_residual_branches_are_zero():
    model = CustomUNet2DModel(**THREE_LEVELS, num_class_embeds=3)
    sample, timestep, _ = make_inputs(SMALL)
    assert torch.count_nonzero(model(sample, timestep, torch.tensor([0, 1, 2])).sample) == 0
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock | SelfAttention)]
    assert len(blocks) == 17 + 8
    for block in blocks:
        if isinstance(block, SelfAttention):
            x = torch.randn(2, block.to_q.in_features, 4, 4)
            assert torch.equal(block(x), x)
        else:
            x = torch.randn(2, block.conv1.in_channels, 4, 4)
            assert torch.equal(block(x, torch.randn(2, 32)), block.conv_shortcut(x))


def test_other_weights_are_glorot_uniform():
    model = CustomUNet2DModel(**{**SMALL, "block_out_channels": (64, 64)})
    zeroed = {model.conv_out}
    zeroed |= {module.conv2 for module in model.modules() if isinstance(module, ResidualBlock)}
    zeroed |= {module.to_out[0] for module in model.modules() if isinstance(module, SelfAttention)}
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for layer in layers:
        assert torch.count_nonzero(layer.bias) == 0
        if layer not in zeroed:
            outs, ins, *kernel = layer.weight.shape
            bound = math.sqrt(6 / ((ins + outs) * math.prod(kernel)))
            assert 0.95 * bound < layer.weight.abs().max() <= bound * (1 + 1e-6)
            assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


# ---- training ----


@pytest.mark.parametrize("layout", [SMALL, {**THREE_LEVELS, "num_class_embeds": 5, "dropout": 0.2}])
def test_gradient_checkpointing_changes_no_values(layout):
    model = scramble(CustomUNet2DModel(**layout)).train()
    inputs = make_inputs(layout)
    torch.manual_seed(0)
    expected, expected_gradients = output_and_gradients(model, *inputs)
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    torch.manual_seed(0)
    output, gradients = output_and_gradients(model, *inputs)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_gradient_checkpointing_covers_every_block_and_only_with_gradients():
    model = CustomUNet2DModel(**SMALL)
    held = []

    def checkpoint(module, *inputs):
        held.append(module)
        return module(*inputs)

    model.enable_gradient_checkpointing(checkpoint)
    model(*make_inputs(SMALL))
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock | SelfAttention)]
    assert set(held) == set(blocks) and len(held) == len(blocks)
    with torch.no_grad():
        model(*make_inputs(SMALL))
    model.disable_gradient_checkpointing()
    model(*make_inputs(SMALL))
    assert len(held) == len(blocks)


def test_every_parameter_has_a_gradient():
    layout = {**THREE_LEVELS, "num_class_embeds": 5}
    model = scramble(CustomUNet2DModel(**layout))
    _, gradients = output_and_gradients(model, *make_inputs(layout))
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())


def test_class_labels_condition_each_sample():
    layout = {**SMALL, "num_class_embeds": 5}
    model = scramble(CustomUNet2DModel(**layout))
    sample, timestep, _ = make_inputs(layout)
    with torch.no_grad():
        first, second = (model(sample, timestep, torch.tensor(labels)).sample for labels in ([0, 1, 2], [0, 1, 3]))
    assert torch.equal(first[:2], second[:2])
    assert (first[2] - second[2]).abs().max() > 1e-2


# ---- dtypes, memory formats, compilation ----


def test_channels_last_gives_the_same_values_and_is_preserved():
    model = scramble(CustomUNet2DModel(**THREE_LEVELS))
    sample, timestep, _ = make_inputs(THREE_LEVELS)
    with torch.no_grad():
        expected = model(sample, timestep).sample
        model.to(memory_format=torch.channels_last)
        output = model(sample.to(memory_format=torch.channels_last), timestep).sample
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near_float32(dtype):
    layout = {**SMALL, "num_class_embeds": 5}
    model = scramble(CustomUNet2DModel(**layout))
    inputs = make_inputs(layout)
    expected = model(*inputs).sample
    with torch.autocast("cpu", dtype):
        output = model(*inputs).sample
    assert output.dtype == dtype
    assert ((output - expected).norm() / expected.norm()) < 0.05
    output.float().square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_forward_does_not_synchronise_with_the_device():
    # Tensors on the meta device have no values, so any synchronisation raises an error.
    model = CustomUNet2DModel(**SMALL, num_class_embeds=5).to("meta")
    sample = torch.empty(2, 3, 7, 9, device="meta")
    labels = torch.empty(2, dtype=torch.long, device="meta")
    for timestep in (7, torch.tensor(7), torch.empty(2, dtype=torch.long, device="meta")):
        assert model(sample, timestep, labels).sample.shape == sample.shape


@pytest.mark.parametrize("timestep", [torch.tensor([3, 500, 999]), 7])
def test_forward_is_one_graph(timestep):
    layout = {**SMALL, "num_class_embeds": 5}
    model = scramble(CustomUNet2DModel(**layout))
    sample, _, labels = make_inputs(layout, size=(7, 9))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    output = compiled(sample, timestep, labels).sample
    torch.testing.assert_close(output, model(sample, timestep, labels).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_code_gives_the_same_numbers_and_gradients():
    layout = LAYOUTS["one level"]
    model = scramble(CustomUNet2DModel(**layout))
    inputs = make_inputs(layout, size=(7, 9))
    expected, expected_gradients = output_and_gradients(model, *inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    output = compiled(*inputs).sample
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    model.zero_grad()
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected_gradients[name], rtol=1e-3, atol=1e-3, msg=name)


# ---- formulations for speed and memory, compared with the plain ones ----


@pytest.fixture
def always(monkeypatch):
    """Every formulation for large inputs, at any size."""
    monkeypatch.setattr(GroupNormSiLU, "MIN_ELEMENTS", 0)
    monkeypatch.setattr(UpsampledConv2d, "MIN_POSITIONS", 0)


def gradients_of(function, *inputs):
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    output = function(*inputs)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad((output * weights).sum(), inputs)]


def plain_norm(x, weight, bias, scale=None, shift=None):
    groups = x.unflatten(1, (2, -1))
    mean, variance = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), correction=0, keepdim=True)
    normed = ((groups - mean) / (variance + 1e-3).sqrt()).flatten(1, 2)
    normed = normed * weight[:, None, None] + bias[:, None, None]
    if scale is not None:
        normed = normed * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return normed * torch.sigmoid(normed)


@pytest.mark.parametrize("threshold", [0, 10**9])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_group_norm_with_silu_is_its_definition(monkeypatch, threshold, scaled, memory_format):
    monkeypatch.setattr(GroupNormSiLU, "MIN_ELEMENTS", threshold)
    torch.manual_seed(0)
    x = (3 * torch.randn(3, 6, 5, 4, dtype=torch.float64) + 1).to(memory_format=memory_format)
    conditions = [torch.randn(3, 6, dtype=torch.float64) for _ in range(2 * scaled)]
    layer = GroupNormSiLU(2, 6, 1e-3).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)

    def ours(x, weight, bias, *conditions):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, *conditions))

    inputs = (x, layer.weight, layer.bias, *conditions)
    for value, expected in zip(gradients_of(ours, *inputs), gradients_of(plain_norm, *inputs), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(ours, leaves)


@pytest.mark.parametrize("scaled", [False, True])
def test_group_norm_with_silu_keeps_its_input_alone(always, scaled):
    layer, x = GroupNormSiLU(2, 64), torch.randn(4, 64, 8, 8, requires_grad=True)
    conditions = [torch.randn(4, 64, requires_grad=True) for _ in range(2 * scaled)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        layer(x, *conditions)
    large = [value for value in kept if value.numel() == x.numel()]
    assert [value.untyped_storage().data_ptr() for value in large] == [x.untyped_storage().data_ptr()]


def test_group_norm_with_silu_has_no_second_derivative_and_says_so(always):
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(GroupNormSiLU(2, 4)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_with_silu_in_half_precision_keeps_the_dtypes(always, dtype):
    layer = GroupNormSiLU(2, 4)
    x = torch.randn(2, 4, 3, 3).to(dtype).requires_grad_()
    output = layer(x)
    output.sum().backward()
    assert output.dtype == x.grad.dtype == dtype and layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(output.float(), F.silu(nn.GroupNorm(2, 4)(x.float())), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 3)])
def test_upsampling_and_convolution_are_one_transposed_convolution(always, size):
    layer = UpsampledConv2d(3, 4, 3, padding=1)
    x = torch.randn(2, 3, *size)

    def plain(x, weight, bias):
        return F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), weight, bias, padding=1)

    def ours(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    inputs = (x, layer.weight, layer.bias)
    for value, expected in zip(gradients_of(ours, *inputs), gradients_of(plain, *inputs), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    assert ours(x, layer.weight, layer.bias).grad_fn.name() == "ConvolutionBackward0"
    with torch.profiler.profile() as profile:
        layer(x)
    assert any(event.key == "aten::conv_transpose2d" for event in profile.key_averages())


def test_attention_in_half_precision_on_a_cpu_is_that_of_float32():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 5, 8).bfloat16().requires_grad_() for _ in range(3)]
    query, key, value = (tensor.float() for tensor in inputs)
    expected = (query @ key.transpose(2, 3) / math.sqrt(8)).softmax(-1) @ value
    with torch.autocast("cpu", torch.bfloat16):
        output = unet_module._attention(*inputs)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected.bfloat16(), rtol=0.004, atol=1e-5)  # rounded once, at the end
    output.float().sum().backward()
    assert all(tensor.grad.dtype == torch.bfloat16 for tensor in inputs)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_formulations_for_large_inputs_give_the_same_network(always, layout):
    custom, stock = make_pair(layout)
    assert_same_network(custom, stock, *make_inputs(layout))


def test_formulations_for_large_inputs_with_gradient_checkpointing_autocast_and_compilation(always):
    layout = {**SMALL, "resnet_time_scale_shift": "scale_shift", "num_class_embeds": 5}
    model = scramble(CustomUNet2DModel(**layout))
    inputs = make_inputs(layout)
    expected, expected_gradients = output_and_gradients(model, *inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for runnable in (compiled, model):
        if runnable is model:
            model.enable_gradient_checkpointing()
        output, gradients = output_and_gradients(runnable, *inputs)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        for name, gradient in expected_gradients.items():
            found = gradients[name if name in gradients else f"_orig_mod.{name}"]
            torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-3, msg=name)
    with torch.autocast("cpu", torch.bfloat16):
        output, gradients = output_and_gradients(model, *inputs)
    assert ((output - expected).norm() / expected.norm()) < 0.05
    errors = [(gradients[name] - value).norm() / value.norm() for name, value in expected_gradients.items()]
    assert np.median(errors) < 0.1


# ---- saving and loading ----


def test_saved_as_safetensors_and_loaded_back(tmp_path):
    model = scramble(CustomUNet2DModel(**THREE_LEVELS, sample_size=(7, 9)))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = CustomUNet2DModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    inputs = make_inputs(THREE_LEVELS, size=(7, 9))
    assert torch.equal(loaded(*inputs).sample, model.eval()(*inputs).sample)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["_class_name"] == "CustomUNet2DModel" and saved["sample_size"] == [7, 9]


def test_each_class_loads_what_the_other_saved(tmp_path):
    stock = scramble(UNet2DModel(**SMALL))
    stock.save_pretrained(tmp_path / "stock")
    custom = CustomUNet2DModel.from_pretrained(tmp_path / "stock")
    custom.save_pretrained(tmp_path / "custom")
    back = UNet2DModel.from_pretrained(tmp_path / "custom")
    for model in (custom, back):
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stock.state_dict().items())
    as_lists = {name: list(value) if isinstance(value, tuple) else value for name, value in stock.config.items()}
    assert public(back.config) == public(as_lists)


def old_attention_names(state_dict):
    """Rename attention weights as in repositories from before diffusers 0.13, such as google/ddpm-cifar10-32."""
    renamed = {}
    for name, tensor in state_dict.items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = tensor
    return renamed


def test_old_attention_names_are_read(tmp_path):
    model = scramble(CustomUNet2DModel(**SMALL))
    model.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    old = old_attention_names(load_file(weights))
    assert any("proj_attn" in name for name in old) and not any("to_q" in name for name in old)
    save_file(old, weights, metadata={"format": "pt"})
    loaded = CustomUNet2DModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


# ---- invalid arguments ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"out_channels": -1}, "out_channels must be at least 1, got -1"),
        ({"layers_per_block": 0}, "layers_per_block must be at least 1, got 0"),
        ({"norm_num_groups": 0}, "norm_num_groups must be at least 1, got 0"),
        ({"num_class_embeds": 0}, "num_class_embeds must be at least 1, got 0"),
        ({"norm_num_groups": 5}, r"norm_num_groups 5 must divide each of block_out_channels \(8, 16\)"),
        ({"block_out_channels": (8, 0)}, r"norm_num_groups 4 must divide each of block_out_channels \(8, 0\)"),
        ({"attn_norm_num_groups": 3}, r"attn_norm_num_groups 3 must divide the last of block_out_channels \(8, 16\)"),
        ({"attention_head_dim": 17}, "attention_head_dim 17 must not be more than the 16 channels"),
        ({"attention_head_dim": 0}, "attention_head_dim must be at least 1, got 0"),
        ({"block_out_channels": (8, 16, 16)}, "down_block_types must name 3 >= 1 block types"),
        ({"block_out_channels": (), "down_block_types": ()}, "down_block_types must name 0 >= 1 block types"),
        ({"up_block_types": ("UpBlock2D",)}, "up_block_types must name 2 >= 1 block types"),
        ({"down_block_types": ("DownBlock2D", "KDownBlock2D")}, "down_block_types must be chosen from .*KDownBlock2D"),
        ({"up_block_types": ("DownBlock2D", "UpBlock2D")}, "up_block_types must be chosen from .*'DownBlock2D'"),
        ({"freq_shift": 4}, "freq_shift must be < 8 // 2, got 4"),
        ({"mid_block_scale_factor": 0}, "mid_block_scale_factor must be above 0, got 0"),
        ({"downsample_padding": 2}, "downsample_padding must be 0 or 1, got 2"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift must be one of .* got 'spatial'"),
    ],
)
def test_invalid_arguments_raise_with_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        CustomUNet2DModel(**{**SMALL, **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("classes", "inputs", "message"),
    [
        (None, (torch.zeros(2, 1, 8, 8), 0), r"sample must be \(B, 3, H, W\), got \(2, 1, 8, 8\)"),
        (None, (torch.zeros(3, 8, 8), 0), r"sample must be \(B, 3, H, W\), got \(3, 8, 8\)"),
        (None, (torch.zeros(2, 3, 8, 8), torch.zeros(3)), r"timestep must be one number or \(2,\), got \(3,\)"),
        (None, (torch.zeros(2, 3, 8, 8), torch.zeros(2, 1)), r"timestep must be one number or \(2,\), got \(2, 1\)"),
        (None, (torch.zeros(2, 3, 8, 8), 0, torch.tensor([0, 0])), "class_labels must be None"),
        (4, (torch.zeros(2, 3, 8, 8), 0), "class_labels must be given: the model has 4 classes"),
        (4, (torch.zeros(2, 3, 8, 8), 0, torch.tensor([0])), r"class_labels must be \(2,\), got \(1,\)"),
    ],
)
def test_invalid_inputs_raise_with_one_line(classes, inputs, message):
    with pytest.raises(ValueError, match=message) as error:
        CustomUNet2DModel(**SMALL, num_class_embeds=classes)(*inputs)
    assert "\n" not in str(error.value)


# ---- the file on its own ----


def test_the_file_imports_nothing_of_the_package(tmp_path):
    source = inspect.getsource(unet_module)
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "diffusers"}
    path = tmp_path / "unet.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("a_unet_from_elsewhere", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sample, timestep, _ = make_inputs(SMALL)
    assert module.CustomUNet2DModel(**SMALL)(sample, timestep).sample.shape == sample.shape


def test_return_dict_false_gives_a_tuple():
    model = scramble(CustomUNet2DModel(**SMALL))
    inputs = make_inputs(SMALL)
    (output,) = model(*inputs, return_dict=False)
    assert torch.equal(output, model(*inputs).sample)


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_patches_are_the_same_network_on_rearranged_pixels(size):
    torch.manual_seed(0)
    whole = CustomUNet2DModel(in_channels=8, out_channels=8, **SMALL)
    nn.init.normal_(whole.conv_out.weight)
    patched = CustomUNet2DModel(in_channels=2, out_channels=2, patch_size=2, **SMALL)
    patched.load_state_dict(whole.state_dict())
    x, t = torch.randn(3, 2, *size), torch.tensor([1, 5, 9])
    found = patched(x, t).sample
    assert found.shape == x.shape
    if size == (8, 8):
        pixels = torch.stack([x[:, :, i::2, j::2] for i in range(2) for j in range(2)], dim=2).flatten(1, 2)
        expected = whole(pixels, t).sample.unflatten(1, (2, 4))
        for k, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            torch.testing.assert_close(found[:, :, i::2, j::2], expected[:, :, k])


def test_patches_cannot_be_converted():
    with pytest.raises(ValueError, match="UNet2DModel has no patch_size; this model's is 2"):
        CustomUNet2DModel(patch_size=2, **SMALL).to_diffusers()
    with pytest.raises(ValueError, match="patch_size must be at least 1, got 0"):
        CustomUNet2DModel(patch_size=0, **SMALL)
