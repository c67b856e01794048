import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from diffusers.optimization import SchedulerType

from custom_ddpm.config import GROUPS, TrainingConfig
from custom_ddpm.flags import make_parser, parse_config
from custom_ddpm.scheduler import PREDICTION_TYPES, VARIANCE_TYPES
from custom_ddpm.schedules import BETA_SCHEDULES

ROOT = Path(__file__).parents[1]


def refused(capsys, *words, **options):
    """The one line that the flags are refused with."""
    with pytest.raises(SystemExit) as stop:
        parse_config(list(words), **options)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 3e-4\nresolution: [32, 48]\nuse_ema: false\nreport_to: []\nmax_train_steps: null\n")
    config = parse_config(["--config", str(file), "--learning_rate", "5e-5", "--center_crop"])
    assert config.learning_rate == 5e-5 and config.resolution == [32, 48]
    assert config.use_ema is False and config.center_crop is True
    assert config.train_batch_size == TrainingConfig().train_batch_size


def test_what_is_saved_is_read_back(tmp_path):
    config = TrainingConfig(resolution=[8], down_block_types=["DownBlock2D"] * 4, mixed_precision="bf16", seed=7)
    file = tmp_path / "run.yaml"
    file.write_text(config.to_yaml())
    assert parse_config(["--config", str(file)]) == config


def test_default_file_only_where_no_data_is_named(tmp_path):
    default = tmp_path / "default.yaml"
    default.write_text("dataset_name: digits\nresolution: 16\n")
    assert parse_config([], default).dataset_name == "digits"
    assert parse_config(["--seed", "1"], default).resolution == [16]
    assert parse_config(["--dataset_name", "other"], default).resolution is None
    assert parse_config(["--train_data_dir", "folder"], default).dataset_name is None


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--resolution 0", "--resolution is [0]; it must be one or two numbers of at least 1"),
        ("--resolution 8 8 8", "--resolution is [8, 8, 8]; it must be one or two numbers of at least 1"),
        ("--train_batch_size 0", "--train_batch_size is 0; it must be at least 1"),
        ("--max_train_steps -1", "--max_train_steps is -1; it must be at least 1"),
        ("--learning_rate 0", "--learning_rate is 0.0; it must be more than 0"),
        ("--learning_rate nan", "--learning_rate is nan; it must be more than 0"),
        ("--dropout 1", "--dropout is 1.0; it must be in [0, 1)"),
        ("--seed -1", "--seed is -1; it must not be negative"),
        (
            "--block_out_channels 33 64 --norm_num_groups 32",
            "--block_out_channels is [33, 64]; each must be a multiple of --norm_num_groups, 32",
        ),
        (
            "--block_out_channels 32 64 --down_block_types DownBlock2D",
            "is ['DownBlock2D']; it must name DownBlock2D or AttnDownBlock2D for each of the 2 levels",
        ),
        ("--background purplish", "--background is 'purplish'; it must be a colour, such as white or #ff8800"),
        ("--dataset_name a --train_data_dir b", "--train_data_dir is 'b'; give either it or --dataset_name"),
        ("--variance_type learned_range", "it is trained by --loss_type hybrid or vlb only"),
        (
            "--loss_type vlb --variance_type zero",
            "--loss_type is 'vlb'; the bound is infinite with --variance_type zero",
        ),
        (
            "--rescale_betas_zero_snr --prediction_type epsilon",
            "--prediction_type is 'epsilon'; zero terminal SNR needs v_prediction or sample",
        ),
        ("--ddpm_num_steps 10 --ddpm_num_inference_steps 11", "it must not be more than --ddpm_num_steps, 10"),
        ("--guidance_scale 2 --no_class_conditional", "guidance needs --class_conditional and --label_dropout above 0"),
        ("--train_batch_size many", "argument --train_batch_size: invalid int value: 'many'"),
        ("--image_mode CMYK", "invalid choice: 'CMYK' (choose from"),
        ("--lr_schedule cosine", "unknown flag --lr_schedule; did you mean --lr_scheduler?"),
        ("--config nowhere.yaml", "--config nowhere.yaml: No such file or directory"),
    ],
)
def test_bad_values_are_refused_by_name(capsys, words, line):
    assert line in refused(capsys, *words.split())


def test_bad_files_are_refused(capsys, tmp_path):
    file = tmp_path / "run.yaml"
    for text, line in [
        ("learning_rat: 1e-4", "unknown key learning_rat; did you mean learning_rate?"),
        ("- a\n- b", "it must hold `flag: value` lines"),
        ("a: [", "not YAML"),
        ("resolution: big", "argument --resolution: invalid int value: 'big'"),
        ("seed: -4", "--seed is -4; it must not be negative"),
    ]:
        file.write_text(text)
        assert line in refused(capsys, "--config", str(file))


def test_dashes_are_underscores(tmp_path):
    default = tmp_path / "default.yaml"
    default.write_text("dataset_name: digits\nresolution: 16\n")
    config = parse_config(["--train-data-dir", "some-folder", "--lr-warmup-steps=7"], default)
    assert (config.dataset_name, config.train_data_dir, config.lr_warmup_steps) == (None, "some-folder", 7)
    assert config.resolution is None
    file = tmp_path / "run.yaml"
    file.write_text("train-batch-size: 3\n")
    assert parse_config(["--config", str(file)]).train_batch_size == 3


def test_booleans_and_lists_as_typed():
    assert parse_config(["--random_flip"]).random_flip is True
    assert parse_config(["--random_flip", "--seed", "3"]).random_flip is True
    for word, value in [("true", True), ("yes", True), ("False", False), ("no", False), ("0", False)]:
        assert parse_config(["--use_ema", word]).use_ema is value
    assert parse_config(["--no_use_ema"]).use_ema is False and parse_config(["--no-use-ema"]).use_ema is False
    assert parse_config(["--report_to", "tensorboard", "wandb"]).report_to == ["tensorboard", "wandb"]
    assert parse_config(["--report_to"]).report_to == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--learning_rat 1", "unknown flag --learning_rat; did you mean --learning_rate?"),
        ("--batch-size=4", "unknown flag --batch_size=4"),
        ("--xyz", "unknown flag --xyz"),
        ("--use_ema perhaps", "argument --use_ema: 'perhaps' is neither true nor false"),
        ("--config", "expected one argument"),
    ],
)
def test_a_misspelt_flag_is_told_what_may_be_meant(capsys, words, line):
    assert line in refused(capsys, *words.split())


def test_what_yaml_makes_of_words(capsys, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("mixed_precision: no\nuse_ema: off\nlearning_rate: 1e-3\n")
    config = parse_config(["--config", str(file)])
    assert (config.mixed_precision, config.use_ema, config.learning_rate) == ("no", False, 1e-3)
    for text, line in [
        ("background: #202020", "background has no value; in YAML a value that begins with # must stand in quotes"),
        ("split: yes", "split is read as true by YAML; put the value in quotes"),
        ("seed: [1, 2]", "seed is [1, 2]; it must be one value"),
        ("seed: {a: 1}", "seed is {'a': 1}; it must be one value"),
        ("mixed_precision: on", "mixed_precision is read as true by YAML"),
    ]:
        file.write_text(text)
        assert line in refused(capsys, "--config", str(file))


def test_choices_are_those_of_the_scheduler_and_of_diffusers():
    choices = {spec.name: spec.metadata["choices"] for spec in dataclasses.fields(TrainingConfig)}
    assert choices["ddpm_beta_schedule"] == BETA_SCHEDULES
    assert choices["prediction_type"] == PREDICTION_TYPES
    # "analytic" is estimated from a trained model, "piecewise_constant" needs rules that no flag gives.
    assert choices["variance_type"] == tuple(kind for kind in VARIANCE_TYPES if kind != "analytic")
    of_diffusers = [kind.value for kind in SchedulerType if kind.value != "piecewise_constant"]
    assert choices["lr_scheduler"] == (*of_diffusers, "warmup_stable_decay")  # the last by transformers


def test_help_shows_every_flag_once_in_its_group_and_config_first():
    text = make_parser("train").format_help()
    shown = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    assert shown == ["config", "version", *(spec.name for spec in dataclasses.fields(TrainingConfig))]
    assert list(dict.fromkeys(spec.metadata["group"] for spec in dataclasses.fields(TrainingConfig))) == list(GROUPS)
    assert re.findall(r"^(\S+):$", text, re.MULTILINE) == ["options", *GROUPS]
    assert "--no_" not in text
    assert "--block_out_channels N [N ...]" in text and "(default: by --recipe)" in " ".join(text.split())
    assert "--use_ema [true|false]" in text and "and saved (default: true)" in " ".join(text.split())
    assert "train[:90%]" in text


@pytest.mark.parametrize(
    "words",
    [
        ["train_ddpm.py", "--help"],
        ["train_ddpm.py", "--version"],
        ["-m", "custom_ddpm.train", "--help"],
        ["-m", "custom_ddpm.cli", "--help"],
        ["-m", "custom_ddpm.cli", "train", "--help"],
        ["-m", "custom_ddpm.cli", "sample", "--help"],
        ["-m", "custom_ddpm.cli", "--version"],
        ["train_ddpm.py", "--learning_rat", "1"],
        ["-c", "import custom_ddpm"],
    ],
    ids=" ".join,
)
def test_help_and_version_answer_without_torch(words):
    # A torch that raises when it is imported.
    code = "import sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; import runpy; "
    run = {"-m": "runpy.run_module(sys.argv.pop(1), run_name='__main__')", "-c": "exec(sys.argv[1])"}
    code += run.get(words[0], "runpy.run_path(sys.argv[0], run_name='__main__')")
    result = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in result.stderr
    assert result.returncode == (2 if "--learning_rat" in words else 0)
    if "train_ddpm.py" in words and "--help" in words:
        assert "usage: accelerate launch --quiet train_ddpm.py" in result.stdout


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_configurations_in_examples_are_right(file):
    config = parse_config(["--config", str(file)])
    for name, value in yaml.safe_load(file.read_text()).items():
        got = getattr(config, name)
        assert got == value or got == [value], name


@pytest.mark.parametrize("data", ["train_data_dir", "dataset_name"])
def test_the_output_folder_must_not_lie_among_the_pictures(tmp_path, data, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (tmp_path / "link").symlink_to(pictures)
    for output in (pictures, pictures / "run", pictures / "a" / ".." / "run", tmp_path / "link" / "run"):
        for folder in (pictures, tmp_path / "link"):
            line = refused(capsys, f"--{data}", str(folder), "--output_dir", str(output))
            assert f"--output_dir is {str(output)!r}; it must not lie inside --{data}, {str(folder)!r}" in line
    for output in (tmp_path / "run", tmp_path / "pictures2", pictures / ".." / "run"):
        assert parse_config([f"--{data}", str(pictures), "--output_dir", str(output)]).output_dir == str(output)
    # A name on the Hub is no path.
    assert parse_config(["--dataset_name", "user/set", "--output_dir", "user/set/run"]).dataset_name == "user/set"


def test_the_output_folder_among_the_pictures_of_the_working_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "must not lie inside" in refused(capsys, "--train_data_dir", ".")
