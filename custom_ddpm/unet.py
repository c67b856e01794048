"""The noise predictor ε_θ(x_t, t) (T1): the U-Net of Ho et al. 2020 (arXiv:2006.11239, appendix B).

Residual blocks at decreasing, then increasing resolution, with skip connections between blocks of the same resolution.
Every residual block is conditioned on the timestep, and on the class if there are classes. At chosen levels each is
followed by self-attention over all positions.

Arguments and state-dict keys are those of diffusers' `UNet2DModel`, so weights load in both classes without renaming.
This file imports nothing of the package: it is saved in every model repository.
"""

import inspect
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn
from torch.autograd.function import once_differentiable

BLOCK_TYPES = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
}


def timestep_embedding(
    timesteps: torch.Tensor, dim: int, flip_sin_to_cos: bool = True, freq_shift: float = 0
) -> torch.Tensor:
    """Sinusoidal embedding of timesteps (Vaswani et al. 2017).

    sin(t ω_i) and cos(t ω_i) with ω_i = 10000^(−i/(h − freq_shift)), i = 0 … h−1, h = dim // 2.

    Args:
        timesteps: (B,), any real dtype.
        dim: number of features; the last one is 0 if `dim` is odd.
        flip_sin_to_cos: cosines first if True, sines first (as in the paper's code) if False.
        freq_shift: with 1 the longest wavelength is exactly 2π · 10000, as in the paper's code.

    Returns:
        (B, dim), always float32, since half precision cannot represent all timesteps.
    """
    half = dim // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(exponents / (half - freq_shift))
    waves = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(waves, dim=-1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """Two-layer perceptron on the sinusoidal embedding."""

    def __init__(self, dim: int, embedding_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim, embedding_dim)
        self.linear_2 = nn.Linear(embedding_dim, embedding_dim)

    def forward(self, waves: torch.Tensor) -> torch.Tensor:
        """(B, dim) -> (B, embedding_dim)."""
        return self.linear_2(F.silu(self.linear_1(waves)))


class _GroupNormSiLU(torch.autograd.Function):
    """SiLU of a group norm. Kept for the backward pass is the input alone; the output of the norm is computed again."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.settings = groups, eps
        return F.silu(_GroupNormSiLU.norm(x, weight, bias, groups, eps)[0], inplace=True).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        normed, mean, rstd = _GroupNormSiLU.norm(x, weight, bias, *ctx.settings)
        gradient = torch.ops.aten.silu_backward(gradient.contiguous().to(normed.dtype), normed)
        sizes = (len(x), x.shape[1], x[0, 0].numel(), ctx.settings[0])
        of_x, of_weight, of_bias = torch.ops.aten.native_group_norm_backward(
            gradient, x.to(normed.dtype), mean, rstd, weight, *sizes, [True, True, True]
        )
        return of_x.to(x.dtype), of_weight, of_bias, None, None

    @staticmethod
    def norm(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Group norm of x, and mean and 1/standard deviation of each group."""
        if x.device.type != "cpu":  # whose kernels take half precision with float32 weights
            x = x.to(weight.dtype)
        result: Any = torch.native_group_norm(x, weight, bias, len(x), x.shape[1], x[0, 0].numel(), groups, eps)
        return result


class GroupNormSiLU(nn.GroupNorm):
    """Group norm, optionally scaled and shifted for each sample, then SiLU."""

    # Elements of the input from which on it is the memory that counts, not the overhead of another call.
    MIN_ELEMENTS = 2**19

    def forward(
        self, x: torch.Tensor, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        """SiLU(norm(x) · (1 + scale) + shift) of x (B, C, H, W), for scale and shift (B, C)."""
        weight: torch.Tensor = self.weight
        bias: torch.Tensor = self.bias
        groups, shape = self.num_groups, x.shape
        if not x.is_contiguous():  # channels_last, which the following would undo
            hidden = F.group_norm(x, groups, weight, bias, self.eps)
            if scale is not None and shift is not None:
                hidden = hidden * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
            return F.silu(hidden)
        if scale is not None and shift is not None:
            # A batch with weights of its own for each sample is one sample with B · C channels.
            weight, bias = (weight * (1 + scale)).flatten(), (bias * (1 + scale) + shift).flatten()
            groups, x = groups * len(x), x.flatten(0, 1)[None]
        if not torch.is_grad_enabled() or x.numel() < self.MIN_ELEMENTS:
            # Not F.group_norm, which refuses groups of one value in what it takes for one sample.
            return F.silu(torch.group_norm(x, groups, weight, bias, self.eps)).view(shape)
        return _GroupNormSiLU.apply(x, weight, bias, groups, self.eps).view(shape)


class ResidualBlock(nn.Module):
    """Residual block x + f(x, t), where f is twice group norm, SiLU and convolution.

    The embedding is added before the second norm ("default", as in the paper), or scales and shifts the output of that
    norm ("scale_shift": Nichol & Dhariwal 2021, arXiv:2102.09672).
    """

    def __init__(
        self, ins: int, outs: int, embedding_dim: int, groups: int, eps: float, dropout: float, scale_shift: bool
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = GroupNormSiLU(groups, ins, eps)
        self.conv1 = nn.Conv2d(ins, outs, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding_dim, 2 * outs if scale_shift else outs)
        self.norm2 = GroupNormSiLU(groups, outs, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outs, outs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(ins, outs, 1) if ins != outs else nn.Identity()

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """x (B, ins, H, W), emb (B, embedding_dim) after its SiLU -> (B, outs, H, W)."""
        hidden = self.conv1(self.norm1(x))
        emb = self.time_emb_proj(emb)
        if self.scale_shift:
            hidden = self.norm2(hidden, *emb.chunk(2, dim=1))
        else:
            hidden = self.norm2(hidden + emb[:, :, None, None])
        return self.conv_shortcut(x) + self.conv2(self.dropout(hidden))


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Scaled dot-product attention; in float32 on CPUs, whose backward pass in half precision is far slower."""
    if query.device.type != "cpu" or query.dtype == torch.float64:
        return F.scaled_dot_product_attention(query, key, value)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(query.float(), key.float(), value.float()).to(query.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention over all positions of an image, with a residual connection."""

    # Makes ModelMixin.from_pretrained rename the weights of this module (query, key, value, proj_attn) in checkpoints
    # from before diffusers 0.13, such as google/ddpm-cifar10-32.
    _from_deprecated_attn_block = True

    def __init__(self, channels: int, head_dim: int | None, groups: int | None, eps: float):
        super().__init__()
        head_dim = channels if head_dim is None else head_dim
        if head_dim > channels:
            raise ValueError(
                f"attention_head_dim {head_dim} must not be more than the {channels} channels of its block"
            )
        # As many whole heads as fit, as in diffusers: together they may be narrower than the block.
        self.heads = channels // head_dim
        width = self.heads * head_dim
        self.group_norm = nn.GroupNorm(groups, channels, eps) if groups is not None else nn.Identity()
        self.to_q = nn.Linear(channels, width)
        self.to_k = nn.Linear(channels, width)
        self.to_v = nn.Linear(channels, width)
        self.to_out = nn.ModuleList([nn.Linear(width, channels)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)
        query, key, value = (
            project(pixels).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        hidden = _attention(query, key, value).transpose(1, 2).flatten(2)
        return x + self.to_out[0](hidden).transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """Convolution of stride 2."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        if self.conv.padding == (0, 0):  # as in the paper's code, which pads on the right and bottom only
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class UpsampledConv2d(nn.Conv2d):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution."""

    # Positions of a picture from which on the other formulation is faster on a CPU. Not those of the batch: a sample
    # depends on its seed, not on how many are drawn at once.
    MIN_POSITIONS = 32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        if x.device.type != "cpu" or x.dtype != torch.float32 or x[0, 0].numel() < self.MIN_POSITIONS:
            return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        # Every output pixel sees 2x2 different pixels only. With the weights of equal pixels added up, that is a
        # transposed convolution with 4x4 weights: 16 multiplications for 4 pixels and pair of channels, not 36.
        weight = F.pad(self.weight, (0, 1)) + F.pad(self.weight, (1, 0))
        weight = F.pad(weight, (0, 0, 0, 1)) + F.pad(weight, (0, 0, 1, 0))
        return F.conv_transpose2d(x, weight.flip(2, 3).transpose(0, 1), self.bias, stride=2, padding=1)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = UpsampledConv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        return self.conv(x)


class Block(nn.Module):
    """Base class of the blocks: residual blocks, optional self-attention, gradient checkpointing.

    `gradient_checkpointing` and `_gradient_checkpointing_func` are set by ModelMixin.enable_gradient_checkpointing.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., torch.Tensor]

    def __init__(self, resnets: list[ResidualBlock], attentions: list[SelfAttention]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)

    def run(self, module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """Call a module, with gradient checkpointing if it is enabled."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(module, *inputs)
        return module(*inputs)

    def layer(self, index: int, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Residual block `index`, then its self-attention if there is any."""
        x = self.run(self.resnets[index], x, emb)
        return self.run(self.attentions[index], x) if self.attentions else x


class DownBlock(Block):
    """One level of the encoder."""

    def __init__(self, resnets: list[ResidualBlock], attentions: list[SelfAttention], downsamplers: list[Downsample]):
        super().__init__(resnets, attentions)
        self.downsamplers = nn.ModuleList(downsamplers)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of every layer, in order: the skip connections. The last one is the input of the next block."""
        skips = []
        for index in range(len(self.resnets)):
            x = self.layer(index, x, emb)
            skips.append(x)
        for downsample in self.downsamplers:
            skips.append(downsample(x))
        return skips


class MidBlock(Block):
    """Residual block, optional self-attention and residual block at the lowest resolution."""

    def __init__(self, resnets: list[ResidualBlock], attentions: list[SelfAttention], scale_factor: float):
        super().__init__(resnets, attentions)
        self.scale_factor = scale_factor

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.run(self.resnets[0], x, emb) / self.scale_factor
        for attention in self.attentions:
            x = self.run(attention, x) / self.scale_factor
        return self.run(self.resnets[1], x, emb) / self.scale_factor


class UpBlock(Block):
    """One level of the decoder."""

    def __init__(self, resnets: list[ResidualBlock], attentions: list[SelfAttention], upsamplers: list[Upsample]):
        super().__init__(resnets, attentions)
        self.upsamplers = nn.ModuleList(upsamplers)

    def forward(self, x: torch.Tensor, skips: list[torch.Tensor], emb: torch.Tensor) -> torch.Tensor:
        """Apply the layers; `skips` holds one skip connection per layer, the last one for the first layer."""
        for index, skip in enumerate(reversed(skips)):
            x = self.layer(index, torch.cat([x, skip], dim=1), emb)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


def _check_arguments(config: Any) -> None:
    """Raise ValueError for the first invalid argument of `CustomUNet2DModel`."""

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(message)

    channels, groups, mid_groups = config.block_out_channels, config.norm_num_groups, config.attn_norm_num_groups
    at_least_one = "in_channels out_channels layers_per_block attention_head_dim norm_num_groups num_class_embeds"
    for name in f"{at_least_one} patch_size".split():
        require(config[name] is None or config[name] >= 1, f"{name} must be at least 1, got {config[name]}")
    for name, known in BLOCK_TYPES.items():
        types = config[name]
        require(len(types) == len(channels) > 0, f"{name} must name {len(channels)} >= 1 block types, got {types}")
        require({*types} <= {*known}, f"{name} must be chosen from {known}, got {types}")
    fits = all(outs > 0 and outs % groups == 0 for outs in channels)
    require(fits, f"norm_num_groups {groups} must divide each of block_out_channels {channels}")
    fits = mid_groups is None or (mid_groups > 0 and channels[-1] % mid_groups == 0)
    require(fits, f"attn_norm_num_groups {mid_groups} must divide the last of block_out_channels {channels}")
    require(config.freq_shift < channels[0] // 2, f"freq_shift must be < {channels[0]} // 2, got {config.freq_shift}")
    scale = config.mid_block_scale_factor
    require(scale > 0, f"mid_block_scale_factor must be above 0, got {scale}")
    padding, time_scale_shift = config.downsample_padding, config.resnet_time_scale_shift
    require(padding in (0, 1), f"downsample_padding must be 0 or 1, got {padding}")
    known = ("default", "scale_shift")
    require(time_scale_shift in known, f"resnet_time_scale_shift must be one of {known}, got {time_scale_shift!r}")


def _resnet(config: Any, ins: int, outs: int) -> ResidualBlock:
    scale_shift = config.resnet_time_scale_shift == "scale_shift"
    embedding_dim = 4 * config.block_out_channels[0]
    return ResidualBlock(ins, outs, embedding_dim, config.norm_num_groups, config.norm_eps, config.dropout, scale_shift)


def _attentions(config: Any, number: int, channels: int, groups: int | None) -> list[SelfAttention]:
    return [SelfAttention(channels, config.attention_head_dim, groups, config.norm_eps) for _ in range(number)]


def _build_down_blocks(config: Any) -> tuple[nn.ModuleList, list[int]]:
    """The encoder, and the channels of its skip connections in order."""
    blocks, layers_per_block = nn.ModuleList(), config.layers_per_block
    channels = config.block_out_channels[0]
    skip_channels = [channels]
    for block_type, outs in zip(config.down_block_types, config.block_out_channels, strict=True):
        resnets = [_resnet(config, channels if i == 0 else outs, outs) for i in range(layers_per_block)]
        attended = layers_per_block if block_type.startswith("Attn") else 0
        attentions = _attentions(config, attended, outs, config.norm_num_groups)
        is_last = len(blocks) == len(config.block_out_channels) - 1
        downsamplers = [] if is_last else [Downsample(outs, config.downsample_padding)]
        blocks.append(DownBlock(resnets, attentions, downsamplers))
        skip_channels += [outs] * (layers_per_block + len(downsamplers))
        channels = outs
    return blocks, skip_channels


def _build_mid_block(config: Any) -> MidBlock:
    channels, groups = config.block_out_channels[-1], config.attn_norm_num_groups
    if groups is None and config.resnet_time_scale_shift == "default":
        groups = config.norm_num_groups
    resnets = [_resnet(config, channels, channels), _resnet(config, channels, channels)]
    attentions = _attentions(config, 1 if config.add_attention else 0, channels, groups)
    return MidBlock(resnets, attentions, config.mid_block_scale_factor)


def _build_up_blocks(config: Any, skip_channels: list[int]) -> nn.ModuleList:
    """The decoder, for skip connections with these channels; the last one is used first."""
    blocks = nn.ModuleList()
    channels, skips = config.block_out_channels[-1], iter(reversed(skip_channels))
    for block_type, outs in zip(config.up_block_types, reversed(config.block_out_channels), strict=True):
        resnets = []
        for _ in range(config.layers_per_block + 1):
            resnets.append(_resnet(config, channels + next(skips), outs))
            channels = outs
        attended = len(resnets) if block_type.startswith("Attn") else 0
        attentions = _attentions(config, attended, outs, config.norm_num_groups)
        is_last = len(blocks) == len(config.block_out_channels) - 1
        blocks.append(UpBlock(resnets, attentions, [] if is_last else [Upsample(outs)]))
    return blocks


def _stock_only_settings() -> dict[str, Any]:
    """Arguments of `UNet2DModel` that `CustomUNet2DModel` does not have, with the one value that is accepted."""
    stock, ours = (inspect.signature(cls.__init__).parameters for cls in (UNet2DModel, CustomUNet2DModel))
    return {name: argument.default for name, argument in stock.items() if name not in ours}


def _refuse_other_settings(settings: Mapping[str, Any]) -> None:
    """Raise ValueError if there are settings of `UNet2DModel` that `CustomUNet2DModel` does not support."""
    accepted = _stock_only_settings()
    refused = [
        f"{name}={value!r}"
        for name, value in settings.items()
        # num_train_timesteps only sets the size of a learned time embedding, which is refused by its own name.
        if (name in accepted and name != "num_train_timesteps" and value != accepted[name])
        or (name in BLOCK_TYPES and not {*value} <= {*BLOCK_TYPES[name]})
    ]
    if refused:
        raise ValueError(f"CustomUNet2DModel cannot express these settings of UNet2DModel: {', '.join(refused)}")


def _convert(cls: Any, model: Any) -> Any:
    """A model of class `cls` with the configuration, the tensors (copied) and the mode of `model`."""
    with torch.device("meta"):  # the initial weights are replaced: do not allocate or draw them
        converted = cls.from_config({name: value for name, value in model.config.items() if not name.startswith("_")})
    converted.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    return converted.train(model.training)


class CustomUNet2DModel(ModelMixin, ConfigMixin):
    """U-Net for ε_θ(x_t, t): takes noisy images and timesteps, returns a prediction of the same height and width.

    The arguments have the meaning and, except for the layout, the defaults of diffusers' `UNet2DModel`. The default
    layout is the paper's for CIFAR-10: four levels with two residual blocks each, attention at 16x16.

    Args:
        sample_size: height and width at which pipelines sample; the network accepts any size.
        in_channels: channels of the image, >= 1.
        out_channels: channels of the prediction; 2 * in_channels for a learned variance.
        freq_shift, flip_sin_to_cos: see `timestep_embedding` (the paper's code: 1, False).
        down_block_types: one per level, highest resolution first: "DownBlock2D", or "AttnDownBlock2D" with attention.
        up_block_types: one per level, lowest resolution first: "UpBlock2D", or "AttnUpBlock2D" with attention.
        block_out_channels: channels per level, highest resolution first. Each level but the last halves the resolution.
        layers_per_block: residual blocks per level of the encoder; the decoder has one more.
        mid_block_scale_factor: divisor of the output of every layer in the middle block.
        downsample_padding: 1, or 0 for one row and column of zeros on the right and bottom (the paper's code).
        dropout: probability, in every residual block (the paper: 0.1 for CIFAR-10).
        attention_head_dim: channels per head; None for one head of all channels (as in the paper).
        norm_num_groups: groups of every group norm; must divide each of `block_out_channels`.
        attn_norm_num_groups: groups of the norm of the middle attention. None: `norm_num_groups`, or no norm if
            `resnet_time_scale_shift` is "scale_shift".
        norm_eps: added to the variance in every group norm (the paper's code: 1e-6).
        resnet_time_scale_shift: "default" or "scale_shift", see `ResidualBlock`.
        add_attention: whether the middle block has self-attention.
        num_class_embeds: number of class embeddings for class-conditional prediction; None for an unconditional model.
        patch_size: side of the square patches of pixels that become the channels of one position (space-to-depth)
            before the first convolution, and pixels again after the last: the levels then work at 1/patch_size of the
            resolution. `UNet2DModel` does not have it: with more than 1 the model cannot be converted.
        **kwargs: the other arguments of `UNet2DModel`, such as `act_fn`, at their defaults only.

    Raises:
        TypeError: an argument that `UNet2DModel` does not have either.
        ValueError: an argument is out of range, arguments do not match each other, or one of `UNet2DModel` has another
            value than its default.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm"]
    _no_split_modules = ["DownBlock", "MidBlock", "UpBlock"]  # the units of FSDP and `device_map`
    ignore_for_config = ["kwargs"]
    config: Any

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types: tuple[str, ...] = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (128, 256, 256, 256),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        dropout: float = 0.0,
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        num_class_embeds: int | None = None,
        patch_size: int = 1,
        **kwargs: Any,
    ):
        super().__init__()
        for name in kwargs.keys() - _stock_only_settings():
            raise TypeError(f"CustomUNet2DModel.__init__() got an unexpected keyword argument {name!r}")
        _refuse_other_settings(kwargs)
        _check_arguments(self.config)
        self.patch_size = patch_size
        if patch_size == 1:  # `UNet2DModel`, which does not know the name, reads the configuration too
            self._internal_dict = FrozenDict({k: v for k, v in self.config.items() if k != "patch_size"})
        channels, embedding_dim = block_out_channels[0], 4 * block_out_channels[0]
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, channels, 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels, embedding_dim)
        self.class_embedding = nn.Embedding(num_class_embeds, embedding_dim) if num_class_embeds is not None else None
        self.down_blocks, skip_channels = _build_down_blocks(self.config)
        self.mid_block = _build_mid_block(self.config)
        self.up_blocks = _build_up_blocks(self.config, skip_channels)
        self.conv_norm_out = GroupNormSiLU(norm_num_groups, channels, norm_eps)
        self.conv_out = nn.Conv2d(channels, out_channels * patch_size**2, 3, padding=1)
        self._init_weights()

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | str | os.PathLike | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Build a model from a configuration of this class or of `UNet2DModel`; arguments as in diffusers.

        Args:
            config: the configuration, or the folder or Hub repository that holds it as config.json.
            return_unused_kwargs: whether to return (model, entries that are no arguments of the model).
            **kwargs: replace entries; for a folder or repository also `subfolder`, `revision`, `token`, ...

        Raises:
            ValueError: settings of `UNet2DModel` that this class does not support; the message lists all of them.
        """
        config = kwargs.pop("pretrained_model_name_or_path", config)
        if isinstance(config, str | os.PathLike):
            config, kwargs = cls.load_config(config, return_unused_kwargs=True, **kwargs)
        if config is None:
            raise ValueError("from_config needs a configuration as its first argument")
        _refuse_other_settings({**config, **kwargs})
        # With _use_default_values, values left at UNet2DModel's defaults would be replaced by this class's defaults.
        # auto_map names the file that holds this class in a saved model; it is written again when the model is saved.
        left_out = {*_stock_only_settings(), "_use_default_values", "auto_map"}
        config = {name: value for name, value in config.items() if name not in left_out}
        kwargs = {name: value for name, value in kwargs.items() if name not in left_out}
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def from_diffusers(cls, model: UNet2DModel) -> "CustomUNet2DModel":
        """Convert from diffusers' class: same configuration, copied tensors, same device, dtypes and mode.

        Raises:
            TypeError: `model` is not a `UNet2DModel`.
            ValueError: `model` has settings that this class does not support.
        """
        if not isinstance(model, UNet2DModel):
            raise TypeError(f"from_diffusers takes a UNet2DModel, got {type(model).__name__}")
        return _convert(cls, model)

    def to_diffusers(self) -> UNet2DModel:
        """Convert to diffusers' class: same configuration, copied tensors, same device, dtypes and mode.

        `UNet2DModel` does not pad: it accepts only heights and widths that are multiples of 2^(levels − 1).

        Raises:
            ValueError: `patch_size` is more than 1, which `UNet2DModel` does not have.
        """
        if self.patch_size > 1:
            raise ValueError(f"UNet2DModel has no patch_size; this model's is {self.patch_size}")
        return _convert(UNet2DModel, self)

    def _init_weights(self) -> None:
        """Initialise as the paper's code does: Glorot uniform weights and zero biases.

        The last layer of every residual branch and of the network is zero, so that every block is initially a shortcut
        and the initial prediction is 0, the mean of ε.
        """
        last_layers: list[Any] = [self.conv_out]
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif isinstance(module, ResidualBlock):
                last_layers.append(module.conv2)
            elif isinstance(module, SelfAttention):
                last_layers.append(module.to_out[0])
        for layer in last_layers:
            nn.init.zeros_(layer.weight)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predict the noise (or x_0, or v) of a batch of noisy images.

        Args:
            sample: x_t, (B, in_channels, H, W), any H and W >= 1, in the model's dtype (or any under autocast).
            timestep: t in [0, T): one for all images (a number or a 0-d tensor) or one per image, (B,).
            class_labels: int64 (B,) in [0, num_class_embeds); required if and only if the model has classes.
            return_dict: whether to return a `UNet2DOutput` rather than a tuple of one tensor.

        Returns:
            `UNet2DOutput` whose `.sample` is (B, out_channels, H, W).

        Raises:
            ValueError: a shape does not match; class labels are missing, or given to an unconditional model.
        """
        timestep = self._check_inputs(sample, timestep, class_labels)
        emb = self._embed(sample, timestep, class_labels)
        height, width = sample.shape[2:]
        sample, top, left = self._pad(sample)

        patch_size = self.patch_size
        sample = self.conv_in(F.pixel_unshuffle(sample, patch_size) if patch_size > 1 else sample)
        skips = [sample]
        for block in self.down_blocks:
            skips += block(skips[-1], emb)
        sample = self.mid_block(skips[-1], emb)
        layers = self.config.layers_per_block + 1
        for block in self.up_blocks:
            sample, skips = block(sample, skips[-layers:], emb), skips[:-layers]
        sample = self.conv_out(self.conv_norm_out(sample))
        sample = F.pixel_shuffle(sample, patch_size) if patch_size > 1 else sample

        if sample.shape[2:] != (height, width):
            sample = sample[:, :, top : top + height, left : left + width]
        return UNet2DOutput(sample=sample) if return_dict else (sample,)

    def _check_inputs(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, class_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Raise ValueError for inputs that do not match; returns the timestep as a tensor."""
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels:
            raise ValueError(f"sample must be (B, {self.config.in_channels}, H, W), got {tuple(sample.shape)}")
        batch_size = len(sample)
        if not isinstance(timestep, torch.Tensor):
            timestep = torch.full((batch_size,), timestep, dtype=torch.float32, device=sample.device)
        if timestep.shape not in ((), (1,), (batch_size,)):
            raise ValueError(f"timestep must be one number or ({batch_size},), got {tuple(timestep.shape)}")
        if class_labels is None and self.class_embedding is not None:
            raise ValueError(f"class_labels must be given: the model has {self.class_embedding.num_embeddings} classes")
        if class_labels is not None and self.class_embedding is None:
            raise ValueError("class_labels must be None: the model has no classes (num_class_embeds is None)")
        if class_labels is not None and class_labels.shape != (batch_size,):
            raise ValueError(f"class_labels must be ({batch_size},), got {tuple(class_labels.shape)}")
        return timestep

    def _embed(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        """Embedding of timestep and class after its SiLU, (B, embedding_dim)."""
        # A blocking copy of a timestep from the CPU would synchronise with the GPU at every step.
        timestep = timestep.to(sample.device, non_blocking=sample.device.type != "cpu").expand(len(sample))
        config = self.config
        waves = timestep_embedding(timestep, self.conv_in.out_channels, config.flip_sin_to_cos, config.freq_shift)
        emb = self.time_embedding(waves.to(sample.dtype))
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(class_labels)
        return F.silu(emb)

    def _pad(self, sample: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        """Pad height and width to multiples of patch_size · 2^(levels − 1); returns the sample, top and left padding.

        The border is replicated, since this keeps the brightness and the noise level in the statistics of the group
        norms (zeros would reduce both) and works for any size (reflection needs less padding than image).
        """
        stride = self.patch_size * 2 ** (len(self.down_blocks) - 1)
        extra_height, extra_width = ((side + stride - 1) // stride * stride - side for side in sample.shape[2:])
        top, left = extra_height // 2, extra_width // 2
        if extra_height or extra_width:
            sample = F.pad(sample, (left, extra_width - left, top, extra_height - top), mode="replicate")
        return sample, top, left
