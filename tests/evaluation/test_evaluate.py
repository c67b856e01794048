"""Sets of pictures against each other: the order of the distances, the cache, several processes, the commands."""

import json

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import make_pipeline
from runs import DIGITS, needs_forkserver, on_processes

from custom_ddpm.cli import main
from custom_ddpm.evaluation import collect as collecting
from custom_ddpm.evaluation.collect import cache_file, collect, collect_cached
from custom_ddpm.evaluation.evaluate import compare, evaluate, table
from custom_ddpm.evaluation.features import RandomConvolutionFeatures
from custom_ddpm.evaluation.pictures import ArrayPictures, ModelPictures, open_dataset
from custom_ddpm.sampling import process_state, sample_images

pytestmark = pytest.mark.usefixtures("digits_cache")


@pytest.fixture(scope="module", autouse=True)
def one_process(digits_cache):
    process_state()


def digits():
    return open_dataset(DIGITS, resolution=[8])


def all_digits():
    return digits().data.take(1797)[0]


def values(pictures, reference):
    result = evaluate(pictures, reference, [RandomConvolutionFeatures()])
    return {metric["name"].split(" (")[0]: metric for metric in result["metrics"] if "∞" not in metric["name"]}


# ---- what the numbers say ----


def test_the_distances_order_as_they_must():
    images = all_digits()
    generator = torch.Generator().manual_seed(0)

    def noisy(std):
        noise = torch.randn(images.shape, generator=generator) * std
        return (images + noise).round().clamp(0, 255).to(torch.uint8)

    blurred = torch.nn.functional.avg_pool2d(images.float(), 3, 1, 1).to(torch.uint8)
    noise = torch.randint(0, 256, images.shape, generator=generator, dtype=torch.uint8)
    sets = {"itself": images, "little noise": noisy(10), "noise": noisy(60), "blurred": blurred, "random": noise}
    found = {name: values(ArrayPictures(each, name), digits()) for name, each in sets.items()}
    distance = {name: each["FD"]["value"] for name, each in found.items()}
    assert abs(distance["itself"]) < 1e-6
    assert distance["itself"] < distance["little noise"] < distance["noise"] < distance["random"]
    assert distance["little noise"] < distance["blurred"] < distance["random"]
    kid = {name: each["KID"] for name, each in found.items()}
    assert kid["itself"]["value"] < kid["noise"]["value"] - 4 * kid["noise"]["standard_error"]
    assert kid["noise"]["value"] < kid["random"]["value"]
    assert found["itself"]["precision"]["value"] == found["itself"]["recall"]["value"] == 1
    assert found["random"]["precision"]["value"] < 0.1 and found["random"]["coverage"]["value"] < 0.1


def test_halves_of_a_shuffled_set_have_kid_zero_within_its_interval():
    images = all_digits()[torch.randperm(1797, generator=torch.Generator().manual_seed(0))]
    kid = values(ArrayPictures(images[:898], "one"), ArrayPictures(images[898:], "other"))["KID"]
    assert kid["interval"][0] < 0 < kid["interval"][1]


def test_a_lost_class_lowers_recall_and_coverage():
    data = open_dataset(DIGITS, resolution=[8], class_conditional=True).data
    images, labels = data.take(1797)
    part = values(ArrayPictures(images[labels < 5], "half"), digits())
    assert part["precision"]["value"] == 1 and part["recall"]["value"] < 0.85 and part["coverage"]["value"] < 0.85


def test_too_few_pictures_are_refused_or_extrapolated():
    few, reference = ArrayPictures(all_digits()[:100], "few"), digits()
    result = evaluate(few, reference, [RandomConvolutionFeatures()])
    plain, endless, *_ = result["metrics"]
    assert plain["value"] is None and "refused: the set has 100 pictures; the covariance of 128" in plain["note"]
    assert endless["value"] > 0 and "roughly: from N = 100 <= D = 128" in endless["note"]
    assert "refused" in table(result) and "random convolutions" in table(result)
    only = evaluate(reference, few, [RandomConvolutionFeatures()])["metrics"][0]
    assert only["value"] is None and "the reference has 100 pictures" in only["note"]
    tiny = evaluate(ArrayPictures(all_digits()[:4], "tiny"), reference, [RandomConvolutionFeatures()])
    assert all(metric["value"] is None and "refused" in metric["note"] for metric in tiny["metrics"])


def test_sets_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"are 1x4x4 .* are 1x8x8; they must be equal"):
        evaluate(ArrayPictures(all_digits()[:50, :, :4, :4], "small"), digits(), [RandomConvolutionFeatures()])


# ---- reading in parts, from the cache, on several processes ----


def test_the_batch_size_does_not_change_the_statistics(monkeypatch):
    whole = collect(digits(), [RandomConvolutionFeatures()], 1797)[0]
    parts = collect(digits(), [RandomConvolutionFeatures()], 100, kept=50)[0]
    assert parts.moments.count == 1797 and len(parts.kept) == 50
    torch.testing.assert_close(parts.moments.mean, whole.moments.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(parts.moments.covariance, whole.moments.covariance, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts.kept, whole.kept[:50])


class Exact:
    """Features that are exact in float32, so that only the merging of the statistics rounds."""

    name, identity = "exact", "exact"

    def __call__(self, images):
        return images.flatten(1).float()


def collect_on_each(cache, folder):
    datasets.config.HF_DATASETS_CACHE = cache
    state = process_state()
    found = collect(digits(), [Exact()], 64, kept=200)[0]
    moments = found.moments
    drawn = collect(ModelPictures(make_pipeline(classes=3), "model", 13), [Exact()], 3)[0]
    parts = [moments.count, moments.mean, moments.covariance, found.kept, drawn.moments.mean, drawn.kept]
    torch.save(parts, folder / f"{state.process_index}.pt")


@needs_forkserver
def test_statistics_of_two_processes_equal_those_of_one(tmp_path):
    on_processes(2, collect_on_each, datasets.config.HF_DATASETS_CACHE, tmp_path)
    images = all_digits().flatten(1).double().numpy()
    one = collect(digits(), [Exact()], 1797, kept=200)[0]
    drawn = sample_images(make_pipeline(classes=3), range(13), [i % 3 for i in range(13)]).flatten(1).float()
    for rank in range(2):
        count, mean, covariance, kept, drawn_mean, drawn_kept = torch.load(tmp_path / f"{rank}.pt")
        assert count == 1797 and torch.equal(kept, one.kept)
        np.testing.assert_allclose(mean, images.mean(0), rtol=1e-10)
        np.testing.assert_allclose(covariance, np.cov(images.T), rtol=1e-10, atol=1e-10)
        assert torch.equal(drawn_kept, drawn)
        np.testing.assert_allclose(drawn_mean, drawn.double().mean(0), rtol=1e-10)


def test_the_reference_is_computed_once_and_again_where_something_changes(tmp_path, monkeypatch):
    calls = []

    def counted(pictures, *arguments):
        calls.append(pictures.description)
        return collect(pictures, *arguments)

    monkeypatch.setattr(collecting, "collect", counted)
    random = RandomConvolutionFeatures()
    first = collect_cached(digits(), random, 500, cache_dir=str(tmp_path))
    again = collect_cached(digits(), random, 500, cache_dir=str(tmp_path))
    assert len(calls) == 1 and torch.equal(first.kept, again.kept)
    assert torch.equal(first.moments.scatter, again.moments.scatter) and again.moments.count == 1797
    others = [open_dataset(DIGITS, resolution=[9]), open_dataset(DIGITS, resolution=[8], num_images=1796)]
    for other in others:
        collect_cached(other, random, 500, cache_dir=str(tmp_path))
    collect_cached(digits(), RandomConvolutionFeatures(1), 500, cache_dir=str(tmp_path))
    assert len(calls) == 4
    file = cache_file(digits(), random, cache_dir=str(tmp_path))
    file.write_bytes(file.read_bytes()[:1000])
    repaired = collect_cached(digits(), random, 500, cache_dir=str(tmp_path))
    assert len(calls) == 5 and torch.equal(repaired.kept, first.kept)


def test_features_that_are_not_finite_are_refused():
    class Broken(Exact):
        def __call__(self, images):
            return images.flatten(1).float() / 0

    with pytest.raises(ValueError, match="features of few by exact are not finite"):
        collect(ArrayPictures(all_digits()[:10], "few"), [Broken()], 5)


# ---- the commands ----


def refused(*words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert "\n" not in str(stop.value)
    return str(stop.value)


def test_a_folder_of_samples_is_the_model_that_drew_them(tmp_path, capsys):
    make_pipeline().save_pretrained(tmp_path / "model")
    main(["sample", str(tmp_path / "model"), "--output_dir", str(tmp_path / "pictures"), "--num_images", "60"])
    images = np.stack([np.asarray(PIL.Image.open(tmp_path / "pictures" / f"seed-{i}.png")) for i in range(60)])
    np.savez(tmp_path / "pictures.npz", images)
    results = []
    for source in ("model", "pictures", "pictures.npz"):
        file = tmp_path / f"{source}.json"
        words = ["evaluate", tmp_path / source, "--against", DIGITS, "--num_images", "60", "--output", file]
        main([str(word) for word in words])
        results.append({each["name"]: each for each in json.loads(file.read_text())["metrics"]})
    assert "against:" in capsys.readouterr().out
    name = "coverage (random convolutions)"
    assert results[0][name]["value"] == results[1][name]["value"] == results[2][name]["value"]
    assert "60 against 1,797 pictures" in results[1][name]["note"]  # not the grid


def test_bits_per_dim_of_a_class_conditional_model(tmp_path, capsys):
    make_pipeline(classes=10).save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    index["id2label"] = {str(i): str(i) for i in range(10)}
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    file = tmp_path / "bits.json"
    words = ["bits-per-dim", tmp_path / "model", "--against", DIGITS, "--split", "train[:40]", "--output", file]
    main([str(word) for word in words])
    result = json.loads(file.read_text())["variances"]
    assert list(result) == ["fixed_small", "fixed_large"] and result["fixed_small"]["num_images"] == 40
    parts = result["fixed_small"]["parts"]
    assert parts["total"]["value"] == pytest.approx(sum(parts[name]["value"] for name in ("L_T", "L_t-1", "L_0")))
    assert len(result["fixed_small"]["timesteps"]) == 20 and "custom-ddpm analytic-variance" in capsys.readouterr().out


def test_errors_of_the_commands_are_one_line(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "model")
    model = tmp_path / "model"
    assert "give it with --resolution" in refused("evaluate", DIGITS, "--against", DIGITS)
    assert "leave it out" in refused("evaluate", model, "--against", DIGITS, "--resolution", 8)
    assert "there are no features 'nothing'" in refused("evaluate", model, "--against", DIGITS, "--features", "nothing")
    assert "is no model" in refused("evaluate", DIGITS, "--against", DIGITS, "--resolution", 8, "--eta", 0)
    np.savez(tmp_path / "wrong.npz", np.zeros((3, 8, 8)))
    assert "pictures are uint8" in refused("evaluate", tmp_path / "wrong.npz", "--against", DIGITS)
    (tmp_path / "torn.npz").write_bytes(b"PK")
    assert "is no NPZ file" in refused("evaluate", tmp_path / "torn.npz", "--against", DIGITS)


def test_metrics_are_named_as_papers_name_them():
    found = collect(ArrayPictures(all_digits()[:300], "some"), [Exact()], 100)[0]
    for name, expected in (("Inception", "FID"), ("DINOv2", "FD-DINOv2"), ("exact", "FD (exact)")):
        features = type("Named", (Exact,), {"name": name})()
        assert compare(found, found, features)[0].name == expected
        assert compare(found, found, features)[2].name == f"KID ({name})"
