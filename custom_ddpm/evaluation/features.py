"""Feature extractors: functions of pictures in whose output space sets of pictures are compared.

Every number of an evaluation depends on the features, so each extractor has a name that is printed with the number, and
an identity (a hash of its weights) under which statistics are cached.

`load_features` knows: a folder written by `custom-ddpm features train`, "random", "inception", "dinov2", and any Python
object "module:name".
"""

import hashlib
import importlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F

from ..messages import one_line

CONFIG_FILE, WEIGHTS_FILE = "features.json", "features.safetensors"
DINOV2 = "facebook/dinov2-large"  # ViT-L/14, which FD-DINOv2 is reported with
CLIP = "openai/clip-vit-large-patch14-336"  # ViT-L/14@336, which CMMD is reported with
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Features(Protocol):
    """A feature extractor: called with uint8 pictures (B, C, H, W), it returns float32 (B, D)."""

    @property
    def name(self) -> str:
        """Printed with every number, such as "digits classifier"."""

    @property
    def identity(self) -> str | None:
        """Equal for equal features of equal pictures; None if that is not known, and nothing is cached."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features of pictures: uint8 (B, C, H, W) on any device -> float32 (B, D) on the extractor's device."""


def to_rgb(images: torch.Tensor) -> torch.Tensor:
    """Pictures with three channels: gray ones are repeated.

    Raises:
        ValueError: the pictures have neither one nor three channels.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(f"the pictures have {images.shape[1]} channels; these features need gray or RGB pictures")
    return images.expand(-1, 3, -1, -1)


# ---- a small classifier ----


class Classifier(torch.nn.Module):
    """A small convolutional classifier; its penultimate layer, before the ReLU, gives 64 features.

    Args:
        channels, height, width: shape of the pictures.
        num_classes: number of classes.
    """

    def __init__(self, channels: int, height: int, width: int, num_classes: int):
        super().__init__()
        levels = max(1, math.ceil(math.log2(min(height, width) / 7)))
        strides = [1, 2] if levels == 1 else [2] * levels
        widths = [channels, *(min(128, 32 * 2**level) for level in range(len(strides)))]
        layers: list[torch.nn.Module] = [
            self._block(*each) for each in zip(widths[:-1], widths[1:], strides, strict=True)
        ]
        layers += [torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten()]
        # Features of unit variance on the training pictures: distances do not depend on how far the training went.
        unit = torch.nn.BatchNorm1d(64, affine=False)
        self.body = torch.nn.Sequential(*layers, torch.nn.Linear(16 * widths[-1], 64), unit)
        self.head = torch.nn.Linear(64, num_classes)

    @staticmethod
    def _block(channels: int, out_channels: int, stride: int) -> torch.nn.Sequential:
        convolution = torch.nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        return torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(out_channels), torch.nn.ReLU())

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, 64) of uint8 pictures."""
        return self.body(images.float() / 127.5 - 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes) of uint8 pictures."""
        return self.head(self.features(images).relu())


class ClassifierFeatures:
    """Features of a classifier that `custom-ddpm features train` has saved.

    Args:
        folder: its folder.
        device: device to compute on.

    Raises:
        ValueError: the folder does not hold a classifier.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu"):
        try:
            config = json.loads(Path(folder, CONFIG_FILE).read_text(encoding="utf-8"))
            self._shape = (config["channels"], config["height"], config["width"])
            self._model = Classifier(*self._shape, len(config["classes"]))
            weights = Path(folder, WEIGHTS_FILE).read_bytes()
            self._model.load_state_dict(safetensors.torch.load(weights))
            self.name = str(config["name"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
            raise ValueError(
                f"{folder} holds no features of `custom-ddpm features train`: {one_line(error)}"
            ) from error
        self.identity = f"classifier-{hashlib.sha256(weights).hexdigest()[:16]}"
        self._model.eval().requires_grad_(False).to(device)
        self._device = device

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features, see `Features`; ValueError if the pictures are not of the classifier's size."""
        channels, height, width = self._shape
        if images.shape[1] == 1 and channels == 3:
            images = to_rgb(images)
        if tuple(images.shape[1:]) != self._shape:
            found = "x".join(map(str, images.shape[1:]))
            raise ValueError(
                f"the pictures are {found} (channels x height x width), the {self.name} was trained on "
                f"{channels}x{height}x{width}; train one on such pictures, or give their --resolution"
            )
        return self._model.features(images.to(self._device))


# ---- random convolutions ----


class RandomConvolutionFeatures:
    """128 features of a convolutional network with random weights, for pictures without labels.

    3x3 convolutions, ReLU and 2x2 mean pooling down to about 4x4 pixels, then means over the four quarters. The weights
    depend on the seed only.

    Args:
        seed: seed of the weights.
        device: device to compute on.
    """

    def __init__(self, seed: int = 0, device: torch.device | str = "cpu"):
        self.name, self.identity = "random convolutions", f"random-convolutions-1-seed-{seed}"
        self._seed, self._device = seed, device
        self._layers: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def _weights(self, levels: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        generator, layers, width = torch.Generator().manual_seed(self._seed), [], 3
        for level in range(levels):
            out = 32 if level == levels - 1 else 64
            weight = torch.randn(out, width, 3, 3, generator=generator) * math.sqrt(2 / (9 * width))
            bias = torch.randn(out, generator=generator) * 0.2
            layers.append((weight.to(self._device), bias.to(self._device)))
            width = out
        return layers

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features, see `Features`."""
        levels = max(2, round(math.log2(max(2, min(images.shape[2:])) / 4)) + 1)
        if levels not in self._layers:
            self._layers[levels] = self._weights(levels)
        values = to_rgb(images).to(self._device).float() / 127.5 - 1
        for level, (weight, bias) in enumerate(self._layers[levels]):
            values = F.relu(F.conv2d(F.pad(values, (1, 1, 1, 1), mode="replicate"), weight, bias))
            if level < levels - 1:
                values = F.avg_pool2d(values, 2, ceil_mode=True)
        return F.adaptive_avg_pool2d(values, 2).flatten(1)


# ---- large networks of others ----


class InceptionFeatures:
    """The 2,048 features of FID: TensorFlow's Inception of 2015 as torch-fidelity has ported it.

    Args:
        weights: file with its weights; None: torch-fidelity downloads them.
        device: device to compute on.

    Raises:
        ValueError: torch-fidelity is not installed, or the weights cannot be loaded.
    """

    def __init__(self, weights: str | None = None, device: torch.device | str = "cpu"):
        try:
            module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision made for another torch
            raise ValueError(
                "the features 'inception' need torch-fidelity and torchvision: "
                f"pip install 'custom-ddpm[evaluation]' ({one_line(error)})"
            ) from error
        try:
            self._model = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=weights
            ).to(device)
        except Exception as error:  # of the network, of the file, or of the weights in it
            raise ValueError(
                f"the weights of the features 'inception' cannot be loaded from {weights or module.URL_INCEPTION_V3}: "
                f"{one_line(error)}; a downloaded file can be given as inception:FILE"
            ) from error
        self.name, self._device = "Inception", device
        self.identity = f"inception-{_hash_weights(self._model)}"

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features, see `Features`."""
        return self._model(to_rgb(images).to(self._device))[0].float()


def _pretrained(name: str, cls: str, weights: str, device: torch.device | str, **options: Any) -> Any:
    """A model of transformers for the features `name`; ValueError if its weights cannot be loaded."""
    transformers = importlib.import_module("transformers")
    try:
        model = getattr(transformers, cls).from_pretrained(weights, **options)
    except Exception as error:  # of the network, of the file, or of the weights in it
        raise ValueError(
            f"the weights of the features {name!r} cannot be loaded from {weights}: {one_line(error)}; "
            f"a downloaded copy can be given as {name}:FOLDER"
        ) from error
    return model.eval().requires_grad_(False).to(device)


def _resized(
    images: torch.Tensor, size: int, mean: Sequence[float], std: Sequence[float], device: torch.device
) -> torch.Tensor:
    """RGB pictures of one size, bicubic with antialiasing, normalised; float32 (B, 3, size, size)."""
    values = to_rgb(images).to(device).float()
    values = F.interpolate(values, size=(size, size), mode="bicubic", antialias=True).clamp(0, 255) / 255
    centre, spread = (torch.tensor(numbers, device=device).view(3, 1, 1) for numbers in (mean, std))
    return (values - centre) / spread


class DINOv2Features:
    """The class token of DINOv2 (Oquab et al. 2023, arXiv:2304.07193), for FD-DINOv2 (Stein et al. 2023).

    Pictures are resized to 224x224, bicubic with antialiasing, and normalised as ImageNet's.

    Args:
        weights: folder or Hub repository of a `Dinov2Model` of transformers.
        device: device to compute on.

    Raises:
        ValueError: the weights cannot be loaded.
    """

    def __init__(self, weights: str = DINOV2, device: torch.device | str = "cpu"):
        self._model = _pretrained("dinov2", "Dinov2Model", weights, device, use_safetensors=True)
        self.name = "DINOv2" if weights == DINOV2 else f"DINOv2 {Path(weights).name}"
        self.identity = f"dinov2-{_hash_weights(self._model)}"

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features, see `Features`."""
        values = _resized(images, 224, IMAGENET_MEAN, IMAGENET_STD, self._model.device)
        return self._model(values).last_hidden_state[:, 0].float()


class CLIPFeatures:
    """Embeddings of CLIP (Radford et al. 2021, arXiv:2103.00020) of length 1, for CMMD.

    Pictures are resized to the network's size, bicubic with antialiasing, and normalised as CLIP's.

    Args:
        weights: folder or Hub repository of a `CLIPVisionModelWithProjection` of transformers.
        device: device to compute on.

    Raises:
        ValueError: the weights cannot be loaded.
    """

    def __init__(self, weights: str = CLIP, device: torch.device | str = "cpu"):
        # The published weights are a pickle, which transformers loads as tensors only.
        self._model = _pretrained("clip", "CLIPVisionModelWithProjection", weights, device)
        self.name = "CLIP" if weights == CLIP else f"CLIP {Path(weights).name}"
        self.identity = f"clip-{_hash_weights(self._model)}"

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features, see `Features`."""
        values = _resized(images, self._model.config.image_size, CLIP_MEAN, CLIP_STD, self._model.device)
        return F.normalize(self._model(values).image_embeds.float(), dim=1)


class NamedFeatures:
    """Features of a Python object that the user names: called with uint8 pictures, it returns (B, D).

    Args:
        spec: "module:name".
        device: device that the pictures are moved to.

    Raises:
        ValueError: there is no such object, or it cannot be called.
    """

    identity = None

    def __init__(self, spec: str, device: torch.device | str = "cpu"):
        module, _, name = spec.partition(":")
        try:
            self._function: Callable[[torch.Tensor], Any] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"the features {spec!r} cannot be imported: {one_line(error)}") from error
        if not callable(self._function):
            raise ValueError(f"the features {spec!r} are a {type(self._function).__name__}; they must be a function")
        self.name, self._device = spec, device

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features, see `Features`; ValueError if the object returned none of that shape."""
        values = self._function(images.to(self._device))
        if not isinstance(values, torch.Tensor) or values.ndim != 2 or len(values) != len(images):
            found = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
            raise ValueError(f"the features {self.name!r} returned {found}; they must return ({len(images)}, D)")
        return values.float()


def _hash_weights(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_features(spec: str, device: torch.device | str = "cpu") -> Features:
    """The feature extractor of a name.

    Args:
        spec: folder of `custom-ddpm features train`; "random" or "random:SEED"; "inception" or "inception:FILE";
            "dinov2" or "dinov2:FOLDER_OR_REPOSITORY"; "clip" or "clip:FOLDER_OR_REPOSITORY"; or
            "module:name" of a Python function.
        device: device to compute on.

    Raises:
        ValueError: there are no such features, or their package or weights are missing.
    """
    if Path(spec).is_dir():
        return ClassifierFeatures(spec, device)
    kind, _, argument = spec.partition(":")
    if kind == "random" and (not argument or argument.isdecimal()):
        return RandomConvolutionFeatures(int(argument or 0), device)
    if kind == "inception":
        return InceptionFeatures(argument or None, device)
    if kind == "dinov2":
        return DINOv2Features(argument or DINOV2, device)
    if kind == "clip":
        return CLIPFeatures(argument or CLIP, device)
    if argument:
        return NamedFeatures(spec, device)
    raise ValueError(
        f"there are no features {spec!r}; give random, inception, dinov2, clip, a folder of "
        "`custom-ddpm features train`, or module:name of a Python function"
    )
