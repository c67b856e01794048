"""custom_ddpm/training/run.py: chance, Algorithm 1 against a plain loop, resume to the bit, guard rails."""

import ast
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import threading
import types

import numpy as np
import pytest
import safetensors.torch
import scipy.stats
import torch
from diffusers import UNet2DModel
from runs import (
    DIGITS,
    RANDOM,
    ROOT,
    assert_the_seventh_of_eight_steps_was_left_out,
    differences,
    metrics,
    needs_forkserver,
    run,
    run_killed_at,
    run_on_processes,
    state,
    tiny,
)

from custom_ddpm import CustomDDPMPipeline
from custom_ddpm.data import open_images, sample_order
from custom_ddpm.flags import parse_config
from custom_ddpm.hub import verify_repository
from custom_ddpm.recipe import Facts, before_data, complete
from custom_ddpm.training import build, loop, parts, preview
from custom_ddpm.training import run as run_module
from custom_ddpm.training.augmentation import augmented
from custom_ddpm.training.checkpoint import find_checkpoint, list_checkpoints
from custom_ddpm.training.parts import build_scheduler, build_unet
from custom_ddpm.training.randomness import draw

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("digits_cache")


# Chance


def rows(draws):
    return [tuple(part[i] for part in draws[:4]) for i in range(len(draws.timestep))]


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 8, 8)])
def test_a_row_of_chance_is_a_function_of_seed_step_and_position(shape):
    whole = rows(draw(7, 3, range(12), shape, CPU))
    for positions in [range(5), range(4, 12), range(11, 12)]:
        for position, row in zip(positions, rows(draw(7, 3, positions, shape, CPU)), strict=True):
            assert all(torch.equal(part, expected) for part, expected in zip(row, whole[position], strict=True))
    assert draw(7, 3, range(4, 6), shape, CPU).dropout_seed == draw(7, 3, range(4, 12), shape, CPU).dropout_seed


def test_nothing_of_chance_comes_twice():
    draws = [draw(seed, step, range(64), (1, 4, 4), CPU) for seed in (0, 1) for step in (0, 1, 2)]
    noise = torch.cat([each.noise.flatten(1) for each in draws])
    assert len(torch.unique(noise, dim=0)) == len(noise)
    uniforms = torch.cat([torch.stack(each[:3]).flatten() for each in draws])
    # Of n numbers out of 2^24, n²/2^25 pairs are expected to meet.
    assert len(uniforms) - len(torch.unique(uniforms)) <= 3
    assert len({draw(0, step, range(i, i + 1), (1, 1, 1), CPU).dropout_seed for step in (0, 1) for i in (0, 1)}) == 4


def test_chance_is_uniform_and_normal_and_independent():
    draws = draw(0, 0, range(20_000), (1, 2, 2), CPU)
    uniforms = torch.stack(draws[:3]).numpy()
    assert uniforms.min() >= 0 and uniforms.max() < 1
    for row in uniforms:
        assert scipy.stats.kstest(row, "uniform").pvalue > 1e-3
    assert scipy.stats.kstest(draws.noise.flatten().numpy(), "norm").pvalue > 1e-3
    together = np.corrcoef(np.concatenate([uniforms, draws.noise.flatten(1).T.numpy()]))
    # The correlation of n independent pairs has standard deviation 1/√n.
    assert np.abs(together - np.eye(7)).max() < 4 / math.sqrt(20_000)
    # And from step to step, at one position.
    steps = np.array([[x.item() for x in draw(0, step, range(1), (1, 1, 1), CPU)[:4]] for step in range(4000)]).T
    assert np.abs(np.corrcoef(steps[:, 1:], steps[:, :-1])[4:, :4]).max() < 4 / math.sqrt(4000)


# Algorithm 1


def plain_loop(config, device=CPU):
    """The run of `config` as one would write it down: no accelerate, no GradScaler, no EMAModel, no data loader.

    Returns losses of each step, final weights and averages, learning rates.
    """
    data = open_images(dataset_name=DIGITS, resolution=8, class_conditional=config.class_conditional)
    images, labels = data.take(10**6)
    torch.manual_seed(config.seed)
    unet = build_unet(config, data)
    average = [p.detach().clone() for p in unet.parameters()]
    # betas are resampled for T != 1000; the reference starts from ᾱ.
    alpha_bar = build_scheduler(config).alphas_cumprod.double()
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    batch, accumulation = config.train_batch_size, config.gradient_accumulation_steps
    all_losses, rates = [], []
    for step in range(config.max_train_steps):
        if step < config.lr_warmup_steps:
            rate = config.learning_rate * step / config.lr_warmup_steps
        else:
            done = (step - config.lr_warmup_steps) / (config.max_train_steps - config.lr_warmup_steps)
            rate = config.learning_rate * (1 + math.cos(math.pi * done)) / 2
        optimizer.param_groups[0]["lr"] = rate
        rates.append(rate)
        optimizer.zero_grad()
        losses = []
        for micro in range(accumulation):
            places = range(micro * batch, (micro + 1) * batch)
            position = [step * batch * accumulation + place for place in places]
            index = [sample_order(config.seed, p // len(images), len(images))[p % len(images)] for p in position]
            x_0 = images[index].double() / 127.5 - 1
            chance = draw(config.seed, step, places, x_0.shape[1:], device)
            for i, u in enumerate(chance.flip.tolist()):
                if config.random_flip and u < 0.5:
                    x_0[i] = x_0[i].flip(-1)
            if step < config.augment_share * config.max_train_steps:
                x_0 = augmented(x_0.float(), chance.changes).double()
            t = [math.floor(u * config.ddpm_num_steps) for u in chance.timestep.tolist()]
            scale = alpha_bar[t].view(-1, 1, 1, 1)
            x_t = scale.sqrt() * x_0 + (1 - scale).sqrt() * chance.noise
            c = None
            if labels is not None:
                c = labels[index].clone()
                c[chance.label < config.label_dropout] = 10
            torch.manual_seed(chance.dropout_seed)
            output = unet(x_t.float(), torch.tensor(t), c).sample
            loss = (output - chance.noise).square().mean((1, 2, 3))
            (loss.mean() / accumulation).backward()
            losses += loss.tolist()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in unet.parameters()))
        for p in unet.parameters():
            p.grad *= min(1.0, config.max_grad_norm / norm)
        optimizer.step()
        decay = (
            0.0 if step == 0 else min(config.ema_max_decay, 1 - (1 + step / config.ema_inv_gamma) ** -config.ema_power)
        )
        for mean, p in zip(average, unet.parameters(), strict=True):
            mean.mul_(decay).add_(p.detach(), alpha=1 - decay)
        all_losses.append(losses)
    names = [name for name, _ in unet.named_parameters()]
    return all_losses, unet.state_dict(), dict(zip(names, average, strict=True)), rates


@pytest.mark.parametrize("changes", [{}, RANDOM, {"max_grad_norm": 0.01, "train_batch_size": 700}], ids=str)
def test_training_is_the_plain_loop(tmp_path, changes):
    changes = {"logging_steps": 1, "checkpointing_steps": 100, "ema_max_decay": 0.7, **changes}
    if changes.get("train_batch_size") == 700:
        changes["max_train_steps"] = 4  # past the end of an epoch of 1,797
    losses, weights, averages, rates = plain_loop(tiny(tmp_path, **changes))
    run(tmp_path / "run", **changes)
    lines = metrics(tmp_path / "run")
    assert [line["loss"] for line in lines] == pytest.approx([np.mean(each) for each in losses], abs=2e-6)
    # What is told after a step is the rate of the next.
    assert [line["learning_rate"] for line in lines[:-1]] == pytest.approx(rates[1:], rel=1e-6)
    saved = state(list(list_checkpoints(tmp_path / "run").values())[-1])
    for name, value in weights.items():
        torch.testing.assert_close(saved[f"unet/{name}"], value, rtol=0, atol=2e-5)
    for name, value in averages.items():
        torch.testing.assert_close(saved[f"ema/{name}"], value, rtol=0, atol=2e-5)
    # What is left to be loaded are the averages.
    unet = CustomDDPMPipeline.from_pretrained(tmp_path / "run").unet
    for name, value in averages.items():
        torch.testing.assert_close(unet.state_dict()[name], value, rtol=0, atol=2e-5)


def test_without_averages_the_weights_are_what_is_left(tmp_path):
    run(tmp_path / "run", use_ema=False)
    checkpoint = tmp_path / "run" / "checkpoint-12"
    assert not (checkpoint / "ema.safetensors").exists()
    unet = CustomDDPMPipeline.from_pretrained(tmp_path / "run").unet
    for name, value in unet.state_dict().items():
        assert torch.equal(value, state(checkpoint)[f"unet/{name}"])


def test_a_run_leaves_nothing_that_could_run_code(tmp_path):
    run(tmp_path, timestep_sampling="importance", posthoc_ema_steps=4)
    files = [file for file in (tmp_path / "checkpoint-12").iterdir() if file.suffix != ".json"]
    assert {file.name for file in files} == {
        f"{name}.safetensors" for name in ("unet", "optimizer", "ema", "posthoc_ema", "timestep_sampler")
    }
    assert verify_repository(tmp_path) == []


def test_importance_weights_keep_the_gradient_right(tmp_path, monkeypatch):
    """With p_t not uniform, the weighted loss is that of the sampler's own weights, and the told loss is unweighted."""
    seen = []
    sample = build.ImportanceSampler.sample

    def skewed(self, uniforms):
        self.counts.fill_(10)
        self.history[:] = torch.arange(1, len(self.history) + 1)[:, None]
        timesteps, weights = sample(self, uniforms)
        seen.append((timesteps, weights))
        return timesteps, weights

    monkeypatch.setattr(build.ImportanceSampler, "sample", skewed)
    backward = []
    original = build.Accelerator.backward
    monkeypatch.setattr(
        build.Accelerator, "backward", lambda self, loss: (backward.append(loss.item()), original(self, loss))
    )
    told = []
    add = build.MetricsLogger.add_losses
    monkeypatch.setattr(
        build.MetricsLogger, "add_losses", lambda self, losses, t: (told.append(losses.detach()), add(self, losses, t))
    )
    run(tmp_path / "run", timestep_sampling="importance", loss_type="vlb", max_train_steps=3)
    p = np.arange(1, 21) / 210 * 0.999 + 0.001 / 20
    for (timesteps, weights), loss, losses in zip(seen, backward, told, strict=True):
        np.testing.assert_allclose(weights, 1 / (20 * p[timesteps]), rtol=1e-5)
        assert loss == pytest.approx((losses * weights).mean().item(), rel=1e-6)


# Resume

RUNS = {
    "plain": {},
    "all chance": RANDOM,
    "importance": {"timestep_sampling": "importance", "loss_type": "vlb", "ddpm_num_steps": 4, "train_batch_size": 16},
    "hybrid": {"loss_type": "hybrid", "variance_type": "learned_range", **RANDOM},
    "bf16": {"mixed_precision": "bf16", **RANDOM},
    "v, min-SNR, cosine": {
        "prediction_type": "v_prediction",
        "loss_weighting": "min_snr",
        "ddpm_beta_schedule": "squaredcos_cap_v2",
        "lr_scheduler": "constant_with_warmup",
    },
    "no average": {"use_ema": False},
    "channels last, checkpointed activations": {"channels_last": True, "gradient_checkpointing": True, **RANDOM},
    "stream": {"streaming": True, **RANDOM},
}


QUICK = ("all chance", "hybrid", "stream")


@pytest.mark.parametrize(
    "changes",
    [pytest.param(each, marks=() if name in QUICK else pytest.mark.slow, id=name) for name, each in RUNS.items()],
)
def test_an_interrupted_run_ends_in_the_same_bits(tmp_path, monkeypatch, changes):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run(straight, **changes)
    # Right after a checkpoint, in the middle of two, before the first; then two times in one interval.
    for step in (4, 6, 2, 9, 10)[: 5 if changes == RANDOM else 2]:
        if step == 2:
            killed = tmp_path / "killed again"
        run_killed_at(monkeypatch, step, killed, **changes, resume_from_checkpoint="latest")
    run(killed, **changes, resume_from_checkpoint="latest")
    assert differences(straight / "checkpoint-12", killed / "checkpoint-12") == []
    assert metrics(straight) == metrics(killed)
    files = ("samples.png", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json")
    for name in files:
        assert (straight / name).read_bytes() == (killed / name).read_bytes()


def test_the_bits_are_those_of_this_seed_and_of_no_other(tmp_path):
    """The comparison above would see a difference."""
    for seed in (0, 1):
        run(tmp_path / str(seed), seed=seed, **RANDOM)
    assert len(differences(tmp_path / "0" / "checkpoint-12", tmp_path / "1" / "checkpoint-12")) > 100


def test_pictures_go_on_where_they_stopped_without_replay(tmp_path, monkeypatch):
    served = []
    read = build.ImageData.batches

    def recording(self, positions, **options):
        for images, labels in read(self, positions, **options):
            served.append(images)
            yield images, labels

    monkeypatch.setattr(build.ImageData, "batches", recording)
    for at_the_end in ("measure_final_loss", "write_bounds"):  # they read pictures of their own
        monkeypatch.setattr(f"custom_ddpm.training.run.{at_the_end}", lambda *arguments: None)
    # 24 batches of 200 pictures: past two epochs of 1,797.
    options = {"train_batch_size": 200, "gradient_accumulation_steps": 2}
    run(tmp_path / "straight", **options)
    straight, served[:] = list(served), []
    run_killed_at(monkeypatch, 7, tmp_path / "killed", **options)
    assert len(served) == 16  # of 7 steps, and of the one it died in
    served.clear()
    run(tmp_path / "killed", **options, resume_from_checkpoint="latest")
    assert len(straight) == 24 and len(served) == 16  # from step 4 on
    assert all(torch.equal(one, other) for one, other in zip(straight[8:], served, strict=True))


@pytest.mark.parametrize("which", ["checkpoint-4", "path"])
def test_a_checkpoint_of_choice_begins_another_folder(tmp_path, which):
    run(tmp_path / "straight")
    if which == "path":
        run(tmp_path / "other", resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
        assert differences(tmp_path / "straight" / "checkpoint-12", tmp_path / "other" / "checkpoint-12") == []
    else:  # in the folder of the run later checkpoints are in the way
        with pytest.raises(FileExistsError, match="checkpoint-12, which this run does not resume from"):
            run(tmp_path / "straight", resume_from_checkpoint=which)


def test_a_finished_run_that_is_resumed_is_left_as_it_was(tmp_path):
    run(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    lines = metrics(tmp_path)
    run(tmp_path, resume_from_checkpoint="latest")
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    assert metrics(tmp_path) == lines


def test_a_finished_run_is_validated_once(tmp_path):
    held_out = {"split": "train[:90%]", "validation_split": "train[90%:]"}
    run(tmp_path, **held_out)
    run(tmp_path, **held_out, resume_from_checkpoint="latest")
    assert [line["step"] for line in metrics(tmp_path) if "validation_loss" in line] == [12]


DUE = {"split": "train[:90%]", "validation_split": "train[90%:]", "save_images_steps": 4, "posthoc_ema_steps": 4}


@pytest.mark.parametrize(
    "lost",
    [
        "samples/step-0000004.png",
        pytest.param("posthoc_ema/step-0000004.safetensors", marks=pytest.mark.slow),
        pytest.param("validation", marks=pytest.mark.slow),
    ],
)
def test_what_was_due_at_the_checkpoint_is_done_after_a_resume(tmp_path, monkeypatch, lost):
    run(tmp_path / "straight", **DUE)
    run_killed_at(monkeypatch, 5, tmp_path / "killed", **DUE)
    lines = tmp_path / "killed" / "metrics.jsonl"
    if lost == "validation":  # the line is written before the grid
        (tmp_path / "killed" / "samples" / "step-0000004.png").unlink()
        lines.write_text("".join(line for line in lines.open() if "validation" not in line))
    else:
        (tmp_path / "killed" / lost).unlink()
    run(tmp_path / "killed", **DUE, resume_from_checkpoint="latest")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "straight")
    for pattern in ("samples/*", "posthoc_ema/*"):
        names = {file.name for file in (tmp_path / "straight").glob(pattern)}
        assert names == {file.name for file in (tmp_path / "killed").glob(pattern)}
        for name in names:
            files = [tmp_path / folder / pattern.replace("*", name) for folder in ("straight", "killed")]
            assert files[0].read_bytes() == files[1].read_bytes()


def test_a_bad_line_of_metrics_is_named_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    run_killed_at(monkeypatch, 6, tmp_path)
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"\xff\x00 no line\n[1]\n" + file.read_bytes() + b"{}\n")
    run(tmp_path, resume_from_checkpoint="latest")
    assert f"{file}: line 1, 2, 5 holds no metrics" in caplog.text
    assert [line["step"] for line in metrics(tmp_path)] == [4, 5, 8, 10, 12]


def damage(kind, folder):
    """Spoil a checkpoint in a way that its manifest agrees with."""
    files = {name: folder / f"{name}.safetensors" for name in ("unet", "optimizer", "ema")}
    tensors = safetensors.torch.load_file(files["unet"])
    name = "conv_in.bias"
    if kind == "broadcast":
        safetensors.torch.save_file({**tensors, name: tensors[name][:1].clone()}, files["unet"])
    elif kind == "missing weight":
        safetensors.torch.save_file({k: v for k, v in tensors.items() if k != name}, files["unet"])
    elif kind == "surplus weight":
        safetensors.torch.save_file({**tensors, "more": torch.zeros(1)}, files["ema"])
    elif kind == "empty optimiser":
        safetensors.torch.save_file({}, files["optimizer"])
    elif kind == "no file":
        files["ema"].unlink()
    elif kind == "no safetensors":
        files["unet"].write_bytes(b"\x80\x04pickle")
    metadata = json.loads((folder / "metadata.json").read_text())
    if kind == "another step":
        (folder / "metadata.json").write_text(json.dumps({**metadata, "step": 6}))
    if kind == "no settings":
        (folder / "metadata.json").write_text(json.dumps({"step": metadata["step"]}))
    listed = [file for file in folder.iterdir() if file.name != "manifest.json"]
    if kind == "metadata alone":
        listed = [folder / "metadata.json"]
        files["unet"].unlink()
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in listed}
    extra = {"device": "/dev/zero", "outside": "../../secret", "null": "a\0b", "pipe": "pipe"}
    if kind in extra:
        digests[extra[kind]] = "0" * 64
        if kind == "pipe":
            os.mkfifo(folder / "pipe")
    text = "[" * 100_000 if kind == "deep" else json.dumps([digests] if kind == "list" else digests)
    (folder / "manifest.json").write_text(text)


KINDS = (
    "broadcast,missing weight,surplus weight,empty optimiser,no file,no safetensors,another step,no settings,"
    "metadata alone,device,outside,null,pipe,deep,list"
).split(",")


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_does_not_fit_is_left_for_the_one_before(tmp_path, straight_run, kind, caplog):
    shutil.copytree(straight_run, tmp_path / "run")
    damage(kind, tmp_path / "run" / "checkpoint-12")
    run(tmp_path / "run", resume_from_checkpoint="latest")
    assert "checkpoint-12" in caplog.text and "resumed from" in caplog.text and "at step 8" in caplog.text
    assert differences(tmp_path / "run" / "checkpoint-12", straight_run / "checkpoint-12") == []


@pytest.mark.parametrize("kind", ["broadcast", "empty optimiser", "pipe", "another step"])
def test_a_checkpoint_that_was_named_is_refused_in_one_line(tmp_path, straight_run, kind):
    shutil.copytree(straight_run, tmp_path / "run")
    damage(kind, tmp_path / "run" / "checkpoint-12")
    with pytest.raises(ValueError, match=r"checkpoint-12 (is damaged|cannot be resumed from)"):
        run(tmp_path / "run", resume_from_checkpoint="checkpoint-12")


@pytest.fixture(scope="module")
def straight_run(tmp_path_factory, digits_cache):
    return run(tmp_path_factory.mktemp("runs") / "straight")


def test_a_checkpoint_that_is_a_link_is_pruned_and_its_target_stays(tmp_path, straight_run):
    shutil.copytree(straight_run, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "checkpoint-4").symlink_to(tmp_path / "elsewhere")
    options = {"max_train_steps": 16, "checkpoints_total_limit": 2, "resume_from_checkpoint": "latest"}
    for steps in (16, 20):
        run(tmp_path / "run", **{**options, "max_train_steps": steps})
    assert list(list_checkpoints(tmp_path / "run")) == [16, 20]
    assert (tmp_path / "elsewhere" / "manifest.json").is_file()


def test_more_steps_may_be_asked_of_a_finished_run(tmp_path, caplog):
    run(tmp_path, lr_scheduler="constant")
    run(tmp_path, lr_scheduler="constant", max_train_steps=20, resume_from_checkpoint="latest")
    run(tmp_path / "straight", lr_scheduler="constant", max_train_steps=20)
    assert differences(tmp_path / "checkpoint-20", tmp_path / "straight" / "checkpoint-20") == []
    assert "changed since checkpoint-12: max_train_steps: saved 12, now 20" in caplog.text
    assert "output_dir" not in caplog.text and "resume_from_checkpoint: " not in caplog.text


def test_the_flags_of_now_are_heeded_and_what_changed_is_told(tmp_path, monkeypatch, caplog):
    run(tmp_path, max_train_steps=4)
    changed = {"learning_rate": 5e-4, "adam_beta1": 0.8, "adam_weight_decay": 0.1, "adam_epsilon": 1e-7}
    groups, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a: (groups.append(self.param_groups[0]), step(self))[1]
    )
    run(tmp_path, max_train_steps=8, resume_from_checkpoint="latest", **changed)
    group = groups[-1]
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.8, 0.999), 0.1, 1e-7)
    assert "changed since checkpoint-4: learning_rate: saved 0.001, now 0.0005" in caplog.text
    assert "changed since checkpoint-4: adam_beta1: saved 0.95, now 0.8" in caplog.text


def test_the_first_step_after_a_resume_has_its_own_learning_rate(tmp_path, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a: (rates.append(self.param_groups[0]["lr"]), step(self, *a))[1]
    )
    run(tmp_path, max_train_steps=4, lr_scheduler="constant")
    rates.clear()
    run(tmp_path, max_train_steps=8, lr_scheduler="linear", lr_warmup_steps=0, resume_from_checkpoint="latest")
    assert rates == pytest.approx([1e-3 * (8 - step) / 8 for step in (4, 5, 6, 7)])


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 3), (3, 1)])
def test_another_accumulation_on_resume_steps_where_it_should(tmp_path, monkeypatch, caplog, before, after):
    run(tmp_path, max_train_steps=5, checkpointing_steps=5, gradient_accumulation_steps=before)
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (steps.append(len(batches)), step(self, *a))[1])
    batches = []
    monkeypatch.setattr(loop, "normalise", lambda x, f=loop.normalise: (batches.append(x), f(x))[1])
    run(tmp_path, max_train_steps=8, gradient_accumulation_steps=after, resume_from_checkpoint="latest")
    assert steps == [after, 2 * after, 3 * after]
    assert f"global_batch: saved {4 * before}, now {4 * after}" in caplog.text
    seen = json.loads((tmp_path / "checkpoint-8" / "metadata.json").read_text())["samples_seen"]
    assert seen == 5 * 4 * before + 3 * 4 * after


def test_epochs_are_counted_in_pictures_whatever_the_batch(tmp_path):
    epochs = {"max_train_steps": None, "num_epochs": 2, "checkpointing_steps": 10, "save_images_steps": 10**6}
    run(tmp_path, **{**epochs, "num_epochs": 1}, train_batch_size=100)
    assert max(list_checkpoints(tmp_path)) == 18  # 1,797 pictures
    run(tmp_path, **epochs, train_batch_size=200, resume_from_checkpoint="latest")
    # 3,594 - 1,800 pictures are left: 9 batches of 200
    assert max(list_checkpoints(tmp_path)) == 18 + 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ddpm_num_steps": 30}, r"ddpm_num_steps: saved 20, now 30$"),
        ({"block_out_channels": [8, 8]}, r"block_out_channels: saved \[8, 16\], now \[8, 8\]$"),
        (
            {"ddpm_num_steps": 30, "prediction_type": "v_prediction", "use_ema": False},
            r"ddpm_num_steps: saved 20, now 30; prediction_type: saved 'epsilon', now 'v_prediction'; "
            r"use_ema: saved True, now False$",
        ),
        ({"split": "train[:50]"}, r"dataset: saved '\w{16}', now '\w{16}'$"),
        ({"resolution": [6]}, r"resolution: saved \[8\], now \[6\]; dataset: saved"),
        ({"seed": 1}, r"seed: saved 0, now 1$"),
        ({"class_conditional": True}, r"class_conditional: saved False, now True; dataset: saved"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_run_is_refused_and_the_settings_listed(tmp_path, changes, message):
    run(tmp_path, max_train_steps=4)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="checkpoint-4 belongs to a run with other settings: " + message):
        run(tmp_path, **changes, resume_from_checkpoint="latest")
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


# Several processes

EVERYWHERE = {**RANDOM, "logging_steps": 1, "validation_split": "train[90%:]", "class_conditional": True}
IMPORTANCE = {"timestep_sampling": "importance", "loss_type": "vlb", "ddpm_num_steps": 4, "train_batch_size": 16}


def assert_the_same_run(one, other, tolerance=1e-5):
    for line, twin in zip(metrics(one), metrics(other), strict=True):
        levels, twin_levels = (each.pop("loss_by_timestep", []) for each in (line, twin))
        assert line == pytest.approx(twin, rel=tolerance)
        for level, twin_level in zip(levels, twin_levels, strict=True):
            assert level == (None if twin_level is None else pytest.approx(twin_level, rel=tolerance))


@needs_forkserver
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(EVERYWHERE, id="all chance"),
        pytest.param({**IMPORTANCE, "logging_steps": 1}, marks=pytest.mark.slow, id="importance"),
    ],
)
def test_processes_instead_of_accumulation_are_the_same_run(tmp_path, changes):
    run(tmp_path / "1 x 4", **changes | {"gradient_accumulation_steps": 4})
    run_on_processes(2, tmp_path / "2 x 2", **changes | {"gradient_accumulation_steps": 2})
    assert_the_same_run(tmp_path / "1 x 4", tmp_path / "2 x 2")
    one, two = (state(tmp_path / name / "checkpoint-12") for name in ("1 x 4", "2 x 2"))
    for name, value in one.items():
        if name.startswith(("unet", "ema", "timestep_sampler")):
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


@needs_forkserver
def test_another_number_of_processes_goes_on_with_the_same_run(tmp_path, monkeypatch):
    run(tmp_path / "straight", **EVERYWHERE)
    run_killed_at(monkeypatch, 6, tmp_path / "moved", **EVERYWHERE)
    two = {"gradient_accumulation_steps": 1, "resume_from_checkpoint": "latest"}
    run_on_processes(2, tmp_path / "moved", **EVERYWHERE | two | {"max_train_steps": 12})
    assert_the_same_run(tmp_path / "straight", tmp_path / "moved")


@needs_forkserver
def test_two_processes_resume_to_the_bit(tmp_path):
    # What depends on the length of the run is constant, since the first part is a run of 7 steps.
    constant = {"lr_scheduler": "constant", "augment_share": 0.0}
    changes = {**EVERYWHERE, **IMPORTANCE, "gradient_accumulation_steps": 1, **constant}
    run_on_processes(2, tmp_path / "straight", **changes)
    run_on_processes(2, tmp_path / "interrupted", **changes | {"max_train_steps": 7})
    run_on_processes(2, tmp_path / "interrupted", **changes, resume_from_checkpoint="latest")
    assert differences(tmp_path / "straight" / "checkpoint-12", tmp_path / "interrupted" / "checkpoint-12") == []


# The end before the end


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_step_saves_and_leaves(tmp_path, monkeypatch, caplog, number):
    draw = loop.draw

    def draw_and_signal(seed, step, positions, *arguments):
        if step == 6 and positions.start == 0:
            os.kill(os.getpid(), number)
        return draw(seed, step, positions, *arguments)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "draw", draw_and_signal)
        run(tmp_path / "stopped", **RANDOM)
    assert signal.getsignal(number) == before
    assert list(list_checkpoints(tmp_path / "stopped")) == [4, 7]
    assert f"stopped at step 7: received {number.name}. Resume with --resume_from_checkpoint latest" in caplog.text
    # The pictures so far can be looked at, with the averaged weights, and the card says how far it came.
    unet = CustomDDPMPipeline.from_pretrained(tmp_path / "stopped").unet
    averages = state(tmp_path / "stopped" / "checkpoint-7")
    assert all(torch.equal(value, averages[f"ema/{name}"]) for name, value in unet.state_dict().items())
    assert "7 optimiser steps" in (tmp_path / "stopped" / "README.md").read_text()
    run(tmp_path / "stopped", **RANDOM, resume_from_checkpoint="latest")
    run(tmp_path / "straight", **RANDOM)
    assert differences(tmp_path / "stopped" / "checkpoint-12", tmp_path / "straight" / "checkpoint-12") == []


def test_the_echo_of_a_launcher_does_not_end_the_process_before_it_has_saved(tmp_path, monkeypatch):
    """Ctrl-C comes to all processes, and torch's launcher sends it on to those that have it already."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    draw = loop.draw

    def draw_and_signal(seed, step, *arguments):
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return draw(seed, step, *arguments)

    monkeypatch.setattr(loop, "draw", draw_and_signal)
    run(tmp_path)
    assert max(list_checkpoints(tmp_path)) == 7


def test_an_ignored_hangup_stays_ignored(tmp_path, monkeypatch):
    """As `nohup` starts programs."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        draw = loop.draw
        monkeypatch.setattr(loop, "draw", lambda *a: (os.kill(os.getpid(), signal.SIGHUP), draw(*a))[1])
        run(tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert max(list_checkpoints(tmp_path)) == 12


def test_time_is_over(tmp_path, caplog):
    run(tmp_path, max_train_time=1e-9)
    assert list(list_checkpoints(tmp_path)) == [1]
    assert "stopped at step 1: the limit of --max_train_time was reached" in caplog.text
    run(tmp_path, resume_from_checkpoint="latest", max_train_time=1000.0)
    assert max(list_checkpoints(tmp_path)) == 12


def test_a_run_whose_launcher_is_gone_saves_and_stops(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    parents = itertools.chain([77] * 6, itertools.repeat(1))
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    run(tmp_path)
    assert "its launcher has ended" in caplog.text
    assert max(list_checkpoints(tmp_path)) < 12


def test_a_run_that_nobody_launched_does_not_care_for_its_parent(tmp_path, monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    parents = itertools.chain([77] * 6, itertools.repeat(1))
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    run(tmp_path)
    assert max(list_checkpoints(tmp_path)) == 12


def test_no_thread_and_no_signal_handler_is_left_by_a_run_that_fails(tmp_path, monkeypatch):
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    run_killed_at(monkeypatch, 2, tmp_path)
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]


# Gradients that are not finite


@pytest.fixture
def poison(monkeypatch):
    """Makes the loss of the first picture of chosen steps not finite."""

    def poison(steps, value=float("nan")):
        now, draw, loss = [0], loop.draw, parts.diffusion_loss

        def note_step(seed, step, *arguments):
            now[0] = step
            return draw(seed, step, *arguments)

        def poisoned(*arguments, **options):
            losses = loss(*arguments, **options)
            if now[0] in steps:
                losses = losses * torch.tensor([value] + [1.0] * (len(losses) - 1))
            return losses

        monkeypatch.setattr(loop, "draw", note_step)
        monkeypatch.setattr(parts, "diffusion_loss", poisoned)

    return poison


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_weights_and_optimizer_alone(tmp_path, poison, value):
    poison({6}, value)
    run(tmp_path, checkpointing_steps=1, logging_steps=1, max_train_steps=8)
    assert_the_seventh_of_eight_steps_was_left_out(tmp_path)


def test_a_poisoned_importance_sampler_recovers(tmp_path, poison):
    poison({1, 2})
    run(tmp_path, timestep_sampling="importance", loss_type="vlb", ddpm_num_steps=4, train_batch_size=16)
    assert all(torch.isfinite(tensor).all() for tensor in state(tmp_path / "checkpoint-12").values())


def test_fp16_skips_and_goes_on(tmp_path, poison, fp16_on_cpu):
    poison({6})
    run(tmp_path, mixed_precision="fp16", checkpointing_steps=1, logging_steps=1)
    assert torch.equal(
        state(tmp_path / "checkpoint-6")["unet/conv_in.weight"],
        state(tmp_path / "checkpoint-7")["unet/conv_in.weight"],
    )
    assert [line["skipped_steps"] for line in metrics(tmp_path)][6] == 1


def test_a_run_without_future_ends_and_names_the_last_good_checkpoint(tmp_path, poison, monkeypatch):
    monkeypatch.setattr(run_module, "MAX_SKIPPED_STEPS", 5)
    poison(set(range(6, 100)))
    with pytest.raises(FloatingPointError, match=r"up to step 12; the last good checkpoint is .*checkpoint-8; lower"):
        run(tmp_path, max_train_steps=100, logging_steps=12)
    assert find_checkpoint(tmp_path)[0].name == "checkpoint-8"


def test_now_and_then_is_not_in_a_row(tmp_path, poison, monkeypatch):
    monkeypatch.setattr(run_module, "MAX_SKIPPED_STEPS", 3)
    poison({0, 1, 3, 4, 6, 7})
    run(tmp_path, logging_steps=1)
    assert sum(line["skipped_steps"] for line in metrics(tmp_path)) == 6


def test_out_of_memory_names_what_lowers_it(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(parts, "diffusion_loss", full)
    with pytest.raises(MemoryError) as caught:
        run(tmp_path)
    for part in ("--train_batch_size 4 at 8x8", "--gradient_accumulation_steps", "--gradient_checkpointing", "bf16"):
        assert part in str(caught.value)


# Validation


def test_validation_loss_is_the_mean_over_the_held_out_pictures_with_fixed_noise(tmp_path):
    held_out = {"split": "train[:90%]", "validation_split": "train[90%:]"}
    run(tmp_path, **held_out, save_images_steps=6, train_batch_size=50, dropout=0.3)
    told = [line for line in metrics(tmp_path) if "validation_loss" in line]
    assert [line["step"] for line in told] == [6, 12]
    pipeline = CustomDDPMPipeline.from_pretrained(tmp_path)
    images, _ = open_images(dataset_name=DIGITS, split="train[90%:]", resolution=8).take(10**6)
    assert len(images) == 180
    losses = []
    for i, image in enumerate(images):
        noise = draw(0, 0, range(i, i + 1), image.shape, CPU).noise
        t = math.floor((i + 0.5) / 180 * 20)
        a = pipeline.scheduler.alphas_cumprod[t]
        with torch.no_grad():
            output = pipeline.unet(a.sqrt() * (image / 127.5 - 1) + (1 - a).sqrt() * noise, t).sample
        losses.append((output - noise).square().mean().item())
    assert told[-1]["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.slow
def test_two_runs_are_validated_alike_and_it_leaves_no_trace(tmp_path):
    held_out = {"split": "train[:90%]", "validation_split": "train[90%:]", "save_images_steps": 3}
    run(tmp_path / "looked at", **held_out, **RANDOM)
    run(tmp_path / "not", split="train[:90%]", **RANDOM)
    assert differences(tmp_path / "looked at" / "checkpoint-12", tmp_path / "not" / "checkpoint-12") == []
    # A learning rate of next to nothing: all seeds start from the prediction 0, and so have one validation loss.
    values = []
    for seed in (1, 2):
        run(tmp_path / str(seed), seed=seed, learning_rate=1e-30, **held_out)
        values += [line["validation_loss"] for line in metrics(tmp_path / str(seed)) if "validation_loss" in line]
    assert values == pytest.approx([values[0]] * 8, rel=1e-6)


def test_the_limit_of_checkpoints_leaves_the_best_and_the_last(tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 0.5, 5.0, 4.0, 4.0])  # of steps 2, 4, 6, 8, 9; 10, 12. Step 8 has no checkpoint
    monkeypatch.setattr(preview, "validation_loss", lambda *arguments: next(losses))
    held_out = {"split": "train[:90%]", "validation_split": "train[90%:]", "save_images_steps": 2}
    monkeypatch.setattr(preview, "sample_images", lambda *a, **k: torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    left = []
    save = run_module.save_checkpoint
    monkeypatch.setattr(
        run_module, "save_checkpoint", lambda *a, **k: (save(*a, **k), left.append(list(list_checkpoints(tmp_path))))
    )
    run(tmp_path, **held_out, checkpointing_steps=3, checkpoints_total_limit=1, max_train_steps=9)
    assert left == [[3], [6], [6, 9]]
    run(tmp_path, **held_out, checkpoints_total_limit=1, resume_from_checkpoint="latest")
    assert left[3:] == [[6, 12]]


# Model and scheduler of a run


def test_attention_where_a_level_sees_16_pixels_or_less():
    data = open_images(dataset_name=DIGITS, resolution=(8, 40))
    config = tiny("unused", block_out_channels=[8, 8, 8])
    assert build_unet(config, data).config.down_block_types == ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D")
    assert build_unet(config, data).config.up_block_types == ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")
    config.down_block_types = ["AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]
    assert build_unet(config, data).config.up_block_types == ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D")


def test_channels_and_classes_follow_the_data():
    data = open_images(dataset_name=DIGITS, resolution=8, image_mode="RGB", class_conditional=True)
    learned = tiny("unused", variance_type="learned_range", loss_type="hybrid", class_conditional=True)
    unet = build_unet(learned, data).config
    assert (unet.in_channels, unet.out_channels, unet.num_class_embeds, unet.sample_size) == (3, 6, 11, 8)
    learned.label_dropout = 0.0
    assert build_unet(learned, data).config.num_class_embeds == 10


def configured(config_file):
    config = before_data(parse_config(["--config", str(config_file)]))
    side = config.resolution[0] if config.resolution else 28
    return complete(config, Facts(side, side, 10, "cpu"))


def parameters(config_file, channels=3):
    config = configured(config_file)
    size = {"height": config.resolution[0], "width": config.resolution[-1], "channels": channels}
    id2label = dict.fromkeys(range(10)) if config.class_conditional else None
    with torch.device("meta"):
        unet = build_unet(config, types.SimpleNamespace(**size, id2label=id2label))
    build_scheduler(config)
    return sum(p.numel() for p in unet.parameters())


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_builds_its_model(file):
    assert 5e5 < parameters(file) < 4e7


def test_the_recipe_of_the_paper_is_that_of_the_paper():
    """Ho et al. 2020, appendix B: 35.7 million parameters; β from 0.0001 to 0.02, σ² = β; Adam, 2e-4, EMA 0.9999."""
    file = ROOT / "examples" / "configs" / "ddpm_cifar10.yaml"
    stock = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
    )
    assert parameters(file) == sum(p.numel() for p in stock.parameters()) == 35_746_307
    config = configured(file)
    scheduler = build_scheduler(config)
    assert (scheduler.betas[0].item(), scheduler.betas[-1].item(), len(scheduler)) == pytest.approx((1e-4, 0.02, 1000))
    parameter = torch.nn.Parameter(torch.zeros(()))
    ema = parts.build_ema(config, [parameter])
    decays = [ema.get_decay(step) for step in (2, 3, 1000, 800_000)]
    assert decays == [0.9999] * 4


@pytest.mark.parametrize("T", [1000, 100, 4000])
def test_a_linear_schedule_ends_in_noise_for_every_T(T):
    scheduler = build_scheduler(tiny("unused", ddpm_num_steps=T))
    assert len(scheduler.alphas_cumprod) == T
    # That of T = 1000, where the range of β was chosen.
    assert math.log(scheduler.alphas_cumprod[-1]) == pytest.approx(-10.1, abs=0.2)
    assert scheduler.alphas_cumprod[T // 2].item() == pytest.approx(0.078, abs=0.01)


def test_a_run_begins_from_a_saved_pipeline(tmp_path):
    run(tmp_path / "first", **RANDOM)
    weights = CustomDDPMPipeline.from_pretrained(tmp_path / "first").unet.state_dict()
    run(
        tmp_path / "second",
        **RANDOM,
        init_from=str(tmp_path / "first"),
        learning_rate=1e-30,
        adam_weight_decay=0.0,
    )
    unet = CustomDDPMPipeline.from_pretrained(tmp_path / "second").unet
    assert unet.config.block_out_channels == [8, 16]
    for name, value in unet.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_mode": "RGB"}, "its in_channels is 1, these pictures and flags need 3"),
        ({"class_conditional": True}, "its num_class_embeds is None, these pictures and flags need 11"),
        ({"ddpm_num_steps": 10}, "--ddpm_num_steps is 10; the model of --init_from has 20"),
        ({"prediction_type": "sample"}, "--prediction_type is 'sample'; .* has 'epsilon'"),
    ],
)
def test_a_pipeline_that_does_not_fit_is_refused(tmp_path, changes, message):
    run(tmp_path / "first", max_train_steps=1)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "second", init_from=str(tmp_path / "first"), **changes)


def test_a_stream_must_be_told_its_steps(tmp_path):
    with pytest.raises(ValueError, match="--max_train_steps is needed with --streaming"):
        run(tmp_path, streaming=True, max_train_steps=None)


# Precision and memory


@pytest.mark.parametrize(
    "changes",
    # Dropout draws in the order of the memory, which channels_last changes.
    [{"gradient_checkpointing": True}, {"channels_last": True, "dropout": 0.0}],
    ids=["gradient_checkpointing", "channels_last"],
)
def test_what_saves_memory_or_time_changes_no_number_beyond_rounding(tmp_path, changes):
    changes = {**RANDOM, **changes}
    run(tmp_path / "plain", **RANDOM | {"dropout": changes["dropout"]})
    run(tmp_path / "other", **changes)
    plain, other = state(tmp_path / "plain" / "checkpoint-12"), state(tmp_path / "other" / "checkpoint-12")
    for name, value in plain.items():
        if name.startswith("unet"):
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-4)


@pytest.fixture
def fp16_on_cpu(monkeypatch):
    """accelerate leaves fp16 out on a CPU, where torch has it: what it sets up on a GPU, set up here."""

    class WithScaler(parts.Accelerator):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu")

    monkeypatch.setattr(parts, "Accelerator", WithScaler)


def trains_like_single_precision(tmp_path, precision):
    # A rate that half precision has the digits for.
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("no", precision)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]
    # Weights, averages and the optimiser's moments are kept in single precision.
    assert {v.dtype for k, v in state(tmp_path / precision / "checkpoint-12").items() if "/" in k} <= {torch.float32}
    assert CustomDDPMPipeline.from_pretrained(tmp_path / precision).unet.dtype == torch.float32


def test_bf16_trains_like_single_precision(tmp_path):
    run(tmp_path / "no", logging_steps=1)
    run(tmp_path / "bf16", logging_steps=1, mixed_precision="bf16")
    trains_like_single_precision(tmp_path, "bf16")


def test_fp16_trains_like_single_precision(tmp_path, monkeypatch, fp16_on_cpu):
    run(tmp_path / "fp16", logging_steps=1, mixed_precision="fp16")
    monkeypatch.undo()
    run(tmp_path / "no", logging_steps=1)
    trains_like_single_precision(tmp_path, "fp16")


def test_fp16_resumes_to_the_bit_with_the_scale_of_its_losses(tmp_path, monkeypatch, fp16_on_cpu):
    run(tmp_path / "straight", mixed_precision="fp16", **RANDOM)
    run_killed_at(monkeypatch, 6, tmp_path / "killed", mixed_precision="fp16", **RANDOM)
    run(tmp_path / "killed", mixed_precision="fp16", **RANDOM, resume_from_checkpoint="latest")
    assert differences(tmp_path / "straight" / "checkpoint-12", tmp_path / "killed" / "checkpoint-12") == []
    scalers = [find_checkpoint(tmp_path / name)[1]["scaler"] for name in ("straight", "killed")]
    assert scalers[0] == scalers[1] and scalers[0]["_growth_tracker"] == 12


def test_fp16_that_would_be_single_precision_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--mixed_precision is fp16, which is not supported for training on a CPU"):
        run(tmp_path, mixed_precision="fp16")


@pytest.mark.slow
def test_a_compiled_run_goes_on_uncompiled_and_the_other_way(tmp_path, monkeypatch):
    """Compiled by dynamo alone: what its backend makes of the graph is not the question here."""
    compiled = []
    monkeypatch.setattr(
        build.CustomUNet2DModel,
        "compile",
        lambda self, **options: (
            compiled.append(self),
            torch.nn.Module.compile(self, backend="eager", **options),
        ),
    )
    run(tmp_path / "plain")
    for first, then in [(True, False), (False, True)]:
        folder = tmp_path / f"compiled first {first}"
        run_killed_at(monkeypatch, 6, folder, torch_compile=first)
        run(folder, torch_compile=then, resume_from_checkpoint="latest")
        one, other = state(tmp_path / "plain" / "checkpoint-12"), state(folder / "checkpoint-12")
        assert one.keys() == other.keys()
        for name, value in one.items():
            if name.startswith("unet"):
                torch.testing.assert_close(other[name], value, rtol=0, atol=1e-4)
        assert CustomDDPMPipeline.from_pretrained(folder)
    assert len(compiled) == 2


@pytest.mark.parametrize("name", ['");import os;("', "\x1b[31mred", "back\\slash", "x" * 10**6, "数字"])
def test_the_closing_words_print_python_that_means_the_names(name, tmp_path):
    folder = tmp_path / 'a "quoted" folder'
    ended = types.SimpleNamespace(output_dir=folder, data=types.SimpleNamespace(id2label={0: name}))
    words = run_module._final_message(ended)
    assert len(words) < 2000 and all(line.isprintable() for line in words.splitlines())
    lines = [line.strip() for line in words.splitlines() if line.strip().startswith("pipeline")]
    texts = [node.value for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.Constant)]
    assert texts.count(str(folder)) == 2 and (name if len(name) < 100 else 0) in texts
