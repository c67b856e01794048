"""The one door for saved models, attacked at every entrance: one line, another status than 0, in bounds."""

import json
import os
import random
import resource
import shutil
import time

import pytest
import torch
from conftest import make_pipeline
from safetensors.torch import load_file, save_file

from custom_ddpm import CustomDDPMPipeline
from custom_ddpm.cli import main
from custom_ddpm.config import TrainingConfig
from custom_ddpm.hub import push_pipeline, verify_repository
from custom_ddpm.training.parts import build_model
from hub.repository import File
from hub.shared import STEPS

SECONDS = 20  # for one input at one entrance; the machine may be busy
MEGABYTES = 500  # more memory than before the first input
UNET, NOISE, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
MISSING = object()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    make_pipeline(channels=3, num_train_timesteps=STEPS, beta_schedule="squaredcos_cap_v2").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


def edit(file, **entries):
    """An attack that sets entries of a JSON file; `MISSING` removes one."""

    def attack(folder):
        content = json.loads((folder / file).read_text()) | entries
        kept = {key: value for key, value in content.items() if value is not MISSING}
        (folder / file).write_text(json.dumps(kept))

    return attack


def write(file, data):
    """An attack that gives a file another content."""

    def attack(folder):
        (folder / file).write_bytes(data)

    return attack


def scheduler(name, library="diffusers"):
    return edit(INDEX, scheduler=[library, name])


def sparse(file, size):
    def attack(folder):
        with (folder / file).open("r+b") as opened:
            opened.truncate(size)

    return attack


def special(file, make):
    def attack(folder):
        (folder / file).unlink()
        make(folder / file)

    return attack


def tensors(change):
    def attack(folder):
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})

    return attack


def only_a_pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / WEIGHTS.replace("safetensors", "bin"))
    (folder / WEIGHTS).unlink()


def lying_header(entry, size=b""):
    text = json.dumps({"conv_in.bias": entry}).encode()
    return write(WEIGHTS, (size or len(text).to_bytes(8, "little")) + text)


ATTACKS = {
    # sizes
    "T of 1e8": edit(NOISE, num_train_timesteps=100_000_000),
    "T as text": edit(NOISE, num_train_timesteps="6"),
    "a million layers": edit(UNET, layers_per_block=1_000_000),
    "many levels": edit(UNET, block_out_channels=[8] * 30, layers_per_block=250),
    "huge pictures": edit(UNET, sample_size=10**9),
    "numbers as text": edit(UNET, in_channels="3"),
    "true for a number": edit(UNET, downsample_padding=True),
    "numbers of float64": edit(NOISE, clip_sample_range=1e308),
    "betas below 0": edit(NOISE, beta_start=-1, beta_schedule="linear"),
    "a list in a list": edit(UNET, block_out_channels=[[8], [16]]),
    "null for a list": edit(UNET, down_block_types=None),
    "betas as text": edit(NOISE, trained_betas="0.1"),
    "endless padding": edit(UNET, downsample_padding=10**6),
    "NaN": write(NOISE, b'{"beta_start": NaN}'),
    "unknown schedule": edit(NOISE, beta_schedule="\x1b[31m" * 1000),
    "learned variance without channels": edit(NOISE, variance_type="learned"),
    "a quantizer": edit(UNET, quantization_config={"quant_method": "bitsandbytes"}),
    "class of the configuration": edit(UNET, _class_name="utils"),
    "argument dtype": edit(UNET, dtype="x"),
    "defaults": edit(NOISE, _use_default_values=7),
    # what stands in the places
    "UNet2DModel as scheduler": scheduler("UNet2DModel"),
    "AutoModel as scheduler": scheduler("AutoModel"),
    "DiffusionPipeline as scheduler": scheduler("DiffusionPipeline"),
    "utils as scheduler": scheduler("utils"),
    "SchedulerMixin as scheduler": scheduler("SchedulerMixin"),
    "dunder as scheduler": scheduler("__class__"),
    "module as scheduler": scheduler("scheduling_ddim"),
    "os as library": scheduler("system", "os"),
    "scheduler as unet": edit(INDEX, unet=["diffusers", "DDIMScheduler"]),
    "AutoencoderKL as unet": edit(INDEX, unet=["diffusers", "AutoencoderKL"]),
    "null as unet": edit(INDEX, unet=None),
    "nulls as unet": edit(INDEX, unet=[None, None]),
    "number as scheduler": edit(INDEX, scheduler=7),
    "no unet": edit(INDEX, unet=MISSING),
    "no scheduler": edit(INDEX, scheduler=MISSING),
    "one more component": edit(INDEX, vae=["diffusers", "AutoencoderKL"]),
    "names of no classes": edit(INDEX, id2label={"0": "cat"}),
    "names as a list": edit(INDEX, id2label=["cat"]),
    "index of null": write(INDEX, b"null"),
    "index of a list": write(INDEX, b"[]"),
    "index of a text": write(INDEX, b'"x"'),
    "index without class": write(INDEX, b"{}"),
    # files
    "deep JSON": write(UNET, b'{"in_channels":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "JSON less deep": write(UNET, b'{"in_channels":' + b"[" * 500 + b"]" * 500 + b"}"),
    "UTF-16": write(UNET, '{"in_channels": 3}'.encode("utf-16")),
    "long number": write(UNET, b'{"in_channels": ' + b"9" * 10_000 + b"}"),
    "empty index": write(INDEX, b""),
    "index of 1 GB": sparse(INDEX, 10**9),
    "config of 1 GB": sparse(UNET, 10**9),
    "FIFO for a config": special(UNET, os.mkfifo),
    "FIFO for the index": special(INDEX, os.mkfifo),
    "FIFO for weights": special(WEIGHTS, os.mkfifo),
    "/dev/zero for a config": special(NOISE, lambda path: path.symlink_to("/dev/zero")),
    "folder for a config": special(UNET, lambda path: path.mkdir()),
    "a loop of links": special(UNET, lambda path: path.symlink_to(path.name)),
    "no config": special(NOISE, lambda path: None),
    # weights
    "no weights": special(WEIGHTS, lambda path: None),
    "only a pickle": only_a_pickle,
    "empty weights": write(WEIGHTS, b""),
    "weights cut short": sparse(WEIGHTS, 1000),
    "weights of zeros": write(WEIGHTS, b"\0" * 1000),
    "a missing tensor": tensors(lambda held: held.pop("conv_in.bias")),
    "a surplus tensor": tensors(lambda held: held.update(more=torch.ones(1))),
    "a misshapen tensor": tensors(lambda held: held.update({"conv_in.bias": torch.ones(1)})),
    "whole numbers": tensors(lambda held: held.update({"conv_in.bias": torch.ones(8, dtype=torch.int64)})),
    "header: 1 EB of tensor": lying_header({"dtype": "F32", "shape": [2**58], "data_offsets": [0, 2**60]}),
    "header: offsets turned round": lying_header({"dtype": "F32", "shape": [8], "data_offsets": [32, 0]}),
    "header: longer than the file": lying_header({}, (2**62).to_bytes(8, "little")),
    "shards elsewhere": write(
        f"{WEIGHTS}.index.json", b'{"metadata": {}, "weight_map": {"conv_in.bias": "../../x.safetensors"}}'
    ),
    "shards of a number": write(f"{WEIGHTS}.index.json", b'{"metadata": {}, "weight_map": 3}'),
    "shards that lack tensors": write(
        f"{WEIGHTS}.index.json",
        b'{"metadata": {}, "weight_map": {"conv_in.bias": "diffusion_pytorch_model.safetensors"}}',
    ),
}


class Pictures:
    height = width = 8
    channels, mode, id2label, num_images = 3, "RGB", None, 100


def train_from(folder):
    config = TrainingConfig(recipe="stock", init_from=str(folder), train_data_dir="x", ddpm_num_steps=STEPS)
    build_model(config, Pictures())


ENTRANCES = {
    "sample": lambda folder: main(
        f"sample {folder} --output_dir {folder}-pictures --num_images 1 --num_inference_steps 3".split()
    ),
    "to diffusers": lambda folder: main(["convert", str(folder), f"{folder}-stock"]),
    "to custom": lambda folder: main(["convert", str(folder), f"{folder}-custom", "--to", "custom"]),
    "push": lambda folder: main(["push", str(folder), "user/model"]),
    "verify": lambda folder: main(["verify", str(folder)]),
    "init_from": train_from,
    "from_pretrained": CustomDDPMPipeline.from_pretrained,
}


def enter(entrance, folder):
    """The one line of a refusal, None if there is none; any other end is an error of the test."""
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        ENTRANCES[entrance](folder)
        line = None
    except SystemExit as stop:
        assert isinstance(stop.code, str)  # printed, with status 1
        line = stop.code
    except (OSError, ValueError) as error:
        assert entrance in ("init_from", "from_pretrained")  # `training.launch` prints these as one line
        line = str(error)
    assert time.monotonic() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MEGABYTES * 1024
    return line


@pytest.fixture
def unused_hub(hub, monkeypatch):
    monkeypatch.setattr("custom_ddpm.hub.push.get_token", lambda: hub.token)
    return hub


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_sound_model_passes_every_entrance(copy, entrance, unused_hub):
    assert enter(entrance, copy) is None


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_is_refused_in_one_line_at_every_entrance(copy, attack, unused_hub):
    ATTACKS[attack](copy)
    for entrance in ENTRANCES:
        line = enter(entrance, copy)
        assert line is not None, entrance
        lines = line.split("\n")
        assert all(each.isprintable() and len(each) < 1500 for each in lines), line
        assert entrance == "verify" or len(lines) == 1, line
    assert unused_hub.requests == []
    assert {path.name for path in copy.parent.iterdir()} <= {copy.name, "hub-cache"}


VALUES = [None, "", "3", [], [[]], {}, -1, 0, 1, 0.5, -1e308, 1e308, float("inf"), 10**9, 10**30, True, "\x1b[2J" * 50]


def mutations(folder, number):
    """Seeded changes of single values of the JSON files: (file, key, value)."""
    draw = random.Random(0)
    keys = [(file, key) for file in (INDEX, UNET, NOISE) for key in json.loads((folder / file).read_text())]
    chosen = [(file, key, value) for file, key in keys for value in [*VALUES, MISSING]]
    return draw.sample(chosen, min(number, len(chosen)))


def fuzz(model, folder, number):
    refused = accepted = 0
    for file, key, value in mutations(model, number):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(model, folder)
        edit(file, **{key: value})(folder)
        what, problems = (file, key, value), verify_repository(folder)
        line = enter("from_pretrained", folder)
        assert (line is None) == (problems == []), (what, line, problems)
        if line is None:
            accepted += 1
            shutil.rmtree(f"{folder}-pictures", ignore_errors=True)
            try:
                line = enter("sample", folder)
            except Exception as error:
                raise AssertionError(f"{what} is accepted, and not sampled from: {error!r}") from error
            assert line is None or (len(line.splitlines()) == 1 and line.isprintable()), what
        else:
            refused += 1
            assert line.isprintable() and len(line) < 1500, what
    return refused, accepted


@pytest.mark.parametrize(
    "stock",
    [
        None,
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler")
        ),
    ],
)
def test_random_values_are_refused_or_work(model, tmp_path, stock):
    import diffusers

    source = shutil.copytree(model, tmp_path / "source")
    if stock is not None:
        pipeline = CustomDDPMPipeline.from_pretrained(model)
        pipeline.scheduler = getattr(diffusers, stock).from_config(pipeline.scheduler.config)
        shutil.rmtree(source)
        pipeline.save_pretrained(source)
    refused, accepted = fuzz(source, tmp_path / "model", int(os.environ.get("FUZZ", "40")))
    assert refused > 5 and accepted > 5


def test_files_cut_short_are_refused_or_whole(model, tmp_path):
    draw = random.Random(1)
    for file in (INDEX, UNET, NOISE, WEIGHTS):
        data = (model / file).read_bytes()
        for length in [0, 1, 7, 8, 9, len(data) - 1, *(draw.randrange(len(data)) for _ in range(5))]:
            folder = tmp_path / "model"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(model, folder)
            (folder / file).write_bytes(data[:length])
            line = enter("from_pretrained", folder)
            # A JSON file is whole without its last line break.
            assert (line is None) == (file != WEIGHTS and length == len(data) - 1), (file, length)
            assert (verify_repository(folder) == []) == (line is None), (file, length)


def on_the_hub(hub, model, attack, tmp_path):
    push_pipeline(model, "user/model", token=hub.token, stock_branch=False)
    copy = shutil.copytree(model, tmp_path / "copy")
    attack(copy)
    files = hub.repos["model", "user/model"].at("main").files
    for file in (INDEX, UNET, NOISE):
        files[file] = File((copy / file).read_bytes())
    if not (copy / WEIGHTS).exists():
        del files[WEIGHTS]
    hub.requests.clear()


@pytest.mark.parametrize(
    "attack",
    ["T of 1e8", "a million layers", "utils as scheduler", "no unet", "index of null", "deep JSON", "no weights"],
)
def test_weights_of_a_bad_repository_are_not_downloaded(hub, model, attack, tmp_path):
    on_the_hub(hub, model, ATTACKS[attack], tmp_path)
    for entrance in (ENTRANCES["sample"], ENTRANCES["to custom"], CustomDDPMPipeline.from_pretrained):
        with pytest.raises((SystemExit, OSError)) as caught:
            entrance("user/model")
        assert "user/model cannot be loaded: " in str(caught.value) and str(caught.value).isprintable()
    assert verify_repository("user/model") != []
    assert hub.asked("GET", r"/resolve/.*\.(safetensors|bin)") == []


def test_large_config_is_not_downloaded(hub, model, tmp_path):
    on_the_hub(hub, model, edit(UNET, sample_size=8), tmp_path)
    hub.repos["model", "user/model"].at("main").files[UNET] = File(b" " * (33 * 2**20))
    with pytest.raises(OSError, match=r"unet/config.json has 34603008 bytes; at most 33554432 are allowed"):
        CustomDDPMPipeline.from_pretrained("user/model")
    assert hub.asked("GET", r"/resolve/.*unet") == []


def test_a_repository_in_the_cache_loads_without_a_connection(hub, model, tmp_path):
    push_pipeline(model, "user/model", token=hub.token, stock_branch=False)
    loaded = CustomDDPMPipeline.from_pretrained("user/model", cache_dir=tmp_path / "cache")
    assert loaded.unet.config._name_or_path == "user/model"
    hub.requests.clear()
    CustomDDPMPipeline.from_pretrained("user/model", cache_dir=tmp_path / "cache", local_files_only=True)
    assert hub.requests == []
    with pytest.raises(OSError, match="user/model cannot be read"):
        CustomDDPMPipeline.from_pretrained("user/model", cache_dir=tmp_path / "empty", local_files_only=True)


def test_weights_in_several_files_load(model, tmp_path):
    pipeline = CustomDDPMPipeline.from_pretrained(model)
    pipeline.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("unet/*.safetensors"))) > 1 and verify_repository(tmp_path) == []
    again = CustomDDPMPipeline.from_pretrained(tmp_path).unet.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in pipeline.unet.state_dict().items())
    next(tmp_path.glob("unet/*.safetensors")).unlink()
    with pytest.raises(OSError, match="is missing"):
        CustomDDPMPipeline.from_pretrained(tmp_path)


def test_push_sends_nothing_from_outside_the_folder(copy, unused_hub, tmp_path):
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    for name in ("README.md", "samples.png", "unet/extra.py", NOISE):
        link = copy / name
        link.unlink(missing_ok=True)
        link.symlink_to(secret)
        assert f"{name} is a link that points outside the folder" in enter("push", copy)
        link.unlink()
    moved = shutil.move(copy / "unet", tmp_path / "elsewhere")
    (copy / "unet").symlink_to(moved)
    assert "points outside the folder" in enter("push", copy)
    assert unused_hub.requests == []


@pytest.mark.parametrize("name", ["", "a/b/c", "x" * 5000, "\0", "\x1b[2J", "\ud800", "file", "empty", "~", "pipe"])
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_what_is_no_model_is_refused_in_one_line(entrance, name, tmp_path, monkeypatch, unused_hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    if entrance == "sample":
        line = refused(["sample", name])
    elif entrance in ("push", "verify"):
        line = refused([entrance, name, *["user/model"] * (entrance == "push")])
    elif entrance.startswith("to "):
        line = refused(["convert", name, "new", "--to", entrance[3:]])
    elif entrance == "init_from" and name == "":
        pytest.skip("means none")
    else:
        line = enter(entrance, name)
    assert line is not None
    assert len(line) < 1500 and line.replace("\n", "").isprintable(), line
    assert not (tmp_path / "new").exists() and not (tmp_path / "samples").exists()


def refused(words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert isinstance(stop.value.code, str)
    return stop.value.code


def test_verify_tells_what_it_checked(copy, capsys):
    main(["verify", str(copy)])
    whole = capsys.readouterr().out
    assert "code: each of its 8 files is this release's" in whole and "1 safetensors file, with the names" in whole
    for file in copy.rglob("*.py"):
        file.unlink()
    main(["verify", str(copy)])
    assert "code: there is none" in capsys.readouterr().out
    for number in range(200):
        (copy / f"\x1b[2J{number}{'x' * 150}.sh").write_text("")
    (copy / "pipe").symlink_to("/dev/zero")
    line = enter("verify", copy)
    assert len(line.split("\n")) == 52 and "and 151 more" in line and "\x1b" not in line and len(line) < 20_000
