import json

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import make_pipeline

from custom_ddpm import CustomDDPMPipeline
from custom_ddpm.cli import main
from custom_ddpm.config import TrainingConfig
from custom_ddpm.sample_command import spread


@pytest.fixture
def model(tmp_path):
    make_pipeline(classes=3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(*words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code not in (0, None)
    return str(stop.value)


def test_sample_draws_a_picture_for_each_seed(model, tmp_path, capsys):
    folder = tmp_path / "pictures"
    words = ["sample", model, "--output_dir", folder, "--num_images", 3, "--seed", 5, "--class_labels", "class 2", 0]
    main([str(word) for word in [*words, "--guidance_scale", 2, "--num_inference_steps", 10, "--eta", 0.5]])
    names = [f"seed-{seed}.png" for seed in (5, 6, 7)]
    assert sorted(file.name for file in folder.iterdir()) == ["grid.png", "samples.json", *names]
    expected = CustomDDPMPipeline.from_pretrained(model)(
        class_labels=[2, 0, 2],
        guidance_scale=2.0,
        num_inference_steps=10,
        eta=0.5,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6, 7)],
    ).images
    for seed, picture in zip((5, 6, 7), expected, strict=True):
        assert np.array_equal(np.asarray(PIL.Image.open(folder / f"seed-{seed}.png")), np.asarray(picture))
    assert f"3 pictures and grid.png in {folder}" in capsys.readouterr().out
    width, height = PIL.Image.open(folder / "grid.png").size
    words += ["--guidance_scale", 2, "--num_inference_steps", 10, "--eta", 0.5, "--class_rows"]  # no other pictures
    main([str(word) for word in words])
    with PIL.Image.open(folder / "grid.png") as by_row:
        assert by_row.width > width and by_row.height < height
    assert "holds pictures that were drawn with" in refused("sample", model, "--output_dir", folder)


def test_rows_of_classes_need_classes(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "plain")
    words = ("sample", tmp_path / "plain", "--class_rows", "--output_dir", tmp_path / "drawn")
    assert "--class_rows is for models with classes" in refused(*words)
    assert not (tmp_path / "drawn").exists()


@pytest.mark.parametrize("flag", ["--num_images", "--batch_size", "--num_inference_steps"])
@pytest.mark.parametrize("value", [0, -3])
def test_sample_refuses_counts_below_one(flag, value, model, tmp_path):
    message = refused("sample", model, "--output_dir", tmp_path / "pictures", flag, value)
    assert message == f"custom-ddpm: error: {flag} is {value}; it must be at least 1"
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("seed", [-1, 2**63 - 15, 2**64])
def test_sample_refuses_seeds_that_torch_does_not_take(seed, model, tmp_path):
    assert f"--seed is {seed}; it must be between" in refused(
        "sample", model, "--output_dir", tmp_path / "p", "--seed", seed
    )


def test_sample_takes_a_class_whose_name_is_a_number_by_its_name(tmp_path):
    pipeline = make_pipeline(classes=3)
    pipeline.register_to_config(id2label={0: "01", 1: "02", 2: "03"})
    pipeline.save_pretrained(tmp_path / "model")
    words = ["sample", tmp_path / "model", "--output_dir", tmp_path / "pictures", "--num_images", 3, "--class_labels"]
    message = refused(*words, 1, 2, 3)
    assert message == "custom-ddpm: error: class label '1' is unknown; use one of 01, 02, 03"
    assert not (tmp_path / "pictures").exists()
    main([str(word) for word in [*words, "03", "01", "02"]])
    expected = pipeline(class_labels=[2, 0, 1], generator=[torch.Generator().manual_seed(i) for i in range(3)]).images
    for seed, picture in enumerate(expected):
        assert np.array_equal(
            np.asarray(PIL.Image.open(tmp_path / "pictures" / f"seed-{seed}.png")), np.asarray(picture)
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scheduler", "DDIMSheduler"], "which is no scheduler of diffusers; did you mean DDIMScheduler"),
        (
            ["--scheduler", "DPMSolverMultistepScheduler", "--scheduler_options", "algorithm_typ=x"],
            "algorithm_typ, which DPMSolverMultistepScheduler lacks; did you mean algorithm_type",
        ),
        (["--scheduler_options", "clip_sample"], "an option is NAME=VALUE"),
        (["--class_labels", "as_data"], "has no training_config.yaml that names its training data"),
        (["--guidance_interval", "0.2", "0.8"], "guidance_scale is 1, which is no guidance"),
        (["--guidance_scale", "2", "--guidance_interval", "0.8", "0.2"], "it must be 0 <= low < high <= 1"),
    ],
)
def test_sample_refuses_at_the_door(model, tmp_path, words, message):
    assert message in refused("sample", model, "--output_dir", tmp_path / "p", *words)
    assert not (tmp_path / "p").exists()


def test_sample_with_another_sampler(model, tmp_path):
    words = ["--scheduler", "DPMSolverMultistepScheduler", "--scheduler_options", "algorithm_type=sde-dpmsolver++"]
    folder = tmp_path / "p"
    main([str(word) for word in ["sample", model, "--output_dir", folder, "-n", 1, "--num_inference_steps", 5, *words]])
    pipeline = CustomDDPMPipeline.from_pretrained(model)
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="sde-dpmsolver++"
    )
    generator = [torch.Generator().manual_seed(0)]
    expected = pipeline(class_labels=[0], generator=generator, num_inference_steps=5).images[0]
    assert np.array_equal(np.asarray(PIL.Image.open(folder / "seed-0.png")), np.asarray(expected))


def test_labels_in_the_shares_of_the_data():
    for n in (10, 100, 1000):
        found = np.bincount(spread([10, 0, 30, 60], n), minlength=4)
        assert np.abs(found - np.array([0.1, 0, 0.3, 0.6]) * n).max() <= 2 and found[1] == 0


def test_convert_there_and_back(tmp_path):
    make_pipeline(channels=3).save_pretrained(tmp_path / "ours")
    main(["convert", str(tmp_path / "ours"), str(tmp_path / "stock")])
    index = json.loads((tmp_path / "stock" / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    main(["convert", str(tmp_path / "stock"), str(tmp_path / "again"), "--to", "custom"])
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "ours" / weights).read_bytes()


def test_verify(model, capsys):
    main(["verify", str(model)])
    assert "each of its 8 files is this release's" in capsys.readouterr().out
    with (model / "unet" / "unet.py").open("a") as file:
        file.write("# changed\n")
    assert "unet/unet.py" in refused("verify", model)


def test_analytic_variance_is_saved_with_the_model(tmp_path):
    folder, pictures = tmp_path / "run", tmp_path / "pictures"
    make_pipeline().save_pretrained(folder)
    pictures.mkdir()
    random = np.random.default_rng(0)
    for i in range(8):
        PIL.Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(pictures / f"{i}.png")
    config = TrainingConfig(train_data_dir=str(pictures), resolution=[8], cache_dir=str(tmp_path / "cache"))
    (folder / "training_config.yaml").write_text(config.to_yaml())
    main(["analytic-variance", str(folder), "--num_images", "8"])
    scheduler = CustomDDPMPipeline.from_pretrained(folder).scheduler
    assert scheduler.config.variance_type == "analytic"
    variances = np.array(scheduler.config.original_sample_variances)
    # An untrained model knows nothing: its error is what clipping leaves, and least where x_t still shows x_0.
    assert len(variances) == 20 and (variances > 0).all() and variances[0] < variances[-1] < 4


def test_errors_are_one_line(tmp_path):
    assert "custom-ddpm: error:" in refused("sample", tmp_path / "nowhere")
    make_pipeline(classes=3).save_pretrained(tmp_path / "model")
    words = ("sample", tmp_path / "model", "--output_dir", tmp_path / "new", "--class_labels", "class 7")
    assert refused(*words).startswith("custom-ddpm: error: class label 'class 7' is unknown")
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
