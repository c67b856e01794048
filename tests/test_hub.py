"""Pushing, the model card and verification, with the real client against the Hub's test double over HTTP."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import traceback
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hub.server import File, HubServer
from huggingface_hub import HfApi, ModelCard, constants, hf_api
from huggingface_hub.utils import _http
from PIL import Image

from custom_ddpm import CustomDDPMPipeline, CustomDDPMScheduler, CustomUNet2DModel
from custom_ddpm.hub import BackgroundPush, HubError, push_pipeline, release_code, verify_repository, write_model_card

STEPS = 6
MAIN_FILES = {
    ".gitattributes",  # the Hub's own
    "README.md",
    "loss_curve.png",
    "model_index.json",
    "pipeline_custom_ddpm.py",
    "samples.png",
    "scheduler/schedules.py",
    "scheduler/scheduler.py",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/unet.py",
}
STOCK_FILES = {name for name in MAIN_FILES if not name.endswith(".py")}


def make_pipeline(num_class_embeds=None, id2label=None):
    torch.manual_seed(0)
    unet = CustomUNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        num_class_embeds=num_class_embeds,
    )
    return CustomDDPMPipeline(unet, CustomDDPMScheduler(num_train_timesteps=STEPS), id2label=id2label)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline as the end of a training leaves it."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    make_pipeline().save_pretrained(folder)
    for gray, name in enumerate(("samples.png", "loss_curve.png")):
        Image.fromarray(np.full((4, 4), gray, np.uint8)).save(folder / name)
    write_model_card(folder, {"license": "cc-by-4.0", "num_images": 12})
    return folder


@pytest.fixture
def run(saved, tmp_path):
    """A run's folder: the pipeline, and beside it what must never be pushed."""
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    for name in (
        "checkpoints/000010/optimizer.bin",
        "checkpoints/000010/model.safetensors",
        "logs/events.out.tfevents",
        "logs/log.txt",
        "unet/__pycache__/unet.cpython-311.pyc",
        "unet/old/config.json",
        ".cache/x.json",
        "training_config.yaml",
        "metrics.json",
        "random_states_0.pkl",
        "notes.txt",
        "secret.env",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not for the Hub")
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The double, as the Hub of this process; the client does not wait before it tries again."""
    with HubServer() as server:
        # What the client makes of HF_ENDPOINT when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
        yield server


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def train_a_little(folder):
    pipeline = make_pipeline()
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 1
    pipeline.save_pretrained(folder)


# ---- push ----


def test_only_the_pipelines_own_files_are_pushed_in_one_commit_a_branch(hub, run):
    before = contents(run)
    address = push_pipeline(run, "user/model", token=hub.token, commit_message="first")
    assert address == f"{hub.endpoint}/user/model"
    assert hub.files("user/model").keys() == MAIN_FILES
    assert hub.files("user/model", "diffusers").keys() == STOCK_FILES
    assert hub.log("user/model") == ["first", "initial commit"]
    assert hub.log("user/model", "diffusers")[0] == "first"
    assert hub.log("user/model", "diffusers").count("first") == 2  # the branch began at main
    assert not hub.repos["model", "user/model"].private
    for name, data in hub.files("user/model").items():
        if name not in (".gitattributes", "README.md"):
            assert data == (run / name).read_bytes(), name
    assert contents(run) == before


def test_a_name_without_a_user_is_the_users_own(hub, run):
    assert push_pipeline(run, "model", token=hub.token) == f"{hub.endpoint}/user/model"
    assert '"user/model"' in hub.files("user/model")["README.md"].decode()


def test_the_pushed_repository_loads_and_draws_where_the_package_is_not(hub, run, tmp_path):
    """By the very lines on its card."""
    push_pipeline(run, "user/model", token=hub.token, private=True)
    card = hub.files("user/model")["README.md"].decode()
    remote, package, stock = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    home = tmp_path / "elsewhere"
    home.mkdir()
    program = f"""if True:
        import importlib, sys
        sys.path.append({sysconfig.get_paths()["purelib"]!r})  # without its .pth files, so without editable installs
        sys.modules["custom_ddpm"] = None  # and if it is installed there, without it
        try:
            importlib.import_module("custom_ddpm")
            raise SystemExit("the package is here")
        except ImportError:
            pass
        import numpy as np, torch
        from diffusers import UNet2DModel

        def run(lines):
            names = {{}}
            exec(lines, names)
            assert len(names["images"]) == 4 and names["images"][0].size == (8, 8)
            return names["pipeline"]

        custom, stock = run({remote!r}), run({stock!r})
        assert type(custom).__module__.startswith("diffusers_modules.")
        assert type(stock.unet) is UNet2DModel and type(stock).__module__.startswith("diffusers.")
        options = {{"batch_size": 3, "num_inference_steps": {STEPS}, "output_type": "np"}}
        np.save("custom.npy", custom(generator=torch.Generator().manual_seed(7), **options).images)
        np.save("stock.npy", stock(generator=torch.Generator().manual_seed(7), **options).images)
    """
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program],
        env=hub.env(home, hub.token),
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert 'from_pretrained("user/model", revision="diffusers")' in stock

    names = {}
    exec(package.replace('"user/model"', f'"user/model", token={hub.token!r}'), names)
    here = names["pipeline"](batch_size=3, generator=torch.Generator().manual_seed(7), output_type="np").images
    assert here.std() > 0.1
    np.testing.assert_array_equal(np.load(home / "custom.npy"), here)
    np.testing.assert_allclose(np.load(home / "stock.npy"), here, atol=1e-4, rtol=0)


def test_the_package_loads_the_pushed_branches_without_running_their_files(hub, run):
    push_pipeline(run, "user/model", token=hub.token)
    unet_file = hub.repos["model", "user/model"].at("main").files["unet/unet.py"]
    unet_file.data = b"raise SystemExit('a file of the repository was run')"
    expected = make_pipeline().unet.state_dict()
    for revision in ("main", "diffusers", hub.repos["model", "user/model"].branches["main"]):
        loaded = CustomDDPMPipeline.from_pretrained("user/model", revision=revision)
        assert type(loaded.unet) is CustomUNet2DModel and type(loaded.scheduler) is CustomDDPMScheduler
        for name, tensor in loaded.unet.state_dict().items():
            assert torch.equal(tensor, expected[name])


def test_an_unchanged_pipeline_is_no_commit_and_a_changed_one_is_one(hub, run):
    push_pipeline(run, "user/model", token=hub.token)
    push_pipeline(run, "user/model", token=hub.token, commit_message="the same")
    assert len(hub.log("user/model")) == 2
    train_a_little(run)
    (run / "samples.png").unlink()
    hub.requests.clear()
    push_pipeline(run, "user/model", token=hub.token, commit_message="better")
    assert hub.log("user/model")[0] == "better" and len(hub.log("user/model")) == 3
    assert hub.log("user/model", "diffusers")[0] == "better"
    assert hub.files("user/model").keys() == MAIN_FILES - {"samples.png"}
    assert hub.files("user/model", "diffusers").keys() == STOCK_FILES - {"samples.png"}
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert hub.files("user/model")[weights] == (run / weights).read_bytes()


def test_what_others_put_into_the_repository_stays(hub, run):
    push_pipeline(run, "user/model", token=hub.token)
    others = {"notes.md", "images/a.txt", "unet/extra.json", "old/unet/config.json", "docs/README.md"}
    for name in others:
        HfApi(token=hub.token).upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id="user/model")
    train_a_little(run)
    push_pipeline(run, "user/model", token=hub.token)
    assert hub.files("user/model").keys() == MAIN_FILES | others


def test_a_card_that_was_edited_by_hand_is_pushed_as_it_is(hub, run):
    (run / "README.md").write_text("---\nlicense: mit\n---\nMy words about user/other.\n")
    push_pipeline(run, "user/model", token=hub.token)
    assert hub.files("user/model")["README.md"] == (run / "README.md").read_bytes()


def test_a_card_with_metadata_that_the_hub_refuses_is_said(hub, run):
    (run / "README.md").write_text("---\nlicense: nonsense\n---\n")
    with pytest.raises(HubError, match=r'the Hub refuses it \(400: Invalid metadata in README.md. - "license" must be'):
        push_pipeline(run, "user/model", token=hub.token)


def test_a_folder_without_a_card_gets_one(hub, run):
    (run / "README.md").unlink()
    push_pipeline(run, "user/model", token=hub.token)
    assert ModelCard(hub.files("user/model")["README.md"].decode()).data.library_name == "diffusers"
    assert not (run / "README.md").exists()


def test_what_is_no_ddpm_pipeline_goes_to_main_alone_and_the_log_says_why(hub, tmp_path, caplog):
    make_pipeline(num_class_embeds=3, id2label={0: "a", 1: "b"}).save_pretrained(tmp_path)
    push_pipeline(tmp_path, "user/model", token=hub.token)
    assert hub.repos["model", "user/model"].branches.keys() == {"main"}
    assert "the branch 'diffusers' is left out: " in caplog.text
    assert 'diffusers")' not in hub.files("user/model")["README.md"].decode()


def test_the_stock_branch_is_left_out_on_request(hub, run):
    push_pipeline(run, "user/model", token=hub.token, stock_branch=False)
    assert hub.repos["model", "user/model"].branches.keys() == {"main"}


def test_private_is_private_and_is_never_pushed_to_a_public_repository(hub, run):
    push_pipeline(run, "user/secret", token=hub.token, private=True)
    assert hub.repos["model", "user/secret"].private
    push_pipeline(run, "user/open", token=hub.token)
    train_a_little(run)
    with pytest.raises(HubError, match=r"user/open is there and public.* user/open --private$"):
        push_pipeline(run, "user/open", token=hub.token, private=True)
    assert len(hub.log("user/open")) == 2


# ---- what is refused before anything is sent ----


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda run: (run / "model_index.json").unlink(), "model_index.json is missing"),
        (lambda run: (run / "unet/diffusion_pytorch_model.safetensors").unlink(), "no safetensors weights"),
        (lambda run: (run / "unet/unet.py").write_text("x = 1"), "unet/unet.py is not the file of custom-ddpm"),
        (lambda run: (run / "unet/other.py").write_text("x = 1"), "unet/other.py is code"),
        (lambda run: (run / "unet/config.json").write_text('{"layers_per_block": 1000000}'), "layers_per_block"),
        (lambda run: (run / "unet/config.json").write_text("{"), "unet/config.json is not JSON"),
    ],
)
def test_a_folder_that_is_no_sound_pipeline_is_not_pushed(hub, run, change, problem):
    change(run)
    with pytest.raises(ValueError, match=re.escape(problem)):
        push_pipeline(run, "user/model", token=hub.token)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["README.md", "unet/config.json"])
def test_a_file_that_holds_the_token_is_not_pushed(hub, run, name):
    text = (run / name).read_text()
    (run / name).write_text(text.replace("{", '{"_token": "' + hub.token + '",') if "json" in name else hub.token)
    with pytest.raises(ValueError, match=f"{name} holds the token") as caught:
        push_pipeline(run, "user/model", token=hub.token)
    assert hub.token not in str(caught.value) and hub.requests == []


@pytest.mark.parametrize("repo_id", ["a/b/c", "", "user/mo del", "../up"])
def test_a_name_that_no_repository_can_have_is_refused(hub, run, repo_id):
    with pytest.raises(ValueError):
        push_pipeline(run, repo_id, token=hub.token)
    assert hub.requests == []


def test_a_token_that_no_header_can_carry_is_refused_without_being_shown(hub, run):
    with pytest.raises(ValueError, match="the token holds characters") as caught:
        push_pipeline(run, "user/model", token="hf_abc\r\ndef")
    assert "abc" not in str(caught.value)


# ---- failures ----

FAILURES = [
    ("/commit/main", 401, "not accepted (401)"),
    ("/commit/main", 403, "may not write there (403)"),
    ("/commit/main", 404, "not there"),
    ("/commit/main", 409, "at the same time (409)"),
    ("/commit/main", 412, "at the same time (412)"),
    ("/commit/main", 413, "refuses it (413"),
    ("/commit/main", 429, "fewer requests (429); wait 30 s"),
    ("/commit/main", 500, "an error of its own (500)"),
    ("/commit/main", "cut", "connection to the Hub broke"),
    ("/commit/main", "lost", "connection to the Hub broke"),
    ("/commit/diffusers", 500, "an error of its own (500)"),
    ("/branch/diffusers", 403, "may not write there (403)"),
    ("/repos/create", 401, "not accepted (401)"),
    ("/repos/create", 403, "may not write there (403)"),
    ("/repos/create", "cut", "connection to the Hub broke"),
    ("/validate-yaml", 500, "an error of its own (500)"),
    ("/preupload/", 503, "an error of its own (503)"),
    ("/preupload/", "cut", "connection to the Hub broke"),
    ("/storage/", 500, "an error of its own (500)"),
    ("/storage/", "cut", "connection to the Hub broke"),
    ("/storage/", 403, "may not write there (403)"),
]


@pytest.mark.parametrize("path, failure, reason", FAILURES)
def test_each_failure_is_one_clear_line_and_the_push_can_be_repeated(hub, run, path, failure, reason):
    before = contents(run)
    hub.fail("*", path, failure, times=100, retry_after=30)
    with pytest.raises(HubError) as caught:
        push_pipeline(run, "user/model", token=hub.token, commit_message="pushed")
    message = str(caught.value)
    assert reason in message and "\n" not in message
    assert message.endswith(f"whole in {run}; push it again with: custom-ddpm push {run} user/model")
    assert hub.token not in "".join(traceback.format_exception(caught.value))
    assert contents(run) == before

    hub.failures.clear()
    push_pipeline(run, "user/model", token=hub.token, commit_message="pushed")
    assert hub.files("user/model").keys() == MAIN_FILES
    assert hub.files("user/model", "diffusers").keys() == STOCK_FILES
    assert hub.log("user/model") == ["pushed", "initial commit"]
    uploads = [request.path for request in hub.asked("PUT", "/storage/") if request.status == 200]
    assert len(uploads) == len(set(uploads))  # nothing is sent twice


def test_a_hub_that_cannot_be_reached_is_one_clear_line(hub, run):
    hub.__exit__()
    with pytest.raises(HubError, match="connection to the Hub broke") as caught:
        push_pipeline(run, "user/model", token=hub.token)
    assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_is_given_up(hub, run):
    hub.fail("POST", "/commit/main", "slow", delay=30)
    with pytest.raises(HubError, match="has not ended after 1 s"):
        push_pipeline(run, "user/model", token=hub.token, timeout=1)


def test_a_slow_hub_is_waited_for(hub, run):
    hub.fail("POST", "/commit/main", "slow", delay=0.5)
    push_pipeline(run, "user/model", token=hub.token)
    assert hub.files("user/model").keys() == MAIN_FILES


def test_no_token_and_a_wrong_one_are_said(hub, run, monkeypatch):
    monkeypatch.setattr("custom_ddpm.hub.get_token", lambda: None)
    for token in (None, "hf_wrong"):
        with pytest.raises(HubError, match="missing or not accepted") as caught:
            push_pipeline(run, "user/model", token=token)
        assert "hf_wrong" not in str(caught.value)


# ---- push in the background ----


def test_a_push_in_the_background_sends_what_was_there_when_it_was_called(hub, run):
    weights = "unet/diffusion_pytorch_model.safetensors"
    first = (run / weights).read_bytes()
    hub.fail("POST", "/repos/create", "slow", delay=0.5)
    background = BackgroundPush("user/model", token=hub.token)
    background.push(run, "step 1")
    train_a_little(run)
    background._wait(run, 60)
    assert hub.files("user/model")[weights] == first
    background.push(run, "step 2")
    background._wait(run, 60)
    assert hub.files("user/model")[weights] == (run / weights).read_bytes() != first
    assert hub.log("user/model") == ["step 2", "step 1", "initial commit"]


def test_a_failure_in_the_background_is_one_line_in_the_log_and_the_next_push_goes_through(hub, run, caplog):
    hub.fail("*", "/commit/main", 500)
    background = BackgroundPush("user/model", token=hub.token)
    background.push(run, "step 1")
    background._wait(run, 60)
    (record,) = [r for r in caplog.records if r.name == "custom_ddpm.hub"]
    assert "an error of its own (500)" in record.getMessage() and "\n" not in record.getMessage()
    assert record.exc_info is None and hub.token not in caplog.text
    background.push(run, "step 2")
    background._wait(run, 60)
    assert hub.log("user/model") == ["step 2", "initial commit"]


def test_a_push_that_hangs_holds_up_neither_the_run_nor_its_end(hub, run, caplog):
    hub.fail("POST", "/repos/create", "slow", delay=60)
    background = BackgroundPush("user/model", token=hub.token)
    background.push(run, "step 1")
    background.push(run, "step 2")
    background.finish(run, "the end", timeout=0.2)
    messages = [r.getMessage() for r in caplog.records if r.name == "custom_ddpm.hub"]
    assert messages[0] == "'step 2' is not pushed: the push before it is still under way"
    assert "has not ended after 0 s" in messages[1] and "custom-ddpm push" in messages[1]
    assert messages[2].startswith("'the end' is not pushed")


def test_finish_pushes_the_last_pipeline_after_the_one_under_way(hub, run):
    hub.fail("POST", "/repos/create", "slow", delay=0.5)
    background = BackgroundPush("user/model", token=hub.token)
    background.push(run, "step 1")
    train_a_little(run)
    background.finish(run, "the end")
    assert hub.log("user/model") == ["the end", "step 1", "initial commit"]


def test_a_push_that_can_never_succeed_is_refused_before_the_training(hub, monkeypatch):
    with pytest.raises(ValueError, match="Repo id"):
        BackgroundPush("user/mo del", token=hub.token)
    monkeypatch.setattr("custom_ddpm.hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="no token"):
        BackgroundPush("user/model")


def test_a_folder_that_cannot_be_pushed_does_not_end_the_run(hub, tmp_path, caplog):
    BackgroundPush("user/model", token=hub.token).push(tmp_path / "nothing", "step 1")
    assert "model_index.json is missing" in caplog.text


def test_a_program_ends_while_its_push_hangs(hub, run, tmp_path):
    hub.fail("POST", "/repos/create", "slow", delay=600)
    program = f"""if True:
        from custom_ddpm.hub import BackgroundPush
        BackgroundPush("user/model").push({str(run)!r}, "step 1")
        print("trained")
    """
    result = subprocess.run(
        [sys.executable, "-c", program], env=hub.env(tmp_path, hub.token), capture_output=True, text=True, timeout=120
    )
    assert result.stdout == "trained\n" and result.returncode == 0


def test_the_token_is_nowhere_after_a_push(hub, run, tmp_path):
    home = tmp_path / "home"
    program = f"""if True:
        import logging
        logging.basicConfig(level=logging.DEBUG)
        from custom_ddpm.hub import push_pipeline
        try:
            push_pipeline({str(run)!r}, "user/model")
        except Exception:
            logging.exception("first")
            push_pipeline({str(run)!r}, "user/model")
        print(open("/proc/self/cmdline").read())
    """
    hub.fail("POST", "/commit/main", 500)
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=hub.env(home, hub.token) | {"HF_DEBUG": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert hub.files("user/model").keys() == MAIN_FILES
    assert hub.asked("POST", "/commit/main")[0].user == "user"  # it was sent, and is in these places:
    assert "first" in result.stderr
    places = [result.stdout, result.stderr, *map(repr, contents(run).values()), *map(repr, contents(home).values())]
    places += [repr(data) for branch in ("main", "diffusers") for data in hub.files("user/model", branch).values()]
    for place in places:
        assert hub.token not in place


# ---- model card ----

FACTS = {
    "license": "cc-by-4.0",
    "base_model": "google/ddpm-cifar10-32",
    "dataset": "user/digits",
    "num_images": 1797,
    "recipe": {"learning_rate": 1e-4, "resolution": [8], "max_train_steps": None, "output_dir": "runs/secret-place"},
    "steps": 12000,
    "metrics": {"fid": 3.25, "kid": 0.001, "note": "text", "is_nothing": None},
    "evaluation": {"num_samples": 1000},
    "command": "accelerate launch train_ddpm.py --dataset_name user/digits",
}


def test_the_card_says_what_is_known(hub, run):
    half = run / "unet" / "diffusion_pytorch_model.fp16.safetensors"  # the same parameters once more
    shutil.copyfile(run / "unet" / "diffusion_pytorch_model.safetensors", half)
    card = write_model_card(run, FACTS)
    assert (run / "README.md").read_text() == str(card)
    card.validate()
    data = ModelCard.load(run / "README.md").data
    assert (data.license, data.library_name) == ("cc-by-4.0", "diffusers")
    assert data.pipeline_tag == "unconditional-image-generation"
    assert data.datasets == ["user/digits"] and data.base_model == "google/ddpm-cifar10-32"
    assert {(r.metric_type, r.metric_value) for r in data.eval_results} == {("fid", 3.25), ("kid", 0.001)}
    assert {r.dataset_type for r in data.eval_results} == {"user/digits"} and data.model_name == "run"
    parameters = sum(p.numel() for p in make_pipeline().unet.parameters())
    for text in (
        f"{parameters:,} parameters",
        "gray pictures, 8x8 pixels",
        f"{STEPS} steps",
        "linear",
        "![Samples](samples.png)",
        "(loss_curve.png)",
        "1,797 pictures",
        "learning_rate: 0.0001",
        "12,000 optimiser steps",
        "| fid | 3.25 |",
        "num_samples 1000",
        FACTS["command"],
        f"torch {torch.__version__}",
    ):
        assert text in card.text, text
    assert "secret-place" not in card.text and "max_train_steps" not in card.text


def test_the_card_claims_nothing_that_is_not_known(hub, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    card = write_model_card(tmp_path, {})
    card.validate()
    assert card.data.eval_results is None and card.data.datasets is None and card.data.license == "unknown"
    assert "Nothing was measured." in card.text and ".png" not in card.text
    assert "model-index" not in str(card)


def test_a_local_dataset_is_named_but_its_place_is_not(run, tmp_path):
    (tmp_path / "my-pictures").mkdir()
    card = write_model_card(run, {"dataset": str(tmp_path / "my-pictures"), "base_model": str(run)})
    assert card.data.datasets is None and card.data.base_model is None
    assert "`my-pictures`" in card.text and str(tmp_path) not in str(card)


def test_the_home_folder_in_the_command_is_not_told(run, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    card = write_model_card(run, {"command": "train_ddpm.py --output_dir /home/someone/runs/a"})
    assert "train_ddpm.py --output_dir ~/runs/a" in card.text and "someone" not in str(card)


def test_a_token_in_the_command_or_the_recipe_is_not_on_the_card(hub, run):
    facts = {"command": f"train_ddpm.py --hub_token {hub.token}", "recipe": {"note": hub.token}}
    assert hub.token not in str(write_model_card(run, facts))


def test_a_class_conditional_model_shows_its_classes(hub, tmp_path):
    make_pipeline(num_class_embeds=3, id2label={0: "cat", 1: "dog"}).save_pretrained(tmp_path)
    card = write_model_card(tmp_path, {})
    assert "0 (cat), 1 (dog)" in card.text and "class_labels=[0, 1, 0, 1]" in card.text
    assert "class-conditional" in card.data.tags and 'revision="diffusers"' not in card.text


# ---- trust ----


def test_what_was_pushed_is_verified_on_the_hub_and_on_the_disk(hub, run, saved, tmp_path):
    push_pipeline(run, "user/model", token=hub.token, private=True)
    assert verify_repository("user/model", token=hub.token) == []
    assert verify_repository("user/model", revision="diffusers", token=hub.token) == []
    assert verify_repository(saved) == []
    assert len(hub.asked("GET", r"/resolve/.*\.(safetensors|png)")) == 0
    snapshot = HfApi(token=hub.token).snapshot_download("user/model", cache_dir=tmp_path / "cache")
    assert verify_repository(snapshot) == []


TAMPERING = [
    ("unet/unet.py", b"print('ran')", "unet/unet.py is not the file"),
    ("unet/unet.py", None, "unet/unet.py is not the file"),  # None: one byte more
    ("scheduler/schedules.py", b"", "scheduler/schedules.py is not the file"),
    ("unet/helper.py", b"x = 1", "unet/helper.py is code"),
    ("unet/native.SO", b"x", "unet/native.SO is code"),
    ("setup.sh", b"x", "setup.sh is code"),
    ("unet/diffusion_pytorch_model.bin", b"x", "is a pickle"),
    ("old/weights.PT", b"x", "is a pickle"),
    ("model.ckpt", b"x", "is a pickle"),
    ("optimizer.pkl", b"x", "is a pickle"),
    ("unet/config.json", b'{"block_out_channels": [100000, 8]}', "block_out_channels"),
    ("unet/config.json", b'{"block_out_channels": [8192, 8192, 8192], "layers_per_block": 200}', "absurd size"),
    ("unet/config.json", json.dumps({"block_out_channels": [8] * 1000}).encode(), "absurd size"),
    ("unet/config.json", b'{"sample_size": [8, 1000000]}', "sample_size"),
    ("unet/config.json", b'{"sample_size": 1e99}', "sample_size"),
    ("unet/config.json", b'{"in_channels": -1}', "in_channels"),
    ("unet/config.json", b'{"block_out_channels": [8, null]}', "block_out_channels"),
    ("unet/a.safetensors.index.json", b'{"weight_map": {"a": "../b.safetensors"}}', "weight_map leads out"),
    ("unet/A.JSON", b"{", "not JSON"),
    ("unet/config.json", b'{"auto_map": {"AutoModel": "a/b--c.D"}}', "auto_map"),
    ("unet/config.json", b"[" * 100_000, "not JSON"),
    ("scheduler/scheduler_config.json", b'{"num_train_timesteps": 1000001}', "num_train_timesteps"),
    ("model_index.json", b'{"_class_name": ["other/repository", "Pipeline"]}', "neither ours nor of diffusers"),
    ("model_index.json", b'{"_class_name": "DDPMPipeline", "unet": ["os", "system"]}', "unet is ['os', 'system']"),
    ("model_index.json", b'{"_class_name": "DDPMPipeline", "unet": ["../x", "Y"]}', "neither ours nor of diffusers"),
    ("model_index.json", b'{"_class_name": "NoSuchPipeline"}', "neither ours nor of diffusers"),
    ("model_index.json", b"{}", "_class_name is None"),
    ("model_index.json", b"[]", "not a mapping"),
]


@pytest.mark.parametrize("name, data, problem", TAMPERING)
def test_a_folder_that_cannot_be_trusted_is_refused_with_a_reason(saved, tmp_path, name, data, problem):
    shutil.copytree(saved, tmp_path / "model")
    path = tmp_path / "model" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(path.read_bytes() + b"\n" if data is None else data)
    (found,) = verify_repository(tmp_path / "model")
    assert problem in found and found.startswith(name) and "\n" not in found and len(found) < 300


def test_a_repository_that_cannot_be_trusted_is_refused_with_the_same_reason(hub, saved):
    push_pipeline(saved, "user/model", token=hub.token, stock_branch=False)
    tampered = {name: (data, problem) for name, data, problem in TAMPERING}
    files = hub.repos["model", "user/model"].at("main").files
    files.update(
        {name: File(files[name].data + b"\n" if data is None else data) for name, (data, _) in tampered.items()}
    )
    found = verify_repository("user/model", token=hub.token)
    assert len(found) == len(tampered)
    for name, (_, problem) in tampered.items():
        assert any(line.startswith(name) and problem in line for line in found), name


def test_the_revision_that_is_asked_for_is_the_one_verified(hub, run):
    push_pipeline(run, "user/model", token=hub.token)
    hub.repos["model", "user/model"].at("diffusers").files["unet/config.json"] = File(b'{"in_channels": 0}')
    assert verify_repository("user/model") == []
    (found,) = verify_repository("user/model", revision="diffusers")
    assert "in_channels" in found


def test_a_config_too_large_to_read_is_not_read(hub, saved, monkeypatch):
    push_pipeline(saved, "user/model", token=hub.token, stock_branch=False)
    monkeypatch.setattr("custom_ddpm.hub.MAX_READ", 10)
    hub.requests.clear()
    assert all("bytes; more than 10 make no sense" in problem for problem in verify_repository("user/model"))
    assert hub.asked("GET", "/resolve/") == []


def test_names_that_lead_out_are_refused_and_not_downloaded(hub, saved):
    push_pipeline(saved, "user/model", token=hub.token, stock_branch=False)
    names = ["../up.json", "/etc/x.json", "unet/../../x.py", "..\\up.json", "C:/x.json"]
    hub.repos["model", "user/model"].at("main").files.update({name: File(b"{}") for name in names})
    assert verify_repository("user/model") == [f"{name!r} leads out of the repository" for name in names]
    assert [request for request in hub.requests if request.path.endswith(("up.json", "/x.json", "/x.py"))] == []


def test_links_that_lead_out_are_refused(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.json").write_text("{}")
    (folder / "to-folder").symlink_to(tmp_path / "outside")
    (folder / "to-file.json").symlink_to(tmp_path / "outside" / "x.json")
    (folder / "inside.json").symlink_to(folder / "unet" / "config.json")
    assert verify_repository(folder) == [
        "to-file.json is a link that leads out of the folder",
        "to-folder is a link that leads out of the folder",
    ]


def test_an_empty_folder_is_no_pipeline(tmp_path):
    assert verify_repository(tmp_path) == ["model_index.json is missing, so this is no pipeline"]


def test_verifying_what_is_not_there_is_one_clear_line(hub):
    with pytest.raises(HubError, match=r"user/absent could not be verified: .*\(40[14]\)") as caught:
        verify_repository("user/absent", token=hub.token)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError):
        verify_repository("no/such/folder")


def test_every_code_file_of_the_release_is_known_by_its_place(saved):
    shipped = {p.relative_to(saved).as_posix() for p in saved.rglob("*.py")}
    code = release_code()
    assert shipped <= code.keys()
    for name in shipped:
        assert hashlib.sha256((saved / name).read_bytes()).digest() == hashlib.sha256(code[name].read_bytes()).digest()
