"""Feature extractors: the small classifier, random convolutions, and the real loading code of large networks."""

import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from runs import DIGITS

from custom_ddpm.cli import main
from custom_ddpm.evaluation.classifier import train_classifier
from custom_ddpm.evaluation.features import Classifier, load_features
from custom_ddpm.evaluation.pictures import open_dataset
from custom_ddpm.sampling import process_state

pytestmark = pytest.mark.usefixtures("digits_cache")


def random_images(channels=1, size=8, count=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, digits_cache):
    process_state()
    folder = tmp_path_factory.mktemp("features")
    data = open_dataset(DIGITS, resolution=[8], class_conditional=True).data
    facts = train_classifier(data, "digits classifier", folder, steps=150)
    return folder, facts, data


def test_the_classifier_learns_the_digits_and_says_how_well(classifier):
    folder, facts, data = classifier
    assert facts == json.loads((folder / "features.json").read_text())
    assert facts["held_out_accuracy"] > 0.9 and facts["num_held_out_images"] == 179
    features = load_features(str(folder))
    images, labels = data.take(500)
    values = features(images)
    assert features.name == "digits classifier" and values.shape == (500, 64) and values.dtype == torch.float32
    # A linear head on the features alone tells the classes apart: they hold what the classifier knows.
    centres = torch.stack([values[labels == i].mean(0) for i in range(10)])
    assert (torch.cdist(values, centres).argmin(1) == labels).float().mean() > 0.9
    torch.testing.assert_close(features(images[:3]), values[:3])


def test_the_training_is_a_function_of_the_seed(classifier, tmp_path):
    _, _, data = classifier
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_classifier(data, "digits classifier", tmp_path / name, steps=3, seed=seed)
    a, b, c = (load_features(str(tmp_path / name)).identity for name in "abc")
    assert a == b != c


def test_pictures_of_another_size_are_refused(classifier):
    features = load_features(str(classifier[0]))
    with pytest.raises(ValueError, match=r"the pictures are 1x9x9 .* was trained on 1x8x8"):
        features(random_images(size=9))


def test_a_damaged_folder_is_refused(classifier, tmp_path):
    with pytest.raises(ValueError, match="holds no features"):
        load_features(str(tmp_path))
    (tmp_path / "features.json").write_text((classifier[0] / "features.json").read_text())
    (tmp_path / "features.safetensors").write_bytes((classifier[0] / "features.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="holds no features"):
        load_features(str(tmp_path))


def test_a_classifier_is_trained_at_the_size_that_a_run_would_have(tmp_path):
    main(["features", "train", DIGITS, "--steps", "2", "--output_dir", str(tmp_path / "features")])
    config = json.loads((tmp_path / "features" / "features.json").read_text())
    assert (config["height"], config["width"]) == (8, 8)  # the digits' own


def test_data_without_labels_is_refused(tmp_path):
    data = open_dataset(DIGITS, resolution=[8]).data
    with pytest.raises(ValueError, match="needs pictures with labels"):
        train_classifier(data, "x", tmp_path)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 28), (32, 64), (100, 100), (3, 5)])
def test_classifiers_of_all_sizes(height, width):
    model = Classifier(3, height, width, 5).eval()
    assert model(torch.zeros(2, 3, height, width, dtype=torch.uint8)).shape == (2, 5)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 28), (3, 64), (1, 5)])
def test_random_convolutions_depend_on_their_seed_alone(channels, size):
    images = random_images(channels, size)
    features = load_features("random")
    values = features(images)
    assert values.shape == (6, 128) and values.isfinite().all()
    assert torch.equal(load_features("random:0")(images), values)
    assert not torch.allclose(load_features("random:1")(images), values)
    torch.testing.assert_close(features(images[:1]), values[:1])
    if channels == 1:
        torch.testing.assert_close(features(images.expand(-1, 3, -1, -1)), values)


def test_channels_that_features_cannot_take():
    with pytest.raises(ValueError, match="have 4 channels"):
        load_features("random")(random_images(4))


def test_the_users_own_function(monkeypatch):
    module = types.ModuleType("my_features")
    module.mean_colour = lambda images: images.float().mean((2, 3))
    module.wrong = lambda images: images
    module.number = 3
    monkeypatch.setitem(sys.modules, "my_features", module)
    features = load_features("my_features:mean_colour")
    assert features.name == "my_features:mean_colour" and features.identity is None
    images = random_images(3)
    np.testing.assert_allclose(features(images), images.numpy().mean((2, 3)), rtol=1e-5)
    with pytest.raises(ValueError, match=r"returned \(6, 3, 8, 8\); they must return \(6, D\)"):
        load_features("my_features:wrong")(images)
    with pytest.raises(ValueError, match="are a int; they must be a function"):
        load_features("my_features:number")
    for spec in ("my_features:missing", "no_such_module:f"):
        with pytest.raises(ValueError, match="cannot be imported"):
            load_features(spec)
    with pytest.raises(ValueError, match="there are no features 'nonsense'"):
        load_features("nonsense")


# ---- DINOv2, as small as it can be, saved here ----


def test_dinov2_through_transformers(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "tiny")
    features = load_features(f"dinov2:{tmp_path / 'tiny'}")
    assert features.name == "DINOv2 tiny"
    images = random_images(1, 224, 2)  # no resizing, so that the expected values are easy
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        expected = model((images.expand(-1, 3, -1, -1) / 255 - mean) / std).pooler_output
    torch.testing.assert_close(features(images), expected, atol=1e-5, rtol=1e-4)
    assert features(random_images(3, 8)).shape == (6, 12)


def test_dinov2_without_its_weights_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"weights of the features 'dinov2' cannot be loaded .*dinov2:FOLDER") as error:
        load_features(f"dinov2:{tmp_path}")
    assert "\n" not in str(error.value)


# ---- Inception ----


def test_inception_without_its_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match=r"need torch-fidelity and torchvision: pip install") as error:
        load_features("inception")
    assert "\n" not in str(error.value)


def test_inception_without_its_weights_is_one_line(tmp_path):
    pytest.importorskip("torch_fidelity", exc_type=(ImportError, RuntimeError))
    (tmp_path / "weights.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot be loaded from .*weights\.pth") as error:
        load_features(f"inception:{tmp_path / 'weights.pth'}")
    assert "\n" not in str(error.value)


def test_inception_is_that_of_torch_fidelity(tmp_path):
    """Random weights in a file: the code from the file to the features is the one that the real weights take."""
    pytest.importorskip("torch_fidelity", exc_type=(ImportError, RuntimeError))
    from torch_fidelity import feature_extractor_inceptionv3 as library

    torch.manual_seed(0)
    saved = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *_, **__: saved[0])
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda self, _: None)
        saved.append({})
        model = library.FeatureExtractorInceptionV3("x", ["2048"])
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    features, images = load_features(f"inception:{tmp_path / 'weights.pth'}"), random_images(1, 16, 2)
    assert features.name == "Inception" and features(images).shape == (2, 2048)
    torch.testing.assert_close(features(images), model(images.expand(-1, 3, -1, -1))[0])


# ---- CLIP, as small as it can be, saved here ----


def test_clip_through_transformers_gives_cmmd(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from custom_ddpm.evaluation.collect import collect
    from custom_ddpm.evaluation.evaluate import compare
    from custom_ddpm.evaluation.pictures import ArrayPictures

    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 12, "projection_dim": 6, "num_hidden_layers": 1}
    config = CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=28, patch_size=14)
    model = CLIPVisionModelWithProjection(config).eval()
    model.save_pretrained(tmp_path / "tiny")
    features = load_features(f"clip:{tmp_path / 'tiny'}")
    images = random_images(1, 28, 50)  # no resizing, so that the expected values are easy
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        expected = model((images.expand(-1, 3, -1, -1) / 255 - mean) / std).image_embeds
    expected = (expected / expected.norm(dim=1, keepdim=True)).double()
    torch.testing.assert_close(features(images).double(), expected, atol=1e-5, rtol=1e-4)

    other = images // 2
    sets = [collect(ArrayPictures(each, ""), [features], 50)[0] for each in (images, other)]
    (cmmd,) = [metric for metric in compare(*sets, features) if metric.name == "CMMD tiny"]
    a, b = (features(each).double() for each in (images, other))
    pairs = {"aa": (a, a), "bb": (b, b), "ab": (a, b)}
    kernel = {
        name: [[math.exp(-float(((p - q) ** 2).sum()) / 200) for q in y] for p in x] for name, (x, y) in pairs.items()
    }
    within = [
        sum(kernel[name][i][j] for i in range(len(x)) for j in range(len(x)) if i != j) / (len(x) * (len(x) - 1))
        for name, x in (("aa", a), ("bb", b))
    ]
    between = sum(map(sum, kernel["ab"])) / (len(a) * len(b))
    assert cmmd.value == pytest.approx(1000 * (sum(within) - 2 * between), rel=1e-6, abs=1e-9)
    assert cmmd.value > 0


def test_clip_without_its_weights_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"weights of the features 'clip' cannot be loaded .*clip:FOLDER") as error:
        load_features(f"clip:{tmp_path}")
    assert "\n" not in str(error.value)
