"""BackgroundPush, with the real client against the test double of the Hub."""

import subprocess
import sys

import pytest

from custom_ddpm.hub import BackgroundPush
from hub.shared import train_a_little


def test_background_push_sends_the_files_at_the_time_of_the_call(hub, run):
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


def test_background_failure_is_one_warning_and_the_next_push_succeeds(hub, run, caplog):
    hub.fail("*", "/commit/main", 500)
    background = BackgroundPush("user/model", token=hub.token)
    background.push(run, "step 1")
    background._wait(run, 60)
    (record,) = [r for r in caplog.records if r.name == "custom_ddpm.hub.push"]
    assert "an internal error (500)" in record.getMessage() and "\n" not in record.getMessage()
    assert record.exc_info is None and hub.token not in caplog.text
    background.push(run, "step 2")
    background._wait(run, 60)
    assert hub.log("user/model") == ["step 2", "initial commit"]


def test_hanging_push_blocks_neither_training_nor_finish(hub, run, caplog):
    hub.fail("POST", "/repos/create", "slow", delay=60)
    background = BackgroundPush("user/model", token=hub.token)
    background.push(run, "step 1")
    background.push(run, "step 2")
    background.finish(run, "last", timeout=0.2)
    messages = [r.getMessage() for r in caplog.records if r.name == "custom_ddpm.hub.push"]
    assert messages[0] == "'step 2' is not pushed: the previous push is still running"
    assert "did not finish within 0 s" in messages[1] and "custom-ddpm push" in messages[1]
    assert messages[2].startswith("'last' is not pushed")


def test_finish_pushes_the_last_pipeline_after_the_running_push(hub, run):
    hub.fail("POST", "/repos/create", "slow", delay=0.5)
    background = BackgroundPush("user/model", token=hub.token)
    background.push(run, "step 1")
    train_a_little(run)
    background.finish(run, "last")
    assert hub.log("user/model") == ["last", "step 1", "initial commit"]


def test_invalid_repo_id_or_missing_token_is_rejected_at_construction(hub, monkeypatch):
    with pytest.raises(ValueError, match="Repo id"):
        BackgroundPush("user/mo del", token=hub.token)
    monkeypatch.setattr("custom_ddpm.hub.push.get_token", lambda: None)
    with pytest.raises(ValueError, match="no token"):
        BackgroundPush("user/model")


def test_invalid_folder_is_a_warning_in_a_background_push(hub, tmp_path, caplog):
    BackgroundPush("user/model", token=hub.token).push(tmp_path / "nothing", "step 1")
    assert "model_index.json is missing" in caplog.text


def test_program_exits_while_its_push_hangs(hub, run, tmp_path):
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
