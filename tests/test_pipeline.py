"""The pipeline: Algorithm 2, class labels and guidance, saving and loading."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_pipeline
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, EulerDiscreteScheduler, UNet2DModel

import custom_ddpm
from custom_ddpm import CustomDDPMPipeline, CustomDDPMScheduler, CustomUNet2DModel


def draw(pipeline, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return pipeline(generator=generator, output_type="pt", **options).images


# ---- Algorithm 2 ----


def test_is_algorithm_2_written_out():
    # S1 as in the paper: the mean of R6 with σ² = β̃, without clipping.
    pipeline = make_pipeline(clip_sample=False)
    betas = np.linspace(1e-4, 0.02, 20)
    bars = np.cumprod(1 - betas)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    with torch.no_grad():
        for t in reversed(range(20)):
            eps = pipeline.unet(x, t).sample
            mean = (x - betas[t] / np.sqrt(1 - bars[t]) * eps) / np.sqrt(1 - betas[t])
            z = torch.randn(x.shape, generator=generator)
            sigma = np.sqrt((1 - bars[t - 1]) / (1 - bars[t]) * betas[t]) if t > 0 else 0.0
            x = mean + sigma * z
    expected = (x / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 0.05, "the image is constant, so the comparison is not valid"
    torch.testing.assert_close(draw(pipeline, 3, batch_size=2), expected, atol=2e-5, rtol=0)


def test_a_seed_gives_the_same_image_again_and_in_any_batch(pipeline):
    def picture(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(batch_size=len(seeds), generator=generators, output_type="pt").images

    three = picture([5, 6, 7])
    assert torch.equal(three, picture([5, 6, 7]))
    torch.testing.assert_close(picture([6])[0], three[1], atol=1e-6, rtol=0)
    assert (three[0] - three[1]).abs().max() > 0.01


def test_latents_are_the_start(pipeline):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 1, 8, 8, generator=generator)
    given = pipeline(latents=latents, generator=generator, output_type="pt").images
    assert torch.equal(given, draw(pipeline, 0, batch_size=2))
    assert pipeline(latents=torch.randn(1, 1, 12, 9), output_type="pt").images.shape == (1, 1, 12, 9)


def test_eta_0_is_ddim():
    # Without clipping, since diffusers' DDIM does not update ε for the clipped x̂_0.
    pipeline = make_pipeline(clip_sample=False)
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = draw(pipeline, latents=latents, eta=0.0, num_inference_steps=5)
    assert torch.equal(ours, draw(pipeline, seed=9, latents=latents, eta=0.0, num_inference_steps=5))
    ddim = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    theirs = draw(CustomDDPMPipeline(pipeline.unet, ddim), latents=latents, eta=0.0, num_inference_steps=5)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_eta_is_of_schedulers_that_have_it(pipeline):
    # Their statistics are in test_samplers.py.
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match=r"eta is 0.5, but EulerDiscreteScheduler has no eta"):
        draw(pipeline, eta=0.5)


def test_output_types(pipeline):
    def output(kind, pipeline=pipeline):
        return pipeline(batch_size=2, generator=torch.Generator().manual_seed(0), output_type=kind).images

    tensor, array, pictures = output("pt"), output("np"), output("pil")
    assert tensor.shape == (2, 1, 8, 8) and array.shape == (2, 8, 8, 1) and array.dtype == np.float32
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert [picture.mode for picture in pictures] == ["L", "L"]
    assert np.array_equal(np.asarray(pictures[1]), np.rint(array[1, ..., 0] * 255))
    assert [picture.mode for picture in output("pil", make_pipeline(channels=3))] == ["RGB", "RGB"]
    assert [picture.mode for picture in output("pil", make_pipeline(channels=4))] == ["RGBA", "RGBA"]
    assert isinstance(pipeline(return_dict=False), tuple)


def test_callback_sees_and_replaces_the_latents(pipeline):
    seen = []

    def blank(pipe, step, timestep, inputs):
        seen.append((step, int(timestep), inputs["latents"].shape))
        return {"latents": torch.zeros_like(inputs["latents"])} if step == 3 else None

    image = draw(pipeline, num_inference_steps=4, callback_on_step_end=blank)
    assert seen == [(0, 15, (1, 1, 8, 8)), (1, 10, (1, 1, 8, 8)), (2, 5, (1, 1, 8, 8)), (3, 0, (1, 1, 8, 8))]
    assert (image == 0.5).all()


def test_callbacks_find_what_they_find_in_diffusers(class_pipeline):
    seen = []

    def watch(pipe, step, timestep, inputs):
        seen.append((pipe.guidance_scale, pipe.num_timesteps, pipe.interrupt, len(pipe.scheduler.timesteps)))
        pipe._guidance_scale += 1.0
        pipe._interrupt = step == 2

    options = {"class_labels": 1, "num_inference_steps": 5, "output_type": "latent"}

    def draw_latent(**more):
        return class_pipeline(generator=torch.Generator().manual_seed(0), **options, **more).images

    stopped = draw_latent(guidance_scale=2.0, callback_on_step_end=watch)
    assert seen == [(2.0, 5, False, 5), (3.0, 5, False, 5), (4.0, 5, False, 5)]
    assert (class_pipeline.guidance_scale, class_pipeline.num_timesteps, class_pipeline.interrupt) == (5.0, 5, True)
    # x_t after three steps with w = 2, 3, 4: not the image, and not that of a fixed w.
    kept = []
    draw_latent(guidance_scale=2.0, callback_on_step_end=lambda pipe, i, t, inputs: kept.append(inputs["latents"]))
    assert len(kept) == 5 and not torch.equal(stopped, kept[2])
    # The next call begins anew.
    draw_latent()
    assert (class_pipeline.guidance_scale, class_pipeline.interrupt) == (1.0, False)


def test_latents_as_the_output_are_not_limited():
    pipeline = make_pipeline(clip_sample=False)
    x_0 = pipeline(2, generator=torch.Generator().manual_seed(0), output_type="latent").images
    assert x_0.dtype == torch.float32 and x_0.abs().max() > 1
    assert torch.equal((x_0 / 2 + 0.5).clamp(0, 1), draw(pipeline, batch_size=2))


def test_a_call_inside_the_callback_of_another(pipeline):
    def inner(pipe, step, timestep, inputs):
        pipeline(num_inference_steps=3, output_type="pt")

    expected = draw(pipeline, num_inference_steps=6)
    assert torch.equal(draw(pipeline, num_inference_steps=6, callback_on_step_end=inner), expected)


def test_half_precision_keeps_x_t_in_float32(pipeline):
    expected = draw(pipeline)
    seen = []

    def watch(pipe, step, timestep, inputs):
        seen.append(inputs["latents"].dtype)
        return {}

    half = draw(pipeline.to(dtype=torch.bfloat16), callback_on_step_end=watch)
    assert set(seen) == {torch.float32}
    torch.testing.assert_close(half, expected, atol=0.1, rtol=0)


# ---- classes and guidance ----


def test_guidance_extrapolates_from_no_class_to_the_class():
    # Without clipping, a single step from T−1 to x_0 is affine in ε, so the effect of guidance is exact.
    pipeline = make_pipeline(classes=3, clip_sample=False, beta_schedule="exp", timestep_spacing="trailing")
    latents = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def x_0(**options):
        kept = {}

        def keep(pipe, step, timestep, inputs):
            kept.update(inputs)

        draw(pipeline, latents=latents, num_inference_steps=1, callback_on_step_end=keep, **options)
        return kept["latents"]

    without, with_class = x_0(), x_0(class_labels=1)
    assert (with_class - without).abs().max() > 0.1
    guided = x_0(class_labels=1, guidance_scale=3.0)
    torch.testing.assert_close(guided, without + 3.0 * (with_class - without), atol=1e-3, rtol=1e-4)


def test_class_labels_by_number_by_name_and_per_image(class_pipeline):
    by_number = draw(class_pipeline, batch_size=2, class_labels=2)
    assert torch.equal(by_number, draw(class_pipeline, batch_size=2, class_labels="class 2"))
    for labels in (torch.tensor([2, 2]), np.array([2, 2]), [np.int64(2), torch.tensor(2)], (2, 2), ["2", "class 2"]):
        assert torch.equal(by_number, draw(class_pipeline, class_labels=labels)), labels
    for label in (torch.tensor(2), np.array(2), np.int64(2), "2"):
        assert torch.equal(by_number, draw(class_pipeline, batch_size=np.int64(2), class_labels=label)), label
    assert not torch.equal(by_number, draw(class_pipeline, class_labels=[2, 0]))


def test_where_names_are_numbers_a_text_is_a_name_only(class_pipeline):
    class_pipeline.register_to_config(id2label={0: "01", 1: "02", 2: "03"})
    assert torch.equal(draw(class_pipeline, class_labels="02"), draw(class_pipeline, class_labels=1))
    for word in ("1", "2", "3", "0"):
        with pytest.raises(ValueError, match=f"class label '{word}' is unknown; use one of 01, 02, 03$"):
            draw(class_pipeline, class_labels=word)
    class_pipeline.register_to_config(id2label={0: "2", 1: "0", 2: "1"})
    assert torch.equal(draw(class_pipeline, class_labels=["2"]), draw(class_pipeline, class_labels=[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": 5}, r"class label 5 is unknown; use an integer in \[0, 3\) or one of class 0"),
        ({"class_labels": 3}, r"class label 3 is unknown; use an integer in \[0, 3\)"),  # the label of no class
        ({"class_labels": "3"}, "class label '3' is unknown"),
        ({"class_labels": [0, 3], "guidance_scale": 2.0}, "class label 3 is unknown"),
        ({"class_labels": 1.0}, r"class label 1\.0 is unknown"),
        ({"class_labels": torch.tensor([1.7])}, r"class label 1\.7"),
        ({"class_labels": True}, "class label True is unknown"),
        ({"class_labels": []}, "there are 0 class_labels|batch_size is 0"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; it must be an integer of at least 1"),
        ({"num_inference_steps": -1}, "num_inference_steps is -1"),
        ({"num_inference_steps": 5.0}, r"num_inference_steps is 5\.0; it must be an integer"),
        ({"num_inference_steps": True}, "num_inference_steps is True"),
        ({"num_inference_steps": "5"}, "num_inference_steps is '5'"),
        ({"batch_size": 0}, "batch_size is 0; it must be an integer of at least 1"),
        ({"batch_size": 2.0}, r"batch_size is 2\.0"),
        ({"generator": 0}, r"generator is 0; it must be a torch\.Generator"),
        ({"generator": [0], "batch_size": 1}, r"generator is \[0\]; it must be"),
        ({"guidance_scale": float("nan"), "class_labels": 1}, "guidance_scale is nan; it must be a finite number"),
        ({"eta": float("nan")}, "eta is nan"),
        ({"latents": torch.zeros(1, 1, 8)}, r"latents have shape \(1, 1, 8\)"),
        ({"class_labels": "class 9"}, "class label 'class 9' is unknown"),
        ({"class_labels": [0, 1], "batch_size": 3}, "there are 2 class_labels for batch_size 3"),
        ({"guidance_scale": 2.0}, "but guidance needs class_labels"),
        ({"eta": 1.5}, "eta is 1.5; it must be between 0"),
        ({"output_type": "jpeg"}, "output_type is 'jpeg'"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"latents have shape \(1, 3, 8, 8\); this call needs \(1, 1,"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "only 'latents' is available"),
        ({"num_inference_steps": 21}, "it must be between 1 and num_train_timesteps, 20"),
        ({"batch_size": 2, "generator": [torch.Generator()] * 3}, "generator has 3 entries for batch_size 2"),
    ],
)
def test_invalid_arguments_raise(class_pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        class_pipeline(**options)


def test_arguments_that_the_model_does_not_support_raise(pipeline):
    with pytest.raises(ValueError, match="this model is unconditional; leave them out"):
        pipeline(class_labels=1)
    with pytest.raises(ValueError, match=r"this model is unconditional; leave it at 1\.0"):
        pipeline(guidance_scale=2.0)
    undropped = make_pipeline(classes=3, null_class=False)
    with pytest.raises(ValueError, match=r"this model needs class_labels: integers in \[0, 3\)"):
        undropped()
    with pytest.raises(ValueError, match="trained without label dropout"):
        undropped(class_labels=1, guidance_scale=2.0)


# ---- saving and loading ----


def test_the_folder_loads_with_the_package_and_none_of_its_code_is_executed(class_pipeline, tmp_path):
    class_pipeline.save_pretrained(tmp_path)
    expected = draw(class_pipeline, class_labels=1, guidance_scale=2.0)
    for file in tmp_path.rglob("*.py"):
        file.write_text("raise SystemExit('code of the folder was run')")
    loaded = CustomDDPMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.unet) is CustomUNet2DModel and type(loaded.scheduler) is CustomDDPMScheduler
    assert torch.equal(draw(loaded, class_labels="class 1", guidance_scale=2.0), expected)


WITHOUT_PACKAGE = """
    import sys, torch
    sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
    sys.path = [p for p in sys.path if p not in {hidden!r}]
    try:
        import custom_ddpm
        sys.exit("the package is importable, so the test is not valid")
    except ImportError:
        pass
    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained({folder!r}, trust_remote_code=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(class_labels=1, guidance_scale=2.0, generator=generator, output_type="pt").images
    torch.save(images, {folder!r} + "/images.pt")
    pipeline.save_pretrained({folder!r} + "/again")
"""


def test_the_folder_loads_without_the_package_and_gives_the_same_image(class_pipeline, tmp_path):
    folder = tmp_path / "model"
    class_pipeline.save_pretrained(folder)
    package = Path(custom_ddpm.__file__).parents[1]
    code = textwrap.dedent(WITHOUT_PACKAGE.format(folder=str(folder), hidden=["", str(package), str(Path.cwd())]))
    # -P and another working directory, so that the source tree of the tests is not importable.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert torch.equal(torch.load(folder / "images.pt"), draw(class_pipeline, class_labels=1, guidance_scale=2.0))
    # Saving it again gives an identical repository.
    files = sorted(p.relative_to(folder / "again") for p in (folder / "again").rglob("*") if p.is_file())
    assert len(files) == 8
    for file in files:
        assert (folder / "again" / file).read_bytes() == (folder / file).read_bytes(), file


def test_without_trust_remote_code_no_code_of_the_folder_is_executed(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    marker = tmp_path / "was run"
    (tmp_path / "pipeline_custom_ddpm.py").write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        from diffusers import DiffusionPipeline

        DiffusionPipeline.from_pretrained(tmp_path)
    assert not marker.exists()


def test_the_folder_contains_no_pickle_and_no_local_path(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "a")
    loaded = CustomDDPMPipeline.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    files = [file for file in (tmp_path / "b").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".py", ".safetensors"}
    assert not any(str(tmp_path).encode() in file.read_bytes() for file in files)
    with pytest.raises(ValueError, match="safe_serialization=False would write a pickle"):
        pipeline.save_pretrained(tmp_path / "c", safe_serialization=False)


@pytest.mark.parametrize("at_the_root", [False, True])
def test_a_repository_of_diffusers_is_converted(tmp_path, at_the_root):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    stock = DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20))
    stock.set_progress_bar_config(disable=True)
    stock.save_pretrained(tmp_path)
    if at_the_root:  # the layout of google/ddpm-cifar10-32
        for file in [*tmp_path.glob("unet/*"), *tmp_path.glob("scheduler/*")]:
            file.rename(tmp_path / file.name)
        (tmp_path / "unet").rmdir()
        (tmp_path / "scheduler").rmdir()
    ours = CustomDDPMPipeline.from_pretrained(tmp_path)
    assert type(ours.unet) is CustomUNet2DModel and type(ours.scheduler) is CustomDDPMScheduler
    theirs = stock(generator=torch.Generator().manual_seed(0), num_inference_steps=20, output_type="np").images
    np.testing.assert_allclose(draw(ours).permute(0, 2, 3, 1).numpy(), theirs, atol=1e-4)


def test_another_scheduler_is_saved_and_comes_back(pipeline, tmp_path):
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert type(CustomDDPMPipeline.from_pretrained(tmp_path).scheduler) is DDIMScheduler


def test_parts_can_be_replaced_when_loading(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    scheduler = DDIMScheduler()
    loaded = CustomDDPMPipeline.from_pretrained(tmp_path, scheduler=scheduler, torch_dtype=torch.bfloat16)
    assert loaded.scheduler is scheduler and loaded.unet.dtype == torch.bfloat16


def test_loading_unknown_components_raises(pipeline, tmp_path):
    with pytest.raises(ValueError, match="trust_remote_code runs code of the repository"):
        CustomDDPMPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"unet": ["unet", "Stranger"]}))
    with pytest.raises(
        ValueError, match=r"unet is \['unet', 'Stranger'\]; it must be a CustomUNet2DModel or a UNet2DModel"
    ):
        CustomDDPMPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"scheduler": ["scheduler", "Stranger"]}))
    with pytest.raises(ValueError, match=r"scheduler is \['scheduler', 'Stranger'\]"):
        CustomDDPMPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(pipeline.unet.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(OSError, match=r"safetensors"):
        CustomDDPMPipeline.from_pretrained(tmp_path)


def test_guidance_stays_inside_its_interval(class_pipeline):
    sizes = {}
    forward = class_pipeline.unet.forward

    def record(sample, t, *words, **options):
        sizes[int(t)] = len(sample)
        return forward(sample, t, *words, **options)

    class_pipeline.unet.forward = record
    options = {"class_labels": [1], "guidance_scale": 3.0, "output_type": "pt"}

    def draw(**more):
        return class_pipeline(generator=torch.Generator().manual_seed(0), **options, **more).images

    inside = draw(guidance_interval=(0.25, 0.5))
    # Twice the images where guidance needs the model without the class too; T is 20.
    assert sizes == {t: 2 if 5 <= t < 10 else 1 for t in range(20)}
    whole, all_of_it = draw(), draw(guidance_interval=(0.0, 1.0))
    assert torch.equal(whole, all_of_it) and not torch.equal(whole, inside)
    for interval in ((0.5, 0.5), (-0.1, 0.5), (0.2, 1.5)):
        with pytest.raises(ValueError, match="it must be 0 <= low < high <= 1"):
            draw(guidance_interval=interval)


def test_guidance_without_an_interval_does_not_read_the_timestep():
    """Reading it would make the host wait for the device at every step."""

    class Unreadable(torch.Tensor):
        def __float__(self):
            raise AssertionError("the timestep was read")

    pipeline = make_pipeline(classes=3)
    timestep = torch.tensor(5).as_subclass(Unreadable)
    assert pipeline._is_guided(timestep)
    pipeline._guidance_interval = (0.0, 1.0)
    with pytest.raises(AssertionError, match="was read"):
        pipeline._is_guided(timestep)
