"""A Space of the Hub that shows the page of `custom-ddpm app` for a pushed model.

It holds the code of the installed package, so it runs this version, whatever is published elsewhere.
"""

import importlib.metadata
import re
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from .. import pipelines
from .._version import __version__
from .errors import NETWORK_ERRORS, HubError, failure_reason
from .push import _resolve_token

PACKAGE = Path(__file__).parents[1]
APP = '''"""Shows the page of `custom-ddpm app`, which draws with {model}."""

from custom_ddpm.cli import main

if __name__ == "__main__":
    main(["app", "{model}", "--host", "0.0.0.0", "--port", "7860", "--runs", "."])
'''
README = """---
title: {title}
sdk: gradio
{version}app_file: app.py
models:
- {model}
pinned: false
---

Draw and edit pictures with [{model}](https://huggingface.co/{model}), a denoising diffusion model. The page is in
English and, at `/zh`, in Chinese. {made}, custom-ddpm {own}.
{private}"""
MADE = "Made by `custom-ddpm push --space`"  # how a Space is recognised when it is pushed again
PRIVATE = "\nThe model is private: the Space needs a secret `HF_TOKEN` with a token that can read it.\n"


def push_space(model_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Write a Space that runs the page on a model of the Hub, and push it, in one commit.

    Args:
        model_id: "user/model", which exists; the Space has the same name.
        private: whether a Space that is created is private; None: as the model is.
        token: access token; None uses the one logged in with.

    Returns:
        The URL of the Space.

    Raises:
        HubError: the Hub or the connection to it failed, or the Space is there and was not made by this function.
    """
    api = HfApi(token=_resolve_token(token) or False, library_name="custom-ddpm", library_version=__version__)
    try:
        with tempfile.TemporaryDirectory(prefix="space-") as folder:
            model = api.model_info(model_id)
            write_space(Path(folder), model.id, bool(model.private))
            _check_is_ours(api, model.id)
            address = api.create_repo(
                model.id,
                repo_type="space",
                space_sdk="gradio",
                private=model.private if private is None else private,
                exist_ok=True,
            )
            api.upload_folder(
                repo_id=model.id,
                repo_type="space",
                folder_path=folder,
                commit_message="Push the page",
                delete_patterns="*",
            )
    except NETWORK_ERRORS as error:
        raise HubError(f"pushing the Space {model_id} failed: {failure_reason(error)}; push it again") from error
    return str(address)


def _check_is_ours(api: HfApi, space: str) -> None:
    """Raise HubError for a Space of somebody's own, all of whose files would be replaced."""
    if not api.repo_exists(space, repo_type="space"):
        return
    made = False
    if api.file_exists(space, "README.md", repo_type="space"):
        with tempfile.TemporaryDirectory(prefix="space-card-") as folder:
            card = api.hf_hub_download(space, "README.md", repo_type="space", cache_dir=folder)
            made = MADE in Path(card).read_text(encoding="utf-8", errors="replace")
    if not made:
        raise HubError(f"the Space {space} is there, and was not made by `custom-ddpm push --space`; rename it first")


def write_space(folder: Path, model_id: str, private: bool = False) -> None:
    """Write the files of a Space: its card, its requirements, app.py, and the code of this package.

    Args:
        folder: an empty folder.
        model_id: "user/model".
        private: whether the model is private, so that the Space needs a token.
    """
    for source, name in ((PACKAGE, "custom_ddpm"), (Path(pipelines.__file__).parent, "custom_ddpm/pipelines")):
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "*.pyi")
        shutil.copytree(source, folder / name, ignore=ignored, dirs_exist_ok=True)
    (folder / "app.py").write_text(APP.format(model=model_id), encoding="utf-8")
    # gradio is installed by the Space.
    needed = [each for each in importlib.metadata.requires("custom-ddpm") or () if "extra ==" not in each]
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")
    try:
        version = f"sdk_version: {importlib.metadata.version('gradio')}\n"
    except importlib.metadata.PackageNotFoundError:
        version = ""  # the newest
    title = re.sub(r"[^\w .-]", "", model_id.rpartition("/")[2])
    words = {"model": model_id, "made": MADE, "own": __version__, "private": PRIVATE if private else ""}
    (folder / "README.md").write_text(README.format(title=title, version=version, **words), encoding="utf-8")
