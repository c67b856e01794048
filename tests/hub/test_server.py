"""The test double of the Hub, used by the real client over a socket."""

import hashlib
import json
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http

from hub.server import HubServer

WEIGHTS = bytes(range(256)) * 64


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def api(hub, monkeypatch):
    """The real client of the test double, without its pauses between attempts."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    return HfApi(endpoint=hub.endpoint, token=hub.token)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nhello\n")
    (folder / "unet" / "config.json").write_text("{}")
    (folder / "unet" / "model.safetensors").write_bytes(WEIGHTS)
    return folder


def push(api, folder, **kwargs):
    api.create_repo("user/model", exist_ok=True)
    return api.upload_folder(repo_id="user/model", folder_path=folder, **kwargs)


def other_token(hub):
    return next(token for token, name in hub.users.items() if name == "other")


def test_upload_and_download_preserve_bytes(hub, api, folder, tmp_path):
    push(api, folder, commit_message="first")
    assert hub.log("user/model") == ["first", "initial commit"]
    path = api.snapshot_download("user/model", local_dir=tmp_path / "copy")
    for name in ("README.md", "unet/config.json", "unet/model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()
    assert path == str(tmp_path / "copy")


def test_large_and_binary_files_are_stored_in_lfs_and_text_is_not(hub, api, tmp_path):
    (tmp_path / "text.json").write_text("x" * (10 * 2**20 + 1))
    (tmp_path / "small.json").write_text("x")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    push(api, tmp_path)
    stored = hub.repos["model", "user/model"].at("main").files
    assert {name for name, file in stored.items() if file.sha256} == {"text.json", "picture.png"}
    assert stored["picture.png"].sha256 == hashlib.sha256(b"\x89PNG\0").hexdigest()
    info = {file.path: file for file in api.list_repo_tree("user/model", recursive=True)}
    assert info["picture.png"].lfs.size == 5 and info["small.json"].lfs is None
    assert len(hub.asked("PUT", "/storage/")) == 2


def test_oids_equal_those_of_git(hub, api, folder, tmp_path):
    push(api, folder)
    expected = subprocess.run(
        ["git", "hash-object", folder / "README.md"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert api.get_paths_info("user/model", "README.md")[0].blob_id == expected


def test_stored_files_are_not_sent_again_and_unchanged_folder_makes_no_commit(hub, api, folder):
    push(api, folder)
    push(api, folder)
    assert hub.log("user/model") == ["Upload folder using huggingface_hub", "initial commit"]
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="copy.safetensors", repo_id="user/model")
    assert len(hub.asked("PUT", "/storage/")) == 1


def test_one_commit_adds_and_deletes(hub, api, folder):
    push(api, folder)
    operations = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("unet/", is_folder=True)]
    api.create_commit("user/model", operations, commit_message="change")
    assert hub.files("user/model").keys() == {".gitattributes", "README.md", "new.txt"}
    assert next(commit.title for commit in api.list_repo_commits("user/model")) == "change"
    with pytest.raises(RemoteEntryNotFoundError):
        api.delete_file("absent.txt", "user/model")


def test_files_are_read_by_branch_name_and_by_sha(hub, api, folder, tmp_path):
    first = push(api, folder).oid
    api.create_branch("user/model", branch="feature/x")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch("user/model", branch="feature/x")
    api.create_branch("user/model", branch="feature/x", exist_ok=True)
    changed = b"---\nlicense: mit\n---\nchanged\n"
    api.upload_file(path_or_fileobj=changed, path_in_repo="README.md", repo_id="user/model", revision="feature/x")
    assert {branch.name for branch in api.list_repo_refs("user/model").branches} == {"main", "feature/x"}
    assert api.model_info("user/model").sha == first
    assert {s.rfilename for s in api.model_info("user/model", revision="feature/x").siblings} >= {"README.md"}

    def read(revision):
        where = tmp_path / (revision or "main").replace("/", "-")
        with open(api.hf_hub_download("user/model", "README.md", revision=revision, cache_dir=where), "rb") as file:
            return file.read()

    assert read("feature/x") == changed
    assert read(first) == read(None) == (folder / "README.md").read_bytes()
    with pytest.raises(RevisionNotFoundError):
        read("no-such-branch")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download("user/model", "absent", cache_dir=tmp_path)
    api.delete_branch("user/model", branch="feature/x")
    assert [branch.name for branch in api.list_repo_refs("user/model").branches] == ["main"]


def test_tree_lists_one_folder_or_all_recursively(hub, api, folder):
    push(api, folder)
    assert {item.path for item in api.list_repo_tree("user/model")} == {".gitattributes", "README.md", "unet"}
    inside = {"unet/config.json", "unet/model.safetensors"}
    assert {item.path for item in api.list_repo_tree("user/model", "unet")} == inside
    everything = {item.path for item in api.list_repo_tree("user/model", recursive=True)}
    assert everything == inside | {".gitattributes", "README.md", "unet"}


def test_interrupted_download_resumes(hub, api, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # the client keeps whole chunks, of 10 MB by default
    push(api, folder)
    hub.fail("GET", "/storage/", "cut")
    path = api.hf_hub_download("user/model", "unet/model.safetensors", cache_dir=tmp_path)
    with open(path, "rb") as file:
        assert file.read() == WEIGHTS
    cut, resumed = hub.asked("GET", "/storage/")
    assert "range" not in cut.headers
    assert resumed.headers["range"] == f"bytes={len(WEIGHTS) // 2}-" and resumed.status == 206


def test_lfs_storage_receives_no_token(hub, api, folder, tmp_path):
    push(api, folder)
    api.snapshot_download("user/model", cache_dir=tmp_path)
    stored = hub.asked("PUT", "/storage/") + hub.asked("GET", "/storage/")
    assert len(stored) == 2 and not any("authorization" in request.headers for request in stored)
    assert all(request.user == "user" for request in hub.asked("GET", "/resolve/|/api/models/"))


def test_whoami_and_tokens(hub, api):
    assert api.whoami()["name"] == "user"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=hub.endpoint, token="hf_wrong").whoami()
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(endpoint=hub.endpoint, token=False).create_repo("user/model")
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(endpoint=hub.endpoint, token=other_token(hub)).create_repo("user/model")


def test_private_repository_is_visible_to_its_owner_only(hub, api, folder):
    api.create_repo("user/model", private=True)
    push(api, folder)
    assert api.model_info("user/model").private
    for token in (False, other_token(hub)):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(endpoint=hub.endpoint, token=token).model_info("user/model")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("user/model")
    api.delete_repo("user/model")
    assert not api.repo_exists("user/model")


@pytest.mark.parametrize("status", [401, 403, 404, 409, 429, 500])
def test_rejected_commit_changes_nothing_and_the_next_one_succeeds(hub, api, folder, status):
    hub.fail("POST", "/commit/", status)
    with pytest.raises(HfHubHTTPError, match=str(status)):
        push(api, folder)
    assert hub.log("user/model") == ["initial commit"]
    push(api, folder, commit_message="again")
    assert hub.log("user/model") == ["again", "initial commit"]
    assert len(hub.asked("PUT", "/storage/")) == 1  # files stored by the first push are not sent again


def test_client_retries_after_the_retry_after_header(hub, api, folder, monkeypatch):
    waited = []
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=waited.append))
    hub.fail("PUT", "/storage/", 429, times=2, retry_after=7)
    push(api, folder)
    assert waited == [8.0, 8.0]  # the client adds one second
    assert [request.status for request in hub.asked("PUT", "/storage/")] == [429, 429, 200]


def test_interrupted_upload_is_sent_again(hub, api, folder):
    hub.fail("PUT", "/storage/", "cut")
    push(api, folder)
    assert [request.status for request in hub.asked("PUT", "/storage/")] == [None, 200]
    assert hub.files("user/model")["unet/model.safetensors"] == WEIGHTS


def test_lost_response_does_not_undo_the_commit(hub, api, folder):
    hub.fail("POST", "/commit/", "lost")
    with pytest.raises(Exception, match="disconnected"):
        push(api, folder, commit_message="once")
    assert hub.log("user/model") == ["once", "initial commit"]
    push(api, folder, commit_message="twice")
    assert hub.log("user/model") == ["once", "initial commit"]


def test_slow_response_arrives(hub, api):
    hub.fail("GET", "whoami", "slow", delay=0.2)
    assert api.whoami()["name"] == "user"


def test_invalid_uploads_are_rejected(hub, api, folder):
    push(api, folder)
    address = f"{hub.endpoint}/storage/model/user/model/{'0' * 64}"
    session = _http.get_session()
    assert session.put(f"{address}?signature={hub.signature}", content=b"x").status_code == 400
    assert session.put(address, content=b"x").status_code == 403
    line = {"key": "file", "value": {"path": "../up.txt", "content": "", "encoding": "base64"}}
    answer = session.post(
        f"{hub.endpoint}/api/models/user/model/commit/main",
        content="\n".join(json.dumps(item) for item in ({"key": "header", "value": {"summary": "s"}}, line)),
        headers={"Authorization": f"Bearer {hub.token}"},
    )
    assert answer.status_code == 400


@pytest.mark.parametrize(
    "metadata, problem",
    [
        ("license: nonsense", "license"),
        ("pipeline_tag: nonsense", "pipeline_tag"),
        ("tags: ddpm", "tags"),
        ("datasets:\n- a/b/c", "datasets"),
        ("model-index:\n- name: x\n  results:\n  - task: {type: t}", "model-index"),
        ("a: [", "YAML"),
    ],
)
def test_card_with_invalid_metadata_is_rejected(hub, api, metadata, problem):
    api.create_repo("user/model")

    def push_card(metadata):
        card = f"---\n{metadata}\n---\n".encode()
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="user/model")

    with pytest.raises(ValueError, match=problem):
        push_card(metadata)
    assert "README.md" not in hub.files("user/model")
    push_card("license: mit\ntags:\n- ddpm")


def test_card_validate_uses_the_test_double(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    ModelCard("---\nlicense: mit\n---\n").validate()
    with pytest.raises(ValueError, match="license"):
        ModelCard("---\nlicense: nonsense\n---\n").validate()


def test_subprocess_finds_the_test_double_by_its_environment(hub, api, folder, tmp_path):
    api.create_repo("user/model", private=True)
    push(api, folder)
    program = textwrap.dedent(
        """
        from huggingface_hub import snapshot_download
        print(sorted(p.name for p in __import__("pathlib").Path(snapshot_download("user/model")).iterdir()))
        """
    )
    run = [sys.executable, "-I", "-c", program]
    result = subprocess.run(run, env=hub.env(tmp_path, hub.token), capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.strip() == "['.gitattributes', 'README.md', 'unet']", result.stderr
    result = subprocess.run(run, env=hub.env(tmp_path / "b"), capture_output=True, text=True, cwd=tmp_path)
    assert "RepositoryNotFoundError" in result.stderr and hub.token not in result.stderr


def test_dataset_is_loaded_by_datasets(hub, tmp_path, api):
    api.create_repo("user/numbers", repo_type="dataset")
    for split in ("train", "test"):
        data = f"number,name\n1,{split}\n".encode()
        api.upload_file(
            path_or_fileobj=data, path_in_repo=f"data/{split}.csv", repo_id="user/numbers", repo_type="dataset"
        )
    program = "from datasets import load_dataset; print(load_dataset('user/numbers', split='test')[0])"
    result = subprocess.run(
        [sys.executable, "-c", program], env=hub.env(tmp_path), capture_output=True, text=True, cwd=tmp_path
    )
    assert result.stdout.strip() == "{'number': 1, 'name': 'test'}", result.stderr
