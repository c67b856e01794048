"""Every fenced block of every page runs, in one session per page and in order, or says why it does not.

A block that is not run has the comment `<!-- not run: reason -->` before it. A block of text after a block of Python is
what that block prints. Trainings are made small by `SMALL`; nothing else of a block is changed but `REPLACED`.
"""

import argparse
import dataclasses
import json
import os
import re
import struct
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from custom_ddpm.cli import make_parser
from custom_ddpm.config import TrainingConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for folder in ("*.md", "docs/*.md", "examples/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(folder)
)
# The code is the same, so it runs once.
TRANSLATED = {
    "README.zh.md": "README.md",
    "docs/derivation.zh.md": "docs/derivation.md",
    "docs/editing.zh.md": "docs/editing.md",
    "docs/app.zh.md": "docs/app.md",
    "docs/gallery.zh.md": "docs/gallery.md",
}
FENCE = re.compile(r"^(?:<!-- (?P<comment>[^\n]*) -->\n+)?^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$", re.M | re.S)
RUNNABLE = ("python", "bash")

SIZES = {
    "max_train_steps": "2",
    "lr_warmup_steps": "0",
    "train_batch_size": "2",
    "block_out_channels": "8 16",
    "down_block_types": "DownBlock2D AttnDownBlock2D",
    "layers_per_block": "1",
    "norm_num_groups": "4",
    "ddpm_num_steps": "50",
    "ddpm_num_inference_steps": "2",
    "eval_batch_size": "10",
}
SMALL_FLAGS = " ".join(f"--{name} {value}" for name, value in SIZES.items())
SMALL_SETTINGS = json.dumps(
    {
        name: [int(word) if word.isdecimal() else word for word in value.split()] if " " in value else int(value)
        for name, value in SIZES.items()
    }
)
# Page -> what is made smaller, or stands in the folder of the test instead of elsewhere.
REPLACED = {
    "README.md": [('output_dir="my-model-4")', f'output_dir="my-notebook-model", **{SMALL_SETTINGS})')],
    "docs/training.md": [
        ('output_dir="my-model")', f'output_dir="my-model", **{SMALL_SETTINGS})'),
        ("T_max=200", "T_max=4"),
        ("max_train_steps=200", "max_train_steps=4"),
        ("step.step % 50", "step.step % 2"),
        ("num_inference_steps=50", "num_inference_steps=2"),
        ("--posthoc_ema_steps 5000", "--posthoc_ema_steps 1"),
        ("sigma_rel=0.15", "sigma_rel=0.1"),  # what two snapshots can give
    ],
    "docs/editing.md": [("num_inference_steps=100", "num_inference_steps=4"), ("jump_n_sample=10", "jump_n_sample=2")],
    "examples/README.md": [("/usr/share/datasets/fashion-mnist", "idx")],
}
TRAINING = re.compile(r"((?:accelerate launch [^\n#]*(?:train_ddpm\.py|custom_ddpm\.train)|custom-ddpm train)[^\n#&]*)")
INSTALLED = re.compile(r"^python3 -m venv \.venv && \. \.venv/bin/activate && pip install -e \. && ", re.M)

DRIVER = """
import contextlib, io, json, subprocess, sys

session = {}
with open(sys.argv[1], encoding="utf-8") as file:
    blocks = json.load(file)
for where, language, code, printed in blocks:
    print("+", where, file=sys.stderr, flush=True)
    if language == "bash":
        subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)
        continue
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(code, where, "exec"), session)
    if printed is not None and output.getvalue().strip() != printed.strip():
        sys.exit(f"{where} prints {output.getvalue()!r} and not {printed!r}")
"""


@dataclasses.dataclass
class Block:
    where: str
    language: str
    code: str
    reason: str | None  # why it is not run
    printed: str | None = None


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page; a text that a block prints is part of that block."""
    text, found = (ROOT / page).read_text(encoding="utf-8"), []
    for match in FENCE.finditer(text):
        where = f"{page}:{text[: match.start('code')].count(chr(10))}"
        reason = re.fullmatch(r"not run: (.{10,})", match["comment"] or "")
        block = Block(where, match["language"], match["code"], reason and reason[1])
        if block.language == "text" and not block.reason and found and found[-1].language == "python":
            found[-1].printed = block.code
        else:
            found.append(block)
    assert len(re.findall(r"^\s*(?:```|~~~)", text, re.M)) == 2 * len(list(FENCE.finditer(text))), f"{page}: odd fences"
    assert text.count("<!-- not run") == sum(block.reason is not None for block in found), f"{page}: stray comment"
    return found


def prepared(page: str) -> list[Block]:
    """The blocks of a page that are run, made small and without the installation."""
    run, used = [block for block in blocks(page) if block.reason is None], set()
    for block in run:
        for old, new in REPLACED.get(page, []):
            used |= {old} if old in block.code else set()
            block.code = block.code.replace(old, new)
        if block.language == "bash":
            block.code = INSTALLED.sub("", block.code)
            block.code = TRAINING.sub(lambda match: f"{match[1].rstrip()} {SMALL_FLAGS} ", block.code)
    assert used == {old for old, _ in REPLACED.get(page, [])}, f"{page} has not all that is replaced"
    return run


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with what the commands find in a clone of the repository, and pictures of a user's."""
    for name in ("train_ddpm.py", "examples", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    generator = np.random.default_rng(0)
    (tmp_path / "my_pictures").mkdir()
    for i in range(4):
        PIL.Image.fromarray(generator.integers(0, 256, (20, 24, 3), np.uint8)).save(tmp_path / f"my_pictures/{i}.png")
    (tmp_path / "my.yaml").write_text("train_data_dir: my_pictures\nresolution: 8\noutput_dir: my-cpu-model\n")
    (tmp_path / "idx").mkdir()
    for part in ("train", "t10k"):
        images, labels = generator.integers(0, 256, (20, 28, 28)), np.arange(20) % 10
        (tmp_path / f"idx/{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"idx/{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def paste(run: list[Block], folder: Path) -> None:
    """Run blocks in order in one session of `folder`."""
    (folder / "session.json").write_text(
        json.dumps([(block.where, block.language, block.code, block.printed) for block in run])
    )
    (folder / "session.py").write_text(DRIVER)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, str(folder / "session.py"), str(folder / "session.json")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_why_not(page: str) -> None:
    for block in blocks(page):
        assert block.reason or block.language in RUNNABLE, f"{block.where}: neither run nor a reason"


def test_the_pages_have_blocks_that_run() -> None:
    """The search for blocks finds them."""
    assert {"README.md", "README.zh.md", "CONTRIBUTING.md", "docs/training.md", "examples/README.md"} <= set(PAGES)
    assert len(prepared("README.md")) > 6
    assert len(prepared("docs/derivation.md")) > 20
    assert sum(block.printed is not None for block in prepared("docs/derivation.md")) > 20


def without_comments(code: str) -> list[str]:
    return [line.partition("#")[0].rstrip() for line in code.splitlines()]


@pytest.mark.parametrize("page", TRANSLATED)
def test_a_translation_has_the_same_code(page: str) -> None:
    ours, original = ([(b.language, without_comments(b.code)) for b in blocks(p)] for p in (page, TRANSLATED[page]))
    assert ours == original


def with_code(slow: bool) -> list[str]:
    """Pages that have something to run; training takes long."""
    pages = [page for page in PAGES if page not in TRANSLATED]
    runs = {page: [block for block in blocks(page) if block.reason is None] for page in pages}
    trains = {page for page in pages if any(re.search(r"accelerate|train\(", block.code) for block in runs[page])}
    return [page for page in pages if runs[page] and (page in trains) == slow]


@pytest.mark.parametrize("page", with_code(slow=False))
def test_a_page_as_pasted(page: str, clone: Path) -> None:
    paste(prepared(page), clone)


@pytest.mark.slow
@pytest.mark.parametrize("page", with_code(slow=True))
def test_a_page_that_trains_as_pasted(page: str, clone: Path) -> None:
    paste(prepared(page), clone)


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_mathematics_of_the_readme_runs_alone(page: str, clone: Path) -> None:
    block = next(block for block in blocks(page) if "posterior_mean_variance" in block.code)
    paste([block], clone)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_point_to_files_and_headings(page: str) -> None:
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parsers of `custom-ddpm`, by the name of the command."""
    return next(action.choices for action in make_parser()._actions if action.choices)


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_readme_names_every_command_every_extra_and_the_oldest_python(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for command in commands():
        assert f"custom-ddpm {command}" in text
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for extra in project["optional-dependencies"]:
        assert f'".[{extra}]"' in text + contributing
    assert f"Python {project['requires-python'].removeprefix('>=')}" in text


OTHERS_FLAGS = set(  # of accelerate, pip, datasets' split syntax and sbatch
    "quiet cpu multi_gpu num_processes num_machines machine_rank main_process_ip main_process_port use_fsdp "
    "fsdp_version fsdp_auto_wrap_policy rdzv_backend max_restarts index-url job-name time nodes ntasks-per-node "
    "gpus-per-node dependency check".split()
)


@pytest.mark.parametrize("page", PAGES)
def test_flags_that_a_page_names_exist(page: str) -> None:
    known = {option for each in commands().values() for option in each._option_string_actions}
    known |= {f"--{field.name}" for field in dataclasses.fields(TrainingConfig)} | {"--help", "--version", "--config"}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", (ROOT / page).read_text(encoding="utf-8")))
    assert named - known <= {f"--{name}" for name in OTHERS_FLAGS}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nprint(undefined)\n```\n", "NameError"),
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "prints"),
        ("```bash\nfalse | true\n```\n", "CalledProcessError"),
        ("```console\n$ ls\n```\n", "neither run nor a reason"),
        ("```text\nfiles\n```\n", "neither run nor a reason"),
        ("<!-- not run: -->\n```text\nfiles\n```\n", "neither run nor a reason|stray"),
        ("<!-- not run: needs a GPU -->\n\nwords\n\n```bash\ntrue\n```\n", "stray comment"),
    ],
)
def test_a_wrong_block_is_detected(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(AssertionError, match=message):
        test_every_block_is_run_or_says_why_not("page.md")
        paste(prepared("page.md"), tmp_path)
