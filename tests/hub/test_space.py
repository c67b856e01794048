"""A Space with the page of a pushed model, on the test double of the Hub."""

import re
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path

import pytest
import yaml

from custom_ddpm.cli import main
from custom_ddpm.hub import HubError
from custom_ddpm.hub.space import push_space, write_space

ROOT = Path(__file__).parents[2]


def test_push_with_space_pushes_the_model_and_the_page(hub, run, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    main(["push", str(run), "user/model", "--space"])
    assert capsys.readouterr().out.split() == [f"{hub.endpoint}/user/model", f"{hub.endpoint}/spaces/user/model"]
    files = hub.files("user/model", type="space")
    card = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", files["README.md"].decode(), re.S)[1])
    assert (card["sdk"], card["app_file"], card["models"]) == ("gradio", "app.py", ["user/model"])
    assert '"user/model"' in files["app.py"].decode()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.match(r"[\w.-]+", each)[0].lower() for each in files["requirements.txt"].decode().splitlines()}
    assert needed == {re.match(r"[\w.-]+", each)[0].lower() for each in project["dependencies"]}
    for name in ("custom_ddpm/app/page.css", "custom_ddpm/pipelines/pictures.py", "custom_ddpm/unet.py"):
        assert name in files
    assert not any("__pycache__" in name or "secret" in name or hub.token in str(data) for name, data in files.items())


def test_a_second_push_replaces_the_files(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    main(["push", str(run), "user/model", "--space", "--private"])
    space = hub.repos["space", "user/model"]
    assert space.private and "HF_TOKEN" in hub.files("user/model", type="space")["README.md"].decode()
    files = dict(space.at("main").files)
    files["custom_ddpm/gone.py"] = files["app.py"]
    space.commit("main", "an older version", files)
    push_space("user/model", private=True, token=hub.token)
    assert "custom_ddpm/gone.py" not in hub.files("user/model", type="space")


def test_the_space_of_a_private_model_is_private(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    main(["push", str(run), "user/model", "--private"])
    push_space("user/model", token=hub.token)
    assert hub.repos["space", "user/model"].private


def test_a_space_of_somebodys_own_is_not_replaced(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    main(["push", str(run), "user/model", "--space"])
    space = hub.repos["space", "user/model"]
    own = space.at("main").files["app.py"]
    for files in ({"README.md": own}, {"app.py": own}):
        space.commit("main", "by hand", files)
        with pytest.raises(HubError, match="was not made by `custom-ddpm push --space`"):
            push_space("user/model", token=hub.token)
        assert space.at("main").files == files


def test_a_missing_model_and_a_failing_hub_are_told_in_one_line(hub, run):
    with pytest.raises(HubError, match="user/nothing") as error:
        push_space("user/nothing", token=hub.token)
    assert "\n" not in str(error.value) and ("space", "user/nothing") not in hub.repos


@pytest.mark.slow
def test_the_files_of_the_space_serve_the_page_on_the_pushed_model(hub, run, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    main(["push", str(run), "user/model", "--space"])
    folder = tmp_path / "space"
    for name, data in hub.files("user/model", type="space").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    app = folder / "app.py"
    app.write_text(app.read_text().replace('"7860"', '"7867"').replace("0.0.0.0", "127.0.0.1"))
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=folder, env=hub.env(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        page = None
        while page is None and process.poll() is None:
            time.sleep(0.5)
            try:
                page = urllib.request.urlopen("http://127.0.0.1:7867/").read().decode()
            except OSError:
                continue
        assert page is not None, process.stdout.read().decode()
        assert "user/model" in page and str(ROOT) not in page
    finally:
        process.kill()


def test_nothing_but_the_package_is_copied(tmp_path):
    write_space(tmp_path, "user/model")
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "app.py", "custom_ddpm", "requirements.txt"}
    assert {path.suffix for path in (tmp_path / "custom_ddpm").rglob("*") if path.is_file()} <= {
        ".py",
        ".css",
        ".j2",
        ".typed",
    }
