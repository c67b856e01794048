"""The recipes: given settings stay, all others get values that fit, and the presets are what they are named after."""

import dataclasses
import inspect
from pathlib import Path

import pytest
import yaml

from custom_ddpm.config import TrainingConfig
from custom_ddpm.recipe import AFTER_LENGTH, RECIPES, Facts, before_data, complete, complete_length
from custom_ddpm.training.build import DECAY

CHOSEN = [spec.name for spec in dataclasses.fields(TrainingConfig) if spec.metadata["by_recipe"]]
DIGITS = Facts(8, 8, 10, "cpu")
PHOTOS = Facts(64, 96, None, "cuda")


def completed(facts=DIGITS, steps=1000, **given):
    return complete_length(complete(before_data(TrainingConfig(**given)), facts), steps)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("facts", [DIGITS, PHOTOS, Facts(28, 28, 10, "cpu"), Facts(1, 3, 2, "mps")])
def test_nothing_is_left_open(recipe, facts):
    config = completed(facts, recipe=recipe)
    assert [name for name in CHOSEN if getattr(config, name) is None] == []
    assert any(value is not None for value in (config.time_budget, config.max_train_steps, config.num_epochs))
    assert TrainingConfig(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_given_stays(recipe):
    given = {
        "resolution": [24],
        "class_conditional": False,
        "patch_size": 2,
        "block_out_channels": [48, 48],
        "norm_num_groups": 4,
        "learning_rate": 0.5,
        "lr_warmup_steps": 0,
        "max_train_steps": 7,
        "channels_last": True,
    }
    config = completed(recipe=recipe, **given)
    assert {name: getattr(config, name) for name in given} == given
    assert config.num_epochs is None and config.time_budget is None


def test_labels_and_size_are_those_of_the_pictures():
    config = completed()
    assert (config.resolution, config.class_conditional, config.guidance_scale) == ([8], True, 1.5)
    config = completed(PHOTOS)
    assert (config.resolution, config.class_conditional, config.guidance_scale) == ([64, 96], False, 1.0)
    assert completed(label_dropout=0.0).guidance_scale == 1.0


@pytest.mark.parametrize(
    ("side", "device", "patch", "channels"),
    [
        (8, "cpu", 1, [32, 64]),
        (28, "cpu", 1, [16, 32, 64]),
        (32, "cpu", 1, [16, 32, 64]),
        (64, "cpu", 2, [48, 48, 64]),
        (64, "cuda", 2, [128, 256, 256]),
    ],
)
def test_the_first_level_has_32_positions_a_side_at_most(side, device, patch, channels):
    config = completed(Facts(side, side, None, device))
    assert (config.patch_size, config.block_out_channels) == (patch, channels)


@pytest.mark.parametrize(
    ("device", "sharded", "optimizer"), [("cpu", False, "muon"), ("cpu", True, "adamw"), ("cuda", False, "adamw")]
)
def test_muon_where_it_was_measured_and_weights_are_whole(device, sharded, optimizer):
    assert completed(Facts(32, 32, None, device, sharded)).optimizer == optimizer


@pytest.mark.parametrize(("number", "few"), [(300, True), (999, True), (1000, False), (None, False)])
def test_few_pictures_are_augmented_and_trained_on_with_dropout(number, few):
    facts = Facts(32, 32, None, "cpu", num_images=number)
    config, stock = completed(facts), completed(facts, recipe="stock")
    assert (config.dropout, config.augment_share) == ((0.1, 0.6) if few else (0.0, 0.0))
    assert (stock.dropout, stock.augment_share) == (0.0, 0.0)


def test_pictures_are_augmented_as_long_as_the_learning_rate_is_constant():
    assert completed(Facts(32, 32, None, "cpu", num_images=300)).augment_share == 1 - DECAY


def test_the_length_of_the_run_gives_warm_up_grids_and_checkpoints():
    config = completed(steps=2001)
    assert [getattr(config, name) for name in AFTER_LENGTH] == [101, 167, 201]


def test_stock_is_the_stock_script():
    """The defaults of the argument parser of diffusers' `train_unconditional.py` (0.42), but not its network."""
    config = completed(recipe="stock")
    found = (config.train_batch_size, config.learning_rate, config.adam_beta1, config.lr_warmup_steps)
    assert found == (16, 1e-4, 0.95, 500)
    assert (config.num_epochs, config.resolution, config.ddpm_beta_schedule) == (100, [64], "linear")
    assert (config.prediction_type, config.checkpointing_steps, config.patch_size) == ("epsilon", 500, 1)


def test_ddpm_is_the_paper():
    config = completed(recipe="ddpm")
    assert (config.block_out_channels, config.layers_per_block) == ([128, 256, 256, 256], 2)
    assert (config.train_batch_size, config.learning_rate, config.dropout) == (128, 2e-4, 0.1)
    assert config.num_epochs * 50_000 / 128 == pytest.approx(800_000)
    # The configuration in examples/, which has all of it in full.
    file = Path(__file__).parent.parent / "examples" / "configs" / "ddpm_cifar10.yaml"
    config = completed(Facts(32, 32, None, "cuda"), 800_000, recipe="ddpm")
    others = {"dataset_name", "output_dir", "random_flip", "max_train_steps", "checkpoints_total_limit"}
    expected = {name: value for name, value in yaml.safe_load(file.read_text()).items() if name not in others}
    found = {name: getattr(config, name) for name in expected}
    assert found == {**expected, "resolution": [32]}


def test_every_rule_names_a_setting():
    for rules in RECIPES.values():
        assert set(rules) <= set(inspect.signature(TrainingConfig).parameters)
    with pytest.raises(ValueError, match="--recipe is 'best'; it must be one of default, stock, ddpm"):
        TrainingConfig(recipe="best")
    with pytest.raises(ValueError, match="--time_budget is 3; it chooses the number of steps: leave out --num_epochs"):
        TrainingConfig(time_budget=3, num_epochs=2)
