"""push_pipeline, with the real client against the test double of the Hub."""

import re
import subprocess
import sys
import sysconfig
import traceback

import numpy as np
import pytest
import torch
from conftest import make_pipeline
from huggingface_hub import HfApi, ModelCard

from custom_ddpm import CustomDDPMPipeline, CustomDDPMScheduler, CustomUNet2DModel
from custom_ddpm.hub import HubError, push_pipeline
from hub.shared import MAIN_FILES, STEPS, STOCK_FILES, contents, train_a_little


def test_only_pipeline_files_are_pushed_in_one_commit_per_branch(hub, run):
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


def test_repo_id_without_user_gets_the_tokens_user(hub, run):
    assert push_pipeline(run, "model", token=hub.token) == f"{hub.endpoint}/user/model"
    assert '"user/model"' in hub.files("user/model")["README.md"].decode()


def test_pushed_repository_loads_without_the_package(hub, run, tmp_path):
    """Runs the snippets of the card."""
    push_pipeline(run, "user/model", token=hub.token, private=True)
    card = hub.files("user/model")["README.md"].decode()
    remote, package, stock = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    home = tmp_path / "elsewhere"
    home.mkdir()
    program = f"""if True:
        import importlib, sys
        sys.path.append({sysconfig.get_paths()["purelib"]!r})  # its .pth files are not read, so no editable install
        sys.modules["custom_ddpm"] = None  # in case it is installed there
        try:
            importlib.import_module("custom_ddpm")
            raise SystemExit("the package was imported")
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


@pytest.mark.slow
def test_a_pushed_model_is_edited_without_the_package(hub, run, tmp_path):
    push_pipeline(run, "user/model", token=hub.token)
    program = """if True:
        import sys
        sys.modules["custom_ddpm"] = None
        import numpy as np
        from diffusers import DiffusionPipeline

        image = np.linspace(0, 1, 64).reshape(8, 8)
        for name, options in (
            ("img2img", {"image": image, "num_inference_steps": 4}),
            ("inpaint", {"image": image, "mask_image": image > 0.5, "num_inference_steps": 4}),
            ("interpolate", {"image": [image, image], "num_inference_steps": 4}),
        ):
            name = f"pipeline_custom_ddpm_{name}"
            pipeline = DiffusionPipeline.from_pretrained("user/model", custom_pipeline=name, trust_remote_code=True)
            assert pipeline(**options).images[0].size == (8, 8)
    """
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=hub.env(tmp_path, hub.token), cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_package_loads_pushed_branches_without_running_their_code(hub, run):
    push_pipeline(run, "user/model", token=hub.token)
    unet_file = hub.repos["model", "user/model"].at("main").files["unet/unet.py"]
    unet_file.data = b"raise SystemExit('a file of the repository was run')"
    expected = make_pipeline(num_train_timesteps=STEPS).unet.state_dict()
    for revision in ("main", "diffusers", hub.repos["model", "user/model"].branches["main"]):
        loaded = CustomDDPMPipeline.from_pretrained("user/model", revision=revision)
        assert type(loaded.unet) is CustomUNet2DModel and type(loaded.scheduler) is CustomDDPMScheduler
        for name, tensor in loaded.unet.state_dict().items():
            assert torch.equal(tensor, expected[name])


def test_unchanged_pipeline_makes_no_commit_and_changed_one_makes_one(hub, run):
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


def test_other_files_of_the_repository_are_kept(hub, run):
    push_pipeline(run, "user/model", token=hub.token)
    others = {"notes.md", "images/a.txt", "unet/extra.json", "old/unet/config.json", "docs/README.md"}
    for name in others:
        HfApi(token=hub.token).upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id="user/model")
    train_a_little(run)
    push_pipeline(run, "user/model", token=hub.token)
    assert hub.files("user/model").keys() == MAIN_FILES | others


def test_edited_card_is_pushed_unchanged(hub, run):
    (run / "README.md").write_text("---\nlicense: mit\n---\nMy words about user/other.\n")
    push_pipeline(run, "user/model", token=hub.token)
    assert hub.files("user/model")["README.md"] == (run / "README.md").read_bytes()


def test_card_metadata_rejected_by_the_hub_is_reported(hub, run):
    (run / "README.md").write_text("---\nlicense: nonsense\n---\n")
    with pytest.raises(
        HubError, match=r'the Hub rejects the request \(400: Invalid metadata in README.md. - "license" must be'
    ):
        push_pipeline(run, "user/model", token=hub.token)


def test_folder_without_card_gets_one_in_the_repository_only(hub, run):
    (run / "README.md").unlink()
    push_pipeline(run, "user/model", token=hub.token)
    assert ModelCard(hub.files("user/model")["README.md"].decode()).data.library_name == "diffusers"
    assert not (run / "README.md").exists()


def test_model_that_cannot_be_converted_is_pushed_to_main_only_with_a_warning(hub, tmp_path, caplog):
    make_pipeline(classes=2).save_pretrained(tmp_path)
    push_pipeline(tmp_path, "user/model", token=hub.token)
    assert hub.repos["model", "user/model"].branches.keys() == {"main"}
    assert "the branch 'diffusers' is not pushed: " in caplog.text
    assert 'diffusers")' not in hub.files("user/model")["README.md"].decode()


def test_stock_branch_false_pushes_main_only(hub, run):
    push_pipeline(run, "user/model", token=hub.token, stock_branch=False)
    assert hub.repos["model", "user/model"].branches.keys() == {"main"}


def test_private_creates_private_repository_and_rejects_public_one(hub, run):
    push_pipeline(run, "user/secret", token=hub.token, private=True)
    assert hub.repos["model", "user/secret"].private
    push_pipeline(run, "user/open", token=hub.token)
    train_a_little(run)
    with pytest.raises(HubError, match=r"user/open exists and is public.* user/open --private$"):
        push_pipeline(run, "user/open", token=hub.token, private=True)
    assert len(hub.log("user/open")) == 2


# Errors before the first request


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda run: (run / "model_index.json").unlink(), "model_index.json is missing"),
        (lambda run: (run / "unet/diffusion_pytorch_model.safetensors").unlink(), "no safetensors weights"),
        (lambda run: (run / "unet/unet.py").write_text("x = 1"), "unet/unet.py differs from the file of custom-ddpm"),
        (lambda run: (run / "unet/other.py").write_text("x = 1"), "unet/other.py is code that is not part"),
        (lambda run: (run / "unet/config.json").write_text('{"layers_per_block": 1000000}'), "layers_per_block"),
        (lambda run: (run / "unet/config.json").write_text("{"), "unet/config.json is not JSON"),
    ],
)
def test_invalid_pipeline_folder_is_rejected_before_any_request(hub, run, change, problem):
    change(run)
    with pytest.raises(ValueError, match=re.escape(problem)):
        push_pipeline(run, "user/model", token=hub.token)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["README.md", "unet/config.json"])
def test_file_that_contains_the_token_is_rejected(hub, run, name):
    text = (run / name).read_text()
    (run / name).write_text(text.replace("{", '{"_token": "' + hub.token + '",') if "json" in name else hub.token)
    with pytest.raises(ValueError, match=f"{name} contains the token") as caught:
        push_pipeline(run, "user/model", token=hub.token)
    assert hub.token not in str(caught.value) and hub.requests == []


@pytest.mark.parametrize("repo_id", ["a/b/c", "", "user/mo del", "../up"])
def test_invalid_repo_id_is_rejected(hub, run, repo_id):
    with pytest.raises(ValueError):
        push_pipeline(run, repo_id, token=hub.token)
    assert hub.requests == []


def test_malformed_token_is_rejected_and_not_shown(hub, run):
    with pytest.raises(ValueError, match="the token contains characters") as caught:
        push_pipeline(run, "user/model", token="hf_abc\r\ndef")
    assert "abc" not in str(caught.value)


# Errors of the Hub and of the connection

FAILURES = [
    ("/commit/main", 401, "not accepted (401)"),
    ("/commit/main", 403, "no write permission there (403)"),
    ("/commit/main", 404, "does not exist, or the token has no access"),
    ("/commit/main", 409, "in progress (409)"),
    ("/commit/main", 412, "in progress (412)"),
    ("/commit/main", 413, "rejects the request (413"),
    ("/commit/main", 429, "too many requests (429); retry after 30 s"),
    ("/commit/main", 500, "an internal error (500)"),
    ("/commit/main", "cut", "connection to the Hub failed"),
    ("/commit/main", "lost", "connection to the Hub failed"),
    ("/commit/diffusers", 500, "an internal error (500)"),
    ("/branch/diffusers", 403, "no write permission there (403)"),
    ("/repos/create", 401, "not accepted (401)"),
    ("/repos/create", 403, "no write permission there (403)"),
    ("/repos/create", "cut", "connection to the Hub failed"),
    ("/validate-yaml", 500, "an internal error (500)"),
    ("/preupload/", 503, "an internal error (503)"),
    ("/preupload/", "cut", "connection to the Hub failed"),
    ("/storage/", 500, "an internal error (500)"),
    ("/storage/", "cut", "connection to the Hub failed"),
    ("/storage/", 403, "no write permission there (403)"),
]


@pytest.mark.parametrize("path, failure, reason", FAILURES)
def test_each_failure_is_one_line_and_the_push_can_be_repeated(hub, run, path, failure, reason):
    before = contents(run)
    hub.fail("*", path, failure, times=100, retry_after=30)
    with pytest.raises(HubError) as caught:
        push_pipeline(run, "user/model", token=hub.token, commit_message="pushed")
    message = str(caught.value)
    assert reason in message and "\n" not in message
    assert message.endswith(f"still complete in {run}; push it again: custom-ddpm push {run} user/model")
    assert hub.token not in "".join(traceback.format_exception(caught.value))
    assert contents(run) == before

    hub.failures.clear()
    push_pipeline(run, "user/model", token=hub.token, commit_message="pushed")
    assert hub.files("user/model").keys() == MAIN_FILES
    assert hub.files("user/model", "diffusers").keys() == STOCK_FILES
    assert hub.log("user/model") == ["pushed", "initial commit"]
    uploads = [request.path for request in hub.asked("PUT", "/storage/") if request.status == 200]
    assert len(uploads) == len(set(uploads))  # nothing is sent twice


def test_unreachable_hub_is_reported_in_one_line(hub, run):
    hub.__exit__()
    with pytest.raises(HubError, match="connection to the Hub failed") as caught:
        push_pipeline(run, "user/model", token=hub.token)
    assert "\n" not in str(caught.value)


def test_hub_that_does_not_answer_times_out(hub, run):
    hub.fail("POST", "/commit/main", "slow", delay=30)
    with pytest.raises(HubError, match="did not finish within 1 s"):
        push_pipeline(run, "user/model", token=hub.token, timeout=1)


def test_slow_hub_is_waited_for(hub, run):
    hub.fail("POST", "/commit/main", "slow", delay=0.5)
    push_pipeline(run, "user/model", token=hub.token)
    assert hub.files("user/model").keys() == MAIN_FILES


def test_missing_and_wrong_tokens_are_reported(hub, run, monkeypatch):
    monkeypatch.setattr("custom_ddpm.hub.push.get_token", lambda: None)
    for token in (None, "hf_wrong"):
        with pytest.raises(HubError, match="missing or not accepted") as caught:
            push_pipeline(run, "user/model", token=token)
        assert "hf_wrong" not in str(caught.value)


def test_token_is_in_no_output_or_file_after_a_push(hub, run, tmp_path):
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
    assert hub.asked("POST", "/commit/main")[0].user == "user"  # the token was sent, but is in none of these:
    assert "first" in result.stderr
    places = [result.stdout, result.stderr, *map(repr, contents(run).values()), *map(repr, contents(home).values())]
    places += [repr(data) for branch in ("main", "diffusers") for data in hub.files("user/model", branch).values()]
    for place in places:
        assert hub.token not in place
