"""Verification of folders and of repositories on the test double of the Hub."""

import hashlib
import json
import shutil

import pytest
from huggingface_hub import HfApi

from custom_ddpm.hub import HubError, push_pipeline, release_code, verify_repository
from hub.repository import File


def test_pushed_pipeline_passes_on_the_hub_and_on_disk(hub, run, saved, tmp_path):
    push_pipeline(run, "user/model", token=hub.token, private=True)
    assert verify_repository("user/model", token=hub.token) == []
    assert verify_repository("user/model", revision="diffusers", token=hub.token) == []
    assert verify_repository(saved) == []
    assert len(hub.asked("GET", r"/resolve/.*\.(safetensors|png)")) == 0
    snapshot = HfApi(token=hub.token).snapshot_download("user/model", cache_dir=tmp_path / "cache")
    assert verify_repository(snapshot) == []


TAMPERING = [
    ("unet/unet.py", b"print('ran')", "unet/unet.py differs from the file"),
    ("unet/unet.py", None, "unet/unet.py differs from the file"),  # None: one byte more
    ("scheduler/schedules.py", b"", "scheduler/schedules.py differs from the file"),
    ("unet/helper.py", b"x = 1", "unet/helper.py is code that is not part"),
    ("unet/native.SO", b"x", "unet/native.SO is code"),
    ("setup.sh", b"x", "setup.sh is code"),
    ("unet/diffusion_pytorch_model.bin", b"x", "is a pickle"),
    ("old/weights.PT", b"x", "is a pickle"),
    ("model.ckpt", b"x", "is a pickle"),
    ("optimizer.pkl", b"x", "is a pickle"),
    ("unet/config.json", b'{"block_out_channels": [100000, 8]}', "block_out_channels"),
    ("unet/config.json", b'{"block_out_channels": [8192, 8192, 8192], "layers_per_block": 200}', "implausible size"),
    ("unet/config.json", json.dumps({"block_out_channels": [8] * 1000}).encode(), "implausible size"),
    ("unet/config.json", b'{"sample_size": [8, 1000000]}', "sample_size"),
    ("unet/config.json", b'{"sample_size": 1e99}', "sample_size"),
    ("unet/config.json", b'{"in_channels": -1}', "in_channels"),
    ("unet/config.json", b'{"block_out_channels": [8, null]}', "block_out_channels"),
    ("unet/a.safetensors.index.json", b'{"weight_map": {"a": "../b.safetensors"}}', "weight_map points outside"),
    ("unet/A.JSON", b"{", "not JSON"),
    ("unet/config.json", b'{"auto_map": {"AutoModel": "a/b--c.D"}}', "auto_map"),
    ("unet/config.json", b"[" * 100_000, "not JSON"),
    ("scheduler/scheduler_config.json", b'{"num_train_timesteps": 1000001}', "num_train_timesteps"),
    (
        "model_index.json",
        b'{"_class_name": ["other/repository", "Pipeline"]}',
        "a class of neither",
    ),
    ("model_index.json", b'{"_class_name": "DDPMPipeline", "unet": ["os", "system"]}', "unet is ['os', 'system']"),
    (
        "model_index.json",
        b'{"_class_name": "DDPMPipeline", "unet": ["../x", "Y"]}',
        "unet is ['../x', 'Y']; it must be a CustomUNet2DModel or a UNet2DModel",
    ),
    ("model_index.json", b'{"_class_name": "NoSuchPipeline"}', "a class of neither"),
    ("model_index.json", b"{}", "_class_name is None"),
    ("model_index.json", b"[]", "not a mapping"),
]


@pytest.mark.parametrize("name, data, problem", TAMPERING)
def test_tampered_folder_is_reported_with_the_reason(saved, tmp_path, name, data, problem):
    shutil.copytree(saved, tmp_path / "model")
    path = tmp_path / "model" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(path.read_bytes() + b"\n" if data is None else data)
    (found,) = verify_repository(tmp_path / "model")
    assert problem in found and found.startswith(name) and "\n" not in found and len(found) < 300


def test_tampered_repository_is_reported_with_the_same_reasons(hub, saved):
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


def test_given_revision_is_the_one_verified(hub, run):
    push_pipeline(run, "user/model", token=hub.token)
    hub.repos["model", "user/model"].at("diffusers").files["unet/config.json"] = File(b'{"in_channels": 0}')
    assert verify_repository("user/model") == []
    (found,) = verify_repository("user/model", revision="diffusers")
    assert "in_channels" in found


def test_oversized_config_is_not_downloaded(hub, saved, monkeypatch):
    push_pipeline(saved, "user/model", token=hub.token, stock_branch=False)
    for module in ("folder", "verify"):
        monkeypatch.setattr(f"custom_ddpm.hub.{module}.MAX_READ", 10)
    hub.requests.clear()
    assert all("bytes; at most 10 are allowed" in problem for problem in verify_repository("user/model"))
    assert hub.asked("GET", "/resolve/") == []


def test_names_that_point_outside_are_reported_and_not_downloaded(hub, saved):
    push_pipeline(saved, "user/model", token=hub.token, stock_branch=False)
    names = ["../up.json", "/etc/x.json", "unet/../../x.py", "..\\up.json", "C:/x.json"]
    hub.repos["model", "user/model"].at("main").files.update({name: File(b"{}") for name in names})
    assert verify_repository("user/model") == [f"{name!r} points outside the repository" for name in names]
    assert [request for request in hub.requests if request.path.endswith(("up.json", "/x.json", "/x.py"))] == []


def test_links_that_point_outside_are_reported(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.json").write_text("{}")
    (folder / "to-folder").symlink_to(tmp_path / "outside")
    (folder / "to-file.json").symlink_to(tmp_path / "outside" / "x.json")
    (folder / "inside.json").symlink_to(folder / "unet" / "config.json")
    assert verify_repository(folder) == [
        "to-file.json is a link that points outside the folder",
        "to-folder is a link that points outside the folder",
    ]


def test_empty_folder_is_not_a_pipeline(tmp_path):
    assert verify_repository(tmp_path) == ["model_index.json is missing, so this is not a pipeline"]


def test_missing_repository_is_reported_in_one_line(hub):
    with pytest.raises(HubError, match=r"user/absent could not be verified: .*\(40[14]\)") as caught:
        verify_repository("user/absent", token=hub.token)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError):
        verify_repository("no/such/folder")


def test_release_code_lists_every_code_file_of_a_saved_pipeline(saved):
    shipped = {p.relative_to(saved).as_posix() for p in saved.rglob("*.py")}
    code = release_code()
    assert shipped <= code.keys()
    for name in shipped:
        assert hashlib.sha256((saved / name).read_bytes()).digest() == hashlib.sha256(code[name].read_bytes()).digest()
