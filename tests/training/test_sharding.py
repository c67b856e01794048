"""custom_ddpm/sharding.py and state.py: a model that FSDP splits is trained, saved and resumed as one that is whole."""

import types

import datasets
import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from runs import (
    RANDOM,
    assert_the_seventh_of_eight_steps_was_left_out,
    differences,
    metrics,
    needs_forkserver,
    on_processes,
    run,
    run_on_processes,
    run_split,
    split,
    state,
)
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from custom_ddpm.training import build, loop, parts
from custom_ddpm.training import state as state_module
from custom_ddpm.training.checkpoint import find_checkpoint, list_checkpoints
from custom_ddpm.training.sharding import check_strategy

pytestmark = [
    pytest.mark.usefixtures("digits_cache"),
    needs_forkserver,
    pytest.mark.skipif(torch.__version__ < (2, 8), reason="torch 2.6 has FSDP for GPUs only"),
]

BLOCKS = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
# Grids and validation in the middle, and a last batch of the held-out pictures that one process has no part in.
CHANGES = {
    **RANDOM,
    "logging_steps": 1,
    "save_images_steps": 5,
    "posthoc_ema_steps": 5,
    "validation_split": "train[90%:]",
    "gradient_accumulation_steps": 2,
}


def assert_the_same(one, other, weights=1e-5, losses=1e-6):
    for line, twin in zip(metrics(one), metrics(other), strict=True):
        for name in {"loss", "validation_loss", "grad_norm"} & line.keys():
            assert line[name] == pytest.approx(twin[name], rel=losses), (line["step"], name)
    for step in list_checkpoints(one):
        states = [state(folder / f"checkpoint-{step}") for folder in (one, other)]
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            torch.testing.assert_close(states[1][name], value, rtol=0, atol=weights, msg=f"{name} at step {step}")
    # What is saved as the pipeline is the average, in single precision.
    assert (one / "unet" / "config.json").read_text() == (other / "unet" / "config.json").read_text()
    for folder in (one, other):
        saved = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        averages = load_file(folder / "checkpoint-12" / "ema.safetensors")
        assert saved.keys() == averages.keys()
        assert all(value.dtype == torch.float32 and torch.equal(value, averages[name]) for name, value in saved.items())


@pytest.fixture
def cache():
    return str(datasets.config.HF_DATASETS_CACHE)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, digits_cache):
    """A run on two processes with the whole model on each."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    run_on_processes(2, folder, **CHANGES)
    return folder


@pytest.mark.parametrize(
    "plugin",
    [
        BLOCKS,
        pytest.param(
            {**BLOCKS, "cpu_ram_efficient_loading": True, "reshard_after_forward": False}, marks=pytest.mark.slow
        ),
        pytest.param(
            {**BLOCKS, "transformer_cls_names_to_wrap": ["ResidualBlock", "SelfAttention"]}, marks=pytest.mark.slow
        ),
    ],
    ids=["by block", "loaded by one process", "by layer"],
)
def test_a_split_run_is_the_run(tmp_path, straight, plugin):
    run_split(2, tmp_path / "split", plugin, **CHANGES)
    assert_the_same(straight, tmp_path / "split")


def watched(output_dir, cache, changes):
    """Train, and tell what of the model lay on this process at the end."""
    average, seen = build.TrainingState.step_averages, {}

    def step_averages(self):
        average(self)
        weights, moments = list(self.unet.parameters()), [v for s in self.optimizer.state.values() for v in s.values()]
        seen["split"] = all(isinstance(w, DTensor) for w in weights)
        seen["units"] = {name for name, module in self.unet.named_modules() if isinstance(module, FSDPModule)}
        seen["weights"] = sum(w.to_local().numel() for w in weights) / sum(w.numel() for w in weights)
        seen["moments"] = sum(m.to_local().numel() for m in moments if isinstance(m, DTensor))
        seen["averages"] = sum(a.numel() for a in self.ema.shadow_params)
        seen["all"] = sum(w.numel() for w in weights)

    backward = build.Accelerator.backward

    def backward_and_look(self, loss):
        backward(self, loss)
        gradients = [w.grad for model in self._models for w in model.parameters()]
        seen.setdefault("gradients", []).append({(type(g), None if g is None else g.dtype) for g in gradients})

    build.Accelerator.backward = backward_and_look
    build.TrainingState.step_averages = step_averages
    split(BLOCKS, cache, output_dir, changes)
    assert seen["split"]
    assert seen["units"] >= {"", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"}
    assert 0.4 < seen["weights"] < 0.6
    assert 0.8 * seen["all"] < seen["moments"] < 1.2 * seen["all"]  # two moments of half the weights
    assert 0.4 * seen["all"] < seen["averages"] < 0.6 * seen["all"]
    assert seen["gradients"] == [{(DTensor, torch.float32)}] * 2


def test_each_of_two_processes_has_half_of_weights_gradients_moments_and_averages(tmp_path, cache):
    changes = {"max_train_steps": 1, "gradient_accumulation_steps": 2, "mixed_precision": "bf16"}
    on_processes(2, watched, tmp_path, cache, changes)


@pytest.mark.slow
def test_a_split_run_resumes_to_the_bit_and_goes_on_whole(tmp_path):
    changes = {**CHANGES, "lr_scheduler": "constant"}
    run_split(2, tmp_path / "straight", BLOCKS, **changes)
    run_split(2, tmp_path / "resumed", BLOCKS, **changes | {"max_train_steps": 6})
    run_split(2, tmp_path / "resumed", BLOCKS, **changes, resume_from_checkpoint="latest")
    assert differences(tmp_path / "straight" / "checkpoint-12", tmp_path / "resumed" / "checkpoint-12") == []
    lines = [[line for line in metrics(tmp_path / name) if "loss" in line] for name in ("straight", "resumed")]
    assert lines[0] == lines[1]
    # Whole on one process, then split, then whole on two.
    run(tmp_path / "moved", **changes | {"max_train_steps": 4, "gradient_accumulation_steps": 4})
    run_split(2, tmp_path / "moved", BLOCKS, **changes | {"max_train_steps": 8}, resume_from_checkpoint="latest")
    run_on_processes(2, tmp_path / "moved", **changes, resume_from_checkpoint="latest")
    one, other = (metrics(tmp_path / name)[-1]["validation_loss"] for name in ("straight", "moved"))
    assert one == pytest.approx(other, rel=1e-5)
    states = [state(tmp_path / name / "checkpoint-12") for name in ("straight", "moved")]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "weights", "losses"),
    [
        pytest.param(
            {"timestep_sampling": "importance", "loss_type": "vlb", "ddpm_num_steps": 4},
            1e-4,
            1e-4,
            marks=pytest.mark.slow,
        ),
        ({"gradient_checkpointing": True, "channels_last": True, "dropout": 0.0}, 1e-5, 1e-5),
        # FSDP adds the gradients of the processes in half precision.
        ({"mixed_precision": "bf16", "gradient_accumulation_steps": 2}, 2e-3, 2e-2),
        pytest.param({"torch_compile": True}, 1e-4, 1e-4, marks=pytest.mark.slow),
    ],
    ids=["importance", "memory", "bf16", "compiled"],
)
def test_a_split_run_with(tmp_path, changes, weights, losses):
    changes = {"logging_steps": 1, "class_conditional": True, "save_images_steps": 5, **changes}
    run_on_processes(2, tmp_path / "whole", **changes | {"torch_compile": False})
    run_split(2, tmp_path / "split", BLOCKS, **changes)
    assert_the_same(tmp_path / "whole", tmp_path / "split", weights, losses)
    tensors = state(tmp_path / "split" / "checkpoint-12").values()
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} <= {torch.float32, torch.float64}


def poisoned(output_dir, cache, changes):
    """Train, with a loss that is not a number on the second process in step 6."""
    draw, loss, now = loop.draw, parts.diffusion_loss, []

    def note(seed, step, positions, *arguments):
        now[:] = [step, positions.start]
        return draw(seed, step, positions, *arguments)

    loop.draw = note
    parts.diffusion_loss = lambda *a, **k: loss(*a, **k) * (float("nan") if now == [6, 4] else 1.0)
    split(BLOCKS, cache, output_dir, changes)


def test_a_step_that_is_not_finite_on_one_process_is_left_out_by_all(tmp_path, cache):
    on_processes(2, poisoned, tmp_path, cache, {"checkpointing_steps": 1, "logging_steps": 1, "max_train_steps": 8})
    assert_the_seventh_of_eight_steps_was_left_out(tmp_path)


def test_a_split_run_in_fp16_trains_and_resumes_to_the_bit(tmp_path):
    changes = {"logging_steps": 1, "lr_scheduler": "constant", "mixed_precision": "fp16"}
    run(tmp_path / "whole", **changes | {"mixed_precision": "no", "gradient_accumulation_steps": 2})
    run_split(2, tmp_path / "straight", BLOCKS, **changes)
    run_split(2, tmp_path / "resumed", BLOCKS, **changes | {"max_train_steps": 6})
    run_split(2, tmp_path / "resumed", BLOCKS, **changes, resume_from_checkpoint="latest")
    assert differences(tmp_path / "straight" / "checkpoint-12", tmp_path / "resumed" / "checkpoint-12") == []
    assert find_checkpoint(tmp_path / "resumed")[1]["scaler"]["_growth_tracker"] == 12
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("whole", "straight")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def short_of_disk(output_dir, cache, changes):
    """Train, and find the disk full in the middle of the second checkpoint."""
    save_file = state_module.save_file

    def full(tensors, file):
        if "checkpoint-8" in str(file) and file.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")
        save_file(tensors, file)

    state_module.save_file = full
    with pytest.raises(OSError, match=r"could not save checkpoint-8 .* No space left on device"):
        split(BLOCKS, cache, output_dir, changes)


def test_a_full_disk_ends_all_processes(tmp_path, cache):
    on_processes(2, short_of_disk, tmp_path, cache, {})
    assert list(list_checkpoints(tmp_path)) == [4]


@pytest.mark.parametrize(
    ("kind", "plugin", "message"),
    [
        ("DEEPSPEED", {}, "set up for DEEPSPEED, which is not supported; .* set it up for FSDP"),
        ("MEGATRON_LM", {}, "set up for MEGATRON_LM, which is not supported"),
        ("FSDP", {"fsdp_version": 1}, "fsdp_version is 1; it must be 2"),
        ("FSDP", {"cpu_offload": True}, "fsdp_offload_params is true; it must be false"),
        ("FSDP", {"activation_checkpointing": True}, "fsdp_activation_checkpointing is true; .* --gradient_checkpoint"),
        ("FSDP", {"auto_wrap_policy": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP"),
        ("FSDP", {}, "fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP"),
    ],
)
def test_what_is_not_supported_is_refused(kind, plugin, message):
    settings = types.SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **plugin}))
    with pytest.raises(ValueError, match=message):
        check_strategy(types.SimpleNamespace(distributed_type=DistributedType[kind], state=settings))


@pytest.mark.parametrize("enabled", ["tp_enabled", "cp_enabled"])
def test_processes_that_share_a_batch_are_refused(enabled):
    parallelism = types.SimpleNamespace(**{"tp_enabled": False, "cp_enabled": False, enabled: True})
    accelerator = types.SimpleNamespace(distributed_type=DistributedType.FSDP, parallelism_config=parallelism)
    with pytest.raises(ValueError, match="tensor or context parallelism, which is not supported; use FSDP"):
        check_strategy(accelerator)


def test_fsdp_on_a_cpu_is_refused_and_not_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="set up for FSDP, which works only on GPUs"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()
