"""A run that is killed at any of its file-system events and resumed leaves the files of one that was not killed."""

import hashlib
import os
import sys
from pathlib import Path

import datasets
import pytest
from runs import SERVER, metrics, needs_forkserver, run

pytestmark = [pytest.mark.usefixtures("digits_cache"), needs_forkserver, pytest.mark.slow]

# Everything that can be due at a step, often at the same one.
CHANGES = {
    "split": "train[:10%]",
    "validation_split": "train[99%:]",
    "train_batch_size": 8,
    "max_train_steps": 8,
    "checkpointing_steps": 2,
    "save_images_steps": 2,
    "posthoc_ema_steps": 4,
    "eval_steps": 4,
    "eval_num_images": 50,
    "eval_features": "runs:small_features",
    "logging_steps": 2,
    "checkpoints_total_limit": 2,
}
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}


def run_with_events(output_dir: Path, cache: str, kill_at: int | None, count_in: str | None, resume: bool) -> None:
    """Train; end the process before its file-system event number `kill_at` in the output folder."""
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event not in EVENTS or not str(arguments[0]).startswith(str(output_dir)):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        if seen == kill_at:
            os._exit(9)
        seen += 1

    sys.addaudithook(hook)
    run(output_dir, **CHANGES, **({"resume_from_checkpoint": "latest"} if resume else {}))
    if count_in is not None:
        Path(count_in).write_text(str(seen))


def in_a_process(*arguments: object) -> int:
    process = SERVER.Process(target=run_with_events, args=arguments, daemon=True)
    process.start()
    process.join(120)
    return process.exitcode


def left(output_dir: Path) -> dict[str, str]:
    """Path -> hash of all that a run leaves, without what tells of time or of the resume."""
    told = ("metrics.jsonl", "metadata.json", "manifest.json", "training_config.yaml", ".lock")
    files = [file for file in output_dir.rglob("*") if file.is_file()]
    return {
        file.relative_to(output_dir).as_posix(): ""
        if file.name in told
        else hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def test_killed_at_each_event(tmp_path):
    cache = str(datasets.config.HF_DATASETS_CACHE)
    straight, count = tmp_path / "straight", tmp_path / "count"
    assert in_a_process(straight, cache, None, str(count), False) == 0
    events = int(count.read_text())
    assert events > 50
    expected = left(straight)
    wrong = []
    for kill_at in range(events):
        folder = tmp_path / f"killed-{kill_at}"
        assert in_a_process(folder, cache, kill_at, None, False) == 9
        assert in_a_process(folder, cache, None, None, True) == 0, f"event {kill_at}: could not be resumed"
        found = left(folder)
        differing = {name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)}
        # The card and the settings of the pipeline name the folder.
        differing -= {"README.md"}
        if differing or metrics(folder) != metrics(straight):
            wrong.append((kill_at, sorted(differing)))
    print(f"{events} file-system events, killed at each; not the same files: {wrong}")
    assert wrong == []
